from __future__ import annotations

from functools import partial

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import LogFullError
from engram.operations import encode
from engram.persistence.settings import PersistenceSettings
from tests.persistence.conftest import operation
from tests.persistence.parts import CountedFiles, Parts, files_of


def append(parts: Parts, size: int) -> None:
    lsn = parts.queue.appended_lsn + 1
    parts.queue.append(lsn, operation(lsn, size), parts.queue.reserve(lsn, operation(lsn, size)))


async def test_there_is_room_in_the_file_in_use_or_in_a_prepared_one() -> None:
    parts = Parts()
    assert not parts.admission.has_room(0)
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        assert parts.admission.has_room(2900)
        assert not parts.admission.has_room(4096)
        append(parts, 1000)
        # The next file is not prepared yet.
        assert parts.admission.has_room(1800)
        assert not parts.admission.has_room(2900)
        await trio.testing.wait_all_tasks_blocked()
        assert parts.admission.has_room(2900)
        nursery.cancel_scope.cancel()


async def test_only_the_first_in_line_asks_for_a_file_of_its_size() -> None:
    parts = Parts()
    assert parts.admission.shortage() == 0
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as line:
            for size in (10_000, 20_000):
                line.start_soon(parts.admission.admit, size)
                await trio.testing.wait_all_tasks_blocked()
                assert 10_000 < parts.admission.shortage() < 20_000
            await nursery.start(parts.space.run, parts.admission.shortage)
            assert not parts.admission.has_room(1)
        assert parts.admission.shortage() == 0
        assert [size > 20_000 for size in parts.files.made] == [False, True]
        assert parts.admission.has_room(20_000)
        nursery.cancel_scope.cancel()


async def test_once_closed_nothing_is_let_in() -> None:
    parts = Parts()
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        assert parts.admission.has_room(1)
        parts.admission.close()
        assert not parts.admission.has_room(1)
        nursery.start_soon(parts.admission.admit, 1)
        await trio.testing.wait_all_tasks_blocked()
        parts.progress.unpark_all()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


@given(
    clients=st.lists(st.lists(st.integers(0, 6000), max_size=8), min_size=1, max_size=6),
    capacity=st.integers(0, 60_000),
    queue_bytes=st.integers(1, 8000),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_space_is_never_promised_twice(clients: list[list[int]], capacity: int, queue_bytes: int) -> None:
    """Many clients, a disk that gets full, a queue that does, and a writer that lags behind."""
    settings = PersistenceSettings(log_file_size=4096, queue_bytes=queue_bytes)
    parts = Parts(settings=settings, files=CountedFiles(capacity))
    refused: list[int] = []

    async def write(sizes: list[int]) -> None:
        for size in sizes:
            lsn = parts.queue.appended_lsn + 1
            # No key is longer than those of all of them.
            room = len(encode(operation(1000 + lsn, size)))
            if not parts.admission.has_room(room):
                try:
                    await parts.admission.admit(room)
                except LogFullError:
                    refused.append(size)
                    continue
            queued = parts.queue.queued_bytes
            append(parts, size)
            assert not queued or queued + room <= queue_bytes
            await trio.lowlevel.checkpoint()

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.space.run, parts.admission.shortage)
            async with trio.open_nursery() as writers:
                for sizes in clients:
                    writers.start_soon(write, sizes)
                writers.start_soon(drain, writers)
            nursery.cancel_scope.cancel()

    async def drain(writers: trio.Nursery) -> None:
        while len(writers.child_tasks) > 1:
            await trio.sleep(0.01)
            parts.write()

    trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
    parts.write()
    assert len(parts.runs) or not parts.queue.appended_lsn
    assert parts.queue.appended_lsn + len(refused) == sum(map(len, clients))
    # Whatever was let in had a file on the disk from then on.
    assert all(file.descriptor is not None for file, _ in files_of(parts.runs))
    assert sum(parts.files.left.values()) <= capacity


async def test_a_refusal_says_why() -> None:
    parts = Parts(files=CountedFiles(capacity=0))
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        with pytest.raises(LogFullError, match=r"^No space left on device$"):
            await parts.admission.admit(10)
        nursery.cancel_scope.cancel()


async def test_each_of_many_gets_in_once_there_is_space(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts(settings=PersistenceSettings(log_file_size=4096, queue_bytes=1))
    order: list[int] = []

    async def write(number: int) -> None:
        await parts.admission.admit(100)
        append(parts, 100)
        order.append(number)

    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        async with trio.open_nursery() as writers:
            for number in range(5):
                writers.start_soon(partial(write, number))
                await trio.testing.wait_all_tasks_blocked()
            while len(order) < 5:
                assert order == list(range(len(order)))
                parts.write()
                await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
