from __future__ import annotations

import math
from collections import Counter

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engram.scan_order import BLOCK_KEYS, PAGE_BYTES, ScanOrder, first_serial

KEYS = [b"%d" % number for number in range(3000)]
LONG = bytes(1 << 15)
PASSED_OVER = 512


@attrs.define
class Scan:
    """A scan under way: what was there at its start, what of it still is, and what has been returned."""

    there: set[bytes]
    throughout: set[bytes]
    entries: int
    count: int
    cursor: int = 0
    pages: int = 0
    returned: Counter[bytes] = attrs.Factory(Counter)


def check(order: ScanOrder, held: dict[bytes, None]) -> None:
    """Looks at all that the order holds."""
    keys = [key for block, _ in order._blocks for key in block] + order._tail
    serials = [serial for _, block in order._blocks for serial in block]
    assert len(keys) == len(set(keys)) == order.entries
    assert set(keys) == held.keys() | order._dead.keys()
    assert held.keys().isdisjoint(order._dead)
    assert serials == sorted(set(serials))
    assert not serials or serials[-1] < order._tail_first
    assert order._firsts == [block[0] for _, block in order._blocks]
    assert all(len(block) == len(numbers) <= BLOCK_KEYS for block, numbers in order._blocks)
    assert order._dead_bytes == sum(map(len, order._dead))
    assert order._long.keys() == {key for key in held if len(key) >= len(LONG)}


class ScanOrderMachine(RuleBasedStateMachine):
    """Scans return what is there throughout, once, and end, whatever is done between their pages."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[bytes, None] = {}
        self.order = ScanOrder(self.held)
        self.scans: list[Scan] = []

    @rule(start=st.integers(0, 2999), count=st.sampled_from([1, 3, 300, 1000]), stride=st.integers(1, 5))
    def add(self, start: int, count: int, stride: int) -> None:
        for key in KEYS[start : start + count : stride]:
            self._add(key)

    @rule(start=st.integers(0, 2999), count=st.sampled_from([1, 3, 300, 1000]))
    def add_together(self, start: int, count: int) -> None:
        keys = KEYS[start : start + count]
        before = len(self.held)
        self.held.update(dict.fromkeys(keys))
        if len(self.held) > before:
            self.order.extend(keys, len(self.held) - before)

    @rule(number=st.integers(0, 3), together=st.booleans())
    def add_long(self, number: int, together: bool) -> None:
        key = LONG + b"%d" % number
        if key not in self.held and together:
            self.held |= {key: None}
            self.order.extend([key], 1)
        else:
            self._add(key)

    @rule(number=st.integers(0, 3))
    def delete_long(self, number: int) -> None:
        self._delete(LONG + b"%d" % number)

    @rule(
        start=st.integers(0, 2999), count=st.sampled_from([1, 3, 300, 1000, 3000]), stride=st.integers(1, 5)
    )
    def delete(self, start: int, count: int, stride: int) -> None:
        for key in KEYS[start : start + count : stride]:
            self._delete(key)

    @rule(start=st.integers(0, 2900))
    def replace(self, start: int) -> None:
        for key in KEYS[start : start + 100]:
            if key in self.held:
                self._delete(key)
                self._add(key)

    @rule()
    def clear(self) -> None:
        self.held = {}
        self.order = ScanOrder(self.held, self.order.next_serial)
        for scan in self.scans:
            scan.throughout.clear()

    @precondition(lambda self: len(self.scans) < 8)
    @rule(count=st.sampled_from([1, 10, 100, 1000]))
    def begin(self, count: int) -> None:
        self.scans.append(Scan(set(self.held), set(self.held), self.order.entries, count))
        self.go_on(len(self.scans) - 1, 1)

    @precondition(lambda self: self.scans)
    @rule(which=st.integers(0, 7), pages=st.integers(1, 30))
    def go_on(self, which: int, pages: int) -> None:
        scan = self.scans[which % len(self.scans)]
        for _ in range(pages):
            before = scan.cursor
            scan.cursor, found = self.order.page(before, scan.count)
            scan.pages += 1
            assert not before or scan.cursor < before
            assert len(found) <= scan.count
            assert self.held.keys() >= set(found)
            scan.returned.update(found)
            if not scan.cursor:
                self.scans.remove(scan)
                assert scan.returned.keys() >= scan.throughout
                assert all(scan.returned[key] == 1 for key in scan.throughout)
                most = math.ceil(len(scan.there) / scan.count) + scan.entries // PASSED_OVER + 1
                assert scan.pages <= most
                return

    @rule()
    def draw(self) -> None:
        if self.held:
            assert self.order.random() in self.held

    @invariant()
    def whole(self) -> None:
        check(self.order, self.held)
        assert self.order.entries <= 2 * len(self.held) + 128

    def _add(self, key: bytes) -> None:
        if key not in self.held:
            self.order.add(key)
            self.held[key] = None

    def _delete(self, key: bytes) -> None:
        if key in self.held:
            del self.held[key]
            self.order.remove(key)
            for scan in self.scans:
                scan.throughout.discard(key)


TestScanOrder = ScanOrderMachine.TestCase
TestScanOrder.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def order_of(count: int) -> tuple[ScanOrder, dict[bytes, None]]:
    held = dict.fromkeys(b"%d" % number for number in range(count))
    return ScanOrder(held), held


def delete(order: ScanOrder, held: dict[bytes, None], key: bytes) -> None:
    del held[key]
    order.remove(key)


class Looked(dict[bytes, None]):
    """Counts the keys that are asked for."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


@pytest.mark.parametrize("count", [1, 10, 1000, 1 << 62])
def test_a_page_looks_at_a_bounded_number_of_entries(count: int) -> None:
    held = Looked((b"%d" % number, None) for number in range(50_000))
    order = ScanOrder(held)
    # Some are gone where the scan begins.
    for number in range(45_000, 50_000):
        delete(order, held, b"%d" % number)
    cursor, first = 0, True
    while cursor or first:
        first = False
        held.looks = 0
        cursor, found = order.page(cursor, count)
        assert held.looks <= min(count, 1 << 14) + PASSED_OVER + 64
        assert len(found) <= min(count, 1 << 14)


def test_a_page_ends_where_keys_are_long() -> None:
    keys = [b"%06d" % number + bytes(10_000 if number % 2 else 100_000) for number in range(200)]
    order = ScanOrder(held := dict.fromkeys(keys))
    found: list[bytes] = []
    cursor, first = 0, True
    while cursor or first:
        first = False
        cursor, page = order.page(cursor, 1000)
        assert sum(map(len, page)) <= 2 * PAGE_BYTES
        found += page
    assert sorted(found) == sorted(held)
    assert order.page(0, 1000, 1)[0]


@pytest.mark.parametrize("order_of_death", ["oldest", "newest", "each third", "one block after another"])
def test_dead_entries_are_few_at_any_time(order_of_death: str) -> None:
    order, held = order_of(20_000)
    keys = list(held)
    if order_of_death == "newest":
        keys.reverse()
    elif order_of_death == "each third":
        keys = [key for start in range(3) for key in keys[start::3]]
    elif order_of_death == "one block after another":
        keys = [key for start in range(BLOCK_KEYS) for key in keys[start::BLOCK_KEYS]]
    for key in keys:
        delete(order, held, key)
        assert order.entries <= 2 * len(held) + 128
        assert len(order._blocks) <= 20_000 // BLOCK_KEYS + 1
    assert order.entries == 0
    assert order.bytes_held == 0


def test_dead_entries_just_behind_the_sweep_are_few() -> None:
    order, held = order_of(20_000)
    while len(held) > 100:
        behind = [*order._blocks[order._hand - 1 :: -1], *order._blocks[::-1], (tuple(order._tail), ())]
        dying = next(living for keys, _ in behind if (living := [key for key in keys if key in held]))
        for key in dying[:32]:
            delete(order, held, key)
            assert order.entries <= 2 * len(held) + 128


def test_blocks_of_which_little_is_left_are_joined() -> None:
    order, held = order_of(100_000)
    for number in range(100_000):
        if number % 100:
            delete(order, held, b"%d" % number)
    # The sweep goes round.
    for number in range(20_000):
        held[b"new:%d" % number] = None
        order.add(b"new:%d" % number)
        delete(order, held, b"new:%d" % number)
    assert len(order._blocks) <= 2 * order.entries // BLOCK_KEYS + 2
    check(order, held)


def test_long_keys_that_are_gone_take_no_memory() -> None:
    order, held = order_of(1000)
    before = order.bytes_held
    for number in range(200):
        key = b"%d" % number + LONG
        held[key] = None
        order.add(key)
        delete(order, held, key)
    for number in range(10_000):
        key = b"%05d" % number + bytes(2000)
        held[key] = None
        order.add(key)
        delete(order, held, key)
    assert order.bytes_held <= before + 400_000


def test_a_key_that_comes_and_goes_takes_one_entry() -> None:
    order, held = order_of(1)
    for _ in range(10_000):
        held[b"key"] = None
        order.add(b"key")
        delete(order, held, b"key")
    assert order.entries == 2


def test_an_entry_takes_some_bytes() -> None:
    order, held = order_of(100_000)
    assert order.bytes_held < 10 * len(held)
    for number in range(0, 100_000, 2):
        delete(order, held, b"%d" % number)
    assert order.bytes_held < 40 * len(held)


def test_cursors_of_no_scan() -> None:
    order, _ = order_of(30)
    everything = order.page(0, 30)
    assert everything == (0, [b"%d" % number for number in range(30)])
    # Of a larger collection, or of a server that started before; and of nobody.
    assert order.page(31, 30) == order.page((1 << 53) - 1, 30) == everything
    assert order.page(1 << 53, 30) == order.page((1 << 64) - 1, 30) == (0, [])
    later = ScanOrder({b"key": None}, 100)
    assert later.page(99, 10) == (0, [])


def test_cursors_of_an_earlier_server_begin_and_end() -> None:
    now = 1_800_000_000_000_000
    held = dict.fromkeys(b"%d" % number for number in range(30))
    earlier, later = ScanOrder(held, first_serial(now)), ScanOrder(held, first_serial(now + 100))
    cursor, _ = earlier.page(0, 20)
    assert cursor < 1 << 53
    cursor, found = later.page(cursor, 20)
    assert len(found) == 20
    assert later.page(cursor, 20) == (0, [b"%d" % number for number in range(10)])


def test_random_keys_are_about_equally_likely() -> None:
    order, held = order_of(BLOCK_KEYS + 44)
    for number in range(250):
        delete(order, held, b"%d" % number)
    drawn = Counter(order.random() for _ in range(5000))
    assert drawn.keys() == held.keys()
    assert max(drawn.values()) < 4 * min(drawn.values())


def test_a_random_key_is_found_among_dead_entries() -> None:
    order, held = order_of(60)
    for number in range(60):
        if number != 30:
            delete(order, held, b"%d" % number)
    assert {order.random() for _ in range(20)} == {b"30"}
