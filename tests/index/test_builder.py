from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing

from engram.errors import CommandError, DamagedDataError, LogFailureError
from engram.index.builder import Builder, BuildError, BuilderSettings
from engram.index.parameters import default_parameters
from engram.index.search import SearchOptions, search_batch
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import VectorIndex
from engram.operations import InstallSegment

Floats = npt.NDArray[np.float32]
Clustered = Callable[..., Floats]

# A sound builder, as a shell command of which more can be made.
BUILD = " ".join(BuilderSettings().command)


def shell(script: str) -> BuilderSettings:
    return BuilderSettings(command=("sh", "-c", script))


@attrs.define
class Engine:
    """Applies operations at once, as an engine whose log is always ready does."""

    store: SegmentStore
    lsn: int = 10
    operations: list[InstallSegment] = attrs.Factory(list)
    changed: trio.Event = attrs.Factory(trio.Event)

    async def install(self, index: VectorIndex, operation: InstallSegment) -> None:
        await trio.lowlevel.checkpoint()
        self.lsn += 1
        segment = self.store.take(operation.segment, operation.checksum) if operation.segment else None
        for name in index.install(self.lsn, segment, operation.through, operation.replaces):
            self.store.remove(name)
        self.operations.append(operation)
        self.changed.set()
        self.changed = trio.Event()

    async def wait(self, operations: int) -> None:
        while len(self.operations) < operations:
            await self.changed.wait()


@pytest.fixture
def engine(store: SegmentStore) -> Engine:
    return Engine(store)


@pytest.fixture
def index(clustered: Clustered) -> VectorIndex:
    rows = clustered(70, 8)
    index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
    index.add(2, [b"%d" % row for row in range(70)], rows)
    return index


async def test_a_head_becomes_a_segment(
    engine: Engine, index: VectorIndex, clustered: Clustered, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install)
    await nursery.start(builder.run)
    builder.consider(index)
    builder.consider(index)
    assert builder.waiting == 1
    await engine.wait(1)
    await trio.testing.wait_all_tasks_blocked()
    (operation,) = engine.operations
    assert (operation.index, operation.through, operation.replaces) == (1, 69, ())
    assert [path.name for path in engine.store.folder.iterdir()] == [operation.segment]
    assert (index.rows_unindexed, [installed.rows for installed in index.segments]) == (0, [70])
    (result,) = search_batch([index.view(engine.lsn)], clustered(70, 8)[3:4], SearchOptions(2), 0)
    assert result.keys[0] == b"3"
    assert (builder.builds, builder.failures, builder.waiting, builder.running) == (1, 0, 0, 0)
    assert builder.rate > 0.0
    assert builder.last_error is None


async def test_rows_that_die_while_they_are_built_are_dead_in_the_segment(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        index.delete(5, [b"7"])
        index.add(6, [b"8"], np.ones((1, 8), np.float32))
        await engine.install(index, operation)

    builder = Builder(engine.store, install)
    await nursery.start(builder.run)
    builder.consider(index)
    await engine.wait(1)
    assert [installed.dead for installed in index.segments] == [2]
    (result,) = search_batch([index.view(engine.lsn)], np.ones((1, 8), np.float32), SearchOptions(100), 0)
    assert sorted(map(int, result.keys)) == [row for row in range(70) if row != 7]


async def test_the_index_that_waits_longest_is_next_and_merges_follow(
    engine: Engine, clustered: Clustered, nursery: trio.Nursery
) -> None:
    indices = []
    for number in (3, 1, 2):
        index = VectorIndex(number, default_parameters(8, "cosine"), seal_rows=16)
        index.add(2, [b"%d" % row for row in range(32)], clustered(32, 8))
        indices.append(index)
    builder = Builder(engine.store, engine.install)
    for index in indices:
        builder.consider(index)
    await nursery.start(builder.run)
    await engine.wait(3)
    assert [operation.index for operation in engine.operations] == [3, 1, 2]
    first = indices[0]
    first.delete(50, [b"%d" % row for row in range(20)])
    builder.consider(first)
    old = first.segments[0].id
    await engine.wait(4)
    assert engine.operations[3].replaces == (old,)
    assert [(installed.rows, installed.dead) for installed in first.segments] == [(12, 0)]


async def test_rows_that_are_all_dead_need_no_process(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    index.delete(3, [b"%d" % row for row in range(70)])
    builder = Builder(engine.store, engine.install, settings=shell("exit 9"))
    await nursery.start(builder.run)
    builder.consider(index)
    await engine.wait(1)
    assert engine.operations == [InstallSegment(1, "", 0, 69, ())]
    assert index.rows_total == 0
    assert list(engine.store.folder.iterdir()) == []


async def test_a_process_that_dies_is_tried_again(
    engine: Engine,
    index: VectorIndex,
    tmp_path_factory: pytest.TempPathFactory,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
) -> None:
    tries = tmp_path_factory.mktemp("tries") / "tries"
    script = (
        f"echo >> {tries}; if [ $(wc -l < {tries}) -lt 4 ]; then echo no luck >&2; exit 3; fi; exec {BUILD}"
    )
    builder = Builder(engine.store, engine.install, settings=shell(script))
    await nursery.start(builder.run)
    began = trio.current_time()
    builder.consider(index)
    await engine.wait(1)
    assert builder.failures == 3
    assert builder.last_error == "the building process ended with code 3: no luck"
    assert trio.current_time() - began == pytest.approx(1.0 + 2.0 + 4.0)
    assert len(list(engine.store.folder.iterdir())) == 1


@pytest.mark.parametrize("answer", ["", "nonsense"])
async def test_a_process_that_does_not_answer_has_failed(
    engine: Engine, index: VectorIndex, answer: str, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install, settings=shell(f"read job; echo {answer}"))
    await nursery.start(builder.run)
    builder.consider(index)
    while not builder.failures:
        await trio.lowlevel.checkpoint()
    assert builder.last_error is not None
    assert list(engine.store.folder.iterdir()) == []
    assert engine.operations == []


async def test_waits_between_retries_do_not_grow_beyond_a_limit(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    tries: list[float] = []
    fifth = trio.Event()

    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        tries.append(trio.current_time())
        if len(tries) == 5:
            fifth.set()
        raise CommandError("MISCONF no space left")

    index.delete(3, [b"%d" % row for row in range(64)])
    builder = Builder(engine.store, install, settings=BuilderSettings(first_retry=1.0, longest_retry=3.0))
    await nursery.start(builder.run)
    builder.consider(index)
    await fifth.wait()
    assert np.diff(tries) == pytest.approx([1.0, 2.0, 3.0, 3.0])


async def test_other_indices_do_not_wait_for_one_that_fails(
    engine: Engine, index: VectorIndex, clustered: Clustered, nursery: trio.Nursery
) -> None:
    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        if index.id == 1:
            raise CommandError("MISCONF no space left")
        await engine.install(index, operation)

    other = VectorIndex(2, default_parameters(8, "cosine"), seal_rows=64)
    other.add(2, [b"%d" % row for row in range(64)], clustered(64, 8))
    builder = Builder(engine.store, install, settings=BuilderSettings(first_retry=1e6, longest_retry=1e6))
    await nursery.start(builder.run)
    builder.consider(index)
    builder.consider(other)
    await engine.wait(1)
    assert engine.operations[0].index == 2
    assert builder.failures == 1


async def test_a_cancelled_build_takes_its_process_and_folder_along(
    engine: Engine, index: VectorIndex, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fifo = tmp_path_factory.mktemp("fifo") / "pid"
    os.mkfifo(fifo)
    builder = Builder(engine.store, engine.install, settings=shell(f"echo $$ > {fifo}; exec sleep 1000"))
    async with trio.open_nursery() as nursery:
        await nursery.start(builder.run)
        builder.consider(index)
        pid = int(await trio.to_thread.run_sync(fifo.read_text))
        os.kill(pid, 0)
        assert builder.running == 1
        assert len(list(engine.store.folder.iterdir())) == 1
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(engine.store.folder.iterdir()) == []
    assert engine.operations == []


async def test_an_index_dropped_meanwhile_leaves_nothing(
    engine: Engine, index: VectorIndex, tmp_path_factory: pytest.TempPathFactory, nursery: trio.Nursery
) -> None:
    fifo = tmp_path_factory.mktemp("fifo") / "go"
    os.mkfifo(fifo)
    builder = Builder(engine.store, engine.install, settings=shell(f"read line < {fifo}; exec {BUILD}"))
    await nursery.start(builder.run)
    builder.consider(index)

    def go() -> None:
        fifo.write_text("go\n")

    await trio.to_thread.run_sync(go)
    index.drop()
    while builder.running:
        await trio.lowlevel.checkpoint()
    assert builder.failures == 0
    assert engine.operations == []
    assert list(engine.store.folder.iterdir()) == []


async def test_an_index_dropped_before_its_turn_is_not_built(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install, settings=shell("exit 1"))
    builder.consider(index)
    index.drop()
    await nursery.start(builder.run)
    await trio.testing.wait_all_tasks_blocked()
    assert (builder.waiting, builder.failures) == (0, 0)


async def test_a_log_without_room_is_tried_again(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    refused: list[str] = []

    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        if not refused:
            refused.append(operation.segment)
            raise CommandError("MISCONF no space left")
        await engine.install(index, operation)

    builder = Builder(engine.store, install)
    await nursery.start(builder.run)
    builder.consider(index)
    await engine.wait(1)
    assert (builder.failures, builder.last_error) == (1, "MISCONF no space left")
    assert [path.name for path in engine.store.folder.iterdir()] == [engine.operations[0].segment]
    assert engine.operations[0].segment not in refused


async def test_a_log_that_fails_ends_the_builder(engine: Engine, index: VectorIndex) -> None:
    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        raise LogFailureError("the disk is gone")

    builder = Builder(engine.store, install)
    with pytest.RaisesGroup(
        pytest.RaisesExc(LogFailureError, match="the disk is gone"), flatten_subgroups=True
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(builder.run)
            builder.consider(index)


async def test_rows_wait_once_too_many_have_no_graph_until_they_have(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    limit = 71
    builder = Builder(engine.store, engine.install, limit=lambda: limit)
    await nursery.start(builder.run)
    assert builder.admit(index, 1 << 40) is None
    limit = 70
    wait = builder.admit(index, 1 << 40)
    assert wait is not None
    # It would take ages, were it for a time.
    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait)
        builder.consider(index)
    assert index.rows_unindexed == 0
    assert builder.admit(index, 1 << 40) is None


@pytest.mark.parametrize("dropped", [True, False])
async def test_who_waits_for_an_index_that_is_dropped_or_for_another_limit_goes_on(
    engine: Engine, index: VectorIndex, dropped: bool, autojump_clock: trio.testing.MockClock
) -> None:
    limit = 70
    builder = Builder(engine.store, engine.install, limit=lambda: limit)
    wait = builder.admit(index, 1 << 40)
    assert wait is not None
    began = trio.current_time()
    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert len(waiting.child_tasks) == 1
        if dropped:
            index.drop()
        else:
            limit = 71
            builder.reconsider()
    assert trio.current_time() == began
    assert builder.admit(index, 1 << 40) is None


async def test_an_optimization_makes_one_segment_for_all_who_wait(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install)
    await nursery.start(builder.run)
    index.delete(3, [b"0"])
    async with trio.open_nursery() as waiting:
        waiting.start_soon(builder.optimize, index)
        waiting.start_soon(builder.optimize, index)
    assert len(engine.operations) == 1
    assert [(installed.rows, installed.dead) for installed in index.segments] == [(69, 0)]
    await builder.optimize(index)
    assert (len(engine.operations), builder.running, builder.waiting) == (1, 0, 0)


async def test_damaged_vectors_are_not_copied_into_another_segment(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install)
    await nursery.start(builder.run)
    await builder.optimize(index)
    (installed,) = index.segments
    # As after a restart.
    engine.store.discard(installed.id)
    reopened = engine.store.take(installed.id, installed.segment.checksum)
    index.install(engine.lsn + 1, reopened, -1, [installed.id])
    path = reopened.path / "vectors.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    index.delete(engine.lsn + 2, [b"1"])
    with pytest.raises(BuildError, match=r"vectors\.npy: checksum mismatch"):
        await builder.optimize(index)
    assert [kept.id for kept in index.segments] == [installed.id]


async def test_a_damaged_segment_is_in_nobodys_way(
    engine: Engine,
    clustered: Clustered,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head is sealed, and the other segments are merged."""
    index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
    builder = Builder(engine.store, engine.install, settings=BuilderSettings(first_retry=0.001))
    await nursery.start(builder.run)
    verify = engine.store.verify
    damaged: list[Segment] = []

    def find_damage(segment: Segment) -> None:
        if segment in damaged:
            raise DamagedDataError(segment.path / "vectors.npy", "checksum mismatch")
        verify(segment)

    monkeypatch.setattr(engine.store, "verify", find_damage)
    await seal(engine, builder, index, clustered(64, 8))
    damaged.append(index.segments[0].segment)
    for seed in range(1, 5):
        await seal(engine, builder, index, clustered(64, 8, seed=seed))
    assert index.rows_unindexed == 0
    assert index.segments[0].segment is damaged[0]
    assert len(index.segments) < 5
    assert builder.failures == 1
    # None of it is needed any more.
    index.delete(engine.lsn + 1, damaged[0].keys.all())
    engine.lsn += 1
    await settle(builder, index)
    assert all(installed.segment is not damaged[0] for installed in index.segments)
    assert builder.failures == 1


UNMERGEABLE = """
import sys
import numpy as np
from engram.index import build_process

def build(job, build=build_process.build_segment):
    if len(np.load(f"{job.store}/{job.segment}.building/row-ids.npy")) > 64:
        raise ValueError("no luck")
    return build(job)

build_process.build_segment = build
sys.exit(build_process.main())
"""


async def test_heads_are_sealed_where_segments_cannot_be_merged(
    engine: Engine, clustered: Clustered, nursery: trio.Nursery
) -> None:
    index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
    settings = BuilderSettings(command=(sys.executable, "-c", UNMERGEABLE), first_retry=0.001)
    builder = Builder(engine.store, engine.install, settings=settings)
    await nursery.start(builder.run)
    for seed in range(3):
        await seal(engine, builder, index, clustered(64, 8, seed=seed))
    assert [installed.rows for installed in index.segments] == [64, 64, 64]
    # Twice as it is asked for, once with float32.
    assert builder.failures == 3


async def seal(engine: Engine, builder: Builder, index: VectorIndex, rows: Floats) -> None:
    """Adds rows with keys of their own, and lets the builder do what there is to do then."""
    engine.lsn += 1
    index.add(engine.lsn, [b"%d" % (index.next_row + row) for row in range(len(rows))], rows)
    await settle(builder, index)


async def settle(builder: Builder, index: VectorIndex) -> None:
    """Waits until a builder has nothing to do, or has tried often."""
    builder.consider(index)
    while builder._known and builder.failures < 10 and not builder._is_hopeless(index.id):
        await trio.lowlevel.checkpoint()


async def test_an_optimization_takes_the_rows_that_came_during_another_build(
    engine: Engine, index: VectorIndex, clustered: Clustered, nursery: trio.Nursery
) -> None:
    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        if not engine.operations:
            index.add(5, [b"new"], clustered(1, 8))
            nursery.start_soon(builder.optimize, index)
            await trio.testing.wait_all_tasks_blocked()
        await engine.install(index, operation)

    builder = Builder(engine.store, install)
    await nursery.start(builder.run)
    await builder.optimize(index)
    await engine.wait(2)
    assert [installed.rows for installed in index.segments] == [71]
    assert engine.operations[1].replaces == (engine.operations[0].segment,)
    assert engine.operations[1].through == 70


async def test_an_optimization_that_fails_says_why(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install, settings=shell("echo no luck >&2; exit 3"))
    await nursery.start(builder.run)
    with pytest.raises(BuildError, match="no luck"):
        await builder.optimize(index)
    assert builder.failures == 1


async def test_an_optimization_does_not_wait_for_the_next_try_of_a_build(
    engine: Engine,
    index: VectorIndex,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        if not builder.failures:
            raise CommandError("MISCONF no space left")
        await engine.install(index, operation)

    builder = Builder(engine.store, install, settings=BuilderSettings(first_retry=1e6, longest_retry=1e6))
    await nursery.start(builder.run)
    builder.consider(index)
    while not builder.failures:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    await builder.optimize(index)
    assert trio.current_time() == began
    assert index.optimized


async def test_an_optimization_of_an_index_that_is_dropped_ends(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    builder = Builder(engine.store, engine.install)
    async with trio.open_nursery() as waiting:
        waiting.start_soon(builder.optimize, index)
        await trio.testing.wait_all_tasks_blocked()
        index.drop()
        await nursery.start(builder.run)
    await builder.optimize(index)
    assert engine.operations == []


async def test_an_optimization_fails_when_the_builder_ends(engine: Engine, index: VectorIndex) -> None:
    builder = Builder(engine.store, engine.install, settings=shell("exec sleep 1000"))
    async with trio.open_nursery() as waiting:

        async def wait() -> None:
            with pytest.raises(BuildError, match="shutting down"):
                await builder.optimize(index)

        async with trio.open_nursery() as nursery:
            await nursery.start(builder.run)
            waiting.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            waiting.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_dropping_an_index_ends_its_build(
    engine: Engine, index: VectorIndex, tmp_path_factory: pytest.TempPathFactory, nursery: trio.Nursery
) -> None:
    fifo = tmp_path_factory.mktemp("fifo") / "pid"
    os.mkfifo(fifo)
    builder = Builder(engine.store, engine.install, settings=shell(f"echo $$ > {fifo}; exec sleep 1000"))
    await nursery.start(builder.run)
    async with trio.open_nursery() as waiting:
        waiting.start_soon(builder.optimize, index)
        pid = int(await trio.to_thread.run_sync(fifo.read_text))
        index.drop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert (builder.failures, builder.builds) == (0, 0)
    assert list(engine.store.folder.iterdir()) == []


# The process that builds, with a fault.
UNLUCKY = """
import sys
from engram.index import build_process

def build(job, build=build_process.build_segment):
    if job.quantization == "int8":
        raise ValueError("some words\\nno luck")
    return build(job)

build_process.build_segment = build
sys.exit(build_process.main())
"""
CERTAIN = "read job; echo Traceback >&2; echo ValueError: {reason} >&2; exit 70"


async def test_a_build_that_fails_the_same_way_twice_is_tried_with_float32(
    engine: Engine,
    clustered: Clustered,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
) -> None:
    index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
    index.add(2, [b"%d" % row for row in range(64)], clustered(64, 8))
    settings = BuilderSettings(command=(sys.executable, "-c", UNLUCKY))
    builder = Builder(engine.store, engine.install, settings=settings, limit=lambda: 1)
    await nursery.start(builder.run)
    began = trio.current_time()
    builder.consider(index)
    await engine.wait(1)
    assert trio.current_time() - began == pytest.approx(1.0 + 2.0)
    assert (builder.failures, builder.builds) == (2, 1)
    assert builder.last_error == "the building process ended with code 70: ValueError: no luck"
    assert builder.last_error_of(index) == ""
    assert [installed.segment.parameters.quantization for installed in index.segments] == ["f32"]
    # It is not tried again what has failed for certain.
    index.add(engine.lsn + 1, [b"%d" % row for row in range(64)], clustered(64, 8, seed=1))
    builder.consider(index)
    await engine.wait(2)
    assert builder.failures == 2


async def failing(builder: Builder, index: VectorIndex, count: int) -> list[float]:
    """Has an index built; the times of the first failures, so many. No other time may be waited for."""
    times: list[float] = []
    enough = trio.Event()
    fail = builder._fail

    def note(failed: VectorIndex, error: Exception) -> float:
        times.append(trio.current_time())
        if len(times) == count:
            enough.set()
        return fail(failed, error)

    builder._fail = note  # type: ignore[method-assign, assignment]
    builder.consider(index)
    await enough.wait()
    await trio.testing.wait_all_tasks_blocked()
    return times


async def test_a_build_that_cannot_be_done_is_said_and_rarely_tried_again(
    engine: Engine,
    index: VectorIndex,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
) -> None:
    settings = shell(CERTAIN.format(reason="no luck"))
    builder = Builder(engine.store, engine.install, settings=settings, limit=lambda: 1)
    await nursery.start(builder.run)
    times = await failing(builder, index, 6)
    # Twice as it is asked for, twice with float32; then its rows may be others.
    assert np.diff(times) == pytest.approx([1.0, 2.0, 4.0, 3600.0, 3600.0])
    assert builder.last_error_of(index) == "the building process ended with code 70: ValueError: no luck"
    (result,) = search_batch([index.view(10)], np.ones((1, 8), np.float32), SearchOptions(100), 0)
    assert len(result.keys) == 70
    # Who asks for it has it tried at once.
    with pytest.raises(BuildError, match="no luck"):
        await builder.optimize(index)
    assert builder.failures == 7
    index.drop()
    await trio.testing.wait_all_tasks_blocked()
    assert builder.last_error_of(index) == ""
    assert (builder._failed, builder._plain, builder._retrying, builder._known) == ({}, set(), {}, set())


async def test_nobody_waits_for_a_build_that_cannot_be_done(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery
) -> None:
    command = ("sh", "-c", CERTAIN.format(reason="no luck"))
    settings = BuilderSettings(command=command, first_retry=0.001)
    builder = Builder(engine.store, engine.install, settings=settings, limit=lambda: 1)
    await nursery.start(builder.run)
    wait = builder.admit(index, 1 << 40)
    assert wait is not None
    builder.consider(index)
    await wait()
    assert builder.failures == 4
    assert builder.admit(index, 1 << 40) is None


@pytest.mark.parametrize(
    "script",
    [
        "read job; echo out of memory >&2; exit 1",
        "kill -9 $$",
        "read job; date +%N >&2; exit 70",
    ],
)
async def test_what_may_pass_is_tried_again_as_it_was(
    engine: Engine,
    index: VectorIndex,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    script: str,
) -> None:
    builder = Builder(engine.store, engine.install, settings=shell(script), limit=lambda: 1)
    await nursery.start(builder.run)
    times = await failing(builder, index, 8)
    assert np.diff(times) == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0])
    assert not builder._plain
    assert builder.admit(index, 1 << 40) is not None


async def test_a_damaged_segment_of_an_index_that_is_dropped_is_no_failure(
    engine: Engine, index: VectorIndex, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = trio.lowlevel.current_trio_token()

    def vanish(*_: object) -> int:
        trio.from_thread.run_sync(index.drop, trio_token=token)
        raise DamagedDataError(Path("segments/1/vectors.npy"), "missing")

    monkeypatch.setattr(engine.store, "write_rows", vanish)
    builder = Builder(engine.store, engine.install)
    await nursery.start(builder.run)
    builder.consider(index)
    while builder.waiting or builder.running:
        await trio.lowlevel.checkpoint()
    assert (builder.failures, builder.last_error) == (0, None)
