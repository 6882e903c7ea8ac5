"""Search threads, and the queue they take batches of searches from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar

import attrs
import numpy as np
import trio
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engram.index.distances import Floats
from engram.index.search import SearchOptions, SearchResult, Share, call_in_turn, search_batch
from engram.index.vector_index import View

Done = Callable[[list[SearchResult] | Exception], None]

T = TypeVar("T")


@attrs.frozen(eq=False)
class _Search:
    view: View
    queries: Floats
    options: SearchOptions
    done: Done
    wanted: Callable[[], bool]

    def parts(self, size: int) -> Sequence[_Search]:
        """Searches of at most `size` queries each that together are this one."""
        count = len(self.queries)
        if count <= size:
            return [self]
        starts = range(0, count, size)
        outcomes: list[list[SearchResult] | Exception] = [[]] * len(starts)
        left = set(range(len(starts)))

        def done(number: int, outcome: list[SearchResult] | Exception) -> None:
            outcomes[number] = outcome
            left.discard(number)
            if left:
                return
            results: list[SearchResult] = []
            for part in outcomes:
                if isinstance(part, Exception):
                    self.done(part)
                    return
                results += part
            self.done(results)

        return [
            attrs.evolve(self, queries=self.queries[start : start + size], done=partial(done, number))
            for number, start in enumerate(starts)
        ]


@attrs.frozen(eq=False)
class _Work:
    function: Callable[[], Any]
    done: Callable[[Any], None]
    wanted: Callable[[], bool]


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
    that walks several graphs. The counters are `searches` (queries) and `batches` run, and what is `waiting`.
    """

    def __init__(self, threads: int, max_batch: int, helpers: int = 0) -> None:
        self._threads = threads
        self._workers = threads + helpers
        self._max_batch = max_batch
        # Guards the queues, `waiting` and the numbers of threads; held for a few steps only.
        self._lock = Lock()
        # In the order in which they are next; work is on its own, indices have their id as the key.
        self._queues: dict[object, deque[_Search] | _Work] = {}
        self._shared: deque[_Shared] = deque()
        self._idle = 0
        self._busy = 0
        # True for each thread that should look at the queues, False for one that should end.
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self.searches = 0
        self.batches = 0
        self.waiting = 0

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
        done: Done,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Queues a search for each of `queries`, (n, dimension), all of which see the same view.

        `done` is called once on the loop, with a result for each query, or with what went wrong. What is
        not `wanted` any more when its turn comes is dropped; a search thread asks.
        """
        parts = _Search(view, queries, options, done, wanted).parts(self._max_batch)
        with self._lock:
            queue = self._queues.setdefault(index_id, deque())
            assert isinstance(queue, deque)
            queue.extend(parts)
            self.waiting += len(queries)
            self._call_for_queue()

    def submit_work(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Queues a call that only reads; `done` is called on the loop with what it returns or raises."""
        with self._lock:
            self._queues[object()] = _Work(function, done, wanted)
            self.waiting += 1
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
                nursery.start_soon(
                    partial(trio.to_thread.run_sync, self._serve, worker, token, limiter=limiter)
                )
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

    def _serve(self, worker: int, token: trio.lowlevel.TrioToken) -> None:
        while self._run_next(worker, token) or self._calls.get():
            pass

    def _run_next(self, worker: int, token: trio.lowlevel.TrioToken) -> bool:
        """Does what is next; whether there was anything.

        What this holds, views of indices that may be dropped, is let go of before a thread idles.
        """
        with self._lock:
            if self._shared:
                job: _Job = self._shared.popleft()
            elif self._queues and self._busy < self._threads:
                self._busy += 1
                job = self._take()
            else:
                self._idle += 1
                return False
        if isinstance(job, _Shared):
            job.help(worker)
            return True
        if isinstance(job, _Work):
            if job.wanted():
                token.run_sync_soon(job.done, _attempt(job.function))
        elif job:
            token.run_sync_soon(self._finish, job, _run_batch(job, worker, self._share))
        with self._lock:
            self._busy -= 1
        return True

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

    def _finish(self, batch: Sequence[_Search], outcomes: Sequence[list[SearchResult] | Exception]) -> None:
        self.batches += 1
        self.searches += sum(len(search.queries) for search in batch)
        for search, outcome in zip(batch, outcomes, strict=True):
            search.done(outcome)

    def _take(self) -> list[_Search] | _Work:
        key = next(iter(self._queues))
        queue = self._queues.pop(key)
        if isinstance(queue, _Work):
            self.waiting -= 1
            return queue
        batch: list[_Search] = []
        room = self._max_batch
        while queue and len(queue[0].queries) <= room:
            search = queue.popleft()
            self.waiting -= len(search.queries)
            if search.wanted():
                room -= len(search.queries)
                batch.append(search)
        if queue:
            self._queues[key] = queue
            self._call_for_queue()
        return batch


def _attempt(function: Callable[[], T]) -> T | Exception:
    try:
        return function()
    except Exception as error:
        return error


def _run_batch(batch: Sequence[_Search], worker: int, share: Share) -> list[list[SearchResult] | Exception]:
    """The outcome of each search; those of one generation and with equal options are run together."""
    groups: dict[tuple[int, SearchOptions], list[int]] = {}
    for number, search in enumerate(batch):
        groups.setdefault((search.view.generation, search.options), []).append(number)
    outcomes: list[list[SearchResult] | Exception] = [[]] * len(batch)
    for members in groups.values():
        found = _run_group([batch[number] for number in members], worker, share)
        for number, outcome in zip(members, found, strict=True):
            outcomes[number] = outcome
    return outcomes


def _run_group(
    searches: Sequence[_Search], worker: int, share: Share
) -> Sequence[list[SearchResult] | Exception]:
    try:
        queries = np.concatenate([search.queries for search in searches])
        views = [search.view for search in searches for _ in search.queries]
        results = search_batch(views, queries, searches[0].options, worker, share)
    except Exception as error:
        if len(searches) == 1:
            return [error]
        # Whichever of them it was, the others have an answer.
        return [outcome for search in searches for outcome in _run_group([search], worker, share)]
    ends = np.cumsum([len(search.queries) for search in searches]).tolist()
    return [results[end - len(search.queries) : end] for search, end in zip(searches, ends, strict=True)]
