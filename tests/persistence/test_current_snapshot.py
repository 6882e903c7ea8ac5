from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from engram.errors import LogFailureError, SnapshotError, SnapshotRunningError
from engram.persistence.current_snapshot import CurrentSnapshot, Rotation
from engram.persistence.layout import Layout
from engram.persistence.manifest import Manifest
from engram.persistence.named_segments import NamedSegments
from engram.persistence.settings import PersistenceSettings
from tests.persistence.conftest import operation
from tests.persistence.parts import DIRECTORY, InTurn, Parts, recovered


@attrs.define
class Bench:
    """A snapshot that is never made: closing the file of the log takes 5 s and fails by `error`."""

    parts: Parts
    segments: NamedSegments
    error: Exception = attrs.Factory(lambda: SnapshotError("No space left on device"))
    begun: list[float] = attrs.Factory(list)
    failures: list[LogFailureError] = attrs.Factory(list)
    snapshot: CurrentSnapshot = attrs.field(init=False)

    async def rotate(self) -> Rotation:
        self.begun.append(trio.current_time())
        await trio.sleep(5)
        raise self.error

    def append(self, size: int = 5) -> None:
        queue = self.parts.queue
        lsn = queue.appended_lsn + 1
        queue.append(lsn, operation(lsn, size), queue.reserve(lsn, operation(lsn, size)))


@asynccontextmanager
async def serving(settings: PersistenceSettings | None = None, size: int = 0) -> AsyncIterator[Bench]:
    settings = settings or PersistenceSettings()
    recovery = recovered(manifest=Manifest(first_log_file=1, size=size, time=1))
    bench = Bench(Parts(settings=settings), NamedSegments(recovery))
    bench.snapshot = CurrentSnapshot(
        Layout(DIRECTORY),
        bench.parts.files,
        settings,
        bench.parts.queue,
        bench.segments,
        recovery,
        InTurn(),
        rotate=bench.rotate,
        command=lambda last_file: [],
        fail=bench.failures.append,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.snapshot.serve)
        yield bench
        nursery.cancel_scope.cancel()


async def test_with_nothing_new_it_is_current_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as bench:
        assert (bench.snapshot.last_save_time, bench.snapshot.last_save_seconds) == (1, -1)
        await bench.snapshot.replace()
        assert bench.begun == []
        assert bench.snapshot.last_save_time > 1
        assert bench.snapshot.last_save_seconds == 0


async def test_why_it_has_failed_is_told_and_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as bench:
        bench.append()
        with pytest.raises(SnapshotError, match=r"^No space left on device$"):
            await bench.snapshot.replace()
        assert bench.snapshot.last_save_error == "No space left on device"
        assert (bench.snapshot.last_save_time, bench.snapshot.last_save_seconds) == (1, 5)
        assert not bench.snapshot.running
        assert bench.failures == []


async def test_what_leaves_the_disk_in_doubt_is_handed_on(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as bench:
        bench.append()
        bench.error = LogFailureError("cannot be synced")
        with pytest.raises(SnapshotError, match="cannot be synced"):
            await bench.snapshot.replace()
        assert bench.failures == [bench.error]


async def test_one_is_made_at_a_time() -> None:
    async with serving() as bench:
        bench.append()
        bench.snapshot.request()
        assert bench.snapshot.running
        with pytest.raises(SnapshotRunningError):
            bench.snapshot.request()


async def test_none_is_made_when_all_ends(autojump_clock: trio.testing.MockClock) -> None:
    shutting_down = r"^the server is shutting down$"
    async with serving() as bench:
        bench.append()
        bench.snapshot.request()
        await trio.sleep(1)
    assert bench.snapshot.last_save_error == "the server is shutting down"
    with pytest.raises(SnapshotError, match=shutting_down):
        bench.snapshot.request()


@pytest.mark.parametrize(
    ("least", "percentage", "size", "log_bytes", "begun"),
    [
        (1000, 100, 0, 900, False),
        (1000, 100, 0, 1100, True),
        (1000, 100, 2000, 1100, False),
        (1000, 50, 2000, 1100, True),
        (0, 100, 0, 1100, False),
        (1000, 0, 0, 1100, False),
    ],
)
async def test_one_is_due_when_the_log_has_grown(
    least: int, percentage: int, size: int, log_bytes: int, begun: bool
) -> None:
    settings = PersistenceSettings(snapshot_log_size=least, snapshot_log_percentage=percentage)
    async with serving(settings, size) as bench:
        bench.append(log_bytes)
        bench.snapshot.consider()
        assert bench.snapshot.running == begun


async def test_one_is_due_when_it_would_let_go_of_much() -> None:
    async with serving() as bench:
        bench.append()
        bench.segments.release(1, 65 << 20, 0)
        bench.snapshot.consider()
        assert bench.snapshot.running


async def test_none_is_due_once_it_is_closed() -> None:
    async with serving(PersistenceSettings(snapshot_log_size=1)) as bench:
        bench.append(100)
        bench.snapshot.close()
        bench.snapshot.consider()
        assert not bench.snapshot.running
        bench.snapshot.request()
        assert bench.snapshot.running


async def test_one_that_has_failed_is_tried_again_after_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving(PersistenceSettings(snapshot_log_size=1)) as bench:
        bench.append(100)
        for _ in range(70):
            bench.snapshot.consider()
            await trio.sleep(1)
        first, second = bench.begun
        assert second - first == pytest.approx(65, abs=1)
        # An operator's wish is not held up.
        await trio.sleep(5)
        bench.snapshot.request()
