"""A data directory that is not as it was left: a torn tail is cut, damage is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engram.persistence import log_format
from tests.crash.server_process import StartError, running_server, start_server, wait_until

SETTINGS = ("--seal-rows", "64")
DIMENSION = 8
ROWS = 200
VALUE = b"a value that is easy to find"


def last_log(directory: Path) -> Path:
    return max(directory.glob("wal-*.log"))


def scan(path: Path) -> tuple[log_format.FileHeader, log_format.RecordScanner, list[log_format.Record]]:
    """A file of the log, read to the end of its records."""
    data = path.read_bytes()
    header = log_format.decode_file_header(data)
    scanner = log_format.RecordScanner(data, header)
    return header, scanner, list(scanner)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def refusal(directory: Path) -> str:
    """What the server says when it must not start; it leaves everything as it was."""
    before = contents(directory)
    with pytest.raises(StartError) as raised:
        start_server("--dir", str(directory), *SETTINGS).close()
    assert raised.value.exit_code == 1
    assert "Traceback" not in raised.value.errors
    assert contents(directory) == before
    return raised.value.errors


def killed_with(directory: Path, keys: int) -> None:
    """A server that acknowledged `keys` keys and was killed; its log says that all were durable."""
    server = start_server("--dir", str(directory))
    try:
        with server.client() as client:
            for number in range(keys):
                assert client.set(f"key-{number}", VALUE)
        # The mark that follows an idle moment.
        wait_until(lambda: scan(last_log(directory))[2][-1].kind == log_format.MARK, "the log's mark")
        server.kill()
    finally:
        server.close()


def garbage(header: log_format.FileHeader, lsn: int, chain: int) -> bytes:
    return bytes(range(1, 100))


def half_a_record(header: log_format.FileHeader, lsn: int, chain: int) -> bytes:
    record, _ = log_format.encode_record(
        log_format.OPERATIONS, lsn, b"never acknowledged" * 10, lsn - 1, header.tag, chain
    )
    return record[:100]


Tail = Callable[[log_format.FileHeader, int, int], bytes]


@pytest.mark.parametrize("make_tail", [garbage, half_a_record])
def test_a_torn_tail_is_cut_reported_and_kept(make_tail: Tail, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    killed_with(directory, 3)
    path = last_log(directory)
    header, scanner, records = scan(path)
    tail = make_tail(header, records[-1].lsn + 1, scanner.chain)
    with path.open("r+b") as file:
        file.seek(scanner.offset)
        file.write(tail)

    with running_server("--dir", str(directory)) as server:
        [aside] = directory.glob(f"{path.name}.broken-*")
        assert aside.read_bytes() == tail
        assert f"{len(tail)} bytes" in server.errors
        assert str(aside) in server.errors
        with server.client() as client:
            assert client.dbsize() == 3
            assert client.get("key-2") == VALUE
            assert client.set("later", VALUE)

    with running_server("--dir", str(directory)) as server, server.client() as client:
        assert server.complaints == ""
        assert "recovered 4 keys" in server.greeting
        assert client.get("later") == VALUE


def test_a_flipped_byte_in_what_was_durable_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    killed_with(directory, 3)
    path = last_log(directory)
    damaged = scan(path)[2][1]
    flip(path, damaged.offset + log_format.RECORD_HEADER_SIZE + 10)
    assert f"{path} at offset {damaged.offset}: " in refusal(directory)


def test_a_flipped_byte_in_the_last_acknowledged_record_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    killed_with(directory, 3)
    path = last_log(directory)
    damaged = scan(path)[2][-2]
    flip(path, damaged.offset + log_format.RECORD_HEADER_SIZE + len(damaged.payload) - 1)
    assert f"{path} at offset {damaged.offset}: " in refusal(directory)


def test_a_missing_file_of_the_log_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    killed_with(directory, 3)
    killed_with(directory, 3)
    path = sorted(directory.glob("wal-*.log"))[-2]
    path.unlink()
    assert f"{path}: missing" in refusal(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a snapshot that names strings and a segment, and a log behind it."""
    directory = tmp_path_factory.mktemp("saved") / "data"
    rows = np.random.default_rng(7).standard_normal((ROWS, DIMENSION), np.float32)
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        client.execute_command("VNEW", "index", DIMENSION)
        for number, row in enumerate(rows):
            client.execute_command("VADD", "index", f"row-{number}", row.tobytes())

        def is_settled() -> bool:
            info = client.info("vectors")
            return bool(info["vectors_segments"] > 0 and info["vectors_builds_running"] == 0)

        wait_until(is_settled, "a segment")
        assert client.set("string", VALUE)
        assert client.execute_command("VSAVE") == b"OK"
        assert client.set("later", VALUE)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "data"))


DURABLE = (
    "MANIFEST",
    "snapshot-*/columns.json",
    "snapshot-*/0.string.maps-bytes.npy",
    "segments/*/columns.json",
    "segments/*/graph.usearch",
    "segments/*/keys-bytes.npy",
)


def first(directory: Path, pattern: str) -> Path:
    return min(directory.glob(pattern))


def test_an_undamaged_copy_starts(directory: Path) -> None:
    with running_server("--dir", str(directory), *SETTINGS) as server:
        assert f"recovered 3 keys and {ROWS} vectors" in server.greeting
        assert server.complaints == ""


@pytest.mark.parametrize("pattern", DURABLE)
def test_a_flipped_byte_is_refused_by_name(pattern: str, directory: Path) -> None:
    path = first(directory, pattern)
    flip(path, path.stat().st_size // 2)
    assert f"{path}: " in refusal(directory)


def test_flipped_bytes_of_vectors_are_found_after_the_start(directory: Path) -> None:
    path = first(directory, "segments/*/vectors.npy")
    flip(path, path.stat().st_size // 2)
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        wait_until(lambda: client.info("vectors")["vectors_segments_unverified"] == 0, "the verification")
        assert client.info("vectors")["vectors_damaged"] == f"{path}: checksum mismatch"
        assert f"vectors are damaged: {path}: checksum mismatch" in server.errors


@pytest.mark.parametrize("pattern", ["MANIFEST", "snapshot-*/columns.json", "segments/*/graph.usearch"])
def test_a_missing_file_is_refused_by_name(pattern: str, directory: Path) -> None:
    path = first(directory, pattern)
    path.unlink()
    assert f"{path}: missing" in refusal(directory)


def test_a_cut_file_is_refused_by_name(directory: Path) -> None:
    path = first(directory, "segments/*/vectors.npy")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    assert f"{path}: " in refusal(directory)


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with running_server("--dir", str(directory)) as server, server.client() as client:
        assert client.set("key", VALUE)
        with pytest.raises(StartError, match="another server is using this directory") as raised:
            start_server("--dir", str(directory)).close()
        assert raised.value.exit_code == 1
        assert client.get("key") == VALUE
