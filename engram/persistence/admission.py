"""Admission of writes: only what has space on disk, and in the queue, is let in."""

from __future__ import annotations

import trio

from engram.errors import LogFullError
from engram.persistence import log_format
from engram.persistence.queue import FRAME_SIZE, RunQueue
from engram.persistence.settings import PersistenceSettings
from engram.persistence.space import Space

# What an operation may take beyond its size as the caller knows it; and some for small operations that a
# command finds it must log as well.
_ALLOWANCE = FRAME_SIZE + 1024


def _file_size_for(size: int) -> int:
    return log_format.FILE_HEADER_SIZE + _ALLOWANCE + size


class Admission:
    """Lets writes in, first come, first served. Sizes are of operations, as the caller knows them, in bytes.

    Args:
        progress: woken when a file has been prepared, or could not be, and when a batch is written.

    Attributes:
        line: held by the one who is next, and by a writer that has to switch files.
    """

    def __init__(
        self,
        settings: PersistenceSettings,
        space: Space,
        queue: RunQueue,
        progress: trio.lowlevel.ParkingLot,
    ) -> None:
        self.line = trio.Lock()
        self._settings = settings
        self._space = space
        self._queue = queue
        self._progress = progress
        self._waiting = 0
        # What the next in line waits for on disk, 0 when it does not.
        self._wanted = 0
        self._closed = False

    def has_room(self, size: int) -> bool:
        """Whether an operation of about `size` bytes may be applied and appended now."""
        return not self._waiting and self._fits(size)

    async def admit(self, size: int) -> None:
        """Waits until there is room for an operation of about `size` bytes, first come, first served.

        The caller appends before its next checkpoint, or not at all.

        Raises:
            LogFullError: no space can be allocated on disk. It is tried again about once a second.
        """
        self._waiting += 1
        try:
            async with self.line:
                await self._wait_for_room(size)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Lets nothing in from here on: who waits, waits for ever."""
        self._closed = True

    def shortage(self) -> int:
        """The size of the file that the next in line waits for; 0 when it waits for none."""
        wanted = self._wanted
        return _file_size_for(wanted) if wanted and not self._fits_on_disk(wanted) else 0

    async def _wait_for_room(self, size: int) -> None:
        try:
            while not self._fits(size):
                if not self._fits_on_disk(size):
                    if reason := self._space.refusal(_file_size_for(size)):
                        raise LogFullError(reason)
                    self._wanted = size
                    self._space.prepare()
                await self._progress.park()
        finally:
            self._wanted = 0

    def _fits(self, size: int) -> bool:
        if self._closed:
            return False
        queued = self._queue.end - self._queue.written_end
        # One operation larger than the whole queue is admitted when it is alone.
        if queued and queued + size > self._settings.queue_bytes:
            return False
        return self._fits_on_disk(size)

    def _fits_on_disk(self, size: int) -> bool:
        queue = self._queue
        return size + _ALLOWANCE <= queue.file_end - queue.end or self._space.holds(_file_size_for(size))
