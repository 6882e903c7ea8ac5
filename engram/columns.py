"""A folder of columns: numpy arrays, one .npy file each, and a table that vouches for them.

    columns.json       version (the format level), metadata, and for each file its size and CRC-32C
    <name>.npy         one array, in numpy's own format; large ones are opened through mmap
    <other file>       listed in the table like the columns (the graph of a segment)

A folder is written once and never changed. The table's own CRC-32C, kept by whoever names the folder
(the manifest, an `InstallSegment` operation), vouches for everything in it.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from engram.errors import DamagedDataError
from engram.files import Files
from engram.format_level import LEVEL, check_level, level_of

TABLE = "columns.json"
_READ_SIZE = 1 << 22
# A map keeps a descriptor of its file for as long as it lives: columns up to this size are read instead.
_SMALL_COLUMN = 256 << 10
_NPY_START = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][bfiu][0-9]+)', 'fortran_order': False, 'shape': \((\d+,|\d+(?:, \d+)+)\), \} *\n"
)

Array = npt.NDArray[Any]


@attrs.frozen
class ColumnFolder:
    """An opened folder: its columns are read-only, large ones maps of the files.

    `size` is that of its files, in bytes; `checksums` are those its table holds, by file name.
    """

    path: Path
    checksum: int
    metadata: dict[str, Any]
    columns: dict[str, Array]
    size: int
    checksums: Mapping[str, int]

    @property
    def descriptors(self) -> int:
        """How many files it keeps open, about: each map does."""
        return sum(column.nbytes > _SMALL_COLUMN for column in self.columns.values())

    def verify(self, file_name: str) -> None:
        """Reads a file of the folder and compares its checksum (blocking).

        Raises:
            DamagedDataError: it is missing or is not what was written.
        """
        _verify(self.path / file_name, self.checksums[file_name])


def pack_bytes(name: str, items: Iterable[bytes]) -> dict[str, Array]:
    """Two columns, `name`-bytes (the items joined) and `name`-ends (where each ends; int64)."""
    items = list(items)
    ends = np.cumsum(np.fromiter(map(len, items), np.int64, len(items)), dtype=np.int64)
    return {f"{name}-bytes": np.frombuffer(b"".join(items), np.uint8), f"{name}-ends": ends}


def unpack_bytes(name: str, columns: Mapping[str, Array]) -> list[bytes]:
    """The inverse of `pack_bytes`."""
    return split_bytes(columns[f"{name}-bytes"], columns[f"{name}-ends"])


def split_bytes(joined: Array, ends: Array) -> list[bytes]:
    """Byte strings that stand one after the other in `joined`, uint8; `ends` says where each ends."""
    text = joined.tobytes()
    stops = ends.tolist()
    return [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def write_columns(
    files: Files,
    path: Path,
    columns: Mapping[str, Array],
    metadata: Mapping[str, Any],
    others: Sequence[str] = (),
) -> int:
    """Writes columns and table into an existing folder, synced; returns the table's checksum.

    `others` names files that are in the folder already; they are read back, checksummed and synced.
    The folder itself is synced, its name in its parent is not. Raises OSError.
    """
    table: dict[str, list[int]] = {}
    for name, column in columns.items():
        file_name = f"{name}.npy"
        header = io.BytesIO()
        contiguous = np.ascontiguousarray(column)
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(contiguous))
        content: memoryview = contiguous.reshape(-1).view(np.uint8).data
        chunks: list[bytes | memoryview] = [header.getvalue(), content]
        files.write_file(path / file_name, chunks)
        table[file_name] = [sum(map(len, chunks)), crc32c(content, crc32c(header.getvalue()))]
    for file_name in others:
        files.sync_file(path / file_name)
        table[file_name] = list(_size_and_checksum(path / file_name))
    text = json.dumps({"version": LEVEL, "metadata": dict(metadata), "files": table}).encode()
    files.write_file(path / TABLE, [text])
    files.sync_folder(path)
    return crc32c(text)


def open_columns(path: Path, checksum: int, *, deferred: Container[str] = ()) -> ColumnFolder:
    """Opens a folder written by `write_columns`.

    Every file is read and its checksum compared; of those named in `deferred` only the size is, and the rest
    is left to `ColumnFolder.verify`.

    Raises:
        DamagedDataError: a file is missing or is not what was written.
        NewerFormatError: a newer engram wrote it.
    """
    table = read_table(path, checksum)
    columns: dict[str, Array] = {}
    for file_name, expected in table.checksums.items():
        if file_name not in deferred:
            _verify(path / file_name, expected)
        if file_name.endswith(".npy"):
            columns[file_name.removesuffix(".npy")] = _map_array(path / file_name)
    return ColumnFolder(path, checksum, table.metadata, columns, table.size, table.checksums)


@attrs.frozen
class Table:
    """What the table of a folder says; `size` and `checksums` as in `ColumnFolder`."""

    metadata: dict[str, Any]
    size: int
    checksums: Mapping[str, int]


def read_table(path: Path, checksum: int) -> Table:
    """Reads the table of a folder and compares its checksum and the sizes of all files.

    Raises:
        DamagedDataError: it is not the table that was written, or a file is missing or has another size.
        NewerFormatError: a newer engram wrote it.
    """
    table_path = path / TABLE
    try:
        text = table_path.read_bytes()
        if crc32c(text) != checksum:
            raise DamagedDataError(table_path, "checksum mismatch")
        table = json.loads(text)
        check_level(table_path, level_of(table["version"]))
        total = len(text)
        checksums = {}
        for file_name, (size, expected) in table["files"].items():
            if (path / file_name).stat().st_size != size:
                raise DamagedDataError(path / file_name, f"expected {size} bytes")
            total += size
            checksums[file_name] = expected
    except FileNotFoundError as error:
        raise DamagedDataError(Path(error.filename), "missing") from error
    return Table(table["metadata"], total, checksums)


def _verify(path: Path, checksum: int) -> None:
    try:
        if _size_and_checksum(path)[1] != checksum:
            raise DamagedDataError(path, "checksum mismatch")
    except FileNotFoundError as error:
        raise DamagedDataError(path, "missing") from error


def _map_array(path: Path) -> Array:
    # Not numpy's reader: it parses the header, which may be damaged, as Python, and CPython 3.11 sometimes
    # fails in that when several threads do so at once.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_NPY_START) + 2)
        header = file.read(int.from_bytes(start[len(_NPY_START) :], "little"))
        match = _NPY_HEADER.fullmatch(header)
        if not start.startswith(_NPY_START) or match is None:
            raise DamagedDataError(path, "not a column: its header is none")
        try:
            dtype = np.dtype(match[1].decode())
        except TypeError as error:
            raise DamagedDataError(path, f"not a column: {error}") from error
        shape = tuple(map(int, match[2].rstrip(b",").split(b",")))
        offset = len(start) + len(header)
        if offset + math.prod(shape) * dtype.itemsize != size:
            raise DamagedDataError(path, f"not a column: {size} bytes do not hold {shape} of {dtype}")
        loaded: Array
        if size <= _SMALL_COLUMN:
            loaded = np.frombuffer(file.read(), dtype).reshape(shape)
        else:
            # A plain ndarray over the map: np.memmap's own indexing costs microseconds more.
            loaded = np.memmap(file, dtype, "r", offset, shape).view(np.ndarray)
    loaded.flags.writeable = False
    return loaded


def _size_and_checksum(path: Path) -> tuple[int, int]:
    total = checksum = 0
    with path.open("rb", buffering=0) as file:
        # Into the same pages each time: new ones would take as long as the rest.
        buffer = memoryview(bytearray(min(_READ_SIZE, path.stat().st_size)))
        while size := file.readinto(buffer):
            total += size
            checksum = crc32c(buffer[:size], checksum)
    return total, checksum
