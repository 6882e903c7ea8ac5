"""Search threads, and the queue they take batches of searches from."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, Generic, Protocol, TypeVar

import attrs
import numpy as np
import trio
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engram.index.distances import Floats
from engram.index.errors import SearchBusyError
from engram.index.search import SearchOptions, SearchResult, Share, call_in_turn, search_each
from engram.index.vector_index import View
from engram.supervision import keep_running

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Searches that have waited for too long are looked for so many times before they have waited as long again,
# but with pauses, in seconds, within these bounds.
_LOOKS = 10
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0


class Encoding(Protocol):
    """What becomes of the results of a search, in the search threads. What it raises is the outcome."""

    def encode(self, result: SearchResult) -> Any:
        """Takes the result of one query."""
        ...

    def join(self, encoded: list[Any]) -> Any:
        """The outcome of the whole search, from what `encode` made of the result of each query."""
        ...


class AsFound:
    """Leaves results as they are: the outcome is a list of SearchResult."""

    def encode(self, result: SearchResult) -> SearchResult:
        return result

    def join(self, encoded: list[Any]) -> list[Any]:
        return encoded


_AS_FOUND = AsFound()


@attrs.define(eq=False)
class _Whole:
    """What the parts of a search share: any thread may finish one."""

    encoding: Encoding
    # Called on the loop with the outcome.
    done: Callable[[Any], None]
    # What there is of each part.
    encoded: list[list[Any]]
    left: int
    begun: bool = False
    # The outcome is known, perhaps because a part has failed: the other parts are not wanted.
    over: bool = False
    _lock: Lock = attrs.field(factory=Lock)

    def finish(self, number: int, outcome: list[Any] | Exception) -> Callable[[], None] | None:
        """Notes the outcome of a part; returns what is to be called on the loop once all is known."""
        with self._lock:
            if self.over:
                return None
            if isinstance(outcome, list):
                self.encoded[number] = outcome
                self.left -= 1
                if self.left:
                    return None
            self.over = True
        if isinstance(outcome, list):
            outcome = _attempt(self._join)
        self.encoded = []
        return partial(self.done, outcome)

    def _join(self) -> Any:
        parts = self.encoded
        return self.encoding.join(parts[0] if len(parts) == 1 else list(chain.from_iterable(parts)))


@attrs.define(eq=False)
class _Search:
    """A part of a search: all of it, unless it has many queries."""

    view: View
    queries: Floats
    options: SearchOptions
    asked_for: Callable[[], bool]
    queued: float
    whole: _Whole
    number: int = 0

    @property
    def size(self) -> int:
        return len(self.queries)

    def finish(self, outcome: list[Any] | Exception) -> Callable[[], None] | None:
        """Notes the outcome; returns what is to be called on the loop once that of the whole is known."""
        return self.whole.finish(self.number, outcome)

    @property
    def begun(self) -> bool:
        """Whether it is the rest of a search that is under way."""
        return self.whole.begun

    def wanted(self) -> bool:
        return not self.whole.over and self.asked_for()

    def parts(self, size: int) -> Sequence[_Search]:
        """Searches of at most `size` queries each that together are this one."""
        starts = range(0, len(self.queries), size)
        if len(starts) <= 1:
            return [self]
        self.whole.encoded = [[] for _ in starts]
        self.whole.left = len(starts)
        return [
            attrs.evolve(self, queries=self.queries[start : start + size], number=number)
            for number, start in enumerate(starts)
        ]

    def rest(self, done: int) -> _Search:
        """This one without its first queries."""
        return attrs.evolve(self, queries=self.queries[done:])


@attrs.define(eq=False)
class _Read:
    function: Callable[[], Any]
    done: Callable[[Any], None]
    wanted: Callable[[], bool]
    queued: float
    size = 1
    begun = False

    def finish(self, outcome: Any) -> Callable[[], None]:
        """What is to be called on the loop."""
        return partial(self.done, outcome)


_Waiting = TypeVar("_Waiting", _Search, _Read)


class _Turns(Generic[_Waiting]):
    """What clients wait for: the clients take turns, and each has its own in order. False without any."""

    __slots__ = ("_clients", "_queues")

    def __init__(self) -> None:
        # Whose turn it is comes first; each has something in its queue.
        self._clients: deque[int] = deque()
        self._queues: dict[int, deque[_Waiting]] = {}

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, client: int, items: Iterable[_Waiting]) -> None:
        """Queues something for a client."""
        queue = self._queues.get(client)
        if queue is None:
            self._clients.append(client)
            self._queues[client] = deque(items)
        else:
            queue.extend(items)

    def first(self) -> _Waiting:
        """What `take` will return."""
        return self._queues[self._clients[0]][0]

    def take(self) -> _Waiting:
        """Takes what is next, of the client whose turn it is."""
        client = self._clients[0]
        queue = self._queues[client]
        item = queue.popleft()
        if queue:
            self._clients.rotate(-1)
        else:
            self._clients.popleft()
            del self._queues[client]
        return item

    def take_older(self, queued: float) -> list[_Waiting]:
        """Takes what was queued before a time; what is under way stays, and what is behind it."""
        taken: list[_Waiting] = []
        for client, queue in list(self._queues.items()):
            while queue and queue[0].queued < queued and not queue[0].begun:
                taken.append(queue.popleft())
            if not queue:
                self._clients.remove(client)
                del self._queues[client]
        return taken


@attrs.define(eq=False)
class _Lane(Generic[_Waiting]):
    """One kind of work: what of it waits, and how many of the threads that it may have are at it.

    Attributes:
        threads: the most threads that are at it at once.
        queues: what waits, by what is served in turn: an index, or a client.
        busy: threads that are at it.
        idle: threads of this kind that have nothing to do.
        calls: True for each of these that should look at the queues, False for one that should end.
    """

    threads: int
    queues: dict[int, _Turns[_Waiting]] = attrs.field(factory=dict)
    busy: int = 0
    idle: int = 0
    calls: SimpleQueue[bool] = attrs.field(factory=SimpleQueue)

    @property
    def ready(self) -> bool:
        """Whether a thread may take something of it."""
        return bool(self.queues) and self.busy < self.threads

    def call(self) -> None:
        """Has a thread that is idle, if there is one, look at the queues."""
        if self.idle:
            self.idle -= 1
            self.calls.put(True)

    def call_if_ready(self) -> None:
        """As `call`, where a thread may take something. One that is at it looks again before it idles."""
        if self.ready:
            self.call()

    def add(self, key: int, client: int, items: Iterable[_Waiting]) -> None:
        """Queues something."""
        turns = self.queues.get(key) or _Turns()
        turns.add(client, items)
        self.queues[key] = turns

    def next(self) -> tuple[int, _Turns[_Waiting]]:
        """The queue whose turn it is."""
        return next(iter(self.queues.items()))

    def go_on(self, key: int, turns: _Turns[_Waiting]) -> None:
        """That queue has had its turn."""
        del self.queues[key]
        if turns:
            self.queues[key] = turns

    def take_older(self, queued: float) -> list[_Waiting]:
        """Takes what was queued before a time and is not under way."""
        taken: list[_Waiting] = []
        for key, turns in list(self.queues.items()):
            taken += turns.take_older(queued)
            if not turns:
                del self.queues[key]
        return taken


class _Shared:
    """Calls that several threads make together: each takes the next until none is left."""

    def __init__(self, call: Callable[[int, int], None], count: int) -> None:
        self._call = call
        self._lock = Lock()
        self._untaken = count
        self._unfinished = count
        self._finished = Event()
        self._error: BaseException | None = None

    def help(self, worker: int) -> None:
        while True:
            with self._lock:
                if not self._untaken:
                    return
                self._untaken -= 1
                number = self._untaken
            try:
                self._call(number, worker)
            except BaseException as error:
                self._error = error
            with self._lock:
                self._unfinished -= 1
                if not self._unfinished:
                    self._finished.set()

    def finish(self, worker: int) -> None:
        """Makes what calls are left, and waits for those of others."""
        self.help(worker)
        self._finished.wait()
        if self._error is not None:
            raise self._error


_Work = Callable[[trio.lowlevel.TrioToken], bool]


class SearchService:
    """Runs searches in `threads` threads at a time, and other reads that take long in `readers` more.

    Searches run in batches of up to `max_batch` queries. A batch is what waits for one index: without a
    timer, the next one is what has come in during the last. A thread takes the next batch by itself, without
    a turn of the loop in between. Where there are `helpers`, another thread searches while it encodes what it
    has found, which takes the interpreter's lock. Those that are idle, and `helpers` more that do nothing
    else, help one that walks several graphs.

    Neither kind of work keeps the other from its threads. Clients take turns: each has a search in a batch
    before any has its next, and a read before any has its next. What is not begun within `timeout` seconds
    is answered with a SearchBusyError; with a timeout of 0 it waits.

    Where `soon` calls what it is given some steps later, threads are woken then: what is asked for together
    is in one batch. Each of the `workers`, the threads that search or help, has a number. The counters are
    `searches` (queries) and `batches` run, what is `waiting`, and what was `refused`.
    """

    def __init__(
        self,
        threads: int,
        helpers: int = 0,
        readers: int = 1,
        *,
        max_batch: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = threads + helpers
        # Without a core for it, another thread would only take smaller batches.
        self._spare = helpers > 0
        self._max_batch = max_batch
        # Guards the lanes and `waiting`; held for a few steps only.
        self._lock = Lock()
        self._now = now
        self._searches: _Lane[_Search] = _Lane(threads)
        self._reads: _Lane[_Read] = _Lane(readers)
        self._shared: deque[_Shared] = deque()
        # Which of the workers are at a search, and not only helping or encoding.
        self._searching = [False] * self.workers
        self.searches = 0
        self.batches = 0
        self.waiting = 0
        self.refused = 0
        self.timeout = 0.0
        self.soon: Callable[[Callable[[], None]], None] = lambda wake: wake()
        self._waking = False

    @property
    def idle(self) -> int:
        """How many threads have nothing to do."""
        return self._searches.idle + self._reads.idle

    def submit(
        self,
        index_id: int,
        view: View,
        queries: Floats,
        options: SearchOptions,
        done: Callable[[Any], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
        encoding: Encoding = _AS_FOUND,
    ) -> None:
        """Queues a search for each of `queries`, (n, dimension), all of which see the same view.

        `done` is called once on the loop, with what `encoding` makes of the results, in a search thread, or
        with what went wrong. What is not `wanted` any more when its turn comes is dropped; a search thread
        asks.
        """
        whole = _Whole(encoding, done, [[]], 1)
        parts = _Search(view, queries, options, wanted, self._now(), whole).parts(self._max_batch)
        self._queue(self._searches, index_id, client, parts, len(queries))

    def submit_read(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
    ) -> None:
        """Queues a call that only reads; `done` is called on the loop with what it returns or raises."""
        self._queue(self._reads, client, client, [_Read(function, done, wanted, self._now())], 1)

    def _queue(
        self, lane: _Lane[_Waiting], key: int, client: int, items: Sequence[_Waiting], size: int
    ) -> None:
        with self._lock:
            lane.add(key, client, items)
            self.waiting += size
        if not self._waking:
            self._waking = True
            try:
                self.soon(self._wake)
            except MemoryError:
                self._wake()

    def _wake(self) -> None:
        """Has threads look at the queues that have nothing to do."""
        self._waking = False
        with self._lock:
            self._searches.call_if_ready()
            self._reads.call_if_ready()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled. What is under way is finished first; the rest is not answered."""
        # BLAS threads of its own would spin beside the workers. The limit is the whole process's.
        threadpool_limits(1, user_api="blas")
        lanes: list[tuple[_Lane[Any], _Work]] = [
            (self._searches, partial(self._search_next, worker)) for worker in range(self.workers)
        ]
        lanes += [(self._reads, self._read_next)] * self._reads.threads
        limiter = trio.CapacityLimiter(len(lanes))
        token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            for lane, work in lanes:
                serve = partial(trio.to_thread.run_sync, _serve, lane, work, token, limiter=limiter)
                nursery.start_soon(keep_running, "a search thread", serve)
            nursery.start_soon(keep_running, "refusing late searches", self._refuse_what_is_late)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with self._lock:
                    self._searches.queues.clear()
                    self._reads.queues.clear()
                    self._shared.clear()
                    self.waiting = 0
                for lane, _ in lanes:
                    lane.calls.put(False)

    async def _refuse_what_is_late(self) -> None:
        while True:
            pause = self.timeout / _LOOKS or _LONGEST_PAUSE
            await trio.sleep(max(_SHORTEST_PAUSE, min(pause, _LONGEST_PAUSE)))
            self.refuse_late()

    def refuse_late(self) -> None:
        """Answers what has waited for too long."""
        if not self.timeout or not self.waiting:
            return
        oldest = self._now() - self.timeout
        with self._lock:
            late: list[_Search | _Read] = [
                *self._searches.take_older(oldest),
                *self._reads.take_older(oldest),
            ]
            self.waiting -= sum(each.size for each in late)
        for each in [each for each in late if each.wanted()]:
            self.refused += each.size
            _call(each.finish(SearchBusyError(self.timeout)))

    def _search_next(self, worker: int, token: trio.lowlevel.TrioToken) -> bool:
        """Helps another search, or runs the next batch; whether there was anything to do.

        What this holds, views of indices that may be dropped, is let go of before a thread idles.
        """
        shared, batch = None, None
        with self._lock:
            if self._shared:
                shared = self._shared.popleft()
            elif self._searches.ready:
                batch = self._take_searches(worker)
            else:
                self._searches.idle += 1
                return False
        if shared is not None:
            shared.help(worker)
            return True
        try:
            if batch:
                self._search(batch, worker, token)
        finally:
            self._leave(worker)
        return True

    def _leave(self, worker: int) -> None:
        """A worker searches no more: another one may. That may be said twice."""
        with self._lock:
            if self._searching[worker]:
                self._searching[worker] = False
                self._searches.busy -= 1
                self._searches.call_if_ready()

    def _read_next(self, token: trio.lowlevel.TrioToken) -> bool:
        """Makes the next read; whether there was one."""
        with self._lock:
            if not self._reads.ready:
                self._reads.idle += 1
                return False
            read = self._take_read()
        try:
            if read.wanted():
                token.run_sync_soon(_call, read.finish(_attempt(read.function)))
        finally:
            with self._lock:
                self._reads.busy -= 1
        return True

    def _search(self, batch: Sequence[_Search], worker: int, token: trio.lowlevel.TrioToken) -> None:
        """Runs a batch; those of one generation and with equal options are run together."""
        finished: list[Callable[[], None] | None] = []
        try:
            groups: dict[tuple[int, SearchOptions], list[_Search]] = {}
            for search in batch:
                groups.setdefault((search.view.generation, search.options), []).append(search)
            for left, members in zip(reversed(range(len(groups))), groups.values(), strict=True):
                # What is left to do with the last of them is to encode it: others may search meanwhile.
                searched = _nothing if left or not self._spare else partial(self._leave, worker)
                outcomes = _run_group(members, worker, self._share, searched)
                for search, outcome in zip(members, outcomes, strict=True):
                    finished.append(search.finish(outcome))
        except Exception as error:
            # Too little memory even for that: whoever has no answer yet has this one.
            bare = _bare(error)
            finished += [search.finish(bare) for search in batch]
        token.run_sync_soon(self._finish, sum(search.size for search in batch), finished)

    def _share(self, call: Callable[[int, int], None], count: int, worker: int) -> None:
        """Calls `call(number, worker)` for each number below `count`, together with threads that are idle."""
        if count < 2:
            call_in_turn(call, count, worker)
            return
        shared = _Shared(call, count)
        with self._lock:
            for _ in range(min(self._searches.idle, count - 1)):
                self._shared.append(shared)
                self._searches.call()
        shared.finish(worker)

    def _finish(self, queries: int, finished: Sequence[Callable[[], None] | None]) -> None:
        self.batches += 1
        self.searches += queries
        for each in finished:
            _call(each)

    def _take_searches(self, worker: int) -> list[_Search]:
        """The next batch, which a thread is at: empty where nobody wants what was next any more."""
        lane = self._searches
        key, turns = lane.next()
        batch: list[_Search] = []
        room = self._max_batch
        while turns and turns.first().size <= room:
            item = turns.take()
            self.waiting -= item.size
            item.whole.begun = True
            if item.wanted():
                room -= item.size
                batch.append(item)
        lane.go_on(key, turns)
        lane.busy += 1
        self._searching[worker] = True
        lane.call_if_ready()
        return batch

    def _take_read(self) -> _Read:
        """The next read, which a thread is at."""
        lane = self._reads
        key, turns = lane.next()
        item = turns.take()
        self.waiting -= item.size
        lane.go_on(key, turns)
        lane.busy += 1
        lane.call_if_ready()
        return item


def _serve(lane: _Lane[Any], work: _Work, token: trio.lowlevel.TrioToken) -> None:
    """What a thread does: `work` as long as there is any, and whenever it is called."""
    while work(token) or lane.calls.get():
        pass


def _nothing() -> None:
    """There is more to search for."""


def _attempt(function: Callable[[], T]) -> T | Exception:
    try:
        return function()
    except Exception as error:
        return _bare(error)


def _bare(error: Exception) -> Exception:
    """An error without what its frames hold, which may be most of the memory there is."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _call(finished: Callable[[], None] | None) -> None:
    """Tells an outcome, on the loop, where an error would end the server."""
    try:
        if finished is not None:
            finished()
    except Exception:
        # There may be no memory for a line of the log.
        with suppress(MemoryError):
            logger.exception("what was searched for cannot be told")


def _run_group(
    searches: Sequence[_Search], worker: int, share: Share, searched: Callable[[], None]
) -> Sequence[list[Any] | Exception]:
    """What the encoding of each search makes of its results, or what went wrong with it.

    `searched` is called once all have been found, before they are encoded.
    """
    outcomes: list[list[Any] | Exception] = [[] for _ in searches]
    failed = 0
    try:
        queries = np.concatenate([search.queries for search in searches])
        views = [search.view for search in searches for _ in search.queries]
        owners = [number for number, search in enumerate(searches) for _ in search.queries]
        results = search_each(views, queries, searches[0].options, worker, share)
        searched()
        for number, result in zip(owners, results, strict=True):
            outcome = outcomes[number]
            if isinstance(outcome, Exception):
                continue
            try:
                outcome.append(searches[number].whole.encoding.encode(result))
            except Exception as error:
                outcomes[number] = _bare(error)
                failed += 1
                if failed == len(searches):
                    break
    except Exception as error:
        if len(searches) == 1:
            return [_bare(error)]
        # Whichever of them it was, the others have an answer.
        for number, search in enumerate(searches):
            outcome = outcomes[number]
            if isinstance(outcome, list) and len(outcome) < search.size:
                (rest,) = _run_group([search.rest(len(outcome))], worker, share, _nothing)
                outcomes[number] = outcome + rest if isinstance(rest, list) else rest
    return outcomes
