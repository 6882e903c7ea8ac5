from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram.commands.distances import format_distances
from engram.index.distances import Queries, row_norms


def test_texts_are_short() -> None:
    distances = np.array([0, 1, 2.5, -6, 0.1, 1e-7, 1.5e20, 123456789, 1e-45], np.float32)
    assert format_distances(distances) == [
        b"0",
        b"1",
        b"2.5",
        b"-6",
        b"0.1",
        b"0.0000001",
        b"150000000000000000000",
        b"123456790",
        b"0.000000000000000000000000000000000000000000001",
    ]


def test_minus_zero_is_zero() -> None:
    row = np.array([[1.0, 0.0]], np.float32)
    query = np.array([[0.0, 1.0]], np.float32)
    for metric in ("dot", "l2"):
        asked = row if metric == "l2" else query
        queries = Queries.of(metric, asked)
        found = queries.distances(np.zeros(1, np.intp), row, row_norms(row))
        assert format_distances(queries.rounded(found)) == [b"0"]
    assert format_distances(np.array([-0.0, 0.0], np.float32)) == [b"0", b"0"]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_texts_read_back_as_the_same_number(numbers: list[float]) -> None:
    distances = np.array(numbers, np.float32)
    texts = format_distances(distances)
    assert all(re.fullmatch(rb"-?\d+(\.\d*[1-9])?", text) for text in texts)
    assert np.array_equal(np.array([float(text) for text in texts], np.float32), distances)


def test_texts_of_many_distances_are_those_of_each() -> None:
    distances = np.random.default_rng(1).standard_normal(5000).astype(np.float32) * np.float32(1e-3)
    distances[::7] *= np.float32(1e-6)
    texts = format_distances(distances)
    assert texts == [text for distance in distances for text in format_distances(distance[None])]
    assert np.array_equal(np.array(texts, "S32").astype(np.float32), distances)
