from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from engram.columns import open_columns
from engram.engine import Engine
from engram.errors import DamagedDataError
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.operations import (
    AddVectors,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    Operation,
    SetExpiry,
    SetString,
    encode,
)
from engram.persistence.snapshot import decode_result
from engram.snapshotter import write_snapshot
from tests.conftest import PATIENCE, vector
from tests.persistence.conftest import LogMaker

HISTORY: list[Operation] = [
    SetString(b"a", b"1"),
    SetString(b"b", b"2", 1_900_000_000_000),
    CreateIndex(b"i", 2, "cosine", 16, 128, "int8"),
    AddVectors(3, (b"x", b"y"), vector(1, 2, 3, 4), (b'{"n":1}', None)),
    DeleteVectors(3, (b"x",)),
    SetExpiry(b"a", 1_900_000_000_001),
    DeleteKeys((b"b",)),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory whose last closed log file holds the history, and whose open one holds more."""
    path = tmp_path / "data"
    (path / "segments").mkdir(parents=True)
    log = LogMaker(path)
    log.write(map(encode, HISTORY))
    log.new_file()
    log.write([encode(SetString(b"later", b""))])
    log.close()
    return path


def closed_log_file(directory: Path) -> Path:
    """The last but one: the one with the history."""
    return sorted(directory.glob("wal-*.log"))[-2]


def number_of(path: Path) -> int:
    return int(path.stem.removeprefix("wal-"))


def make_engine(directory: Path) -> Engine:
    return Engine(SegmentStore(directory / "segments", DiskFiles(), 0), seal_rows=64)


def snapshotter(directory: Path, last_file: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "engram.snapshotter", str(directory), str(last_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_snapshot_holds_what_the_closed_files_say(directory: Path) -> None:
    before = sorted(path.read_bytes() for path in directory.glob("wal-*.log"))
    result = write_snapshot(directory, number_of(closed_log_file(directory)))
    assert (result.lsn, result.segments) == (len(HISTORY), ())
    engine = make_engine(directory)
    engine.restore(open_columns(directory / result.snapshot, result.checksum))
    assert engine.lsn == len(HISTORY)
    assert engine.keyspace.values[b"a"] == b"1"
    assert engine.keyspace.expiries == {b"a": 1_900_000_000_001}
    assert set(engine.keyspace.values) == {b"a", b"i"}
    index = engine.indices[3]
    assert index.vector(b"x") is None
    assert index.vector(b"y") == vector(3, 4)
    assert sorted(path.read_bytes() for path in directory.glob("wal-*.log")) == before


def test_the_process_reports_its_result(directory: Path) -> None:
    with snapshotter(directory, number_of(closed_log_file(directory))) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        result = decode_result(process.stdout.read())
        assert process.stderr.read() == b""
        assert process.wait(4 * PATIENCE) == 0
    assert result.lsn == len(HISTORY)
    make_engine(directory).restore(open_columns(directory / result.snapshot, result.checksum))


class FlippingFiles(DiskFiles):
    """Writes one bit of a file other than it was told."""

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        data = bytearray().join(chunks)
        if path.name == "0.string.maps-bytes.npy":
            data[-1] ^= 1
        super().write_file(path, [bytes(data)])


def test_a_snapshot_is_read_back(directory: Path) -> None:
    with pytest.raises(DamagedDataError, match=r"0\.string\.maps-bytes\.npy: checksum mismatch"):
        write_snapshot(directory, number_of(closed_log_file(directory)), FlippingFiles())


def test_a_damaged_log_is_no_snapshot(directory: Path) -> None:
    path = closed_log_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=path.name):
        write_snapshot(directory, number_of(path))
    with snapshotter(directory, number_of(path)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == b""
        assert path.name.encode() in process.stderr.read()
        assert process.wait(4 * PATIENCE) == 1
    assert list(directory.glob("snapshot-*")) == []


def test_the_process_ends_when_its_server_has(directory: Path) -> None:
    program = (
        "import sys, threading, engram.snapshotter as snapshotter\n"
        "snapshotter.write_snapshot = lambda *arguments: threading.Event().wait()\n"
        "sys.exit(snapshotter.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(directory), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(4 * PATIENCE) == 1
