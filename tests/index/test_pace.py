from __future__ import annotations

import itertools

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from engram.index.pace import Pace

LIMIT = 100_000
RATE = round(Pace(lambda: LIMIT).rate)


@attrs.define(eq=False)
class Index:
    rows_unindexed: int = LIMIT
    id: int = 1
    seal_wanted: bool = True


@attrs.define
class Writers:
    """Clients that each want to add rows once; `done` holds when each could, by name."""

    pace: Pace
    nursery: trio.Nursery
    began: float = attrs.Factory(trio.current_time)
    done: dict[str, float] = attrs.Factory(dict)
    scopes: dict[str, trio.CancelScope] = attrs.Factory(dict)

    async def add(self, name: str, index: Index, rows: int) -> None:
        """Starts one, and returns when it waits or is done."""
        self.nursery.start_soon(self._add, name, index, rows)
        await wait_all_tasks_blocked()

    async def _add(self, name: str, index: Index, rows: int) -> None:
        with trio.CancelScope() as self.scopes[name]:
            if (wait := self.pace.admit(index, rows)) is not None:
                await wait()
            self.done[name] = trio.current_time() - self.began


@pytest.fixture
def limit() -> list[int]:
    """The limit, to be changed."""
    return [LIMIT]


@pytest.fixture
def pace(limit: list[int]) -> Pace:
    return Pace(lambda: limit[0])


@pytest.fixture
def writers(pace: Pace, nursery: trio.Nursery) -> Writers:
    return Writers(pace, nursery)


async def test_rows_below_the_limit_do_not_wait(pace: Pace, autojump_clock: MockClock) -> None:
    assert pace.admit(Index(LIMIT - 1), 10 * LIMIT) is None
    # Nothing would be sealed, however long they waited.
    assert pace.admit(Index(2 * LIMIT, seal_wanted=False), 10 * LIMIT) is None


async def test_rows_beyond_the_limit_come_as_fast_as_they_are_sealed(
    writers: Writers, autojump_clock: MockClock
) -> None:
    index = Index()
    for name in "abc":
        await writers.add(name, index, RATE)
    await trio.sleep(4.0)
    # All the same: who came at once goes on at once.
    assert sorted(writers.done) == ["a", "b", "c"]
    assert list(writers.done.values()) == pytest.approx([3.0] * 3)


async def test_rows_come_the_slower_the_further_an_index_is_beyond_the_limit(
    writers: Writers, autojump_clock: MockClock
) -> None:
    await writers.add("a", Index(LIMIT * 3 // 2), RATE)
    await trio.sleep(3.0)
    assert writers.done == {"a": pytest.approx(2.0)}
    await writers.add("b", Index(LIMIT * 100, id=2), RATE)
    await trio.sleep(30.0)
    # Two are beyond the limit by now.
    assert writers.done["b"] == pytest.approx(3.0 + 20.0)


async def test_short_waits_are_saved_up(pace: Pace, autojump_clock: MockClock) -> None:
    index = Index()
    waits = []
    began = trio.current_time()
    for _ in range(1000):
        if (wait := pace.admit(index, 1)) is not None:
            before = trio.current_time()
            await wait()
            waits.append(trio.current_time() - before)
    assert min(waits) >= 0.02 - 1e-9
    assert trio.current_time() - began == pytest.approx(1000 / pace.rate, abs=0.05)


async def test_who_waits_goes_on_as_soon_as_the_rows_fit(writers: Writers, autojump_clock: MockClock) -> None:
    index = Index()
    for name in "abc":
        await writers.add(name, index, 100 * RATE)
    await trio.sleep(1.0)
    index.rows_unindexed = LIMIT - 1
    writers.pace.review(index.id)
    await wait_all_tasks_blocked()
    # The first of them takes the room there is, as one who comes then would.
    assert writers.done == {"a": pytest.approx(1.0)}
    index.rows_unindexed = LIMIT - 100 * RATE - 1
    writers.pace.review(index.id)
    await wait_all_tasks_blocked()
    assert set(writers.done) == {"a", "b", "c"}


@pytest.mark.parametrize("end", ["sealed", "limit", "gone"])
async def test_who_waits_goes_on_when_there_is_nothing_to_wait_for(
    writers: Writers, limit: list[int], end: str, autojump_clock: MockClock
) -> None:
    index = Index()
    for name in "abc":
        await writers.add(name, index, 100 * RATE)
    await trio.sleep(1.0)
    if end == "sealed":
        index.seal_wanted = False
        writers.pace.review(index.id)
    elif end == "limit":
        limit[0] = 1000 * RATE
        writers.pace.review_all()
    else:
        writers.pace.give_up(index.id)
    await wait_all_tasks_blocked()
    assert list(writers.done.values()) == pytest.approx([1.0] * 3)


async def test_what_changes_on_the_way_to_a_wait_counts(pace: Pace, autojump_clock: MockClock) -> None:
    index = Index()
    for gone in (True, False):
        wait = pace.admit(index, 100 * RATE)
        assert wait is not None
        if gone:
            pace.give_up(index.id)
        else:
            index.rows_unindexed = 0
        began = trio.current_time()
        await wait()
        assert trio.current_time() == began


async def test_who_leaves_gives_back_what_was_left_for_him(
    writers: Writers, autojump_clock: MockClock
) -> None:
    index = Index()
    for number in range(10):
        await writers.add(f"gone{number}", index, 100 * RATE)
    await writers.add("stays", index, RATE)
    await trio.sleep(1.1)
    for number in range(10):
        writers.scopes[f"gone{number}"].cancel()
    await trio.sleep(2.0)
    assert writers.done == {"stays": pytest.approx(1.1 + 0.9)}


async def test_one_row_does_not_wait_for_a_large_batch(writers: Writers, autojump_clock: MockClock) -> None:
    index = Index()
    await writers.add("large", index, 100 * RATE)
    await trio.sleep(10.0)
    for number in range(5):
        before = trio.current_time()
        await writers.add(f"small{number}", index, 1 + RATE // 50)
        await trio.sleep(1.0)
        assert writers.done[f"small{number}"] - (before - writers.began) < 0.1
    await trio.sleep(100.0)
    assert writers.done["large"] == pytest.approx(100.0, abs=0.5)


async def test_small_batches_do_not_put_a_large_one_off_for_ever(
    writers: Writers, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    index = Index()

    async def add_for_ever(name: str) -> None:
        for number in itertools.count():
            await writers._add(f"{name}{number}", index, RATE // 10)

    await writers.add("large", index, 10 * RATE)
    for name in "ab":
        nursery.start_soon(add_for_ever, name)
    await trio.sleep(31.0)
    # A third of all rows is its own.
    assert writers.done["large"] == pytest.approx(30.0, abs=0.5)
    assert len(writers.done) == pytest.approx(1 + 2 * 100, abs=15)
    nursery.cancel_scope.cancel()


async def test_indices_beyond_the_limit_share_the_builder(
    writers: Writers, autojump_clock: MockClock
) -> None:
    for number in (1, 2):
        await writers.add(f"{number}", Index(id=number), RATE)
    assert writers.pace.admit(Index(0, id=3), RATE) is None
    await trio.sleep(3.0)
    assert list(writers.done.values()) == pytest.approx([2.0, 2.0], abs=0.1)


async def test_nothing_is_kept_of_an_index_nobody_waits_for(
    writers: Writers, autojump_clock: MockClock
) -> None:
    index = Index()
    await writers.add("a", index, RATE)
    index.rows_unindexed = LIMIT - 1
    await trio.sleep(2.0)
    assert writers.pace._lanes == {}


def test_merges_that_rows_waited_for_count(pace: Pace) -> None:
    pace.record(1000, 1.0, waited=True)
    pace.record(0, 2.0, waited=True)
    pace.record(0, 50.0, waited=False)
    pace.record(1000, 1.0, waited=False)
    assert pace.rate == pytest.approx(2000 / 4.0)


@pytest.mark.parametrize(("merge_every", "merge_seconds"), [(1, 0.0), (4, 26.0), (8, 65.0)])
async def test_the_head_stays_bounded_and_the_builder_busy_when_merges_take_its_time(
    merge_every: int, merge_seconds: float, pace: Pace, autojump_clock: trio.testing.MockClock
) -> None:
    seal_rows, seal_seconds = 32_768, 4.0
    index = Index(0)
    most = 0
    added = 0

    async def build() -> None:
        seals = 0
        while True:
            if index.rows_unindexed < seal_rows:
                await trio.sleep(0.1)
                continue
            await trio.sleep(seal_seconds)
            index.rows_unindexed -= seal_rows
            seals += 1
            pace.record(seal_rows, seal_seconds, waited=True)
            pace.review(index.id)
            if merge_seconds and seals % merge_every == 0:
                await trio.sleep(merge_seconds)
                pace.record(0, merge_seconds, waited=True)

    async def add() -> None:
        nonlocal most, added
        while True:
            # One of two clients that pipeline 500 rows, as fast as 20,000 rows a second.
            await trio.sleep(0.025)
            if (wait := pace.admit(index, 500)) is not None:
                await wait()
            index.rows_unindexed += 500
            added += 500
            most = max(most, index.rows_unindexed)

    with trio.move_on_after(2000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(build)
            nursery.start_soon(add)
            nursery.start_soon(add)
    sustained = merge_every * seal_rows / (merge_every * seal_seconds + merge_seconds)
    assert most < 2.5 * LIMIT
    assert added / 2000 > 0.95 * sustained
