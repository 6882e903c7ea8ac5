"""The process that writes a snapshot: `python -m engram.snapshotter DIRECTORY LAST-LOG-FILE [MODULE ...]`.

It recovers the state from the current snapshot and the closed files of the log, as a server would at its
start, and writes it as the next snapshot; so each snapshot is also a test of recovery. The modules are those
of kinds of value that the server has registered. It ends when its standard input closes, so that none
outlives its server.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from engram.columns import open_columns, write_columns
from engram.engine import Engine
from engram.errors import OperatorError
from engram.files import DiskFiles, Files
from engram.index.segment import SegmentStore
from engram.kinds import register
from engram.persistence.layout import Layout
from engram.persistence.recovery import recover
from engram.persistence.snapshot import SnapshotResult


def write_snapshot(directory: Path, last_file: int, files: Files | None = None) -> SnapshotResult:
    """Writes the snapshot as of the end of a closed file of the log, and reads it back (blocking).

    Raises:
        DamagedDataError: what is on disk, or now in the snapshot, is not what was written.
        OSError: the snapshot cannot be written.
    """
    files = files or DiskFiles()
    layout = Layout(directory)
    engine = Engine(SegmentStore(layout.segments, files, 0), seal_rows=1 << 62)
    recover(directory, files, engine.restore, engine.apply, last_file=last_file)
    path = layout.snapshot(engine.lsn)
    files.make_folder(path)
    columns, metadata = engine.export()
    checksum = write_columns(files, path, columns, metadata)
    open_columns(path, checksum)
    return SnapshotResult(
        snapshot=path.name,
        lsn=engine.lsn,
        checksum=checksum,
        segments=tuple(metadata["segments"]),
        size=sum(column.nbytes for column in columns.values()),
    )


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """Reads the command line, writes the snapshot and prints its result, a `SnapshotResult`."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    directory, last_file = Path(sys.argv[1]), int(sys.argv[2])
    register(sys.argv[3:])
    try:
        result = write_snapshot(directory, last_file)
    except (OperatorError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(result.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
