"""A snapshot: made by a child process, made current here.

The order, each step durable before the next:

    1. the log is rotated (log.py): the closed files end at the snapshot's LSN
    2. the child reads the current snapshot and the closed files, writes the files of snapshot-<lsn>/ and
       syncs them and the folder, and reads all of it back
    3. its table and the sizes of its files are compared here
    4. the data directory is synced: the new folder has its name
    5. MANIFEST is replaced (written beside, synced, renamed, directory synced)
    6. what neither MANIFEST nor the remaining log names is removed

A crash before the rename in 5 leaves the old state and a folder that nothing names, which recovery removes;
after it, the new state and perhaps old files, which recovery removes, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from subprocess import PIPE
from typing import Any

import attrs
import trio

from engram.child_process import module_environment
from engram.columns import read_table
from engram.errors import LogFailureError, NewerFormatError, SnapshotError
from engram.files import Files
from engram.persistence.layout import Layout
from engram.persistence.manifest import Manifest, write_manifest

# Ten points lower, other clients' PINGs waited several milliseconds for its slices.
_CHILD_NICENESS = 19


@attrs.frozen
class SnapshotResult:
    """What the child reports, as one line of JSON with these fields.

    Attributes:
        snapshot: name of the folder, as `snapshot_name` makes it.
        lsn: the last operation it holds.
        checksum: of its table of columns.
        segments: ids of the segments it names.
        size: bytes of its files.
    """

    snapshot: str
    lsn: int
    checksum: int
    segments: tuple[str, ...]
    size: int

    def encode(self) -> bytes:
        return json.dumps(attrs.asdict(self)).encode() + b"\n"


def decode_result(output: bytes) -> SnapshotResult:
    """The inverse of `SnapshotResult.encode`. Raises SnapshotError."""
    try:
        fields = json.loads(output)
        return SnapshotResult(**{**fields, "segments": tuple(fields["segments"])})
    except (ValueError, TypeError, KeyError) as error:
        raise SnapshotError(f"the snapshot process reported {output[:200]!r}") from error


def segments_of(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The checksums of the segments that a snapshot refers to, by id; `metadata` is that of its columns."""
    if "segments" in metadata:
        return dict(metadata["segments"])
    # Level 2 has them with each index.
    segments = (segment for index in metadata["indices"] for segment in index["segments"])
    return {segment["id"]: segment["checksum"] for segment in segments}


async def run_child(command: Sequence[str]) -> SnapshotResult:
    """Runs the snapshot process, niced, and reads its report. It is killed when this is cancelled.

    Its standard input stays open until it has ended, so that it can notice when this process dies.

    Raises:
        SnapshotError: it cannot be started, failed, or reports what is no result.
    """
    try:
        process = await trio.lowlevel.open_process(
            list(command), stdin=PIPE, stdout=PIPE, stderr=PIPE, env=module_environment()
        )
    except OSError as error:
        raise SnapshotError(f"the snapshot process cannot be started: {error.strerror}") from error
    outputs: dict[str, bytes] = {}

    async def read(name: str, stream: trio.abc.ReceiveStream) -> None:
        outputs[name] = b"".join([chunk async for chunk in stream])

    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _CHILD_NICENESS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "output", process.stdout)
            nursery.start_soon(read, "errors", process.stderr)
            await process.wait()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.stderr.aclose()
    if process.returncode != 0:
        lines = outputs["errors"].decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"the snapshot process ended with code {process.returncode}"
        raise SnapshotError(reason)
    return decode_result(outputs["output"])


def install_snapshot(
    layout: Layout, files: Files, result: SnapshotResult, lsn: int, first_log_file: int
) -> Manifest:
    """Makes current what the child made and verified (blocking); returns the manifest, durable by now.

    Raises:
        SnapshotError: the result is not a snapshot as of `lsn`, names a segment that is not there, or was
            written by a newer engram.
        DamagedDataError: the folder does not hold the files that the child said it wrote.
        LogFailureError: the folder cannot be synced.
        OSError: the manifest's replacement failed.
    """
    path = layout.snapshot(lsn)
    if result.lsn != lsn or result.snapshot != path.name:
        raise SnapshotError(f"the snapshot process made {result.snapshot} instead of {path.name}")
    try:
        read_table(path, result.checksum)
    except NewerFormatError as error:
        # Another engram has been installed meanwhile. This one goes on.
        raise SnapshotError(str(error)) from error
    for segment in result.segments:
        if not (layout.segments / segment).is_dir():
            raise SnapshotError(f"the snapshot names segment {segment}, which is not there")
    manifest = Manifest(
        first_log_file=first_log_file,
        snapshot=result.snapshot,
        lsn=lsn,
        checksum=result.checksum,
        size=result.size,
        time=int(time.time()),
        segments=result.segments,
    )
    try:
        files.sync_folder(layout.directory)
    except OSError as error:
        # Names of the log may be lost with it, and another sync may not say so.
        raise LogFailureError(f"{layout.directory}: cannot be synced: {error.strerror}") from error
    write_manifest(files, layout.manifest, manifest)
    return manifest
