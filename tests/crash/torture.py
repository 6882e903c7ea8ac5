"""Kills a server that is being written to, again and again, and checks what it acknowledged.

    python -m tests.crash.torture --kills 100

Each writer owns its keys and sends its requests over one connection, so what a restarted server may hold
of a writer is known exactly: the state after some prefix of its requests, at least as long as what was
acknowledged, at most as long as what was sent. Anything else (an acknowledged write that is gone, an INCR
applied twice, a later write there without an earlier one, a key nobody wrote) is a failure.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
from redis import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

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
SHARED_INDEX = b"shared"
# How many names of each kind a writer uses.
NAMES = {b"string": 2000, b"counter": 20, b"growing": 20, b"row": 3000}
LARGEST_BATCH = 32
# Makes a search for a row that is there as good as exact.
SEARCH_EF = 1000
# Rows that are looked up with their own vectors after a restart, beside those just written.
CHECKED_ROWS = 300
DISTANCE_TOLERANCE = 1e-4

_POLL_SECONDS = 0.001
_MOMENT_SECONDS = 15.0
_LATEST_DELAY_SECONDS = 0.02
_PIPELINE = 500

Vector = npt.NDArray[np.float32]
Reply = int | bytes | list[bytes]


@attrs.frozen
class String:
    """A string and when it lapses, in milliseconds since the epoch."""

    value: bytes
    expires_at: int | None = None


@attrs.frozen(eq=False)
class Index:
    metric: str
    members: dict[bytes, Vector] = attrs.field(factory=dict)


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
    """A request, its reply, and what it does to a model."""

    request: tuple[bytes, ...]
    reply: Reply
    apply: Callable[[Model], None]

    def __str__(self) -> str:
        return " ".join(repr(word[:40]) for word in self.request)


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

    def steps(self, model: Model) -> Iterator[Step]:
        """Endless; `model` is the state before the next one, and each is applied to it."""
        weights: dict[Callable[[Model], Step | None], float] = {
            self._set: 20,
            self._set_lapsing: 3,
            self._get: 5,
            self._increment: 15,
            self._append: 15,
            self._delete: 6,
            self._expire: 5,
            self._add: 30,
            self._remove: 5,
            self._find: 4,
            self._drop: 0.02,
        }
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

    def _add(self, model: Model) -> Step:
        index, member = self.random.choice((SHARED_INDEX, self.index)), self._name(b"row")
        vector = self.vectors.standard_normal(DIMENSION, np.float32)

        def apply(model: Model) -> None:
            model.indices[index].members[member] = vector

        is_new = member not in model.indices[index].members
        return Step((b"VADD", index, member, vector.tobytes()), int(is_new), apply)

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
    vector = model.indices[index].members[member]
    request = (b"VSEARCH", index, vector.tobytes(), b"1", b"EF", b"%d" % SEARCH_EF)
    return Step(request, [member, b"0"], _change_nothing)


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
    # The distance of each member to the probe.
    indices: dict[bytes, dict[bytes, float]]

    def of(self, prefix: bytes) -> Held:
        """What of it is one writer's."""
        strings = {key: string for key, string in self.strings.items() if key.startswith(prefix)}
        indices = {
            key: {member: far for member, far in members.items() if member.startswith(prefix)}
            for key, members in self.indices.items()
            if key == SHARED_INDEX or key.startswith(prefix)
        }
        return Held(self.began, self.ended, strings, indices)


def read_back(client: Redis, probe: Vector) -> Held:
    """Reads everything a server holds."""
    began = time.time() * 1000
    keys = sorted(client.scan_iter(count=10_000))
    assert len(keys) == len(set(keys))
    index_keys = [key for key in keys if key == SHARED_INDEX or key.endswith(b":index")]
    string_keys = [key for key in keys if key not in index_keys]
    values = run_all(client, ((b"GET", key) for key in string_keys))
    expiries = run_all(client, ((b"PEXPIRETIME", key) for key in string_keys))
    strings = {
        key: String(value, None if expires_at == -1 else expires_at)
        for key, value, expires_at in zip(string_keys, values, expiries, strict=True)
        # One that lapses meanwhile is not there.
        if value is not None and expires_at != -2
    }
    indices = {}
    for key in index_keys:
        count = int(client.execute_command("VINFO", key)[5])
        found = client.execute_command("VSEARCH", key, probe.tobytes(), count)
        indices[key] = dict(zip(found[::2], map(float, found[1::2]), strict=True))
        assert len(indices[key]) == count == len(found) // 2, f"{key!r} has {count} rows, {len(found)} words"
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
        expected_distances = distances(index.metric, probe, np.stack(list(index.members.values())))
        for (member, far), expected_far in zip(
            ((member, members[member]) for member in index.members), expected_distances, strict=True
        ):
            if abs(far - expected_far) > DISTANCE_TOLERANCE * max(1, expected_far):
                return f"{member!r} in {key!r} is {far} away instead of {expected_far}"
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

    def run(self, port: int) -> None:
        """Writes until the connection breaks; any other end is kept as `failure`."""
        try:
            self._write(port)
        except (RedisConnectionError, OSError):
            return
        except (AssertionError, RedisError) as error:
            self.failure = error

    def _write(self, port: int) -> None:
        connection = Connection(host=HOST, port=port, retry=None, socket_timeout=DEADLINE_SECONDS)
        steps = self.script.steps(self.acknowledged.copy())
        try:
            connection.connect()
            while True:
                size = self.script.random.randint(1, LARGEST_BATCH)
                self.in_flight.extend(itertools.islice(steps, size))
                connection.send_packed_command(
                    connection.pack_commands([step.request for step in self.in_flight])
                )
                while self.in_flight:
                    step = self.in_flight[0]
                    reply = connection.read_response()
                    assert reply == step.reply, f"{step} was answered {reply!r} instead of {step.reply!r}"
                    self._acknowledge(step)
                    self.acknowledgements += 1
        finally:
            connection.disconnect()

    def _acknowledge(self, step: Step) -> None:
        step.apply(self.acknowledged)
        self.in_flight.popleft()
        if step.request[0] == b"VADD":
            self.recent.add((step.request[1], step.request[2]))

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


@attrs.define
class Torture:
    """A data directory, its writers, and the server that comes and goes."""

    directory: Path
    seed: int
    writers: list[Writer] = attrs.field(init=False)
    server: ServerProcess | None = None
    torn_tails: int = 0
    interrupted_starts: int = 0
    save_failure: BaseException | None = None
    _start_seconds: float = 1.0
    _random: random.Random = attrs.field(init=False)
    _probe: Vector = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
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
        """Writes, kills the server at some moment, starts it again and checks it; returns a line on it.

        Raises:
            AssertionError: an answer was wrong, or what is there afterwards is.
        """
        assert self.server is not None
        name, moment = self._choose_moment()
        before = self.acknowledgements
        children = self._write_and_kill(self.server, moment)
        acknowledged = self.acknowledgements - before
        in_flight = sum(len(writer.in_flight) for writer in self.writers)
        self._end(self.server)
        self._interrupt_starts()
        server = self._start()
        kept, held = self._check(server, CHECKED_ROWS)
        wait_until(lambda: not any(map(is_running, children)), "the children of the killed server to end")
        rows = sum(map(len, held.indices.values()))
        return (
            f"{name:<9} {acknowledged:>6} acknowledged, {kept:>3} of {in_flight:>3} in flight kept;"
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

    def _start(self) -> ServerProcess:
        began = time.monotonic()
        self.server = start_server("--dir", str(self.directory), *SETTINGS)
        self._start_seconds = time.monotonic() - began
        return self.server

    def _end(self, server: ServerProcess) -> None:
        """Reads what an ended server had to say: a cut tail, and nothing else."""
        for line in server.errors.splitlines():
            cut = re.fullmatch(r"engram: the log ended in \d+ bytes that .* kept in (.*)", line)
            assert cut is not None, f"on standard error: {server.errors}"
            assert Path(cut[1]).stat().st_size > 0
            self.torn_tails += 1
        server.close()

    def _interrupt_starts(self) -> None:
        """Now and then, kills a server that is starting, too."""
        while self._random.random() < 0.25:
            server = launch_server("--dir", str(self.directory), *SETTINGS)
            # Not to wait for anything: any moment of the start will do.
            time.sleep(self._random.uniform(0.5, 1) * self._start_seconds)
            server.kill()
            self._end(server)
            self.interrupted_starts += 1

    def _choose_moment(self) -> tuple[str, Moment]:
        """When to kill: a description, and what tells that it has come."""
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
            return name, lambda: self.acknowledgements >= count
        if name == "manifest":
            manifest = self.directory / "MANIFEST"
            old = manifest.stat().st_ino
            return name, lambda: manifest.stat().st_ino != old
        pattern = patterns[name]
        seen = set(self.directory.glob(pattern))
        return name, lambda: not seen.issuperset(self.directory.glob(pattern))

    @property
    def acknowledgements(self) -> int:
        return sum(writer.acknowledgements for writer in self.writers)

    def _write_and_kill(self, server: ServerProcess, moment: Moment) -> list[int]:
        """Lets the writers write until a little after `moment`, and kills the server.

        Returns the process ids of the children that the server had.
        """
        threads = [threading.Thread(target=writer.run, args=(server.port,)) for writer in self.writers]
        threads.append(threading.Thread(target=self._save, args=(server,)))
        for thread in threads:
            thread.start()
        try:
            deadline = time.monotonic() + _MOMENT_SECONDS
            while not moment() and time.monotonic() < deadline and server.process.poll() is None:
                time.sleep(_POLL_SECONDS)
            time.sleep(self._random.uniform(0, _LATEST_DELAY_SECONDS))
            died = server.process.poll()
            children = list(server.children())
        finally:
            server.kill()
            for thread in threads:
                thread.join()
        assert died is None, f"the server ended with {died}: {server.errors}"
        for failure in (self.save_failure, *(writer.failure for writer in self.writers)):
            if failure is not None:
                raise failure
        return children

    def _save(self, server: ServerProcess) -> None:
        """Makes snapshots now and then, until the connection breaks."""
        with server.client() as client:
            try:
                while True:
                    time.sleep(self._random.uniform(0, 1))
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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.torture", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, default=None, help="of the writes and the moments; default: random"
    )
    parser.add_argument("--dir", type=Path, help="an empty or missing folder; default: a temporary one")
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="engram-torture-") as scratch:
        torture = Torture(arguments.dir or Path(scratch) / "data", seed)
        print(f"seed {seed}, {WRITERS} writers, {arguments.kills} kills", flush=True)
        try:
            torture.begin()
            for number in range(1, arguments.kills + 1):
                print(f"{number:>4}  {torture.kill_once()}", flush=True)
            torture.finish()
        except (AssertionError, RedisError, StartError) as error:
            print(f"FAILED with seed {seed}: {error}")
            if arguments.dir is None:
                kept = tempfile.mkdtemp(prefix="engram-torture-failed-")
                shutil.copytree(torture.directory, kept, dirs_exist_ok=True)
                print(f"the data directory, as it is now: {kept}")
            return 1
        finally:
            torture.close()
    print(
        f"passed: {torture.acknowledgements} acknowledged requests, {arguments.kills} kills,"
        f" {torture.interrupted_starts} interrupted starts, {torture.torn_tails} torn tails"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
