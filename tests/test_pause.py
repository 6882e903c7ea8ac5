from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from engram.pause import Pause


@pytest.mark.parametrize("attempt", range(8))
async def test_a_pause_extended_as_it_ends_goes_on(attempt: int, autojump_clock: MockClock) -> None:
    """Trio wakes those whose time has come in any order."""
    pause = Pause()
    extended = False

    async def extend() -> None:
        nonlocal extended
        await trio.sleep(1)
        if extended := pause.active:
            assert not pause.start(10, everything=False)

    async with trio.open_nursery() as nursery:
        assert pause.start(1, everything=False)
        nursery.start_soon(pause.run)
        nursery.start_soon(extend)
        await trio.sleep(2)
        assert pause.holds(writes=True) is extended
        assert not pause.holds(writes=False)
        await trio.sleep(10)
        assert not pause.active


async def test_a_second_pause_does_not_end_with_the_first(autojump_clock: MockClock) -> None:
    pause = Pause()
    async with trio.open_nursery() as nursery:
        assert pause.start(1, everything=True)
        nursery.start_soon(pause.run)
        await trio.testing.wait_all_tasks_blocked()
        pause.end()
        # The task that is there goes on.
        assert not pause.start(3, everything=False)
        await trio.sleep(2)
        assert pause.holds(writes=True)
        await trio.sleep(2)
        assert not pause.active
        assert pause.start(1, everything=False)
