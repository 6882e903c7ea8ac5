"""Kills a server that is being written to, again and again, and checks what it acknowledged.

    python -m tests.crash.torture --kills 300

It is killed at the points that `tests.crash.killing` names, also while it starts, and at random moments.
Each writer owns its keys and sends its requests over one connection, so what a restarted server may hold
of a writer is known exactly: the state after some prefix of its requests, at least as long as what was
acknowledged, at most as long as what was sent. Anything else (an acknowledged write that is gone, an INCR
applied twice, a later write there without an earlier one, a key nobody wrote) is a failure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
from redis import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from tests.crash import loading
from tests.crash.killing import CHILD_ONLY, FAULTS, MODULE, RECOVERY_POINTS, RUNNING_POINTS
from tests.crash.server_process import (
    DEADLINE_SECONDS,
    HOST,
    ServerProcess,
    StartError,
    is_running,
    launch_server,
    start_server,
    wait_until,
)

# Small, so that files rotate, snapshots are made and segments are sealed and merged all the time.
SETTINGS = (
    *("--appendfsync", "always"),
    *("--seal-rows", "256"),
    *("--log-file-size", "256kb"),
    *("--snapshot-log-size", "2mb"),
)

WRITERS = 4
DIMENSION = 64
# The database that strings named so are in; all else is in database 0.
AWAY = 5
SHARED_INDEX = b"shared"
# How many names of each kind a writer uses.
NAMES = {b"string": 1000, b"counter": 20, b"growing": 20, b"away": 30, b"row": 1000}
LARGEST_BATCH = 32
LARGEST_BATCH_OF_ROWS = 8
# Makes a search for a row that is there as good as exact.
SEARCH_EF = 1000
# Rows that are looked up with their own vectors after a restart, beside those just written.
CHECKED_ROWS = 300
DISTANCE_TOLERANCE = 1e-4

# Kills at moments that have no name, and starts that are killed so.
RANDOM = "random moment"
RANDOM_START = "random moment of a start"
# So many kills are at random moments for one at each running point.
RANDOM_IN_CYCLE = 3
# A point that is not reached in this time is missed.
POINT_SECONDS = 45.0
# A point is reached for this time, at most; a random number up to it is drawn.
LATEST_TIME = {"log-write": 150, "log-sync": 150, "snapshot-write": 30, "segment-write": 10}
LATEST_TIME_OF_OTHERS = 2
# The batch of the log from which on a planted fault loses some.
FIRST_LOST = 30
# How often a start is tried that should reach a point.
ATTEMPTS = 4

_POLL_SECONDS = 0.001
_MOMENT_SECONDS = 15.0
_LATEST_DELAY_SECONDS = 0.02
_LATEST_SAVE_SECONDS = 0.5
_PIPELINE = 500

Vector = npt.NDArray[np.float32]
Reply = int | bytes | None | list[Any]


@attrs.frozen
class String:
    """A string and when it lapses, in milliseconds since the epoch."""

    value: bytes
    expires_at: int | None = None


@attrs.frozen(eq=False)
class Row:
    """A vector and its attributes, a JSON text or empty."""

    vector: Vector
    attributes: bytes = b""


@attrs.frozen(eq=False)
class Index:
    metric: str
    members: dict[bytes, Row] = attrs.field(factory=dict)


@attrs.define
class Model:
    """What a writer's part of the keyspace should hold."""

    strings: dict[bytes, String] = attrs.field(factory=dict)
    indices: dict[bytes, Index] = attrs.field(factory=dict)

    def copy(self) -> Model:
        indices = {key: Index(index.metric, dict(index.members)) for key, index in self.indices.items()}
        return Model(dict(self.strings), indices)


@attrs.frozen(eq=False)
class Step:
    """A request, its reply, what it does to a model, and the rows it writes: indices and members.

    EXEC is a step with the requests since MULTI in `queued`.
    """

    request: tuple[bytes, ...]
    reply: Reply
    apply: Callable[[Model], None]
    rows: tuple[tuple[bytes, bytes], ...] = ()
    queued: tuple[tuple[bytes, ...], ...] = ()

    def __str__(self) -> str:
        return " ".join(repr(word[:40]) for word in self.request)

    @property
    def requests(self) -> list[tuple[bytes, ...]]:
        """All that is sent for it."""
        return [(b"MULTI",), *self.queued, self.request] if self.queued else [self.request]

    @property
    def replies(self) -> list[Reply]:
        """All that is answered to it."""
        return [b"OK", *[b"QUEUED"] * len(self.queued), self.reply] if self.queued else [self.reply]


@attrs.frozen
class Script:
    """The random requests of one writer, each made for the state that those before it leave.

    Expiries are absolute times, so that the model knows them.
    """

    prefix: bytes
    metric: str
    random: random.Random
    vectors: np.random.Generator

    @property
    def index(self) -> bytes:
        """The key of the index that is this writer's alone."""
        return self.prefix + b"index"

    def steps(self, model: Model, *, drops: bool) -> Iterator[Step]:
        """Endless; `model` is the state before the next one, and each is applied to it.

        `drops` says whether indices are dropped.
        """
        weights: dict[Callable[[Model], Step | None], float] = {
            self._exec: 8,
            self._set: 20,
            self._set_many: 4,
            self._send_away: 4,
            self._rename: 3,
            self._set_lapsing: 3,
            self._get: 5,
            self._increment: 15,
            self._append: 15,
            self._delete: 6,
            self._expire: 5,
            self._add: 20,
            self._add_many: 4,
            self._set_attributes: 5,
            self._get_attributes: 2,
            self._remove: 5,
            self._remove_matching: 0.3,
            self._find: 4,
        }
        if drops:
            weights[self._drop] = 0.02
        while True:
            [make] = self.random.choices(list(weights), list(weights.values()))
            step = make(model) if self.index in model.indices else self._create()
            if step is not None:
                step.apply(model)
                yield step

    def _name(self, kind: bytes) -> bytes:
        return b"%s%s:%d" % (self.prefix, kind, self.random.randint(1, NAMES[kind]))

    def _string(self, model: Model) -> bytes | None:
        """A key that may hold a string; None when it does not."""
        [kind] = self.random.choices((b"string", b"counter", b"growing"), (10, 1, 1))
        key = self._name(kind)
        return key if key in model.strings else None

    def _row(self, model: Model) -> tuple[bytes, bytes] | None:
        """An index and a row that may be in it; None when it is not."""
        index, member = self.random.choice((SHARED_INDEX, self.index)), self._name(b"row")
        return (index, member) if member in model.indices[index].members else None

    def _set(self, model: Model) -> Step:
        # Now and then a record is larger than a file of the log.
        [largest] = self.random.choices((20, 200, 5_000, 300_000), (600, 350, 50, 1))
        key, value = self._name(b"string"), self.random.randbytes(self.random.randint(0, largest))
        return Step((b"SET", key, value), b"OK", _put(key, String(value)))

    def _exec(self, model: Model) -> Step:
        makers: list[Callable[[Model], Step | None]] = [
            *(self._set, self._set_many, self._rename, self._get, self._increment, self._append),
            *(self._delete, self._expire, self._add, self._add_many, self._set_attributes, self._remove),
            self._find,
        ]
        inside = model.copy()
        steps: list[Step] = []
        while len(steps) < 2 or self.random.random() < 0.7:
            step = self.random.choice(makers)(inside)
            if step is not None:
                step.apply(inside)
                steps.append(step)

        def apply(model: Model) -> None:
            for step in steps:
                step.apply(model)

        return Step(
            (b"EXEC",),
            [step.reply for step in steps],
            apply,
            tuple(row for step in steps for row in step.rows),
            tuple(step.request for step in steps),
        )

    def _set_many(self, model: Model) -> Step:
        keys = {self._name(b"string") for _ in range(self.random.randint(1, 5))}
        strings = {key: String(self.random.randbytes(self.random.randint(0, 50))) for key in sorted(keys)}
        words = [word for key, string in strings.items() for word in (key, string.value)]
        return Step((b"MSET", *words), b"OK", lambda model: model.strings.update(strings))

    def _send_away(self, model: Model) -> Step:
        """A string comes to be in another database: set there, copied there, or moved there."""
        key, value = self._name(b"away"), self.random.randbytes(self.random.randint(0, 50))
        select, back = (b"SELECT", b"%d" % AWAY), (b"SELECT", b"0")
        ways: list[tuple[list[tuple[bytes, ...]], list[Reply]]] = [
            ([select, (b"SET", key, value), back], [b"OK", b"OK", b"OK"]),
            (
                [(b"SET", key, value), (b"COPY", key, key, b"DB", select[1], b"REPLACE"), (b"DEL", key)],
                [b"OK", 1, 1],
            ),
            (
                [select, (b"DEL", key), back, (b"SET", key, value), (b"MOVE", key, select[1])],
                [b"OK", int(key in model.strings), b"OK", b"OK", 1],
            ),
        ]
        requests, replies = self.random.choice(ways)
        return Step((b"EXEC",), replies, _put(key, String(value)), (), tuple(requests))

    def _rename(self, model: Model) -> Step | None:
        source, destination = self._name(b"string"), self._name(b"string")
        if source not in model.strings:
            return None

        def apply(model: Model) -> None:
            model.strings[destination] = model.strings.pop(source)

        return Step((b"RENAME", source, destination), b"OK", apply)

    def _set_lapsing(self, model: Model) -> Step:
        # Never touched again, for it depends on the moment whether it is there.
        key = b"%slapsing:%d" % (self.prefix, self.random.getrandbits(64))
        expires_at = int(time.time() * 1000) + self.random.randint(200, 4000)
        request = (b"SET", key, b"short-lived", b"PXAT", b"%d" % expires_at)
        return Step(request, b"OK", _put(key, String(b"short-lived", expires_at)))

    def _get(self, model: Model) -> Step | None:
        key = self._string(model)
        return None if key is None else Step((b"GET", key), model.strings[key].value, _change_nothing)

    def _increment(self, model: Model) -> Step:
        key = self._name(b"counter")
        old = model.strings.get(key, String(b"0"))
        number = int(old.value) + 1
        return Step((b"INCR", key), number, _put(key, String(b"%d" % number, old.expires_at)))

    def _append(self, model: Model) -> Step:
        key, suffix = self._name(b"growing"), self.random.randbytes(self.random.randint(1, 20))
        old = model.strings.get(key, String(b""))
        new = String(old.value + suffix, old.expires_at)
        return Step((b"APPEND", key, suffix), len(new.value), _put(key, new))

    def _delete(self, model: Model) -> Step | None:
        key = self._string(model)
        return None if key is None else Step((b"DEL", key), 1, lambda model: _drop(model.strings, key))

    def _expire(self, model: Model) -> Step | None:
        key = self._string(model)
        if key is None:
            return None
        old = model.strings[key]
        if old.expires_at is not None:
            return Step((b"PERSIST", key), 1, _put(key, String(old.value)))
        seconds = int(time.time()) + self.random.randint(10_000, 1_000_000)
        return Step((b"EXPIREAT", key, b"%d" % seconds), 1, _put(key, String(old.value, seconds * 1000)))

    def _create(self) -> Step:
        def apply(model: Model) -> None:
            model.indices[self.index] = Index(self.metric)

        request = (b"VNEW", self.index, b"%d" % DIMENSION, b"METRIC", self.metric.encode())
        return Step(request, b"OK", apply)

    def _drop(self, model: Model) -> Step:
        return Step((b"DEL", self.index), 1, lambda model: _drop(model.indices, self.index))

    def _vector(self) -> Vector:
        return self.vectors.standard_normal(DIMENSION, np.float32)

    def _attributes(self) -> bytes:
        """A JSON text, or now and then none."""
        if self.random.random() < 0.2:
            return b""
        fields = {"number": self.random.randrange(100), "tag": f"tag {self.random.randrange(5)}"}
        return json.dumps(fields).encode()

    def _add(self, model: Model) -> Step:
        index, member = self.random.choice((SHARED_INDEX, self.index)), self._name(b"row")
        vector = self._vector()
        old = model.indices[index].members.get(member)
        row = Row(vector, old.attributes if old is not None else b"")
        request = (b"VADD", index, member, vector.tobytes())
        return Step(request, int(old is None), _put_rows(index, {member: row}), ((index, member),))

    def _add_many(self, model: Model) -> Step:
        index = self.random.choice((SHARED_INDEX, self.index))
        old = model.indices[index].members
        with_attributes = self.random.random() < 0.7
        rows: dict[bytes, Row] = {}
        words: list[bytes] = []
        for _ in range(self.random.randint(2, LARGEST_BATCH_OF_ROWS)):
            member, vector = self._name(b"row"), self._vector()
            words += (member, vector.tobytes())
            if with_attributes:
                attributes = self._attributes()
                words.append(attributes)
            else:
                attributes = old[member].attributes if member in old else b""
            # Of a member given twice the last counts.
            rows[member] = Row(vector, attributes)
        request = (b"VMADD", index, *words, *((b"ATTRS",) if with_attributes else ()))
        new = len(rows.keys() - old.keys())
        return Step(request, new, _put_rows(index, rows), tuple((index, member) for member in rows))

    def _set_attributes(self, model: Model) -> Step | None:
        found = self._row(model)
        if found is None:
            return None
        index, member = found
        row = Row(model.indices[index].members[member].vector, self._attributes())
        request = (b"VSETATTR", index, member, row.attributes)
        return Step(request, 1, _put_rows(index, {member: row}), (found,))

    def _get_attributes(self, model: Model) -> Step | None:
        found = self._row(model)
        if found is None:
            return None
        index, member = found
        attributes = model.indices[index].members[member].attributes
        return Step((b"VGETATTR", index, member), attributes or None, _change_nothing)

    def _remove_matching(self, model: Model) -> Step:
        number, tag = self.random.randrange(100), f"tag {self.random.randrange(5)}"
        if self.random.random() < 0.5:
            condition = f".number == {number}"

            def matches(fields: dict[str, Any]) -> bool:
                return bool(fields["number"] == number)
        else:
            condition = f".tag == '{tag}' and .number < {number // 4}"

            def matches(fields: dict[str, Any]) -> bool:
                return bool(fields["tag"] == tag and fields["number"] < number // 4)

        members = [
            member
            for member, row in model.indices[self.index].members.items()
            if row.attributes and matches(json.loads(row.attributes))
        ]

        def apply(model: Model) -> None:
            for member in members:
                del model.indices[self.index].members[member]

        return Step((b"VDELBY", self.index, b"FILTER", condition.encode()), len(members), apply)

    def _remove(self, model: Model) -> Step | None:
        row = self._row(model)
        if row is None:
            return None
        index, member = row
        return Step((b"VDEL", *row), 1, lambda model: _drop(model.indices[index].members, member))

    def _find(self, model: Model) -> Step | None:
        row = self._row(model)
        return None if row is None else find(*row, model)


def find(index: bytes, member: bytes, model: Model) -> Step:
    """The search for a row with its own vector."""
    row = model.indices[index].members[member]
    request = (b"VSEARCH", index, row.vector.tobytes(), b"1", b"EF", b"%d" % SEARCH_EF, b"WITHATTRS")
    return Step(request, [member, b"0", row.attributes or None], _change_nothing)


def _put_rows(index: bytes, rows: dict[bytes, Row]) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.indices[index].members.update(rows)

    return apply


def _put(key: bytes, string: String) -> Callable[[Model], None]:
    def apply(model: Model) -> None:
        model.strings[key] = string

    return apply


def _drop(values: dict[bytes, Any], key: bytes) -> None:
    del values[key]


def _change_nothing(model: Model) -> None:
    pass


@attrs.define
class Held:
    """What a server holds, as read between two times (milliseconds since the epoch)."""

    began: float
    ended: float
    strings: dict[bytes, String]
    # The distance of each member to the probe, and its attributes.
    indices: dict[bytes, dict[bytes, tuple[float, bytes]]]

    def of(self, prefix: bytes) -> Held:
        """What of it is one writer's."""
        strings = {key: string for key, string in self.strings.items() if key.startswith(prefix)}
        indices = {
            key: {member: row for member, row in members.items() if member.startswith(prefix)}
            for key, members in self.indices.items()
            if key == SHARED_INDEX or key.startswith(prefix)
        }
        return Held(self.began, self.ended, strings, indices)


def read_back(client: Redis, probe: Vector) -> Held:
    """Reads everything a server holds."""
    began = time.time() * 1000
    strings: dict[bytes, String] = {}
    indices = {}
    index_keys: list[bytes] = []
    # The last that is selected is the one that the client goes on with.
    for database in (AWAY, 0):
        client.execute_command("SELECT", database)
        keys = sorted(client.scan_iter(count=10_000))
        assert len(keys) == len(set(keys))
        strays = [key for key in keys if (b":away:" in key) is not (database == AWAY)]
        assert not strays, f"{strays[:3]!r} are in database {database}"
        index_keys = [key for key in keys if key == SHARED_INDEX or key.endswith(b":index")]
        string_keys = [key for key in keys if key not in index_keys]
        values = run_all(client, ((b"GET", key) for key in string_keys))
        expiries = run_all(client, ((b"PEXPIRETIME", key) for key in string_keys))
        strings.update(
            (key, String(value, None if expires_at == -1 else expires_at))
            for key, value, expires_at in zip(string_keys, values, expiries, strict=True)
            # One that lapses meanwhile is not there.
            if value is not None and expires_at != -2
        )
    for key in index_keys:
        count = int(client.execute_command("VINFO", key)[5])
        found = client.execute_command("VSEARCH", key, probe.tobytes(), count, "WITHATTRS")
        indices[key] = {
            member: (float(far), attributes or b"")
            for member, far, attributes in zip(found[::3], found[1::3], found[2::3], strict=True)
        }
        assert len(indices[key]) == count == len(found) // 3, f"{key!r} has {count} rows, {len(found)} words"
    return Held(began, time.time() * 1000, strings, indices)


def run_all(client: Redis, requests: Iterable[Sequence[bytes]]) -> list[Any]:
    """The replies to requests, sent in pipelines."""
    replies: list[Any] = []
    for batch in _batched(requests, _PIPELINE):
        pipeline = client.pipeline(transaction=False)
        for request in batch:
            pipeline.execute_command(*request)
        replies += pipeline.execute()
    return replies


def _batched(items: Iterable[Sequence[bytes]], size: int) -> Iterator[list[Sequence[bytes]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def difference(model: Model, held: Held, probe: Vector) -> str:
    """What is not as in the model; empty when everything is."""
    for key in model.strings.keys() | held.strings.keys():
        expected, found = model.strings.get(key), held.strings.get(key)
        if expected is not None and expected.expires_at is not None:
            if found is None and expected.expires_at <= held.ended:
                continue
            if found is not None and expected.expires_at <= held.began:
                return f"{key!r} is there, but lapsed"
        if expected != found:
            return f"{key!r} holds {_short(found)} instead of {_short(expected)}"
    if model.indices.keys() != held.indices.keys():
        return f"there are the indices {sorted(held.indices)} instead of {sorted(model.indices)}"
    for key, index in model.indices.items():
        members = held.indices[key]
        if strays := index.members.keys() ^ members.keys():
            stray = min(strays)
            return f"{stray!r} is {'there' if stray in members else 'gone'} in {key!r} ({len(strays)} such)"
        if not members:
            continue
        rows = np.stack([row.vector for row in index.members.values()])
        for (member, row), expected_far in zip(
            index.members.items(), distances(index.metric, probe, rows), strict=True
        ):
            far, attributes = members[member]
            if abs(far - expected_far) > DISTANCE_TOLERANCE * max(1, expected_far):
                return f"{member!r} in {key!r} is {far} away instead of {expected_far}"
            if attributes != row.attributes:
                return f"{member!r} in {key!r} has attributes {attributes!r} instead of {row.attributes!r}"
    return ""


def distances(metric: str, probe: Vector, rows: Vector) -> list[float]:
    query, matrix = probe.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        found = np.linalg.norm(matrix - query, axis=1)
    else:
        found = 1 - matrix @ query / (np.linalg.norm(matrix, axis=1) * np.linalg.norm(query))
    return [float(far) for far in found]


def _short(string: String | None) -> str:
    if string is None:
        return "nothing"
    return f"{len(string.value)} bytes {string.value[-40:]!r} that lapse at {string.expires_at}"


@attrs.define
class Writer:
    """Sends a script over one connection and remembers what was acknowledged."""

    script: Script
    acknowledged: Model = attrs.field(factory=Model)
    in_flight: deque[Step] = attrs.field(factory=deque)
    recent: set[tuple[bytes, bytes]] = attrs.field(factory=set)
    acknowledgements: int = 0
    failure: BaseException | None = None

    def run(self, port: int, drops: bool) -> None:
        """Writes until the connection breaks; any other end is kept as `failure`."""
        try:
            self._write(port, drops)
        except (RedisConnectionError, OSError):
            return
        except (AssertionError, RedisError) as error:
            self.failure = error

    def _write(self, port: int, drops: bool) -> None:
        connection = Connection(host=HOST, port=port, retry=None, socket_timeout=DEADLINE_SECONDS)
        steps = self.script.steps(self.acknowledged.copy(), drops=drops)
        try:
            connection.connect()
            while True:
                size = self.script.random.randint(1, LARGEST_BATCH)
                self.in_flight.extend(itertools.islice(steps, size))
                connection.send_packed_command(
                    connection.pack_commands(
                        [request for step in self.in_flight for request in step.requests]
                    )
                )
                while self.in_flight:
                    step = self.in_flight[0]
                    for expected in step.replies:
                        reply = connection.read_response()
                        assert reply == expected, f"{step} was answered {reply!r} instead of {expected!r}"
                    self._acknowledge(step)
                    self.acknowledgements += 1
        finally:
            connection.disconnect()

    def _acknowledge(self, step: Step) -> None:
        step.apply(self.acknowledged)
        self.in_flight.popleft()
        self.recent.update(step.rows)

    def reconcile(self, held: Held, probe: Vector) -> int:
        """Finds how many of the steps in flight the server kept, and takes them for acknowledged.

        Raises:
            AssertionError: what the server holds is the state after no prefix of what was sent.
        """
        kept = 0
        first = last = difference(self.acknowledged, held, probe)
        sent = len(self.in_flight)
        while last and self.in_flight:
            self._acknowledge(self.in_flight[0])
            kept += 1
            last = difference(self.acknowledged, held, probe)
        assert not last, (
            f"no prefix of what was sent leads here. As acknowledged: {first}."
            f" With all {sent} in flight: {last}"
        )
        self.in_flight.clear()
        self.acknowledged.strings = {
            key: string
            for key, string in self.acknowledged.strings.items()
            if string.expires_at is None or string.expires_at > held.ended
        }
        return kept

    def rows_to_find(self, count: int | None) -> list[tuple[bytes, bytes]]:
        """Rows written since the last call and `count` others, or all there are."""
        rows = [(key, member) for key, index in self.acknowledged.indices.items() for member in index.members]
        recent, self.recent = self.recent, set()
        if count is None or count >= len(rows):
            return rows
        return [*recent.intersection(rows), *self.script.random.sample(rows, count)]


Moment = Callable[[], bool]


@attrs.frozen
class Round:
    """A kill of a server that is written to, and then of as many that start; each at a point or at random."""

    point: str = RANDOM
    starts: tuple[str, ...] = ()


def schedule(kills: int, points: Sequence[str], chance: random.Random) -> list[Round]:
    """So many rounds, in cycles of which each has every point once; without `points` random moments, too."""
    chosen = points or (*RUNNING_POINTS, *RECOVERY_POINTS)
    rounds: list[Round] = []
    while len(rounds) < kills:
        starts: dict[str, list[str]] = {point: [] for point in chosen if point not in RECOVERY_POINTS}
        for point in chosen:
            if point in RECOVERY_POINTS:
                starts.setdefault(RECOVERY_POINTS[point], []).append(point)
        cycle = [Round(point, _in_order(its_starts, chance)) for point, its_starts in starts.items()]
        cycle += [Round()] * (0 if points else RANDOM_IN_CYCLE)
        chance.shuffle(cycle)
        rounds += cycle
    return rounds[:kills]


def _in_order(starts: list[str], chance: random.Random) -> tuple[str, ...]:
    """In any order, but last those after which there may be nothing left to do."""
    shuffled = chance.sample(starts, len(starts))
    return tuple(sorted(shuffled, key=lambda point: point.startswith("after")))


@attrs.define
class Torture:
    """A data directory, its writers, and the server that comes and goes, for as many rounds as there are.

    `kills` counts what was killed at each point, `missed` the points that were not reached. Without `saves`
    no client asks for snapshots.
    """

    directory: Path
    seed: int
    rounds: deque[Round]
    settings: tuple[str, ...] = SETTINGS
    saves: bool = True
    writers: list[Writer] = attrs.field(init=False)
    server: ServerProcess | None = None
    kills: Counter[str] = attrs.field(factory=Counter)
    missed: Counter[str] = attrs.field(factory=Counter)
    torn_tails: int = 0
    save_failure: BaseException | None = None
    _start_seconds: float = 1.0
    _counter: Path = attrs.field(init=False)
    _number: int = 0
    _attempts: Counter[str] = attrs.field(factory=Counter)
    _random: random.Random = attrs.field(init=False)
    _probe: Vector = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._counter = self.directory.absolute().with_name(f"{self.directory.name}.counter")
        self._random = random.Random(self.seed)
        self._probe = np.random.default_rng(self.seed).standard_normal(DIMENSION, np.float32)
        self.writers = [
            Writer(
                Script(
                    b"w%d:" % number,
                    ("cosine", "l2")[number % 2],
                    random.Random(f"{self.seed} {number}"),
                    np.random.default_rng([self.seed, number]),
                )
            )
            for number in range(WRITERS)
        ]

    def begin(self) -> None:
        """Starts the first server."""
        server = self._start()
        with server.client() as client:
            client.execute_command("VNEW", SHARED_INDEX, DIMENSION, "METRIC", "l2")
        for writer in self.writers:
            writer.acknowledged.indices[SHARED_INDEX] = Index("l2")

    def kill_once(self) -> str:
        """Does the next round: writes, kills the server, starts it again and checks it; returns a line on it.

        Raises:
            AssertionError: an answer was wrong, or what is there afterwards is.
        """
        assert self.server is not None
        this = self.rounds.popleft()
        before = self.acknowledgements
        children = self._write_and_kill(self.server, this.point)
        acknowledged = self.acknowledgements - before
        in_flight = sum(len(writer.in_flight) for writer in self.writers)
        self._end(self.server, this.point)
        self._kill_starts(this)
        server = self._start()
        kept, held = self._check(server, CHECKED_ROWS)
        wait_until(lambda: not any(map(is_running, children)), "the children of the killed server to end")
        rows = sum(map(len, held.indices.values()))
        return (
            f"{this.point:<28} {acknowledged:>6} acknowledged, {kept:>3} of {in_flight:>3} in flight kept;"
            f" {len(held.strings)} strings and {rows} rows are right; started in {self._start_seconds:.2f} s"
        )

    def finish(self) -> None:
        """Shuts down in good order, and looks at everything once more after another start."""
        assert self.server is not None
        exit_code = self.server.terminate()
        assert exit_code == 0, self.server.errors
        self._end(self.server)
        torn_tails = self.torn_tails
        server = self._start()
        assert self.torn_tails == torn_tails, "a clean shutdown left a torn tail"
        self._check(server, None)
        assert server.terminate() == 0, server.errors
        self._end(server)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self._counter.unlink(missing_ok=True)

    def _start(self) -> ServerProcess:
        """Starts a server that will be killed at the point of the next round."""
        self._counter.unlink(missing_ok=True)
        began = time.monotonic()
        point = self.rounds[0].point if self.rounds else RANDOM
        self.server = start_server("--dir", str(self.directory), *self.settings, module=self._module(point))
        self._start_seconds = time.monotonic() - began
        return self.server

    def _module(self, point: str) -> tuple[str, ...]:
        """The module that runs a server, and what it is to be told."""
        if point == RANDOM:
            return ("engram",)
        _, _, event = point.removeprefix(CHILD_ONLY).partition("-")
        if point in FAULTS:
            self._number = FIRST_LOST
        elif point in RECOVERY_POINTS:
            self._number = 1
        else:
            self._number = self._random.randint(1, LATEST_TIME.get(event, LATEST_TIME_OF_OTHERS))
        return (MODULE, point, str(self._number), "--counter", str(self._counter), "--")

    def _times_reached(self) -> int:
        return self._counter.stat().st_size if self._counter.exists() else 0

    def _end(self, server: ServerProcess, point: str = RANDOM) -> None:
        """Reads what an ended server had to say: a cut tail, how far it has come, a child that was killed."""
        for line in server.errors.splitlines():
            if cut := re.fullmatch(r"engram: the last \d+ bytes of the log are .* kept in (.*)", line):
                assert Path(cut[1]).stat().st_size > 0
                self.torn_tails += 1
                continue
            expected = [r'time=\S+ level=warning message="(reading|opening) .*: \d+ of \d+ MiB"']
            if point.startswith(CHILD_ONLY):
                expected.append(
                    r'time=\S+ level=warning message="building a segment .* ended with code -9: it has not'
                    r' said why"'
                )
            assert any(re.fullmatch(each, line) for each in expected), f"on standard error: {server.errors}"
        server.close()

    def _kill_starts(self, this: Round) -> None:
        """Kills servers that start: at the points of the round, or at random moments now and then."""
        for point in this.starts:
            self._counter.write_bytes(b"")
            server = launch_server("--dir", str(self.directory), *self.settings, module=self._module(point))
            with suppress(StartError):
                server.wait_until_listening()
            if server.port:
                self._miss(point, this.point)
                server.kill()
            else:
                exit_code = server.wait()
                assert exit_code == -signal.SIGKILL, f"ended with {exit_code}: {server.errors}"
                assert self._times_reached() == 1
                self.kills[point] += 1
            self._end(server)
        while this.point == RANDOM and self._random.random() < 0.5:
            server = launch_server("--dir", str(self.directory), *self.settings)
            # Not to wait for anything: any moment of the start will do.
            time.sleep(self._random.uniform(0.5, 1) * self._start_seconds)
            server.kill()
            self._end(server)
            self.kills[RANDOM_START] += 1

    def _miss(self, point: str, before: str) -> None:
        """A start had nothing to do there; it depends on what the kill before it has left."""
        self._attempts[point] += 1
        if self._attempts[point] % ATTEMPTS:
            # Not next: the server that comes next has been promised another round.
            self.rounds.append(Round(before, (point,)))
        else:
            self.missed[point] += 1

    def _choose_moment(self) -> Moment:
        """What tells that a random moment has come: something appears, or so much has been written."""
        patterns = {
            "log file": "wal-*.log",
            "building": "segments/*.building",
            "segment": "segments/*[0-9a-f]",
            "snapshot": "snapshot-*",
            "written": "snapshot-*/columns.json",
        }
        name = self._random.choice(["writes", "manifest", *patterns])
        if name == "writes":
            count = self.acknowledgements + self._random.randint(1, 4000)
            return lambda: self.acknowledgements >= count
        if name == "manifest":
            return self._manifest_changes()
        pattern = patterns[name]
        seen = set(self.directory.glob(pattern))
        return lambda: not seen.issuperset(self.directory.glob(pattern))

    def _manifest_changes(self) -> Moment:
        manifest = self.directory / "MANIFEST"
        old = manifest.stat().st_ino
        return lambda: manifest.stat().st_ino != old

    @property
    def acknowledgements(self) -> int:
        return sum(writer.acknowledgements for writer in self.writers)

    def _write_and_kill(self, server: ServerProcess, point: str) -> list[int]:
        """Lets the writers write until the server is killed at the point, or a little after a random moment.

        Returns the process ids of the children that the server had.
        """
        self.save_failure = None
        before = self.acknowledgements
        # An index that is dropped as its builder is killed takes the failure with it.
        arguments = server.port, not point.startswith(CHILD_ONLY)
        threads = [threading.Thread(target=writer.run, args=arguments) for writer in self.writers]
        if self.saves:
            threads.append(threading.Thread(target=self._save, args=(server,)))
        for thread in threads:
            thread.start()
        try:
            self._wait(server, lambda: self.acknowledgements > before + 100, _MOMENT_SECONDS)
            if point == RANDOM:
                self._wait(server, self._choose_moment(), _MOMENT_SECONDS)
            else:
                self._wait_for_point(server, point)
            if point in (RANDOM, *FAULTS) or point.startswith(CHILD_ONLY):
                time.sleep(self._random.uniform(0, _LATEST_DELAY_SECONDS))
            died = server.process.poll()
            children = list(server.children()) + _running_with(str(self._counter), besides=server.pid)
        finally:
            server.kill()
            for thread in threads:
                thread.join()
        at_point = point != RANDOM and self._times_reached() >= self._number
        if died is None:
            self.kills[RANDOM] += 1
        else:
            assert died == -signal.SIGKILL, f"the server ended with {died}: {server.errors}"
            assert at_point, "the server was killed by something else"
            self.kills[point] += 1
        self._raise_failures(point)
        return children

    def _raise_failures(self, point: str) -> None:
        failures = [writer.failure for writer in self.writers]
        if not (point.startswith(CHILD_ONLY) and "ended with code -9" in str(self.save_failure)):
            failures.append(self.save_failure)
        for failure in failures:
            if failure is not None:
                raise failure

    def _wait(self, server: ServerProcess, moment: Moment, seconds: float) -> bool:
        """Whether the moment came before the server ended, a writer failed, and the time was over."""
        deadline = time.monotonic() + seconds
        while not (came := moment()):
            failed = any(writer.failure for writer in self.writers)
            if failed or server.process.poll() is not None or time.monotonic() > deadline:
                return moment()
            time.sleep(_POLL_SECONDS)
        return came

    def _wait_for_point(self, server: ServerProcess, point: str) -> None:
        """Waits until the server has been killed at a point; at one of a child, until it has gone on without.

        A point that is not reached is missed, and the server is still there.
        """
        self._counter.write_bytes(b"")
        if point in FAULTS or point.startswith(CHILD_ONLY):
            reached = self._wait(server, lambda: self._times_reached() >= self._number, POINT_SECONDS)
        else:
            reached = self._wait(server, lambda: server.process.poll() is not None, POINT_SECONDS)
        if not reached and server.process.poll() is None:
            self.missed[point] += 1
        elif point in FAULTS:
            count = self.acknowledgements + 20
            self._wait(server, lambda: self.acknowledgements > count, _MOMENT_SECONDS)
        elif point.startswith(CHILD_ONLY):
            self.kills[point] += 1
            self._see_it_done_again(server, point)

    def _see_it_done_again(self, server: ServerProcess, point: str) -> None:
        """Waits for another child that does what the one that was killed did not."""
        if "snapshot" in point:
            done = self._wait(server, self._manifest_changes(), POINT_SECONDS)
        else:
            with server.client() as client:
                builds = client.info("vectors")["vectors_builds"]
                done = self._wait(
                    server, lambda: client.info("vectors")["vectors_builds"] > builds, POINT_SECONDS
                )
                failed = client.info("vectors")["vectors_builds_failed"]
                assert failed == 1, f"{failed} builds failed after a child was killed at {point}"
        assert done, f"nothing came after a child was killed at {point}"

    def _save(self, server: ServerProcess) -> None:
        """Makes snapshots now and then, until the connection breaks."""
        with server.client() as client:
            while True:
                # Not to wait for anything: a pause of any length will do.
                time.sleep(self._random.uniform(0, _LATEST_SAVE_SECONDS))
                try:
                    client.execute_command("VSAVE")
                except RedisConnectionError:
                    return
                except ResponseError as error:
                    if "already in progress" not in str(error):
                        self.save_failure = error

    def _check(self, server: ServerProcess, sample: int | None) -> tuple[int, Held]:
        """Compares what a restarted server holds with what was acknowledged and what was sent.

        Returns how many steps in flight it has kept, and what it holds. `sample` rows of each writer are
        looked up with their own vectors, all when it is None.
        """
        with server.client() as client:
            held = read_back(client, self._probe)
            kept = sum(
                writer.reconcile(held.of(writer.script.prefix), self._probe) for writer in self.writers
            )
            strays = [key for key in (*held.strings, *held.indices) if not self._is_ours(key)]
            assert not strays, f"nobody wrote {strays[:3]!r}"
            steps = [
                find(*row, writer.acknowledged)
                for writer in self.writers
                for row in writer.rows_to_find(sample)
            ]
            replies = run_all(client, [step.request for step in steps])
            wrong = [
                f"{step} found {reply!r} instead of {step.reply!r}"
                for step, reply in zip(steps, replies, strict=True)
                if reply != step.reply
            ]
            assert not wrong, f"{len(wrong)} of {len(steps)} searches went wrong; {wrong[0]}"
        return kept, held

    def _is_ours(self, key: bytes) -> bool:
        return key == SHARED_INDEX or any(key.startswith(writer.script.prefix) for writer in self.writers)


def _running_with(word: str, besides: int) -> list[int]:
    """The ids of all other processes with that word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(path.parent.name)
        with suppress(FileNotFoundError, ProcessLookupError):
            if pid != besides and word.encode() in path.read_bytes():
                found.append(pid)
    return found


def report(torture: Torture) -> str:
    """A table of what was killed where, and how often."""
    points = (*RUNNING_POINTS, *RECOVERY_POINTS, RANDOM, RANDOM_START)
    counted = [point for point in points if torture.kills[point] or torture.missed[point]]
    lines = [f"| {point} | {torture.kills[point]} | {torture.missed[point]} |" for point in counted]
    return "\n".join(("| point | kills | not reached |", "|---|---|---|", *lines))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.torture", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=300, help="of servers that are written to")
    parser.add_argument(
        "--points", type=_points, default=(), help="NAME,...; default: all, and random moments"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the writes and the moments; default: random"
    )
    parser.add_argument(
        "--loads", type=int, default=10, help="indices loaded beside readers, with a kill after each"
    )
    parser.add_argument("--dir", type=Path, help="an empty or missing folder; default: a temporary one")
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    rounds = deque(schedule(arguments.kills, arguments.points, random.Random(seed)))
    with tempfile.TemporaryDirectory(prefix="engram-torture-") as scratch:
        torture = Torture(arguments.dir or Path(scratch) / "data", seed, rounds)
        print(f"seed {seed}, {WRITERS} writers, {arguments.kills} kills while they write", flush=True)
        try:
            torture.begin()
            number = 0
            while torture.rounds:
                number += 1
                print(f"{number:>4}  {torture.kill_once()}", flush=True)
            torture.finish()
            loading.run(Path(scratch) / "loaded", seed, arguments.loads)
        except (AssertionError, RedisError, StartError) as error:
            print(f"FAILED with seed {seed}: {error}")
            if arguments.dir is None:
                kept = tempfile.mkdtemp(prefix="engram-torture-failed-")
                shutil.copytree(torture.directory, kept, dirs_exist_ok=True)
                print(f"the data directory, as it is now: {kept}")
            return 1
        finally:
            torture.close()
            print(report(torture))
    if torture.missed:
        print(f"FAILED with seed {seed}: points were not reached: {', '.join(torture.missed)}")
        return 1
    print(
        f"passed: {torture.acknowledgements} acknowledged requests, {torture.kills.total()} kills,"
        f" {torture.torn_tails} torn tails"
    )
    return 0


def _points(text: str) -> tuple[str, ...]:
    points = tuple(text.split(","))
    if unknown := [point for point in points if point not in RUNNING_POINTS and point not in RECOVERY_POINTS]:
        raise argparse.ArgumentTypeError(f"there is no point {', '.join(unknown)}")
    return points


if __name__ == "__main__":
    sys.exit(main())
