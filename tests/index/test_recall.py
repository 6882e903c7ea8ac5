from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from engram.index.distances import row_norms
from engram.index.graph import Graph, GraphBuilder, Quantizer
from engram.index.parameters import default_parameters
from engram.index.recall import measure_expansion, narrowest_expansion
from engram.index.texts import Positions

Floats = npt.NDArray[np.float32]
Clustered = Callable[..., Floats]


def measured(metric: str, rows: Floats, *, links: int = 16) -> int:
    parameters = default_parameters(rows.shape[1], metric)
    norms = row_norms(rows)
    positions = np.arange(len(rows))
    inside, sample = positions[positions % 50 > 0], positions[::50]
    builder = GraphBuilder(parameters, Quantizer.fit(parameters, rows, norms))
    builder.add(inside, rows, norms)
    return measure_expansion(builder.graph, metric, rows, norms, inside, sample)


@pytest.mark.parametrize(("rows", "expansion"), [(1, 64), (16_384, 64), (131_072, 128), (262_144, 161)])
def test_the_first_try_is_wider_in_a_larger_graph(rows: int, expansion: int) -> None:
    assert narrowest_expansion(rows) == expansion


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
def test_rows_like_embeddings_need_a_narrow_search(metric: str, clustered: Clustered) -> None:
    assert 64 <= measured(metric, clustered(6000, 16)) <= 128


def test_rows_that_a_graph_does_not_suit_are_scanned(clustered: Clustered) -> None:
    # Every row is nearest to the few short ones, so hardly any link leads to a long one.
    assert measured("l2", clustered(6000, 64, spread=1000.0)) == 0


def test_the_widest_is_taken_when_none_is_good_but_some_are_fair(
    clustered: Clustered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram.index.recall._GOOD_RECALL", 1.1)
    assert measured("cosine", clustered(6000, 16)) == 128


def test_a_graph_too_small_to_be_walked_is_not_measured(clustered: Clustered) -> None:
    assert measured("cosine", clustered(5, 16)) == 64


def test_a_graph_of_equal_rows_is_as_good_as_any() -> None:
    assert measured("l2", np.ones((4000, 8), np.float32)) == 64


def test_the_narrowest_search_that_is_good_is_chosen(
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
            found[:, : count - 3] = -1
        return found

    monkeypatch.setattr(Graph, "search", search_badly)
    assert measured("cosine", clustered(8000, 16)) == 128
    assert asked == [64, 96, 128]
