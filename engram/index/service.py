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
class _Work:
    function: Callable[[], Any]
    done: Callable[[Any], None]
    wanted: Callable[[], bool]
    queued: float
    size = 1
    begun = False

    def finish(self, outcome: Any) -> Callable[[], None]:
        """What is to be called on the loop."""
        return partial(self.done, outcome)


_Waiting = TypeVar("_Waiting", _Search, _Work)


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


_Job = list[_Search] | _Work | _Shared


class SearchService:
    """Runs searches, and other work that only reads, in `threads` threads at a time.

    Searches run in batches of up to `max_batch` queries. A batch is what waits for one index: without a
    timer, the next one is what has come in during the last. A thread takes the next batch by itself, without
    a turn of the loop in between. Threads that are idle, and `helpers` more that do nothing else, help one
    that walks several graphs.

    Clients take turns: each has a search in a batch before any has its next. What is not begun within
    `timeout` seconds is answered with a SearchBusyError; with a timeout of 0 it waits.

    The counters are `searches` (queries) and `batches` run, what is `waiting`, and what was `refused`.
    """

    def __init__(
        self, threads: int, max_batch: int, helpers: int = 0, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._threads = threads
        self._workers = threads + helpers
        self._max_batch = max_batch
        # Guards the queues, `waiting` and the numbers of threads; held for a few steps only.
        self._lock = Lock()
        self._now = now
        # In the order in which they are next, by the id of an index; and by client.
        self._queues: dict[tuple[str, int], _Turns[_Search] | _Turns[_Work]] = {}
        self._shared: deque[_Shared] = deque()
        self._idle = 0
        self._busy = 0
        # True for each thread that should look at the queues, False for one that should end.
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self.searches = 0
        self.batches = 0
        self.waiting = 0
        self.refused = 0
        self.timeout = 0.0

    @property
    def idle(self) -> int:
        """How many threads have nothing to do."""
        return self._idle

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
        self._queue(("index", index_id), client, parts, len(queries))

    def submit_work(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
    ) -> None:
        """Queues a call that only reads; `done` is called on the loop with what it returns or raises."""
        self._queue(("client", client), client, [_Work(function, done, wanted, self._now())], 1)

    def _queue(self, key: tuple[str, int], client: int, items: Sequence[Any], size: int) -> None:
        with self._lock:
            turns = self._queues.get(key)
            if turns is None:
                turns = self._queues[key] = _Turns()
            turns.add(client, items)
            self.waiting += size
            self._call_for_queue()

    def _call_for_queue(self) -> None:
        # A busy thread looks at the queues before it idles.
        if self._busy < self._threads:
            self._call()

    def _call(self) -> None:
        if self._idle:
            self._idle -= 1
            self._calls.put(True)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled. What is under way is finished first; the rest is not answered."""
        # BLAS threads of its own would spin beside the workers. The limit is the whole process's.
        threadpool_limits(1, user_api="blas")
        limiter = trio.CapacityLimiter(self._workers)
        token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            for worker in range(self._workers):
                serve = partial(trio.to_thread.run_sync, self._serve, worker, token, limiter=limiter)
                nursery.start_soon(keep_running, "a search thread", serve)
            nursery.start_soon(keep_running, "refusing late searches", self._refuse_what_is_late)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with self._lock:
                    self._queues.clear()
                    self._shared.clear()
                    self.waiting = 0
                for _ in range(self._workers):
                    self._calls.put(False)

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
        late: list[_Search | _Work] = []
        with self._lock:
            for key, turns in list(self._queues.items()):
                late += turns.take_older(oldest)
                if not turns:
                    del self._queues[key]
            self.waiting -= sum(each.size for each in late)
        for each in [each for each in late if each.wanted()]:
            self.refused += each.size
            _call(each.finish(SearchBusyError(self.timeout)))

    def _serve(self, worker: int, token: trio.lowlevel.TrioToken) -> None:
        while True:
            if not self._run_next(worker, token) and not self._calls.get():
                return

    def _run_next(self, worker: int, token: trio.lowlevel.TrioToken) -> bool:
        """Does what is next; whether there was anything.

        What this holds, views of indices that may be dropped, is let go of before a thread idles.
        """
        with self._lock:
            if self._shared:
                job: _Job = self._shared.popleft()
            elif self._queues and self._busy < self._threads:
                self._busy += 1
                try:
                    job = self._take()
                except BaseException:
                    self._busy -= 1
                    raise
            else:
                self._idle += 1
                return False
        if isinstance(job, _Shared):
            job.help(worker)
            return True
        try:
            if isinstance(job, _Work):
                if job.wanted():
                    token.run_sync_soon(_call, job.finish(_attempt(job.function)))
            elif job:
                self._search(job, worker, token)
        finally:
            with self._lock:
                self._busy -= 1
        return True

    def _search(self, batch: Sequence[_Search], worker: int, token: trio.lowlevel.TrioToken) -> None:
        """Runs a batch; those of one generation and with equal options are run together."""
        finished: list[Callable[[], None] | None] = []
        try:
            groups: dict[tuple[int, SearchOptions], list[_Search]] = {}
            for search in batch:
                groups.setdefault((search.view.generation, search.options), []).append(search)
            for members in groups.values():
                outcomes = _run_group(members, worker, self._share)
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
            for _ in range(min(self._idle, count - 1)):
                self._shared.append(shared)
                self._call()
        shared.finish(worker)

    def _finish(self, queries: int, finished: Sequence[Callable[[], None] | None]) -> None:
        self.batches += 1
        self.searches += queries
        for each in finished:
            _call(each)

    def _take(self) -> list[_Search] | _Work:
        key = next(iter(self._queues))
        turns = self._queues.pop(key)
        batch: list[_Search] = []
        room = self._max_batch
        while turns and turns.first().size <= room:
            item = turns.take()
            self.waiting -= item.size
            if isinstance(item, _Work):
                self._put_back(key, turns)
                return item
            item.whole.begun = True
            if item.wanted():
                room -= item.size
                batch.append(item)
        self._put_back(key, turns)
        return batch

    def _put_back(self, key: tuple[str, int], turns: _Turns[Any]) -> None:
        if turns:
            self._queues[key] = turns
            self._call_for_queue()


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


def _run_group(searches: Sequence[_Search], worker: int, share: Share) -> Sequence[list[Any] | Exception]:
    """What the encoding of each search makes of its results, or what went wrong with it."""
    outcomes: list[list[Any] | Exception] = [[] for _ in searches]
    failed = 0
    try:
        queries = np.concatenate([search.queries for search in searches])
        views = [search.view for search in searches for _ in search.queries]
        owners = [number for number, search in enumerate(searches) for _ in search.queries]
        results = search_each(views, queries, searches[0].options, worker, share)
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
                (rest,) = _run_group([search.rest(len(outcome))], worker, share)
                outcomes[number] = outcome + rest if isinstance(rest, list) else rest
    return outcomes
