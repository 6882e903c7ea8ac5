from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
import trio.testing

from engram.errors import LogFailureError
from engram.files import DiskFiles
from engram.persistence.durability import Durability
from engram.persistence.layout import Layout
from engram.persistence.log_thread import LogThread
from engram.persistence.log_writer import Commit, LogWriter, Run
from engram.persistence.settings import AppendFsync, PersistenceSettings
from tests.persistence.conftest import operation
from tests.persistence.parts import DIRECTORY, Parts, recovered


@attrs.frozen
class Call:
    """What the thread of the log was asked for: when, up to which LSN, and whether with marks or a sync."""

    time: float
    lsn: int
    sync: bool
    mark: bool = False


class PretendThread(LogThread):
    """Writes to nothing; `seconds` is what a call takes."""

    def __init__(self) -> None:
        super().__init__(LogWriter(Layout(DIRECTORY), DiskFiles(), recovered()))
        self.calls: list[Call] = []
        self._began = trio.current_time()
        self.seconds = 0.0
        self.failure: LogFailureError | None = None
        self._lsn = self._durable = self._recorded = 0

    async def commit(self, runs: Sequence[Run], *, sync: bool) -> Commit:
        await trio.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        self._lsn += sum(len(run.payloads) for run in runs)
        if runs:
            self._recorded = self._durable
        if sync:
            self._durable = self._lsn
        mark = any(run.mark for run in runs)
        self.calls.append(Call(round(trio.current_time() - self._began, 3), self._lsn, sync, mark))
        return Commit(self._durable, self._recorded, 0.25 if sync else None)


@attrs.define
class Bench:
    parts: Parts
    thread: PretendThread
    durability: Durability
    released: list[int] = attrs.Factory(list)
    syncs: list[float] = attrs.Factory(list)
    written: list[int] = attrs.Factory(list)

    def append(self) -> int:
        queue = self.parts.queue
        lsn = queue.appended_lsn + 1
        queue.append(lsn, operation(lsn), queue.reserve(lsn, operation(lsn)))
        self.durability.on_release(lsn, partial(self.released.append, lsn))
        return lsn


@asynccontextmanager
async def working(appendfsync: AppendFsync = "always") -> AsyncIterator[Bench]:
    """A log that is written; it is closed at the end."""
    settings = PersistenceSettings(log_file_size=4096, appendfsync=appendfsync)
    parts, thread = Parts(settings=settings), PretendThread()
    syncs: list[float] = []
    written: list[int] = []
    durability = Durability(
        settings,
        thread,
        parts.queue,
        recovered(),
        parts.progress,
        on_sync=syncs.append,
        on_written=lambda: written.append(parts.queue.appended_lsn),
    )
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        async with trio.open_nursery() as writer:
            writer.start_soon(durability.run)
            yield Bench(parts, thread, durability, syncs=syncs, written=written)
            durability.close()
        nursery.cancel_scope.cancel()


async def test_what_is_queued_is_written_synced_and_released(autojump_clock: trio.testing.MockClock) -> None:
    async with working() as bench:
        bench.thread.seconds = 1.0
        assert [bench.append() for _ in range(2)] == [1, 2]
        await trio.sleep(0.5)
        # It waits for the call that runs.
        bench.append()
        assert (bench.released, bench.durability.durable_lsn) == ([], 0)
        await trio.sleep(0.6)
        assert (bench.released, bench.durability.durable_lsn) == ([1, 2], 2)
        await bench.durability.wait_durable(3)
        assert bench.released == [1, 2, 3]
        assert bench.thread.calls == [Call(1.0, 2, sync=True), Call(2.0, 3, sync=True)]
        assert (bench.durability.batches, bench.durability.last_sync_seconds, bench.syncs) == (
            2,
            0.25,
            [0.25] * 2,
        )
        assert bench.written == [3, 3]
        assert bench.parts.queue.queued_bytes == 0


async def test_what_is_durable_is_recorded_by_a_mark_when_nothing_follows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with working() as bench:
        bench.append()
        await trio.sleep(0.05)
        bench.append()
        await trio.sleep(5)
        assert bench.thread.calls == [
            Call(0.0, 1, sync=True),
            Call(0.05, 2, sync=True),
            Call(0.15, 2, sync=True, mark=True),
        ]


async def test_everysec_syncs_a_second_after_the_last_sync(autojump_clock: trio.testing.MockClock) -> None:
    async with working("everysec") as bench:
        await trio.sleep(0.3)
        bench.append()
        assert bench.released == [1]
        await trio.sleep(0.3)
        bench.append()
        assert bench.durability.durable_lsn == 0
        await trio.sleep(0.5)
        assert bench.durability.durable_lsn == 2
        await trio.sleep(3)
        bench.append()
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        # The last sync is long ago.
        assert bench.durability.durable_lsn == 3
        assert [(call.time, call.lsn, call.sync) for call in bench.thread.calls if not call.mark] == [
            (0.3, 1, False),
            (0.6, 2, False),
            (1.0, 2, True),
            (4.1, 3, True),
        ]


async def test_no_never_syncs_until_it_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    async with working("no") as bench:
        bench.append()
        await trio.sleep(60)
        assert bench.released == [1]
        assert [call.sync for call in bench.thread.calls] == [False]
    assert [(call.lsn, call.sync, call.mark) for call in bench.thread.calls] == [
        (1, False, False),
        (1, True, False),
        (1, True, True),
    ]


async def test_callbacks_run_in_order_even_when_a_later_one_is_free(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with working() as bench:
        bench.thread.seconds = 1.0
        bench.append()
        bench.parts.settings.appendfsync = "no"
        assert bench.durability.released(1)
        bench.append()
        assert bench.released == []
        bench.durability.reconsider()
        assert bench.released == [1, 2]


async def test_a_file_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with working() as bench:
        bench.thread.seconds = 1.0
        bench.append()
        bench.parts.queue.switch()
        with trio.move_on_after(0.9) as waiting:
            await bench.durability.wait_file(bench.parts.queue.file_number)
        assert waiting.cancelled_caught
        await bench.durability.wait_file(bench.parts.queue.file_number)


@pytest.mark.parametrize("appendfsync", ["always", "everysec", "no"])
async def test_a_failure_releases_nothing(
    autojump_clock: trio.testing.MockClock, appendfsync: AppendFsync
) -> None:
    with pytest.RaisesGroup(LogFailureError, flatten_subgroups=True):
        async with working() as bench:
            bench.append()
            await bench.durability.wait_durable(1)
            bench.thread.failure = LogFailureError("the disk is gone")
            bench.append()
            bench.durability.fail()
            bench.parts.settings.appendfsync = appendfsync
            bench.durability.reconsider()
            assert bench.released == [1]
            assert bench.durability.released(1)
            assert not bench.durability.released(2)
