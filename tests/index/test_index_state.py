from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from engram.errors import DamagedDataError
from engram.index.index_state import export_indices, named_segments, restore_indices
from engram.index.parameters import default_parameters
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from tests.index.conftest import Build

Floats = npt.NDArray[np.float32]


def made(index_id: int, rows: Floats, *, seal_rows: int = 16) -> VectorIndex:
    index = VectorIndex(index_id, default_parameters(rows.shape[1], "l2"), seal_rows=seal_rows)
    keys = [b"%d of %d" % (row, index_id) for row in range(len(rows))]
    index.add(index_id + 1, keys, rows, [b"" if row % 3 else b'{"row":%d}' % row for row in range(len(rows))])
    return index


def content(index: VectorIndex) -> dict[bytes, tuple[int, bytes | None, bytes]]:
    return {key: (row_id, index.vector(key), index.attributes(key)) for key, row_id in index.live.items()}


def test_indices_are_restored_as_they_were(
    clustered: Callable[..., Floats], store: SegmentStore, build: Build
) -> None:
    empty = VectorIndex(1, default_parameters(5, "cosine"))
    large = made(2, clustered(40, 3))
    build(large).install(50, large)
    large.add(51, [b"more", b"7 of 2"], clustered(2, 3))
    large.delete(52, [b"0 of 2", b"3 of 2"])
    small = made(60, clustered(9, 8))
    small.delete(62, [b"4 of 60"])

    columns, descriptions = export_indices([empty, large, small])
    restored = restore_indices(columns, descriptions, store, seal_rows=16)
    assert [index.id for index in restored] == [1, 2, 60]
    for before, after in zip((empty, large, small), restored, strict=True):
        assert content(after) == content(before)
        assert after.parameters == before.parameters
        assert after.next_row == before.next_row
        assert sorted(after.scan(0, 100)[1]) == sorted(before.live)
    (installed,) = large.segments
    assert named_segments(descriptions) == {installed.id: installed.segment.checksum}
    assert [index.rows_dead for index in restored] == [0, 3, 0]


def test_the_names_of_the_columns_are_those_of_the_format(clustered: Callable[..., Floats]) -> None:
    for indices in ([], [made(1, clustered(3, 4))]):
        columns, _ = export_indices(indices)
        assert {name: column.dtype.name for name, column in columns.items()} == {
            "row-ids": "int64",
            "row-keys-bytes": "uint8",
            "row-keys-ends": "int64",
            "vectors": "float32",
            "attributes-bytes": "uint8",
            "attributes-ends": "int64",
            "dead-rows": "int64",
        }


def test_the_head_of_many_chunks_is_restored(clustered: Callable[..., Floats], store: SegmentStore) -> None:
    index = made(1, clustered(1000, 2), seal_rows=100)
    (restored,) = restore_indices(*export_indices([index]), store, seal_rows=100)
    assert len(index.chunks) > 1
    assert [chunk.count for chunk in restored.chunks] == [chunk.count for chunk in index.chunks]
    assert content(restored) == content(index)
    assert restored.bytes_reserved == index.bytes_reserved


def test_a_segment_of_another_index_is_refused(
    clustered: Callable[..., Floats], store: SegmentStore, build: Build
) -> None:
    index = made(1, clustered(16, 4))
    build(index).install(30, index)
    columns, (description,) = export_indices([index])
    with pytest.raises(DamagedDataError, match="not a segment of index 2"):
        restore_indices(columns, [{**description, "id": 2}], store)
