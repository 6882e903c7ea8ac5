"""Several clients talk to a server in memory, and everything about it is checked.

A conversation is a list of steps. Most of them are a client's number and a request of it; the rest are what
happens meanwhile: time passes, a client leaves, the log becomes durable, full, or free again, a pause ends.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import attrs
import numpy as np
import trio
import trio.testing

from engram import large_string
from engram.commands import transactions
from engram.config import Config
from engram.engine import Engine
from engram.files import DiskFiles
from engram.index.search import SearchOptions
from engram.index.segment import SegmentStore
from engram.index.service import AsFound, Encoding, SearchService
from engram.index.vector_index import VectorIndex, View
from engram.operations import Flush, Operation, decode, encode
from tests.conftest import PATIENCE, Client, House, ManualJournal, encode_request, opened_house
from tests.fuzz.grammar import OPENING
from tests.test_engine import state

T = TypeVar("T")

CLIENTS = 3

Step = Sequence[bytes]
# So many milliseconds pass; the client of that number says no more.
TICK, LEAVE = b"tick", b"leave"
# What was said is sent, and the server goes on a little.
SETTLE = b"settle"
# What the log has is durable, or only its next record; it has no room for more; it has room again.
RELEASE, RELEASE_NEXT, FULL, ROOM = b"release", b"release next", b"full", b"room"
# CLIENT PAUSE is over; searches are begun that were asked for.
RESUME, SEARCH = b"resume", b"search"

_SETTLING_CHECKPOINTS = 5

# Behind these a client may get fewer replies than it has sent requests, or more: they end, silence or lock
# out others, or the one that says it, or send it more than replies.
_DISTURBS_ALL = re.compile(rb"(?i)client kill|acl (setuser|deluser|load)|config set")
_DISTURBS_ONE = re.compile(rb"(?i)client (reply|kill)|monitor|quit|shutdown|post|host:")

_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")
_DOUBLE = re.compile(rb"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?|-?inf|nan")
_ERROR = re.compile(rb"[A-Z]+ .*", re.DOTALL)

# What the engine may be said to hold, in bytes, when nothing is in it: no more than this.
_HELD_WHEN_EMPTY = 4096


def reply_end(data: bytes, start: int, version: int | None) -> int:
    """Where the reply at `start` ends; `version` is of RESP, None for either.

    Raises AssertionError for what is no complete reply of that version.
    """
    missing = 1
    while missing:
        missing -= 1
        stop = data.find(b"\r\n", start)
        assert stop >= 0, data[start : start + 100]
        kind, line = data[start : start + 1], data[start + 1 : stop]
        assert b"\n" not in line, line
        assert version != 2 or kind in b"+-:$*", (kind, line)
        start = stop + 2
        match kind:
            case b"+":
                pass
            case b"-":
                assert _ERROR.fullmatch(line), line
            case b":":
                assert _INTEGER.fullmatch(line), line
                assert -(2**63) <= int(line) < 2**63
            case b"$" | b"*" if line == b"-1":
                assert version != 3, kind
            case b"$" | b"=":
                assert line.isdigit(), line
                stop = start + int(line)
                assert data[stop : stop + 2] == b"\r\n"
                assert kind == b"$" or data[start : start + 4] == b"txt:"
                start = stop + 2
            case b"*" | b"%" | b"~":
                assert line.isdigit(), line
                missing += int(line) * (2 if kind == b"%" else 1)
            case b"_":
                assert not line
            case b"#":
                assert line in (b"t", b"f")
            case b",":
                assert _DOUBLE.fullmatch(line), line
            case _:
                raise AssertionError((kind, line))
    return start


def replies_in(data: bytes, version: int | None) -> list[bytes]:
    """The replies that make up what a client has received."""
    found, start = [], 0
    while start < len(data):
        end = reply_end(data, start, version)
        found.append(data[start:end])
        start = end
    return found


@attrs.define
class _Talker:
    """A client, and what it has said so far. What goes into `mouth` is sent once the server takes it."""

    client: Client
    mouth: trio.MemorySendChannel[bytes]
    requests: list[Step] = attrs.Factory(list)
    unsent: list[Step] = attrs.Factory(list)
    left: bool = False

    def flush(self) -> None:
        """Sends in one piece what is to be sent."""
        requests, self.unsent = self.unsent, []
        if requests and not self.left:
            self.requests += requests
            self.mouth.send_nowait(b"".join(map(encode_request, requests)))

    def leave(self) -> None:
        """Says no more; replies still come."""
        self.flush()
        self.left = True
        self.mouth.close()

    @property
    def version(self) -> int | None:
        """The version of RESP that all replies are in, None when it may have changed."""
        names = [request[0].lower() for request in self.requests]
        if {b"hello", b"reset"} & set(names[1:]):
            return None
        if names[:1] == [b"hello"]:
            return int(self.requests[0][1]) if self.requests[0][1:] in ([b"2"], [b"3"]) else None
        return 2


class _Journal(ManualJournal):
    """One that takes nothing without room."""

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        assert self.room, operation
        super().append(lsn, operation, payload)


_AS_FOUND = AsFound()


class _Searches(SearchService):
    """Searches that begin when they are let go."""

    def __init__(self) -> None:
        super().__init__(1, max_batch=64)
        self._held: list[Callable[[], None]] = []

    def let_go(self) -> None:
        """Begins them."""
        held, self._held = self._held, []
        for begin in held:
            begin()

    def submit(
        self,
        index_id: int,
        view: View,
        queries: np.ndarray,
        options: SearchOptions,
        done: Callable[[Any], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
        encoding: Encoding = _AS_FOUND,
    ) -> None:
        begin = super().submit
        self._held.append(lambda: begin(index_id, view, queries, options, done, wanted, client, encoding))

    def submit_read(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
    ) -> None:
        begin = super().submit_read
        self._held.append(lambda: begin(function, done, wanted, client))


@attrs.frozen
class _Conversation:
    """A server in memory and those who talk to it."""

    folder: Path
    house: House
    journal: ManualJournal
    searches: _Searches
    talkers: Sequence[_Talker]

    async def play(self, steps: Iterable[Step], look: Callable[[], None] = lambda: None) -> None:
        """Goes through the steps and on until everyone has left; `look` is called whenever things moved.

        Raises trio.TooSlowError when a client is never done.
        """
        with trio.fail_after(PATIENCE):
            for word, *rest in steps:
                if word.isdigit():
                    self.talkers[int(word)].unsent.append(rest)
                    continue
                for talker in self.talkers:
                    talker.flush()
                await self._happen(word, rest)
                look()
            for talker in self.talkers:
                talker.leave()
            while self.house.server.sessions or not all(one.client.gone.is_set() for one in self.talkers):
                self.help()
                await trio.testing.wait_all_tasks_blocked()
                look()

    async def _happen(self, word: bytes, rest: Sequence[bytes]) -> None:
        house, journal = self.house, self.journal
        match word:
            case b"tick":
                house.clock.time += int(rest[0])
            case b"leave":
                self.talkers[int(rest[0])].leave()
            case b"settle":
                for _ in range(_SETTLING_CHECKPOINTS):
                    await trio.lowlevel.checkpoint()
            case b"release":
                if journal.records:
                    journal.release()
            case b"release next":
                following = bisect_right(journal.boundaries, journal.durable)
                if following < len(journal.boundaries):
                    journal.release(journal.boundaries[following])
            case b"full":
                # Appends take room, and nobody else appends beside an EXEC that has been let in.
                await house.server.exclusion.wait()
                journal.room = False
            case b"room":
                journal.make_room()
            case b"resume":
                house.server.pause.end()
            case b"search":
                self.searches.let_go()
            case _:
                raise ValueError(f"no such step: {word!r}")

    def help(self) -> None:
        """Ends all that clients may be waiting for."""
        server, journal = self.house.server, self.journal
        journal.make_room()
        if journal.records:
            journal.release()
        self.searches.let_go()
        server.pause.end()
        for session in list(server.sessions.values()):
            if session.unblock is not None:
                session.unblock(False)

    def replayed(self, lsn: int) -> Engine:
        """What recovery makes of the log up to `lsn`."""
        engine = Engine(SegmentStore(self.folder, DiskFiles(), 0), seal_rows=1 << 20)
        engine.keyspaces.count(True)
        for number, operation in self.journal.records[:lsn]:
            assert number == engine.lsn + 1
            engine.apply(number, decode(encode(operation)))
        return engine

    def check_log(self) -> None:
        """The log has each change once, and gives the same state."""
        engine = self.house.engine
        replayed = self.replayed(len(self.journal.records))
        assert state(replayed) == state(engine)
        # A database that somebody has looked at takes some bytes even if nothing was ever in it.
        for number in engine.keyspaces:
            assert replayed.keyspaces[number] is not None
        assert replayed.bytes_held() == engine.bytes_held()


def _talker(house: House) -> _Talker:
    client = house.connect_by_socket()
    mouth, words = trio.open_memory_channel[bytes](math.inf)

    async def say() -> None:
        assert isinstance(client.stream, trio.SocketStream)
        # The server may have ended the connection.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in words:
                await client.stream.send_all(data)
            await client.stream.send_eof()

    house.nursery.start_soon(say)
    return _Talker(client, mouth)


@asynccontextmanager
async def _conversation(folder: Path, journal: ManualJournal) -> AsyncIterator[_Conversation]:
    config = Config(proto_max_bulk_len=1 << 20)
    searches = _Searches()
    with (
        # Each command of EXEC has a turn of its own, and strings of a few bytes are in blocks.
        mock.patch.object(transactions, "TURN_NANOSECONDS", 0),
        mock.patch.object(large_string, "LONGEST_PLAIN", 8),
        mock.patch.object(large_string, "BLOCK_SIZE", 4),
    ):
        async with opened_house(folder, journal=journal, config=config, searches=searches) as house:
            await house.nursery.start(searches.run)
            house.engine.keyspaces.count(True)
            yield _Conversation(folder, house, journal, searches, [_talker(house) for _ in range(CLIENTS)])
            assert not house.database.watches.by_key
            assert not house.server.monitors


async def converse(folder: Path, steps: Iterable[Step]) -> None:
    """Plays the steps. Each request gets one well-formed reply, unless it was asked otherwise.

    Afterwards everyone has left, the log gives the same state once more, and after a flush nothing is held.

    Raises:
        AssertionError: something of this is not so.
        trio.TooSlowError: a client is never done.
    """
    async with _conversation(folder, _Journal()) as conversation:
        conversation.talkers[0].unsent += OPENING
        await conversation.play(steps)
        # The last one to leave may have begun a pause.
        conversation.help()
        await _check_keys(conversation.house)
        conversation.check_log()
        engine = conversation.house.engine
        conversation.house.database.commit(Flush())
        assert not any(engine.keyspaces.values())
        assert not any(keyspace.expiries for keyspace in engine.keyspaces.values())
        assert engine.indices == {}
        assert engine.bytes_held() <= _HELD_WHEN_EMPTY
        held = conversation.house.server.held_replies
        assert held.waiting == held.reserved == 0
    _check_replies(conversation.talkers)


async def _check_keys(house: House) -> None:
    """A new client sees as many keys as there are."""
    server, database = house.server, house.database
    if not (server.access.is_open and server.access.default.unrestricted) or server.config.maxmemory:
        return
    client = house.connect()
    assert await client.call("PING") == b"+PONG\r\n"
    now = database.now()
    for number, keyspace in list(database.engine.keyspaces.items()):
        assert await client.call(f"SELECT {number}") == b"+OK\r\n"
        listed = await client.call("KEYS *")
        alive = sum(keyspace.expiries.get(key, math.inf) > now for key in keyspace.values)
        assert listed.startswith(b"*%d\r\n" % alive)
    await client.stream.aclose()


def _check_replies(talkers: Sequence[_Talker]) -> None:
    disturbed = any(_DISTURBS_ALL.match(b" ".join(request)) for one in talkers for request in one.requests)
    for talker in talkers:
        replies = replies_in(bytes(talker.client.received), talker.version)
        if not disturbed and not any(_DISTURBS_ONE.match(b" ".join(request)) for request in talker.requests):
            assert len(replies) == len(talker.requests), (talker.requests, replies)


def spelled_out(step: Step) -> Step:
    """A step with what stands for keys of the client's own, ``$name``, and for long texts, ``$size``."""
    number = step[0]
    if not number.isdigit():
        return step
    return [number, *[_spelled_out(number, word) for word in step[1:]]]


def _spelled_out(number: bytes, word: bytes) -> bytes:
    if not word.startswith(b"$"):
        return word
    return b"l" * int(word[1:]) if word[1:].isdigit() else _prefix(number) + word[1:]


def _prefix(number: bytes) -> bytes:
    return number + b":"


@attrs.define
class _Course:
    """What one client is told and changes, request by request, when nothing else goes on.

    `told` are the bytes it has received after so many requests, `states` its keys.
    """

    told: list[int]
    states: list[Mapping[tuple[int, bytes], object]]
    transcript: bytes = b""


async def converse_apart(folder: Path, steps: Sequence[Step]) -> None:
    """Plays steps in which each client has keys of its own, see `spelled_out`, and compares with each alone.

    What a client is told, byte for byte, depends neither on the others nor on how its requests are cut into
    bursts, what they wait for, and when. And whenever the server dies, what recovery finds of a client's keys
    is what they were after some request, the last one answered or a later one.

    Raises:
        AssertionError: something of this is not so.
        trio.TooSlowError: a client is never done.
    """
    steps = list(map(spelled_out, steps))
    courses = await _courses(folder, steps)
    async with _conversation(folder, _Journal()) as conversation:
        talkers, journal = conversation.talkers, conversation.journal

        def look() -> None:
            recovered = conversation.replayed(journal.durable)
            for number, (talker, course) in enumerate(zip(talkers, courses, strict=True)):
                received = bytes(talker.client.received)
                assert course.transcript.startswith(received), (number, received, course.transcript)
                answered = sum(told < len(received) for told in course.told)
                assert _keys_of(number, recovered) in course.states[answered:], (number, answered)

        await conversation.play(steps, look)
        for number, (talker, course) in enumerate(zip(talkers, courses, strict=True)):
            assert bytes(talker.client.received) == course.transcript
            assert _keys_of(number, conversation.house.engine) == course.states[-1]
        conversation.check_log()


async def _courses(folder: Path, steps: Iterable[Step]) -> list[_Course]:
    async with _conversation(folder, _Journal(automatic=True)) as conversation:
        engine, server = conversation.house.engine, conversation.house.server
        courses = [_Course([0], [_keys_of(number, engine)]) for number in range(CLIENTS)]
        for word, *request in steps:
            if word == LEAVE:
                conversation.talkers[int(request[0])].leave()
            if not word.isdigit():
                continue
            talker, course = conversation.talkers[int(word)], courses[int(word)]
            talker.unsent = [request]
            talker.flush()
            await trio.testing.wait_all_tasks_blocked()
            while any(session.awaiting() for session in server.sessions.values()):
                conversation.searches.let_go()
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            server.pause.end()
            course.told.append(len(talker.client.received))
            course.states.append(_keys_of(int(word), engine))
        await conversation.play([])
        for course, talker in zip(courses, conversation.talkers, strict=True):
            course.transcript = bytes(talker.client.received)
    return courses


def _keys_of(client: int, engine: Engine) -> Mapping[tuple[int, bytes], object]:
    """All that there is of a client's own keys, with the numbers of their databases."""
    prefix = _prefix(b"%d" % client)
    found: dict[tuple[int, bytes], object] = {}
    for number, keyspace in engine.keyspaces.items():
        for key, value in keyspace.values.items():
            if key.startswith(prefix):
                content: object = value
                if isinstance(value, VectorIndex):
                    rows = {name: (value.vector(name), value.attributes(name)) for name in value.live}
                    content = value.parameters, rows
                found[number, key] = content, keyspace.expiries.get(key)
    return found
