from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing

from engram.index import planner
from engram.index import search as search_module
from engram.index.distances import METRICS
from engram.index.filters import compile_filter
from engram.index.graph import Graph
from engram.index.parameters import default_parameters
from engram.index.search import SearchOptions, SearchResult, search_batch
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex

Floats = npt.NDArray[np.float32]
Pairs = list[tuple[int, float]]
Nearest = Callable[[str, Floats, Floats, int], Pairs]
Clustered = Callable[..., Floats]
Build = Callable[..., Any]

DIMENSION = 16
# Of these, the last few stay in the head.
SEALED, ROWS = 1024, 1074


def filled(
    metric: str, rows: Floats, build: Build, texts: Sequence[bytes] = (), recall: float = 0.99
) -> VectorIndex:
    """An index whose key `n` holds row n, all but the last 50 of them in one segment."""
    parameters = attrs.evolve(default_parameters(rows.shape[1], metric), recall=recall)
    index = VectorIndex(1, parameters, seal_rows=SEALED // 4)
    index.add(2, [b"%d" % row for row in range(len(rows))], rows, texts)
    build(index).install(3, index)
    assert [installed.rows for installed in index.segments] == [SEALED]
    return index


def ask(index: VectorIndex, queries: Floats, options: SearchOptions, lsn: int = 1000) -> list[SearchResult]:
    return search_batch([index.view(lsn)] * len(queries), queries, options, 0)


def pairs(result: SearchResult) -> Pairs:
    return [(int(key), distance) for key, distance in zip(result.keys, result.distances, strict=True)]


def recall_of(results: list[SearchResult], truths: list[Pairs]) -> float:
    hits = sum(
        len({int(key) for key in result.keys} & {row for row, _ in truth})
        for result, truth in zip(results, truths, strict=True)
    )
    return hits / sum(map(len, truths))


@attrs.frozen
class Truth:
    """The nearest among some rows, numbered as in all of them."""

    nearest: Nearest
    metric: str
    rows: Floats
    chosen: npt.NDArray[np.intp]

    def of(self, query: Floats, k: int) -> Pairs:
        found = self.nearest(self.metric, self.rows[self.chosen], query, k)
        return [(int(self.chosen[place]), distance) for place, distance in found]


@pytest.fixture
def cheap_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walks are planned as if they cost what they do in a large segment."""
    monkeypatch.setattr(planner, "SCAN_ROWS_PER_EXPANSION", 1)
    monkeypatch.setattr(planner, "PICKED_ROWS_PER_EXPANSION", 1)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ef of each walk."""
    expansions: list[int] = []
    search = Graph.search

    def record(graph: Graph, queries: Floats, norms: Any, count: int, expansion: int) -> Any:
        expansions.append(expansion)
        return search(graph, queries, norms, count, expansion)

    monkeypatch.setattr(Graph, "search", record)
    return expansions


@pytest.mark.usefixtures("cheap_walks")
class TestFilter:
    """With a filter there are k results wherever k rows match, and hardly any of the nearest is missed."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("share", [0.5, 0.05, 0.005])
    def test_nearly_all_of_the_nearest_that_match_are_found(
        self, metric: str, share: float, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(ROWS, DIMENSION, spread=3.0)
        numbers = np.random.default_rng(4).permutation(ROWS)
        index = filled(metric, rows, build, [b'{"n": %d}' % number for number in numbers.tolist()])
        limit = int(share * ROWS)
        queries = clustered(40, DIMENSION, seed=1)
        options = SearchOptions(10, ef=64, filter=compile_filter(b".n < %d" % limit))
        results = ask(index, queries, options)
        truth = Truth(nearest, metric, rows, np.flatnonzero(numbers < limit))
        expected = [truth.of(query, 10) for query in queries]
        assert recall_of(results, expected) >= 0.99
        for result, query in zip(results, queries, strict=True):
            assert len(result.keys) == min(10, limit)
            distances = dict(truth.of(query, ROWS))
            assert pairs(result) == sorted(
                ((row, distances[row]) for row, _ in pairs(result)), key=lambda pair: (pair[1], pair[0])
            )

    def test_half_of_the_rows_are_found_by_a_walk(
        self, clustered: Clustered, build: Build, walks: list[int]
    ) -> None:
        texts = [b'{"n": %d}' % (row % 2) for row in range(ROWS)]
        index = filled("cosine", clustered(ROWS, DIMENSION), build, texts)
        walks.clear()
        options = SearchOptions(10, ef=64, filter=compile_filter(b".n == 1"))
        ask(index, clustered(5, DIMENSION, seed=1), options)
        assert walks == [128]

    @pytest.mark.parametrize("number", [0, ROWS - 1], ids=["in a segment", "in the head"])
    def test_a_single_row_that_matches_is_found(
        self, number: int, clustered: Clustered, build: Build
    ) -> None:
        rows = clustered(ROWS, DIMENSION)
        index = filled("l2", rows, build, [b'{"n": %d}' % row for row in range(ROWS)])
        results = ask(index, -rows[:3], SearchOptions(10, filter=compile_filter(b".n == %d" % number)))
        assert [result.keys for result in results] == [[b"%d" % number]] * 3

    def test_where_nothing_matches_nothing_is_found(
        self, clustered: Clustered, build: Build, walks: list[int]
    ) -> None:
        rows = clustered(ROWS, DIMENSION)
        index = filled("l2", rows, build, [b'{"n": 1}'] * ROWS)
        walks.clear()
        results = ask(index, rows[:2], SearchOptions(10, ef=64, filter=compile_filter(b".n == 2")))
        assert results == [SearchResult([], [])] * 2
        assert walks == []

    @pytest.mark.parametrize("metric", METRICS)
    def test_rows_that_match_may_be_far_from_the_query(
        self, metric: str, nearest: Nearest, build: Build
    ) -> None:
        random = np.random.default_rng(6)
        clusters = random.integers(0, 5, ROWS)
        centers = 4.0 * random.normal(size=(5, DIMENSION))
        rows = (centers[clusters] + 0.5 * random.normal(size=(ROWS, DIMENSION))).astype(np.float32)
        index = filled(metric, rows, build, [b'{"cluster": %d}' % cluster for cluster in clusters.tolist()])
        queries = rows[clusters == 0][:20]
        for cluster in range(1, 5):
            options = SearchOptions(10, ef=32, filter=compile_filter(b".cluster == %d" % cluster))
            results = ask(index, queries, options)
            truth = Truth(nearest, metric, rows, np.flatnonzero(clusters == cluster))
            assert all(len(result.keys) == 10 for result in results)
            assert recall_of(results, [truth.of(query, 10) for query in queries]) >= 0.99

    def test_rows_that_no_walk_reaches_are_found_by_a_scan(self, build: Build, walks: list[int]) -> None:
        # Far more equal rows than a node has links: the graph falls apart.
        rows = np.zeros((ROWS, DIMENSION), np.float32)
        rows[500:] = 1.0
        index = filled("l2", rows, build, [b'{"n": %d}' % (row >= 500) for row in range(ROWS)])
        walks.clear()
        options = SearchOptions(10, ef=64, filter=compile_filter(b".n == 1"))
        (result,) = ask(index, np.zeros((1, DIMENSION), np.float32), options)
        assert result.keys == [b"%d" % row for row in range(500, 510)]
        assert len(walks) > 1

    def test_an_answer_is_of_the_attributes_that_a_key_has_now(
        self, clustered: Clustered, build: Build
    ) -> None:
        rows = clustered(ROWS, DIMENSION)
        index = filled("cosine", rows, build, [b'{"n": 1}'] * 3)
        for row, text in [(0, b'{"n": 2}'), (1, None), (1050, b'{"n": 1}')]:
            index.add(10 + row, [b"%d" % row], rows[row : row + 1], [text])
        results = ask(index, rows[:1], SearchOptions(10, filter=compile_filter(b".n == 1")), 5000)
        assert set(results[0].keys) == {b"2", b"1050"}

    def test_each_query_of_a_batch_sees_the_deaths_up_to_its_view(
        self, clustered: Clustered, nearest: Nearest, build: Build, walks: list[int]
    ) -> None:
        rows = clustered(ROWS, DIMENSION)
        even = np.arange(ROWS) % 2 == 0
        index = filled("cosine", rows, build, [b'{"even": %d}' % number for number in even.tolist()])
        query = clustered(1, DIMENSION, seed=1)[0]
        alive = np.ones(ROWS, bool)
        views, expected = [], []
        # What is nearest dies first.
        for lsn, (row, _) in enumerate(nearest("cosine", rows, query, 60), 10):
            index.delete(lsn, [b"%d" % row])
            alive[row] = False
            views.append(index.view(lsn))
            expected.append(Truth(nearest, "cosine", rows, np.flatnonzero(alive & even)).of(query, 5))
        walks.clear()
        options = SearchOptions(5, ef=100, filter=compile_filter(b".even"))
        results = search_batch(views[::-1], np.tile(query, (60, 1)), options, 0)
        assert walks
        assert [pairs(result) for result in results[::-1]] == expected


class TestRadius:
    """Of the k nearest those at the radius or nearer are left."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("place", [3, 40])
    def test_what_is_just_at_the_radius_is_inside(
        self, metric: str, place: int, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(ROWS, DIMENSION, spread=2.0)
        index = filled(metric, rows, build)
        query = clustered(1, DIMENSION, seed=1)
        expected = nearest(metric, rows, query[0], ROWS)
        distance = expected[place][1]
        (inside,) = ask(index, query, SearchOptions(100, radius=distance, exact=True))
        assert pairs(inside) == expected[: place + 1]
        less = float(np.nextafter(np.float32(distance), np.float32(-np.inf)))
        (outside,) = ask(index, query, SearchOptions(100, radius=less, exact=True))
        assert pairs(outside) == expected[:place]

    def test_no_more_than_k_are_found(self, clustered: Clustered, nearest: Nearest, build: Build) -> None:
        rows = clustered(ROWS, DIMENSION)
        (result,) = ask(filled("l2", rows, build), rows[:1], SearchOptions(7, radius=1e9))
        assert pairs(result) == nearest("l2", rows, rows[0], 7)

    def test_queries_of_a_batch_may_find_different_numbers_of_rows(self, build: Build) -> None:
        rows = np.full((ROWS, DIMENSION), 100.0, np.float32)
        rows[:3] = 0.0
        queries = np.array([[50.0], [0.0], [100.0], [-9.0]], np.float32).repeat(DIMENSION, axis=1)
        results = ask(filled("l2", rows, build), queries, SearchOptions(10, radius=0.0, exact=True))
        assert [len(result.keys) for result in results] == [0, 3, 10, 0]
        assert results[1] == SearchResult([b"0", b"1", b"2"], [0.0] * 3)

    @pytest.mark.usefixtures("cheap_walks")
    def test_only_rows_that_match_are_found_inside(
        self, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(ROWS, DIMENSION)
        index = filled("cosine", rows, build, [b'{"n": %d}' % (row % 3) for row in range(ROWS)])
        truth = Truth(nearest, "cosine", rows, np.arange(ROWS)[np.arange(ROWS) % 3 == 1])
        expected = truth.of(rows[0], 8)
        options = SearchOptions(20, ef=100, radius=expected[-1][1], filter=compile_filter(b".n == 1"))
        (result,) = ask(index, rows[:1], options)
        assert pairs(result) == expected


@pytest.mark.usefixtures("cheap_walks")
class TestExact:
    """An exact search misses nothing, whatever else it asks for."""

    @pytest.mark.parametrize("metric", METRICS)
    def test_what_a_walk_misses_is_found(
        self, metric: str, clustered: Clustered, nearest: Nearest, build: Build, walks: list[int]
    ) -> None:
        rows = clustered(ROWS, DIMENSION, spread=10.0)
        queries = clustered(60, DIMENSION, seed=1)
        index = filled(metric, rows, build)
        expected = [nearest(metric, rows, query, 1) for query in queries]
        assert recall_of(ask(index, queries, SearchOptions(1, ef=1)), expected) < 1.0
        walks.clear()
        results = ask(index, queries, SearchOptions(1, ef=1, recall=0.1, exact=True))
        assert [pairs(result) for result in results] == expected
        assert walks == []


@pytest.mark.usefixtures("cheap_walks")
class TestWidth:
    """A walk is as wide as is asked for, or as the segment's curve says for the recall that is."""

    @pytest.fixture
    def index(self, clustered: Clustered, build: Build) -> VectorIndex:
        index = filled("cosine", clustered(ROWS, DIMENSION), build, recall=0.9)
        (installed,) = index.segments
        installed.segment = attrs.evolve(installed.segment, curve=((50, 0.5), (100, 0.9), (200, 0.99)))
        return index

    @pytest.mark.parametrize(
        ("asked", "ef"),
        [
            ({}, 100),
            ({"recall": 0.99}, 200),
            ({"recall": 0.5}, 50),
            ({"recall": 0.1}, 50),
            ({"ef": 77}, 77),
            ({"ef": 77, "recall": 0.99}, 77),
            # No less than what is fetched for k.
            ({"ef": 1}, 20),
        ],
    )
    def test_how_wide_a_walk_is(
        self, asked: dict[str, Any], ef: int, index: VectorIndex, clustered: Clustered, walks: list[int]
    ) -> None:
        walks.clear()
        ask(index, clustered(3, DIMENSION, seed=1), SearchOptions(10, **asked))
        assert walks == [ef]

    def test_where_no_width_finds_enough_the_segment_is_scanned(
        self, index: VectorIndex, clustered: Clustered, nearest: Nearest, walks: list[int]
    ) -> None:
        walks.clear()
        query = clustered(1, DIMENSION, seed=1)
        (result,) = ask(index, query, SearchOptions(10, recall=0.995))
        assert walks == []
        assert pairs(result) == nearest("cosine", clustered(ROWS, DIMENSION), query[0], 10)

    def test_walks_are_wider_where_rows_are_dead(
        self, index: VectorIndex, clustered: Clustered, walks: list[int]
    ) -> None:
        index.delete(5, [b"%d" % row for row in range(SEALED // 2)])
        walks.clear()
        ask(index, clustered(3, DIMENSION, seed=1), SearchOptions(10))
        assert walks == [200]

    @pytest.mark.parametrize("metric", METRICS)
    def test_the_recall_that_is_asked_for_is_reached(
        self, metric: str, clustered: Clustered, nearest: Nearest, build: Build, walks: list[int]
    ) -> None:
        rows = clustered(4096, DIMENSION, spread=2.0)
        queries = clustered(200, DIMENSION, seed=1)
        index = VectorIndex(1, attrs.evolve(default_parameters(DIMENSION, metric), connectivity=4))
        index.add(2, [b"%d" % row for row in range(len(rows))], rows)
        build(index, index.plan_optimization()).install(3, index)
        expected = [nearest(metric, rows, query, 10) for query in queries]
        walks.clear()
        for recall in (0.8, 0.95):
            assert recall_of(ask(index, queries, SearchOptions(10, recall=recall)), expected) >= recall - 0.02
        assert len(walks) == 2
        assert walks[0] < walks[1]


class TestResults:
    """Attributes and vectors are those of the keys they come with."""

    @pytest.fixture
    def rows(self, clustered: Clustered) -> Floats:
        rows = clustered(ROWS, DIMENSION)
        rows[0, 0], rows[1, 1] = -0.0, 1e-44
        return rows

    @pytest.fixture
    def texts(self) -> list[bytes]:
        return [b'{"n": %d}' % row if row % 3 else b"" for row in range(ROWS)]

    @pytest.mark.parametrize("metric", METRICS)
    def test_attributes_and_vectors_are_those_of_the_keys(
        self, metric: str, rows: Floats, texts: list[bytes], build: Build
    ) -> None:
        index = filled(metric, rows, build, texts)
        options = SearchOptions(ROWS, attributes=True, vectors=True)
        for result in ask(index, rows[:3], options):
            numbers = [int(key) for key in result.keys]
            assert sorted(numbers) == list(range(ROWS))
            assert result.attributes == [texts[number] for number in numbers]
            assert result.vectors == [rows[number].tobytes() for number in numbers]

    def test_what_is_not_asked_for_is_left_out(self, rows: Floats, texts: list[bytes], build: Build) -> None:
        index = filled("l2", rows, build, texts)
        (bare,) = ask(index, rows[:1], SearchOptions(3))
        assert (len(bare.keys), bare.attributes, bare.vectors) == (3, [], [])
        (with_attributes,) = ask(index, rows[:1], SearchOptions(3, attributes=True))
        assert (len(with_attributes.attributes), with_attributes.vectors) == (3, [])
        (with_vectors,) = ask(index, rows[:1], SearchOptions(3, vectors=True))
        assert (with_vectors.attributes, len(with_vectors.vectors)) == ([], 3)

    def test_an_earlier_view_shows_what_was_then(
        self, rows: Floats, texts: list[bytes], build: Build
    ) -> None:
        index = filled("l2", rows, build, texts)
        view = index.view(9)
        index.add(10, [b"1", b"1070"], np.ones((2, DIMENSION), np.float32), [b"new", b"new"])
        options = SearchOptions(1, attributes=True, vectors=True)
        results = search_batch([view] * 2, rows[[1, 1070]], options, 0)
        assert [result.attributes for result in results] == [[texts[1]], [texts[1070]]]
        assert [result.vectors for result in results] == [[rows[1].tobytes()], [rows[1070].tobytes()]]


class Outcomes:
    """What comes of requests to a service, in the order in which they are answered."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._progress = trio.lowlevel.ParkingLot()

    def __call__(self, outcome: Any) -> None:
        self.seen.append(outcome)
        self._progress.unpark_all()

    async def wait(self, count: int) -> list[Any]:
        while len(self.seen) < count:
            await self._progress.park()
        return self.seen


class TestSubmit:
    """A search may have many queries."""

    @pytest.fixture
    def index(self) -> VectorIndex:
        index = VectorIndex(1, default_parameters(2, "l2"))
        index.add(2, [b"%d" % row for row in range(100)], np.arange(200, dtype=np.float32).reshape(-1, 2))
        return index

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("count", [1, 8, 9, 50])
    async def test_all_queries_are_answered_at_once_and_in_order(
        self, workers: int, count: int, index: VectorIndex, nursery: trio.Nursery
    ) -> None:
        service = SearchService(workers, max_batch=8)
        await nursery.start(service.run)
        order = np.random.default_rng(count).integers(0, 100, count)
        queries = 2.0 * order[:, None].astype(np.float32) + np.array([0.0, 1.0], np.float32)
        outcomes = Outcomes()
        service.submit(1, index.view(2), queries, SearchOptions(1), outcomes)
        assert service.waiting == count
        (outcome,) = await outcomes.wait(1)
        assert outcome == [SearchResult([b"%d" % row], [0.0]) for row in order.tolist()]
        # Parts are counted some steps after the whole is known.
        while service.searches < count:
            await trio.lowlevel.checkpoint()
        assert (service.waiting, service.searches, service.batches) == (0, count, -(-count // 8))

    async def test_others_are_answered_beside_one_with_many_queries(
        self, index: VectorIndex, nursery: trio.Nursery
    ) -> None:
        service = SearchService(1, max_batch=8)
        outcomes = Outcomes()
        other = VectorIndex(2, default_parameters(2, "l2"))
        service.submit(1, index.view(2), np.zeros((30, 2), np.float32), SearchOptions(1), outcomes)
        service.submit(2, other.view(2), np.zeros((1, 2), np.float32), SearchOptions(1), outcomes)
        await nursery.start(service.run)
        assert [len(outcome) for outcome in await outcomes.wait(2)] == [1, 30]

    async def test_a_search_of_which_every_part_fails_is_answered_once(
        self, index: VectorIndex, nursery: trio.Nursery
    ) -> None:
        service = SearchService(1, max_batch=8)
        outcomes, last = Outcomes(), Outcomes()
        service.submit(1, index.view(2), np.zeros((30, 9), np.float32), SearchOptions(1), outcomes)
        service.submit(1, index.view(2), np.zeros((1, 2), np.float32), SearchOptions(1), last)
        await nursery.start(service.run)
        await last.wait(1)
        (outcome,) = outcomes.seen
        assert isinstance(outcome, ValueError)

    async def test_many_queries_that_nobody_wants_are_not_run(
        self, index: VectorIndex, nursery: trio.Nursery
    ) -> None:
        service = SearchService(1, max_batch=8)
        outcomes, last = Outcomes(), Outcomes()
        view, queries = index.view(2), np.zeros((30, 2), np.float32)
        service.submit(1, view, queries, SearchOptions(1), outcomes, lambda: False)
        service.submit(1, view, queries[:1], SearchOptions(1), last)
        await nursery.start(service.run)
        await last.wait(1)
        assert (outcomes.seen, service.searches, service.waiting) == ([], 1, 0)


class TestReads:
    """Other reads that take long are done in threads, too."""

    async def test_work_is_done_in_another_thread_and_answered_on_the_loop(
        self, nursery: trio.Nursery
    ) -> None:
        service = SearchService(1, max_batch=8)
        await nursery.start(service.run)
        answered: list[tuple[object, int]] = []
        ended = trio.Event()

        def done(outcome: object) -> None:
            answered.append((outcome, threading.get_ident()))
            ended.set()

        service.submit_read(threading.get_ident, done)
        assert service.waiting == 1
        await ended.wait()
        ((worker, loop),) = answered
        assert loop == threading.get_ident() != worker
        assert service.waiting == 0

    async def test_what_work_raises_is_its_outcome(self, nursery: trio.Nursery) -> None:
        service = SearchService(1, max_batch=8)
        await nursery.start(service.run)
        outcomes = Outcomes()
        service.submit_read(lambda: 1 // 0, outcomes)
        service.submit_read(lambda: 7, outcomes)
        error, number = await outcomes.wait(2)
        assert isinstance(error, ZeroDivisionError)
        assert number == 7

    async def test_work_that_nobody_wants_is_not_done(self, nursery: trio.Nursery) -> None:
        service = SearchService(1, max_batch=8)
        outcomes = Outcomes()
        wanted = True
        calls: list[int] = []
        service.submit_read(lambda: calls.append(1), outcomes, lambda: wanted)
        service.submit_read(lambda: calls.append(2), outcomes)
        wanted = False
        await nursery.start(service.run)
        await outcomes.wait(1)
        assert (calls, service.waiting) == ([2], 0)


class TestStrings:
    """Strings of results are copied for as many of them at once as take little memory."""

    ROWS = 1200

    @pytest.fixture
    def index(self, clustered: Clustered, build: Build) -> VectorIndex:
        """One with attributes from none to 24 KB, in a segment and in the head."""
        texts = [b'"%b"' % (b"x" * (20 * n)) if n % 7 else b"" for n in range(self.ROWS)]
        return filled("l2", clustered(self.ROWS, DIMENSION), build, texts)

    @pytest.mark.parametrize("copied", [0, 5000, 100_000])
    @pytest.mark.parametrize(("attributes", "vectors"), [(True, True), (True, False), (False, True)])
    def test_results_are_the_same_however_many_are_copied_at_once(
        self,
        index: VectorIndex,
        clustered: Clustered,
        monkeypatch: pytest.MonkeyPatch,
        copied: int,
        attributes: bool,
        vectors: bool,
    ) -> None:
        queries = clustered(30, DIMENSION, seed=3)
        options = SearchOptions(20, exact=True, attributes=attributes, vectors=vectors, radius=4.0)
        expected = ask(index, queries, options)
        monkeypatch.setattr(search_module, "_COPIED_BYTES", copied)
        assert ask(index, queries, options) == expected

    def test_what_would_be_too_much_is_not_copied(self, index: VectorIndex, clustered: Clustered) -> None:
        queries = clustered(40, DIMENSION, seed=3)
        options = SearchOptions(self.ROWS, exact=True, attributes=True, most=1 << 20)
        tracemalloc.start()
        results = ask(index, queries, options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        in_segment = index.segments[0].segment
        copied = in_segment.keys.joined.nbytes + in_segment.attributes.joined.nbytes
        assert results == [SearchResult([], [], excess=copied)] * 40
        # Not even one of them was.
        assert peak < copied

    def test_one_result_may_be_more_than_is_copied_at_once(
        self, index: VectorIndex, clustered: Clustered
    ) -> None:
        queries = clustered(2, DIMENSION, seed=3)
        for result in ask(index, queries, SearchOptions(self.ROWS, exact=True, attributes=True)):
            assert len(result.attributes) == self.ROWS
            for key, text in zip(result.keys, result.attributes, strict=True):
                assert len(text) == (20 * int(key) + 2 if int(key) % 7 else 0)
