from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index import planner
from engram.index.distances import METRICS
from engram.index.filters import compile_filter
from engram.index.matching import count_matching
from engram.index.parameters import default_parameters
from engram.index.search import SearchOptions, SearchResult, search_batch
from engram.index.vector_index import VectorIndex, View
from tests.index.exact import check_nearest

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]
Clustered = Callable[..., Floats]
Build = Callable[[VectorIndex], Any]


def _offset(random: np.random.Generator, count: int, dimension: int) -> Doubles:
    offset = 10.0 ** random.uniform(2, 16) * np.sign(random.normal(size=dimension))
    rows: Doubles = offset * (1.0 + 1e-6 * random.normal(size=(count, dimension)))
    return rows


def _parallel(random: np.random.Generator, count: int, dimension: int) -> Doubles:
    noise = 10.0 ** random.uniform(-7, -3) * random.normal(size=(count, dimension))
    rows: Doubles = (random.normal(size=dimension) + noise) * 10.0 ** random.uniform(-3, 3, (count, 1))
    return rows


def _sparse(random: np.random.Generator, count: int, dimension: int) -> Doubles:
    rows = np.zeros((count, dimension))
    rows[np.arange(count), random.integers(0, dimension, count)] = random.integers(-3, 4, count)
    return rows


# Rows that are hard to tell apart, or near to where numbers of float32 end.
KINDS: dict[str, Callable[[np.random.Generator, int, int], npt.NDArray[Any]]] = {
    "offset": _offset,
    "parallel": _parallel,
    "sparse": _sparse,
    "tiny": lambda random, count, dimension: 1e-30 * random.normal(size=(count, dimension)),
    "huge": lambda random, count, dimension: 1e17 * random.normal(size=(count, dimension)),
    "denormal": lambda random, count, dimension: 1.5e-45 * random.integers(-9, 10, (count, dimension)),
    "scales of rows": lambda random, count, dimension: (
        10.0 ** random.uniform(-44, 17, (count, 1)) * random.normal(size=(count, dimension))
    ),
    "scales of numbers": lambda random, count, dimension: (
        10.0 ** random.uniform(-44, 17, (count, dimension)) * random.choice([-1.0, 1.0], (count, dimension))
    ),
    "few values": lambda random, count, dimension: random.integers(-2, 3, (count, dimension)).astype(float),
}


def make_rows(kind: str, random: np.random.Generator, count: int, dimension: int) -> Floats:
    """Rows of a kind, with norms that may be stored; some are the same as others."""
    rows = KINDS[kind](random, count, dimension)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    made: Floats = (rows * np.minimum(1.0, 9e17 / np.maximum(norms, 1.0))).astype(np.float32)
    made[count // 2 :: 7] = made[0]
    return made


def filled(metric: str, rows: Floats, **settings: int) -> VectorIndex:
    """An index whose key `n` holds row n."""
    index = VectorIndex(1, default_parameters(rows.shape[1], metric), **settings)
    index.add(2, [b"%d" % row for row in range(len(rows))], rows)
    return index


def pairs(result: SearchResult) -> list[tuple[int, float]]:
    return [(int(key), distance) for key, distance in zip(result.keys, result.distances, strict=True)]


def recall(results: list[SearchResult], expected: list[list[tuple[int, float]]]) -> float:
    hits = sum(
        len({int(key) for key in result.keys} & {row for row, _ in truth})
        for result, truth in zip(results, expected, strict=True)
    )
    return hits / sum(map(len, expected))


class TestHead:
    """Of the head nothing is ever missed."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("spread", [1.0, 100.0])
    def test_answers_are_exact(
        self, metric: str, spread: float, clustered: Clustered, nearest: Nearest
    ) -> None:
        rows = clustered(3000, 24, spread=spread)
        rows[700:720] = rows[3]
        rows[1500:1510] = 0.0
        queries = np.concatenate(
            [clustered(30, 24, seed=1, spread=spread), rows[:5], rows[1500:1502], rows[5:9] * 50]
        ).astype(np.float32)
        view = filled(metric, rows).view(2)
        results = search_batch([view] * len(queries), queries, SearchOptions(10), 0)
        for query, result in zip(queries, results, strict=True):
            assert pairs(result) == nearest(metric, rows, query, 10)

    @pytest.mark.parametrize("metric", METRICS)
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_ties_huge_and_tiny_numbers_cost_nothing(self, metric: str, data: st.DataObject) -> None:
        size = st.sampled_from([0.0, 1e-44, 1e-30, 1e-18, 1e-3, 1.0, 1.0000001, 2.0, -1.0, 1e5, 4e17, -4e17])
        vector = st.lists(size, min_size=3, max_size=3)
        rows = np.array(data.draw(st.lists(vector, min_size=1, max_size=60)), np.float32)
        queries = np.array(data.draw(st.lists(vector, min_size=1, max_size=4)), np.float32)
        k = data.draw(st.integers(1, 70))
        view = filled(metric, rows).view(2)
        results = search_batch([view] * len(queries), queries, SearchOptions(k), 0)
        for query, result in zip(queries, results, strict=True):
            check_nearest(metric, rows, query, k, result)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=15, deadline=None)
    @given(data=st.data())
    def test_order_is_that_of_whole_numbers(self, kind: str, metric: str, data: st.DataObject) -> None:
        random = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
        # With codes for all rows, for all but some, and without.
        count = data.draw(st.sampled_from([128, 200, 100]))
        dimension = data.draw(st.sampled_from([1, 2, 3, 8, 17, 40]))
        rows = make_rows(kind, random, count, dimension)
        others = make_rows(data.draw(st.sampled_from(list(KINDS))), random, 2, dimension)
        queries = np.concatenate([rows[:1], rows[1:2] * np.float32(0.5), others])
        k = data.draw(st.sampled_from([1, 10, 300]))
        view = filled(metric, rows).view(2)
        results = search_batch([view] * len(queries), queries, SearchOptions(k), 0)
        for query, result in zip(queries, results, strict=True):
            check_nearest(metric, rows, query, k, result)

    def test_inner_products_with_a_common_offset_are_told_apart(self) -> None:
        # Float32 tells none of them apart.
        rows = np.full((3000, 32), 1e4, np.float32)
        rows[:, 0] += np.random.default_rng(1).permutation(3000).astype(np.float32) / 1024
        (result,) = search_batch([filled("dot", rows).view(2)], rows[:1] / 1e4, SearchOptions(3000), 0)
        assert result.keys == [b"%d" % row for row in np.argsort(-rows[:, 0])]
        assert len(set(result.distances)) < 200

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_tiny_products_are_not_less_than_nothing(self, sign: float) -> None:
        rows = np.array([[1e-30], [2e-30], [0.0]], np.float32)
        query = np.array([[sign * 1e-30]], np.float32)
        (result,) = search_batch([filled("dot", rows).view(2)], query, SearchOptions(3), 0)
        assert result.keys == ([b"1", b"0", b"2"] if sign > 0 else [b"2", b"0", b"1"])
        assert result.distances == [0.0, 0.0, 0.0]

    def test_near_duplicates_are_told_apart(self, nearest: Nearest) -> None:
        # Closer to each other than float32 sums can tell.
        random = np.random.default_rng(3)
        base = random.normal(size=384)
        rows = (base + 1e-6 * random.normal(size=(2000, 384))).astype(np.float32)
        for metric in METRICS:
            (result,) = search_batch([filled(metric, rows).view(2)], rows[:1], SearchOptions(10), 0)
            assert pairs(result) == nearest(metric, rows, rows[0], 10)

    def test_more_than_there_is_gives_all_there_is(self) -> None:
        index = filled("l2", np.eye(3, dtype=np.float32))
        (result,) = search_batch([index.view(2)], np.zeros((1, 3), np.float32), SearchOptions(1 << 40), 0)
        assert result.keys == [b"0", b"1", b"2"]
        assert result.distances == [1.0, 1.0, 1.0]

    def test_the_largest_norms_do_not_bring_dead_rows_back(self) -> None:
        # The errors allowed for are then so large that a bound of the greatest float32 overflows.
        random = np.random.default_rng(2)
        rows = random.normal(size=(50, 512))
        rows = (rows * (9.9e17 / np.linalg.norm(rows, axis=1, keepdims=True))).astype(np.float32)
        index = filled("l2", rows)
        index.delete(3, [b"7", b"20"])
        (result,) = search_batch([index.view(3)], rows[:1], SearchOptions(60), 0)
        assert sorted(map(int, result.keys)) == [row for row in range(50) if row not in (7, 20)]

    def test_k_must_be_positive(self) -> None:
        index = filled("l2", np.eye(3, dtype=np.float32))
        with pytest.raises(ValueError, match="k must be positive"):
            search_batch([index.view(2)], np.zeros((1, 3), np.float32), SearchOptions(0), 0)

    def test_an_empty_index_gives_nothing(self) -> None:
        index = VectorIndex(1, default_parameters(3, "l2"))
        results = search_batch([index.view(2)] * 2, np.zeros((2, 3), np.float32), SearchOptions(5), 0)
        assert results == [SearchResult([], []), SearchResult([], [])]

    def test_each_query_of_a_batch_sees_its_own_view(self, nearest: Nearest) -> None:
        random = np.random.default_rng(8)
        rows = random.normal(size=(120, 4)).astype(np.float32)
        index = VectorIndex(1, default_parameters(4, "l2"), seal_rows=64)
        views: list[View] = []
        expected: list[list[tuple[int, float]]] = []
        query = np.zeros(4, np.float32)
        live: dict[int, int] = {}
        for row in range(len(rows)):
            index.add(2 * row, [b"%d" % row], rows[row : row + 1])
            live[row] = row
            if row % 3 == 2:
                index.delete(2 * row + 1, [b"%d" % (row // 2)])
                live.pop(row // 2)
            views.append(index.view(2 * row + 1))
            present = sorted(live)
            expected.append([(present[at], d) for at, d in nearest("l2", rows[present], query, 7)])
        results = search_batch(views[::-1], np.zeros((len(views), 4), np.float32), SearchOptions(7), 0)
        assert [pairs(result) for result in results[::-1]] == expected

    @pytest.mark.parametrize("added", [1, 2])
    @pytest.mark.parametrize("newest", [0, 1])
    def test_an_addition_that_was_not_made_hides_no_death(self, added: int, newest: int) -> None:
        """The head has another chunk for it. A view of before has as many rows, and not the deaths."""
        rows = np.arange(48, dtype=np.float32).reshape(16, 3)
        index = filled("l2", rows)
        views = [index.view(2)]
        index.prepare_addition([b"%d" % row for row in range(16, 16 + added)], rows[:added])
        index.delete(3, [b"0"])
        views.insert(newest, index.view(3))
        results = search_batch(views, np.repeat(rows[:1], 2, axis=0), SearchOptions(1), 0)
        assert [result.keys for result in results] == [[b"1"], [b"0"]][:: 1 if newest == 0 else -1]


class TestViewsBehind:
    """A view that ends before a chunk sees none of its rows, and later views all of them."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("ahead", [0, 100, 2000])
    def test_later_views_miss_nothing(self, metric: str, ahead: int, nearest: Nearest) -> None:
        rows = np.random.default_rng(7).normal(size=(7000, 16)).astype(np.float32)
        keys = [b"%d" % row for row in range(len(rows))]
        texts = [b'{"even": %d}' % (row % 2 == 0) for row in range(len(rows))]
        index = VectorIndex(1, default_parameters(16, metric))
        even = SearchOptions(10, exact=True, filter=compile_filter(b".even == 1"))

        def check(lsn: int, count: int) -> None:
            for query in rows[4000:7000:500]:
                for options, step in ((SearchOptions(10, exact=True), 1), (even, 2)):
                    (result,) = search_batch([index.view(lsn)], query[None], options, 0)
                    expected = nearest(metric, rows[:count:step], query, 10)
                    assert pairs(result) == [(row * step, distance) for row, distance in expected]

        index.add(2, keys[:4000], rows[:4000], texts[:4000])
        index.add(3, keys[4000 : 4096 + ahead], rows[4000 : 4096 + ahead], texts[4000 : 4096 + ahead])
        # Who loads sees their own rows, others do not yet.
        for lsn in (3, 2, 3, 1):
            check(lsn, {3: 4096 + ahead, 2: 4000, 1: 0}[lsn])
        index.add(4, keys[4096 + ahead :], rows[4096 + ahead :], texts[4096 + ahead :])
        for lsn in (2, 4, 3):
            check(lsn, {4: 7000, 3: 4096 + ahead, 2: 4000}[lsn])

    @pytest.mark.parametrize("seed", range(4))
    def test_threads_with_views_of_any_age_agree_with_brute_force(self, seed: int, nearest: Nearest) -> None:
        random = np.random.default_rng(seed)
        rows = random.normal(size=(9000, 8)).astype(np.float32)
        index = VectorIndex(1, default_parameters(8, "l2"))
        counts = [0]
        while counts[-1] < len(rows):
            counts.append(min(len(rows), counts[-1] + int(random.integers(1, 1500))))
        views = []
        for lsn, (start, end) in enumerate(itertools.pairwise(counts), 2):
            keys = [b"%d" % row for row in range(start, end)]
            texts = [b'{"odd": %d}' % (row % 2) for row in range(start, end)]
            index.add(lsn, keys, rows[start:end], texts)
            views += [(index.view(behind), counts[behind - 1]) for behind in range(1, lsn + 1)]
        random.shuffle(views)
        odd = compile_filter(b".odd == 1")
        ready = threading.Barrier(4)

        def search(part: list[tuple[View, int]]) -> list[tuple[int, list[tuple[int, float]], int]]:
            ready.wait()
            found = []
            for view, count in part:
                (result,) = search_batch([view], rows[count - 1 : count], SearchOptions(5, exact=True), 0)
                found.append((count, pairs(result), count_matching(view, odd)))
            return found

        views = [(view, count) for view, count in views if count]
        with ThreadPoolExecutor(4) as threads:
            parts = list(threads.map(search, [views[start::4] for start in range(4)]))
        for count, found, matching in itertools.chain(*parts):
            assert found == nearest("l2", rows[:count], rows[count - 1], 5)
            assert matching == count // 2


class TestPlans:
    """However a row is found, it is at the same distance."""

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("kind", ["offset", "parallel", "few values", "tiny"])
    def test_walks_and_scans_and_heads_say_the_same(
        self, kind: str, metric: str, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planner, "SCAN_ROWS_PER_EXPANSION", 0)
        rows = make_rows(kind, np.random.default_rng(6), 400, 24)
        head, index = filled(metric, rows), filled(metric, rows, seal_rows=256)
        build(index).install(3, index)
        assert len(index.segments) == 1
        for query in rows[:6]:
            exact = SearchOptions(20, exact=True)
            (scanned,) = search_batch([index.view(3)], query[None], exact, 0)
            check_nearest(metric, rows, query, 20, scanned)
            assert scanned == search_batch([head.view(2)], query[None], exact, 0)[0]
            distances = dict(zip(scanned.keys, scanned.distances, strict=True))
            (walked,) = search_batch([index.view(3)], query[None], SearchOptions(20, ef=300), 0)
            places = [scanned.keys.index(key) for key in walked.keys if key in distances]
            assert places == sorted(places)
            assert places
            for key, distance in zip(walked.keys, walked.distances, strict=True):
                assert distances.get(key, distance) == distance


class TestSegments:
    """A graph may miss a neighbour, but the answer is always of live rows, in order, k of them."""

    @pytest.mark.parametrize(
        ("metric", "spread", "least"),
        [
            ("cosine", 1.0, 0.97),
            ("cosine", 100.0, 0.97),
            ("l2", 1.0, 0.97),
            ("l2", 100.0, 0.95),
            ("dot", 1.0, 0.97),
            ("dot", 100.0, 0.95),
        ],
    )
    def test_nearly_all_of_the_nearest_are_found(
        self,
        metric: str,
        spread: float,
        least: float,
        clustered: Clustered,
        nearest: Nearest,
        build: Build,
    ) -> None:
        rows = clustered(6000, 48, spread=spread)
        queries = clustered(100, 48, seed=1, spread=spread)
        index = filled(metric, rows, seal_rows=4096)
        build(index).install(3, index)
        (installed,) = index.segments
        assert installed.rows > 4000
        results = search_batch([index.view(3)] * len(queries), queries, SearchOptions(10), 0)
        expected = [nearest(metric, rows, query, 10) for query in queries]
        assert recall(results, expected) >= least
        for result, query in zip(results, queries, strict=True):
            true = dict(nearest(metric, rows, query, len(rows)))
            assert pairs(result) == sorted(
                ((row, true[row]) for row, _ in pairs(result)), key=lambda pair: (pair[1], pair[0])
            )

    @pytest.fixture
    def walked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Graphs are walked however small they are."""
        monkeypatch.setattr(planner, "SCAN_ROWS_PER_EXPANSION", 0)

    @pytest.mark.usefixtures("walked")
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("every", [2, 10, 50])
    def test_dead_rows_are_never_found_and_live_ones_fill_their_places(
        self, metric: str, every: int, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(1500, 16)
        index = filled(metric, rows, seal_rows=1024)
        build(index).install(3, index)
        before = index.view(3)
        alive = np.arange(0, len(rows), every)
        index.delete(4, [b"%d" % row for row in range(len(rows)) if row % every])
        queries = clustered(20, 16, seed=1)
        results = search_batch([index.view(4)] * 20, queries, SearchOptions(10), 0)
        expected = [
            [(int(alive[at]), d) for at, d in nearest(metric, rows[alive], query, 10)] for query in queries
        ]
        assert all(len(result.keys) == 10 for result in results)
        assert all(int(key) % every == 0 for result in results for key in result.keys)
        assert recall(results, expected) >= 0.9
        earlier = search_batch([before] * 20, queries, SearchOptions(10), 0)
        assert recall(earlier, [nearest(metric, rows, query, 10) for query in queries]) >= 0.9

    @pytest.mark.usefixtures("walked")
    def test_rows_that_no_walk_reaches_are_found_by_a_scan(self, build: Build) -> None:
        # Far more equal rows than a node has links: the graph falls apart.
        rows = np.zeros((800, 4), np.float32)
        rows[400:] = 1.0
        index = filled("l2", rows, seal_rows=512)
        build(index).install(3, index)
        (result,) = search_batch([index.view(3)], rows[:1], SearchOptions(700), 0)
        assert len(result.keys) == 700
        assert result.distances == [0.0] * 400 + [2.0] * 300

    @pytest.mark.usefixtures("walked")
    def test_an_ef_that_is_asked_for_is_used(
        self, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(4000, 32)
        queries = clustered(60, 32, seed=1)
        index = filled("cosine", rows, seal_rows=2048)
        build(index).install(3, index)
        expected = [nearest("cosine", rows, query, 1) for query in queries]
        views = [index.view(3)] * len(queries)
        narrow, wide = (
            recall(search_batch(views, queries, SearchOptions(1, ef=ef), 0), expected) for ef in (1, 400)
        )
        assert narrow < wide
        assert wide > 0.99

    def test_a_large_k_is_answered_exactly(
        self, clustered: Clustered, nearest: Nearest, build: Build
    ) -> None:
        rows = clustered(3000, 16)
        index = filled("cosine", rows, seal_rows=1024)
        build(index).install(3, index)
        (result,) = search_batch([index.view(3)], rows[:1], SearchOptions(2500), 0)
        assert pairs(result) == nearest("cosine", rows, rows[0], 2500)
