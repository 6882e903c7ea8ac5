from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engram.keyspace import Keyspace

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
TIMES = st.integers(0, 50)


class KeyspaceAgainstDict(RuleBasedStateMachine):
    """A keyspace behaves as a dict of (value, expiry) does."""

    def __init__(self) -> None:
        super().__init__()
        self.keyspace: Keyspace[None] = Keyspace()
        self.model: dict[bytes, tuple[bytes, int | None]] = {}

    @rule(key=KEYS, value=st.binary(max_size=3), expires_at=st.none() | TIMES)
    def set(self, key: bytes, value: bytes, expires_at: int | None) -> None:
        self.keyspace.set(key, value, expires_at)
        self.model[key] = (value, expires_at)

    @rule(keys=st.lists(KEYS, max_size=5), number=st.integers(0, 9))
    def set_many(self, keys: list[bytes], number: int) -> None:
        values = [b"%d" % (number + place) for place in range(len(keys))]
        self.keyspace.set_many(keys, values)
        self.model |= {key: (value, None) for key, value in zip(keys, values, strict=True)}

    @rule(key=KEYS, value=st.binary(max_size=3))
    def update(self, key: bytes, value: bytes) -> None:
        self.keyspace.update(key, value)
        self.model[key] = (value, self.model.get(key, (b"", None))[1])

    @rule(source=KEYS, destination=KEYS)
    def rename(self, source: bytes, destination: bytes) -> None:
        if source in self.model:
            self.keyspace.rename(source, destination)
            self.model[destination] = self.model.pop(source)

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        expected = self.model.pop(key, (None, None))[0]
        assert self.keyspace.delete(key) == expected

    @rule(key=KEYS, expires_at=st.none() | TIMES)
    def set_expiry(self, key: bytes, expires_at: int | None) -> None:
        if key in self.model:
            self.keyspace.set_expiry(key, expires_at)
            self.model[key] = (self.model[key][0], expires_at)

    @rule(now=TIMES, limit=st.integers(1, 4))
    def expired(self, now: int, limit: int) -> None:
        due = {key for key, (_, at) in self.model.items() if at is not None and at <= now}
        found = self.keyspace.expired(now, limit)
        assert len(found) == len(set(found)) == min(limit, len(due))
        assert set(found) <= due

    @invariant()
    def same(self) -> None:
        assert self.keyspace.values == {key: value for key, (value, _) in self.model.items()}
        expiries = {key: at for key, (_, at) in self.model.items() if at is not None}
        assert self.keyspace.expiries == expiries
        assert self.keyspace.random_key() in (self.model or (None,))
        assert self.keyspace.next_expiry() == min(expiries.values(), default=None)


TestKeyspaceAgainstDict = KeyspaceAgainstDict.TestCase


def test_expiries_set_again_and_again_take_no_memory() -> None:
    keyspace: Keyspace[None] = Keyspace()
    for at in range(10_000):
        keyspace.set(b"key", b"value", at)
    assert keyspace.bytes_held() < 20_000


@given(
    st.sets(st.integers(0, 60), max_size=60),
    st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=40),
    st.integers(1, 7),
)
def test_a_scan_returns_every_key_that_is_there_throughout(
    start: set[int], changes: list[tuple[bool, int]], count: int
) -> None:
    keyspace: Keyspace[None] = Keyspace()
    for number in start:
        keyspace.set(b"%d" % number, b"")
    throughout = set(keyspace.values)
    found: list[bytes] = []
    pending = iter(changes)
    cursor, keys = keyspace.scan(0, count)
    found += keys
    while cursor:
        for add, number in [next(pending, (True, 0))]:
            if add:
                keyspace.set(b"%d" % number, b"")
            else:
                keyspace.delete(b"%d" % number)
                throughout.discard(b"%d" % number)
        cursor, keys = keyspace.scan(cursor, count)
        found += keys
    assert throughout <= set(found)


def test_a_scan_cursor_can_be_used_again() -> None:
    keyspace: Keyspace[None] = Keyspace()
    for number in range(30):
        keyspace.set(b"%d" % number, b"")
    cursor, _ = keyspace.scan(0, 10)
    assert keyspace.scan(cursor, 10) == keyspace.scan(cursor, 10)


def test_an_unknown_cursor_starts_over() -> None:
    keyspace: Keyspace[None] = Keyspace()
    keyspace.set(b"key", b"")
    assert keyspace.scan(123456789, 10) == (0, [b"key"])


@pytest.mark.parametrize(("scans", "keys"), [(1000, 30), (16, 30_000)])
def test_any_number_of_scans_at_once_end_after_one_pass(scans: int, keys: int) -> None:
    keyspace: Keyspace[None] = Keyspace()
    for number in range(keys):
        keyspace.set(b"%d" % number, b"")
    count = keys // 3
    pages = [keyspace.scan(0, count) for _ in range(scans)]
    for left in (2, 1):
        assert all(cursor and len(found) == count for cursor, found in pages), left
        pages = [keyspace.scan(cursor, count) for cursor, _ in pages]
    assert [(cursor, len(found)) for cursor, found in pages] == [(0, count)] * scans


def test_a_page_takes_memory_in_proportion_to_the_page() -> None:
    keyspace: Keyspace[None] = Keyspace()
    for number in range(100_000):
        keyspace.set(b"%d" % number, b"")
    tracemalloc.start()
    pages = [keyspace.scan(0, 10) for _ in range(100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(cursor for cursor, _ in pages)
    assert peak < 100_000


@pytest.mark.parametrize("word", ["set", "set_many", "update", "rename", "delete", "expiry", "clear"])
def test_a_scan_ends_though_others_change_keys_between_its_pages(word: str) -> None:
    keyspace: Keyspace[None] = Keyspace()
    for number in range(20):
        keyspace.set(b"%d" % number, b"")
    cursor, found = keyspace.scan(0, 10)
    pages, turn = 1, 0
    while cursor:
        for _ in range(30):
            turn += 1
            new = b"new:%d" % turn
            if word == "set":
                keyspace.set(new, b"")
                keyspace.set(b"%d" % (turn % 20), b"overwritten")
            elif word == "set_many":
                keyspace.set_many([b"%d" % (turn % 20), new, b"and " + new], [b"1", b"2", b"3"])
            elif word == "update":
                keyspace.update(new, b"appended")
            elif word == "rename":
                keyspace.rename(b"%d" % (turn % 20) if turn <= 10 else b"new:%d" % (turn - 10), new)
            elif word == "delete":
                keyspace.delete(b"%d" % (turn % 10))
                keyspace.set(b"%d" % (turn % 10), b"again")
            elif word == "expiry":
                keyspace.set(new, b"", turn)
                for key in keyspace.expired(turn, 10):
                    keyspace.delete(key)
            else:
                keyspace.clear()
                keyspace.set_many([b"%d" % number for number in range(20)], [b""] * 20)
        cursor, more = keyspace.scan(cursor, 10)
        pages += 1
        found += more
        assert pages <= 2
    if word not in ("rename", "delete", "clear"):
        assert {key for key in found if not key.startswith(b"new")} == {
            b"%d" % number for number in range(20)
        }


def test_load_fills_in_bulk() -> None:
    keyspace: Keyspace[None] = Keyspace()
    keyspace.load({b"a": b"1", b"b": b"2"}, {b"b": 5})
    assert keyspace.expired(5, 10) == [b"b"]
    assert len(keyspace) == 2


def test_random_keys_are_all_keys() -> None:
    keyspace: Keyspace[None] = Keyspace()
    keyspace.set_many([b"%d" % number for number in range(10_000)], [b""] * 10_000)
    assert len({keyspace.random_key() for _ in range(100)}) > 50
    for number in range(4_990):
        keyspace.delete(b"%d" % number)
    assert all(keyspace.random_key() in keyspace.values for _ in range(100))
    keyspace.set_many([b"new:%d" % number for number in range(1000)], [b""] * 1000)
    assert any(str(keyspace.random_key()).startswith("b'new:") for _ in range(200))
    keyspace.clear()
    assert keyspace.random_key() is None


def test_keys_that_came_in_place_of_all_others_are_drawn() -> None:
    keyspace: Keyspace[None] = Keyspace()
    keyspace.set_many([b"%d" % number for number in range(5_000)], [b""] * 5_000)
    for number in range(5_000):
        keyspace.rename(b"%d" % number, b"new:%d" % number)
    assert len({str(keyspace.random_key()).startswith("b'new:") for _ in range(100)}) == 1


def test_keys_that_come_and_go_leave_nothing() -> None:
    keyspace: Keyspace[None] = Keyspace()
    keyspace.set(b"stays", b"")
    held = keyspace.bytes_held()
    for number in range(50_000):
        key = b"same" if number % 2 else b"%d" % number
        keyspace.set(key, b"")
        keyspace.delete(key)
    assert keyspace.bytes_held() < held + 20_000
    assert keyspace.scan(0, 10) == (0, [b"stays"])
    keyspace.delete(b"stays")
    assert keyspace.bytes_held() < 1000
