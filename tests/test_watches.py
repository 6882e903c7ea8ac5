"""What breaks a watch, and what that costs: against a plain model, key by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import watches
from engram.database import Database
from engram.engine import Engine
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.operations import (
    CopyKey,
    DeleteKeys,
    ExchangeDatabases,
    Flush,
    MoveKey,
    Operation,
    RenameKey,
    SetExpiry,
    SetString,
    SetStrings,
)
from engram.watches import Watch

KEYS = (b"a", b"b", b"c", b"d")
DATABASES = range(4)
CLIENTS = range(4)

_keys = st.sampled_from(KEYS)
_several = st.lists(_keys, min_size=1, max_size=3).map(tuple)
_databases = st.sampled_from(DATABASES)
OPERATIONS = st.one_of(
    st.builds(SetString, _keys, st.just(b"x"), st.none(), _databases),
    st.builds(lambda keys, number: SetStrings(keys, keys, number), _several, _databases),
    st.builds(DeleteKeys, _several, _databases),
    st.builds(SetExpiry, _keys, st.just(1 << 50), _databases),
    st.builds(RenameKey, _keys, _keys, _databases),
    st.builds(CopyKey, _keys, _keys, _databases, _databases),
    st.builds(MoveKey, _keys, _databases, _databases),
    st.builds(Flush, _databases),
    st.builds(ExchangeDatabases, _databases, _databases),
    st.builds(ExchangeDatabases, _databases, _databases),
    st.just(Flush()),
)


@attrs.frozen
class Watching:
    """A client watches keys, or with none forgets what it watches."""

    client: int
    database: int
    keys: tuple[bytes, ...]


STEPS = st.lists(
    st.one_of(
        OPERATIONS,
        st.builds(Watching, st.sampled_from(CLIENTS), _databases, st.lists(_keys, max_size=3).map(tuple)),
        st.just("clear up"),
    ),
    max_size=60,
)

Place = tuple[int, bytes]


@attrs.define
class Model:
    """What Redis does: each watched key is looked at."""

    held: set[Place] = attrs.field(factory=set)
    watched: dict[int, set[Place]] = attrs.field(factory=lambda: {client: set() for client in CLIENTS})
    broken: set[int] = attrs.field(factory=set)

    def can(self, operation: Operation) -> bool:
        """Whether a command would come to this."""
        match operation:
            case RenameKey(source=key, database=number) | SetExpiry(key=key, database=number):
                return (number, key) in self.held
            case CopyKey(source=key, database=number, destination=other, destination_database=to):
                return (number, key) in self.held and (number, key) != (to, other)
            case MoveKey(key=key, database=number, destination_database=to):
                return (number, key) in self.held and (to, key) not in self.held and number != to
            case ExchangeDatabases(first=first, second=second):
                return first != second
            case DeleteKeys(keys=keys, database=number):
                return {(number, key) for key in keys} <= self.held
        return True

    def change(self, operation: Operation) -> None:
        touched = self._touched(operation)
        self.broken.update(client for client, places in self.watched.items() if places & touched)
        self._carry_out(operation)

    def _touched(self, operation: Operation) -> set[Place]:
        match operation:
            case SetString(key=key, database=number) | SetExpiry(key=key, database=number):
                return {(number, key)}
            case SetStrings(keys=keys, database=number) | DeleteKeys(keys=keys, database=number):
                return {(number, key) for key in keys}
            case RenameKey(source=key, destination=other, database=number):
                return {(number, key), (number, other)}
            case CopyKey(destination=key, destination_database=number):
                return {(number, key)}
            case MoveKey(key=key, database=number, destination_database=to):
                return {(number, key), (to, key)}
            case Flush(database=number):
                return {place for place in self.held if number in (None, place[0])}
            case ExchangeDatabases(first=first, second=second):
                there = {key for number, key in self.held if number in (first, second)}
                return {(number, key) for number in (first, second) for key in there}
        raise AssertionError(operation)

    def _carry_out(self, operation: Operation) -> None:
        match operation:
            case SetString() | SetStrings() | CopyKey():
                self.held |= self._touched(operation)
            case DeleteKeys() | Flush():
                self.held -= self._touched(operation)
            case RenameKey(source=key, destination=other, database=number):
                self.held -= {(number, key)}
                self.held |= {(number, other)}
            case MoveKey(key=key, database=number, destination_database=destination):
                self.held -= {(number, key)}
                self.held |= {(destination, key)}
            case ExchangeDatabases(first=first, second=second):
                to = {first: second, second: first}
                self.held = {(to.get(number, number), key) for number, key in self.held}


@contextmanager
def few_at_once() -> Iterator[None]:
    """Keys are forgotten two at a time."""
    with mock.patch.object(watches, "_KEYS_AT_ONCE", 2):
        yield


def new_database(folder: Path) -> Database:
    return Database(Engine(SegmentStore(folder, DiskFiles(), 0), seal_rows=64), None)


@few_at_once()
@settings(max_examples=500)
@given(steps=STEPS)
def test_watches_break_where_a_walk_over_all_keys_finds_a_change(steps: list[Any]) -> None:
    database, model = new_database(Path("none")), Model()
    held = {client: Watch() for client in CLIENTS}
    for step in steps:
        match step:
            case Watching(client=client, keys=()):
                database.watches.remove(held[client])
                held[client] = Watch()
                model.watched[client].clear()
                model.broken.discard(client)
            case Watching(client=client, database=number, keys=keys):
                database.watches.add(held[client], number, keys)
                model.watched[client] |= {(number, key) for key in keys}
            case str():
                database.watches.clear_up()
            case _ if model.can(step):
                model.change(step)
                database.commit(step)
        assert {client for client in CLIENTS if held[client].broken} == model.broken, step
    for watch in held.values():
        database.watches.remove(watch)
    while database.watches.clear_up():
        pass
    left = database.watches
    assert not any((left.by_key, left._by_database, left._of_existing, left._by_index, left._outdated))
    assert not any(keys for there in left._elsewhere.values() for keys in there.values())


class CountedKeys(dict[bytes, Any]):
    """Counts how many of its keys are looked at."""

    looked_at = 0

    def __contains__(self, key: object) -> bool:
        self.looked_at += 1
        return super().__contains__(key)


@pytest.mark.parametrize("watched", [0, 1, 2])
@pytest.mark.parametrize("there", [False, True])
def test_keys_that_are_watched_cost_an_exchange_of_databases_nothing(
    tmp_path: Path, watched: int, there: bool
) -> None:
    """Whether or not they are there in one of the two."""
    database, watch = new_database(tmp_path), Watch()
    names = [b"%d" % number for number in range(1000)]
    keyspaces = [database.engine.keyspaces[number] for number in range(3)]
    held = tuple(names if there else [b"other-" + name for name in names])
    database.commit(SetStrings(held, held, 1))
    database.watches.add(watch, watched, names)
    counted = [CountedKeys(keyspace.values) for keyspace in keyspaces]
    for keyspace, values in zip(keyspaces, counted, strict=True):
        keyspace.values = values
    database.commit(ExchangeDatabases(0, 1))
    assert sum(values.looked_at for values in counted) == 0
    assert watch.broken == (there and watched < 2)


def _set_again(number: int) -> Sequence[Operation]:
    return SetString(b"a", b"x", None, 1), DeleteKeys((b"a",), 1)


def _flush_again(number: int) -> Sequence[Operation]:
    return SetString(b"a", b"x", None, 1), Flush(1)


@pytest.mark.parametrize("change", [_set_again, _flush_again])
def test_what_comes_and_goes_in_another_database_leaves_no_trace(
    tmp_path: Path, change: Callable[[int], Sequence[Operation]]
) -> None:
    database, watch = new_database(tmp_path), Watch()
    database.watches.add(watch, 0, [b"a"])
    for number in range(10):
        for operation in change(number):
            database.commit(operation)
    database.commit(ExchangeDatabases(0, 1))
    assert not watch.broken
    database.commit(SetString(b"a", b"x", None, 1))
    database.commit(ExchangeDatabases(1, 0))
    assert watch.broken


@few_at_once()
def test_what_is_known_of_many_watched_keys_is_forgotten_bit_by_bit(tmp_path: Path) -> None:
    database, watch = new_database(tmp_path), Watch()
    names = tuple(b"%d" % number for number in range(100))
    database.commit(SetStrings(names, names, 1))
    database.watches.add(watch, 0, names)
    database.commit(Flush(1))
    assert next(step for step in count() if not database.watches.clear_up()) == 49
    assert len(watch) == 100
    assert not watch.broken
