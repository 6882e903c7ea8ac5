"""The persistence task: owns the log and the files of the data directory while the server runs.

On the loop an operation is given its place in the log when it is appended: the task knows how much of the
file in use is left and which files are prepared, so that a write is admitted only into space that is
allocated. All that is queued when the last batch is done is written, and synced as `appendfsync` says, in
one call in a worker thread; the callbacks that wait for it run after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import msgspec
import trio

from engram.errors import CommandError, DamagedDataError, LogFailureError, one_line
from engram.files import Files
from engram.operations import LARGEST_TOGETHER, InstallSegment, Operation, encode
from engram.persistence import log_format
from engram.persistence.layout import Layout
from engram.persistence.log_thread import LogThread
from engram.persistence.log_writer import LogWriter, PreparedFile, Run
from engram.persistence.manifest import read_manifest
from engram.persistence.recovery import Recovery, remove_outdated
from engram.persistence.snapshot import SnapshotError, install_snapshot, run_child

AppendFsync = Literal["always", "everysec", "no"]

# What is written together is one record, however many operations it holds.
_RECORD_OVERHEAD = log_format.RECORD_HEADER_SIZE + log_format.ARRAY_HEADER_SIZE
# What an operation may take beyond its size as the caller knows it; and some for small operations that a
# command finds it must log as well.
_ALLOWANCE = _RECORD_OVERHEAD + 1024
# A batch is recorded as durable by the next one, or by a mark when none comes for this long.
_MARK_DELAY = 0.1
_SYNC_INTERVAL = 1.0
_ALLOCATION_RETRY = 1.0
_SNAPSHOT_RETRY = 60.0
_TOO_LARGE = "ERR what would be changed at once does not fit into one record of the log, which holds 4 GiB"
# Segments that a snapshot would allow to be deleted start one when they have more bytes than this, and
# than half of those in use.
_RELEASED_BYTES = 64 << 20
# What the system may refuse, and grant when it is asked again: RuntimeError is for a thread.
_PASSING = (OSError, RuntimeError, MemoryError)


@attrs.define(kw_only=True)
class PersistenceSettings:
    """What may change while the server runs; each change counts from the next batch or check on.

    Attributes:
        appendfsync: "always": no reply leaves before what it shows is synced; "everysec": synced about
            once a second; "no": synced only when a file of the log is closed.
        log_file_size: bytes of a file of the log; a larger record gets a file of its own.
        queue_bytes: bytes admitted but not yet written.
        snapshot_log_size, snapshot_log_percentage: a snapshot is made by itself when the log since the last
            one has more bytes than the first and than the second says of that snapshot, or when it would let
            many segments be deleted; never when either is 0.
    """

    appendfsync: AppendFsync = "always"
    log_file_size: int = 64 << 20
    queue_bytes: int = 64 << 20
    snapshot_log_size: int = 256 << 20
    snapshot_log_percentage: int = 100


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def _file_size_for(size: int) -> int:
    return log_format.FILE_HEADER_SIZE + _ALLOWANCE + size


@attrs.define
class _SnapshotRun:
    done: trio.Event = attrs.Factory(trio.Event)
    error: str = "the server is shutting down"


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
        # Called with the seconds that a sync of the log took.
        self.on_sync: Callable[[float], None] = lambda seconds: None
        self._layout = Layout(directory)
        self._files = files
        self._snapshot_command = snapshot_command
        self._writer = LogWriter(self._layout, files, recovery)
        self._thread = LogThread(self._writer)
        self._housekeeping_limiter = trio.CapacityLimiter(2)

        # The plan: where the next operation goes. The writer follows it batch by batch.
        self._appended_lsn = recovery.lsn
        self._file_number = recovery.log_file
        # Bytes of records that were planned since the start; and what it was when the file in use was begun,
        # will be when that is full, and may become at most before the last run is a record that is full, -1
        # when none is open.
        self._end = 0
        self._file_start = -1
        self._file_end = 0
        self._run_end = -1
        self._spares: list[PreparedFile] = []
        self._runs: list[Run] = []
        # Those of the last run.
        self._payloads: list[bytes] = []

        # What the writer reached.
        self._written_lsn = recovery.lsn
        self._written_file_number = recovery.log_file
        self._written_end = 0
        self._durable_lsn = recovery.lsn
        self._recorded_lsn = recovery.recorded_durable_lsn
        self._last_commit_time = self._last_sync_time = 0.0
        self._batches = 0
        self._last_sync_seconds = 0.0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

        self._admission = trio.Lock()
        self._admitting = 0
        self._progress = trio.Event()
        self._work = trio.Event()
        self._prepare = trio.Event()
        self._prepared_files = 0
        self._wanted_size = 0
        self._allocation_failure: tuple[int, str] | None = None
        self._closing = False
        self._failure: LogFailureError | None = None

        self._nursery: trio.Nursery | None = None
        self._snapshot_run: _SnapshotRun | None = None
        self._manifest = recovery.manifest
        # What `_end` was where the current snapshot ends.
        self._log_start = -recovery.log_bytes
        self._named_in_log = list(recovery.segments)
        self._known_segments = {*recovery.manifest.segments, *(segment for _, segment in recovery.segments)}
        # The LSNs at which segments were out of use, and their bytes; and how many are too many.
        self._released: list[tuple[int, int]] = []
        self._most_released = _RELEASED_BYTES
        self._last_save_time = recovery.manifest.time
        self._last_save_ok = True
        self._last_save_error = ""
        self._cleanup_error = ""
        self._last_save_seconds = -1.0
        self._next_snapshot_time = 0.0

    @property
    def _queued_bytes(self) -> int:
        return self._end - self._written_end

    @property
    def _log_bytes(self) -> int:
        """Records that the current snapshot does not hold."""
        return self._end - self._log_start

    @property
    def _file_has_records(self) -> bool:
        return self._end > self._file_start

    @property
    def status(self) -> PersistenceStatus:
        return PersistenceStatus(
            appended_lsn=self._appended_lsn,
            durable_lsn=self._durable_lsn,
            queued_bytes=self._queued_bytes,
            batches=self._batches,
            last_fsync_seconds=self._last_sync_seconds,
            log_file=self._file_number,
            log_bytes=self._log_bytes,
            allocation_error=self._allocation_failure[1] if self._allocation_failure else "",
            snapshot_running=self._snapshot_run is not None,
            last_save_time=self._last_save_time,
            last_save_ok=self._last_save_ok,
            last_save_error=self._last_save_error,
            last_save_seconds=self._last_save_seconds,
            cleanup_error=self._cleanup_error,
            changes_since_save=self._appended_lsn - self._manifest.lsn,
        )

    # Admission

    def has_room(self, size: int) -> bool:
        """Whether an operation of about `size` bytes may be applied and appended now."""
        return not self._admitting and self._fits(size)

    async def admit(self, size: int) -> None:
        """Waits until there is room for an operation of about `size` bytes, first come, first served.

        The caller appends before its next checkpoint, or not at all.

        Raises:
            CommandError: MISCONF, no space can be allocated on disk. It is tried again about once a second.
        """
        self._admitting += 1
        try:
            async with self._admission:
                await self._wait_for_room(size)
        finally:
            self._admitting -= 1

    async def _wait_for_room(self, size: int) -> None:
        try:
            while not self._fits(size):
                if not self._fits_on_disk(size):
                    self._check_allocation(size)
                    self._wanted_size = size
                    self._prepare.set()
                await self._progress.wait()
        finally:
            self._wanted_size = 0

    def _fits(self, size: int) -> bool:
        if self._failure is not None:
            return False
        queued = self._queued_bytes
        # One operation larger than the whole queue is admitted when it is alone.
        if queued and queued + size > self.settings.queue_bytes:
            return False
        return self._fits_on_disk(size)

    def _fits_on_disk(self, size: int) -> bool:
        if size + _ALLOWANCE <= self._file_end - self._end:
            return True
        needed = _file_size_for(size)
        return any(spare.size >= needed for spare in self._spares)

    def _check_allocation(self, size: int) -> None:
        needed = max(_file_size_for(size), self.settings.log_file_size)
        if self._allocation_failure is not None and needed >= self._allocation_failure[0]:
            raise CommandError(f"MISCONF Errors writing to the log: {self._allocation_failure[1]}")

    # Appending

    def reserve(self, lsn: int, operation: Operation) -> bytes:
        """Encodes an operation that is about to be applied, and settles where it goes in the log.

        What is returned is for `append`, the next call, unless the operation is not applied after all.

        Raises:
            CommandError: it does not fit into one record.
            ValueError: `lsn` does not follow the last one.
        """
        self._check_next(lsn)
        payload = self.encode(operation)
        if self._end + len(payload) > self._run_end:
            self._open_run(len(payload))
        return payload

    def encode(self, operation: Operation, before: int = 0) -> bytes:
        """Encodes an operation for `append_together`; `before` is what those before it take.

        Raises:
            CommandError: what is to be recovered together does not fit into one record.
        """
        try:
            payload = encode(operation)
        except msgspec.MsgspecError as error:
            raise CommandError(_TOO_LARGE) from error
        if before + len(payload) > LARGEST_TOGETHER:
            raise CommandError(_TOO_LARGE)
        return payload

    def _check_next(self, lsn: int) -> None:
        if lsn != self._appended_lsn + 1:
            raise ValueError(f"LSN {lsn} does not follow {self._appended_lsn}")

    def _open_run(self, size: int) -> None:
        """Has the next operations, which take so many bytes together, go into another record."""
        size += _RECORD_OVERHEAD
        if size > self._file_end - self._end:
            self._plan_switch(size)
        elif self._payloads or not self._runs:
            self._plan_run()
        self._end += _RECORD_OVERHEAD
        self._run_end = min(self._file_end, self._end + LARGEST_TOGETHER)

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        """Queues an operation for the log, which has been reserved and applied."""
        self._payloads.append(payload)
        self._appended_lsn = lsn
        self._end += len(payload)
        if type(operation) is InstallSegment and operation.segment:
            self._named_in_log.append((lsn, operation.segment))
            self._known_segments.add(operation.segment)

    def append_together(self, first_lsn: int, payloads: Sequence[bytes]) -> None:
        """As `append` one after the other, in one record: they are recovered all or none.

        They have a place in the log from here on only, for they may have been gathered for long. No segment
        is put into effect by them.

        Raises ValueError when `first_lsn` does not follow the last one.
        """
        self._check_next(first_lsn)
        size = sum(map(len, payloads))
        if self._end + size > self._run_end:
            self._open_run(size)
        self._payloads += payloads
        self._appended_lsn = first_lsn + len(payloads) - 1
        self._end += size

    def _plan_run(self, next_file: PreparedFile | None = None) -> None:
        run = Run(self._appended_lsn + 1, next_file)
        self._runs.append(run)
        self._payloads, self._run_end = run.payloads, -1
        # Once is enough: the task looks at the runs before it waits.
        self._work.set()

    def _plan_switch(self, size: int) -> None:
        needed = size + log_format.FILE_HEADER_SIZE
        for spare in self._spares:
            if spare.size >= needed:
                self._spares.remove(spare)
                break
        else:
            # More than was admitted: the writer makes the file, and there being no space is final.
            spare = PreparedFile(self._next_prepared_path(), max(needed, self.settings.log_file_size))
        self._plan_run(spare)
        self._file_number += 1
        self._file_start = self._end
        self._file_end = self._end + spare.size - log_format.FILE_HEADER_SIZE
        self._prepare.set()

    # Release

    @property
    def appended_lsn(self) -> int:
        return self._appended_lsn

    @property
    def durable_lsn(self) -> int:
        return self._durable_lsn

    def released(self, lsn: int) -> bool:
        """Whether a reply that shows the state as of `lsn` may leave."""
        if lsn <= self._durable_lsn:
            return True
        return self.settings.appendfsync != "always" and self._failure is None

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
        while self._durable_lsn < lsn:
            await self._progress.wait()

    def reconsider(self) -> None:
        """To be called when `settings` have changed, which may let replies leave or ask for a sync."""
        self._release()
        self._work.set()

    def _release(self) -> None:
        waiting = self._waiting
        while waiting and self.released(waiting[0][0]):
            waiting.popleft()[1]()

    # The task

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
                    await nursery.start(self._prepare_files)
                    task_status.started()
                    try:
                        await self._write_log()
                    except LogFailureError as error:
                        self._fail(error)
                    nursery.cancel_scope.cancel()
            finally:
                self._nursery = None
                self._thread.stop()
                with trio.CancelScope(shield=True):
                    await self._in_thread_or_here(self._close_files)
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: LogFailureError) -> None:
        assert self._nursery is not None
        self._failure = error
        self._nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Lets `run` end once all that was appended is durable."""
        self._closing = True
        self._work.set()

    def _close_files(self) -> None:
        self._writer.close()
        unused = (*self._spares, *(run.next_file for run in self._runs if run.next_file is not None))
        for spare in unused:
            if spare.descriptor is not None:
                self._files.close(spare.descriptor)
                with suppress(OSError):
                    # It holds nothing: recovery removes it.
                    self._files.remove(spare.path)

    async def _write_log(self) -> None:
        self._last_sync_time = trio.current_time()
        while True:
            now = trio.current_time()
            # As the deadline below is computed, or rounding could make this wait for nothing.
            sync_due = now >= self._last_sync_time + _SYNC_INTERVAL
            unsynced = self._written_lsn > self._durable_lsn
            always = self.settings.appendfsync == "always" or self._closing
            everysec = self.settings.appendfsync == "everysec"
            unrecorded = self._recorded_lsn < self._durable_lsn == self._appended_lsn
            deadline = float("inf")
            if self._runs:
                await self._commit(sync=always or (everysec and sync_due))
                self._consider_snapshot()
                continue
            if unsynced and (always or (everysec and sync_due)):
                await self._commit(sync=True)
                continue
            if unrecorded and (self._closing or now >= self._last_commit_time + _MARK_DELAY):
                self._plan_mark()
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

    def _plan_mark(self) -> None:
        if self._file_end - self._end >= log_format.RECORD_HEADER_SIZE:
            self._plan_run()
            self._runs[-1].mark = True
            self._file_end -= log_format.RECORD_HEADER_SIZE
        elif self._spares:
            # The next file's header says it as well.
            self._plan_switch(0)
        else:
            self._recorded_lsn = self._durable_lsn

    async def _commit(self, *, sync: bool) -> None:
        # What is taken from the queue is written, whatever else ends.
        runs, self._runs, self._payloads, self._run_end = self._runs, [], [], -1
        lsn, file_number, end = self._appended_lsn, self._file_number, self._end
        commit = await self._thread.commit(runs, sync=sync)
        now = trio.current_time()
        self._last_commit_time = now
        if sync:
            self._last_sync_time = now
        if commit.sync_seconds is not None:
            self._last_sync_seconds = commit.sync_seconds
            self.on_sync(commit.sync_seconds)
        self._batches += 1
        self._written_end = end
        self._written_lsn = lsn
        self._written_file_number = file_number
        self._durable_lsn = commit.durable_lsn
        self._recorded_lsn = commit.recorded_lsn
        self._release()
        self._notify()

    def _notify(self) -> None:
        progress, self._progress = self._progress, trio.Event()
        progress.set()

    def _next_prepared_path(self) -> Path:
        self._prepared_files += 1
        return self._layout.prepared(self._prepared_files)

    def _size_to_prepare(self) -> int:
        """The size of the file to prepare next, 0 when there is none to prepare."""
        size = self.settings.log_file_size
        if self._wanted_size and not self._fits_on_disk(self._wanted_size):
            return max(size, _file_size_for(self._wanted_size))
        return 0 if self._spares else size

    async def _prepare_files(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keeps a file prepared for the log to go on in, and one of the size that `admit` waits for."""
        started = False
        while True:
            self._prepare = trio.Event()
            deadline = float("inf")
            if size := self._size_to_prepare():
                path = self._next_prepared_path()
                try:
                    descriptor = await trio.to_thread.run_sync(
                        self._files.create, path, size, limiter=self._housekeeping_limiter
                    )
                except _PASSING as error:
                    self._allocation_failure = (size, _reason(error))
                    deadline = trio.current_time() + _ALLOCATION_RETRY
                else:
                    self._allocation_failure = None
                    self._spares.append(PreparedFile(path, size, descriptor))
                    deadline = -float("inf")
                self._notify()
            else:
                self._allocation_failure = None
            if not started:
                started = True
                task_status.started()
            with trio.move_on_at(deadline):
                await self._prepare.wait()

    # Snapshots

    async def snapshot(self) -> None:
        """Makes a snapshot of what was appended so far and waits until it is current.

        Raises:
            CommandError: ERR, another one is being made, or it failed; serving can go on.
        """
        run = self._start_snapshot()
        await run.done.wait()
        if run.error:
            raise CommandError(f"ERR save failed: {run.error}")

    def request_snapshot(self) -> None:
        """Starts a snapshot in the background. Raises CommandError when one is being made."""
        self._start_snapshot()

    def _start_snapshot(self) -> _SnapshotRun:
        if self._snapshot_run is not None:
            raise CommandError("ERR Background save already in progress")
        if self._nursery is None:
            raise CommandError("ERR save failed: the server is shutting down")
        self._snapshot_run = _SnapshotRun()
        self._nursery.start_soon(self._make_snapshot, self._snapshot_run)
        return self._snapshot_run

    def release(self, size: int, used: int) -> None:
        """Segments of `size` bytes are no longer part of the state, of which segments have `used` bytes."""
        self._released.append((self._appended_lsn, size))
        self._most_released = max(_RELEASED_BYTES, used // 2)
        self._consider_snapshot()

    def _consider_snapshot(self) -> None:
        least, percentage = self.settings.snapshot_log_size, self.settings.snapshot_log_percentage
        grown = self._log_bytes > max(least, self._manifest.size * percentage // 100)
        released = sum(size for _, size in self._released) > self._most_released
        if not (least and percentage and (grown or released)):
            return
        idle = self._snapshot_run is None and self._nursery is not None and not self._closing
        if idle and trio.current_time() >= self._next_snapshot_time:
            self._start_snapshot()

    async def _make_snapshot(self, run: _SnapshotRun) -> None:
        started = trio.current_time()
        try:
            if self._appended_lsn > self._manifest.lsn:
                await self._replace_snapshot()
            self._last_save_time = int(time.time())
            run.error = ""
        except LogFailureError as error:
            run.error = str(error)
            self._fail(error)
        except Exception as error:
            # The state on disk is as before; whatever it was, serving goes on.
            run.error = _reason(error)
        finally:
            self._snapshot_run = None
            self._last_save_ok = not run.error
            self._last_save_error = run.error
            self._last_save_seconds = trio.current_time() - started
            self._next_snapshot_time = trio.current_time() + (_SNAPSHOT_RETRY if run.error else 0)
            run.done.set()

    async def _replace_snapshot(self) -> None:
        lsn, closed_file, log_bytes = await self._rotate()
        path = self._layout.snapshot(lsn)
        in_thread = partial(trio.to_thread.run_sync, limiter=self._housekeeping_limiter)
        await in_thread(self._files.remove_tree, path)
        try:
            result = await run_child(self._snapshot_command(closed_file))
            manifest = await in_thread(
                install_snapshot, self._layout, self._files, result, lsn, closed_file + 1
            )
        except LogFailureError:
            raise
        except Exception as error:
            # Nothing may go on before it is known what is current on disk.
            await self._in_thread_or_here(partial(self._undo_snapshot, path, error))
            raise
        self._manifest = manifest
        self._log_start += log_bytes
        self._released = [released for released in self._released if released[0] > lsn]
        self._named_in_log = [named for named in self._named_in_log if named[0] > lsn]
        named = {*manifest.segments, *(segment for _, segment in self._named_in_log)}
        outdated = self._known_segments - named
        try:
            await in_thread(remove_outdated, self._layout, self._files, manifest)
            for segment in outdated:
                await in_thread(self._files.remove_tree, self._layout.segments / segment)
                self._known_segments.discard(segment)
        except _PASSING as error:
            # The snapshot stands; the next one, or recovery, tries again.
            self._cleanup_error = _reason(error)
        else:
            self._cleanup_error = ""

    async def _in_thread_or_here(self, function: Callable[[], None]) -> None:
        """Carries out what must not be left out; where no thread can be started it holds everybody up."""
        try:
            await trio.to_thread.run_sync(function, limiter=self._housekeeping_limiter)
        except RuntimeError:
            function()

    def _undo_snapshot(self, path: Path, error: Exception) -> None:
        try:
            manifest = read_manifest(self._layout.manifest)
        except (DamagedDataError, OSError) as unread:
            # It may name the folder that is to be removed.
            raise LogFailureError(f"{self._layout.manifest}: cannot be read back: {unread}") from error
        if manifest is not None and manifest.snapshot == path.name:
            # Renamed but not synced: after a crash it is this one or the one before.
            raise LogFailureError(f"{self._layout.manifest}: cannot be synced: {error}") from error
        self._files.remove_tree(path)

    async def _rotate(self) -> tuple[int, int, int]:
        """Closes the file in use; returns its last LSN, its number, and the bytes of the log up to there."""
        async with self._admission:
            while self._file_has_records and not self._spares:
                if self._allocation_failure is not None:
                    raise SnapshotError(self._allocation_failure[1])
                self._prepare.set()
                await self._progress.wait()
            if self._file_has_records:
                self._plan_switch(0)
                self._work.set()
            lsn, number, log_bytes = self._appended_lsn, self._file_number, self._log_bytes
        while self._written_file_number < number:
            await self._progress.wait()
        return lsn, number - 1, log_bytes
