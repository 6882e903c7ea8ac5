from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.index.errors import VectorEncodingError, VectorError, VectorNormError, WrongDimensionError
from engram.index.vectors import decode_vector, join_vectors


@given(st.lists(st.floats(width=32, min_value=-(2.0**56), max_value=2.0**56), min_size=1, max_size=40))
def test_little_endian_floats_are_read_as_they_were_written(numbers: list[float]) -> None:
    vector = decode_vector(struct.pack(f"<{len(numbers)}f", *numbers), len(numbers))
    assert vector.dtype == np.float32
    assert vector.tolist() == numbers


@pytest.mark.parametrize(
    ("blob", "error", "facts"),
    [
        (b"", VectorEncodingError, {"size": 0}),
        (b"abc", VectorEncodingError, {"size": 3}),
        (bytes(17), VectorEncodingError, {"size": 17}),
        (bytes(12), WrongDimensionError, {"expected": 4, "got": 3}),
        (bytes(20), WrongDimensionError, {"expected": 4, "got": 5}),
    ],
)
def test_bytes_of_another_length_are_refused(
    blob: bytes, error: type[VectorError], facts: dict[str, int]
) -> None:
    with pytest.raises(error) as caught:
        decode_vector(blob, 4)
    assert vars(caught.value) == facts


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1.1e18], ids=repr)
@pytest.mark.parametrize("position", [0, 3])
def test_numbers_whose_distances_are_not_finite_are_refused(number: float, position: int) -> None:
    vector = np.ones(4, "<f4")
    vector[position] = number
    with pytest.raises(VectorNormError) as caught:
        decode_vector(vector.tobytes(), 4)
    assert caught.value.limit == 1e18


def test_infinities_that_cancel_are_refused() -> None:
    with pytest.raises(VectorNormError):
        decode_vector(np.array([np.inf, -np.inf], "<f4").tobytes(), 2)


blobs = st.lists(
    st.lists(st.floats(width=32) | st.sampled_from([0.0, 1e18, 2e18]), min_size=1, max_size=3).map(
        lambda numbers: struct.pack(f"<{len(numbers)}f", *numbers)
    )
    | st.binary(max_size=9),
    max_size=5,
)


@given(blobs, st.integers(1, 3))
def test_several_vectors_are_taken_as_each_of_them_would_be(given_blobs: list[bytes], dimension: int) -> None:
    expected: bytes | str = b"".join(given_blobs)
    for blob in sorted(given_blobs, key=lambda blob: len(blob) == 4 * dimension):
        try:
            decode_vector(blob, dimension)
        except VectorError as error:
            expected = repr(error)
            break
    try:
        found: bytes | str = join_vectors(given_blobs, dimension)
    except VectorError as error:
        found = repr(error)
    assert found == expected


def test_several_vectors_at_the_limit_are_taken_as_each_of_them_would_be() -> None:
    """There the two ways of summing squares may disagree."""
    random = np.random.default_rng(7)
    for _ in range(500):
        rows = random.normal(size=(32, 7))
        rows *= 1e18 * (1.0 + random.uniform(-3e-7, 3e-7, (32, 1))) / np.linalg.norm(rows, axis=1)[:, None]
        given_blobs = [row.tobytes() for row in rows.astype("<f4")]
        taken = []
        for blob in given_blobs:
            with suppress(VectorNormError):
                decode_vector(blob, 7)
                taken.append(blob)
        assert 0 < len(taken) < len(given_blobs)
        assert join_vectors(taken, 7) == b"".join(taken)
        for blob in set(given_blobs) - set(taken):
            with pytest.raises(VectorNormError):
                join_vectors([blob], 7)
