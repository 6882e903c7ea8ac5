from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
from crc32c import crc32c

from engram.columns import TABLE, write_columns
from engram.errors import DamagedDataError, SnapshotError
from engram.files import DiskFiles
from engram.format_level import LEVEL
from engram.persistence.layout import Layout
from engram.persistence.manifest import read_manifest
from engram.persistence.snapshot import (
    SnapshotResult,
    decode_result,
    install_snapshot,
    run_child,
)
from tests.persistence.conftest import HookedFiles

RESULT = SnapshotResult(snapshot="snapshot-7", lsn=7, checksum=5, segments=("a", "b"), size=900)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def made(directory: Path, lsn: int, segments: tuple[str, ...] = ()) -> SnapshotResult:
    path = directory / f"snapshot-{lsn}"
    path.mkdir()
    checksum = write_columns(DiskFiles(), path, {"numbers": np.arange(lsn)}, {})
    return SnapshotResult(path.name, lsn, checksum, segments, 100)


def test_a_result_survives_its_line_of_json() -> None:
    assert RESULT.encode().endswith(b"\n")
    assert decode_result(RESULT.encode()) == RESULT


@pytest.mark.parametrize("output", [b"", b"{}", b"[1]", b"\xff", b'{"segments": []}', RESULT.encode() * 2])
def test_what_is_no_result_is_refused(output: bytes) -> None:
    with pytest.raises(SnapshotError, match="reported"):
        decode_result(output)


async def test_the_child_reports_a_result() -> None:
    assert await run_child(python(f"print({RESULT.encode().decode()!r})")) == RESULT


async def test_the_child_is_niced_and_its_input_is_open() -> None:
    program = (
        "import json, os, select, sys;"
        "ended = bool(select.select([0], [], [], 0)[0]);"
        "print(json.dumps(dict(snapshot='', lsn=0, checksum=int(ended), segments=[], size=0)))"
    )
    assert (await run_child(python(program))).checksum == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('no space')", "no space"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with code -9"),
        ("raise SystemExit(3)", "ended with code 3"),
        ("print('hello')", "reported b'hello"),
    ],
)
async def test_the_reason_of_a_failing_child_is_told(program: str, reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason):
        await run_child(python(program))


async def test_a_child_that_cannot_be_started_is_reported() -> None:
    with pytest.raises(SnapshotError, match="cannot be started: No such file"):
        await run_child(["/nonexistent/program"])


async def test_cancelling_ends_the_child(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    program = f"pipe = open({str(fifo)!r}, 'w'); pipe.write('x'); pipe.flush(); import sys; sys.stdin.read()"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_child, python(program))
        async with await trio.open_file(fifo) as alive:
            assert await alive.read(1) == "x"
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                # The end of the file is the end of the process that held it open.
                assert await alive.read() == ""


def test_a_snapshot_is_made_current_in_order(directory: Path, files: HookedFiles) -> None:
    result = made(directory, 7, ("a",))
    layout = Layout(directory)
    (layout.segments / "a").mkdir()
    manifest = install_snapshot(layout, files, result, 7, 4)
    assert read_manifest(layout.manifest) == manifest
    assert (manifest.snapshot, manifest.lsn, manifest.first_log_file) == ("snapshot-7", 7, 4)
    assert (manifest.segments, manifest.checksum) == (("a",), result.checksum)
    assert [call[0] for call in files.calls] == [
        "sync_folder",
        "remove",
        "write_file",
        "rename",
        "sync_folder",
    ]


def test_a_snapshot_of_another_state_is_refused(directory: Path, files: HookedFiles) -> None:
    with pytest.raises(SnapshotError, match="made snapshot-7 instead of snapshot-8"):
        install_snapshot(Layout(directory), files, made(directory, 7), 8, 4)
    assert files.calls == []


def test_a_snapshot_by_a_newer_engram_is_refused(directory: Path, files: HookedFiles) -> None:
    """As of a package that was upgraded under the server."""
    result = made(directory, 7)
    table = directory / "snapshot-7" / TABLE
    text = json.dumps({**json.loads(table.read_bytes()), "version": LEVEL + 1}).encode()
    table.write_bytes(text)
    result = attrs.evolve(result, checksum=crc32c(text))
    with pytest.raises(SnapshotError, match=rf"written by a newer engram \(level {LEVEL + 1}\)"):
        install_snapshot(Layout(directory), files, result, 7, 4)
    assert files.calls == []


def test_a_snapshot_that_does_not_hold_what_was_reported_is_refused(
    directory: Path, files: HookedFiles
) -> None:
    result = made(directory, 7)
    path = directory / "snapshot-7" / "numbers.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedDataError, match=r"numbers\.npy"):
        install_snapshot(Layout(directory), files, result, 7, 4)
    assert files.calls == []


def test_a_snapshot_that_names_a_missing_segment_is_refused(directory: Path, files: HookedFiles) -> None:
    with pytest.raises(SnapshotError, match="segment gone"):
        install_snapshot(Layout(directory), files, made(directory, 7, ("gone",)), 7, 4)
    assert files.calls == []
