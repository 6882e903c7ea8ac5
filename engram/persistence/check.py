"""Checking a data directory: what each file holds, the first thing wrong with each, and cutting the log.

An examination reads every byte that a start relies on, and changes nothing. It judges the log as recovery
does (recovery.py), but goes on behind what is wrong; it opens no graph, whose checksum alone is compared.
What a newer engram wrote ends it, and nothing can be cut: not a word about the rest would be reliable.

A cut lets a start succeed where the log is damaged: everything before the first bad record stays, and what
comes behind it is kept under other names. The order, each step durable before the next:

    1. segments that nothing before the cut names: renamed to segment-<id>.broken-<time> beside the log, since
       recovery removes what nothing names
    2. a copy of what is cut from the file with the first bad record: <file>.broken-<time>
    3. the files after it, and it too when its header is bad, the last one first: renamed to
       <file>.broken-<time>
    4. that file truncated; or, when no file of the log is left, a new empty one

After a crash between any of them the directory is as damaged as before or has been cut: repairing it again
ends the work.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import attrs
from crc32c import crc32c

from engram.columns import TABLE, ColumnFolder, open_columns
from engram.errors import DamagedDataError, DirectoryInUseError, OperatorError
from engram.files import Files, read_file
from engram.operations import InstallSegment
from engram.persistence import log_format
from engram.persistence.layout import FOREIGN_NAMES, Layout, check_levels, free_name
from engram.persistence.manifest import Manifest, read_manifest
from engram.persistence.recovery import read_operations
from engram.persistence.snapshot import segments_of

State = Literal["ok", "torn", "damaged", "unused", "kept", "other"]

_OWN_NAMES = re.compile(r"LOCK|MANIFEST|segments|wal-\d{10}\.log|snapshot-\d+")
_KEPT_NAME = re.compile(r".*\.broken-\d+")
_BUILDING_SUFFIX = ".building"


@attrs.frozen
class FileReport:
    """What one file, or one folder of columns, holds.

    Attributes:
        name: its path in the data directory.
        state: "torn" for a log that ends in what was never acknowledged, "unused" for what a start removes or
            makes anew, "kept" for what a start or a repair has put aside, "other" for what is not engram's.
        details: a phrase.
        damage: the first thing wrong with it, when it is damaged.
    """

    name: str
    state: State
    details: str
    damage: DamagedDataError | None = None


@attrs.frozen
class Cut:
    """Where the log can be cut so that a start succeeds.

    Attributes:
        number: of the last file that stays; of the file to be made anew when none does.
        size: what stays of that file, in bytes; 0 when it is made anew.
        lsn: the last operation that stays.
        lost_lsn: the highest LSN seen behind the cut; not above `lsn` when none can be told.
        files: the numbers of the files that are put aside.
        segments: the names of the folders in `segments` that are put aside.
    """

    number: int
    size: int
    lsn: int
    lost_lsn: int
    files: tuple[int, ...]
    segments: tuple[str, ...]


@contextmanager
def hold_directory(directory: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Keeps servers, and with `exclusive` readers, off an existing data directory meanwhile.

    A reader makes no lock file: a copy of a directory without one has no server.

    Raises:
        DirectoryInUseError: a server uses it, or a reader does and the lock is to be exclusive.
        OperatorError: it is missing, is no data directory, or cannot be read.
    """
    layout = Layout(directory)
    try:
        names = os.listdir(directory)
        if not any(_OWN_NAMES.fullmatch(name) or name in FOREIGN_NAMES for name in names):
            raise OperatorError(f"{directory}: not a data directory of engram's")
        flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        try:
            descriptor = os.open(layout.lock, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            descriptor = None
    except OSError as error:
        raise OperatorError(f"{error.filename}: cannot be read: {error.strerror}") from error
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DirectoryInUseError(f"{directory}: another server is using this directory") from error
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_own(directory: Path, path: Path) -> bool:
    """Whether a path leads to what a data directory keeps there, or would."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if root not in target.parents:
        return False
    name = target.relative_to(root).parts[0]
    own = _OWN_NAMES.fullmatch(name) or _KEPT_NAME.fullmatch(name)
    return own is not None or name == Layout(root).users.name


def is_unused(directory: Path) -> bool:
    """Whether nothing was ever stored: there is no more than what a crash in making a directory leaves."""
    layout = Layout(directory)
    return not layout.manifest.exists() and layout.is_new


def _segment_names(layout: Layout) -> list[str]:
    try:
        return sorted(path.name for path in layout.segment_folders())
    except FileNotFoundError:
        return []


@attrs.define
class _LogFile:
    """A file of the log as far as it can be read; `end` and `chain` are those of its good records.

    `is_kept` is False for a file of which a cut leaves nothing.
    """

    number: int
    path: Path
    size: int = 0
    header: log_format.FileHeader | None = None
    last_lsn: int = 0
    durable_lsn: int = 0
    operations: int = 0
    end: int = 0
    chain: int = 0
    defect: str = ""
    torn_bytes: int = 0
    claimed_lsn: int = 0
    segments: list[tuple[int, InstallSegment]] = attrs.Factory(list)
    damage: DamagedDataError | None = None
    is_kept: bool = True
    is_readable: bool = True

    def damaged(self, reason: str, offset: int | None = None, *, is_kept: bool = True) -> None:
        if self.damage is None:
            self.damage = DamagedDataError(self.path, reason, offset)
            self.is_kept = is_kept


@attrs.frozen
class _Naming:
    """What names a segment. `checksum` is None when only the manifest does, whose snapshot is damaged."""

    checksum: int | None
    text: str


class Examination:
    """Reads a data directory that no server uses (blocking): iterate over `reports`, then look at the rest.

    Attributes:
        damages: what is wrong, in the order of the reports.
        torn_bytes: what the next start would cut and keep, without anything being wrong.
    """

    def __init__(self, directory: Path) -> None:
        self.damages: list[DamagedDataError] = []
        self.torn_bytes = 0
        self._layout = Layout(directory)
        self._manifest: Manifest | None = None
        self._log: list[_LogFile] = []
        self._snapshot_segments: dict[str, _Naming] = {}
        self._damaged_segments: set[str] = set()
        self._irreparable = False

    def reports(self) -> Iterator[FileReport]:
        """A report for each file, as soon as it is read.

        Raises:
            NewerFormatError: a newer engram wrote something of it, so that nothing of it can be judged.
            OSError: a folder cannot be read.
        """
        for report in self._examine():
            if report.damage is not None:
                self.damages.append(report.damage)
            yield report

    def cut(self) -> Cut | None:
        """Where to cut the log; None when it is whole, or when that would not make a start succeed."""
        bad = next((file for file in self._log if file.damage is not None), None)
        if self._irreparable or bad is None or self._manifest is None:
            return None
        if not all(file.is_readable for file in self._log):
            # The next attempt to read it may succeed.
            return None
        kept = [file for file in self._log if file.number < bad.number or (file is bad and bad.is_kept)]
        named = self._named_by(kept)
        if not self._damaged_segments.isdisjoint(named):
            return None
        behind = self._log[self._log.index(bad) :]
        return Cut(
            number=kept[-1].number if kept else self._manifest.first_log_file,
            size=kept[-1].end if kept else 0,
            lsn=kept[-1].last_lsn if kept else self._manifest.lsn,
            lost_lsn=max(max(file.last_lsn, file.claimed_lsn) for file in behind),
            files=tuple(file.number for file in behind if file not in kept and file.path.exists()),
            segments=tuple(
                name
                for name in _segment_names(self._layout)
                if name not in named and not name.endswith(_BUILDING_SUFFIX)
            ),
        )

    def _examine(self) -> Iterator[FileReport]:
        check_levels(self._layout)
        if is_unused(self._layout.directory):
            yield FileReport("MANIFEST", "ok", "not written yet: nothing has been stored here")
            if self._layout.log(1).exists():
                yield FileReport(self._layout.log(1).name, "unused", "made anew at the next start")
        else:
            yield self._examine_manifest()
            if self._manifest is not None and self._manifest.snapshot:
                yield self._examine_snapshot(self._manifest)
            yield from self._examine_log()
            yield from self._examine_segments()
        yield from self._examine_rest()

    def _examine_manifest(self) -> FileReport:
        path = self._layout.manifest
        try:
            manifest = read_manifest(path)
            if manifest is None:
                raise DamagedDataError(path, "missing, but there are other files of engram's")
        except OSError as error:
            return self._beyond_repair("MANIFEST", _unreadable(path, error))
        except DamagedDataError as error:
            return self._beyond_repair("MANIFEST", error)
        self._manifest = manifest
        snapshot = f"names {manifest.snapshot}" if manifest.snapshot else "names no snapshot"
        return FileReport("MANIFEST", "ok", f"{snapshot}; the log starts with file {manifest.first_log_file}")

    def _beyond_repair(self, name: str, damage: DamagedDataError) -> FileReport:
        self._irreparable = True
        return _damaged(name, damage, self._layout.directory)

    def _examine_snapshot(self, manifest: Manifest) -> FileReport:
        name = manifest.snapshot
        self._snapshot_segments = {
            segment: _Naming(None, f"named by {name}, which is damaged") for segment in manifest.segments
        }
        try:
            folder = _open(self._layout.directory / name, manifest.checksum)
        except DamagedDataError as error:
            return self._beyond_repair(name, error)
        for segment, checksum in segments_of(folder.metadata).items():
            self._snapshot_segments[segment] = _Naming(checksum, f"named by {name}")
        details = f"LSN {manifest.lsn}, {_columns(folder)}, {len(self._snapshot_segments)} segments"
        return FileReport(name, "ok", details)

    def _examine_log(self) -> Iterator[FileReport]:
        there = self._layout.log_numbers()
        if self._manifest is None:
            first, lsn = min(there, default=1), None
        else:
            first, lsn = self._manifest.first_log_file, self._manifest.lsn
        previous: _LogFile | None = None
        for number in range(first, max([first, *there]) + 1 if there or self._manifest else first):
            file = _read_log_file(self._layout.log(number), number)
            self._log.append(file)
            if previous is not None:
                _judge_closed(previous, file)
                lsn = previous.last_lsn if previous.damage is None else None
                yield self._report_log_file(previous)
            if file.header is not None and lsn is not None and file.header.first_lsn != lsn + 1:
                reason = f"starts at LSN {file.header.first_lsn} instead of {lsn + 1}"
                file.damage = None
                file.damaged(reason, 0, is_kept=False)
            previous = file
        if previous is not None:
            _judge_last(previous)
            yield self._report_log_file(previous)
        for number in there:
            if number < first:
                details = "older than the snapshot; removed at the next start"
                yield FileReport(self._layout.log(number).name, "unused", details)

    def _report_log_file(self, file: _LogFile) -> FileReport:
        name = file.path.name
        details = ""
        if file.header is not None:
            held = "no operations"
            if file.operations:
                held = f"LSN {file.header.first_lsn} to {file.last_lsn}, {file.operations} operations"
            used = f"{file.end} of {file.size} bytes used"
            details = f"{held}, durable up to LSN {file.durable_lsn}, {used}"
        if file.damage is not None:
            before = f" (before it {details})" if details else ""
            return FileReport(name, "damaged", _place(file.damage, file.path) + before, file.damage)
        if file.torn_bytes:
            self.torn_bytes += file.torn_bytes
            torn = f"{file.torn_bytes} bytes behind them would be cut and kept at the next start"
            return FileReport(name, "torn", f"{details}; {torn}")
        return FileReport(name, "ok", details)

    def _named_by(self, log: list[_LogFile]) -> dict[str, _Naming]:
        named = dict(self._snapshot_segments)
        for file in log:
            for lsn, operation in file.segments:
                named[operation.segment] = _Naming(operation.checksum, f"installed at LSN {lsn}")
        return named

    def _examine_segments(self) -> Iterator[FileReport]:
        named = self._named_by(self._log)
        for segment, naming in named.items():
            path = self._layout.segments / segment
            name = f"{self._layout.segments.name}/{segment}"
            try:
                folder = _open(path, naming.checksum)
            except DamagedDataError as error:
                self._damaged_segments.add(segment)
                yield _damaged(name, error, self._layout.directory)
                continue
            rows = len(folder.columns.get("row-ids", ()))
            yield FileReport(name, "ok", f"{rows} rows, {_columns(folder)}, {naming.text}")
        is_whole = not self.damages
        for segment in _segment_names(self._layout):
            if segment in named:
                continue
            details = "not finished" if segment.endswith(_BUILDING_SUFFIX) else "not named"
            if not is_whole:
                details += " by anything that can be read"
            yield FileReport(
                f"{self._layout.segments.name}/{segment}", "unused", f"{details}; removed at the next start"
            )
        if self._layout.segments.exists():
            for path in sorted({*self._layout.segments.iterdir()} - {*self._layout.segment_folders()}):
                name = f"{self._layout.segments.name}/{path.name}"
                if path.name not in named:
                    yield FileReport(name, "other", "not a file of engram's")

    def _examine_rest(self) -> Iterator[FileReport]:
        layout = self._layout
        current = {layout.lock.name, layout.manifest.name, layout.segments.name}
        unfinished = {
            f"{layout.manifest.name}.new": "a manifest",
            f"{layout.users.name}.new": "a file of users",
        }
        if self._manifest is not None:
            current.add(self._manifest.snapshot)
        snapshots = {path.name for path in layout.snapshots()}
        logs = {layout.log(number).name for number in layout.log_numbers()}
        prepared = set(layout.prepared_files())
        for path in sorted(layout.directory.iterdir()):
            name = path.name
            if name in current or name in logs:
                continue
            if name in snapshots:
                yield self._examine_other_snapshot(path)
            elif name in FOREIGN_NAMES:
                reason = "written by another program named engram, whose format this one does not read"
                yield self._beyond_repair(name, DamagedDataError(path, reason))
            elif _KEPT_NAME.fullmatch(name):
                yield FileReport(name, "kept", f"put aside by a start or a repair, {_size(path)} bytes")
            elif path in prepared:
                yield FileReport(name, "unused", "space for the log; removed at the next start")
            elif name in unfinished:
                yield FileReport(name, "unused", f"{unfinished[name]} that was not finished")
            elif name == layout.users.name:
                yield FileReport(name, "ok", f"users, {_size(path)} bytes")
            else:
                yield FileReport(name, "other", "not a file of engram's")

    def _examine_other_snapshot(self, path: Path) -> FileReport:
        if self._manifest is not None:
            return FileReport(path.name, "unused", "not named by MANIFEST; removed at the next start")
        try:
            folder = _open(path, None)
        except DamagedDataError as error:
            return _damaged(path.name, error, self._layout.directory)
        return FileReport(path.name, "ok", f"{_columns(folder)}; no readable MANIFEST names it")


def _read_log_file(path: Path, number: int) -> _LogFile:
    file = _LogFile(number, path)
    try:
        data = read_file(path)
    except FileNotFoundError:
        file.damaged("missing", is_kept=False)
        return file
    except OSError as error:
        file.damaged(f"cannot be read: {error.strerror}", is_kept=False)
        file.is_readable = False
        return file
    file.size = len(data)
    try:
        header = log_format.decode_file_header(data)
    except log_format.FormatError as error:
        file.damaged(f"{error}", 0, is_kept=False)
        return file
    if header.number != number:
        file.damaged(f"holds file {header.number} of the log", 0, is_kept=False)
        return file
    file.header = header
    file.last_lsn = file.durable_lsn = header.first_lsn - 1
    scanner = log_format.RecordScanner(data, header)
    for record in scanner:
        if reason := _take_record(file, record):
            file.damaged(reason, record.offset)
            break
    file.end, file.chain, file.defect = scanner.offset, scanner.chain, scanner.defect
    if file.defect or file.damage is not None:
        file.claimed_lsn = log_format.claimed_durable_lsn(data, file.end, header)
        file.torn_bytes = max(0, log_format.used_size(data) - file.end)
    return file


def _take_record(file: _LogFile, record: log_format.Record) -> str:
    """Counts a record whose checksums are right; returns what is wrong with it all the same, or "".

    Raises NewerFormatError for an operation that is not known.
    """
    holds_operations = record.kind == log_format.OPERATIONS
    if not holds_operations and record.kind != log_format.MARK:
        return f"record type {record.kind} is not known"
    expected = file.last_lsn + holds_operations
    if record.lsn != expected or record.durable_lsn > file.last_lsn:
        return f"LSN {record.lsn} instead of {expected}"
    if holds_operations:
        try:
            operations = read_operations(file.path, record)
        except DamagedDataError as error:
            return error.reason
        file.segments += (
            (lsn, operation)
            for lsn, operation in enumerate(operations, record.lsn)
            if isinstance(operation, InstallSegment) and operation.segment
        )
        file.operations += len(operations)
        file.last_lsn += len(operations)
    file.durable_lsn = max(file.durable_lsn, record.durable_lsn)
    return ""


def _judge_closed(file: _LogFile, following: _LogFile) -> None:
    """A file that another follows was durable to its end, which the header of that one names."""
    if file.header is None or file.damage is not None:
        return
    if following.header is None:
        if file.defect:
            file.damaged(f"{file.defect}, in a file that others follow", file.end)
    elif following.header.link != file.chain:
        reason = file.defect or "the records end here"
        file.damaged(f"{reason}, but not for {following.path.name}, which follows", file.end)
    if file.damage is None:
        file.durable_lsn = file.last_lsn
        file.torn_bytes = 0


def _judge_last(file: _LogFile) -> None:
    if file.defect and file.claimed_lsn > file.last_lsn:
        reason = f"{file.defect} at LSN {file.last_lsn + 1}, but LSN {file.claimed_lsn} was durable"
        file.damaged(reason, file.end)


def _open(path: Path, checksum: int | None) -> ColumnFolder:
    """Opens a folder of columns; without a checksum its own table vouches for it.

    Raises DamagedDataError and NewerFormatError.
    """
    try:
        if checksum is not None:
            return open_columns(path, checksum)
        return open_columns(path, crc32c((path / TABLE).read_bytes()))
    except FileNotFoundError as error:
        raise DamagedDataError(Path(error.filename), "missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DamagedDataError(path / TABLE, f"not a table of columns: {error!r}") from error


def _unreadable(path: Path, error: OSError) -> DamagedDataError:
    return DamagedDataError(Path(error.filename or path), f"cannot be read: {error.strerror}")


def _damaged(name: str, damage: DamagedDataError, directory: Path) -> FileReport:
    return FileReport(name, "damaged", _place(damage, directory / name), damage)


def _place(damage: DamagedDataError, path: Path) -> str:
    """What is wrong, and where in `path`, a file or a folder that holds it."""
    offset = "" if damage.offset is None else f"at offset {damage.offset}: "
    inside = "" if damage.path == path else f"{damage.path.relative_to(path)}: "
    return f"{inside}{offset}{damage.reason}"


def _columns(folder: ColumnFolder) -> str:
    return f"{len(folder.checksums)} files of {folder.size} bytes"


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def cut_log(
    directory: Path, files: Files, cut: Cut, *, now: Callable[[], float] = time.time
) -> tuple[Path, ...]:
    """Cuts the log, under an exclusive lock (blocking); returns where what is cut is kept.

    Raises:
        OSError: a step failed. What an earlier one did stays; the cut may be tried again.
    """
    layout = Layout(directory)
    second = int(now())
    aside: list[Path] = []
    for segment in cut.segments:
        target = free_name(directory / f"segment-{segment}", second)
        files.rename(layout.segments / segment, target)
        aside.append(target)
    if cut.segments:
        files.sync_folder(layout.directory)
        files.sync_folder(layout.segments)
    path = layout.log(cut.number)
    if cut.size:
        data = path.read_bytes()
        if tail := data[cut.size : log_format.used_size(data)]:
            target = free_name(path, second)
            files.write_file(target, [tail])
            files.sync_folder(layout.directory)
            aside.append(target)
    for number in reversed(cut.files):
        source = layout.log(number)
        target = free_name(source, second)
        files.rename(source, target)
        files.sync_folder(layout.directory)
        aside.append(target)
    if cut.size:
        files.truncate(path, cut.size)
    else:
        _make_empty_log(layout, files, cut)
    return tuple(aside)


def _make_empty_log(layout: Layout, files: Files, cut: Cut) -> None:
    # Nothing compares the link of the first file that the manifest names.
    header = log_format.new_file_header(cut.number, cut.lsn + 1, 0)
    prepared = layout.prepared(0)
    files.remove(prepared)
    files.write_file(prepared, [header.encode()])
    files.rename(prepared, layout.log(cut.number))
    files.sync_folder(layout.directory)


def describe_loss(cut: Cut) -> str:
    """What a cut takes away, for the operator."""
    if cut.lost_lsn > cut.lsn:
        return f"what LSN {cut.lsn + 1} and all after it did, up to LSN {cut.lost_lsn} at least"
    return f"whatever came after LSN {cut.lsn}"


def describe_place(cut: Cut, directory: Path) -> str:
    """Where the log is cut, for the operator."""
    path = Layout(directory).log(cut.number)
    return f"{path} at offset {cut.size}" if cut.size else f"{path}, which is made anew"
