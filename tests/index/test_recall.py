from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.index.distances import METRICS, Queries, row_norms
from engram.index.graph import Graph, GraphBuilder, Quantizer
from engram.index.parameters import default_parameters
from engram.index.recall import NEIGHBORS, OVERSAMPLING, Curve, Sample, expansion_for
from engram.index.texts import Positions

Floats = npt.NDArray[np.float32]
Clustered = Callable[..., Floats]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]


def measured(metric: str, rows: Floats) -> tuple[Graph, Curve]:
    """The finished graph, and the curve measured while it was built."""
    parameters = default_parameters(rows.shape[1], metric)
    norms = row_norms(rows)
    sample = Sample.choose(metric, rows, norms)
    builder = GraphBuilder(parameters, Quantizer.fit(parameters, rows, norms))
    builder.add(sample.inside, rows, norms)
    curve = sample.measure(builder.graph, rows, norms)
    builder.add(sample.held, rows, norms)
    return builder.graph, sample.measure_whole(builder.graph, rows, norms, curve)


def true_recall(graph: Graph, metric: str, rows: Floats, asked: Floats, expansion: int) -> float:
    queries, norms = Queries.of(metric, asked), row_norms(rows)
    everything = np.broadcast_to(np.arange(len(rows)), (len(asked), len(rows)))
    step = 10
    right = 0
    found = graph.search(asked, row_norms(asked), OVERSAMPLING * NEIGHBORS, expansion)
    for start in range(0, len(asked), step):
        part = np.arange(start, min(start + step, len(asked)))
        near = everything[part]
        distances = queries.select(part).distances_of_each(rows[near], norms[near])
        limits = np.partition(distances, NEIGHBORS - 1, axis=1)[:, [NEIGHBORS - 1]]
        hits = np.take_along_axis(distances, found[part], axis=1) <= limits
        right += int(np.minimum(np.count_nonzero(hits, axis=1), NEIGHBORS).sum())
    return right / (NEIGHBORS * len(asked))


@pytest.mark.parametrize("metric", METRICS)
def test_real_queries_find_what_the_curve_promises(metric: str, clustered: Clustered) -> None:
    rows, queries = clustered(6000, 32), clustered(200, 32, seed=1)
    graph, curve = measured(metric, rows)
    for target in (0.9, 0.95, 0.99):
        expansion = expansion_for(curve, target)
        assert 24 <= expansion <= 160
        assert true_recall(graph, metric, rows, queries, expansion) >= target - 0.005


def test_copies_of_rows_do_not_flatter_the_curve(clustered: Clustered) -> None:
    originals = clustered(1500, 32)
    noise = np.random.default_rng(5).normal(scale=0.005, size=(12_000, 32))
    rows = (np.repeat(originals, 8, axis=0) + noise).astype(np.float32)
    graph, curve = measured("cosine", rows)
    expansion = expansion_for(curve, 0.9)
    assert expansion > 0
    queries = clustered(200, 32, seed=1)
    assert true_recall(graph, "cosine", rows, queries, expansion) >= 0.895


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_quite_the_same_do_not_flatter_the_curve(metric: str) -> None:
    """One-hot rows: each has more copies than a walk finds, and all others are equally far."""
    rows = np.eye(64, dtype=np.float32)[np.random.default_rng(0).integers(0, 64, 1500)]
    graph, curve = measured(metric, rows)
    assert true_recall(graph, metric, rows, rows[:200], 24) < 0.8
    for target in (0.5, 0.9, 0.99):
        expansion = expansion_for(curve, target)
        # With 0 rows are scanned.
        assert not expansion or true_recall(graph, metric, rows, rows[:200], expansion) >= target


@pytest.mark.parametrize("metric", METRICS)
def test_the_right_answers_are_the_nearest_rows_of_the_graph(
    metric: str, clustered: Clustered, nearest: Nearest
) -> None:
    rows = clustered(1500, 8, spread=3.0)
    sample = Sample.choose(metric, rows, row_norms(rows))
    for number in range(0, len(sample.farthest), 16):
        answers = nearest(metric, rows[sample.inside], sample.queries.vectors[number], NEIGHBORS)
        assert sample.farthest[number] == pytest.approx(answers[-1][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 768, 769, 20_000])
def test_every_row_comes_into_the_graph_once(rows: int) -> None:
    vectors = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    sample = Sample.choose("l2", vectors, row_norms(vectors))
    joined = np.concatenate([sample.inside, sample.held])
    assert np.array_equal(np.sort(joined), np.arange(rows))
    assert len(sample.held) <= rows // 2


def test_queries_and_their_nearest_rows_are_kept_out_of_the_graph(
    clustered: Clustered, nearest: Nearest
) -> None:
    rows = clustered(2000, 8)
    sample = Sample.choose("cosine", rows, row_norms(rows))
    held = set(sample.held.tolist())
    for query in sample.queries.vectors[:20]:
        assert {row for row, _ in nearest("cosine", rows, query, 1)} <= held


def test_rows_that_a_graph_does_not_suit_are_scanned(clustered: Clustered) -> None:
    # Every row is nearest to the few short ones, so hardly any link leads to a long one.
    _, curve = measured("l2", clustered(6000, 64, spread=1000.0))
    assert expansion_for(curve, 0.95) == 0


def test_a_graph_too_small_to_be_walked_is_not_measured(clustered: Clustered) -> None:
    assert measured("cosine", clustered(768, 16))[1] == ()


def test_a_graph_of_equal_rows_is_as_good_as_any() -> None:
    _, curve = measured("l2", np.ones((4000, 8), np.float32))
    assert expansion_for(curve, 0.99) == 24


def test_a_curve_rises_and_never_promises_everything(clustered: Clustered) -> None:
    _, curve = measured("cosine", clustered(8000, 32))
    expansions, recalls = zip(*curve, strict=True)
    assert list(expansions) == sorted(set(expansions))
    assert list(recalls) == sorted(recalls)
    assert recalls[-1] < 1.0
    assert expansion_for(curve, 1.0) == 0


def test_nothing_wider_is_measured_than_what_finds_nearly_all(
    clustered: Clustered, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    true_search = Graph.search

    def search_badly(
        self: Graph, queries: Floats, norms: npt.NDArray[np.float64], count: int, expansion: int
    ) -> Positions:
        asked.append(expansion)
        found = true_search(self, queries, norms, count, 400)
        if expansion < 128:
            found[:, 3:] = -1
        return found

    monkeypatch.setattr(Graph, "search", search_badly)
    _, curve = measured("cosine", clustered(8000, 16))
    # Without the rows that are kept out, and with them.
    assert asked == [24, 48, 96, 192] * 2
    assert [recall < 0.3 for _, recall in curve] == [True, True, True, False]


def test_between_two_widths_what_is_missed_falls_evenly_by_logarithms() -> None:
    curve = ((32, 0.9), (128, 0.99))
    # Half of the way from 0.1 to 0.01, and a little less.
    assert expansion_for(curve, 0.968) == 64


def test_the_narrowest_width_is_enough_for_modest_targets() -> None:
    assert expansion_for(((32, 0.9), (64, 0.95)), 0.5) == 32


def test_a_target_that_no_width_reaches_has_none() -> None:
    assert expansion_for(((32, 0.9), (64, 0.95)), 0.96) == 0
    assert expansion_for((), 0.1) == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.floats(0.0, 1.0)), max_size=8, unique_by=lambda point: point[0]
    ),
    st.floats(0.001, 1.0),
    st.floats(0.001, 1.0),
)
def test_a_higher_target_never_has_a_lesser_width(
    points: list[tuple[int, float]], first: float, second: float
) -> None:
    expansions = sorted(ef for ef, _ in points)
    curve = tuple(zip(expansions, sorted(recall for _, recall in points), strict=True))
    low, high = expansion_for(curve, min(first, second)), expansion_for(curve, max(first, second))
    assert high == 0 or 0 < low <= high
    for ef, recall in curve:
        assert 0 < expansion_for(curve, recall) <= ef


@pytest.mark.parametrize("metric", METRICS)
def test_of_equal_distances_any_row_is_a_right_answer(metric: str) -> None:
    rows = np.zeros((2000, 16), np.float32)
    [(width, recall)] = measured(metric, rows)[1]
    assert (width, recall > 0.99) == (24, True)
    # One number of each row, the same in all: every two rows are as far from each other, or the same.
    rows[np.arange(2000), np.random.default_rng(7).integers(0, 16, 2000)] = 1.0
    [(width, recall)] = measured(metric, rows)[1]
    assert (width, recall > 0.99) == (24, True)


@pytest.mark.parametrize(
    ("metric", "factor"),
    [("l2", 1e30), ("dot", 1e30), ("cosine", 3e38), ("l2", 1e-40), ("dot", 1e-40), ("cosine", 1e-40)],
)
def test_what_cannot_be_measured_is_scanned(metric: str, factor: float, clustered: Clustered) -> None:
    rows = np.float32(factor) * clustered(2000, 16)
    assert measured(metric, rows)[1] == ()
