from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engram.index.codes import GrowingCodes, QueryCodes, RowCodes
from engram.index.distances import METRICS, Queries, row_norms

Floats = npt.NDArray[np.float32]

sizes = st.sampled_from(
    [0.0, -0.0, 1e-44, 1e-31, 1e-30, 1e-18, 1e-3, 0.5, 1.0, 1.0000001, -3.0, 1e5, 4e17, -4e17]
)


def matrices(most: int) -> st.SearchStrategy[Floats]:
    return arrays(np.float32, st.tuples(st.integers(1, most), st.just(5)), elements=sizes)


def true_ranks(metric: str, rows: Floats, asked: Floats) -> npt.NDArray[np.float64]:
    wide, queries = rows.astype(np.float64), asked.astype(np.float64)
    products: npt.NDArray[np.float64] = queries @ wide.T
    if metric == "l2":
        ranks: npt.NDArray[np.float64] = (wide**2).sum(axis=1) - 2.0 * products
        return ranks
    norms = np.linalg.norm(queries, axis=1)[:, None]
    products = -np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    lengths = np.linalg.norm(wide, axis=1)
    return (
        products
        if metric == "dot"
        else np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    )


def check(metric: str, rows: Floats, asked: Floats) -> None:
    queries = Queries.of(metric, asked)
    norms = row_norms(rows)
    codes = RowCodes.of(rows, norms, queries.terms(norms))
    ranks, bounds = codes.ranks(QueryCodes.of(queries.scaled))
    assert codes.rows == len(rows)
    assert ranks.dtype == np.float32
    assert ranks.shape == (len(asked), len(rows))
    off = np.abs(ranks - true_ranks(metric, rows, asked))
    assert (off <= (bounds + queries.error)[:, None]).all()


@pytest.mark.parametrize("metric", METRICS)
@given(rows=matrices(6), asked=matrices(3))
def test_ranks_are_within_their_bound_of_the_truth(metric: str, rows: Floats, asked: Floats) -> None:
    check(metric, rows, asked)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 24, 384, 1000])
def test_the_bound_holds_in_any_dimension(metric: str, dimension: int) -> None:
    random = np.random.default_rng(dimension)
    rows = random.normal(size=(300, dimension)).astype(np.float32)
    check(metric, rows, random.normal(size=(7, dimension)).astype(np.float32))


def test_the_bound_is_close_enough_to_be_of_use() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(1000, 384)).astype(np.float32)
    queries = Queries.of("cosine", random.normal(size=(5, 384)).astype(np.float32))
    norms = row_norms(rows)
    _, bounds = RowCodes.of(rows, norms, queries.terms(norms)).ranks(QueryCodes.of(queries.scaled))
    assert bounds.max() < 0.03


class TestGrowingCodes:
    def test_all_rows_but_the_newest_are_coded_and_a_full_block_wholly(self) -> None:
        random = np.random.default_rng(4)
        rows = random.normal(size=(600, 16)).astype(np.float32)
        norms = row_norms(rows)
        queries = Queries.of("cosine", rows[:3])
        codes = GrowingCodes(600, 16)
        covered = []
        for count in (5, 127, 128, 200, 255, 256, 400, 599, 600, 300):
            latest = codes.latest(rows[:count], norms[:count], queries)
            covered.append(0 if latest is None else latest.rows)
            if latest is not None:
                known = slice(latest.rows)
                expected = RowCodes.of(rows[known], norms[known], queries.terms(norms[known]))
                asked = QueryCodes.of(queries.scaled)
                ranks, bounds = latest.ranks(asked)
                true_ranks, true_bounds = expected.ranks(asked)
                assert np.array_equal(ranks, true_ranks)
                assert np.array_equal(bounds, true_bounds)
        assert covered == [0, 0, 128, 128, 128, 256, 400, 599, 600, 600]

    def test_more_rows_than_there_is_room_for_are_refused(self) -> None:
        rows = np.ones((301, 16), np.float32)
        norms = row_norms(rows)
        queries = Queries.of("cosine", rows[:1])
        codes = GrowingCodes(300, 16)
        for count, known in ((301, 301), (300, 299), (200, 201)):
            with pytest.raises(ValueError, match=f"{count} rows with {known} norms"):
                codes.latest(rows[:count], norms[:known], queries)
        latest = codes.latest(rows[:200], norms[:200], queries)
        assert latest is not None
        assert latest.rows == 200
