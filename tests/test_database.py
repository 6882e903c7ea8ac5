from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engram.database import Database
from engram.engine import Engine
from engram.errors import CommandError
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.operations import CreateIndex, DeleteKeys, SetString
from tests.conftest import START, Clock, ManualJournal


@pytest.fixture
def journal() -> ManualJournal:
    return ManualJournal()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path, journal: ManualJournal, clock: Clock) -> Database:
    return Database(Engine(SegmentStore(tmp_path, DiskFiles(), 0), seal_rows=64), journal, now=clock)


def test_a_commit_is_applied_and_logged_under_the_next_number(
    database: Database, journal: ManualJournal
) -> None:
    first, second = SetString(b"a", b"1"), SetString(b"b", b"2")
    assert [database.commit(first), database.commit(second)] == [1, 2]
    assert journal.records == [(1, first), (2, second)]
    assert database.engine.keyspace.values == {b"a": b"1", b"b": b"2"}
    assert database.lsn == 2


def test_a_key_is_there_until_its_time_and_then_deleted_by_who_looks(
    database: Database, journal: ManualJournal, clock: Clock
) -> None:
    database.commit(SetString(b"a", b"1", START + 5))
    clock.time = START + 4
    assert database.logical(0).string(b"a") == b"1"
    clock.time = START + 5
    assert database.logical(0).string(b"a") is None
    assert database.logical(0).string(b"a") is None
    assert journal.records[1:] == [(2, DeleteKeys((b"a",)))]
    assert database.expired_keys == 1


def test_without_room_a_lapsed_key_is_gone_but_not_deleted(
    database: Database, journal: ManualJournal, clock: Clock
) -> None:
    database.commit(SetString(b"a", b"1", START))
    journal.room = False
    assert database.logical(0).lookup(b"a") is None
    assert database.logical(0).live_keys([b"a"]) == []
    assert database.expire_due() == 0
    assert len(journal.records) == 1
    assert database.expired_keys == 0
    journal.room = True
    assert database.expire_due() == 1
    assert database.engine.keyspace.values == {}


def test_keys_that_are_due_are_deleted_in_batches(
    database: Database, journal: ManualJournal, clock: Clock
) -> None:
    for number in range(10):
        database.commit(SetString(b"%d" % number, b"", START + number))
    clock.time = START + 6
    assert [database.expire_due(4), database.expire_due(4), database.expire_due(4)] == [4, 3, 0]
    assert journal.records[10][1] == DeleteKeys((b"0", b"1", b"2", b"3"))
    assert sorted(database.engine.keyspace.values) == [b"7", b"8", b"9"]


def test_as_many_keys_are_deleted_as_the_log_has_room_for(
    database: Database, journal: ManualJournal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        database.commit(SetString(b"%d" % number * 1000, b"", START))
    monkeypatch.setattr(journal, "has_room", lambda size: size < 3000)
    assert [database.expire_due() for _ in range(6)] == [2, 2, 1, 2, 1, 2]
    assert database.engine.keyspace.values == {}


def test_values_of_the_wrong_type(database: Database) -> None:
    database.commit(SetString(b"s", b"1"))
    database.commit(CreateIndex(b"i", 2, "l2", 16, 128, "f32"))
    assert database.logical(0).index(b"i") is database.engine.indices[2]
    with pytest.raises(CommandError, match=r"^WRONGTYPE "):
        database.logical(0).string(b"i")
    with pytest.raises(CommandError, match=r"^WRONGTYPE "):
        database.logical(0).index(b"s")
    assert database.logical(0).index(b"nosuch") is None


KEYS = st.sampled_from([b"a", b"b", b"c"])
DELAYS = st.integers(1, 20)


class DatabaseAgainstDict(RuleBasedStateMachine):
    """Strings and expiries under a clock that moves behave as a dict of (value, expiry) does."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.journal = ManualJournal()
        store = SegmentStore(Path("/nonexistent"), DiskFiles(), 0)
        self.database = Database(Engine(store, seal_rows=64), self.journal, now=self.clock)
        self.replayed = Engine(store, seal_rows=64)
        self.model: dict[bytes, tuple[bytes, int | None]] = {}

    def lapse(self) -> None:
        now = self.clock.time
        self.model = {key: (value, at) for key, (value, at) in self.model.items() if at is None or at > now}

    @rule(key=KEYS, value=st.binary(max_size=3), delay=st.none() | DELAYS)
    def set(self, key: bytes, value: bytes, delay: int | None) -> None:
        expires_at = None if delay is None else self.clock.time + delay
        self.database.commit(SetString(key, value, expires_at))
        self.model[key] = (value, expires_at)

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        assert self.database.logical(0).string(key) == self.model.get(key, (None, None))[0]

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        found = self.database.logical(0).lookup(key) is not None
        assert found == (self.model.pop(key, None) is not None)
        if found:
            self.database.commit(DeleteKeys((key,)))

    @rule(delay=DELAYS)
    def wait(self, delay: int) -> None:
        self.clock.time += delay
        self.lapse()

    @precondition(lambda self: self.journal.room)
    @rule(limit=st.integers(1, 3))
    def expire_due(self, limit: int) -> None:
        before = len(self.database.engine.keyspace)
        expired = self.database.expire_due(limit)
        assert expired == min(limit, before - len(self.model))

    @rule(room=st.booleans())
    def fill_the_log(self, room: bool) -> None:
        self.journal.room = room

    @invariant()
    def shows_what_has_not_lapsed(self) -> None:
        values = self.database.engine.keyspace.values
        shown = {key: values[key] for key in self.database.logical(0).live_keys(values)}
        assert shown == {key: value for key, (value, _) in self.model.items()}

    @invariant()
    def can_be_replayed(self) -> None:
        for lsn, operation in self.journal.records[self.replayed.lsn :]:
            self.replayed.apply(lsn, operation)
        assert self.replayed.keyspace.values == self.database.engine.keyspace.values
        assert self.replayed.keyspace.expiries == self.database.engine.keyspace.expiries


TestDatabaseAgainstDict = DatabaseAgainstDict.TestCase


def test_what_is_changed_together_is_logged_together(database: Database, journal: ManualJournal) -> None:
    first, second, third = SetString(b"a", b"1"), SetString(b"b", b"2"), DeleteKeys((b"a",))
    database.commit(first)
    with database.together():
        assert database.commit(second) == 2
        assert database.logical(0).string(b"b") == b"2"
        with database.together():
            database.commit(third)
        assert journal.records == [(1, first)]
    assert journal.together == [(second, third)]
    assert journal.records[1:] == [(2, second), (3, third)]
    with database.together():
        pass
    assert len(journal.together) == 1


def test_what_was_changed_before_an_error_is_logged(database: Database, journal: ManualJournal) -> None:
    def fail() -> None:
        with database.together():
            database.commit(SetString(b"a", b"1"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert journal.together == [(SetString(b"a", b"1"),)]
    database.commit(SetString(b"a", b"2"))
    assert journal.records[-1] == (2, SetString(b"a", b"2"))
