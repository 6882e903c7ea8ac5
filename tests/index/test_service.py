from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing

from engram.index import service as service_module
from engram.index.errors import SearchBusyError
from engram.index.parameters import default_parameters
from engram.index.search import SearchOptions, SearchResult, Share, search_each
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex, View

Floats = npt.NDArray[np.float32]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]


def filled(metric: str, rows: Floats) -> VectorIndex:
    """An index whose key `n` holds row n."""
    index = VectorIndex(1, default_parameters(rows.shape[1], metric))
    index.add(2, [b"%d" % row for row in range(len(rows))], rows)
    return index


def pairs(result: SearchResult) -> list[tuple[int, float]]:
    return [(int(key), distance) for key, distance in zip(result.keys, result.distances, strict=True)]


class TestService:
    """The service answers every search, in batches, whatever happens to some of them."""

    @pytest.fixture
    async def service(self, nursery: trio.Nursery) -> SearchService:
        service = SearchService(2, max_batch=8)
        await nursery.start(service.run)
        return service

    async def test_answers_are_those_of_a_search_alone(self, nursery: trio.Nursery, nearest: Nearest) -> None:
        service = SearchService(2, max_batch=8)
        random = np.random.default_rng(1)
        rows = random.normal(size=(200, 4)).astype(np.float32)
        queries = random.normal(size=(50, 4)).astype(np.float32)
        index = filled("l2", rows)
        outcomes: dict[int, list[SearchResult] | Exception] = {}
        finished = trio.Event()

        def submit(number: int, k: int) -> None:
            def done(outcome: list[SearchResult] | Exception) -> None:
                outcomes[number] = outcome
                if len(outcomes) == len(queries):
                    finished.set()

            service.submit(1, index.view(2), queries[number : number + 1], SearchOptions(k), done)

        for number in range(len(queries)):
            submit(number, 1 + number % 3)
        assert service.waiting == len(queries)
        await nursery.start(service.run)
        await finished.wait()
        for number, query in enumerate(queries):
            outcome = outcomes[number]
            assert isinstance(outcome, list)
            assert [pairs(result) for result in outcome] == [nearest("l2", rows, query, 1 + number % 3)]
        assert (service.waiting, service.searches) == (0, 50)
        assert service.batches == 7

    async def test_what_waits_for_one_index_goes_together(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches: list[list[float]] = []

        def record(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            batches.append(queries[:, 0].tolist())
            return [SearchResult([], []) for _ in views]

        monkeypatch.setattr(service_module, "search_each", record)
        service = SearchService(1, readers=0, max_batch=4)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        answered: list[float] = []
        for index_id, number in [(7, 1), (8, 2), (7, 3), (9, 4), (8, 5), (7, 6), (7, 7), (7, 8), (7, 9)]:
            query = np.full((1, 2), number, np.float32)
            service.submit(index_id, view, query, SearchOptions(1), lambda _, n=number: answered.append(n))  # type: ignore[misc]
        await nursery.start(service.run)
        await trio.testing.wait_all_tasks_blocked()
        while service.searches < 9:
            await trio.lowlevel.checkpoint()
        assert batches == [[1, 3, 6, 7], [2, 5], [4], [8, 9]]
        assert answered == [1, 3, 6, 7, 2, 5, 4, 8, 9]

    @pytest.mark.parametrize("threads", [3, 1])
    async def test_idle_threads_help_the_busy_one(
        self, threads: int, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together = threading.Barrier(3)
        calls: list[tuple[int, int]] = []

        def walk(number: int, worker: int) -> None:
            if number >= 2:
                together.wait(30)
            calls.append((number, worker))
            if number == 0:
                raise ValueError("number 0")

        def search(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            share(walk, options.k, worker)
            return [SearchResult([], [])]

        monkeypatch.setattr(service_module, "search_each", search)
        service = SearchService(threads, 3 - threads, 0, max_batch=4)
        await nursery.start(service.run)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        for k in (5, 0, 1):
            outcomes: list[list[SearchResult] | Exception] = []
            finished = trio.Event()

            def done(
                outcome: list[SearchResult] | Exception,
                outcomes: list[list[SearchResult] | Exception] = outcomes,
                finished: trio.Event = finished,
            ) -> None:
                outcomes.append(outcome)
                finished.set()

            # Until all of its threads are idle one of them may have to do everything.
            while service.idle < 3:
                await trio.lowlevel.checkpoint()
            service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(k), done)
            await finished.wait()
            if k == 0:
                assert outcomes == [[SearchResult([], [])]]
            else:
                assert [str(outcome) for outcome in outcomes] == ["number 0"]
            assert sorted(number for number, _ in calls) == list(range(k))
            if k == 5:
                assert {worker for number, worker in calls if number >= 2} == {0, 1, 2}
            calls.clear()

    async def test_helpers_run_no_searches(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running: list[int] = []
        release = threading.Event()

        def search(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            running.append(worker)
            assert len(running) <= 2
            release.wait(30)
            running.remove(worker)
            return [SearchResult([], []) for _ in views]

        monkeypatch.setattr(service_module, "search_each", search)
        service = SearchService(2, helpers=3, max_batch=1)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        outcomes: list[list[SearchResult] | Exception] = []
        for number in range(20):
            query = np.zeros((1, 2), np.float32)
            service.submit(number % 3, view, query, SearchOptions(1), outcomes.append)
        await nursery.start(service.run)
        while len(running) < 2:
            await trio.lowlevel.checkpoint()
        release.set()
        while len(outcomes) < 20:
            await trio.lowlevel.checkpoint()
        assert outcomes == [[SearchResult([], [])]] * 20

    async def test_others_search_while_what_was_found_is_encoded(self, nursery: trio.Nursery) -> None:
        service = SearchService(1, helpers=1, max_batch=1)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        query = np.zeros((1, 2), np.float32)
        other_is_over = threading.Event()

        class Slow:
            def encode(self, result: SearchResult) -> bytes:
                return b"late" if other_is_over.wait(30) else b"too early"

            def join(self, encoded: list[bytes]) -> bytes:
                return encoded[0]

        outcomes: list[Any] = []
        finished = trio.Event()

        def done(outcome: Any) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 2:
                finished.set()
            other_is_over.set()

        service.submit(1, view, query, SearchOptions(1), done, encoding=Slow())
        service.submit(1, view, query, SearchOptions(1), done)
        await nursery.start(service.run)
        with trio.fail_after(20):
            await finished.wait()
        assert outcomes == [[SearchResult([b"0"], [1.0])], b"late"]

    async def test_without_a_core_to_spare_batches_stay_whole(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service = SearchService(1, readers=2, max_batch=4)
        at_it: list[int] = []

        class Alone:
            def encode(self, result: SearchResult) -> int:
                at_it.append(1)
                count = len(at_it)
                time.sleep(0)
                at_it.pop()
                return count

            def join(self, encoded: list[int]) -> int:
                return max(encoded)

        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        outcomes: list[int] = []
        for _ in range(40):
            service.submit(
                1, view, np.zeros((1, 2), np.float32), SearchOptions(1), outcomes.append, encoding=Alone()
            )
        await nursery.start(service.run)
        with trio.fail_after(30):
            while len(outcomes) < 40:
                await trio.lowlevel.checkpoint()
        assert (outcomes, service.batches) == ([1] * 40, 10)

    async def test_what_is_asked_for_together_is_one_batch(self, nursery: trio.Nursery) -> None:
        service = SearchService(1, max_batch=8)
        wake: list[Callable[[], None]] = []
        service.soon = wake.append
        await nursery.start(service.run)
        while service.idle < 2:
            await trio.lowlevel.checkpoint()
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        outcomes: list[Any] = []
        for number in range(5):
            service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(1), outcomes.append)
            service.submit_read(partial(int, number), outcomes.append)
        assert len(wake) == 1
        assert (service.waiting, outcomes) == (10, [])
        wake.pop()()
        with trio.fail_after(30):
            while len(outcomes) < 10:
                await trio.lowlevel.checkpoint()
        assert service.batches == 1
        service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(1), outcomes.append)
        assert len(wake) == 1

    async def test_threads_are_woken_even_where_there_is_no_memory_to_put_it_off(
        self, nursery: trio.Nursery
    ) -> None:
        service = SearchService(1, max_batch=8)

        def fail(wake: Callable[[], None]) -> None:
            raise MemoryError

        service.soon = fail
        await nursery.start(service.run)
        done = trio.Event()
        service.submit_read(lambda: 1, lambda _: done.set())
        with trio.fail_after(30):
            await done.wait()

    async def test_searches_and_long_reads_keep_each_other_from_no_thread(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together, release = threading.Barrier(2), threading.Event()
        at_once: list[int] = []

        def search(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            together.wait(30)
            return [SearchResult([], []) for _ in views]

        def read() -> int:
            at_once.append(1)
            most = len(at_once)
            if not release.is_set():
                together.wait(30)
            release.wait(30)
            at_once.pop()
            return most

        monkeypatch.setattr(service_module, "search_each", search)
        service = SearchService(1, max_batch=1)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        reads: list[object] = []
        searches: list[object] = []
        all_read, searched = trio.Event(), trio.Event()

        def read_done(outcome: object) -> None:
            reads.append(outcome)
            if len(reads) == 4:
                all_read.set()

        def search_done(outcome: object) -> None:
            searches.append(outcome)
            searched.set()

        await nursery.start(service.run)
        for client in range(4):
            service.submit_read(read, read_done, client=client)
        service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(1), search_done)
        with trio.fail_after(20):
            await searched.wait()
        assert (reads, searches) == ([], [[SearchResult([], [])]])
        release.set()
        with trio.fail_after(20):
            await all_read.wait()
        assert reads == [1] * 4

    async def test_a_search_that_raises_is_answered_alone(self, service: SearchService) -> None:
        index = filled("l2", np.eye(4, dtype=np.float32))
        outcomes: list[list[SearchResult] | Exception | None] = [None] * 3
        finished = trio.Event()

        def submit(place: int, query: Floats) -> None:
            def done(outcome: list[SearchResult] | Exception) -> None:
                outcomes[place] = outcome
                if None not in outcomes:
                    finished.set()

            service.submit(1, index.view(2), query[None], SearchOptions(1), done)

        submit(0, np.eye(4, dtype=np.float32)[2])
        submit(1, np.zeros(9, np.float32))
        submit(2, np.eye(4, dtype=np.float32)[3])
        await finished.wait()
        assert outcomes[0] == [SearchResult([b"2"], [0.0])]
        assert isinstance(outcomes[1], ValueError)
        assert outcomes[2] == [SearchResult([b"3"], [0.0])]

    async def test_a_search_under_way_ends_before_the_service_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended: list[int] = []
        started = trio.Event()
        release = threading.Event()

        def slow(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            trio.from_thread.run_sync(started.set)
            release.wait()
            ended.append(worker)
            return [SearchResult([], [])]

        monkeypatch.setattr(service_module, "search_each", slow)
        service = SearchService(1, max_batch=4)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(1), lambda _: None)
            await started.wait()
            nursery.cancel_scope.cancel()
            release.set()
        assert len(ended) == 1

    async def test_what_nobody_wants_any_more_is_not_searched(self, service: SearchService) -> None:
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        answered: list[int] = []
        ended = trio.Event()
        query = np.zeros((1, 2), np.float32)
        service.submit(1, view, query, SearchOptions(1), lambda _: answered.append(0), lambda: False)
        service.submit(2, view, query, SearchOptions(1), lambda _: ended.set())
        await ended.wait()
        assert (answered, service.searches, service.waiting) == ([], 1, 0)

    async def test_an_idle_worker_holds_no_view(self, nursery: trio.Nursery) -> None:
        service = SearchService(1, max_batch=4)
        await nursery.start(service.run)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        held = weakref.ref(view)
        ended = trio.Event()
        service.submit(1, view, np.zeros((1, 2), np.float32), SearchOptions(1), lambda _: ended.set())
        del view
        await ended.wait()
        with trio.fail_after(5):
            # The thread lets go of it just after it has handed on the result.
            while held() is not None:
                await trio.lowlevel.checkpoint()

    async def test_a_search_of_many_queries_is_answered_once(
        self, service: SearchService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> None:
            raise ValueError(f"{len(queries)} queries")

        monkeypatch.setattr(service_module, "search_each", fail)
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        outcomes: list[list[SearchResult] | Exception] = []
        ended = trio.Event()
        service.submit(1, view, np.zeros((20, 2), np.float32), SearchOptions(1), outcomes.append)
        service.submit(2, view, np.zeros((1, 2), np.float32), SearchOptions(1), lambda _: ended.set())
        await ended.wait()
        with trio.fail_after(5):
            while not outcomes:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert [str(outcome) for outcome in outcomes] == ["8 queries"]


class Counted:
    """An encoding that notes the threads it runs in, and fails for some keys."""

    def __init__(self, *failing: bytes) -> None:
        self.threads: set[threading.Thread] = set()
        self.taken: list[bytes] = []
        self._failing = failing

    def encode(self, result: SearchResult) -> bytes:
        self.threads.add(threading.current_thread())
        (key,) = result.keys
        self.taken.append(key)
        if key in self._failing:
            raise MemoryError(key)
        return key

    def join(self, encoded: list[bytes]) -> bytes:
        self.threads.add(threading.current_thread())
        return b" ".join(encoded)


class TestEncoding:
    """What is made of results is made in the search threads, and what fails there fails alone."""

    @pytest.fixture
    def view(self) -> View:
        return filled("l2", np.eye(8, dtype=np.float32)).view(2)

    async def ask(
        self, nursery: trio.Nursery, service: SearchService, view: View, *asked: tuple[Floats, Counted]
    ) -> list[object]:
        """What is answered to searches, all of which are there when the service begins."""
        outcomes: list[object] = [None] * len(asked)
        for place, (queries, encoding) in enumerate(asked):
            done = partial(outcomes.__setitem__, place)
            service.submit(1, view, queries, SearchOptions(1), done, encoding=encoding)
        await nursery.start(service.run)
        with trio.fail_after(30):
            while None in outcomes or service.waiting:
                await trio.lowlevel.checkpoint()
        return outcomes

    async def test_it_happens_in_a_search_thread(self, nursery: trio.Nursery, view: View) -> None:
        encoding = Counted()
        queries = np.tile(np.eye(8, dtype=np.float32), (3, 1))
        assert await self.ask(nursery, SearchService(2, max_batch=4), view, (queries, encoding)) == [
            b"0 1 2 3 4 5 6 7 " * 2 + b"0 1 2 3 4 5 6 7"
        ]
        assert encoding.threads
        assert threading.main_thread() not in encoding.threads

    async def test_one_that_fails_fails_alone(self, nursery: trio.Nursery, view: View) -> None:
        """Also beside others in a batch, and no more than needed is done for it."""
        queries = np.eye(8, dtype=np.float32)
        first, second, third = Counted(), Counted(b"1"), Counted()
        outcomes = await self.ask(
            nursery,
            SearchService(1, max_batch=8),
            view,
            (queries[:2], first),
            (queries[:4], second),
            (queries[4:6], third),
        )
        assert [outcomes[0], str(outcomes[1]), outcomes[2]] == [b"0 1", "b'1'", b"4 5"]
        assert second.taken == [b"0", b"1"]

    async def test_the_rest_of_one_that_has_failed_is_not_searched(
        self, nursery: trio.Nursery, view: View
    ) -> None:
        encoding = Counted(b"1")
        queries = np.tile(np.eye(8, dtype=np.float32), (10, 1))
        service = SearchService(1, readers=0, max_batch=4)
        (outcome,) = await self.ask(nursery, service, view, (queries, encoding))
        assert isinstance(outcome, MemoryError)
        assert outcome.__traceback__ is None
        await trio.testing.wait_all_tasks_blocked()
        assert (encoding.taken, service.waiting) == ([b"0", b"1"], 0)

    async def test_after_an_error_nothing_is_made_twice(
        self, nursery: trio.Nursery, view: View, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch that fails half-way is taken up again where it was."""
        failures = [MemoryError()]

        def fail(*arguments: Any) -> Iterator[SearchResult]:
            for number, result in enumerate(search_each(*arguments)):
                if number == 3 and failures:
                    raise failures.pop()
                yield result

        monkeypatch.setattr(service_module, "search_each", fail)
        queries = np.eye(8, dtype=np.float32)
        first, second, third = Counted(), Counted(), Counted()
        outcomes = await self.ask(
            nursery,
            SearchService(1, max_batch=8),
            view,
            (queries[:2], first),
            (queries[2:6], second),
            (queries[6:], third),
        )
        assert outcomes == [b"0 1", b"2 3 4 5", b"6 7"]
        assert [first.taken, second.taken, third.taken] == [
            [b"0", b"1"],
            [b"2", b"3", b"4", b"5"],
            [b"6", b"7"],
        ]

    @pytest.mark.parametrize("kind", ["search", "work", "late"])
    async def test_who_is_told_may_fail(
        self, nursery: trio.Nursery, view: View, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        """Trio would end the server for what is raised there."""
        clock = [0.0]
        service = SearchService(1, max_batch=8, now=lambda: clock[-1])
        service.timeout = 1.0
        told: list[object] = []

        def fail(outcome: object) -> None:
            told.append(outcome)
            raise MemoryError

        query = np.zeros((1, 8), np.float32)
        if kind == "work":
            service.submit_read(lambda: 7, fail)
        else:
            service.submit(1, view, query, SearchOptions(1), fail)
        if kind == "late":
            clock.append(2.0)
            service.refuse_late()
        await nursery.start(service.run)
        outcomes: list[object] = []
        service.submit(1, view, query, SearchOptions(1), outcomes.append)
        with trio.fail_after(30):
            while not (outcomes and told):
                await trio.lowlevel.checkpoint()
        assert len(outcomes) == len(told) == 1
        assert caplog.messages == ["what was searched for cannot be told"]

    async def test_a_thread_outlives_errors_between_searches(
        self, nursery: trio.Nursery, view: View, caplog: pytest.LogCaptureFixture
    ) -> None:
        service = SearchService(1, max_batch=8)
        query = np.zeros((1, 8), np.float32)
        failures = [MemoryError(), MemoryError()]

        def wanted() -> bool:
            if failures:
                raise failures.pop()
            return True

        outcomes: list[object] = []
        for _ in range(3):
            service.submit(1, view, query, SearchOptions(1), outcomes.append, wanted)
        await nursery.start(service.run)
        service.submit(2, view, query, SearchOptions(1), outcomes.append)
        with trio.fail_after(30):
            while not outcomes:
                await trio.lowlevel.checkpoint()
        assert set(caplog.messages) == {"a search thread failed: out of memory"}


Submitted = Callable[..., None]


class TestTurns:
    """Clients take turns, and what waits for too long is refused."""

    @pytest.fixture
    def batches(self, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
        """The first numbers of the queries of each batch that is run."""
        batches: list[list[float]] = []

        def record(
            views: list[View], queries: Floats, options: SearchOptions, worker: int, share: Share
        ) -> list[SearchResult]:
            batches.append(queries[:, 0].tolist())
            return [SearchResult([], []) for _ in views]

        monkeypatch.setattr(service_module, "search_each", record)
        return batches

    @pytest.fixture
    def clock(self) -> list[float]:
        """The last number is the time."""
        return [100.0]

    @pytest.fixture
    def service(self, clock: list[float]) -> SearchService:
        """Not running yet: what is submitted waits."""
        service = SearchService(1, max_batch=4, now=lambda: clock[-1])
        service.timeout = 5.0
        return service

    @pytest.fixture
    def outcomes(self) -> dict[float, list[SearchResult] | Exception]:
        return {}

    @pytest.fixture
    def submit(
        self, service: SearchService, outcomes: dict[float, list[SearchResult] | Exception]
    ) -> Submitted:
        """Submits searches for numbers, `submit(client, *numbers)`; those in a list are one search."""
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)

        def call(client: int, *numbers: float | list[float], index: int = 1, wanted: bool = True) -> None:
            for number in numbers:
                part = number if isinstance(number, list) else [number]
                queries = np.array([[each, each] for each in part], np.float32)

                def done(outcome: list[SearchResult] | Exception, first: float = part[0]) -> None:
                    assert first not in outcomes
                    outcomes[first] = outcome

                service.submit(index, view, queries, SearchOptions(1), done, lambda: wanted, client)

        return call

    async def finish(self, service: SearchService, nursery: trio.Nursery) -> None:
        """Runs what waits."""
        await nursery.start(service.run)
        with trio.fail_after(30):
            while service.waiting or service.idle < 2:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()

    async def test_each_client_has_a_search_in_a_batch_before_any_has_its_next(
        self,
        nursery: trio.Nursery,
        service: SearchService,
        submit: Submitted,
        batches: list[list[float]],
    ) -> None:
        submit(1, *range(100, 110))
        submit(2, 200, 201)
        submit(3, 300)
        submit(1, 110)
        await self.finish(service, nursery)
        assert batches == [[100, 200, 300, 101], [201, 102, 103, 104], [105, 106, 107, 108], [109, 110]]

    async def test_a_search_of_many_queries_lets_others_in_between(
        self,
        nursery: trio.Nursery,
        service: SearchService,
        submit: Submitted,
        batches: list[list[float]],
    ) -> None:
        submit(1, list(range(100, 112)))
        submit(2, 200, 201)
        await self.finish(service, nursery)
        assert batches == [[100, 101, 102, 103], [200], [104, 105, 106, 107], [201], [108, 109, 110, 111]]

    async def test_reads_of_one_client_have_one_turn_at_a_time(
        self, nursery: trio.Nursery, service: SearchService
    ) -> None:
        read: list[int] = []
        done: list[object] = []
        for number in range(3):
            service.submit_read(partial(read.append, number), done.append, client=1)
        service.submit_read(partial(read.append, 300), done.append, client=3)
        await self.finish(service, nursery)
        assert read == [0, 300, 1, 2]
        assert done == [None] * 4

    async def test_what_waits_for_too_long_is_refused(
        self,
        nursery: trio.Nursery,
        service: SearchService,
        submit: Submitted,
        clock: list[float],
        batches: list[list[float]],
        outcomes: dict[float, list[SearchResult] | Exception],
    ) -> None:
        work: list[object] = []
        submit(1, 100)
        submit(2, list(range(200, 212)), index=2)
        submit(3, 300, wanted=False)
        service.submit_read(lambda: 7, work.append, client=1)
        clock.append(103.0)
        submit(1, 101)
        clock.append(105.0)
        service.refuse_late()
        assert outcomes == {}
        clock.append(105.1)
        service.refuse_late()
        assert sorted(outcomes) == [100, 200]
        for outcome in (*outcomes.values(), *work):
            assert isinstance(outcome, SearchBusyError)
            assert outcome.timeout == service.timeout
        assert len(work) == 1
        assert (service.waiting, service.refused) == (1, 14)
        await self.finish(service, nursery)
        assert batches == [[101]]
        assert outcomes[101] == [SearchResult([], [])]

    async def test_without_a_timeout_nothing_is_refused(
        self,
        service: SearchService,
        submit: Submitted,
        clock: list[float],
        outcomes: dict[float, list[SearchResult] | Exception],
    ) -> None:
        service.timeout = 0.0
        submit(1, 100)
        clock.append(1e9)
        service.refuse_late()
        assert (outcomes, service.waiting) == ({}, 1)

    async def test_what_is_begun_is_finished(
        self,
        nursery: trio.Nursery,
        service: SearchService,
        submit: Submitted,
        clock: list[float],
        monkeypatch: pytest.MonkeyPatch,
        outcomes: dict[float, list[SearchResult] | Exception],
    ) -> None:
        begun, release = trio.Event(), threading.Event()

        def search(views: list[View], *_: object) -> list[SearchResult]:
            trio.from_thread.run_sync(begun.set)
            assert release.wait(30)
            return [SearchResult([], []) for _ in views]

        monkeypatch.setattr(service_module, "search_each", search)
        submit(1, list(range(100, 112)))
        submit(2, 200)
        await nursery.start(service.run)
        await begun.wait()
        clock.append(1e9)
        service.refuse_late()
        assert {number: type(outcome) for number, outcome in outcomes.items()} == {200: SearchBusyError}
        release.set()
        with trio.fail_after(30):
            while 100 not in outcomes:
                await trio.lowlevel.checkpoint()
        assert outcomes[100] == [SearchResult([], [])] * 12

    async def test_it_looks_by_itself(
        self,
        nursery: trio.Nursery,
        monkeypatch: pytest.MonkeyPatch,
        mock_clock: trio.testing.MockClock,
    ) -> None:
        """Also while all threads are busy: nobody waits for ever."""
        begun, release = trio.Event(), threading.Event()

        def search(views: list[View], *_: object) -> list[SearchResult]:
            trio.from_thread.run_sync(begun.set)
            assert release.wait(30)
            return [SearchResult([], []) for _ in views]

        monkeypatch.setattr(service_module, "search_each", search)
        service = SearchService(1, max_batch=1, now=trio.current_time)
        service.timeout = 5.0
        view = filled("l2", np.eye(2, dtype=np.float32)).view(2)
        query = np.zeros((1, 2), np.float32)
        found: list[list[SearchResult] | Exception] = []
        refused = trio.Event()

        def refuse(outcome: list[SearchResult] | Exception) -> None:
            assert isinstance(outcome, SearchBusyError)
            refused.set()

        await nursery.start(service.run)
        service.submit(1, view, query, SearchOptions(1), found.append)
        await begun.wait()
        started = trio.current_time()
        service.submit(1, view, query, SearchOptions(1), refuse)
        mock_clock.autojump_threshold = 0
        await refused.wait()
        assert 5.0 < trio.current_time() - started <= 5.5 + 1e-6
        assert found == []
        release.set()
        while not found:
            await trio.lowlevel.checkpoint()
        assert found == [[SearchResult([], [])]]
