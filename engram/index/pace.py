"""How fast rows may come so that their graphs keep up."""

from __future__ import annotations

from collections import deque

import trio

# Assumed until a build has been measured.
_FIRST_RATE = 5000.0
_RATED_SEALS = 8
# However far an index is beyond the limit, rows come at this share of the rate.
_LEAST_PACE = 0.1
# Seconds. Shorter waits are saved up: a pause for every row would cost the loop, and the log, more than
# the row does.
_SHORTEST_DELAY = 0.02


class Pace:
    """The speed of sealing, measured, and who must wait for it."""

    def __init__(self) -> None:
        self._seals: deque[tuple[int, float]] = deque(maxlen=_RATED_SEALS)
        self._merging = 0.0
        self._next_slot = 0.0

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

    def delay(self, unindexed: int, limit: int, rows: int) -> float:
        """Seconds that `rows` should wait when `unindexed` have no graph yet.

        From `limit` on they are spaced so that together all come as fast as rows are sealed, and slower
        the further beyond it. Some come together, and then there is a longer pause.
        """
        excess = unindexed - limit
        if excess < 0:
            return 0.0
        now = trio.current_time()
        pace = self.rate * max(_LEAST_PACE, 1.0 - excess / limit)
        self._next_slot = max(now, self._next_slot) + rows / pace
        delay = self._next_slot - now
        return delay if delay >= _SHORTEST_DELAY else 0.0
