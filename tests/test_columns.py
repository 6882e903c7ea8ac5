from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engram.columns import TABLE, Array, open_columns, pack_bytes, unpack_bytes, write_columns
from engram.errors import DamagedDataError, NewerFormatError
from engram.files import DiskFiles
from engram.format_level import LEVEL


class Everything:
    def __contains__(self, name: object) -> bool:
        return True


EVERYTHING = Everything()
METADATA = {"dimension": 3, "metric": "l2", "nested": [1, None, "x"]}


def sample() -> dict[str, Array]:
    return {
        "vectors": np.arange(12, dtype=np.float32).reshape(4, 3),
        "row-ids": np.array([1, 5, 9, 2**40]),
        "empty": np.empty((0, 3), np.float32),
        **pack_bytes("keys", [b"a", b"", b"\x00\xff", b"long" * 10]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture
def checksum(folder: Path) -> int:
    (folder / "graph.usearch").write_bytes(b"a graph")
    return write_columns(DiskFiles(), folder, sample(), METADATA, ["graph.usearch"])


def test_what_is_written_comes_back(folder: Path, checksum: int) -> None:
    opened = open_columns(folder, checksum)
    assert opened.metadata == METADATA
    assert opened.checksum == checksum
    assert opened.columns.keys() == sample().keys()
    for name, column in sample().items():
        assert opened.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(opened.columns[name], column)
    assert unpack_bytes("keys", opened.columns) == [b"a", b"", b"\x00\xff", b"long" * 10]


def test_columns_cannot_be_written_to(folder: Path, checksum: int) -> None:
    vectors = open_columns(folder, checksum).columns["vectors"]
    assert type(vectors) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 7


@given(
    st.lists(
        arrays.arrays(
            st.one_of(
                arrays.floating_dtypes(endianness="<"),
                arrays.integer_dtypes(endianness="<"),
                arrays.unsigned_integer_dtypes(endianness="<"),
                arrays.boolean_dtypes(),
            ),
            arrays.array_shapes(min_side=0, max_dims=3, max_side=5),
        ),
        max_size=3,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_any_array_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[Array]) -> None:
    path = tmp_path_factory.mktemp("any")
    columns = {f"column-{number}": value for number, value in enumerate(values)}
    opened = open_columns(path, write_columns(DiskFiles(), path, columns, {}))
    for name, column in columns.items():
        assert opened.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(opened.columns[name], column)


def test_an_array_in_column_order_comes_back(folder: Path) -> None:
    column = np.asfortranarray(np.arange(6).reshape(2, 3))[:, ::2]
    opened = open_columns(folder, write_columns(DiskFiles(), folder, {"column": column}, {}))
    np.testing.assert_array_equal(opened.columns["column"], column)


@given(st.lists(st.binary()))
def test_bytes_survive_packing(items: list[bytes]) -> None:
    assert unpack_bytes("items", pack_bytes("items", items)) == items
    assert pack_bytes("items", iter(items))["items-ends"].dtype == np.int64


def test_any_flipped_bit_in_any_file_is_noticed(folder: Path, checksum: int) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 5):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedDataError, match=path.name):
                open_columns(folder, checksum)
        path.write_bytes(content)
    open_columns(folder, checksum)


@pytest.mark.parametrize("deferred", [(), EVERYTHING])
def test_a_missing_or_shortened_file_is_noticed(
    folder: Path, checksum: int, deferred: Container[str]
) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(DamagedDataError, match=path.name):
            open_columns(folder, checksum, deferred=deferred)
        path.unlink()
        with pytest.raises(DamagedDataError, match=f"{path.name}: missing"):
            open_columns(folder, checksum, deferred=deferred)
        path.write_bytes(content)


def test_what_is_deferred_is_verified_later(folder: Path, checksum: int) -> None:
    graph = folder / "graph.usearch"
    graph.write_bytes(b"A graph")
    opened = open_columns(folder, checksum, deferred=EVERYTHING)
    assert opened.metadata == METADATA
    opened.verify("row-ids.npy")
    with pytest.raises(DamagedDataError, match=r"graph\.usearch: checksum mismatch"):
        opened.verify(graph.name)
    graph.unlink()
    with pytest.raises(DamagedDataError, match=r"graph\.usearch: missing"):
        opened.verify(graph.name)


def test_the_checksum_vouches_for_the_table(folder: Path, checksum: int) -> None:
    with pytest.raises(DamagedDataError, match=r"columns\.json: checksum mismatch"):
        open_columns(folder, checksum + 1, deferred=EVERYTHING)


def test_a_column_that_is_none_is_damage_not_a_crash(folder: Path, checksum: int) -> None:
    path = folder / "row-ids.npy"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DamagedDataError, match=r"row-ids\.npy: not a column"):
        open_columns(folder, checksum, deferred=EVERYTHING)


def test_a_newer_level_is_refused(folder: Path, checksum: int) -> None:
    table = json.loads((folder / TABLE).read_bytes())
    text = json.dumps({**table, "version": LEVEL + 1, "files": "others"}).encode()
    (folder / TABLE).write_bytes(text)
    with pytest.raises(NewerFormatError, match=rf"written by a newer engram \(level {LEVEL + 1}\)"):
        open_columns(folder, crc32c(text))


def test_the_version_of_before_there_were_levels(folder: Path, checksum: int) -> None:
    before = open_columns(folder, checksum).checksums
    text = json.dumps({**json.loads((folder / TABLE).read_bytes()), "version": 1}).encode()
    (folder / TABLE).write_bytes(text)
    assert open_columns(folder, crc32c(text)).checksums == before


def test_the_table_lists_each_file_with_size_and_checksum(folder: Path, checksum: int) -> None:
    text = (folder / TABLE).read_bytes()
    assert crc32c(text) == checksum
    table = json.loads(text)
    assert table["files"]["graph.usearch"] == [7, crc32c(b"a graph")]
    for name, (size, expected) in table["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), crc32c(content)) == (size, expected)


def test_a_folder_is_not_written_twice(folder: Path, checksum: int) -> None:
    with pytest.raises(FileExistsError):
        write_columns(DiskFiles(), folder, sample(), METADATA)
    assert open_columns(folder, checksum).metadata == METADATA
