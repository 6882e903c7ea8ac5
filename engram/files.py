"""Durable file operations, and the one seam through which persistence touches the disk.

Everything below blocks: call it from a worker thread or a child process, never on Trio's loop.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol


class Files(Protocol):
    """The file operations that persistence and the segment writer use.

    `DiskFiles` is the real one; tests substitute one that records or fails. Every method raises
    OSError as the system call it stands for does.
    """

    def create(self, path: Path, size: int) -> int:
        """Makes a new file (mode 0600) with `size` bytes allocated on disk; returns its descriptor."""
        ...

    def open(self, path: Path) -> int:
        """Opens an existing file for reading and writing; returns its descriptor."""
        ...

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        ...

    def sync_data(self, descriptor: int) -> None:
        """fdatasync."""
        ...

    def close(self, descriptor: int) -> None: ...

    def truncate(self, path: Path, size: int) -> None:
        """Cuts the file to `size` bytes and syncs it."""
        ...

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Writes a whole new file (mode 0600) and syncs it."""
        ...

    def sync_file(self, path: Path) -> None:
        """fsync of an existing file."""
        ...

    def sync_folder(self, path: Path) -> None:
        """fsync of a folder, which makes the names in it durable."""
        ...

    def make_folder(self, path: Path) -> None:
        """mkdir (mode 0700); the parent must exist."""
        ...

    def rename(self, source: Path, target: Path) -> None: ...

    def remove(self, path: Path) -> None:
        """Removes a file; one that is not there is no error."""
        ...

    def remove_tree(self, path: Path) -> None:
        """Removes a folder and all in it; one that is not there is no error."""
        ...


class DiskFiles:
    """The real file operations."""

    def create(self, path: Path, size: int) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if size:
                os.posix_fallocate(descriptor, 0, size)
        except BaseException:
            os.close(descriptor)
            os.unlink(path)
            raise
        return descriptor

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(descriptor, view, offset)
            view = view[written:]
            offset += written

    def sync_data(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def truncate(self, path: Path, size: int) -> None:
        descriptor = self.open(path)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        descriptor = self.create(path, 0)
        try:
            offset = 0
            for chunk in chunks:
                self.write_at(descriptor, chunk, offset)
                offset += memoryview(chunk).nbytes
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_file(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        while path.exists():
            # Someone else may be removing it, too.
            with suppress(FileNotFoundError):
                shutil.rmtree(path)


def status_of_file(path: Path) -> os.stat_result:
    """The status of what a path leads to. Raises OSError when that is missing, or is no regular file."""
    status = path.stat()
    _check_regular(status, path)
    return status


def read_file(path: Path) -> bytes:
    """What a file holds. Raises OSError also for what is no regular file: a pipe would be waited for."""
    with open_file(path) as file:
        return file.read()


def open_file(path: Path) -> BinaryIO:
    """Opens a file to be read. Raises OSError as `read_file`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _check_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def rewrite_file(files: Files, path: Path, chunks: Iterable[bytes | memoryview], mode: int) -> None:
    """Replaces a file that is not engram's own, so that a crash leaves the old content or the new one.

    Behind a link, what it names is replaced. The file keeps its mode and its owner; one that is new gets
    `mode`. What is written meanwhile has a name of its own beside the file, and nothing else is removed.

    Raises:
        OSError: the file cannot be written, or is a folder, a device, a pipe or a socket; it is as before.
    """
    target = Path(os.path.realpath(path))
    try:
        before = status_of_file(target)
    except FileNotFoundError:
        before = None
    beside = target.with_name(f"engram-{secrets.token_hex(8)}.partial")
    try:
        files.write_file(beside, chunks)
        os.chmod(beside, mode if before is None else _take_owner(beside, before))
        files.sync_file(beside)
        files.rename(beside, target)
    except FileExistsError:
        raise
    except BaseException:
        with suppress(OSError):
            files.remove(beside)
        raise
    files.sync_folder(target.parent)


def _take_owner(path: Path, before: os.stat_result) -> int:
    """Gives a file the owner of another as far as is allowed; returns the mode that it may have."""
    mode = stat.S_IMODE(before.st_mode) & 0o777
    now = path.stat()
    if now.st_uid != before.st_uid:
        with suppress(PermissionError):
            os.chown(path, before.st_uid, -1)
    if now.st_gid != before.st_gid:
        try:
            os.chown(path, -1, before.st_gid)
        except PermissionError:
            # What the old group could do is not for another one.
            mode &= ~0o070
    return mode


def replace_file(files: Files, path: Path, content: bytes) -> None:
    """Replaces a small file of a data directory so that a crash leaves the old content or the new one."""
    beside = path.with_name(path.name + ".new")
    files.remove(beside)
    files.write_file(beside, [content])
    files.rename(beside, path)
    files.sync_folder(path.parent)
