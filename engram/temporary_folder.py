"""Where a server that keeps nothing has the files of its segments: a folder in the system's temporary one.

Others may write beside it, and whoever cleans up may remove it at any time. So

- what is in it is reached only while it is the folder that this process made, which is a new one otherwise;
- it is locked as systemd-tmpfiles asks for, which then leaves it alone;
- of what a server that was killed has left, only what certainly is such a folder is removed: no link is
  followed, nobody else's folder is touched, and nothing is made.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from engram.persistence.layout import Layout, lock_directory

logger = logging.getLogger("engram")

PREFIX = "engram-"

# A file in a folder that no server needs once it has ended.
_MARK = "TEMPORARY"
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TemporaryFolder:
    """A folder, mode 0700, that is removed by `close`. It may be used by any thread, and blocks.

    Raises OSError or OperatorError when it cannot be made.
    """

    def __init__(self) -> None:
        self._making = threading.Lock()
        self._make()

    def _make(self) -> None:
        with ExitStack() as undone:
            path = Path(tempfile.mkdtemp(prefix=PREFIX))
            descriptor = os.open(path, _OPEN_FOLDER)
            undone.callback(os.close, descriptor)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            undone.callback(os.close, lock_directory(path))
            # Whoever sees the mark without a lock may remove the folder.
            (path / _MARK).touch(mode=0o600)
            self._path, self._descriptor = path, descriptor
            self._held = undone.pop_all()

    def segments(self) -> Path:
        """The folder of segments, which is made anew when it is gone. Raises OSError or OperatorError."""
        with self._making:
            if not self._is_there():
                logger.warning("the temporary folder %s is gone; another takes its place", self._path)
                before = self._held
                self._make()
                before.close()
            segments = Layout(self._path).segments
            segments.mkdir(mode=0o700, exist_ok=True)
            return segments

    def _is_there(self) -> bool:
        """Whether it has not been replaced: its number is nobody else's while it is open."""
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Removes the folder. What cannot be removed is left to whoever cleans up."""
        try:
            if self._is_there():
                _empty(self._descriptor)
                os.rmdir(self._path)
        except OSError as error:
            logger.debug("%s stays: %s", self._path, error)
        finally:
            self._held.close()


def remove_abandoned_folders() -> None:
    """Removes the temporary folders of this user's servers that were killed."""
    with suppress(OSError), ExitStack() as stack:
        parent = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, parent)
        for name in os.listdir(parent):
            if name.startswith(PREFIX):
                try:
                    _remove_abandoned(parent, name)
                except OSError as error:
                    logger.debug("%s stays: %s", name, error)


def _remove_abandoned(parent: int, name: str) -> None:
    """Removes a folder if a server made it that has ended. Raises OSError for some of the others."""
    with ExitStack() as stack:
        folder = os.open(name, _OPEN_FOLDER, dir_fd=parent)
        stack.callback(os.close, folder)
        status = os.fstat(folder)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
            return
        lock = os.open(Layout(Path()).lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = os.stat(_MARK, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(mark.st_mode) and stat.S_ISREG(os.fstat(lock).st_mode):
            _empty(folder)
            os.rmdir(name, dir_fd=parent)


def _empty(folder: int) -> None:
    """Removes what is in an open folder, at last what tells that it may be removed."""
    last = (Layout(Path()).lock.name, _MARK)
    for name in sorted(os.listdir(folder), key=lambda name: name in last):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
