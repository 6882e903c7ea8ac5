"""The names in a data directory, and the lock on it.

LOCK                   flock; held for the life of the server
MANIFEST               what is current (manifest.py)
wal-<number>.log       the files of the log (log_format.py); numbers follow each other
prepared-<n>.log       space allocated for a coming file of the log; holds nothing yet
snapshot-<lsn>/        the state as of that LSN, a folder of columns
segments/<id>/         one segment of an index, a folder of columns
segments/<id>.building/   a segment not finished
users.acl              the users, and the rules for them (engram/access.py)
wal-<number>.log.broken-<unix time>   what recovery cut from that file
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

import attrs

from engram.errors import DamagedDataError, DirectoryInUseError, OperatorError
from engram.files import DiskFiles, open_file
from engram.format_level import check_level
from engram.persistence.log_format import FILE_HEADER_SIZE, FormatError, level_of_file
from engram.persistence.manifest import read_manifest

_LOG_NAME = re.compile(r"wal-(\d{10})\.log")
_PREPARED_NAME = re.compile(r"prepared-\d+\.log")
# Not lost+found, nor what begins with a dot.
_SEGMENT_NAME = re.compile(r"[\w-]+(\.building)?")
_SNAPSHOT_NAME = re.compile(r"snapshot-\d+")
FOREIGN_NAMES = ("engram.snap", "engram.wal")


@attrs.frozen
class Layout:
    """The paths of one data directory."""

    directory: Path

    @property
    def users(self) -> Path:
        return self.directory / "users.acl"

    @property
    def lock(self) -> Path:
        return self.directory / "LOCK"

    @property
    def manifest(self) -> Path:
        return self.directory / "MANIFEST"

    @property
    def segments(self) -> Path:
        return self.directory / "segments"

    def log(self, number: int) -> Path:
        return self.directory / f"wal-{number:010d}.log"

    def prepared(self, count: int) -> Path:
        return self.directory / f"prepared-{count}.log"

    def snapshot(self, lsn: int) -> Path:
        return self.directory / f"snapshot-{lsn}"

    def log_numbers(self) -> list[int]:
        """The numbers of the log's files that are there, ascending."""
        matches = (_LOG_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def prepared_files(self) -> list[Path]:
        """The files that hold space for the log."""
        return [path for path in self.directory.iterdir() if _PREPARED_NAME.fullmatch(path.name)]

    def snapshots(self) -> list[Path]:
        """The folders of snapshots that are there, finished or not."""
        return [path for path in self.directory.iterdir() if _SNAPSHOT_NAME.fullmatch(path.name)]

    @property
    def is_new(self) -> bool:
        """Whether, but for a manifest, there is no more than what a crash in making a directory leaves."""
        numbers = self.log_numbers()
        first_is_empty = numbers == [1] and self.log(1).stat().st_size <= FILE_HEADER_SIZE
        has_segments = self.segments.exists() and self.segment_folders()
        return not self.snapshots() and not has_segments and (not numbers or first_is_empty)

    def segment_folders(self) -> list[Path]:
        """The folders of segments that are there, finished or not; others are not engram's."""
        return [
            path
            for path in self.segments.iterdir()
            if _SEGMENT_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]


def check_levels(layout: Layout) -> None:
    """Looks whether a newer engram has used a data directory, before it is judged otherwise (blocking).

    What cannot be read or is damaged is left to whoever needs it.

    Raises:
        NewerFormatError: one has.
    """
    with suppress(DamagedDataError, OSError):
        read_manifest(layout.manifest)
    for number in layout.log_numbers():
        path = layout.log(number)
        with suppress(FormatError, OSError), open_file(path) as file:
            check_level(path, level_of_file(file.read(FILE_HEADER_SIZE)))


def free_name(path: Path, second: int) -> Path:
    """A name beside `path` for what is cut from it in that second since the epoch, which nothing has yet."""
    while (free := path.with_name(f"{path.name}.broken-{second}")).exists():
        second += 1
    return free


def _make_directory(path: Path) -> None:
    """Makes a directory and those above it that are missing, each with its name synced."""
    if path.exists():
        return
    _make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    DiskFiles().sync_folder(path.parent)


def lock_directory(path: Path) -> int:
    """Makes the data directory when it is not there and locks it.

    Returns the descriptor that holds the lock: closing it, or the end of the process, lets go.

    Raises:
        DirectoryInUseError: another process holds it.
        NewerFormatError: a newer engram has used it.
        OperatorError: it holds files of another program's format, or cannot be made or written.
    """
    layout = Layout(path)
    try:
        _make_directory(path)
        for name in FOREIGN_NAMES:
            if (path / name).exists():
                raise OperatorError(
                    f"{path / name}: written by another program named engram, whose format this one does not"
                    " read; choose another directory"
                )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(layout.lock, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_levels(layout)
            layout.segments.mkdir(mode=0o700, exist_ok=True)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DirectoryInUseError(f"{path}: another server is using this directory") from error
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise OperatorError(f"{path}: cannot be used as data directory: {error.strerror}") from error
    return descriptor
