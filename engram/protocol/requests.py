"""Requests out of a stream of bytes: arrays of bulk strings, and inline commands typed by hand.

Every stream is read as Redis reads it (processMultibulkBuffer and processInlineBuffer in its networking.c),
with the same error texts, and with its leniency: the two bytes after an argument may be any, and so may the
byte after the CR of a length. Two things differ: Redis lets a line exceed its limit when the line's end comes
together with the excess, and does not see the end of a line that holds a zero byte.

Three readers share the work:

- `RequestParser` itself reads any stream, in about two microseconds for a small command. It decides what is
  right, and it alone holds what is incomplete.
- What is one small array and nothing else, as a client sends that waits for each reply, is split at its line
  ends, in a third of that time. The words count when each has the length that its header says.
- hiredis reads bursts of small pipelined commands several times faster. It is made for replies, so it also
  accepts what no request may hold, and it reserves memory for as many elements as an array announces. It is
  given only what it cannot misread unnoticed, and its answer counts only when it proves to be the whole.
"""

from __future__ import annotations

import re
from io import BytesIO
from itertools import chain
from typing import Final

import hiredis

from engram.errors import EngramError
from engram.protocol.inline import split_inline

MAX_BULK_LENGTH: Final = 512 * 1024 * 1024
"""Bytes of one argument (Redis: proto-max-bulk-len)."""

MAX_ARGUMENTS: Final = 1024 * 1024
"""Arguments of one request. Redis had this limit until version 7, and has 2**31 - 1 since."""

QUERY_BUFFER_LIMIT: Final = 1024 * 1024 * 1024
"""Bytes held of one incomplete request (Redis: client-query-buffer-limit)."""

INLINE_LIMIT: Final = 64 * 1024
"""Bytes of one line, be it an inline command or a length (Redis: PROTO_INLINE_MAX_SIZE)."""

UNAUTHENTICATED_ARGUMENTS: Final = 10
"""Arguments of one request of a client that has yet to authenticate (processMultibulkBuffer)."""

UNAUTHENTICATED_BULK_LENGTH: Final = 16 * 1024
"""Bytes of one argument of such a client (processMultibulkBuffer)."""

UNAUTHENTICATED_REQUESTS: Final = 128
"""Requests of such a client that are returned at once: to refuse thousands would hold up the others."""

REQUESTS_AT_ONCE: Final = 512
"""Requests of any client that `RequestParser` itself reads at once: a millisecond or two."""

CROSS_PROTOCOL: Final = frozenset({b"post", b"host:"})
"""What an HTTP request sends as commands, in small letters (Redis: securityWarningCommand)."""

_ARRAY: Final = ord("*")
_BULK_LENGTHS: Final = {b"$%d" % length: length for length in range(4096)}
_ARRAY_LENGTHS: Final = {b"*%d" % length: length for length in range(64)}
_LENGTH: Final = re.compile(rb"-?[1-9][0-9]{0,18}|0")

# Beyond this, what is one array alone is found out no faster by splitting it.
_SMALL_REQUEST: Final = 1024
_BULK_HEADERS: Final = tuple(_BULK_LENGTHS)
_MOST_WORDS: Final = 9
# Of an array of so many words, the pieces between line ends: header, a header and a body each, and nothing.
_PIECES: Final = {b"*%d" % words: 2 * words + 2 for words in range(1, _MOST_WORDS + 1)}

# Two requests of one short word.
_SHORTEST_BURST: Final = 28
_LONGEST_PLAIN_ARRAY: Final = 99
_DECEPTIVE: Final = b"+=(~|>%"
_LONG_ARRAY: Final = re.compile(rb"\*[0-9]{3}")
_PROBE: Final = b"*1\r\n$5\r\nprobe\r\n"
_STARVED: Final = object()
# The buffer of a reader stays as large as what it was fed: beyond this it is not kept.
_SMALL_BURST: Final = 4096


class ProtocolError(EngramError):
    """The stream is not a sequence of requests; the text goes to the client after ``ERR``."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Protocol error: {reason}")


class RequestParser:
    """Requests of one connection, from bytes cut anywhere.

    After the first violation `error` holds it, and nothing more is parsed.

    While `authenticated` is false, requests and arguments must be small. As the requests before one that is
    not may be what authenticates the client, they are returned first: `suspended` is true then, and the next
    `feed`, of nothing if need be, judges the rest by what `authenticated` is by that time. So it is, of any
    client, after as many requests as others should wait for.
    """

    def __init__(
        self,
        *,
        max_bulk_length: int = MAX_BULK_LENGTH,
        max_arguments: int = MAX_ARGUMENTS,
        query_buffer_limit: int = QUERY_BUFFER_LIMIT,
        inline_limit: int = INLINE_LIMIT,
    ) -> None:
        self.error: ProtocolError | None = None
        self.suspended = False
        self._authenticated = True
        self._authenticated_limits = max_arguments, max_bulk_length
        # The limits in force: those of the state that `authenticated` says.
        self._max_arguments, self._max_bulk_length = self._authenticated_limits
        self._requests_at_once = REQUESTS_AT_ONCE
        # Up to so many bytes, a request of few words is within the limits of either state.
        self._small = 0
        if min(max_arguments, UNAUTHENTICATED_ARGUMENTS) >= _MOST_WORDS:
            self._small = min(_SMALL_REQUEST, max_bulk_length, query_buffer_limit)
        self._query_buffer_limit = query_buffer_limit
        self._inline_limit = inline_limit
        self._arguments: list[bytes] = []  # of the request that is arriving
        self._missing = 0  # arguments still to come; 0 between requests
        self._consumed = 0  # bytes read of that request
        self._line = b""  # the part received of a line
        # The part received of an argument. It gives up its buffer, however long, without a copy.
        self._bulk = BytesIO()
        self._bulk_length = -1  # of that argument; -1 when none is arriving
        self._reader: hiredis.Reader | None = None  # one that stands between two requests

    @property
    def authenticated(self) -> bool:
        """Whether the client may send large requests."""
        return self._authenticated

    @authenticated.setter
    def authenticated(self, authenticated: bool) -> None:
        self._authenticated = authenticated
        arguments, bulk_length = self._authenticated_limits
        if not authenticated:
            arguments = min(arguments, UNAUTHENTICATED_ARGUMENTS)
            bulk_length = min(bulk_length, UNAUTHENTICATED_BULK_LENGTH)
        self._requests_at_once = REQUESTS_AT_ONCE if authenticated else UNAUTHENTICATED_REQUESTS
        self._max_arguments, self._max_bulk_length = arguments, bulk_length

    @property
    def buffered(self) -> int:
        """Bytes received of a request that is not complete."""
        return self._consumed + len(self._line) + self._bulk.tell()

    def feed(self, data: bytes) -> list[list[bytes]]:
        """Take what has been received; return the requests that are complete now, in order.

        Each is a list of one argument or more; empty requests (``*0``, a blank line) are passed over. What
        comes before a violation is returned all the same.
        """
        if len(data) <= self._small and not self._missing and not self._line and self.error is None:
            request = _only_request(data)
            if request is not None:
                return [request]
        requests: list[list[bytes]] = []
        if self.error is None:
            try:
                self._parse(data, requests)
                if (self._missing or self._line) and self.buffered > self._query_buffer_limit:
                    raise ProtocolError("query buffer limit exceeded")
            except ProtocolError as error:
                # The stacks refer to the parser: only the garbage collector would free it.
                error.__cause__ = error.__context__ = None
                self.error = error.with_traceback(None)
                self.suspended = False
                self._line = b""
                self._bulk = BytesIO()
                self._arguments = []
                self._consumed = 0
        return requests

    def _parse(self, data: bytes, requests: list[list[bytes]]) -> None:
        if self._line:
            data = self._line + data
            self._line = b""
            self.suspended = False
        position = 0
        if self._missing:
            position = self._read_arguments(data, position, requests)
        if len(data) - position >= _SHORTEST_BURST:
            position = self._read_burst(data, position, requests)
        left = self._requests_at_once
        while position < len(data):
            if not left:
                position = self._suspend(data, position)
                break
            left -= 1
            if data[position] == _ARRAY:
                position = self._read_array(data, position, requests)
            else:
                position = self._read_inline(data, position, requests)

    def _read_array(self, data: bytes, position: int, requests: list[list[bytes]]) -> int:
        line_end = data.find(b"\r", position)
        if not 0 <= line_end < len(data) - 1:
            return self._hold_line(data, position, line_end, "too big mbulk count string")
        if line_end - position > self._inline_limit:
            raise ProtocolError("too big mbulk count string")
        header = data[position:line_end]
        count = _ARRAY_LENGTHS.get(header) or _length(header)
        if count is None or count > self._max_arguments:
            if count is None or count > self._authenticated_limits[0]:
                raise ProtocolError("invalid multibulk length")
            if not requests:
                raise ProtocolError("unauthenticated multibulk length")
            return self._suspend(data, position)
        if count <= 0:
            return line_end + 2
        self._missing = count
        self._consumed = line_end + 2 - position
        return self._read_arguments(data, line_end + 2, requests)

    def _read_arguments(self, data: bytes, position: int, requests: list[list[bytes]]) -> int:
        """Read what is missing of a request; return the position after it, or the end when more must come."""
        start = position
        if self._bulk_length >= 0:
            position = self._fill_bulk(data)
            if self._bulk_length >= 0:
                return position
        arguments = self._arguments
        append, find = arguments.append, data.find
        last = len(data) - 1
        for missing in range(self._missing, 0, -1):
            line_end = find(b"\r", position)
            if not 0 <= line_end < last:
                self._missing = missing
                self._consumed += position - start
                return self._hold_line(data, position, line_end, "too big bulk count string")
            header = data[position:line_end]
            length = _BULK_LENGTHS.get(header)
            if length is None or length > self._max_bulk_length:
                length = self._check_bulk_length(header)
                if length > self._max_bulk_length:
                    if not requests:
                        raise ProtocolError("unauthenticated bulk length")
                    self._missing = missing
                    self._consumed += position - start
                    return self._suspend(data, position)
            position = line_end + 2
            stop = position + length
            if stop >= last:
                self._missing = missing
                self._consumed += position - start
                self._bulk_length = length
                self._bulk.write(data[position:])
                return last + 1
            append(data[position:stop])
            position = stop + 2
        requests.append(arguments)
        self._arguments = []
        self._missing = self._consumed = 0
        return position

    def _fill_bulk(self, data: bytes) -> int:
        """Add to the argument that is arriving; return the position after it."""
        length, bulk = self._bulk_length, self._bulk
        taken = length + 2 - bulk.tell()
        bulk.write(data if taken >= len(data) else data[:taken])
        if len(data) < taken:
            return len(data)
        self._consumed += length + 2 - taken
        bulk.truncate(length)
        self._arguments.append(bulk.getvalue())
        self._missing -= 1
        self._bulk = BytesIO()
        self._bulk_length = -1
        return taken

    def _check_bulk_length(self, header: bytes) -> int:
        if len(header) > self._inline_limit:
            raise ProtocolError("too big bulk count string")
        if header[:1] != b"$":
            # The line ends at the first CR: without a byte before it, the CR is what stands in place of '$'.
            got = (header[:1] or b"\r").decode(errors="surrogateescape")
            raise ProtocolError(f"expected '$', got '{got}'")
        length = _length(header)
        if length is None or not 0 <= length <= self._authenticated_limits[1]:
            raise ProtocolError("invalid bulk length")
        return length

    def _suspend(self, data: bytes, position: int) -> int:
        """Keep for later all from a line on, of a client that has yet to authenticate; return the end."""
        self.suspended = True
        self._line = data[position:]
        return len(data)

    def _read_inline(self, data: bytes, position: int, requests: list[list[bytes]]) -> int:
        line_end = data.find(b"\n", position)
        if line_end < 0:
            return self._hold_line(data, position, line_end, "too big inline request")
        if line_end - position > self._inline_limit:
            raise ProtocolError("too big inline request")
        try:
            arguments = split_inline(data[position:line_end].removesuffix(b"\r"))
        except ValueError as error:
            raise ProtocolError("unbalanced quotes in request") from error
        if arguments:
            requests.append(arguments)
        return line_end + 1

    def _hold_line(self, data: bytes, position: int, line_end: int, too_big: str) -> int:
        if (line_end if line_end >= 0 else len(data)) - position > self._inline_limit:
            raise ProtocolError(too_big)
        self._line = data[position:]
        return len(data)

    def _read_burst(self, data: bytes, position: int, requests: list[list[bytes]]) -> int:
        """Let hiredis read all, or all but the last request, or nothing; return where that ends."""
        if (
            data[position] != _ARRAY
            or len(data) > self._max_bulk_length
            or self._max_arguments < _LONGEST_PLAIN_ARRAY
            or not _plain(data)
        ):
            return position
        end = len(data)
        burst = self._parse_with_hiredis(data[position:]) if data.endswith(b"\r\n") else None
        if burst is None:
            end = data.rfind(b"\r\n*", position) + 2
            if end - position < _SHORTEST_BURST:
                return position
            burst = self._parse_with_hiredis(data[position:end])
            if burst is None:
                return position
        requests += burst
        return end

    def _parse_with_hiredis(self, data: bytes) -> list[list[bytes]] | None:
        """The requests that make up `data`; None unless all are arrays of bulk strings and end with it."""
        reader, self._reader = self._reader or hiredis.Reader(notEnoughData=_STARVED), None
        reader.feed(data)
        try:
            requests: list[list[bytes]] = list(iter(reader.gets, _STARVED))
            # Only a reader between two requests takes the probe for one, and takes all of it.
            reader.feed(_PROBE)
            if reader.gets() != [b"probe"] or reader.has_data():
                return None
            # To join each is the quickest way to learn that all are lists of bytes.
            if not all(map(b"".join, requests)):
                # At an empty one: an empty bulk string in place of an array joins as an empty array does.
                if not all(isinstance(request, list) for request in requests):
                    return None
                b"".join(chain.from_iterable(requests))
                requests = list(filter(None, requests))
        except (hiredis.ProtocolError, TypeError):
            return None
        if len(data) <= _SMALL_BURST:
            self._reader = reader
        return requests


def _only_request(data: bytes) -> list[bytes] | None:
    """The words of a small request that is complete and alone; None for anything else, and perhaps for it."""
    if b"\r\n*" in data:
        # Most likely there is another one.
        return None
    pieces = data.split(b"\r\n", 2 * _MOST_WORDS + 2)
    if _PIECES.get(pieces[0]) != len(pieces) or pieces[-1]:
        return None
    words = pieces[2::2]
    if pieces[1:-1:2] != [_BULK_HEADERS[len(word)] for word in words]:
        return None
    return words


def _plain(data: bytes) -> bool:
    """Whether hiredis either reads in `data` what Redis reads, or returns something that shows it did not.

    In its eyes simple strings, verbatim strings and big numbers are bytes, sets, attributes and pushes are
    lists, and maps hold bytes, too, as if they were bulk strings and arrays: so their type bytes must occur
    nowhere. Other types show. Arrays must be short, because hiredis reserves what each announces, and they
    may be nested to any depth.
    """
    return len(data.translate(None, _DECEPTIVE)) == len(data) and _LONG_ARRAY.search(data) is None


def _length(header: bytes) -> int | None:
    """The number after the type byte, by Redis's rules: no plus sign, leading zero or blank. Else None."""
    if not _LENGTH.fullmatch(header, 1):
        return None
    length = int(header[1:])
    return length if -(2**63) <= length < 2**63 else None
