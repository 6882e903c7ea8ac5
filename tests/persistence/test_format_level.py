"""Data directories of other levels: those of all engrams before open, those of newer ones are left alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from redis import Redis

from engram.cli import command_line
from engram.columns import TABLE
from engram.dump import dump_blocks, read_state
from engram.errors import NewerFormatError
from engram.files import DiskFiles
from engram.format_level import LEVEL
from engram.operations import encode, join
from engram.persistence import log_format
from engram.persistence.check import Examination
from engram.persistence.layout import Layout, lock_directory
from engram.persistence.manifest import encode_manifest, read_manifest
from engram.snapshotter import write_snapshot
from tests.crash.server_process import StartError, running_server, start_server
from tests.persistence.conftest import operation, read_back

DIRECTORIES = Path(__file__).parent / "directories"
LEVELS = sorted(path.name for path in DIRECTORIES.glob("level-*/"))
NEWER = LEVEL + 1


def test_there_is_a_directory_of_each_level() -> None:
    assert [f"level-{level}" for level in range(2, LEVEL + 1)] == LEVELS


# Of this level and those before


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def old(level: str, tmp_path: Path) -> Path:
    """A copy of a directory as the first engram of that level left it."""
    return Path(shutil.copytree(DIRECTORIES / level, tmp_path / "data"))


@pytest.fixture
def lines(level: str) -> list[dict[str, Any]]:
    """What that engram said was in it: the lines of its dump without the first."""
    text = (DIRECTORIES / f"{level}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[1:]]


def test_recovery_gives_every_byte(old: Path, level: str) -> None:
    expected = (DIRECTORIES / f"{level}.jsonl").read_bytes()
    state = read_state(old, DiskFiles())
    assert b"".join(dump_blocks(state.engine)) == expected
    assert state.torn_bytes == 0
    last_file = max(Layout(old).log_numbers())
    read_back(old)
    header = log_format.new_file_header(last_file + 1, state.engine.lsn + 1, read_back(old).recovery.link)
    Layout(old).log(last_file + 1).write_bytes(header.encode())
    assert write_snapshot(old, last_file).lsn == state.engine.lsn


def test_nothing_in_it_is_damaged(old: Path) -> None:
    examination = Examination(old)
    assert {report.state for report in examination.reports()} == {"ok"}
    assert examination.damages == []


def unpacked(text: str | dict[str, str]) -> bytes:
    return text.encode() if isinstance(text, str) else base64.b64decode(text["base64"])


def check_strings(client: Redis, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        key = unpacked(line.get("key", ""))
        if line["type"] == "string":
            assert client.get(key) == unpacked(line["value"])
        if line["type"] != "vector":
            assert client.execute_command("PEXPIRETIME", key) == line.get("expires-at", -1)
    assert client.dbsize() == sum(line["type"] != "vector" for line in lines)


def distances(metric: str, rows: np.ndarray[Any, Any], query: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if metric == "l2":
        found: np.ndarray[Any, Any] = ((rows - query) ** 2).sum(axis=1)
        return found
    assert metric == "cosine"
    cosines: np.ndarray[Any, Any] = 1 - rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return cosines


def check_vectors(client: Redis, lines: list[dict[str, Any]]) -> None:
    for index in (line for line in lines if line["type"] == "vectorset"):
        name = unpacked(index["key"])
        members = [line for line in lines if line["type"] == "vector" and line["index"] == index["key"]]
        keys = [unpacked(line["key"]) for line in members]
        rows = np.array([line["vector"] for line in members], np.float64)
        assert client.execute_command("VCOUNT", name) == len(members)
        for key, row, line in zip(keys, rows, members, strict=True):
            assert client.execute_command("VGET", name, key) == row.astype("<f4").tobytes()
            text = client.execute_command("VGETATTR", name, key)
            assert (json.loads(text) if text else None) == line.get("attributes")
        for row in rows[::7]:
            expected = np.sort(distances(index["metric"], rows, row))[:10]
            query = row.astype("<f4").tobytes()
            for words in ((), ("EXACT",)):
                found = client.execute_command("VSEARCH", name, query, 10, *words)
                order = [keys.index(key) for key in found[::2]]
                measured = distances(index["metric"], rows, row)[order]
                np.testing.assert_allclose(measured, expected, atol=1e-5)
        ranked = [line for line in members if (line.get("attributes") or {}).get("rank", -1) >= 20]
        answer = client.execute_command(
            "VSEARCH", name, rows[0].astype("<f4").tobytes(), 99, "FILTER", ".rank >= 20"
        )
        assert set(answer[::2]) == {unpacked(line["key"]) for line in ranked}


def test_a_server_answers_as_the_old_one_and_after_a_snapshot_too(
    old: Path, level: str, lines: list[dict[str, Any]]
) -> None:
    numbers = {line.get("database", 0) for line in lines}
    for is_saved in (False, True):
        with running_server("--dir", str(old)) as server, server.client() as client:
            for number in numbers:
                client.execute_command("SELECT", number)
                here = [line for line in lines if line.get("database", 0) == number]
                check_strings(client, here)
                check_vectors(client, here)
            if not is_saved:
                assert client.execute_command("SAVE") is True
            assert server.terminate() == 0
    expected = (DIRECTORIES / f"{level}.jsonl").read_bytes()
    state = read_state(old, DiskFiles())
    lines_now = b"".join(dump_blocks(state.engine)).splitlines()[1:]
    assert sorted(lines_now) == sorted(expected.splitlines()[1:])
    assert b'"version": %d' % LEVEL in (old / "MANIFEST").read_bytes()


def test_a_log_goes_on_in_files_of_this_level(old: Path) -> None:
    with running_server("--dir", str(old)) as server, server.client() as client:
        client.set("new", "1")
        server.terminate()
    with running_server("--dir", str(old)) as server, server.client() as client:
        assert client.get("new") == b"1"


# Of a newer level


def table_of(path: Path, **fields: object) -> int:
    """Writes other fields into a table of columns; returns its checksum."""
    text = json.dumps({**json.loads((path / TABLE).read_bytes()), **fields}).encode()
    (path / TABLE).write_bytes(text)
    return crc32c(text)


def newer_manifest(data: Path) -> None:
    line = b'{"version": %d, "roots": {"of another": "shape"}}' % NEWER
    (data / "MANIFEST").write_bytes(line + b"\n%08x\n" % crc32c(line))


def newer_log(data: Path) -> None:
    """Another file of the log behind the last, of which this level knows no more than the start."""
    layout = Layout(data)
    fields = b"ENGRAMWL" + NEWER.to_bytes(4, "little") + bytes(range(48))
    header = fields + crc32c(fields).to_bytes(4, "little")
    layout.log(max(layout.log_numbers()) + 1).write_bytes(header + b"what follows" * 100)


def newer_log_behind_damage(data: Path) -> None:
    newer_log(data)
    path = Layout(data).log(min(Layout(data).log_numbers()))
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def newer_snapshot(data: Path) -> None:
    manifest = read_manifest(data / "MANIFEST")
    assert manifest is not None
    checksum = table_of(data / manifest.snapshot, version=NEWER, files=None)
    fields = json.loads(encode_manifest(manifest).partition(b"\n")[0])
    line = json.dumps({**fields, "checksum": checksum}).encode()
    (data / "MANIFEST").write_bytes(line + b"\n%08x\n" % crc32c(line))


def append_record(data: Path, payload: bytes) -> None:
    path = Layout(data).log(max(Layout(data).log_numbers()))
    content = path.read_bytes()
    header = log_format.decode_file_header(content)
    scanner = log_format.RecordScanner(content, header)
    last = list(scanner)[-1]
    lsn = read_state(data, DiskFiles()).engine.lsn
    record, _ = log_format.encode_record(
        log_format.OPERATIONS, lsn + 1, payload, last.durable_lsn, header.tag, scanner.chain
    )
    path.write_bytes(content[: scanner.offset] + record + bytes(1000))


def newer_operation(data: Path) -> None:
    append_record(data, join([encode(operation(1)), b"\x92\xcd\x03\xe7\xa1x"]))


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest": (newer_manifest, rf"level {NEWER}"),
    "log": (newer_log, rf"level {NEWER}"),
    "log behind damage": (newer_log_behind_damage, rf"level {NEWER}"),
    "snapshot": (newer_snapshot, rf"level {NEWER}"),
    "operation": (newer_operation, r"operation 999 is not known"),
}


@pytest.fixture(params=KINDS)
def newer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory that a newer engram has used, and what it is told by. It must not be changed."""
    make, what = KINDS[request.param]
    data = Path(shutil.copytree(DIRECTORIES / LEVELS[-1], tmp_path / "data"))
    make(data)
    before = contents(data)
    yield data, rf"written by a newer engram \({what}\): use that version; .*docs/how-to/upgrade\.md"
    assert contents(data) == before


def contents(data: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(data)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in data.rglob("*")
    }


def test_recovery_leaves_it_alone(newer: tuple[Path, str]) -> None:
    data, message = newer
    with pytest.raises(NewerFormatError, match=message):
        read_back(data)
    with pytest.raises(NewerFormatError, match=message):
        read_back(data, last_file=max(Layout(data).log_numbers()))
    with pytest.raises(NewerFormatError, match=message):
        read_state(data, DiskFiles())


def test_a_server_says_so_and_does_not_start(newer: tuple[Path, str]) -> None:
    data, message = newer
    with pytest.raises(StartError, match=message) as caught:
        start_server("--dir", str(data))
    assert caught.value.exit_code == 1
    assert "damage" not in caught.value.errors
    assert caught.value.errors.count("\n") == 1


@pytest.mark.parametrize("words", [["check"], ["check", "--repair"], ["dump"]])
async def test_the_tools_say_so(
    words: list[str], newer: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, message = newer
    assert await command_line([words[0], str(data), *words[1:]]) == 1
    output, errors = capsys.readouterr()
    assert "damage" not in output + errors
    assert re.search(message, errors)


def test_users_with_rules_of_a_newer_engram_do_not_hide_its_level(tmp_path: Path) -> None:
    data = Path(shutil.copytree(DIRECTORIES / LEVELS[-1], tmp_path / "data"))
    newer_manifest(data)
    (data / "users.acl").write_text("user default on nopass ~* +command-to-come\n")
    with pytest.raises(NewerFormatError):
        lock_directory(data)
    with pytest.raises(StartError, match="written by a newer engram"):
        start_server("--dir", str(data))


def test_an_operation_whose_fields_are_wrong_is_damage(tmp_path: Path) -> None:
    data = Path(shutil.copytree(DIRECTORIES / LEVELS[-1], tmp_path / "data"))
    append_record(data, b"\x91\x92\x01\x02")
    assert [f"{damage.reason}" for damage in _damages(data)] == [
        "operation not known: Expected `array` of at least length 3, got 2 - at `$[0]`"
    ]


def _damages(data: Path) -> list[Any]:
    examination = Examination(data)
    list(examination.reports())
    return examination.damages
