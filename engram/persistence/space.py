"""Space for the log: files that are allocated before anything is promised to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import trio

from engram.files import Files
from engram.persistence.housekeeping import PASSING, Housekeeping, reason
from engram.persistence.layout import Layout
from engram.persistence.log_writer import PreparedFile
from engram.persistence.settings import PersistenceSettings

_ALLOCATION_RETRY = 1.0


class Space:
    """The prepared files, in which the log can go on. All sizes are of whole files, in bytes.

    Args:
        progress: woken when a file has been prepared, or could not be.
    """

    def __init__(
        self,
        layout: Layout,
        files: Files,
        settings: PersistenceSettings,
        housekeeping: Housekeeping,
        progress: trio.lowlevel.ParkingLot,
    ) -> None:
        self._layout = layout
        self._files = files
        self._settings = settings
        self._housekeeping = housekeeping
        self._progress = progress
        self._prepared: list[PreparedFile] = []
        self._names_given = 0
        # The size of the file that could not be made last, and why.
        self._failure: tuple[int, str] | None = None
        self._wakeup = trio.Event()

    @property
    def error(self) -> str:
        """Why the last file could not be made; empty when it could."""
        return "" if self._failure is None else self._failure[1]

    def refusal(self, size: int) -> str:
        """Why a file of `size` bytes cannot be made; empty while that is not known."""
        needed = max(size, self._settings.log_file_size)
        return "" if self._failure is None or needed < self._failure[0] else self._failure[1]

    def holds(self, size: int) -> bool:
        """Whether a file of at least `size` bytes is prepared."""
        return any(file.size >= size for file in self._prepared)

    def take(self, size: int) -> PreparedFile:
        """Gives away a file of at least `size` bytes, and prepares another one.

        A file that is not prepared has no descriptor: the writer makes it, and a lack of space is final then.
        """
        self.prepare()
        for file in self._prepared:
            if file.size >= size:
                self._prepared.remove(file)
                return file
        return PreparedFile(self._next_path(), max(size, self._settings.log_file_size))

    def prepare(self) -> None:
        """Has `run` look again for what is to be prepared."""
        self._wakeup.set()

    async def run(
        self, shortage: Callable[[], int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keeps a file prepared, and one of the size that `shortage` gives, unless that is 0.

        It has started once the first file is prepared or could not be.
        """
        deadline = await self._prepare_next(shortage)
        task_status.started()
        while True:
            with trio.move_on_at(deadline):
                await self._wakeup.wait()
            deadline = await self._prepare_next(shortage)

    async def _prepare_next(self, shortage: Callable[[], int]) -> float:
        """Prepares one file, if there is one to prepare; returns when to look again."""
        self._wakeup = trio.Event()
        size = self._settings.log_file_size
        if missing := shortage():
            size = max(size, missing)
        elif self._prepared:
            self._failure = None
            return float("inf")
        path = self._next_path()
        try:
            descriptor = await self._housekeeping.run(self._files.create, path, size)
        except PASSING as error:
            self._failure = (size, reason(error))
            deadline = trio.current_time() + _ALLOCATION_RETRY
        else:
            self._failure = None
            self._prepared.append(PreparedFile(path, size, descriptor))
            deadline = -float("inf")
        self._progress.unpark_all()
        return deadline

    def _next_path(self) -> Path:
        self._names_given += 1
        return self._layout.prepared(self._names_given)

    def discard(self, taken: Iterable[PreparedFile]) -> None:
        """Removes the prepared files, and those that were taken in vain (blocking)."""
        for file in (*self._prepared, *taken):
            if file.descriptor is not None:
                self._files.close(file.descriptor)
                with suppress(OSError):
                    # It holds nothing: recovery removes it.
                    self._files.remove(file.path)
