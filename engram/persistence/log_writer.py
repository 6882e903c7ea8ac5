"""Writing the log: the blocking half, of which one call runs at a time in a worker thread.

The order of writes, by which recovery can judge what it finds:

    1. space is allocated under a name that recovery does not read (prepared-<n>.log)
    2. the file in use is synced
    3. the header is written into the prepared file, which is synced
    4. it is renamed to the next wal-<number>.log
    5. the folder is synced
    6. records are written behind the header, and synced as the policy says

A crash before 5 leaves the prepared file, or an empty last file. So a file with a number has a header and a
durable predecessor, always, and what was never used has no number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from engram.errors import LogFailureError
from engram.files import Files
from engram.operations import join
from engram.persistence import log_format
from engram.persistence.layout import Layout
from engram.persistence.recovery import Recovery


@attrs.define
class PreparedFile:
    """Space for a coming file of the log; `descriptor` is None when it is still to be made."""

    path: Path
    size: int
    descriptor: int | None = None


@attrs.define
class Run:
    """Encoded operations with successive LSNs that go into one record, in `next_file` when there is one, else
    in the file in use. With `mark`, a mark follows."""

    first_lsn: int
    next_file: PreparedFile | None = None
    payloads: list[bytes] = attrs.Factory(list)
    mark: bool = False


@attrs.frozen
class Commit:
    """What a call of `LogWriter.commit` reached.

    Attributes:
        durable_lsn: all up to it is durable.
        recorded_lsn: the log itself says that all up to it is.
        sync_seconds: what the last sync took, None when there was none.
    """

    durable_lsn: int
    recorded_lsn: int
    sync_seconds: float | None


class LogWriter:
    """Appends to the log; goes on behind what was recovered, in a new file."""

    def __init__(self, layout: Layout, files: Files, recovery: Recovery) -> None:
        self._layout = layout
        self._files = files
        self._number = recovery.log_file
        self._chain = recovery.link
        self._tag = 0
        self._path = layout.log(recovery.log_file)
        self._descriptor: int | None = None
        self._offset = 0
        self._lsn = recovery.lsn
        self._durable_lsn = recovery.lsn
        self._recorded_lsn = recovery.recorded_durable_lsn
        self._dirty = False
        self._sync_seconds: float | None = None

    def commit(self, runs: Sequence[Run], *, sync: bool) -> Commit:
        """Writes the runs and, with `sync`, syncs all that is written.

        Raises:
            LogFailureError: anything failed. The log must not be written any more: what was written is
                unknown, and a second fsync may report success for pages that the first one lost.
        """
        self._sync_seconds = None
        try:
            for run in runs:
                if run.next_file is not None:
                    self._switch(run.next_file)
                self._write(run)
            if sync:
                self._sync()
        except (OSError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else "out of memory"
            raise LogFailureError(f"{self._path}: the log cannot be written: {reason}") from error
        return Commit(self._durable_lsn, self._recorded_lsn, self._sync_seconds)

    def close(self) -> None:
        if self._descriptor is not None:
            self._files.close(self._descriptor)
            self._descriptor = None

    def _write(self, run: Run) -> None:
        durable_lsn = self._durable_lsn
        lsn, chain = self._lsn + len(run.payloads), self._chain
        pieces: list[bytes] = []
        if run.payloads:
            record, chain = log_format.encode_record(
                log_format.OPERATIONS,
                run.first_lsn,
                join(run.payloads),
                durable_lsn,
                self._tag,
                chain,
            )
            pieces.append(record)
        if run.mark:
            record, chain = log_format.encode_record(log_format.MARK, lsn, b"", durable_lsn, self._tag, chain)
            pieces.append(record)
        if not pieces:
            return
        assert self._descriptor is not None
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._dirty = True
        self._files.write_at(self._descriptor, data, self._offset)
        self._offset += len(data)
        self._chain = chain
        self._lsn = lsn
        self._recorded_lsn = durable_lsn

    def _switch(self, prepared: PreparedFile) -> None:
        self._sync()
        self.close()
        if prepared.descriptor is None:
            prepared.descriptor = self._files.create(prepared.path, prepared.size)
        self._descriptor = prepared.descriptor
        header = log_format.new_file_header(self._number + 1, self._lsn + 1, self._chain)
        self._files.write_at(self._descriptor, header.encode(), 0)
        self._files.sync_data(self._descriptor)
        path = self._layout.log(header.number)
        self._files.rename(prepared.path, path)
        self._files.sync_folder(self._layout.directory)
        self._path = path
        self._number = header.number
        self._chain = header.chain
        self._tag = header.tag
        self._offset = log_format.FILE_HEADER_SIZE
        self._recorded_lsn = self._lsn

    def _sync(self) -> None:
        if self._descriptor is None or not self._dirty:
            return
        started = time.perf_counter()
        self._files.sync_data(self._descriptor)
        self._sync_seconds = time.perf_counter() - started
        self._dirty = False
        self._durable_lsn = self._lsn
