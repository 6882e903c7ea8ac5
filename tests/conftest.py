"""A whole server over memory streams, with a clock, a log and searches that a test holds in its hand."""

from __future__ import annotations

import os
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import hypothesis
import numpy as np
import pytest
import trio
import trio.testing

from engram.access import Access
from engram.commands.client import describe
from engram.commands.registry import COMMANDS
from engram.commands.session import Server, Storage
from engram.config import Config
from engram.connection import Connection
from engram.database import Database
from engram.engine import Engine
from engram.errors import CommandError, LogFullError
from engram.files import DiskFiles
from engram.index.builder import Builder
from engram.index.search import SearchOptions, SearchResult
from engram.index.segment import SegmentStore
from engram.index.service import AsFound, Encoding, SearchService
from engram.index.vector_index import VectorIndex, View
from engram.index.verification import Verification
from engram.operations import InstallSegment, Operation, decode, encode
from engram.transport import SocketTransport, StreamTransport, Transport

START = 1_800_000_000_000

# A test that waits for longer has gone wrong.
PATIENCE = 120

# Of `python -m tests.fuzz`.
_FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
hypothesis.settings.register_profile("fuzz", max_examples=_FUZZ_EXAMPLES, deadline=None)
# A busy machine is no fault of an example.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

T = TypeVar("T")


def pytest_configure() -> None:
    # What a shell starts in the background ignores SIGINT, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def encode_request(words: Iterable[bytes]) -> bytes:
    """A request as clients send it, an array of bulk strings."""
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


def vector(*numbers: float) -> bytes:
    """A vector as clients send it."""
    return np.array(numbers, "<f4").tobytes()


def reply_length(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the reply that begins at `start` ends; None when it is not complete."""
    stop = data.find(b"\r\n", start)
    if stop < 0:
        return None
    kind, stop = data[start : start + 1], stop + 2
    if kind in (b"+", b"-", b":", b"_", b"#", b","):
        return stop
    count = int(data[start + 1 : stop - 2])
    if kind in (b"$", b"="):
        stop += count + 2 if count >= 0 else 0
        return stop if stop <= len(data) else None
    for _ in range(2 * count if kind == b"%" else count):
        end = reply_length(data, stop)
        if end is None:
            return None
        stop = end
    return stop


@attrs.define
class Clock:
    """Milliseconds since the epoch, as a test says."""

    time: int = START

    def __call__(self) -> int:
        return self.time


class ManualJournal:
    """A log in memory. What is appended is durable when `release` says so.

    `together` holds the operations of each call that makes them one, `boundaries` the LSNs at which a record
    ends: after a crash the last change is one of them.
    `refusal` is why admission ends with an error while `room` is False; without one, admission waits.
    """

    def __init__(self, *, automatic: bool = False) -> None:
        self.records: list[tuple[int, Operation]] = []
        self.together: list[tuple[Operation, ...]] = []
        self.boundaries: list[int] = []
        self.durable = 0
        self.automatic = automatic
        self.room = True
        self.refusal = ""
        self.admissions = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._parked = trio.lowlevel.ParkingLot()
        self._unsynced = trio.lowlevel.ParkingLot()

    @property
    def durable_lsn(self) -> int:
        return self.durable

    def has_room(self, size: int) -> bool:
        return self.room

    async def admit(self, size: int) -> None:
        self.admissions += 1
        await trio.lowlevel.checkpoint()
        while not self.room:
            if self.refusal:
                raise LogFullError(self.refusal)
            await self._parked.park()

    def reserve(self, lsn: int, operation: Operation) -> bytes:
        return encode(operation)

    def encode(self, operation: Operation, before: int = 0) -> bytes:
        return encode(operation)

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        self.records.append((lsn, decode(payload)))
        self.boundaries.append(lsn)
        if self.automatic:
            self.release(lsn)

    def append_together(self, first_lsn: int, payloads: Sequence[bytes]) -> None:
        operations = list(map(decode, payloads))
        self.together.append(tuple(operations))
        for lsn, (operation, payload) in enumerate(zip(operations, payloads, strict=True), first_lsn):
            self.append(lsn, operation, payload)
        del self.boundaries[-len(operations) : -1]

    def released(self, lsn: int) -> bool:
        return lsn <= self.durable

    def on_release(self, lsn: int, callback: Callable[[], None]) -> None:
        self._waiting.append((lsn, callback))

    def release(self, lsn: int | None = None) -> None:
        """Everything up to `lsn` (all of it when None) is durable."""
        self.durable = self.records[-1][0] if lsn is None else lsn
        while self._waiting and self.released(self._waiting[0][0]):
            self._waiting.popleft()[1]()
        self._unsynced.unpark_all()

    async def wait_durable(self, lsn: int) -> None:
        while self.durable < lsn:
            await self._unsynced.park()

    def make_room(self) -> None:
        self.room = True
        self._parked.unpark_all()


_AS_FOUND = AsFound()


class HeldSearches(SearchService):
    """Searches that a test answers, and work that it has done, when it likes.

    `options` are those of the searches in `held`; calling what is in `work` does it.
    """

    def __init__(self) -> None:
        super().__init__(1, max_batch=1)
        self.held: list[Callable[[list[SearchResult] | Exception], None]] = []
        self.options: list[SearchOptions] = []
        self.work: list[Callable[[], None]] = []
        self.wanted: list[Callable[[], bool]] = []

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
        def answer(found: list[SearchResult] | Exception) -> None:
            outcome: Any = found
            if not isinstance(found, Exception):
                try:
                    outcome = encoding.join(list(map(encoding.encode, found)))
                except CommandError as error:
                    outcome = error
            done(outcome)

        self.held.append(answer)
        self.options.append(options)
        self.wanted.append(wanted)

    def submit_read(
        self,
        function: Callable[[], T],
        done: Callable[[T | Exception], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
    ) -> None:
        self.work.append(lambda: done(function()))
        self.wanted.append(wanted)


class Client:
    """One end of a connection. All that arrives is kept in `received`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.received = bytearray()
        self.gone = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()

    async def read(self) -> None:
        """Receives until the server closes; to be run in the background."""
        try:
            async with self.stream:
                async for data in self.stream:
                    self.received += data
                    self._progress.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._progress.unpark_all()
        finally:
            self.gone.set()

    async def send(self, *requests: Iterable[bytes] | str) -> None:
        """Sends requests in one burst; a text stands for its words."""
        words = (request.encode().split() if isinstance(request, str) else request for request in requests)
        await self.stream.send_all(b"".join(map(encode_request, words)))

    async def reply(self) -> bytes:
        """The next reply, as bytes."""
        with trio.fail_after(PATIENCE):
            while (length := reply_length(self.received)) is None:
                await self._progress.park()
        reply = bytes(self.received[:length])
        del self.received[:length]
        return reply

    async def call(self, request: Iterable[bytes] | str) -> bytes:
        """Sends one request and returns its reply."""
        await self.send(request)
        return await self.reply()

    async def arrived(self) -> bytes:
        """What has arrived once nothing moves any more."""
        await trio.testing.wait_all_tasks_blocked()
        data = bytes(self.received)
        self.received.clear()
        return data

    async def ended(self) -> bytes:
        """What arrives before the server closes."""
        with trio.fail_after(PATIENCE):
            await self.gone.wait()
        return bytes(self.received)


@attrs.define
class House:
    """A server in memory, as `server.serve` puts one together, and clients for it."""

    server: Server
    database: Database
    engine: Engine
    clock: Clock
    nursery: trio.Nursery
    shutdown: trio.Event
    connections: list[Connection] = attrs.field(factory=list)

    def connect(
        self, *, streams: tuple[trio.abc.Stream, trio.abc.Stream] | None = None, reads: bool = True
    ) -> Client:
        """A new client; `reads` is False for one that leaves its replies unread."""
        near, far = streams or trio.testing.memory_stream_pair()
        return self._serve(StreamTransport(far), near, reads)

    def connect_by_socket(self) -> Client:
        """A new client over a pair of sockets."""
        near, far = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        return self._serve(SocketTransport(far, self.server.rounds), stream, True)

    def _serve(self, transport: Transport, near: trio.abc.Stream, reads: bool) -> Client:
        number = 1000 + len(self.connections)
        connection = Connection(
            transport,
            self.server,
            address=f"127.0.0.1:{number}",
            local_address="127.0.0.1:6380",
            descriptor=number,
        )
        self.connections.append(connection)
        self.nursery.start_soon(connection.serve)
        client = Client(near)
        if reads:
            self.nursery.start_soon(client.read)
        return client


OpenHouse = Callable[..., AbstractAsyncContextManager[House]]


@asynccontextmanager
async def opened_house(
    folder: Path,
    journal: ManualJournal | None = None,
    storage: Storage | None = None,
    searches: SearchService | None = None,
    config: Config | None = None,
) -> AsyncIterator[House]:
    """A house that keeps segments in `folder`."""
    store = SegmentStore(folder, DiskFiles(), 1)
    clock, shutdown = Clock(), trio.Event()
    engine = Engine(store, seal_rows=1 << 20)
    database = Database(engine, journal, now=clock)

    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        database.commit(operation)

    held = searches is not None
    searches = searches or SearchService(1, max_batch=64)
    config = config or Config()
    async with trio.open_nursery() as nursery:
        if not held:
            await nursery.start(searches.run)
        server = Server(
            config=config,
            database=database,
            storage=storage,
            searches=searches,
            builder=Builder(store, install, limit=lambda: config.max_unindexed_rows),
            verification=Verification(store, []),
            run_id="0" * 40,
            started=START / 1000,
            port=6380,
            start_soon=nursery.start_soon,
            shut_down=shutdown.set,
            reconfigure=lambda: None,
            access=Access(COMMANDS, describe=describe),
        )
        nursery.start_soon(server.rounds.run)
        yield House(server, database, engine, clock, nursery, shutdown)
        nursery.cancel_scope.cancel()


@pytest.fixture
def open_house(tmp_path: Path) -> OpenHouse:
    """Opens a house: `open_house(journal=..., storage=..., searches=..., config=...)`, all optional."""
    folder = tmp_path / "segments"
    folder.mkdir()
    return partial(opened_house, folder)


@pytest.fixture
async def house(open_house: OpenHouse) -> AsyncIterator[House]:
    """A house where nothing is kept on disk."""
    async with open_house() as opened:
        yield opened
