"""No change is made by half: an error anywhere in one leaves it out, or ends the database.

For every operation an error is raised at each line in turn that is carried out beneath `Database.commit`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import numpy as np
import pytest

from engram.database import Database
from engram.engine import Engine
from engram.errors import ChangeFailureError, RecordTooLargeError
from engram.files import DiskFiles
from engram.index.build_process import BuildJob, build_segment
from engram.index.builder import live_rows
from engram.index.head import ALIVE
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace
from engram.kinds import KINDS
from engram.operations import (
    AddVectors,
    AppendString,
    CopyKey,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    ExchangeDatabases,
    Flush,
    InstallSegment,
    MoveKey,
    Operation,
    RenameKey,
    SetAttributes,
    SetExpiry,
    SetRange,
    SetString,
    SetStrings,
    known_operations,
)
from tests.conftest import ManualJournal

DIMENSION = 3
SEAL_ROWS = 16
# The chunks of such an index hold eight rows, so that the head is in two and the second one is full.
ROWS = 16
INDEX = 1

Trace = Callable[[FrameType, str, Any], Any]


def vectors(*numbers: int) -> bytes:
    return np.repeat(np.array(numbers, "<f4"), DIMENSION).tobytes()


def members(*numbers: int) -> tuple[bytes, ...]:
    return tuple(b"m%d" % number for number in numbers)


# Makes a state in which the operations below have much to do.
BEFORE: tuple[Operation, ...] = (
    CreateIndex(b"index", DIMENSION, "l2", 16, 128, "f32"),
    AddVectors(INDEX, members(*range(ROWS - 2)), vectors(*range(ROWS - 2)), (b'{"n":1}',) * (ROWS - 2)),
    AddVectors(INDEX, members(1, 9), vectors(21, 29)),
    CreateIndex(b"other", 2, "dot", 16, 128, "f32"),
    SetString(b"string", b"value", 5000),
    SetString(b"lasting", b"value"),
    SetString(b"elsewhere", b"value", None, 1),
)

CASES: dict[type[Operation], Sequence[Operation]] = {
    SetString: (
        SetString(b"new", b"x", 7000),
        SetString(b"string", b"x"),
        SetString(b"index", b"x"),
    ),
    AppendString: (AppendString(b"string", b"x"), AppendString(b"new", b"x")),
    DeleteKeys: (DeleteKeys((b"string", b"index", b"nosuch", b"lasting")),),
    SetExpiry: (SetExpiry(b"lasting", 6000), SetExpiry(b"string", None)),
    Flush: (Flush(), Flush(0), Flush(1)),
    CreateIndex: (
        CreateIndex(b"new", 2, "dot", 16, 128, "f32"),
        CreateIndex(b"other", 2, "dot", 16, 128, "f32"),
    ),
    AddVectors: (
        AddVectors(INDEX, members(99), vectors(1)),
        AddVectors(INDEX, members(3), vectors(1), (b'{"n":2}',)),
        AddVectors(INDEX, members(3), vectors(1)),
        AddVectors(INDEX, members(3, *range(90, 110), 3), vectors(*range(22)), (None, *(b"{}",) * 21)),
    ),
    DeleteVectors: (
        DeleteVectors(INDEX, members(6)),
        DeleteVectors(INDEX, members(1, 2, 3, 10, 77, 2)),
    ),
    # What "segment" stands for is built from the rows of the index.
    InstallSegment: (
        InstallSegment(INDEX, "segment", 0, ROWS - 3, ()),
        InstallSegment(77, "segment", 0, ROWS - 3, ()),
    ),
    SetAttributes: (
        SetAttributes(INDEX, members(4), (b'{"n":3}',)),
        SetAttributes(INDEX, members(4, 5, 1), (b'{"n":3}', b"", b"{}")),
    ),
    SetStrings: (SetStrings((b"new", b"string", b"index", b"new"), (b"1", b"2", b"3", b"4")),),
    SetRange: (SetRange(b"string", 2, b"xyz"), SetRange(b"new", 2, b"xyz")),
    RenameKey: (RenameKey(b"string", b"index"), RenameKey(b"index", b"new"), RenameKey(b"string", b"string")),
    CopyKey: (CopyKey(b"string", b"index"), CopyKey(b"string", b"new"), CopyKey(b"string", b"string", 0, 1)),
    MoveKey: (MoveKey(b"string", 0, 1), MoveKey(b"index", 0, 1)),
    ExchangeDatabases: (ExchangeDatabases(0, 1),),
}


def test_every_operation_has_a_case() -> None:
    assert CASES.keys() == set(KINDS.effects) == set(known_operations().values())
    for kind, operations in CASES.items():
        assert {type(operation) for operation in operations} == {kind}


class Bench:
    """Databases that share a folder of segments, each with the changes of `BEFORE` made."""

    def __init__(self, folder: Path) -> None:
        self._store = SegmentStore(folder, DiskFiles(), 0)
        self._segments: dict[InstallSegment, InstallSegment] = {}

    def engine(self) -> Engine:
        return Engine(self._store, seal_rows=SEAL_ROWS)

    def database(self, *, counting: bool = False) -> Database:
        database = Database(self.engine(), ManualJournal())
        database.engine.keyspaces.count(counting)
        for operation in BEFORE:
            database.commit(operation)
        return database

    def built(self, operation: Operation) -> Operation:
        """The operation, with a segment that has been built where it wants one."""
        if not isinstance(operation, InstallSegment):
            return operation
        if operation not in self._segments:
            index = self.database().engine.indices[INDEX]
            plan = index.plan_optimization()
            assert plan is not None
            name = f"segment{len(self._segments)}"
            self._store.write_rows(name, live_rows(plan))
            parameters = index.parameters
            job = BuildJob(str(self._store.folder), name, INDEX, **attrs.asdict(parameters))
            checksum = build_segment(job, DiskFiles()).checksum
            self._segments[operation] = InstallSegment(
                operation.index, name, checksum, plan.through, operation.replaces
            )
        return self._segments[operation]

    def adopt(self, operation: Operation) -> None:
        """Opens the segment that the operation is about to put into effect, as who has built it does."""
        if isinstance(operation, InstallSegment):
            self._store.adopt(self._store.open(operation.segment, operation.checksum))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("segments"))


def state(engine: Engine) -> dict[str, Any]:
    """All of an engine that replay must make again."""
    return {
        "lsn": engine.lsn,
        "databases": {number: keys(keyspace) for number, keyspace in engine.keyspaces.items() if keyspace},
        "indices": {index_id: rows(index) for index_id, index in engine.indices.items()},
        # Room that an index has taken for rows to come is no part of what it holds.
        "totals": attrs.evolve(engine.totals(), bytes_reserved=0),
    }


def keys(keyspace: Keyspace[Any]) -> dict[str, Any]:
    """All of a keyspace that replay must make again."""
    counted = keyspace._text_bytes
    return {
        "values": {
            key: value.id if isinstance(value, VectorIndex) else bytes(value)
            for key, value in keyspace.values.items()
        },
        "others": sorted(value.id for value in keyspace.others),
        "scanned": sorted(scanned(keyspace.scan)),
        "order": list(keyspace.values),
        "expiries": keyspace.expiries,
        "next expiry": keyspace.next_expiry(),
        "bytes": None if counted is None else sum(map(len, _texts(keyspace))) - counted,
    }


def scanned(scan: Callable[[int, int], tuple[int, list[bytes]]]) -> Iterator[bytes]:
    """All that a scan finds."""
    cursor, found = scan(0, 1000)
    yield from found
    while cursor:
        cursor, found = scan(cursor, 1000)
        yield from found


def _texts(keyspace: Keyspace[Any]) -> Iterator[bytes]:
    for key, value in keyspace.values.items():
        yield key
        if isinstance(value, bytes):
            yield value


def rows(index: VectorIndex) -> dict[str, Any]:
    """Every row an index holds, dead or alive, and what it tells of itself."""
    chunks = [chunk for chunk in index._head.chunks if chunk.count]
    return {
        "parameters": index.parameters,
        "next row": index.next_row,
        "live": index.live,
        "scanned": sorted(scanned(index.scan)),
        "key bytes": index._key_bytes,
        "head rows": index.rows_unindexed,
        "head": [
            (
                chunk.row_ids[position],
                chunk.keys[position],
                chunk.vectors[position].tobytes(),
                chunk.births[position],
                chunk.deaths[position],
                chunk.attributes.get(position, b""),
            )
            for chunk in chunks
            for position in range(chunk.count)
        ],
        "dead": [chunk.dead for chunk in chunks],
        "died": [int(np.count_nonzero(chunk.deaths[: chunk.count] != ALIVE)) for chunk in chunks],
        "segments": [
            (installed.id, installed.deaths.tolist(), installed.dead) for installed in index.segments
        ],
        "members": {key: (index.vector(key), index.attributes(key)) for key in index.live},
    }


class Failing:
    """Raises an error at one line, by number, of those that are carried out beneath a call."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.place = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Trace | None:
        if "/engram/" not in frame.f_code.co_filename and "conftest" not in frame.f_code.co_filename:
            return None
        # Whether an error is handled on the way is for the code to say, not for this.
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise MemoryError
        return self

    def call(self, function: Callable[[], object]) -> BaseException | None:
        """What the call raises with that error in it."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None


def check(database: Database, bench: Bench, place: str) -> None:
    """What is live is what the log makes, unless the database has ended, which takes nothing then."""
    journal = database.journal
    assert isinstance(journal, ManualJournal)
    if database.failure is not None:
        with pytest.raises(ChangeFailureError):
            database.commit(SetString(b"a", b"b"))
        return
    replayed = bench.engine()
    replayed.keyspaces.count(database.engine.keyspace.counting)
    for lsn, operation in journal.records:
        replayed.apply(lsn, operation)
    assert state(database.engine) == state(replayed), place


CHANGES = [operation for operations in CASES.values() for operation in operations]


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: repr(change)[:60])
def test_an_error_at_any_line_of_a_change(bench: Bench, change: Operation, counting: bool) -> None:
    operation = bench.built(change)
    ended = left_out = 0
    for line in count(1):
        database = bench.database(counting=counting)
        failing = Failing(line)
        bench.adopt(operation)
        error = failing.call(lambda database=database: database.commit(operation))  # type: ignore[misc]
        if not failing.place:
            break
        # It is not a change that has been made.
        assert error is not None, failing.place
        check(database, bench, failing.place)
        if database.failure is not None:
            ended += 1
            continue
        if database.lsn == len(BEFORE):
            left_out += 1
            database.commit(operation)
            check(database, bench, failing.place)
        if INDEX in database.engine.indices:
            database.commit(AddVectors(INDEX, members(200), vectors(1)))
            check(database, bench, failing.place)
    assert error is None
    assert ended > 2
    assert left_out > 2


@pytest.mark.parametrize("name", ["reserve", "encode", "append", "append_together"])
@pytest.mark.parametrize("error", [MemoryError(), RecordTooLargeError(), KeyError("bug")])
@pytest.mark.parametrize("together", [False, True])
def test_an_error_of_the_log(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, together: bool
) -> None:
    database = bench.database()
    journal = database.journal
    assert isinstance(journal, ManualJournal)
    failures: list[str] = []

    def fail(*arguments: object) -> None:
        raise error

    def change() -> None:
        if not together:
            database.commit(SetString(b"a", b"1"))
            return
        with database.together():
            database.commit(SetString(b"a", b"1"))
            database.commit(SetString(b"b", b"1"))

    monkeypatch.setattr(journal, name, fail)
    failing = Database(database.engine, journal)
    failing.on_failure = lambda: failures.append(name)
    database = failing
    if name in (("reserve",) if together else ("encode", "append_together")):
        change()
        assert database.failure is None
    elif name in ("reserve", "encode"):
        with pytest.raises(type(error)):
            change()
        assert (database.failure, failures) == (None, [])
    else:
        with pytest.raises(ChangeFailureError) as raised:
            change()
        assert raised.value is database.failure
        assert raised.value.__cause__ is error
        assert failures == [name]
    check(database, bench, name)


@pytest.mark.parametrize("counting", [False, True])
def test_an_error_at_any_line_of_changes_together(bench: Bench, counting: bool) -> None:
    operations = (
        SetString(b"new", b"x", 7000),
        AppendString(b"new", b"y"),
        CreateIndex(b"more", DIMENSION, "dot", 16, 128, "f32"),
        AddVectors(INDEX, members(3, *range(90, 110), 3), vectors(*range(22)), (None, *(b"{}",) * 21)),
        DeleteVectors(INDEX, members(1, 99)),
        SetAttributes(INDEX, members(4), (b'{"n":3}',)),
        RenameKey(b"string", b"new"),
        SetStrings((b"a", b"b"), (b"1", b"2")),
        SetRange(b"b", 4, b"x"),
        DeleteKeys((b"other", b"a")),
    )
    database = bench.database()

    def change() -> None:
        with database.together():
            for operation in operations:
                database.commit(operation)

    for line in count(1):
        database = bench.database(counting=counting)
        failing = Failing(line)
        failing.call(change)
        if not failing.place:
            break
        check(database, bench, failing.place)
    journal = database.journal
    assert isinstance(journal, ManualJournal)
    assert journal.together == [operations]


def test_what_watches_a_change_may_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    database = bench.database()

    def fail(operation: Operation) -> None:
        raise MemoryError

    monkeypatch.setattr(database.watches, "about_to_change", fail)
    monkeypatch.setattr(database, "_watched", {b"a": set()})
    with pytest.raises(MemoryError):
        database.commit(SetString(b"a", b"1"))
    check(database, bench, "watches")
    assert b"a" not in database.engine.keyspace.values
