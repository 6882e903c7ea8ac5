"""The current snapshot: when another one takes its place, and how that is made."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import trio

from engram.errors import DamagedDataError, LogFailureError, SnapshotError, SnapshotRunningError
from engram.files import Files
from engram.persistence.housekeeping import PASSING, Housekeeping, reason
from engram.persistence.layout import Layout
from engram.persistence.manifest import Manifest, read_manifest
from engram.persistence.named_segments import NamedSegments
from engram.persistence.queue import RunQueue
from engram.persistence.recovery import Recovery, remove_outdated
from engram.persistence.settings import PersistenceSettings
from engram.persistence.snapshot import install_snapshot, run_child

# One that is due by itself is not tried again sooner when the last one has failed.
_RETRY = 60.0
_SHUTTING_DOWN = "the server is shutting down"


@attrs.frozen
class Rotation:
    """Where a file of the log was closed.

    Attributes:
        lsn: the last operation in it, or before it.
        closed_file: its number.
        end: what `RunQueue.end` was there.
    """

    lsn: int
    closed_file: int
    end: int


@attrs.define
class _Run:
    """One snapshot being made; `error` is why there was none, empty when there is."""

    done: trio.Event = attrs.Factory(trio.Event)
    error: str = _SHUTTING_DOWN


class CurrentSnapshot:
    """Makes snapshots, one at a time, when it is asked to or when the log has grown.

    Args:
        segments: told when a snapshot is current.
        rotate: closes the file of the log in use, so that a snapshot may hold all up to there.
        command: gives the command line of the process that makes one from the number of the last closed file.
        fail: called when it is not known what is current on disk: nothing may go on then.

    Attributes:
        last_save_time: when one was last made, or found to hold everything, in seconds since the epoch; 0
            when there is none.
        last_save_seconds: how long the last one since the start took, made or failed; -1 when there is none.
        last_save_error: why the last one failed; empty when it did not.
        cleanup_error: why files no longer named could not be removed; empty when they were.
    """

    def __init__(
        self,
        layout: Layout,
        files: Files,
        settings: PersistenceSettings,
        queue: RunQueue,
        segments: NamedSegments,
        recovery: Recovery,
        housekeeping: Housekeeping,
        *,
        rotate: Callable[[], Awaitable[Rotation]],
        command: Callable[[int], list[str]],
        fail: Callable[[LogFailureError], None],
    ) -> None:
        self.last_save_time = recovery.manifest.time
        self.last_save_seconds = -1.0
        self.last_save_error = ""
        self.cleanup_error = ""
        self._layout = layout
        self._files = files
        self._settings = settings
        self._queue = queue
        self._segments = segments
        self._housekeeping = housekeeping
        self._rotate = rotate
        self._command = command
        self._fail = fail
        self._manifest = recovery.manifest
        # What the queue's `end` was where the current snapshot ends.
        self._log_start = -recovery.log_bytes
        self._run: _Run | None = None
        self._nursery: trio.Nursery | None = None
        self._closing = False
        self._next_time = 0.0

    @property
    def running(self) -> bool:
        return self._run is not None

    @property
    def lsn(self) -> int:
        """The last operation that the current snapshot holds."""
        return self._manifest.lsn

    @property
    def log_bytes(self) -> int:
        """Records that the current snapshot does not hold."""
        return self._queue.end - self._log_start

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Lets snapshots be made, until it is cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def close(self) -> None:
        """Lets none be made by itself from here on."""
        self._closing = True

    async def replace(self) -> None:
        """Makes a snapshot of what was appended so far and waits until it is current.

        Raises:
            SnapshotRunningError: another one is being made.
            SnapshotError: it failed; serving can go on.
        """
        run = self._start()
        await run.done.wait()
        if run.error:
            raise SnapshotError(run.error)

    def request(self) -> None:
        """Starts a snapshot in the background.

        Raises:
            SnapshotRunningError: another one is being made.
            SnapshotError: none can be made any more.
        """
        self._start()

    def consider(self) -> None:
        """Starts a snapshot when there is enough that it would let go of."""
        least, percentage = self._settings.snapshot_log_size, self._settings.snapshot_log_percentage
        grown = self.log_bytes > max(least, self._manifest.size * percentage // 100)
        if not (least and percentage and (grown or self._segments.too_many_released)):
            return
        idle = self._run is None and self._nursery is not None and not self._closing
        if idle and trio.current_time() >= self._next_time:
            self._start()

    def _start(self) -> _Run:
        if self._run is not None:
            raise SnapshotRunningError
        if self._nursery is None:
            raise SnapshotError(_SHUTTING_DOWN)
        self._run = _Run()
        self._nursery.start_soon(self._make, self._run)
        return self._run

    async def _make(self, run: _Run) -> None:
        started = trio.current_time()
        try:
            if self._queue.appended_lsn > self._manifest.lsn:
                await self._make_current()
            self.last_save_time = int(time.time())
            run.error = ""
        except LogFailureError as error:
            run.error = str(error)
            self._fail(error)
        except Exception as error:
            # The state on disk is as before; whatever it was, serving goes on.
            run.error = reason(error)
        finally:
            self._run = None
            self.last_save_error = run.error
            self.last_save_seconds = trio.current_time() - started
            self._next_time = trio.current_time() + (_RETRY if run.error else 0)
            run.done.set()

    async def _make_current(self) -> None:
        rotation = await self._rotate()
        path = self._layout.snapshot(rotation.lsn)
        await self._housekeeping.run(self._files.remove_tree, path)
        try:
            result = await run_child(self._command(rotation.closed_file))
            manifest = await self._housekeeping.run(
                install_snapshot, self._layout, self._files, result, rotation.lsn, rotation.closed_file + 1
            )
        except LogFailureError:
            raise
        except Exception as error:
            # Nothing may go on before it is known what is current on disk.
            await self._housekeeping.run_anyway(partial(self._undo, path, error))
            raise
        self._manifest = manifest
        self._log_start = rotation.end
        await self._clean_up(manifest, self._segments.replace(manifest))

    def _undo(self, path: Path, error: Exception) -> None:
        """Removes a snapshot that has failed (blocking). Raises LogFailureError if it may be current."""
        try:
            manifest = read_manifest(self._layout.manifest)
        except (DamagedDataError, OSError) as unread:
            # It may name the folder that is to be removed.
            raise LogFailureError(f"{self._layout.manifest}: cannot be read back: {unread}") from error
        if manifest is not None and manifest.snapshot == path.name:
            # Renamed but not synced: after a crash it is this one or the one before.
            raise LogFailureError(f"{self._layout.manifest}: cannot be synced: {error}") from error
        self._files.remove_tree(path)

    async def _clean_up(self, manifest: Manifest, outdated: set[str]) -> None:
        """Removes what neither the manifest nor the log behind it names."""
        try:
            await self._housekeeping.run(remove_outdated, self._layout, self._files, manifest)
            for segment in outdated:
                await self._housekeeping.run(self._files.remove_tree, self._layout.segments / segment)
                self._segments.removed(segment)
        except PASSING as error:
            # The snapshot stands; the next one, or recovery, tries again.
            self.cleanup_error = reason(error)
        else:
            self.cleanup_error = ""
