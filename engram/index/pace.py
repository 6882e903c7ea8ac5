"""How fast rows may come so that their graphs keep up, and who waits for it.

Beyond a limit of rows without a graph, rows are let in as fast as they are sealed, and slower the further
beyond it. Whoever waits for that waits for a condition: he goes on when his rows' turn has come, or as soon
as so few rows are left without a graph that his fit below the limit, or nothing is to be waited for. Who
leaves gives back what was left for him.

All who wait for one index are given rows at the same speed (processor sharing, as Demers, Keshav & Shenker
have it in "Analysis and simulation of a fair queueing algorithm", 1989). So one row never waits for all of a
large batch, and a large batch is not put off for ever by small ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

import attrs
import trio

# Assumed until a build has been measured.
_FIRST_RATE = 5000.0
_RATED_SEALS = 8
# However far an index is beyond the limit, rows come at this share of the rate.
_LEAST_PACE = 0.1
# The rows that may come in so many seconds are saved up, and no more than those do not wait: a pause for
# every row would cost the loop, and the log, more than the row does.
_SAVED_SECONDS = 0.02
# Rows: less is left by rounding alone. And seconds in which more than that come.
_ROUNDING = 1e-6
_LEAST_WAIT = 1e-4

Wait = Callable[[], Awaitable[None]]


class Unindexed(Protocol):
    """What is looked at of an index."""

    @property
    def id(self) -> int: ...

    @property
    def rows_unindexed(self) -> int: ...

    @property
    def seal_wanted(self) -> bool: ...


@attrs.define(eq=False)
class _Waiter:
    """Who goes on when each has been given `finish` rows; of several, who came first."""

    finish: float
    number: int
    rows: int
    since: float
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    waiting: bool = True

    def __lt__(self, other: _Waiter) -> bool:
        return (self.finish, self.number) < (other.finish, other.number)


class _Lane:
    """The rows that come to one index while it is beyond the limit. `speed` is in rows a second."""

    def __init__(self, index: Unindexed, limit: Callable[[], int], speed: Callable[[], float]) -> None:
        self._index = index
        self._limit = limit
        self._speed = speed
        self._waiters: list[_Waiter] = []
        self._numbers = count()
        self.waiting = 0
        # How many rows somebody has been given by now who has always waited.
        self._given = 0.0
        self._saved = _SAVED_SECONDS * speed()
        self._advanced = trio.current_time()
        # Who has been told when to go on.
        self._next: _Waiter | None = None

    @property
    def beyond(self) -> bool:
        """Whether rows have to wait for the builder."""
        return self._index.seal_wanted and self._index.rows_unindexed >= self._limit()

    def admit(self, rows: int) -> bool:
        """Whether so many rows may come at once; they are counted then."""
        self._advance()
        admitted = rows <= self._saved + _ROUNDING
        if admitted:
            self._saved -= rows
        self._plan()
        return admitted

    async def wait(self, rows: int) -> None:
        """Returns when so many rows may come."""
        self._advance()
        waiter = _Waiter(self._given + rows, next(self._numbers), rows, self._advanced)
        heappush(self._waiters, waiter)
        self.waiting += 1
        # It may have become so while the caller was on the way here.
        self.review()
        try:
            await trio.lowlevel.checkpoint()
            while waiter.waiting:
                # Rows may come more slowly by now than when this was planned.
                waiter.scope = trio.CancelScope()
                self._plan()
                with waiter.scope:
                    await trio.sleep_forever()
                self._advance()
        finally:
            self._advance()
            self._let_go(waiter)
            self._plan()

    def review(self) -> None:
        """Lets those go on whose rows fit below the limit; to be called when there are fewer rows."""
        self._advance()
        room = self._limit() - self._index.rows_unindexed if self._index.seal_wanted else float("inf")
        while room > 0 and (first := self._first()) is not None:
            room -= first.rows
            self._let_go(first)
        self._plan()

    def release(self) -> None:
        """Lets all go on."""
        while (first := self._first()) is not None:
            self._let_go(first)

    def _first(self) -> _Waiter | None:
        waiters = self._waiters
        while waiters and not waiters[0].waiting:
            heappop(waiters)
        return waiters[0] if waiters else None

    def _let_go(self, waiter: _Waiter) -> None:
        if waiter.waiting:
            waiter.waiting = False
            self.waiting -= 1
            waiter.scope.cancel()

    def _advance(self) -> None:
        """Shares out the rows that may have come since the last time."""
        now, speed = trio.current_time(), self._speed()
        rows = (now - self._advanced) * speed
        self._advanced = now
        # What is saved up is one more who waits, until it is enough.
        most_saved = _SAVED_SECONDS * speed
        share = max(0.0, min(most_saved - self._saved, rows / (self.waiting + 1)))
        self._saved += share
        rows -= share
        while (first := self._first()) is not None:
            wanted = (first.finish - self._given) * self.waiting
            if wanted > rows + _ROUNDING:
                self._given += rows / self.waiting
                return
            self._given = max(self._given, first.finish)
            rows = max(0.0, rows - wanted)
            self._let_go(first)
        self._saved = max(self._saved, min(most_saved, self._saved + rows))

    def _plan(self) -> None:
        """Has who is next go on when his turn will have come, unless something changes before."""
        first = self._first()
        if self._next is not None and self._next is not first:
            self._next.scope.deadline = float("inf")
        self._next = first
        if first is None:
            return
        speed = self._speed()
        missing = max(0.0, _SAVED_SECONDS * speed - self._saved)
        # Until enough is saved up, that has a share, too.
        wanted = (first.finish - self._given) * self.waiting
        shared = min(wanted, missing * self.waiting)
        seconds = (wanted + shared / self.waiting) / speed
        first.scope.deadline = max(self._advanced + max(seconds, _LEAST_WAIT), first.since + _SAVED_SECONDS)


class Pace:
    """The speed of sealing, measured, and who must wait for it.

    `limit` tells how many rows of an index may be without a graph.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._seals: deque[tuple[int, float]] = deque(maxlen=_RATED_SEALS)
        self._merging = 0.0
        # By id, of the indices that are beyond the limit or have somebody who waits.
        self._lanes: dict[int, _Lane] = {}

    def record(self, sealed: int, seconds: float, *, waited: bool) -> None:
        """A build has taken `sealed` rows off a head, 0 when it merged segments.

        What merges take while others wait is part of what sealing their rows takes; `waited` says
        whether rows wait now.
        """
        if sealed:
            self._seals.append((sealed, max(1e-3, seconds) + self._merging))
            self._merging = 0.0
        elif waited:
            self._merging += seconds

    @property
    def rate(self) -> float:
        """Rows a second that were sealed of late."""
        if not self._seals:
            return _FIRST_RATE
        return sum(rows for rows, _ in self._seals) / sum(seconds for _, seconds in self._seals)

    def admit(self, index: Unindexed, rows: int) -> Wait | None:
        """What waits until so many rows may come to an index; None when they may now, and are counted."""
        lane = self._lanes.get(index.id)
        if lane is None:
            lane = _Lane(index, self._limit, partial(self._speed, index))
            if not lane.beyond:
                return None
            self._lanes[index.id] = lane
        elif not lane.beyond:
            self.review(index.id)
            return None
        return None if lane.admit(rows) else partial(self._wait, lane, index.id, rows)

    async def _wait(self, lane: _Lane, index_id: int, rows: int) -> None:
        # It may have been given up on the way here.
        if self._lanes.get(index_id) is not lane:
            await trio.lowlevel.checkpoint()
            return
        try:
            await lane.wait(rows)
        finally:
            self._tidy(index_id)

    def review(self, index_id: int) -> None:
        """Lets those go on who need not wait any more; to be called when an index has fewer rows."""
        lane = self._lanes.get(index_id)
        if lane is not None:
            lane.review()
            self._tidy(index_id)

    def review_all(self) -> None:
        """As `review`, for each index; to be called when the limit has changed."""
        for index_id in list(self._lanes):
            self.review(index_id)

    def give_up(self, index_id: int) -> None:
        """Lets all go on who wait for an index: it is gone, or gets no graph."""
        lane = self._lanes.pop(index_id, None)
        if lane is not None:
            lane.release()

    def _tidy(self, index_id: int) -> None:
        lane = self._lanes.get(index_id)
        if lane is not None and not lane.waiting and not lane.beyond:
            del self._lanes[index_id]

    def _speed(self, index: Unindexed) -> float:
        """Rows a second that may come to one of the indices that are beyond the limit."""
        limit = self._limit()
        excess = max(0, index.rows_unindexed - limit)
        # One builder seals the rows of all of them.
        return self.rate * max(_LEAST_PACE, 1.0 - excess / limit) / max(1, len(self._lanes))
