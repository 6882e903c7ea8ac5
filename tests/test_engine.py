from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import large_string
from engram.columns import open_columns, write_columns
from engram.engine import Engine, Totals
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace
from engram.operations import (
    AddVectors,
    AppendString,
    CopyKey,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    Flush,
    InstallSegment,
    Operation,
    RenameKey,
    SetAttributes,
    SetExpiry,
    SetRange,
    SetString,
    SetStrings,
    decode,
    encode,
)
from tests.conftest import vector


@pytest.fixture(autouse=True, scope="module", params=[large_string.LONGEST_PLAIN, 2])
def longest_plain(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strings that are changed are in blocks, or not."""
    with (
        mock.patch.object(large_string, "LONGEST_PLAIN", request.param),
        mock.patch.object(large_string, "BLOCK_SIZE", 3),
    ):
        yield


KEYS = (b"a", b"b", b"c", b"")
MEMBERS = (b"x", b"y", b"z", b"\xff\x00")
SHAPES = {"cosine": 2, "l2": 3, "dot": 1}

WORDS = (
    *("set", "append", "write", "set many", "rename", "copy"),
    *("delete", "expire", "remove", "describe", "flush", *2 * ("create",), *3 * ("add",)),
)

# One step of a history: a word and choices that `to_operation` fits to the state.
Step = tuple[str, bytes, bytes, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(WORDS), st.sampled_from(KEYS), st.sampled_from(MEMBERS), st.integers(0, 1 << 40)
    ),
    max_size=40,
)


@contextmanager
def engines(seal_rows: int = 64) -> Iterator[Any]:
    """A maker of engines that share one folder of segments."""
    with tempfile.TemporaryDirectory() as folder:
        yield lambda: Engine(SegmentStore(Path(folder), DiskFiles(), 0), seal_rows=seal_rows)


def to_operation(engine: Engine, step: Step) -> Operation | None:
    """What a command would log for this step; None when it would find nothing to do."""
    word, key, member, number = step
    value = engine.keyspace.values.get(key)
    index = value if isinstance(value, VectorIndex) else None
    match word:
        case "set":
            return SetString(key, member, number if number % 2 else None)
        case "append" if value is not None and index is None:
            return AppendString(key, member)
        case "write" if index is None:
            return SetRange(key, number % 5, member)
        case "set many":
            return SetStrings((key, member[:1]), (member, b"%d" % number))
        case "rename" if value is not None:
            return RenameKey(key, KEYS[number % len(KEYS)])
        case "copy" if value is not None and index is None:
            return CopyKey(key, KEYS[number % len(KEYS)])
        case "delete" if value is not None:
            return DeleteKeys((key,))
        case "expire" if value is not None:
            return SetExpiry(key, number if number % 3 else None)
        case "create" if value is None:
            metric = list(SHAPES)[number % 3]
            return CreateIndex(key, SHAPES[metric], metric, 16, 128, "f32")
        case "add" if index is not None:
            numbers = np.arange(number % 7, number % 7 + index.parameters.dimension, dtype="<f4")
            attributes = ((), (None,), (b"",), (b'{"n":%d}' % number,))[number % 4]
            return AddVectors(index.id, (member,), numbers.tobytes(), attributes)
        case "describe" if index is not None and member in index:
            return SetAttributes(index.id, (member,), (b'{"m":%d}' % number if number % 3 else b"",))
        case "remove" if index is not None and member in index:
            return DeleteVectors(index.id, (member,))
        case "flush":
            return Flush()
    return None


def live(engine: Engine, steps: Iterable[Step]) -> list[Operation]:
    operations = []
    for step in steps:
        operation = to_operation(engine, step)
        if operation is not None:
            engine.apply(engine.lsn + 1, operation)
            operations.append(operation)
    return operations


def state(engine: Engine) -> dict[str, Any]:
    """All that clients can see of an engine."""
    return {
        "databases": {number: keys(keyspace) for number, keyspace in engine.keyspaces.items() if keyspace},
        "indices": sorted(engine.indices),
        "lsn": engine.lsn,
    }


def keys(keyspace: Keyspace[Any]) -> dict[str, Any]:
    values: dict[bytes, Any] = {}
    for key, value in keyspace.values.items():
        if not isinstance(value, VectorIndex):
            values[key] = value
            continue
        rows = {}
        for member in value.live:
            rows[member] = (value.vector(member), value.attributes(member), value.live[member])
        values[key] = (value.id, value.parameters, rows)
    return {
        "values": values,
        "expiries": dict(keyspace.expiries),
        "next expiry": keyspace.next_expiry(),
    }


@given(STEPS)
def test_replay_gives_the_same_state(steps: list[Step]) -> None:
    with engines() as make:
        first, second = make(), make()
        for lsn, operation in enumerate(live(first, steps), 1):
            second.apply(lsn, decode(encode(operation)))
        assert state(second) == state(first)


@settings(max_examples=50)
@given(STEPS, STEPS)
def test_a_snapshot_is_restored_as_it_was_and_goes_on_the_same(before: list[Step], after: list[Step]) -> None:
    files = DiskFiles()
    with engines() as make, tempfile.TemporaryDirectory() as folder:
        first, second = make(), make()
        live(first, before)
        path = Path(folder, "snapshot")
        files.make_folder(path)
        columns, metadata = first.export()
        checksum = write_columns(files, path, columns, metadata)
        second.restore(open_columns(path, checksum))
        assert state(second) == state(first)
        assert live(second, after) == live(first, after)
        assert state(second) == state(first)


@given(STEPS)
def test_an_index_is_held_exactly_as_long_as_its_key(steps: list[Step]) -> None:
    with engines() as make:
        engine = make()
        live(engine, steps)
        held = {
            value.id: value for value in engine.keyspace.values.values() if isinstance(value, VectorIndex)
        }
        assert engine.indices == held
        assert not any(index.dropped for index in engine.indices.values())


def test_what_takes_the_place_of_an_index_drops_it() -> None:
    create = CreateIndex(b"a", 2, "l2", 16, 128, "f32")
    changes = (
        SetString(b"a", b""),
        SetStrings((b"a", b"a"), (b"", b"")),
        RenameKey(b"b", b"a"),
        CopyKey(b"b", b"a"),
        DeleteKeys((b"a",)),
        Flush(),
        create,
    )
    for last in changes:
        with engines() as make:
            engine = make()
            engine.apply(1, create)
            engine.apply(2, AddVectors(1, (b"x",), vector(1, 2)))
            index = engine.indices[1]
            engine.apply(3, SetString(b"b", b""))
            engine.apply(4, last)
            assert index.dropped
            assert 1 not in engine.indices
            engine.take_apart(1)
            assert {b"x": 0} in engine.dropped


def test_a_flush_leaves_what_is_large_for_later() -> None:
    """But nobody takes what is gone for something that is there."""
    with engines() as make:
        engine: Engine = make()
        for number in range(100):
            database = number % 2
            engine.apply(
                engine.lsn + 1, CreateIndex(b"%d" % number, 2, "l2", 16, 128, "f32", database=database)
            )
            engine.apply(engine.lsn + 1, AddVectors(engine.lsn, (b"x",), vector(1, 2)))
            if number % 3:
                assert engine.totals().rows == number + 1
        indices = list(engine.indices.values())
        for flush, left in ((Flush(0), 50), (Flush(), 0)):
            engine.apply(engine.lsn + 1, flush)
            assert len(engine.indices) == engine.totals().rows == left
            assert [index.dropped for index in indices] == [
                index.id not in engine.indices for index in indices
            ]
            assert engine.bytes_held() == sum(
                keyspace.bytes_held() for keyspace in engine.keyspaces.values()
            ) + sum(index.bytes_reserved for index in engine.indices.values())
        assert len(engine.dropped) < 30
        engine.take_apart(70)
        assert sum(collection == {b"x": 0} for collection in engine.dropped) == 70
        engine.take_apart(70)
        assert sum(collection == {b"x": 0} for collection in engine.dropped) == 100
        assert engine.flushed == []


def test_a_segment_of_an_index_that_is_gone_is_released() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, InstallSegment(7, "deadbeef", 1, 10, ()))
        assert engine.released_segments == ["deadbeef"]
        engine.apply(2, InstallSegment(7, "", 0, 10, ("deadbeef",)))
        assert engine.released_segments == ["deadbeef"]


def test_append_to_a_missing_key_starts_it() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, AppendString(b"a", b"x"))
        engine.apply(2, AppendString(b"a", b"y"))
        assert engine.keyspace.values == {b"a": b"xy"}


def test_a_range_is_written_into_a_string() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, SetRange(b"a", 2, b"x"))
        assert engine.keyspace.values == {b"a": b"\0\0x"}
        engine.apply(2, SetExpiry(b"a", 50))
        engine.apply(3, SetRange(b"a", 1, b"yz"))
        engine.apply(4, SetRange(b"a", 2, b"123"))
        assert engine.keyspace.values == {b"a": b"\0y123"}
        engine.apply(5, SetRange(b"a", 0, b"."))
        engine.apply(6, SetRange(b"a", 7, b"!"))
        assert engine.keyspace.values == {b"a": b".y123\0\0!"}
        assert engine.keyspace.expiries == {b"a": 50}


def test_a_key_is_renamed_with_its_expiry() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, SetString(b"a", b"1", 50))
        engine.apply(2, SetString(b"b", b"2", 60))
        engine.apply(3, RenameKey(b"a", b"b"))
        assert (engine.keyspace.values, engine.keyspace.expiries) == ({b"b": b"1"}, {b"b": 50})
        engine.apply(4, SetString(b"a", b"3"))
        engine.apply(5, RenameKey(b"a", b"b"))
        assert (engine.keyspace.values, engine.keyspace.expiries) == ({b"b": b"3"}, {})
        engine.apply(6, RenameKey(b"b", b"b"))
        assert engine.keyspace.values == {b"b": b"3"}


def test_a_string_is_copied_with_its_expiry() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, SetString(b"a", b"1", 50))
        engine.apply(2, CopyKey(b"a", b"b"))
        engine.apply(3, AppendString(b"a", b"0"))
        assert engine.keyspace.values == {b"a": b"10", b"b": b"1"}
        assert engine.keyspace.expiries == {b"a": 50, b"b": 50}
        engine.apply(4, SetExpiry(b"a", None))
        engine.apply(5, CopyKey(b"a", b"b"))
        assert engine.keyspace.expiries == {}


def test_attributes_stay_unless_others_are_given() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, CreateIndex(b"a", 1, "l2", 16, 128, "f32"))
        index = engine.indices[1]
        engine.apply(2, AddVectors(1, (b"x", b"y"), vector(1, 2), (b"1", b"2")))
        engine.apply(3, AddVectors(1, (b"x",), vector(3)))
        engine.apply(4, AddVectors(1, (b"z", b"y", b"x"), vector(4, 5, 6), (b"3", None, b"")))
        assert [index.attributes(key) for key in (b"x", b"y", b"z")] == [b"", b"2", b"3"]
        assert [index.vector(key) for key in (b"x", b"y", b"z")] == [vector(6), vector(5), vector(4)]


def test_attributes_are_set_without_the_vectors() -> None:
    with engines() as make:
        engine = make()
        engine.apply(1, CreateIndex(b"a", 2, "l2", 16, 128, "f32"))
        index = engine.indices[1]
        engine.apply(2, AddVectors(1, (b"x", b"y"), vector(1, 2, 3, 4), (b"1", b"2")))
        engine.apply(3, SetAttributes(1, (b"y", b"x"), (b"", b"3")))
        assert [index.attributes(key) for key in (b"x", b"y")] == [b"3", b""]
        assert [index.vector(key) for key in (b"x", b"y")] == [vector(1, 2), vector(3, 4)]
        assert index.rows_dead == 2


@given(steps=STEPS, looks=st.sets(st.integers(0, 40)))
@settings(max_examples=50)
def test_totals_are_sums_over_the_indices(steps: list[Step], looks: set[int]) -> None:
    with engines() as make:
        engine: Engine = make()
        for number, step in enumerate(steps):
            live(engine, [step])
            if number in looks or number == len(steps) - 1:
                indices = engine.indices.values()
                assert engine.totals() == Totals(
                    rows=sum(map(len, indices)),
                    unindexed=sum(index.rows_unindexed for index in indices),
                    dead=sum(index.rows_dead for index in indices),
                    segments=0,
                    bytes_reserved=sum(index.bytes_reserved for index in indices),
                )
