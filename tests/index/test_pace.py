from __future__ import annotations

import pytest
import trio
import trio.testing

from engram.index.pace import Pace

LIMIT = 100_000


async def test_rows_beyond_the_limit_come_as_fast_as_they_are_sealed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = Pace()
    assert pace.delay(69, 70, 1000) == 0.0
    second = round(pace.rate)
    assert [pace.delay(70, 70, second) for _ in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    await trio.sleep(3.0)
    assert pace.delay(70, 70, 5 * second) == pytest.approx(5.0)
    await trio.sleep(5.0)
    # Half as many again: half as fast.
    assert pace.delay(70, 47, second) == pytest.approx(1.0 / (1.0 - 23 / 47))


async def test_short_waits_are_saved_up(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace()
    delays = []
    began = trio.current_time()
    for _ in range(1000):
        delay = pace.delay(70, 70, 1)
        delays.append(delay)
        await trio.sleep(delay)
    assert min(delay for delay in delays if delay) >= 0.02
    assert trio.current_time() - began == pytest.approx(1000 / pace.rate, abs=0.03)


def test_merges_that_rows_waited_for_count() -> None:
    pace = Pace()
    pace.record(1000, 1.0, waited=True)
    pace.record(0, 2.0, waited=True)
    pace.record(0, 50.0, waited=False)
    pace.record(1000, 1.0, waited=False)
    assert pace.rate == pytest.approx(2000 / 4.0)


@pytest.mark.parametrize(("merge_every", "merge_seconds"), [(1, 0.0), (4, 26.0), (8, 65.0)])
async def test_the_head_stays_bounded_and_the_builder_busy_when_merges_take_its_time(
    merge_every: int, merge_seconds: float, autojump_clock: trio.testing.MockClock
) -> None:
    pace = Pace()
    seal_rows, seal_seconds = 32_768, 4.0
    head = 0
    most = 0
    added = 0

    async def build() -> None:
        nonlocal head
        seals = 0
        while True:
            if head < seal_rows:
                await trio.sleep(0.1)
                continue
            await trio.sleep(seal_seconds)
            head -= seal_rows
            seals += 1
            pace.record(seal_rows, seal_seconds, waited=True)
            if merge_seconds and seals % merge_every == 0:
                await trio.sleep(merge_seconds)
                pace.record(0, merge_seconds, waited=True)

    async def add() -> None:
        nonlocal head, most, added
        while True:
            # One of two clients that pipeline 500 rows, as fast as 20,000 rows a second.
            await trio.sleep(max(0.025, pace.delay(head, LIMIT, 500)))
            head += 500
            added += 500
            most = max(most, head)

    with trio.move_on_after(2000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(build)
            nursery.start_soon(add)
            nursery.start_soon(add)
    sustained = merge_every * seal_rows / (merge_every * seal_seconds + merge_seconds)
    assert most < 2.5 * LIMIT
    assert added / 2000 > 0.95 * sustained
