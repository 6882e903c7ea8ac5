"""Loading a dump into a server, through the wire: pipelined, with a bounded part of it on its way at a time.

Lines become commands in a worker thread, a block at a time: a string a SET, a vector set a VNEW, vectors a
VMADD for many of them. A VNEW is answered before anything after it is sent, so that nothing is added to a
vector set that was there before. The expiries of vector sets come last: none lapses while it is filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import BinaryIO

import attrs
import hiredis
import msgspec
import numpy as np
import trio

from engram.dump import FORMAT, Base64, Header, IndexLine, Line, StringLine, Text, VectorLine
from engram.errors import OperatorError

_READ_BYTES = 1 << 20
_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20
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
        self._replace = replace
        self._line = 0
        self._decode = msgspec.json.Decoder(Line).decode
        self._dimensions: dict[bytes, int] = {}
        self._expiries: list[_Request] = []
        self._made: list[_Request] = []
        # The vectors of a VMADD to come.
        self._index = b""
        self._rows: list[tuple[bytes, bytes, bytes]] = []
        self._rows_first = self._rows_last = 0
        self._rows_bytes = 0

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
                self._made, self._expiries = self._expiries, []
                break
            try:
                for line in lines:
                    self._line += 1
                    if not line.isspace():
                        self._take(line)
            except LoadError as error:
                self.error = error
            self._finish_rows()
        made, self._made = self._made, []
        return made

    def _take(self, text: bytes) -> None:
        try:
            line = self._decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._wrong(str(error)) from error
        if isinstance(line, VectorLine):
            self._take_vector(line)
            return
        self._finish_rows()
        if isinstance(line, StringLine):
            words: list[bytes | str] = ["SET", _bytes(line.key), _bytes(line.value)]
            if not self._replace:
                words.append("NX")
            if line.expires_at is not None:
                words += ["PXAT", str(line.expires_at)]
            self._make(words, keys=1)
        else:
            self._take_index(line)

    def _take_index(self, line: IndexLine) -> None:
        key = _bytes(line.key)
        if self._replace:
            self._make(["DEL", key])
        words: list[bytes | str] = ["VNEW", key, str(line.dimension)]
        given = {
            "METRIC": line.metric,
            "M": line.m,
            "EF_CONSTRUCTION": line.ef_construction,
            "QUANT": line.quantization,
            "RECALL": line.recall,
        }
        for name, value in given.items():
            if value is not None:
                words += [name, str(value)]
        self._make(words, keys=1, is_barrier=True)
        self._dimensions[key] = line.dimension
        if line.expires_at is not None:
            packed = _pack(["PEXPIREAT", key, str(line.expires_at)])
            self._expiries.append(_Request(packed, self._line, self._line))

    def _take_vector(self, line: VectorLine) -> None:
        index = _bytes(line.index)
        dimension = self._dimensions.get(index)
        if dimension is None:
            raise self._wrong("the vector set of this vector is on no line before it")
        vector = _vector_bytes(line.vector)
        if len(vector) != 4 * dimension:
            raise self._wrong(f"the vector does not have {dimension} numbers")
        attributes = b"" if line.attributes_text is None else _bytes(line.attributes_text)
        if line.attributes is not msgspec.UNSET:
            attributes = bytes(line.attributes)
        if index != self._index or len(self._rows) >= _BATCH_ROWS or self._rows_bytes >= _BATCH_BYTES:
            self._finish_rows()
        if not self._rows:
            self._index, self._rows_first, self._rows_bytes = index, self._line, 0
        key = _bytes(line.key)
        self._rows.append((key, vector, attributes))
        self._rows_last = self._line
        self._rows_bytes += len(key) + len(vector) + len(attributes)

    def _finish_rows(self) -> None:
        if not self._rows:
            return
        words: list[bytes | str] = ["VMADD", self._index]
        has_attributes = any(attributes for _, _, attributes in self._rows)
        for key, vector, attributes in self._rows:
            words += (key, vector, attributes) if has_attributes else (key, vector)
        if has_attributes:
            words.append("ATTRS")
        vectors = len(self._rows)
        self._made.append(_Request(_pack(words), self._rows_first, self._rows_last, vectors=vectors))
        self._rows = []

    def _make(self, words: list[bytes | str], *, keys: int = 0, is_barrier: bool = False) -> None:
        self._made.append(_Request(_pack(words), self._line, self._line, keys=keys, is_barrier=is_barrier))

    def _wrong(self, reason: str) -> LoadError:
        return LoadError(f"line {self._line}: {reason}")


def _pack(words: Sequence[bytes | str]) -> bytes:
    # Its stub knows of tuples of one word only.
    packed: bytes = hiredis.pack_command(tuple(words))  # type: ignore[arg-type]
    return packed


def _bytes(text: Text) -> bytes:
    return text.base64 if isinstance(text, Base64) else text.encode()


def _vector_bytes(vector: list[float] | Base64) -> bytes:
    if isinstance(vector, Base64):
        return vector.base64
    # What is too large becomes infinite, which the server refuses.
    with np.errstate(over="ignore"):
        return np.array(vector, np.float64).astype("<f4").tobytes()


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
