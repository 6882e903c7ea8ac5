"""Durability: what of the log is written, synced and recorded, and the replies that wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from engram.persistence.log_thread import LogThread
from engram.persistence.queue import RunQueue
from engram.persistence.recovery import Recovery
from engram.persistence.settings import PersistenceSettings

# A batch is recorded as durable by the next one, or by a mark when none comes for this long.
_MARK_DELAY = 0.1
_SYNC_INTERVAL = 1.0


class Durability:
    """Writes what is queued, batch by batch, and syncs as `appendfsync` says.

    Args:
        progress: woken when a batch is written.
        on_sync: called with the seconds that a sync of the log took.
        on_written: called when operations have been written.

    Attributes:
        durable_lsn: all up to it is synced.
        batches: calls to the thread of the log so far.
        last_sync_seconds: what the last sync took.
    """

    def __init__(
        self,
        settings: PersistenceSettings,
        thread: LogThread,
        queue: RunQueue,
        recovery: Recovery,
        progress: trio.lowlevel.ParkingLot,
        *,
        on_sync: Callable[[float], None] = lambda seconds: None,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        self.durable_lsn = recovery.lsn
        self.batches = 0
        self.last_sync_seconds = 0.0
        self._settings = settings
        self._thread = thread
        self._queue = queue
        self._progress = progress
        self._on_sync = on_sync
        self._on_written = on_written
        self._written_lsn = recovery.lsn
        self._written_file_number = recovery.log_file
        # The log itself says that all up to it is durable.
        self._recorded_lsn = recovery.recorded_durable_lsn
        self._last_commit_time = self._last_sync_time = 0.0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._work = trio.Event()
        self._closing = False
        self._failed = False
        queue.on_run = self.wake

    def released(self, lsn: int) -> bool:
        """Whether a reply that shows the state as of `lsn` may leave."""
        if lsn <= self.durable_lsn:
            return True
        return self._settings.appendfsync != "always" and not self._failed

    def on_release(self, lsn: int, callback: Callable[[], None]) -> None:
        """Calls `callback` on the loop once `lsn` is released, in the order of the calls, in which LSNs must
        not decrease; at once when it is released and nothing waits."""
        if not self._waiting and self.released(lsn):
            callback()
            return
        self._waiting.append((lsn, callback))
        # Under a policy that just became "always" there may be no other cause to sync.
        self._work.set()

    async def wait_durable(self, lsn: int) -> None:
        """Returns once all up to `lsn` is synced, whatever `appendfsync` lets replies do before."""
        self._work.set()
        while self.durable_lsn < lsn:
            await self._progress.park()

    async def wait_file(self, number: int) -> None:
        """Returns once the log goes on in the file of that number on disk, too."""
        while self._written_file_number < number:
            await self._progress.park()

    def wake(self) -> None:
        """Has `run` look again for what there is to do. Once is enough for all that comes until it waits."""
        self._work.set()

    def reconsider(self) -> None:
        """To be called when the settings have changed, which may let replies leave or ask for a sync."""
        self._release()
        self._work.set()

    def close(self) -> None:
        """Lets `run` end once all that was appended is durable."""
        self._closing = True
        self._work.set()

    def fail(self) -> None:
        """What is not durable by now is released to nobody, whatever the policy."""
        self._failed = True

    def _release(self) -> None:
        waiting = self._waiting
        while waiting and self.released(waiting[0][0]):
            waiting.popleft()[1]()

    async def run(self) -> None:
        """Writes and syncs the log until `close`, then writes and syncs the rest.

        Raises:
            LogFailureError: the log cannot be written or synced.
        """
        self._last_sync_time = trio.current_time()
        queue = self._queue
        while True:
            now = trio.current_time()
            # As the deadline below is computed, or rounding could make this wait for nothing.
            sync_due = now >= self._last_sync_time + _SYNC_INTERVAL
            unsynced = self._written_lsn > self.durable_lsn
            always = self._settings.appendfsync == "always" or self._closing
            everysec = self._settings.appendfsync == "everysec"
            unrecorded = self._recorded_lsn < self.durable_lsn == queue.appended_lsn
            deadline = float("inf")
            if queue.has_runs:
                await self._commit(sync=always or (everysec and sync_due))
                self._on_written()
                continue
            if unsynced and (always or (everysec and sync_due)):
                await self._commit(sync=True)
                continue
            if unrecorded and (self._closing or now >= self._last_commit_time + _MARK_DELAY):
                if not queue.mark():
                    # The next batch says it.
                    self._recorded_lsn = self.durable_lsn
                continue
            if self._closing:
                return
            if unsynced and everysec:
                deadline = self._last_sync_time + _SYNC_INTERVAL
            elif unrecorded:
                deadline = self._last_commit_time + _MARK_DELAY
            self._work = trio.Event()
            with trio.move_on_at(deadline):
                await self._work.wait()

    async def _commit(self, *, sync: bool) -> None:
        # What is taken from the queue is written, whatever else ends.
        batch = self._queue.take()
        commit = await self._thread.commit(batch.runs, sync=sync)
        now = trio.current_time()
        self._last_commit_time = now
        if sync:
            self._last_sync_time = now
        if commit.sync_seconds is not None:
            self.last_sync_seconds = commit.sync_seconds
            self._on_sync(commit.sync_seconds)
        self.batches += 1
        self._queue.written_end = batch.end
        self._written_lsn = batch.lsn
        self._written_file_number = batch.file_number
        self.durable_lsn = commit.durable_lsn
        self._recorded_lsn = commit.recorded_lsn
        self._release()
        self._progress.unpark_all()
