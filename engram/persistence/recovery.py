"""Reading a data directory back: the snapshot, then the log.

What is wrong with a file of the log is judged by what is known to have been durable. Every record carries
the highest LSN that was durable when it was written, the header of a file says that everything in the
files before it is, and a manifest that everything in its snapshot is. So

- a defect in any file but the last, a file that is missing, a header that cannot be read (it is synced
  before the file gets its name), an LSN that does not follow: damage;
- a defect in the last file with a record anywhere behind it that says the LSN expected here was durable:
  damage;
- any other defect in the last file: the tail was never acknowledged as durable. It is cut.

Damage raises DamagedDataError and changes nothing. A cut goes in this order, each step durable before the
next: a copy of the tail beside the file, the copy's name in the folder, the file truncated. A crash between
them leaves the tail to be cut again.

The last file is truncated to its records and synced in any case, for what was read from it may not have
been. Where the log does not say it was, its bytes are written once more before: after a failed fsync Linux
holds pages for clean that never reached the disk, and another fsync would not write them. No process ever
appends to a file that an earlier one wrote: the log goes on in the next file, whose header names this end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec

from engram.columns import ColumnFolder, open_columns
from engram.errors import DamagedDataError, NewerFormatError
from engram.files import Files, open_file
from engram.operations import InstallSegment, Operation, decode_array, known_operations
from engram.persistence import log_format
from engram.persistence.layout import Layout, check_levels, free_name
from engram.persistence.manifest import Manifest, read_manifest, write_manifest
from engram.progress import Progress


@attrs.frozen(kw_only=True)
class Recovery:
    """What was read back, and where the log goes on.

    Attributes:
        manifest: as it stands on disk.
        lsn: the last operation recovered. All up to it are durable by now.
        recorded_durable_lsn: the highest LSN that the files said was durable before the crash.
        records: number of operations replayed from the log.
        torn_bytes: size of the tail that was cut, without the zeros at its end; 0 when none was.
        cut_files: the copies of what was cut.
        log_file: number of the last file of the log.
        link: the chain value at its end.
        log_bytes: bytes of records in the log.
        segments: (LSN, id) of the segments that the log names, in order.
    """

    manifest: Manifest
    lsn: int
    recorded_durable_lsn: int
    records: int
    torn_bytes: int
    cut_files: tuple[Path, ...]
    log_file: int
    link: int
    log_bytes: int
    segments: tuple[tuple[int, str], ...]


def recover(
    directory: Path,
    files: Files,
    restore: Callable[[ColumnFolder], None],
    apply: Callable[[int, Operation], None],
    *,
    last_file: int | None = None,
    read_only: bool = False,
    progress: Progress | None = None,
) -> Recovery:
    """Reads the state back (blocking): `restore` gets the snapshot when there is one, then `apply` each
    operation after it, in order.

    The server calls it once, under the directory's lock, without `last_file`: it makes the manifest and
    the first file of a new directory, cuts a torn tail, and removes what nothing names. With `last_file`,
    the number of a closed file of a log in use, it only reads, and only up to the end of that file. With
    `read_only` it reads all of a log that is not in use; a torn tail is counted and left where it is.

    Raises:
        DamagedDataError: something that was durable is missing or is not what was written.
        NewerFormatError: a newer engram wrote something of it. Nothing has been cut or removed.
        InterruptedWorkError: `progress` was interrupted; nothing has been cut or removed.
        OSError: a file cannot be read, cut or synced.
    """
    layout = Layout(directory)
    check_levels(layout)
    progress = progress or Progress()
    manifest = read_manifest(layout.manifest)
    if manifest is None:
        if read_only or last_file is not None or not layout.is_new:
            raise DamagedDataError(layout.manifest, "missing, but there are other files of engram's")
        manifest = _initialize(layout, files)
    elif last_file is None and not read_only:
        # A name seen may not be durable yet; nothing may be built on it before.
        files.sync_folder(directory)
    if manifest.snapshot:
        progress.begin(f"reading {manifest.snapshot}", manifest.size)
        restore(open_columns(directory / manifest.snapshot, manifest.checksum))
    replay = _LogReplay(layout, manifest, apply, progress)
    if last_file is not None:
        replay.run(last_file)
        return replay.result()
    replay.run(None)
    if read_only:
        return replay.result()
    cut_files = _finish_last_file(layout, files, replay)
    recovery = replay.result(cut_files)
    _remove_unnamed(layout, files, recovery)
    return recovery


def _initialize(layout: Layout, files: Files) -> Manifest:
    # The log's first file goes before the manifest that names it, so that a missing one is noticed.
    files.remove(layout.log(1))
    files.write_file(layout.log(1), [log_format.new_file_header(1, 1, 0).encode()])
    files.sync_folder(layout.directory)
    manifest = Manifest(first_log_file=1)
    write_manifest(files, layout.manifest, manifest)
    return manifest


class _LogReplay:
    """Applies the files of the log in order, and stands at the end of the last one when done."""

    def __init__(
        self,
        layout: Layout,
        manifest: Manifest,
        apply: Callable[[int, Operation], None],
        progress: Progress,
    ) -> None:
        self._layout = layout
        self._manifest = manifest
        self._apply = apply
        self._progress = progress
        self._segments: list[tuple[int, str]] = []
        self._lsn = manifest.lsn
        self._durable_lsn = manifest.lsn
        self._records = 0
        self._link: int | None = None
        self._defect = ""
        self._log_bytes = 0
        self.number = manifest.first_log_file
        self.offset = 0
        self.last_data = memoryview(b"")
        self.torn_tail = b""

    def run(self, last_file: int | None) -> None:
        """Up to the end of the last file there is, or of `last_file`, which has a successor."""
        first = self._manifest.first_log_file
        stop = max([first, *self._layout.log_numbers()]) if last_file is None else last_file
        numbers = range(first, stop + 1)
        paths = [self._layout.log(number) for number in numbers]
        self._progress.begin("reading the log", sum(path.stat().st_size for path in paths if path.exists()))
        for number, path in zip(numbers, paths, strict=True):
            data = self._read(path)
            self._replay_file(number, data, is_last=last_file is None and number == stop)
        if last_file is not None:
            # Its successor has its header before anyone reads, and tells whether this end is the end.
            self._check_header(
                last_file + 1, self._read(self._layout.log(last_file + 1), log_format.FILE_HEADER_SIZE)
            )

    @property
    def has_unrecorded(self) -> bool:
        """Whether operations were read of which the log does not say that they were durable."""
        return self._durable_lsn < self._lsn

    def result(self, cut_files: tuple[Path, ...] = ()) -> Recovery:
        assert self._link is not None
        return Recovery(
            manifest=self._manifest,
            lsn=self._lsn,
            recorded_durable_lsn=self._durable_lsn,
            records=self._records,
            torn_bytes=len(self.torn_tail),
            cut_files=cut_files,
            log_file=self.number,
            link=self._link,
            log_bytes=self._log_bytes,
            segments=tuple(self._segments),
        )

    def _read(self, path: Path, size: int = -1) -> bytes:
        try:
            with open_file(path) as file:
                return file.read(size)
        except FileNotFoundError as error:
            raise DamagedDataError(path, "missing") from error

    def _check_header(self, number: int, data: bytes) -> log_format.FileHeader:
        path = self._layout.log(number)
        try:
            header = log_format.decode_file_header(data)
        except log_format.FormatError as error:
            raise DamagedDataError(path, f"{error}", 0) from error
        if header.number != number:
            raise DamagedDataError(path, f"holds file {header.number} of the log", 0)
        if self._link is not None and header.link != self._link:
            previous = self._layout.log(number - 1)
            reason = self._defect or "the records end here"
            raise DamagedDataError(previous, f"{reason}, but not for {path.name}, which follows", self.offset)
        if header.first_lsn != self._lsn + 1:
            raise DamagedDataError(path, f"starts at LSN {header.first_lsn} instead of {self._lsn + 1}", 0)
        self._durable_lsn = self._lsn
        return header

    def _replay_file(self, number: int, data: bytes, *, is_last: bool) -> None:
        path = self._layout.log(number)
        header = self._check_header(number, data)
        scanner = log_format.RecordScanner(data, header)
        end = 0
        for record in scanner:
            self._replay_record(path, record)
            self._progress.advance(record.offset - end)
            end = record.offset
        self._progress.advance(len(data) - end)
        self.number = number
        self.offset = scanner.offset
        self._link = scanner.chain
        self._defect = scanner.defect
        self._log_bytes += scanner.offset - log_format.FILE_HEADER_SIZE
        if is_last:
            self.last_data = memoryview(data)[: scanner.offset]
        if scanner.defect and is_last:
            claimed = log_format.claimed_durable_lsn(data, scanner.offset, header)
            if claimed > self._lsn:
                raise DamagedDataError(
                    path,
                    f"{scanner.defect} at LSN {self._lsn + 1}, but LSN {claimed} was durable",
                    scanner.offset,
                )
            self.torn_tail = data[scanner.offset : log_format.used_size(data)]

    def _replay_record(self, path: Path, record: log_format.Record) -> None:
        holds_operations = record.kind == log_format.OPERATIONS
        if not holds_operations and record.kind != log_format.MARK:
            raise DamagedDataError(path, f"record type {record.kind} is not known", record.offset)
        expected = self._lsn + holds_operations
        if record.lsn != expected or record.durable_lsn > self._lsn:
            raise DamagedDataError(path, f"LSN {record.lsn} instead of {expected}", record.offset)
        self._durable_lsn = max(self._durable_lsn, record.durable_lsn)
        if not holds_operations:
            return
        operations = read_operations(path, record)
        for lsn, operation in enumerate(operations, record.lsn):
            if isinstance(operation, InstallSegment) and operation.segment:
                self._segments.append((lsn, operation.segment))
            self._apply(lsn, operation)
            self._lsn = lsn
        self._records += len(operations)


def read_operations(path: Path, record: log_format.Record) -> list[Operation]:
    """The operations in a record of a file of the log whose checksums are right.

    Raises:
        NewerFormatError: one of them is not known.
        DamagedDataError: they are none.
    """
    try:
        return decode_array(record.payload)
    except msgspec.DecodeError as error:
        if (tag := _unknown_tag(record.payload)) is not None:
            what = f"operation {tag} is not known"
            raise NewerFormatError(path, what, record.offset) from error
        raise DamagedDataError(path, f"operation not known: {error}", record.offset) from error


def _unknown_tag(payload: memoryview) -> int | None:
    """The tag of the first array in an array that is headed by none of an operation's."""
    try:
        arrays = msgspec.msgpack.decode(payload, type=list[list[object]])
    except msgspec.DecodeError:
        return None
    tags = (array[0] for array in arrays if array)
    return next((tag for tag in tags if isinstance(tag, int) and tag not in known_operations()), None)


def _finish_last_file(layout: Layout, files: Files, replay: _LogReplay) -> tuple[Path, ...]:
    path = layout.log(replay.number)
    cut_files: list[Path] = []
    if replay.torn_tail:
        aside = free_name(path, int(time.time()))
        try:
            files.write_file(aside, [replay.torn_tail])
        except OSError:
            # Each try would leave another one.
            files.remove(aside)
            raise
        files.sync_folder(layout.directory)
        cut_files.append(aside)
    if replay.has_unrecorded:
        descriptor = files.open(path)
        try:
            files.write_at(descriptor, replay.last_data, 0)
        finally:
            files.close(descriptor)
    files.truncate(path, replay.offset)
    return tuple(cut_files)


def _remove_unnamed(layout: Layout, files: Files, recovery: Recovery) -> None:
    """Removes what an interrupted preparation, snapshot, build or deletion left behind."""
    for path in layout.prepared_files():
        files.remove(path)
    remove_outdated(layout, files, recovery.manifest)
    named = {*recovery.manifest.segments, *(segment for _, segment in recovery.segments)}
    for path in layout.segment_folders():
        if path.name not in named:
            files.remove_tree(path)


def remove_outdated(layout: Layout, files: Files, manifest: Manifest) -> None:
    """Removes log files and snapshots that a manifest, durable by now, no longer names."""
    for number in layout.log_numbers():
        if number < manifest.first_log_file:
            files.remove(layout.log(number))
    for path in layout.snapshots():
        if path.name != manifest.snapshot:
            files.remove_tree(path)
