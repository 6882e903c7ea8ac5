"""The log of a data directory and its snapshots, while the server runs: the parts of it, joined.

On the loop an operation is given its place in the log when it is appended (`queue.py`): only what has space
that is allocated (`space.py`) is let in (`admission.py`). All that is queued when the last batch is done is
written, and synced as `appendfsync` says, in one call in a worker thread; the callbacks that wait for it run
after it (`durability.py`). When the log has grown, a snapshot takes its place (`current_snapshot.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import trio

from engram.errors import LogFailureError, SnapshotError
from engram.files import Files
from engram.persistence.admission import Admission
from engram.persistence.current_snapshot import CurrentSnapshot, Rotation
from engram.persistence.durability import Durability
from engram.persistence.housekeeping import Housekeeping
from engram.persistence.layout import Layout
from engram.persistence.log_thread import LogThread
from engram.persistence.log_writer import LogWriter
from engram.persistence.named_segments import NamedSegments
from engram.persistence.queue import RunQueue
from engram.persistence.recovery import Recovery
from engram.persistence.settings import PersistenceSettings
from engram.persistence.space import Space


@attrs.frozen(kw_only=True)
class PersistenceStatus:
    """What INFO shows. Times are in seconds, sizes in bytes.

    Attributes:
        last_save_time: when a snapshot was last made, or found to hold everything, since the epoch; 0 when
            there is none.
        last_save_seconds: how long the last snapshot since the start took, made or failed; -1 when there is
            none.
        last_save_error: why the last snapshot failed; empty when it did not.
        cleanup_error: why files no longer named could not be removed; empty when they were.
        changes_since_save: operations that the current snapshot does not hold.
        log_bytes: records of the log that the current snapshot does not hold.
        log_file: number of the file in use.
        allocation_error: why no space can be allocated for the log; empty when it can.
        batches: calls to the worker thread so far.
    """

    appended_lsn: int
    durable_lsn: int
    queued_bytes: int
    batches: int
    last_fsync_seconds: float
    log_file: int
    log_bytes: int
    allocation_error: str
    snapshot_running: bool
    last_save_time: int
    last_save_ok: bool
    last_save_error: str
    last_save_seconds: float
    cleanup_error: str
    changes_since_save: int


class Persistence:
    """The log and the snapshots of one data directory, from the end of recovery on.

    Everything here belongs to Trio's loop, and what is not `async` has no checkpoint. A write goes
    `has_room` or `admit`, then `reserve` and `append` in the same synchronous step; several that go together,
    `encode` for each and `append_together`.

    Args:
        directory: locked by `lock_directory`, read by `recover`.
        snapshot_command: gives the command line of the process that makes a snapshot from the number of
            the last closed file of the log. The process passes that number to `recover`, writes the folder
            of columns, prints a `SnapshotResult` and ends, at the latest when its standard input closes.

    Attributes:
        settings: `reconsider` is to be called when they have changed.
        on_sync: called with the seconds that a sync of the log took.
        has_room: see `Admission.has_room`.
        reserve, encode, append, append_together: see `RunQueue`.
        released, on_release: see `Durability`.
    """

    def __init__(
        self,
        directory: Path,
        files: Files,
        settings: PersistenceSettings,
        recovery: Recovery,
        snapshot_command: Callable[[int], list[str]],
    ) -> None:
        self.settings = settings
        self.on_sync: Callable[[float], None] = lambda seconds: None
        self._nursery: trio.Nursery | None = None
        self._failure: LogFailureError | None = None
        layout = Layout(directory)
        # Woken whenever a file has been prepared, or could not be, and when a batch is written.
        self._progress = trio.lowlevel.ParkingLot()
        self._housekeeping = Housekeeping()
        self._segments = NamedSegments(recovery)
        self._space = Space(layout, files, settings, self._housekeeping, self._progress)
        self._queue = RunQueue(self._space, recovery, self._segments.note)
        self._admission = Admission(settings, self._space, self._queue, self._progress)
        self._snapshot = CurrentSnapshot(
            layout,
            files,
            settings,
            self._queue,
            self._segments,
            recovery,
            self._housekeeping,
            rotate=self._rotate,
            command=snapshot_command,
            fail=self._fail,
        )
        self._writer = LogWriter(layout, files, recovery)
        self._thread = LogThread(self._writer)
        self._durability = Durability(
            settings,
            self._thread,
            self._queue,
            recovery,
            self._progress,
            on_sync=lambda seconds: self.on_sync(seconds),
            on_written=self._snapshot.consider,
        )
        # What is called for each write or reply is the part's own: a method between would cost as much again.
        self.has_room = self._admission.has_room
        self.reserve = self._queue.reserve
        self.encode = self._queue.encode
        self.append = self._queue.append
        self.append_together = self._queue.append_together
        self.released = self._durability.released
        self.on_release = self._durability.on_release

    @property
    def status(self) -> PersistenceStatus:
        queue, durability, snapshot = self._queue, self._durability, self._snapshot
        return PersistenceStatus(
            appended_lsn=queue.appended_lsn,
            durable_lsn=durability.durable_lsn,
            queued_bytes=queue.queued_bytes,
            batches=durability.batches,
            last_fsync_seconds=durability.last_sync_seconds,
            log_file=queue.file_number,
            log_bytes=snapshot.log_bytes,
            allocation_error=self._space.error,
            snapshot_running=snapshot.running,
            last_save_time=snapshot.last_save_time,
            last_save_ok=not snapshot.last_save_error,
            last_save_error=snapshot.last_save_error,
            last_save_seconds=snapshot.last_save_seconds,
            cleanup_error=snapshot.cleanup_error,
            changes_since_save=queue.appended_lsn - snapshot.lsn,
        )

    @property
    def appended_lsn(self) -> int:
        return self._queue.appended_lsn

    @property
    def durable_lsn(self) -> int:
        return self._durability.durable_lsn

    async def admit(self, size: int) -> None:
        """See `Admission.admit`."""
        await self._admission.admit(size)

    async def wait_durable(self, lsn: int) -> None:
        """See `Durability.wait_durable`."""
        await self._durability.wait_durable(lsn)

    def reconsider(self) -> None:
        """To be called when `settings` have changed, which may let replies leave or ask for a sync."""
        self._durability.reconsider()

    async def snapshot(self) -> None:
        """See `CurrentSnapshot.replace`."""
        await self._snapshot.replace()

    def request_snapshot(self) -> None:
        """See `CurrentSnapshot.request`."""
        self._snapshot.request()

    def release(self, size: int, used: int) -> None:
        """Segments of `size` bytes are no longer part of the state, of which segments have `used` bytes."""
        self._segments.release(self._queue.appended_lsn, size, used)
        self._snapshot.consider()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prepares files, writes the log and makes snapshots until `close`, then writes and syncs the rest.

        It has started once the first file is prepared or could not be.

        Raises:
            LogFailureError: the log cannot be written or synced, or what is current on disk is unknown.
                Nothing that was not released by then may be acknowledged.
        """
        async with trio.open_nursery() as thread_nursery:
            thread_nursery.start_soon(self._thread.run)
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await nursery.start(self._snapshot.serve)
                    await nursery.start(self._space.run, self._admission.shortage)
                    task_status.started()
                    try:
                        await self._durability.run()
                    except LogFailureError as error:
                        self._fail(error)
                    nursery.cancel_scope.cancel()
            finally:
                self._thread.stop()
                with trio.CancelScope(shield=True):
                    await self._housekeeping.run_anyway(self._close_files)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Lets `run` end once all that was appended is durable."""
        self._snapshot.close()
        self._durability.close()

    def _fail(self, error: LogFailureError) -> None:
        assert self._nursery is not None
        self._failure = error
        self._admission.close()
        self._durability.fail()
        self._nursery.cancel_scope.cancel()

    def _close_files(self) -> None:
        self._writer.close()
        self._space.discard(self._queue.unused_files())

    async def _rotate(self) -> Rotation:
        """Closes the file in use, if anything is in it."""
        queue, space = self._queue, self._space
        async with self._admission.line:
            while queue.file_has_records and not space.holds(0):
                if space.error:
                    raise SnapshotError(space.error)
                space.prepare()
                await self._progress.park()
            if queue.file_has_records:
                queue.switch()
            rotation = Rotation(queue.appended_lsn, queue.file_number - 1, queue.end)
        await self._durability.wait_file(rotation.closed_file + 1)
        return rotation
