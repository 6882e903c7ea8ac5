from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.index.head import HEAD_COLUMNS, Chunk
from engram.index.parameters import default_parameters
from engram.index.row_columns import ROW_COLUMNS, Column, NumberColumn, rows_at
from engram.index.segment import ROW_FILES
from engram.index.vector_index import VectorIndex
from tests.index.conftest import Build

Floats = npt.NDArray[np.float32]
SIZES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=4)


def values(column: Column, rows: int, dimension: int, first: int) -> Any:
    if isinstance(column, NumberColumn):
        shape = column.shape(rows, dimension)
        return np.arange(first, first + np.prod(shape, dtype=int)).astype(column.dtype).reshape(shape)
    return [b"%d" % number if number % 2 else b"" for number in range(first, first + rows)]


@pytest.mark.parametrize("column", ROW_COLUMNS, ids=lambda column: column.name)
@given(sizes=SIZES)
def test_what_is_unpacked_is_what_was_packed(column: Column, sizes: list[tuple[int, int]]) -> None:
    parts: list[Any] = [
        values(column, rows, dimension, number) for number, (rows, dimension) in enumerate(sizes)
    ]
    unpacked: list[Any] = column.unpack(column.pack(parts), sizes)
    assert len(unpacked) == len(parts)
    for before, after in zip(parts, unpacked, strict=True):
        assert np.array_equal(before, after)
        assert np.shape(before) == np.shape(after)


def test_the_files_of_rows_are_those_of_the_format() -> None:
    assert ROW_FILES == (
        "row-ids.npy",
        "keys-bytes.npy",
        "keys-ends.npy",
        "attributes-bytes.npy",
        "attributes-ends.npy",
        "vectors.npy",
    )


def test_a_chunk_has_every_column_of_its_rows() -> None:
    chunk = Chunk(4, 3)
    chunk.extend(np.arange(2), [b"a", b"b"], np.ones((2, 3), np.float32), 7)
    chunk.describe(1, b"{}")
    chunk.kill(0, 8)
    copied = chunk.copy(0, 9, 3)
    for column in HEAD_COLUMNS:
        before, after = getattr(chunk, column.name), getattr(copied, column.name)
        if isinstance(column, NumberColumn):
            assert np.array_equal(before[:2], after[:2]), column.name
        else:
            assert before == after, column.name
            assert before is not after, column.name
    assert (copied.capacity, copied.count, copied.dead) == (9, 2, 1)
    assert copied.attribute_bytes == chunk.attribute_bytes
    rest = chunk.copy(1, 4, 3)
    assert (rest.row_ids[:1].tolist(), rest.keys, rest.attributes) == ([1], [b"b"], {0: b"{}"})


def test_rows_of_a_chunk_and_of_a_segment_are_read_alike(
    clustered: Callable[..., Floats], build: Build
) -> None:
    index = VectorIndex(1, default_parameters(4, "l2"), seal_rows=16)
    attributes = [None if row % 3 else b'{"row":%d}' % row for row in range(16)]
    index.add(2, [b"%d" % row for row in range(16)], clustered(16, 4), attributes)
    positions = np.array([1, 3, 6])
    chunk = index.chunks[0]
    segment = build(index).segment
    assert segment is not None
    of_chunk, of_segment = rows_at(chunk, positions), rows_at(segment, positions)
    assert list(of_chunk) == [column.name for column in ROW_COLUMNS]
    for name in of_chunk:
        assert np.array_equal(of_chunk[name], of_segment[name]), name
