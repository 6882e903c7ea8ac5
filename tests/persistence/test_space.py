from __future__ import annotations

import trio
import trio.testing

from engram.persistence.log_writer import PreparedFile
from engram.persistence.settings import PersistenceSettings
from tests.persistence.parts import DIRECTORY, CountedFiles, Parts

NO_SPACE = "No space left on device"


async def test_one_file_is_kept_prepared() -> None:
    parts = Parts()
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        assert parts.files.made == [4096]
        assert parts.space.holds(4096)
        assert not parts.space.holds(4097)
        file = parts.space.take(100)
        assert (file.size, file.descriptor) == (4096, 1)
        assert not parts.space.holds(0)
        await trio.testing.wait_all_tasks_blocked()
        assert parts.files.made == [4096, 4096]
        assert parts.space.holds(0)
        nursery.cancel_scope.cancel()


async def test_a_file_that_is_not_prepared_is_still_to_be_made() -> None:
    parts = Parts()
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        large, small = parts.space.take(5000), parts.space.take(100)
        other = parts.space.take(100)
        assert [(file.size, file.descriptor) for file in (large, small, other)] == [
            (5000, None),
            (4096, 1),
            (4096, None),
        ]
        assert len({file.path for file in (large, small, other)}) == 3
        nursery.cancel_scope.cancel()


async def test_the_size_that_is_missing_is_prepared_beside_it() -> None:
    parts = Parts()
    missing = [0]
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.space.run, lambda: 0 if parts.space.holds(missing[0]) else missing[0])
        missing[0] = 9000
        parts.space.prepare()
        await trio.testing.wait_all_tasks_blocked()
        assert parts.files.made == [4096, 9000]
        assert parts.space.take(100).size == 4096
        assert parts.space.take(100).size == 9000
        nursery.cancel_scope.cancel()


async def test_a_new_size_of_files_is_that_of_the_next() -> None:
    parts = Parts()
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        parts.settings.log_file_size = 8192
        parts.space.take(100)
        await trio.testing.wait_all_tasks_blocked()
        assert parts.files.made == [4096, 8192]
        nursery.cancel_scope.cancel()


async def test_without_space_it_is_tried_again_each_second(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts(files=CountedFiles(capacity=100))
    woken: list[float] = []

    async def watch() -> None:
        while True:
            await parts.progress.park()
            woken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await nursery.start(parts.space.run, lambda: 0)
        assert parts.space.error == NO_SPACE
        assert parts.space.refusal(100) == parts.space.refusal(4096) == NO_SPACE
        await trio.sleep(2.5)
        assert [round(time - began) for time in woken] == [0, 1, 2]
        parts.files.capacity = 1 << 20
        await trio.sleep(1)
        assert parts.space.error == parts.space.refusal(1 << 30) == ""
        assert parts.space.holds(4096)
        nursery.cancel_scope.cancel()


async def test_no_space_for_a_large_file_says_nothing_of_small_ones(
    autojump_clock: trio.testing.MockClock,
) -> None:
    parts = Parts(files=CountedFiles(capacity=10_000))
    missing = [0]
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.space.run, lambda: missing[0])
        missing[0] = 9000
        parts.space.prepare()
        await trio.testing.wait_all_tasks_blocked()
        assert parts.space.refusal(9000) == parts.space.refusal(9001) == NO_SPACE
        assert parts.space.refusal(8999) == ""
        # Nobody waits for it any more.
        missing[0] = 0
        await trio.sleep(2)
        assert parts.space.error == ""
        nursery.cancel_scope.cancel()


async def test_what_was_prepared_in_vain_is_removed() -> None:
    parts = Parts(settings=PersistenceSettings(log_file_size=4096))
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        taken = parts.space.take(100)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    parts.space.discard([taken, PreparedFile(DIRECTORY / "never-made", 4096)])
    assert parts.files.left == {}
    assert sorted(parts.files.closed) == [1, 2]
