from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engram.index.distances import METRICS, Floats, Queries, row_norms

component = st.floats(width=32, min_value=-(2.0**52), max_value=2.0**52)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(7)), elements=component)


def true_rank(metric: str, query: Floats, row: Floats) -> float:
    """What a rank stands for, from sums of exact fractions."""
    numbers = [Fraction(float(number)) for number in row]
    asked = [Fraction(float(number)) for number in query]
    product = sum((a * b for a, b in zip(numbers, asked, strict=True)), Fraction(0))
    square = sum((a * a for a in numbers), Fraction(0))
    if metric == "l2":
        return float(square - 2 * product)
    query_norm = math.sqrt(sum((a * a for a in asked), Fraction(0)))
    if query_norm == 0.0:
        return 0.0
    if metric == "dot":
        return -float(product) / query_norm
    return -float(product) / (query_norm * math.sqrt(square)) if square else 0.0


@pytest.mark.parametrize("metric", METRICS)
@given(rows=matrices, asked=matrices)
@example(rows=np.full((1, 7), 2.0**-149, np.float32), asked=np.full((1, 7), 2.0**-149, np.float32))
@example(rows=np.full((1, 7), 1e-30, np.float32), asked=np.full((1, 7), 1e-20, np.float32))
def test_a_rank_is_within_its_error_of_the_truth(metric: str, rows: Floats, asked: Floats) -> None:
    queries = Queries.of(metric, asked)
    norms = row_norms(rows)
    together = queries.terms(norms)
    for position, row in enumerate(rows):
        terms = queries.terms(norms[position : position + 1])
        ranks = terms.ranks(queries.scaled @ rows[position])
        assert terms.error <= together.error
        for number, query in enumerate(asked):
            allowed = terms.error + float(queries.error[number]) / 2
            assert abs(float(ranks[number]) - true_rank(metric, query, row)) <= allowed


@pytest.mark.parametrize("metric", METRICS)
@given(rows=matrices, asked=matrices)
def test_distances_are_exact_to_float32(metric: str, rows: Floats, asked: Floats) -> None:
    queries = Queries.of(metric, asked)
    which = np.arange(len(rows)) % len(asked)
    found = queries.distances(which, rows, row_norms(rows))
    for number, distance in enumerate(found.tolist()):
        row, query = rows[number].astype(np.float64), asked[which[number]].astype(np.float64)
        product = math.fsum(row * query)
        size = math.sqrt(math.fsum(row * row)) * math.sqrt(math.fsum(query * query))
        if metric == "l2":
            expected, slack = math.sqrt(math.fsum((row - query) ** 2)), 0.0
        elif metric == "dot":
            expected, slack = -product, 1e-12 * size
        else:
            expected, slack = (1.0 - product / size if size else 1.0), 1.2e-7
        assert distance == pytest.approx(expected, rel=1.2e-7, abs=slack + 1e-45)


@pytest.mark.parametrize("factor", [1.0, 3.0, 1e-30, 1e16])
def test_the_same_direction_is_at_cosine_distance_zero(factor: float) -> None:
    row = np.random.default_rng(5).normal(size=(1, 384)).astype(np.float32)
    query = (row * np.float32(factor)).astype(np.float32)
    queries = Queries.of("cosine", query)
    found = queries.distances(np.zeros(1, np.intp), row, row_norms(row))
    assert queries.rounded(found).tolist() == [0.0]


def test_a_zero_vector_is_at_cosine_distance_one_from_everything() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 2.0]], np.float32)
    for asked in rows:
        queries = Queries.of("cosine", asked[None])
        distances = queries.distances(np.zeros(2, np.intp), rows, row_norms(rows))
        assert distances[0] == 1.0
        assert distances[1] == (1.0 if not asked.any() else 0.0)
