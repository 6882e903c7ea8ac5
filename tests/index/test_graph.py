from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from usearch.index import Index

from engram.index.distances import METRICS, Queries, row_norms
from engram.index.graph import Graph, GraphBuilder, Quantizer
from engram.index.parameters import QUANTIZATIONS, Parameters, default_parameters
from engram.index.recall import Sample

Floats = npt.NDArray[np.float32]
Clustered = Callable[..., Floats]


def int8(metric: str, dimension: int) -> Parameters:
    return Parameters(dimension, metric, 16, 128, "int8")


def built(parameters: Parameters, rows: Floats) -> GraphBuilder:
    norms = row_norms(rows)
    builder = GraphBuilder(parameters, Quantizer.fit(parameters, rows, norms))
    builder.add(np.arange(len(rows)), rows, norms)
    return builder


@pytest.mark.parametrize("metric", METRICS)
def test_a_saved_graph_answers_as_the_one_that_was_built(
    metric: str, clustered: Clustered, tmp_path: Path
) -> None:
    rows, queries = clustered(500, 16), clustered(20, 16, seed=1)
    parameters = default_parameters(16, metric)
    builder = built(parameters, rows)
    builder.save(tmp_path / "graph")
    opened = Graph.open(tmp_path / "graph", parameters, Quantizer.fit(parameters, rows, row_norms(rows)))
    assert len(opened) == 500
    expected = builder.graph.search(queries, row_norms(queries), 10, 64)
    assert np.array_equal(opened.search(queries, row_norms(queries), 10, 64), expected)
    assert expected.min() >= 0


def test_fewer_rows_than_asked_for_are_filled_up(clustered: Clustered) -> None:
    rows = clustered(7, 16)
    found = built(default_parameters(16, "l2"), rows).graph.search(rows, row_norms(rows), 20, 64)
    assert found.shape == (7, 20)
    assert [sorted(set(line)) for line in found.tolist()] == [[-1, *range(7)]] * 7


def test_a_missing_file_does_not_close_standard_input(tmp_path: Path) -> None:
    parameters = default_parameters(4, "l2")
    quantizer = Quantizer("l2", "bf16", 1.0, np.zeros(4, np.float32))
    before = os.fstat(0)
    with pytest.raises(FileNotFoundError):
        Graph.open(tmp_path / "missing", parameters, quantizer)
    assert os.fstat(0) == before


def test_a_file_cut_short_by_a_full_disk_is_noticed(
    clustered: Clustered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(index: Index, path: Path) -> None:
        path.write_bytes(bytes(100))

    monkeypatch.setattr(Index, "save", save)
    with pytest.raises(OSError, match="has 100 bytes instead of"):
        built(default_parameters(16, "l2"), clustered(100, 16)).save(tmp_path / "graph")


def test_a_file_that_cannot_be_written_is_noticed(clustered: Clustered, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="graph"):
        built(default_parameters(16, "l2"), clustered(100, 16)).save(tmp_path / "missing" / "graph")


def test_unit_rows_fill_the_range_of_a_byte(clustered: Clustered) -> None:
    rows = clustered(2000, 32, spread=100.0)
    norms = row_norms(rows)
    quantizer = Quantizer.fit(default_parameters(32, "cosine"), rows, norms)
    encoded = quantizer.encode(rows, norms)
    assert encoded.dtype == np.int8
    assert (encoded.min(), encoded.max()) == (-127, 127)
    error = encoded / quantizer.scale - rows / norms[:, None]
    assert np.sqrt((error**2).mean()) < 0.01


def test_the_longest_rows_are_not_clipped(clustered: Clustered) -> None:
    rows = clustered(4000, 32, spread=20.0)
    norms = row_norms(rows)
    for metric in ("l2", "dot"):
        quantizer = Quantizer.fit(int8(metric, 32), rows, norms)
        long = norms >= np.percentile(norms, 99.0)
        encoded = quantizer.encode(rows[long], norms[long])
        assert (np.abs(encoded) == 127).mean() < 0.005
        error = encoded / quantizer.scale - (rows[long] - quantizer.center)
        assert np.sqrt((error**2).mean()) < 0.01 * norms[long].mean()


def test_a_query_of_dot_may_have_any_length(clustered: Clustered) -> None:
    rows, queries = clustered(2000, 16, spread=3.0), clustered(50, 16, seed=1)
    graph = built(int8("dot", 16), rows).graph
    expected = graph.search(queries, row_norms(queries), 10, 64)
    for factor in (1e-20, 1e-3, 1e3, 1e20):
        scaled = queries * np.float32(factor)
        found = graph.search(scaled, row_norms(scaled), 10, 64)
        assert (found == expected).mean() > 0.95


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_a_few_huge_rows_do_not_cost_the_others_their_precision(metric: str, clustered: Clustered) -> None:
    rows = clustered(4000, 32)
    rows[::400] *= 1e5
    norms = row_norms(rows)
    small = norms < 2.0
    quantizer = Quantizer.fit(int8(metric, 32), rows, norms)
    error = quantizer.encode(rows[small], norms[small]) / quantizer.scale - (rows[small] - quantizer.center)
    assert np.sqrt((error**2).sum(axis=1)).max() < 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_encoding_leaves_the_rows_as_they_are(metric: str, clustered: Clustered) -> None:
    rows = clustered(100, 16)
    before, norms = rows.copy(), row_norms(rows)
    quantizer = Quantizer.fit(int8(metric, 16), rows, norms)
    quantizer.encode(rows, norms)
    quantizer.encode_queries(rows, norms)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_in_a_byte_a_number_are_found(metric: str, clustered: Clustered) -> None:
    rows, queries = clustered(3000, 32, spread=2.0), clustered(100, 32, seed=1)
    found = built(int8(metric, 32), rows).graph.search(queries, row_norms(queries), 30, 128)
    every = np.broadcast_to(np.arange(3000), (100, 3000))
    norms = row_norms(rows)
    distances = Queries.of(metric, queries).distances_of_each(rows[every], norms[every])
    limits = np.partition(distances, 9, axis=1)[:, [9]]
    hits = np.count_nonzero(np.take_along_axis(distances, found, axis=1) <= limits, axis=1)
    assert hits.mean() > 9.8


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_zero_and_tiny_vectors_have_no_nan(metric: str, quantization: str) -> None:
    rows = np.array([[0.0, 0.0], [1e-45, 0.0], [1e-38, 1e-38], [1.0, 2.0]], np.float32)
    norms = row_norms(rows)
    for fitted in (rows, rows[:3]):
        quantizer = Quantizer.fit(Parameters(2, metric, 16, 128, quantization), fitted, row_norms(fitted))
        assert np.isfinite(quantizer.encode(rows, norms)).all()
        assert np.isfinite(quantizer.encode_queries(rows, norms)).all()


def test_l2_does_not_lose_precision_far_from_the_origin(clustered: Clustered) -> None:
    # bf16 has 8 bits: around 1000, its steps are 4.
    rows = clustered(1000, 16)
    far = rows + np.float32(1000.0)
    near, shifted = (built(default_parameters(16, "l2"), matrix).graph for matrix in (rows, far))
    found = near.search(rows, row_norms(rows), 1, 64)[:, 0]
    found_far = shifted.search(far, row_norms(far), 1, 64)[:, 0]
    assert (found == np.arange(1000)).mean() > 0.98
    assert (found_far == np.arange(1000)).mean() > 0.98


def sparse(rows: int, dimension: int, filled: int) -> Floats:
    """Rows of which so few numbers are not zero."""
    random = np.random.default_rng(5)
    made = np.zeros((rows, dimension), np.float32)
    for row in made:
        row[random.choice(dimension, filled, replace=False)] = random.uniform(0.5, 1.5, filled)
    return made


def normal(rows: int, dimension: int) -> Floats:
    return np.random.default_rng(6).normal(size=(rows, dimension)).astype(np.float32)


ODD_ROWS: dict[str, Callable[[], Floats]] = {
    "one number of 4,096": lambda: sparse(300, 4096, 1),
    "twenty numbers of 8,192": lambda: sparse(300, 8192, 20),
    "one number, and noise": lambda: sparse(300, 4096, 1) + np.float32(1e-10) * normal(300, 4096),
    "what differs in one number": lambda: np.hstack([normal(300, 1), np.ones((300, 4095), np.float32)]),
    "zeros": lambda: np.zeros((300, 16), np.float32),
    "nearly all zeros": lambda: np.vstack([np.zeros((297, 16), np.float32), normal(3, 16)]),
    "all the same": lambda: np.ones((300, 16), np.float32),
    "denormal numbers": lambda: np.float32(1e-40) * normal(300, 16),
    "large numbers": lambda: np.float32(1e30) * normal(300, 16),
    "the largest numbers": lambda: np.float32(3.4e38) * np.sign(normal(300, 16)),
    "numbers of all sizes": lambda: (
        (10.0 ** np.linspace(-40, 37, 300)).astype(np.float32)[:, None] * normal(300, 16)
    ),
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ODD_ROWS)
def test_a_graph_is_built_of_any_rows(kind: str, metric: str, quantization: str) -> None:
    rows = ODD_ROWS[kind]()
    parameters = Parameters(rows.shape[1], metric, 8, 16, quantization)
    norms = row_norms(rows)
    quantizer = Quantizer.fit(parameters, rows, norms)
    assert 0.0 < quantizer.scale < np.inf
    assert type(quantizer.scale) is float
    for encoded in (quantizer.encode(rows, norms), quantizer.encode_queries(rows, norms)):
        assert np.isfinite(encoded).all()
    found = built(parameters, rows).graph.search(rows[:5], norms[:5], 10, 64)
    assert found.min() >= 0
    # What is measured is true, or nothing is.
    sample = Sample.choose(metric, rows, norms)
    assert np.isfinite(sample.farthest).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["one number of 4,096", "twenty numbers of 8,192", "one number, and noise"])
def test_sparse_rows_keep_their_numbers(kind: str, metric: str) -> None:
    rows = ODD_ROWS[kind]()
    norms = row_norms(rows)
    quantizer = Quantizer.fit(int8(metric, rows.shape[1]), rows, norms)
    unit = (rows / norms[:, None]).astype(np.float32) if metric == "cosine" else rows
    error = quantizer.encode(rows, norms) / quantizer.scale - unit
    assert row_norms(error.astype(np.float32)).max() < 0.02 * row_norms(unit).max()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_how_long_a_query_is_makes_no_difference(metric: str, clustered: Clustered) -> None:
    rows = clustered(500, 16)
    graph = built(default_parameters(16, metric), rows).graph
    queries = clustered(20, 16, seed=1)
    expected = graph.search(queries, row_norms(queries), 10, 64)
    for length in (1e-30, 1e30):
        other = np.float32(length) * queries
        found = graph.search(other, row_norms(other), 10, 64)
        assert (
            np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
            > 9
        )
