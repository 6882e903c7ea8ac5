"""Lets the power fail at any moment of a server's life, and checks what is recovered.

    python -m tests.crash.power_failures --states 10000

The parts of a server that touch the disk (persistence task, builder, snapshotter, recovery) run in one
process, over files that record what is done to them. From the record, states are made that the disk may be
in when the power fails after any of its events (`recorded_disk`).

From each state a server must recover all that was acknowledged and nothing that was not sent, in order: the
state of keys and vectors after the first n operations, with n no less than what was acknowledged. Recovering
again must give the same, and what is written then must be there the next time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest import mock

import attrs
import numpy as np
import trio
import trio.testing
from trio._core import _run as trio_run

from engram.database import Database
from engram.engine import Engine
from engram.errors import SnapshotRunningError
from engram.exclusion import Exclusion
from engram.files import DiskFiles
from engram.index.build_process import BuildJob, build_segment
from engram.index.builder import Builder
from engram.index.parameters import default_parameters
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
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
    decode,
    encode,
)
from engram.persistence import (
    Persistence,
    PersistenceSettings,
    Recovery,
    current_snapshot,
    lock_directory,
    log,
    recover,
)
from engram.persistence.layout import Layout
from engram.persistence.log_writer import Commit, LogWriter, PreparedFile, Run
from engram.persistence.snapshot import SnapshotResult
from engram.snapshotter import write_snapshot
from tests.crash.recorded_disk import (
    BLOCK_SIZES,
    MANIFEST,
    RECOVERY,
    ROTATION,
    SEGMENT_FOLDER,
    SEGMENT_RECORD,
    STEPS,
    SYNC,
    TRANSACTION,
    WRITE,
    Acknowledged,
    Disk,
    Entry,
    Mark,
    RecordingFiles,
    Recovered,
    Sent,
    Tree,
    Write,
    write_tree,
)

T = TypeVar("T")

DIMENSION = 8
SEAL_ROWS = 16
LOG_FILE_SIZE = 8 << 10

STATES_PER_LIFE = 250
LEAST_PER_STEP = 100
# To find a state that is new, or one with a torn tail.
_TRIES = 10


# What must be recovered.


@attrs.frozen
class IndexValue:
    """An index by its id: vector and attributes of each key."""

    id: int
    metric: str
    rows: dict[bytes, tuple[bytes, bytes]]


Place = tuple[int, bytes]
"""The number of a database, and a key in it."""

# The value and the expiry of each key.
State = dict[Place, tuple[bytes | IndexValue, int | None]]


def after(state: State, lsn: int, operation: Operation) -> State:
    """The state after an operation, as documented and without the engine."""
    new = dict(state)
    match operation:
        case SetString(key, value, expires_at, number):
            new[number, key] = value, expires_at
        case AppendString(key, suffix, number):
            old, expires_at = state.get((number, key), (b"", None))
            assert isinstance(old, bytes)
            new[number, key] = old + suffix, expires_at
        case DeleteKeys(keys, number):
            for key in keys:
                new.pop((number, key), None)
        case SetExpiry(key, expires_at, number):
            new[number, key] = state[number, key][0], expires_at
        case SetStrings(keys, values, number):
            new.update(((number, key), (value, None)) for key, value in zip(keys, values, strict=True))
        case SetRange(key, offset, data, number):
            old, expires_at = state.get((number, key), (b"", None))
            assert isinstance(old, bytes)
            padded = old.ljust(offset, b"\0")
            new[number, key] = padded[:offset] + data + padded[offset + len(data) :], expires_at
        case RenameKey(source, destination, number):
            new[number, destination] = new.pop((number, source))
        case CopyKey(source, destination, number, other):
            new[other, destination] = state[number, source]
        case MoveKey(key, number, other):
            new[other, key] = new.pop((number, key))
        case ExchangeDatabases(first, second):
            exchanged = {first: second, second: first}
            new = {(exchanged.get(number, number), key): held for (number, key), held in state.items()}
        case Flush(number):
            new = {place: held for place, held in state.items() if number not in (None, place[0])}
        case CreateIndex(key, _, metric, database=number):
            new[number, key] = IndexValue(lsn, metric, {}), None
        case AddVectors(index) | DeleteVectors(index) | SetAttributes(index):
            for name, (held, expires_at) in state.items():
                if isinstance(held, IndexValue) and held.id == index:
                    new[name] = attrs.evolve(held, rows=rows_after(held.rows, operation)), expires_at
        case InstallSegment():
            pass
    return new


def rows_after(
    rows: dict[bytes, tuple[bytes, bytes]], operation: AddVectors | DeleteVectors | SetAttributes
) -> dict[bytes, tuple[bytes, bytes]]:
    rows = dict(rows)
    for number, key in enumerate(operation.keys):
        vector, text = rows.pop(key, (b"", b""))
        if isinstance(operation, AddVectors):
            vector = operation.vectors[4 * DIMENSION * number : 4 * DIMENSION * (number + 1)]
            given = operation.attributes[number] if operation.attributes else None
            rows[key] = vector, text if given is None else given
        elif isinstance(operation, SetAttributes):
            rows[key] = vector, operation.attributes[number]
    return rows


class History:
    """What was sent and acknowledged; `states` holds the state after each operation, by LSN, None where that
    is one that nobody may see, inside a transaction."""

    def __init__(self) -> None:
        self.states: list[State | None] = [{}]
        self._newest: State = {}
        self.acknowledged = 0

    @property
    def sent(self) -> int:
        return len(self.states) - 1

    def perform(self, mark: Mark) -> None:
        match mark:
            case Sent(lsn, operation, inside):
                assert lsn == len(self.states)
                self._newest = after(self._newest, lsn, operation)
                self.states.append(None if inside else self._newest)
            case Acknowledged(lsn):
                self.acknowledged = max(self.acknowledged, lsn)
            case Recovered(lsn):
                del self.states[lsn + 1 :]
                newest = self.states[-1]
                assert newest is not None, f"recovered up to {lsn}, inside a transaction"
                self._newest = newest


@attrs.frozen
class Found:
    """What a server would start with."""

    recovery: Recovery
    state: State


@contextmanager
def no_garbage_collected() -> Iterator[None]:
    """As in a server that recovers: CPython 3.11 may fail to parse in two threads when it is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def start(directory: Path, files: DiskFiles | None = None) -> Found:
    """Recovers as a server does when it starts, and reads all that it would serve."""
    files = files or DiskFiles()
    os.close(lock_directory(directory))
    store = SegmentStore(Layout(directory).segments, files, 1)
    engine = Engine(store, seal_rows=SEAL_ROWS)
    with no_garbage_collected():
        recovery = recover(directory, files, engine.restore, engine.apply)
    assert recovery.lsn == engine.lsn
    for index in engine.indices.values():
        for installed in index.segments:
            store.verify(installed.segment)
    state: State = {}
    for number, keyspace in engine.keyspaces.items():
        for key, value in keyspace.values.items():
            found: bytes | IndexValue
            if isinstance(value, VectorIndex):
                rows = {row: (value.vector(row) or b"", value.attributes(row)) for row in value.live}
                found = IndexValue(value.id, value.parameters.metric, rows)
            else:
                found = bytes(value)
            state[number, key] = found, keyspace.expiries.get(key)
    return Found(recovery, state)


LATER = SetString(b"later", b"written after the power came back")
RECOVERIES_PER_STATE = 3


def check(tree: Tree, history: History, directory: Path) -> bool:
    """Recovers a state three times: as it is, again, and after another write.

    Returns whether a torn tail was cut.

    Raises:
        AssertionError: what was recovered is not what it must be.
        EngramError, OSError, ...: it was not recovered at all.
    """
    write_tree(tree, directory)
    first = start(directory)
    lsn = first.recovery.lsn
    assert lsn >= history.acknowledged, f"recovered up to {lsn}, but {history.acknowledged} was acknowledged"
    assert lsn <= history.sent, f"recovered up to {lsn}, but only {history.sent} were sent"
    assert history.states[lsn] is not None, f"recovered up to {lsn}, inside a transaction"
    assert first.state == history.states[lsn], f"not the state after operation {lsn}"
    second = start(directory)
    assert second.recovery.lsn == lsn, f"recovered up to {second.recovery.lsn} after {lsn}"
    assert second.state == first.state, "recovering again gave something else"
    assert not second.recovery.torn_bytes, "a tail was cut twice"
    append(directory, second.recovery, LATER)
    last = start(directory)
    assert last.recovery.lsn == lsn + 1, "what was written after recovery is not there"
    assert last.state == after(first.state, lsn + 1, LATER)
    return first.recovery.torn_bytes > 0


def append(directory: Path, recovery: Recovery, operation: Operation) -> None:
    layout, files = Layout(directory), DiskFiles()
    writer = LogWriter(layout, files, recovery)
    path = layout.prepared(1)
    prepared = PreparedFile(path, LOG_FILE_SIZE, files.create(path, LOG_FILE_SIZE))
    writer.commit([Run(recovery.lsn + 1, prepared, [encode(operation)])], sync=True)
    writer.close()


# Lives of a server.


class RecordedPersistence(Persistence):
    """The persistence task of a server; what is sent and acknowledged is recorded."""

    def __init__(self, files: RecordingFiles, settings: PersistenceSettings, recovery: Recovery) -> None:
        super().__init__(files.directory, files, settings, recovery, lambda last_file: [str(last_file)])
        self._recording = files
        self._append, self._append_together = self.append, self.append_together
        self.append, self.append_together = self._record, self._record_together

    def _record(self, lsn: int, operation: Operation, payload: bytes) -> None:
        self._recording.mark(Sent(lsn, operation))
        if isinstance(operation, InstallSegment):
            self._recording.segment_records.add(payload)
        self._append(lsn, operation, payload)
        self.on_release(lsn, self._acknowledge)

    def _record_together(self, first_lsn: int, payloads: Sequence[bytes]) -> None:
        last_lsn = first_lsn + len(payloads) - 1
        for lsn, payload in enumerate(payloads, first_lsn):
            self._recording.mark(Sent(lsn, decode(payload), inside=lsn < last_lsn))
        self._recording.transactions.add(b"".join(payloads))
        self._append_together(first_lsn, payloads)
        self.on_release(last_lsn, self._acknowledge)

    def _acknowledge(self) -> None:
        # Under other policies than "always" more is released than that.
        self._recording.mark(Acknowledged(self.durable_lsn))


async def run_as_process(files: RecordingFiles, random: Random, function: Callable[[], T]) -> T:
    """Does what another process would, while this one goes on."""
    with files.child() as waiting:
        result = function()
    try:
        while waiting:
            await trio.sleep(random.choice([0, 0, 0.001, 0.05]))
            for _ in range(min(len(waiting), random.randint(1, 12))):
                files.entries.append(waiting.popleft())
    finally:
        # When its parent is killed, it may still come to its end.
        files.entries += waiting
    return result


class RecordedBuilder(Builder):
    """The builder of a server, which builds in this process."""

    def __init__(self, store: SegmentStore, install: Any, files: RecordingFiles, random: Random) -> None:
        super().__init__(store, install)
        self._recording = files
        self._random = random

    async def _run_process(self, index: VectorIndex, name: str) -> int:
        job = BuildJob(str(self._store.folder), name, index.id, **attrs.asdict(index.parameters))
        built = await run_as_process(
            self._recording, self._random, partial(build_segment, job, self._recording)
        )
        return built.checksum


async def admit(persistence: Persistence, exclusion: Exclusion, size: int) -> None:
    """Waits until a change may be made, as a server does."""
    await persistence.admit(size)
    while exclusion.active:
        await exclusion.wait()
        await persistence.admit(size)


class Client:
    """Writes at random, and asks for snapshots."""

    def __init__(
        self, database: Database, persistence: RecordedPersistence, exclusion: Exclusion, random: Random
    ) -> None:
        self._database = database
        self._persistence = persistence
        self._exclusion = exclusion
        self._random = random

    async def run(self, requests: int) -> None:
        for _ in range(requests):
            count = self._random.choice([1, 1, 1, 1, 2, 5])
            await admit(self._persistence, self._exclusion, 6000 * count)
            if count == 1:
                self._commit()
            else:
                await self._commit_together(count)
            lsn = self._database.lsn
            chance = self._random.random()
            if chance < 0.06:
                with suppress(SnapshotRunningError):
                    self._persistence.request_snapshot()
            elif chance < 0.08:
                self._persistence.settings.appendfsync = self._random.choice(["everysec", "no"])
            elif chance < 0.2:
                self._persistence.settings.appendfsync = "always"
            if chance > 0.5:
                await self._released(lsn)
            if chance > 0.95:
                await trio.sleep(self._random.choice([0.05, 0.3, 1.5]))

    async def _commit_together(self, count: int) -> None:
        """In one turn of the loop or in several, as EXEC does."""
        takes_turns = self._random.random() < 0.5
        self._exclusion.begin()
        with self._database.together():
            for _ in range(count):
                self._commit()
                if takes_turns:
                    await trio.sleep(self._random.choice([0, 0, 0.001, 0.2]))
        self._exclusion.end()

    def _commit(self) -> None:
        operation = self._operation()
        self._database.commit(operation)

    async def _released(self, lsn: int) -> None:
        released = trio.Event()
        self._persistence.on_release(lsn, released.set)
        await released.wait()

    def _operation(self) -> Operation:
        random, engine = self._random, self._database.engine
        name = b"index-%d" % random.randrange(2)
        number, another = random.sample([0, 0, 0, 1, 15], 2)
        values = engine.keyspaces[number].values
        value = values.get(name)
        chance = random.random()
        if not isinstance(value, VectorIndex):
            metric = random.choice(["cosine", "l2", "dot"])
            parameters = default_parameters(DIMENSION, metric)
            return CreateIndex(
                name,
                DIMENSION,
                metric,
                parameters.connectivity,
                parameters.expansion,
                parameters.quantization,
                database=number,
            )
        present = sorted(random.sample(sorted(value.live), min(len(value.live), random.randint(1, 6))))
        if chance < 0.4:
            keys = tuple({b"row-%d" % random.randrange(200): None for _ in range(random.randint(1, 10))})
            vectors = np.frombuffer(random.randbytes(4 * DIMENSION * len(keys)), np.uint32)
            texts = tuple(random.choice([None, b"", b'{"year": 2000}']) for _ in keys)
            return AddVectors(
                value.id,
                keys,
                (vectors.astype(np.float64) / 2**31 - 1).astype("<f4").tobytes(),
                random.choice([(), texts]),
            )
        if chance < 0.5 and present:
            return DeleteVectors(value.id, tuple(present))
        if chance < 0.55 and present:
            return SetAttributes(value.id, tuple(present), tuple(b'{"tag": "new"}' for _ in present))
        key, other = (b"key-%d" % random.randrange(30) for _ in range(2))
        if chance < 0.65:
            keys = tuple({b"key-%d" % random.randrange(30): None for _ in range(random.randint(1, 6))})
            return SetStrings(keys, tuple(random.randbytes(random.choice([1, 50])) for _ in keys), number)
        if chance < 0.7:
            return SetRange(key, random.choice([0, 3, 300]), random.randbytes(random.choice([1, 60])), number)
        if chance < 0.85 or key not in values:
            size = random.choice([1, 10, 100, 1000, 3000])
            return SetString(key, random.randbytes(size), random.choice([None, None, 1 << 42]), number)
        if chance < 0.9:
            return AppendString(key, random.randbytes(random.choice([3, 600])), number)
        if chance < 0.91:
            return RenameKey(
                *random.choice([(key, other), (name, b"index-%d" % random.randrange(2))]), number
            )
        if chance < 0.92:
            return CopyKey(key, other, number, another)
        moved = random.choice([key, name])
        if chance < 0.93 and moved not in engine.keyspaces[another].values and another != number:
            return MoveKey(moved, number, another)
        if chance < 0.935:
            return ExchangeDatabases(number, another)
        if chance < 0.95:
            return SetExpiry(key, random.choice([None, 1 << 42]), number)
        if chance < 0.995:
            return DeleteKeys((random.choice([key, key, name]),), number)
        return Flush(random.choice([None, number]))


async def serve(files: RecordingFiles, requests: int, random: Random) -> None:
    """A server from its start to its end, without sockets and searches."""
    layout = Layout(files.directory)
    if not layout.segments.exists():
        files.make_folder(layout.segments)
    store = SegmentStore(layout.segments, files, 1)
    engine = Engine(store, seal_rows=SEAL_ROWS)
    files.recovering = True
    try:
        recovery = recover(files.directory, files, engine.restore, engine.apply)
    finally:
        files.recovering = False
    files.mark(Recovered(recovery.lsn))
    files.mark(Acknowledged(recovery.lsn))
    settings = PersistenceSettings(log_file_size=LOG_FILE_SIZE, snapshot_log_size=8 * LOG_FILE_SIZE)
    persistence = RecordedPersistence(files, settings, recovery)
    database = Database(engine, persistence)
    exclusion = Exclusion()

    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        await admit(persistence, exclusion, 1000)
        if not index.dropped:
            database.commit(operation)

    async def run_child(command: Sequence[str]) -> SnapshotResult:
        last_file = int(command[0])
        return await run_as_process(files, random, partial(write_snapshot, files.directory, last_file, files))

    builder = RecordedBuilder(store, install, files, random)
    database.observe_indices(builder.consider)
    with mock.patch.object(current_snapshot, "run_child", run_child):
        async with trio.open_nursery() as storage_nursery:
            await storage_nursery.start(persistence.run)
            async with trio.open_nursery() as work_nursery:
                await work_nursery.start(builder.run)
                for index in engine.indices.values():
                    builder.consider(index)
                async with trio.open_nursery() as client_nursery:
                    for _ in range(3):
                        client = Client(database, persistence, exclusion, random)
                        client_nursery.start_soon(client.run, requests // 3)
                work_nursery.cancel_scope.cancel()
            persistence.close()
    assert not builder.failures, builder.last_error
    assert persistence.status.last_save_error in ("", "the server is shutting down")


async def call_at_once(function: Callable[..., T], *arguments: Any, **_: Any) -> T:
    """In place of `trio.to_thread.run_sync`: the same seed gives the same life."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


class LogInTurn:
    """In place of `LogThread`, for the same reason."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()

    def stop(self) -> None:
        pass

    async def commit(self, runs: Sequence[Run], *, sync: bool) -> Commit:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        return self._writer.commit(runs, sync=sync)


@contextmanager
def repeatable(random: Random) -> Iterator[None]:
    """What is left to chance otherwise follows `random`: names, salts, and the order of tasks."""
    trio_run._r.seed(random.getrandbits(64))
    with (
        mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(trio.to_thread, "run_sync", call_at_once),
        mock.patch.object(log, "LogThread", LogInTurn),
        mock.patch.object(secrets, "token_hex", lambda size: random.randbytes(size).hex()),
        mock.patch.object(secrets, "randbits", random.getrandbits),
    ):
        yield


def run_server(files: RecordingFiles, requests: int, random: Random) -> None:
    """Runs a server, which may be killed."""
    # Nothing waits; but the time between a deadline and the next moment must pass.
    clock = trio.testing.MockClock(rate=0.001, autojump_threshold=0)
    try:
        with repeatable(random), no_garbage_collected():
            trio.run(serve, files, requests, random, clock=clock)
    except BaseException:
        # Tasks that had not heard of it yet may fail in other ways.
        if not files.killed:
            raise
    files.revive()


MakeFiles = Callable[[Path], RecordingFiles]


class FailedStateError(Exception):
    """A state that is not recovered as it must be; it is kept in `directory`."""

    def __init__(self, reason: str, directory: Path) -> None:
        super().__init__(reason, directory)
        self.directory = directory

    def __str__(self) -> str:
        return f"{self.args[0]}; the state: {self.directory}"


def keep(tree: Tree) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="engram-power-failure-")) / "data"
    write_tree(tree, directory)
    return directory


@attrs.define
class Tally:
    """How many different states were made of the power failing at each step; all passed."""

    states: Counter[str] = attrs.Factory(Counter)

    def add(self, other: Tally) -> None:
        self.states += other.states

    @property
    def total(self) -> int:
        return self.states.total()

    def table(self) -> str:
        lines = [f"{'the power fails in':<20} {'states':>7} {'recoveries':>11}"]
        lines += [
            f"{step:<20} {self.states[step]:>7} {RECOVERIES_PER_STATE * self.states[step]:>11}"
            for step in STEPS
        ]
        lines.append(f"{'all':<20} {self.total:>7} {RECOVERIES_PER_STATE * self.total:>11}")
        return "\n".join(lines)


class Life:
    """A server's life with kills and power failures, recorded, and the states it may leave."""

    def __init__(self, seed: int, scratch: Path, make_files: MakeFiles = RecordingFiles) -> None:
        self.tally = Tally()
        self._random = Random(seed)
        self._scratch = scratch
        self._make_files = make_files
        self._directories = 0
        self._seen: set[bytes] = set()
        # One from each start on an empty disk or after a power failure.
        self._recordings: list[list[Entry]] = []

    def _new_directory(self) -> Path:
        self._directories += 1
        return self._scratch / f"{self._directories}"

    def record(self) -> None:
        """Lives, with servers killed now and then and started on what the system has kept; then the power
        fails in writes, and others go on with what the disk has kept.

        Raises:
            FailedStateError: what it has kept is not as it must be.
        """
        directory = self._new_directory()
        directory.mkdir()
        files = self._make_files(directory)
        random = self._random
        for number in range(4):
            if number < 3:
                kill_somewhere(files, random)
            self._run_server(files, random.randint(20, 120))
        self._recordings.append(files.entries)
        for _ in range(3):
            self._go_on_after_power_failure(files.entries)
        shutil.rmtree(directory)

    def _run_server(self, files: RecordingFiles, requests: int) -> None:
        try:
            run_server(files, requests, self._random)
        except Exception as error:
            kept = Path(tempfile.mkdtemp(prefix="engram-power-failure-")) / "data"
            shutil.copytree(files.directory, kept)
            raise FailedStateError(f"a server: {type(error).__name__}: {error}", kept) from error

    def _go_on_after_power_failure(self, entries: Sequence[Entry]) -> None:
        random = self._random
        points = [
            point
            for point, entry in enumerate(entries, 1)
            if entry.step in (WRITE, SEGMENT_RECORD, TRANSACTION)
            and isinstance(entry.what, Write)
            and len(entry.what.data) > BLOCK_SIZES[0]
        ]
        for _ in range(_TRIES):
            point = random.choice(points or [len(entries)])
            disk, history = replayed(entries[:point])
            tree = disk.after_power_failure(random)
            if self._check(entries[point - 1].step or RECOVERY, tree, history):
                break
        directory = self._new_directory()
        write_tree(tree, directory)
        files = self._make_files(directory)
        for entry in entries[:point]:
            if isinstance(entry.what, Mark):
                files.mark(entry.what)
        kill_somewhere(files, random)
        self._run_server(files, random.randint(3, 60))
        self._recordings.append(files.entries)
        shutil.rmtree(directory)

    def explore(self, count: int) -> None:
        """Checks about so many states, a half of them shared out evenly among the steps.

        Raises:
            FailedStateError: one is not recovered as it must be.
        """
        for entries, points in zip(self._recordings, self._choose_points(count), strict=True):
            disk, history = Disk(), History()
            for point, entry in enumerate(entries):
                if isinstance(entry.what, Mark):
                    history.perform(entry.what)
                else:
                    disk.perform(entry.what)
                for _ in range(points[point]):
                    self._check_any(entry.step, disk, history)

    def _check_any(self, step: str, disk: Disk, history: History) -> None:
        for _ in range(_TRIES):
            if self._check(step, disk.after_power_failure(self._random), history) is not None:
                return

    def _choose_points(self, count: int) -> list[Counter[int]]:
        by_step: dict[str, list[tuple[int, int]]] = {}
        for recording, entries in enumerate(self._recordings):
            for point, entry in enumerate(entries):
                if entry.step:
                    by_step.setdefault(entry.step, []).append((recording, point))
        every = [place for places in by_step.values() for place in places]
        chosen = [self._random.choice(every) for _ in range(count // 2)]
        for places in by_step.values():
            chosen += [self._random.choice(places) for _ in range(count // 2 // len(by_step))]
        points: list[Counter[int]] = [Counter() for _ in self._recordings]
        for recording, point in chosen:
            points[recording][point] += 1
        return points

    def _check(self, step: str, tree: Tree, history: History) -> bool | None:
        """Checks a state, and counts it; returns whether a torn tail was cut, None when it is not new.

        Raises:
            FailedStateError: it is not recovered as it must be.
        """
        digest = hashlib.blake2b(f"{history.acknowledged} {history.sent}".encode())
        for path, content in tree.items():
            digest.update(b"%s\0%d\0" % (path.encode(), -1 if content is None else len(content)))
            digest.update(content or b"")
        if digest.digest() in self._seen:
            return None
        self._seen.add(digest.digest())
        directory = self._new_directory()
        try:
            torn = check(tree, history, directory)
        except Exception as error:
            raise FailedStateError(f"{step}: {type(error).__name__}: {error}", keep(tree)) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self.tally.states[step] += 1
        return torn


def kill_somewhere(files: RecordingFiles, random: Random) -> None:
    if random.random() < 0.5:
        files.kill_after(random.randint(1, 700))
    else:
        files.kill_after(random.randint(1, 20), random.choice([SYNC, ROTATION, SEGMENT_FOLDER, MANIFEST]))


def replayed(entries: Sequence[Entry]) -> tuple[Disk, History]:
    disk, history = Disk(), History()
    for entry in entries:
        if isinstance(entry.what, Mark):
            history.perform(entry.what)
        else:
            disk.perform(entry.what)
    return disk, history


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for thousands of recoveries: in memory where there is such, for syncs cost nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="engram-power-failures-", dir=memory if memory.is_dir() else None
    ) as name:
        yield Path(name)


def explore_life(seed: int, states: int, make_files: MakeFiles = RecordingFiles) -> Tally:
    """Records the life of that seed and checks about so many states. Raises FailedStateError."""
    with scratch_folder() as scratch:
        life = Life(seed, scratch, make_files)
        life.record()
        life.explore(states)
    return life.tally


def explore(seed: int, states: int, jobs: int) -> tuple[Tally, list[str]]:
    """Checks at least so many states, and so many of each step, in as many lives as it takes.

    Returns what passed, and a line for each life in which a state did not.
    """
    # The order of sets of names is the same in every process.
    os.environ["PYTHONHASHSEED"] = "0"
    tally = Tally()
    failures: list[str] = []
    started = 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        while not failures and (
            tally.total < states
            or min(tally.states[step] for step in STEPS) < min(LEAST_PER_STEP, states // LEAST_PER_STEP)
        ):
            lives = max(1, -(-(states - tally.total) // STATES_PER_LIFE))
            seeds = range(seed + started, seed + started + lives)
            started += lives
            futures = {pool.submit(explore_life, each, STATES_PER_LIFE): each for each in seeds}
            for future in as_completed(futures):
                try:
                    tally.add(future.result())
                except Exception as error:
                    failures.append(f"seed {futures[future]}: {type(error).__name__}: {error}")
                    for waiting in futures:
                        waiting.cancel()
                    break
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.power_failures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--states", type=int, default=10_000, help="how many to check at least")
    parser.add_argument("--seed", type=int, default=None, help="of the lives and the states; default: random")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    seed = Random().getrandbits(31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    tally, failures = explore(seed, arguments.states, arguments.jobs)
    print(tally.table())
    for line in failures:
        print(f"FAILED with {line}")
    if failures:
        return 1
    print(f"passed in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
