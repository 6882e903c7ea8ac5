from __future__ import annotations

import errno
import re
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from engram.columns import unpack_bytes
from engram.errors import (
    LogFailureError,
    LogFullError,
    RecordTooLargeError,
    SnapshotError,
    SnapshotRunningError,
)
from engram.operations import InstallSegment, Operation, SetString, decode, encode
from engram.persistence import queue
from engram.persistence.layout import Layout
from engram.persistence.log import Persistence
from engram.persistence.manifest import read_manifest
from engram.persistence.settings import AppendFsync, PersistenceSettings
from tests.persistence.conftest import HookedFiles, LogMaker, numbered, operation, read_back

# Stands in for the server's snapshot process: a folder of columns that holds the operations themselves.
SNAPSHOT_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from engram.columns import pack_bytes, unpack_bytes, write_columns
from engram.files import DiskFiles
from engram.operations import InstallSegment, encode
from engram.persistence.recovery import recover
from engram.persistence.snapshot import SnapshotResult

directory, files = Path(sys.argv[1]), DiskFiles()
operations, segments = [], []

def restore(folder):
    operations.extend(unpack_bytes("operations", folder.columns))
    segments.extend(folder.metadata["segments"])

def apply(lsn, operation):
    operations.append(encode(operation))
    if isinstance(operation, InstallSegment):
        segments[:] = [segment for segment in segments if segment not in operation.replaces]
        segments.append(operation.segment)

recovery = recover(directory, files, restore, apply, last_file=int(sys.argv[2]))
path = directory / f"snapshot-{recovery.lsn}"
files.make_folder(path)
checksum = write_columns(files, path, pack_bytes("operations", operations), {"segments": segments})
result = SnapshotResult(path.name, recovery.lsn, checksum, tuple(segments), 1000)
sys.stdout.buffer.write(result.encode())
"""


def snapshot_command(directory: Path) -> Callable[[int], list[str]]:
    return lambda last_file: [sys.executable, "-c", SNAPSHOT_PROGRAM, str(directory), str(last_file)]


def append(persistence: Persistence, *operations: Operation) -> None:
    """What `Database.commit` does with the log, or with several `Database.together`."""
    first_lsn = persistence.appended_lsn + 1
    if len(operations) == 1:
        persistence.append(first_lsn, operations[0], persistence.reserve(first_lsn, operations[0]))
        return
    payloads: list[bytes] = []
    for each in operations:
        payloads.append(persistence.encode(each, sum(map(len, payloads))))
    persistence.append_together(first_lsn, payloads)


@attrs.define
class Running:
    """A persistence task, and what a client of it does in a line."""

    persistence: Persistence
    released: list[int] = attrs.Factory(list)

    def append(self, count: int = 1, size: int = 5) -> None:
        for _ in range(count):
            lsn = self.persistence.appended_lsn + 1
            append(self.persistence, operation(lsn, size))
            self.persistence.on_release(lsn, lambda lsn=lsn: self.released.append(lsn))  # type: ignore[misc]

    async def durable(self, lsn: int) -> None:
        event = trio.Event()
        self.persistence.on_release(lsn, event.set)
        await event.wait()
        assert self.persistence.durable_lsn >= lsn


@asynccontextmanager
async def started(
    directory: Path,
    files: HookedFiles,
    settings: PersistenceSettings | None = None,
    command: Callable[[int], list[str]] | None = None,
) -> AsyncIterator[Running]:
    recovery = read_back(directory).recovery
    settings = settings or PersistenceSettings(log_file_size=1 << 16)
    persistence = Persistence(directory, files, settings, recovery, command or snapshot_command(directory))
    async with trio.open_nursery() as nursery:
        await nursery.start(persistence.run)
        yield Running(persistence)
        persistence.close()


class Gate:
    """Holds the first call of a file operation, in its thread, until it is opened."""

    def __init__(self, files: HookedFiles, name: str) -> None:
        self._name = name
        self._open = threading.Event()
        self._token = trio.lowlevel.current_trio_token()
        self.reached = trio.Event()
        files.hook = self

    def __call__(self, name: str, *arguments: object) -> None:
        if name == self._name and not self.reached.is_set():
            self._token.run_sync_soon(self.reached.set)
            self._open.wait()

    def open(self) -> None:
        self._open.set()


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def failing(name: str, code: int) -> Callable[..., None]:
    def fail(call: str, *_: object) -> None:
        if call == name:
            raise OSError(code, "No space left on device" if code == errno.ENOSPC else "Input/output error")

    return fail


async def test_what_is_appended_is_released_when_durable(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        persistence = running.persistence
        running.append(3)
        assert (persistence.appended_lsn, persistence.durable_lsn, running.released) == (3, 0, [])
        assert not persistence.released(1)
        await running.durable(3)
        assert running.released == [1, 2, 3]
        assert persistence.released(3)
    assert read_back(directory).operations == numbered(1, 3)


async def test_what_is_appended_together_is_in_one_record(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=4096)
    together = [SetString(b"k%d" % number, bytes(700)) for number in range(3)]
    async with started(directory, files, settings) as running:
        persistence = running.persistence
        running.append()
        for _ in range(3):
            # The second time the rest of the file does not hold all three.
            await persistence.admit(2500)
            append(persistence, *together)
        lsn = persistence.appended_lsn
        persistence.on_release(lsn, partial(running.released.append, lsn))
        await running.durable(lsn)
    written = [call[2] for call in files.calls if call[0] == "write_at"]
    whole = b"".join(map(encode, together))
    assert sum(bytes(data).count(whole) for data in written) == 3
    assert len(read_back(directory).operations) == lsn == 10


@pytest.mark.parametrize("size", [10, 3000])
async def test_what_is_appended_together_may_be_encoded_turns_before(
    directory: Path, files: HookedFiles, size: int
) -> None:
    """As by an EXEC of many turns."""
    settings = PersistenceSettings(log_file_size=4096)
    together = [SetString(b"k%d" % number, bytes(size)) for number in range(3)]
    async with started(directory, files, settings) as running:
        persistence = running.persistence
        running.append()
        await running.durable(1)
        await persistence.admit(3 * size)
        payloads: list[bytes] = []
        for each in together:
            payloads.append(persistence.encode(each, sum(map(len, payloads))))
            await trio.testing.wait_all_tasks_blocked(0.01)
        persistence.append_together(2, payloads)
        running.append()
        with trio.fail_after(30):
            await running.durable(5)
    assert [lsn for lsn, _ in read_back(directory).operations] == [1, 2, 3, 4, 5]
    assert whole_log(directory).count(b"".join(map(encode, together))) == 1


async def test_all_that_waits_during_a_write_shares_the_next_sync(
    directory: Path, files: HookedFiles
) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        gate = Gate(files, "write_at")
        running.append()
        await gate.reached.wait()
        writes, syncs, batches = (
            files.count("write_at"),
            files.count("sync_data"),
            running.persistence.status.batches,
        )
        running.append(100)
        assert running.released == [1]
        gate.open()
        await running.durable(102)
        assert files.count("write_at") == writes + 1
        assert files.count("sync_data") == syncs + 2
        assert running.persistence.status.batches == batches + 2
    assert running.released == list(range(1, 103))
    assert read_back(directory).operations == numbered(1, 102)


async def test_nothing_is_released_while_its_sync_runs(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        gate = Gate(files, "sync_data")
        running.append()
        await gate.reached.wait()
        assert running.released == [1]
        assert running.persistence.durable_lsn == 1
        gate.open()
        await running.durable(2)
        assert running.released == [1, 2]


async def test_a_callback_for_what_is_released_runs_at_once(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        calls: list[str] = []
        running.persistence.on_release(0, lambda: calls.append("durable"))
        assert calls == ["durable"]


async def test_an_lsn_out_of_turn_is_a_mistake(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        with pytest.raises(ValueError, match="LSN 2 does not follow 0"):
            running.persistence.reserve(2, operation(2))


async def test_closing_writes_and_records_all(directory: Path, files: HookedFiles) -> None:
    async with started(
        directory, files, PersistenceSettings(appendfsync="no", log_file_size=1 << 16)
    ) as running:
        running.append(5)
    recovered = read_back(directory)
    assert recovered.operations == numbered(1, 5)
    assert recovered.recovery.recorded_durable_lsn == 5
    assert {"wal-0000000001.log", "wal-0000000002.log", "MANIFEST", "segments"} == names(directory)


async def test_a_batch_that_was_taken_is_written_even_when_all_is_cancelled(
    directory: Path, files: HookedFiles
) -> None:
    async with trio.open_nursery() as outer, started(directory, files) as running:
        running.append(3)
        outer.cancel_scope.cancel()
        await trio.lowlevel.checkpoint()
    assert read_back(directory).operations == numbered(1, 3)


async def test_nothing_is_made_when_nothing_is_written(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files):
        pass
    before = names(directory)
    async with started(directory, files):
        pass
    assert names(directory) == before


async def test_an_idle_log_is_marked_once(
    directory: Path, files: HookedFiles, autojump_clock: trio.testing.MockClock
) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        writes = files.count("write_at")
        gate = Gate(files, "write_at")
        gate.open()
        await gate.reached.wait()
    assert files.count("write_at") == writes + 1
    assert read_back(directory).recovery.recorded_durable_lsn == 1


async def test_what_recovery_found_unrecorded_is_recorded(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory)
    log.write([encode(operation(1))])
    log.close()
    assert read_back(directory).recovery.recorded_durable_lsn == 0
    async with started(directory, files):
        pass
    assert read_back(directory).recovery.recorded_durable_lsn == 1


async def test_everysec_releases_at_once_and_syncs_later(
    directory: Path, files: HookedFiles, autojump_clock: trio.testing.MockClock
) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16)
    async with started(directory, files, settings) as running:
        running.append()
        await running.durable(1)
        settings.appendfsync = "everysec"
        before = len(files.calls)
        written = Gate(files, "write_at")
        running.append()
        assert running.released == [1, 2]
        await written.reached.wait()
        running.append(2)
        assert running.released == [1, 2, 3, 4]
        written.open()
        synced = Gate(files, "sync_data")
        await synced.reached.wait()
        assert [call[0] for call in files.calls[before:]] == ["write_at", "write_at", "sync_data"]
        assert running.persistence.durable_lsn == 1
        synced.open()
        await running.persistence.wait_durable(4)
    assert read_back(directory).operations == numbered(1, 4)


async def test_no_syncs_only_when_a_file_is_closed(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(appendfsync="no", log_file_size=4096)
    async with started(directory, files, settings) as running:
        running.append()
        gate = Gate(files, "write_at")
        gate.open()
        await gate.reached.wait()
        for _ in range(8):
            await running.persistence.admit(1000)
            running.append(size=1000)
        assert running.released == list(range(1, 10))
        await running.persistence.wait_durable(3)
        assert running.persistence.durable_lsn < 9
    assert read_back(directory).recovery.recorded_durable_lsn == 9


async def test_switching_to_always_makes_a_reader_wait_for_a_sync(
    directory: Path, files: HookedFiles
) -> None:
    settings = PersistenceSettings(appendfsync="no", log_file_size=1 << 16)
    async with started(directory, files, settings) as running:
        running.append()
        settings.appendfsync = "always"
        assert not running.persistence.released(1)
        await running.durable(1)


async def test_who_waits_for_a_sync_sees_a_switch_to_always(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(appendfsync="no", log_file_size=1 << 16)
    async with started(directory, files, settings) as running:
        running.append()
        settings.appendfsync = "always"
        await running.persistence.wait_durable(1)
        assert running.persistence.durable_lsn == 1


async def test_switching_from_always_releases_what_waits(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16)
    async with started(directory, files, settings) as running:
        gate = Gate(files, "sync_data")
        running.append()
        await gate.reached.wait()
        settings.appendfsync = "everysec"
        running.persistence.reconsider()
        assert running.released == [1]
        gate.open()
        await running.persistence.wait_durable(1)


async def test_switching_to_always_syncs_what_is_written(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(appendfsync="no", log_file_size=1 << 16)
    async with started(directory, files, settings) as running:
        running.append()
        while running.persistence.status.queued_bytes:
            await trio.lowlevel.checkpoint()
        gate = Gate(files, "sync_data")
        settings.appendfsync = "always"
        running.persistence.reconsider()
        await gate.reached.wait()
        gate.open()


# Admission


async def fill(running: Running, size: int) -> None:
    """Writes until there is no space left, which a hook has decreed."""
    reason = ""
    while not reason:
        try:
            await running.persistence.admit(size)
        except LogFullError as error:
            reason = error.reason
        else:
            running.append(size=size)
    assert reason == "No space left on device"


async def test_the_queue_has_a_budget(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16, queue_bytes=1000)
    async with started(directory, files, settings) as running:
        persistence = running.persistence
        assert persistence.has_room(5000), "one operation larger than the budget must pass"
        gate = Gate(files, "write_at")
        running.append(size=900)
        await gate.reached.wait()
        assert not persistence.has_room(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(persistence.admit, 100)
            await trio.testing.wait_all_tasks_blocked()
            assert running.released == []
            gate.open()
        assert running.released == [1]
        assert persistence.has_room(100)


async def test_admission_is_first_come_first_served(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16, queue_bytes=1000)
    async with started(directory, files, settings) as running:
        persistence = running.persistence
        order: list[int] = []

        async def write(size: int) -> None:
            await persistence.admit(size)
            order.append(size)
            running.append(size=size)

        gate = Gate(files, "write_at")
        running.append(size=500)
        await gate.reached.wait()
        async with trio.open_nursery() as nursery:
            for size in (800, 10, 20):
                nursery.start_soon(write, size)
                await trio.testing.wait_all_tasks_blocked()
            assert order == []
            assert not persistence.has_room(10), "a small write must not overtake a large one"
            gate.open()
        assert order == [800, 10, 20]
    assert running.released == [1, 2, 3, 4]


async def test_a_cancelled_admission_leaves_the_line(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16, queue_bytes=1000)
    async with started(directory, files, settings) as running:
        gate = Gate(files, "write_at")
        running.append(size=500)
        await gate.reached.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.persistence.admit, 900)
            await trio.testing.wait_all_tasks_blocked()
            assert not running.persistence.has_room(10)
            nursery.cancel_scope.cancel()
        assert running.persistence.has_room(10)
        gate.open()


async def test_one_who_leaves_the_line_does_not_take_the_wish_of_the_first_along(
    directory: Path, files: HookedFiles
) -> None:
    async with started(directory, files) as running:
        persistence = running.persistence
        running.append()
        await running.durable(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(persistence.admit, 1 << 20)
            with trio.CancelScope() as second:
                second.cancel()
                await persistence.admit(10)
        assert persistence.has_room(1 << 20)


async def test_an_operation_larger_than_a_file_gets_a_file_of_its_size(
    directory: Path, files: HookedFiles
) -> None:
    settings = PersistenceSettings(log_file_size=4096)
    async with started(directory, files, settings) as running:
        running.append()
        assert not running.persistence.has_room(50_000)
        await running.persistence.admit(50_000)
        running.append(size=50_000)
        await running.persistence.admit(1)
        running.append()
        await running.durable(3)
    sizes = [call[2] for call in files.calls if call[0] == "create"]
    assert sum(size > 4096 for size in sizes) == 1
    assert 50_000 < max(sizes) < 60_000
    assert [each[1].value for each in read_back(directory).operations] == [  # type: ignore[union-attr]
        bytes([1]) * 5,
        bytes([2]) * 50_000,
        bytes([3]) * 5,
    ]


async def test_more_than_was_admitted_is_written_all_the_same(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files, PersistenceSettings(log_file_size=4096)) as running:
        assert running.persistence.has_room(1)
        running.append(20, size=1000)
        await running.durable(20)
    assert len(read_back(directory).operations) == 20


async def test_without_space_writes_are_refused_until_there_is(
    directory: Path, files: HookedFiles, autojump_clock: trio.testing.MockClock
) -> None:
    read_back(directory)
    files.hook = failing("create", errno.ENOSPC)
    async with started(directory, files) as running:
        persistence = running.persistence
        for _ in range(2):
            assert not persistence.has_room(10)
            with pytest.raises(LogFullError, match=exactly("No space left on device")):
                await persistence.admit(10)
        assert persistence.status.allocation_error == "No space left on device"
        files.hook = lambda *_: None
        await trio.sleep(2)
        while not persistence.has_room(10):
            await trio.lowlevel.checkpoint()
        running.append()
        await running.durable(1)
        assert persistence.status.allocation_error == ""


async def test_a_full_disk_leaves_what_is_allocated(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        files.hook = failing("create", errno.ENOSPC)
        running.append()
        await running.durable(1)
        await fill(running, 1000)
        await running.durable(running.persistence.appended_lsn)
        assert running.persistence.appended_lsn > 50
    assert len(read_back(directory).operations) == running.persistence.appended_lsn


async def test_no_space_for_a_large_operation_does_not_stop_small_ones(
    directory: Path, files: HookedFiles, autojump_clock: trio.testing.MockClock
) -> None:
    def full(name: str, *arguments: object) -> None:
        if name == "create" and isinstance(arguments[1], int) and arguments[1] > 1 << 16:
            raise OSError(errno.ENOSPC, "No space left on device")

    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        files.hook = full
        with pytest.raises(LogFullError):
            await running.persistence.admit(1 << 20)
        assert running.persistence.has_room(100)
        await running.persistence.admit(100)
        running.append()
        files.hook = lambda *_: None
        await trio.sleep(2)
        while running.persistence.status.allocation_error:
            await trio.lowlevel.checkpoint()
        await running.persistence.admit(1 << 20)
        running.append(size=1 << 20)
        await running.durable(3)


# Failure


@pytest.mark.parametrize("name", ["write_at", "sync_data"])
async def test_a_failing_log_is_final(directory: Path, files: HookedFiles, name: str) -> None:
    recovery = read_back(directory).recovery
    persistence = Persistence(
        directory, files, PersistenceSettings(log_file_size=1 << 16), recovery, snapshot_command(directory)
    )
    running = Running(persistence)
    with pytest.RaisesGroup(LogFailureError):
        async with trio.open_nursery() as nursery:
            await nursery.start(persistence.run)
            running.append()
            await running.durable(1)
            files.hook = failing(name, errno.EIO)
            before = len(files.calls)
            running.append(2)
            await trio.sleep_forever()
    assert running.released == [1]
    assert persistence.durable_lsn == 1
    persistence.settings.appendfsync = "no"
    assert not persistence.released(2)
    assert not persistence.has_room(1)
    tried = [call[0] for call in files.calls[before:]]
    assert tried.count(name) == 1


async def test_no_space_for_what_was_not_admitted_is_final(directory: Path, files: HookedFiles) -> None:
    recovery = read_back(directory).recovery
    files.hook = failing("create", errno.ENOSPC)
    persistence = Persistence(directory, files, PersistenceSettings(), recovery, snapshot_command(directory))
    running = Running(persistence)
    with pytest.RaisesGroup(pytest.RaisesExc(LogFailureError, match="No space left on device")):
        async with trio.open_nursery() as nursery:
            await nursery.start(persistence.run)
            running.append()
    assert running.released == []


# Snapshots


def install(persistence: Persistence, segment: str, *replaces: str) -> None:
    append(persistence, InstallSegment(1, segment, 0, 0, replaces))


def restored(directory: Path) -> list[Operation]:
    """All operations of a directory: those in the snapshot and those in the log."""
    recovered = read_back(directory)
    held = [
        decode(each) for folder in recovered.snapshots for each in unpack_bytes("operations", folder.columns)
    ]
    return held + [each for _, each in recovered.operations]


async def test_a_snapshot_takes_the_place_of_the_log(directory: Path, files: HookedFiles) -> None:
    layout = Layout(directory)
    async with started(directory, files) as running:
        running.append(10)
        await running.persistence.snapshot()
        status = running.persistence.status
        assert (status.changes_since_save, status.log_bytes, status.last_save_ok) == (0, 0, True)
        assert status.last_save_time > 0
        assert status.last_save_seconds > 0
        manifest = read_manifest(layout.manifest)
        assert manifest is not None
        assert (manifest.snapshot, manifest.lsn, manifest.size) == ("snapshot-10", 10, 1000)
        assert layout.log_numbers() == [manifest.first_log_file]
        running.append(5)
        assert running.persistence.status.changes_since_save == 5
    recovered = read_back(directory)
    assert recovered.recovery.lsn == 15
    assert recovered.operations == numbered(11, 15)
    assert restored(directory) == [each for _, each in numbered(1, 15)]


async def test_writes_go_on_while_snapshots_follow_each_other(directory: Path, files: HookedFiles) -> None:
    layout = Layout(directory)
    async with started(directory, files, PersistenceSettings(log_file_size=4096)) as running:

        async def write(*, task_status: trio.TaskStatus[None]) -> None:
            while True:
                await running.persistence.admit(100)
                running.append(size=100)
                await running.durable(running.persistence.appended_lsn)
                if running.persistence.appended_lsn == 20:
                    task_status.started()

        async with trio.open_nursery() as nursery:
            await nursery.start(write)
            for _ in range(2):
                before = running.persistence.appended_lsn
                await running.persistence.snapshot()
                manifest = read_manifest(layout.manifest)
                assert manifest is not None
                assert before <= manifest.lsn < running.persistence.appended_lsn
                assert [path.name for path in layout.snapshots()] == [manifest.snapshot]
                assert layout.log_numbers()[0] == manifest.first_log_file
            nursery.cancel_scope.cancel()
        last = running.persistence.appended_lsn
    assert restored(directory) == [operation(lsn, 100) for lsn in range(1, last + 1)]


async def test_one_snapshot_at_a_time(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        running.append()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.persistence.snapshot)
            await trio.testing.wait_all_tasks_blocked()
            assert running.persistence.status.snapshot_running
            with pytest.raises(SnapshotRunningError):
                await running.persistence.snapshot()
            with pytest.raises(SnapshotRunningError):
                running.persistence.request_snapshot()
        assert not running.persistence.status.snapshot_running
        assert running.persistence.status.last_save_ok


async def test_a_snapshot_with_nothing_new_is_done_at_once(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files, command=lambda _: ["/nonexistent/program"]) as running:
        assert running.persistence.status.last_save_time == 0
        assert running.persistence.status.last_save_seconds == -1
        await running.persistence.snapshot()
        assert running.persistence.status.last_save_ok
        assert running.persistence.status.last_save_time > 0
    assert read_back(directory).snapshots == []


async def test_a_failing_snapshot_leaves_all_as_it_was(directory: Path, files: HookedFiles) -> None:
    layout = Layout(directory)
    program = f"import os, sys; os.mkdir({str(layout.snapshot(3))!r}); sys.exit('out of wit')"
    commands = [[sys.executable, "-c", program], []]
    async with started(directory, files, command=lambda last: commands[0]) as running:
        running.append(3)
        with pytest.raises(SnapshotError, match=exactly("out of wit")):
            await running.persistence.snapshot()
        status = running.persistence.status
        assert (status.last_save_ok, status.last_save_error) == (False, "out of wit")
        assert status.changes_since_save == 3
        assert layout.snapshots() == []
        commands[0] = snapshot_command(directory)(layout.log_numbers()[-1] - 1)
        await running.persistence.snapshot()
        assert running.persistence.status.last_save_ok
        running.append()
        await running.durable(4)
    assert restored(directory) == [each for _, each in numbered(1, 4)]


async def test_a_manifest_that_cannot_be_written_leaves_the_old_state(
    directory: Path, files: HookedFiles
) -> None:
    layout = Layout(directory)
    async with started(directory, files) as running:
        running.append(3)
        await running.durable(3)
        files.hook = failing("write_file", errno.ENOSPC)
        with pytest.raises(SnapshotError, match=exactly("No space left on device")):
            await running.persistence.snapshot()
        assert layout.snapshots() == []
        running.append()
        await running.durable(4)
    assert read_back(directory).operations == numbered(1, 4)


async def test_a_manifest_in_doubt_is_final(directory: Path, files: HookedFiles) -> None:
    recovery = read_back(directory).recovery
    persistence = Persistence(
        directory, files, PersistenceSettings(log_file_size=1 << 16), recovery, snapshot_command(directory)
    )
    running = Running(persistence)
    renamed = False

    def fail(name: str, *arguments: object) -> None:
        nonlocal renamed
        if name == "sync_folder" and renamed:
            raise OSError(errno.EIO, "Input/output error")
        renamed = renamed or (name == "rename" and arguments[1] == Layout(directory).manifest)

    with pytest.RaisesGroup(pytest.RaisesExc(LogFailureError, match="MANIFEST: cannot be synced")):
        async with trio.open_nursery() as nursery:
            await nursery.start(persistence.run)
            running.append(3)
            files.hook = fail
            persistence.request_snapshot()
    # Whichever of the two a crash leaves, all that it names is there.
    assert Layout(directory).log_numbers()[0] == 1
    assert restored(directory) == [each for _, each in numbered(1, 3)]


async def test_segments_go_when_nothing_names_them(directory: Path, files: HookedFiles) -> None:
    layout = Layout(directory)

    def present() -> set[str]:
        return {path.name for path in layout.segment_folders()}

    async with started(directory, files) as running:
        persistence = running.persistence
        for name in ("a", "b", "fresh", "next.building"):
            (layout.segments / name).mkdir()
        install(persistence, "a")
        install(persistence, "b", "a")
        await persistence.snapshot()
        assert present() == {"b", "fresh", "next.building"}
        install(persistence, "fresh", "b")
        await running.durable(3)
        assert present() == {"b", "fresh", "next.building"}
        await persistence.snapshot()
        assert present() == {"fresh", "next.building"}
    assert read_back(directory).recovery.manifest.segments == ("fresh",)
    assert present() == {"fresh"}


async def test_what_cannot_be_removed_is_removed_by_the_next_snapshot(
    directory: Path, files: HookedFiles
) -> None:
    layout = Layout(directory)
    async with started(directory, files) as running:
        persistence = running.persistence
        running.append()
        await persistence.snapshot()
        running.append()
        await running.durable(2)
        files.hook = failing("remove", errno.EIO)

        def fail(name: str, *arguments: object) -> None:
            if name == "remove" and arguments[0] != layout.manifest.with_name("MANIFEST.new"):
                raise OSError(errno.EIO, "Input/output error")

        files.hook = fail
        await persistence.snapshot()
        assert persistence.status.cleanup_error == "Input/output error"
        assert persistence.status.last_save_ok
        assert len(layout.log_numbers()) > 1
        files.hook = lambda *_: None
        running.append()
        await persistence.snapshot()
        assert persistence.status.cleanup_error == ""
        assert len(layout.log_numbers()) == 1
    assert restored(directory) == [each for _, each in numbered(1, 3)]


async def test_a_grown_log_makes_a_snapshot_by_itself(directory: Path, files: HookedFiles) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16, snapshot_log_size=2000)
    async with started(directory, files, settings) as running:
        running.append(size=900)
        await running.durable(1)
        assert not running.persistence.status.snapshot_running
        running.append(size=1200)
        await running.durable(2)
        assert running.persistence.status.snapshot_running
        with pytest.raises(SnapshotRunningError):
            running.persistence.request_snapshot()
        while running.persistence.status.snapshot_running:
            await trio.lowlevel.checkpoint()
        assert running.persistence.status.last_save_error == ""
        assert running.persistence.status.changes_since_save == 0


@pytest.mark.parametrize(("percentage", "started_one"), [(0, False), (50, True), (60, False), (100, False)])
async def test_the_larger_a_snapshot_the_later_the_next(
    directory: Path, files: HookedFiles, percentage: int, started_one: bool
) -> None:
    settings = PersistenceSettings(log_file_size=1 << 16, snapshot_log_size=100)
    async with started(directory, files, settings) as running:
        running.append(size=2000)
        await running.durable(1)
        while running.persistence.status.snapshot_running:
            await trio.lowlevel.checkpoint()
        # It said that it has 1000 bytes.
        assert running.persistence.status.changes_since_save == 0
        settings.snapshot_log_percentage = percentage
        running.append(size=500)
        await running.durable(2)
        assert running.persistence.status.snapshot_running == started_one


@pytest.mark.parametrize(("size", "used", "started_one"), [(64, 0, False), (65, 0, True), (99, 200, False)])
async def test_segments_out_of_use_make_a_snapshot_by_itself(
    directory: Path, files: HookedFiles, size: int, used: int, started_one: bool
) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        running.persistence.release(size << 20, used << 20)
        assert running.persistence.status.snapshot_running == started_one


async def test_segments_that_a_snapshot_lets_go_of_count_no_longer(
    directory: Path, files: HookedFiles
) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        running.persistence.release(60 << 20, 0)
        await running.persistence.snapshot()
        running.append()
        await running.durable(2)
        running.persistence.release(60 << 20, 0)
        assert not running.persistence.status.snapshot_running


async def test_a_failed_automatic_snapshot_is_not_tried_again_at_once(
    directory: Path, files: HookedFiles
) -> None:
    tried: list[int] = []

    def command(last_file: int) -> list[str]:
        tried.append(last_file)
        return ["/nonexistent/program"]

    settings = PersistenceSettings(log_file_size=1 << 16, snapshot_log_size=100)
    async with started(directory, files, settings, command) as running:
        for lsn in range(1, 10):
            running.append(size=200)
            await running.durable(lsn)
        while running.persistence.status.snapshot_running:
            await trio.lowlevel.checkpoint()
        assert len(tried) == 1
        assert "cannot be started" in running.persistence.status.last_save_error


async def test_a_snapshot_needs_space_for_the_next_file(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        running.append()
        await running.durable(1)
        files.hook = failing("create", errno.ENOSPC)
        await fill(running, 5000)
        with pytest.raises(SnapshotError, match=exactly("No space left on device")):
            await running.persistence.snapshot()
        await running.durable(running.persistence.appended_lsn)


async def test_closing_ends_a_running_snapshot(directory: Path, files: HookedFiles) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    failures: list[str] = []

    async def save(persistence: Persistence) -> None:
        try:
            await persistence.snapshot()
        except SnapshotError as error:
            failures.append(error.reason)

    async with (
        trio.open_nursery() as nursery,
        started(directory, files, command=lambda _: command) as running,
    ):
        running.append(3)
        nursery.start_soon(save, running.persistence)
        await running.durable(3)
        await trio.testing.wait_all_tasks_blocked()
    assert failures == ["the server is shutting down"]
    assert read_back(directory).operations == numbered(1, 3)


# All of it


@given(
    st.lists(
        st.lists(st.one_of(st.integers(0, 3000), st.just("durable")), max_size=20), min_size=1, max_size=4
    ),
    st.sampled_from(["always", "everysec", "no"]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_whatever_is_written_is_there_after_each_restart(
    lives: list[list[int | str]], appendfsync: AppendFsync
) -> None:
    async def live(directory: Path, steps: list[int | str]) -> None:
        settings = PersistenceSettings(log_file_size=4096, appendfsync=appendfsync)
        async with started(directory, HookedFiles(), settings) as running:
            for step in steps:
                if isinstance(step, int):
                    await running.persistence.admit(step)
                    lsn = running.persistence.appended_lsn + 1
                    written.append(operation(lsn, step))
                    append(running.persistence, written[-1])
                else:
                    released = trio.Event()
                    running.persistence.on_release(len(written), released.set)
                    await released.wait()

    written: list[Operation] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        Layout(directory).segments.mkdir()
        for steps in lives:
            trio.run(live, directory, steps)
            recovered = read_back(directory)
            assert [each for _, each in recovered.operations] == written
            assert recovered.recovery.torn_bytes == 0


# What fits into a record


def whole_log(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob("wal-*.log")))


async def test_what_is_recovered_together_fits_into_a_record(
    directory: Path, files: HookedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LARGEST_TOGETHER", 1000)
    async with started(directory, files) as running:
        persistence = running.persistence
        with pytest.raises(RecordTooLargeError):
            persistence.reserve(1, SetString(b"k", bytes(1000)))
        with pytest.raises(RecordTooLargeError):
            persistence.encode(SetString(b"k", bytes(500)), 500)
        # Nothing came of it; and what is gathered goes into as many records as it takes.
        running.append(5, size=900)
        append(persistence, SetString(b"a", bytes(400)), SetString(b"b", bytes(400)))
        await running.durable(persistence.appended_lsn)
        assert persistence.status.queued_bytes == 0
    assert len(read_back(directory).operations) == 7
    log = whole_log(directory)
    together = b"".join(map(encode, (SetString(b"a", bytes(400)), SetString(b"b", bytes(400)))))
    assert log.count(together) == 1


async def test_a_place_in_the_log_that_is_not_used_costs_nothing(directory: Path, files: HookedFiles) -> None:
    async with started(directory, files) as running:
        persistence = running.persistence
        running.append()
        before = persistence.status.queued_bytes
        for size in (10, 1 << 15, 1 << 17, 10):
            persistence.reserve(2, SetString(b"k", bytes(size)))
        assert persistence.status.queued_bytes - before < 200
        running.append(3)
        await running.durable(4)
    assert len(read_back(directory).operations) == 4
