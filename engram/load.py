"""Loading a dump into a server, through the wire: pipelined, with a bounded part of it on its way at a time.

Lines become requests in a worker thread, a block at a time, as the kind of value says that they are of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Union

import attrs
import hiredis
import msgspec
import trio

from engram.dump import FORMAT, Header
from engram.errors import OperatorError
from engram.kinds import KINDS
from engram.kinds.kind import LineError, Loader, NumberedLine, Request, Word

_READ_BYTES = 1 << 20
_SEND_BYTES = 1 << 16
_BYTES_UNDERWAY = 8 << 20
_REQUESTS_UNDERWAY = 1024
_RECEIVE_BYTES = 1 << 16
# How long the last words of a server that has gone are waited for.
_PARTING_SECONDS = 1.0


class LoadError(OperatorError):
    """A line cannot be loaded, or the server has refused it or gone away."""


@attrs.frozen
class Loaded:
    """What a server has acknowledged."""

    keys: int
    vectors: int


@attrs.frozen
class _Request:
    """A command, and the lines, from `first` to `last`, that it stands for."""

    packed: bytes
    first: int
    last: int
    keys: int = 0
    vectors: int = 0
    is_barrier: bool = False

    @property
    def where(self) -> str:
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"


class _Requests:
    """Reads a dump and makes requests of it (blocking)."""

    def __init__(self, file: BinaryIO, *, replace: bool) -> None:
        self.error: LoadError | None = None
        self._file = file
        self._line = 0
        kinds = KINDS.by_name.values()
        loaders = {kind.name: kind.loader(replace) for kind in kinds}
        self._loaders: dict[type, Loader] = {
            line: loaders[kind.name] for kind in kinds for line in kind.lines
        }
        lines: Any = Union[tuple(self._loaders)]  # noqa: UP007 - made at run time
        self._decode = msgspec.json.Decoder[NumberedLine](lines).decode
        self._database = 0
        # The loader of the last line, and its database.
        self._loader: Loader | None = None
        self._loaded_database = 0
        self._last_requests: list[tuple[int, Request]] = []
        self._made: list[_Request] = []

    def header(self) -> Header:
        """The first line. Raises LoadError."""
        self._line = 1
        try:
            header = msgspec.json.decode(self._file.readline(), type=Header)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LoadError(f"line 1: not the first line of a dump: {error}") from error
        if header.format != FORMAT:
            raise LoadError(f"line 1: format {header.format} is not known: a newer engram wrote the dump")
        return header

    def next_block(self) -> list[_Request]:
        """More requests; none at the end of the dump, or before a line that `error` is about."""
        while not self._made and self.error is None:
            lines = self._file.readlines(_READ_BYTES)
            if not lines:
                last, self._last_requests = self._last_requests, []
                for database, request in last:
                    self._make(database, request)
                break
            try:
                for line in lines:
                    self._line += 1
                    if not line.isspace():
                        self._take(line)
            except LoadError as error:
                self.error = error
            self._finish()
        made, self._made = self._made, []
        return made

    def _take(self, text: bytes) -> None:
        try:
            line = self._decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._wrong(str(error)) from error
        loader = self._loaders[type(line)]
        if loader is not self._loader or line.database != self._loaded_database:
            self._finish()
            self._loader, self._loaded_database = loader, line.database
        try:
            self._hold(loader.take(self._line, line))
        except LineError as error:
            raise self._wrong(str(error)) from error

    def _finish(self) -> None:
        """Makes the requests that are still missing for the lines so far."""
        if self._loader is not None:
            self._hold(self._loader.finish())

    def _hold(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.is_last:
                self._last_requests.append((self._loaded_database, request))
            else:
                self._make(self._loaded_database, request)

    def _make(self, database: int, request: Request) -> None:
        lines = request.first, request.last
        if database != self._database:
            self._database = database
            # Where it is refused nothing may come into the database of before.
            self._made.append(_Request(_pack(["SELECT", str(database)]), *lines, is_barrier=True))
        packed = _pack(request.words)
        self._made.append(_Request(packed, *lines, request.keys, request.vectors, request.is_barrier))

    def _wrong(self, reason: str) -> LoadError:
        return LoadError(f"line {self._line}: {reason}")


def _pack(words: Sequence[Word]) -> bytes:
    # Its stub knows of tuples of one word only.
    packed: bytes = hiredis.pack_command(tuple(words))  # type: ignore[arg-type]
    return packed


async def load(
    file: BinaryIO,
    stream: trio.abc.Stream,
    *,
    replace: bool = False,
    begin: Callable[[int | None], object] = lambda total: None,
    advance: Callable[[int], object] = lambda count: None,
) -> Loaded:
    """Loads a dump into the server at the other end of `stream`, which is left open.

    `begin` gets the number of keys and vectors to come, None when the dump does not say; `advance` how many
    more of them were acknowledged. With `replace`, keys that are there are overwritten.

    Raises:
        LoadError: a line is wrong, and those before it have been loaded; or the server refused what it stands
            for, and some of those after it may have been loaded as well; or the server has gone.
    """
    requests = _Requests(file, replace=replace)
    header = await trio.to_thread.run_sync(requests.header, abandon_on_cancel=True)
    counts = header.keys, header.vectors
    begin(None if counts[0] is None or counts[1] is None else counts[0] + counts[1])
    pipeline = _Pipeline(stream, advance)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipeline.receive, nursery.cancel_scope)
        while block := await trio.to_thread.run_sync(requests.next_block, abandon_on_cancel=True):
            await pipeline.send(block)
        await pipeline.settle()
        nursery.cancel_scope.cancel()
    if error := pipeline.error or requests.error:
        raise error
    return Loaded(pipeline.keys, pipeline.vectors)


class _Pipeline:
    """Requests on their way, and the first reply that is not as it should be."""

    def __init__(self, stream: trio.abc.Stream, advance: Callable[[int], object]) -> None:
        self.error: LoadError | None = None
        self.keys = 0
        self.vectors = 0
        self._stream = stream
        self._advance = advance
        self._underway: deque[_Request] = deque()
        self._bytes_underway = 0
        self._replied = trio.lowlevel.ParkingLot()

    async def send(self, requests: list[_Request]) -> None:
        """Sends requests as those before them are answered."""
        unsent = bytearray()
        for request in requests:
            size = len(request.packed)
            while self._underway and (
                self._bytes_underway + size > _BYTES_UNDERWAY or len(self._underway) >= _REQUESTS_UNDERWAY
            ):
                if unsent:
                    await self._flush(unsent)
                else:
                    await self._replied.park()
            self._underway.append(request)
            self._bytes_underway += size
            unsent += request.packed
            if request.is_barrier:
                await self._flush(unsent)
                await self.settle()
            elif len(unsent) >= _SEND_BYTES:
                await self._flush(unsent)
        if unsent:
            await self._flush(unsent)

    async def settle(self) -> None:
        """Waits until everything sent is answered."""
        while self._underway:
            await self._replied.park()

    async def _flush(self, unsent: bytearray) -> None:
        try:
            await self._stream.send_all(bytes(unsent))
        except trio.BrokenResourceError:
            # The one who receives ends everything, with what the server said last.
            await trio.sleep(_PARTING_SECONDS)
        unsent.clear()

    async def receive(self, everything: trio.CancelScope) -> None:
        """Receives replies until one is wrong, or the server closes, which cancels `everything`."""
        reader = hiredis.Reader()
        try:
            while self.error is None:
                data = await self._stream.receive_some(_RECEIVE_BYTES)
                if not data:
                    raise LoadError("the server has closed the connection")
                reader.feed(bytes(data))
                while (reply := reader.gets()) is not False:
                    self._take(reply)
                self._replied.unpark_all()
        except LoadError as error:
            self.error = error
        except trio.BrokenResourceError:
            self.error = LoadError("the connection to the server is lost")
        except hiredis.ProtocolError as error:
            self.error = LoadError(f"the server does not speak RESP: {error}")
        everything.cancel()

    def _take(self, reply: object) -> None:
        if not self._underway:
            raise LoadError(f"the server says: {reply}")
        request = self._underway.popleft()
        self._bytes_underway -= len(request.packed)
        if isinstance(reply, hiredis.ReplyError):
            raise LoadError(f"{request.where}: {reply}")
        if reply is None:
            raise LoadError(f"{request.where}: the key is there already; --replace overwrites it")
        self.keys += request.keys
        self.vectors += request.vectors
        self._advance(request.keys + request.vectors)
