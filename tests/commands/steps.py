"""A server with much in it, without sockets, and the steps that are taken on its loop for a request.

A *turn* is what a task does between two checkpoints: nobody else is served meanwhile. A *step* is a line of
Python that is begun, or a call of a Python function, as `sys.settrace` tells them. So the numbers are the
same on any machine, however busy. A comprehension on one line is a step for each element.

What is not counted are loops in C without Python in them, such as `list(dict)`, `sorted`, `b"".join`,
`dict.update`, `map(len, ...)`, a match of a regular expression and all of numpy: they take some 50 ns an
element, where a step takes about as much and there are ten for an element. What a thread does is not counted
either, nor what this file does.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import attrs
import hiredis
import numpy as np
import trio
import trio.testing

from engram.access import Access, file_of_users
from engram.commands.client import describe
from engram.commands.introspection import introspection
from engram.commands.registry import COMMANDS
from engram.commands.session import Server, Session
from engram.commands.table import Command, CommandTable
from engram.config import Config
from engram.connection import Connection
from engram.database import Database
from engram.engine import Engine
from engram.files import DiskFiles
from engram.index.builder import Builder
from engram.index.segment import SegmentStore
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex
from engram.index.verification import Verification
from engram.operations import AddVectors, CreateIndex, Flush, InstallSegment, SetString
from engram.permissions import Reason, Rules
from engram.statistics import Usage
from engram.transport import CHUNK
from tests.commands.test_administration import Snapshots
from tests.conftest import START, Clock, encode_request

MANY = 20_000
INDICES = 5_000
SLOW_CALLS = 10_000
REFUSALS = 5_000
USERS = 3_000
RULES = 500
SESSIONS = 8_000
DIMENSION = 4
LONG = 16 << 20
# As many as one VMSEARCH may have.
QUERIES = 1 << 14

# The numbers of the databases.
STRINGS, HOLES, LAPSED, OF_INDICES, VECTORS, EMPTY = range(6)

# A request that takes longer has gone wrong; tracing is slow, and so may the machine be.
_PATIENCE = 120
# Many words arrive in parts of less than a chunk, and only the last is counted: what reading them takes
# depends on the size of a chunk alone.
_ARRIVING = CHUNK // 8

Tally = dict[CodeType, int]


def names(count: int = MANY, prefix: bytes = b"k") -> list[bytes]:
    """Names of keys, users or members."""
    return [b"%b%d" % (prefix, number) for number in range(count)]


def vectors(count: int = MANY) -> list[bytes]:
    """Vectors, no two of them alike."""
    numbers = np.arange(1, count * DIMENSION + 1, dtype="<f4").reshape(count, DIMENSION)
    return [row.tobytes() for row in numbers]


def rows(prefix: bytes) -> list[bytes]:
    """Members with their vectors and attributes, as VMADD has them."""
    members, blobs = names(MANY, prefix), vectors()
    return [
        word
        for number in range(MANY)
        for word in (members[number], blobs[number], b'{"n":%d,"t":"%d"}' % (number, number % 100))
    ]


def _commands() -> list[bytes]:
    return [
        each.name.encode()
        for command in COMMANDS.values()
        for each in (command, *command.subcommands.values())
    ]


# What stands for many words in a request.
_WORDS: dict[str, Callable[[], Sequence[bytes]]] = {
    "@keys": names,
    "@new": partial(names, MANY, b"n"),
    "@pairs": lambda: [word for key in names() for word in (key, b"value")],
    "@new-pairs": lambda: [word for key in names(MANY, b"n") for word in (key, b"value")],
    "@members": partial(names, MANY, b"m"),
    "@rows": partial(rows, b"m"),
    "@bare-rows": lambda: [word for row in zip(names(MANY, b"m"), vectors(), strict=True) for word in row],
    "@vector": lambda: vectors(1),
    "@queries": partial(vectors, QUERIES),
    "@long": lambda: [b"x" * LONG],
    "@commands": lambda: (_commands() * (MANY // len(_commands()) + 1))[:MANY],
    "@unknown": partial(names, MANY, b"unknown"),
    "@ids": lambda: [b"%d" % number for number in range(MANY)],
    "@patterns": lambda: [b"*%d*" % number for number in range(200)],
    "@users": partial(names, USERS, b"u"),
    "@rules": lambda: [b"on", b"nopass", b"+@all", *(b"~%b*" % key for key in names(RULES))],
    "@filter": lambda: [b" or ".join(b".n == %d" % number for number in range(3000))],
    "@attributes": lambda: [b'{"a":"%b"}' % (b"x" * 60_000)],
    "@key": lambda: [b"k" * 4096],
    "@same": lambda: [b"k1"] * MANY,
}


@cache
def _words(name: str) -> Sequence[bytes]:
    return _WORDS[name]()


def request(text: str) -> list[bytes]:
    """The words of a request, of which some stand for many."""
    found: list[bytes] = []
    for word in text.split():
        found += _words(word) if word in _WORDS else (word.encode(),)
    return found


class Steps(trio.abc.Instrument):
    """Counts the steps of each turn on the loop, but for those of the tasks in `ours`."""

    def __init__(self) -> None:
        self.counting = False
        self.ours: set[trio.lowlevel.Task] = set()
        # Of the turn that took most: how many in which code.
        self.longest: Tally = {}
        self._turn: Tally | None = None
        self._former: Any = None

    def begin(self) -> None:
        """Counts the turns that begin from now on."""
        self.counting = True

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.counting and task not in self.ours:
            self._turn = {}
            self._former = sys.gettrace()
            sys.settrace(_tracer(self._turn))

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._turn is not None:
            sys.settrace(self._former)
            turn, self._turn = self._turn, None
            if sum(turn.values()) > sum(self.longest.values()):
                self.longest = turn


def _tracer(turn: Tally) -> Callable[[FrameType, str, Any], Any]:
    def step(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            turn[frame.f_code] += 1
        return step

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename == __file__:
            return None
        turn[code] = turn.get(code, 0) + 1
        return step

    return call


def count_steps(function: Callable[[], object]) -> int:
    """How many steps a function takes."""
    taken: Tally = {}
    former = sys.gettrace()
    sys.settrace(_tracer(taken))
    try:
        function()
    finally:
        sys.settrace(former)
    return sum(taken.values())


class Line:
    """A transport between a client and its connection that is never full."""

    def __init__(self) -> None:
        self.sent: deque[bytes | memoryview] = deque()
        self.progress = trio.lowlevel.ParkingLot()
        # Called when all but the last part of what arrives has been read.
        self.on_last: Callable[[], None] = lambda: None
        self._arriving: deque[bytes] = deque()
        self._arrived = trio.lowlevel.ParkingLot()

    def arrive(self, data: bytes) -> None:
        """The server has these bytes to read."""
        size = CHUNK if len(data) >= LONG else _ARRIVING
        self._arriving += (data[start : start + size] for start in range(0, len(data), size))
        if len(self._arriving) == 1:
            self.on_last()
        self._arrived.unpark_all()

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        while True:
            while not self._arriving:
                await self._arrived.park()
            goes_on = take(self._arriving.popleft())
            if len(self._arriving) == 1:
                self.on_last()
            if not goes_on:
                break
            await trio.lowlevel.checkpoint()

    def send_now(self, data: bytes | memoryview) -> int:
        self.sent.append(data)
        self.progress.unpark_all()
        return len(data)

    async def send_all(self, data: bytes | memoryview) -> None:
        self.send_now(data)
        await trio.lowlevel.checkpoint()

    def hang_up(self) -> None:
        self.progress.unpark_all()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@attrs.define
class Client:
    """A client that is served over a line."""

    line: Line
    connection: Connection
    _reader: hiredis.Reader = attrs.field(factory=partial(hiredis.Reader, notEnoughData=...))

    def send(self, requests: Iterable[Sequence[bytes]]) -> None:
        self.line.arrive(b"".join(map(encode_request, requests)))

    async def reply(self) -> Any:
        """The next reply, as values of Python; an error is one."""
        while (found := self._reader.gets()) is ...:
            with trio.fail_after(_PATIENCE):
                while not self.line.sent:
                    await self.line.progress.park()
            while self.line.sent:
                self._reader.feed(bytes(self.line.sent.popleft()))
        return found


@attrs.define
class Part:
    """A part of what a server holds: how it is made, and what tells whether it is as it was."""

    make: Callable[[], None]
    measure: Callable[[], object]
    measured: object = None

    def restore(self) -> bool:
        """Makes it again, if it is not as it was; returns whether it was not."""
        if self.measured is not None and self.measured == self.measure():
            return False
        self.make()
        measured = self.measure()
        assert self.measured is None or self.measured == measured
        self.measured = measured
        return True


def _rules(*words: bytes) -> Rules:
    return Rules().apply(COMMANDS, (b"on", b"nopass", *words))


class LargeServer:
    """A server with much of all that clients can have it hold. It outlives the runs of the loop."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self._folder = folder
        self._store = SegmentStore(folder / "segments", DiskFiles(), 1)
        self._engine = Engine(self._store, seal_rows=1 << 20)
        self.database = Database(self._engine, None, now=self.clock)
        self._config = self._settings()
        self.server = self._server()
        self._usage = Usage()
        for power in range(2, 35):
            for quarter in range(4, 8):
                self._usage.record(1, quarter << power)
        self._parts = self._made_of()
        self.restore()

    def _settings(self) -> Config:
        (self._folder / "segments").mkdir(exist_ok=True)
        path = self._folder / "engram.conf"
        path.write_text("port 6380\n")
        return Config(
            slowlog_max_len=SLOW_CALLS,
            slowlog_log_slower_than=-1,
            acllog_max_len=REFUSALS,
            max_unindexed_rows=1 << 40,
            file=str(path),
        )

    def _server(self) -> Server:
        config = attrs.evolve(self._config)
        access = Access(
            COMMANDS,
            path=self._folder / "users.acl",
            automatic=True,
            describe=describe,
            log_length=lambda: config.acllog_max_len,
        )
        storage = Snapshots()
        storage.finish.set()
        return Server(
            config=config,
            database=self.database,
            storage=storage,
            searches=SearchService(1, max_batch=64),
            builder=Builder(self._store, self._install),
            verification=Verification(self._store, []),
            run_id="0" * 40,
            started=START / 1000,
            port=6380,
            start_soon=trio.run,
            shut_down=lambda: None,
            reconfigure=self._reconfigure,
            access=access,
        )

    def _reconfigure(self) -> None:
        """What a server does when its settings have changed, as far as there is something to do it to."""
        server = self.server
        server.memory.reconfigure()
        server.builder.reconsider()
        server.access.require(server.config.requirepass.encode())
        server.review_sessions()
        server.reconsider()

    async def _install(self, index: VectorIndex, operation: InstallSegment) -> None:
        self.database.commit(operation)

    def _made_of(self) -> list[Part]:
        server = self.server
        access = server.access

        def keys(number: int, make: Callable[[int], None]) -> Part:
            keyspace = self.database.logical(number).keyspace

            def measure() -> object:
                rows = sum(map(len, keyspace.others)) if number == OF_INDICES else 0
                return len(keyspace), len(keyspace.expiries), rows, b"long" in keyspace.values

            return Part(partial(self._refill, number, make), measure)

        def index() -> object:
            found = self.database.logical(VECTORS).index(b"index")
            return found is not None and (len(found), found.next_row, len(found.segments))

        def users() -> object:
            first = access.users.get(b"u1")
            return len(access.users), access.default.rules, first is not None and first.rules

        return [
            keys(STRINGS, self._fill_with_strings),
            keys(HOLES, self._fill_with_holes),
            keys(LAPSED, self._fill_with_lapsed),
            keys(OF_INDICES, self._fill_with_indices),
            keys(EMPTY, lambda number: None),
            Part(partial(self._refill, VECTORS, self._fill_with_vectors), index),
            Part(self._add_users, users),
            Part(self._fill_slow_log, lambda: len(server.slowlog)),
            Part(self._fill_access_log, lambda: len(access.log(REFUSALS))),
            Part(self._add_sessions, lambda: len(server.sessions)),
            Part(self._watch, self._watched),
        ]

    def restore(self) -> None:
        """Puts back what requests have taken away."""
        server = self.server
        server.pause.end()
        if server.config != self._config:
            for field in attrs.fields(Config):
                setattr(server.config, field.name, getattr(self._config, field.name))
            self._reconfigure()
        self._engine.dropped.clear()
        while self.database.watches.clear_up():
            pass
        restored = [part.restore() for part in self._parts]
        if any(restored):
            # What is counted only when it is asked for has been.
            self._engine.totals()
            server.memory.used()
        self._forget_calls()

    def _forget_calls(self) -> None:
        """Lets each command have been called as often, and with as many latencies, as every other."""
        statistics = self.server.statistics
        for name in map(bytes.decode, _commands()):
            if statistics.usage[name].calls != self._usage.calls:
                statistics.usage[name] = deepcopy(self._usage)

    def _refill(self, number: int, make: Callable[[int], None]) -> None:
        self.database.commit(Flush(number))
        self._engine.dropped.clear()
        make(number)

    def _fill_with_strings(self, number: int) -> None:
        now, commit = self.clock.time, self.database.commit
        for position, key in enumerate(names()):
            lapses_at = now + 10_000_000 + position if position % 4 == 0 else None
            commit(SetString(key, b"value", lapses_at, number))
        commit(SetString(b"number", b"1", None, number))
        commit(SetString(b"long", b"x" * LONG, None, number))

    def _fill_with_holes(self, number: int) -> None:
        keyspace = self.database.logical(number).keyspace
        keyspace.set_many(names(), names())
        for position, key in enumerate(names()):
            if position % 16:
                keyspace.delete(key)

    def _fill_with_lapsed(self, number: int) -> None:
        for key in names():
            self.database.commit(SetString(key, b"value", START - 1, number))

    def _fill_with_indices(self, number: int) -> None:
        for key in names(INDICES):
            self.database.commit(CreateIndex(key, DIMENSION, "cosine", 16, 100, "int8", 0.99, number))

    def _fill_with_vectors(self, number: int) -> None:
        with self._session() as session:
            session.select(number)
            # A graph of it is soon built.
            parameters = f"{DIMENSION} M 4 EF_CONSTRUCTION 4"
            for text in (
                f"VNEW index {parameters}",
                f"VNEW empty {parameters}",
                f"VNEW one {parameters}",
                "VADD one m1 @vector",
            ):
                words = request(text)
                COMMANDS[words[0].lower()].handler(session, words)
        index = self.database.logical(number).index(b"index")
        assert index is not None
        keys, blobs, attributes = (request("@rows")[column::3] for column in range(3))
        self.database.commit(AddVectors(index.id, tuple(keys), b"".join(blobs), tuple(attributes)))

    def _add_users(self) -> None:
        access = self.server.access
        access.replace(
            {
                **dict.fromkeys(names(USERS, b"u"), _rules(b"+@all", b"~k*", b"~n*")),
                b"some": _rules(b"+@all", b"~a*", b"~b*", b"%R~k*", b"%W~k*", b"~n*", b"(+@all ~m*)"),
                b"many": _rules(b"+@all", *(b"~%b*" % key for key in names(RULES))),
            }
        )
        access.save(file_of_users(access.kept()))

    def _fill_slow_log(self) -> None:
        self.server.slowlog.clear()
        with self._session() as session:
            for _ in range(SLOW_CALLS):
                self.server.slowlog.add(session, [b"SET", b"key", b"value"], 1_000_000)

    def _fill_access_log(self) -> None:
        access = self.server.access
        access.forget_log()
        with self._session() as session:
            for key in names(REFUSALS):
                access.record(session, Reason.KEY, key, b"user")

    @contextmanager
    def _session(self) -> Iterator[Session]:
        session = self._connect().session
        yield session
        self.server.sessions.pop(session.id)
        session.part()

    def _connect(self, line: Line | None = None) -> Connection:
        number = self.server.last_client_id
        return Connection(
            line or Line(),
            self.server,
            address=f"10.0.{number >> 8}.{number & 255}:1234",
            local_address="127.0.0.1:6380",
            descriptor=number,
        )

    def _add_sessions(self) -> None:
        """One for each of the users named by a number, and others."""
        server = self.server
        served = {session.user.name for session in server.sessions.values()}
        for name in names(USERS, b"u"):
            if name not in served:
                self._connect().session.log_in(server.access.users[name])
        while len(server.sessions) < SESSIONS:
            self._connect()

    def _watch(self) -> None:
        """All watch the same key, and the first of them all of its database."""
        watches = self.database.watches
        for number, session in enumerate(self.server.sessions.values()):
            keys = [b"watched", *(names() if number == 0 else ())]
            if session.watch.broken or len(session.watch.keys) != len(keys):
                session.unwatch()
                watches.add(session.watch, STRINGS, keys)
        while watches.clear_up():
            pass

    def _watched(self) -> object:
        watches = [session.watch for session in self.server.sessions.values()]
        return sum(len(watch.keys) for watch in watches), sum(watch.broken for watch in watches)

    def carry_out(
        self,
        asked: Sequence[bytes],
        before: Iterable[Sequence[bytes]] = (),
        *,
        database: int = STRINGS,
        answered: bool = True,
        monitored: bool = False,
        builds: bool = False,
    ) -> tuple[Tally, Any]:
        """Carries out a request of a new client behind others; returns the longest turn, and the reply.

        Args:
            database: the number of the one that the client has selected.
            answered: whether there is a reply.
            monitored: whether somebody has given MONITOR.
            builds: whether graphs are built meanwhile.
        """
        steps = Steps()

        async def run() -> Any:
            steps.ours.add(trio.lowlevel.current_task())
            async with trio.open_nursery() as nursery:
                await self._start(nursery, builds=builds)
                if monitored:
                    await self._call(self._join(nursery), [[b"MONITOR"]])
                client = self._join(nursery)
                await self._call(client, [[b"SELECT", b"%d" % database], *before])
                await trio.testing.wait_all_tasks_blocked()
                client.line.on_last = steps.begin
                client.send([asked])
                reply = await client.reply() if answered else None
                await trio.testing.wait_all_tasks_blocked()
                assert steps.counting
                steps.counting = False
                nursery.cancel_scope.cancel()
            return reply

        reply = trio.run(run, instruments=[steps])
        # What is begun between two runs has a loop of its own.
        self.server.start_soon = trio.run
        self.restore()
        return steps.longest, reply

    async def _start(self, nursery: trio.Nursery, *, builds: bool) -> None:
        server = self.server
        server.start_soon = nursery.start_soon
        server.searches = SearchService(1, max_batch=64)
        await nursery.start(server.searches.run)
        if builds:
            await nursery.start(server.builder.run)

    def _join(self, nursery: trio.Nursery) -> Client:
        line = Line()
        connection = self._connect(line)
        # What a first call makes is kept: each client has a table that has answered nothing yet.
        table: dict[bytes, Command] = dict(COMMANDS)
        table[b"command"] = introspection(table)
        connection.session.table = CommandTable(table, {})
        nursery.start_soon(connection.serve)
        return Client(line, connection)

    async def _call(self, client: Client, requests: Sequence[Sequence[bytes]]) -> None:
        client.send(requests)
        for each in requests:
            reply = await client.reply()
            assert not isinstance(reply, Exception), (each[:3], reply)
