"""MONITOR: clients that see the requests of all others. https://redis.io/docs/latest/commands/monitor/"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Protocol

import attrs
import trio

from engram.protocol.inline import escaped, quoted
from engram.sizes import BYTES_OBJECT
from engram.slowlog import redacted

logger = logging.getLogger("engram")

# Replies and requests seen that may wait for one that watches, even where clients have no limit.
_MOST_BUFFERED = 64 << 20

# Words, and their bytes, that are quoted at once: a millisecond or so.
_WORDS_AT_ONCE = 1024
_BYTES_AT_ONCE = 64 << 10
_TURN_NANOSECONDS = 1_000_000
# What a word takes at least in a line beside its bytes, and in memory while it waits.
_QUOTES_AND_BLANK = 3
_WAITING_WORD = BYTES_OBJECT + 8


class Client(Protocol):
    """What is needed of the clients that see and are seen."""

    @property
    def address(self) -> str: ...

    @property
    def database_number(self) -> int: ...

    @property
    def push(self) -> Callable[[bytes], None]:
        """Sends what is no reply, after the replies so far."""

    @property
    def close(self) -> Callable[[], None]: ...

    @property
    def buffered(self) -> Callable[[], tuple[int, int]]:
        """Bytes of requests and of replies that are held for the client."""


@attrs.frozen(eq=False)
class _Waiting:
    """A request that is to be quoted bit by bit and takes so many bytes, and those who are to see it."""

    head: bytes
    words: list[bytes]
    held: int
    clients: Sequence[Client]


class Monitors:
    """The clients that gave MONITOR.

    None of them can hold up the others: what it does not read waits in its own buffer, and beyond
    `limit()` bytes of that it is dropped. A request that takes long to be quoted, and those behind it, wait
    for a task that quotes them bit by bit. `on_change` is called when there is a first client or none is
    left, `start_soon` with the task.
    """

    def __init__(
        self,
        limit: Callable[[], int],
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
        on_change: Callable[[], None] = lambda: None,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self._limit = limit
        self._start_soon = start_soon
        self._on_change = on_change
        self._now = now
        # As an ordered set.
        self._clients: dict[int, Client] = {}
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, client: object) -> bool:
        return id(client) in self._clients

    def add(self, client: Client) -> None:
        """Shows `client` what comes from now on."""
        self._clients[id(client)] = client
        if len(self._clients) == 1:
            self._on_change()

    def remove(self, client: Client) -> None:
        """Shows `client` no more, if it was shown anything."""
        if self._clients.pop(id(client), None) is not None and not self._clients:
            self._on_change()

    def feed(self, client: Client, request: Sequence[bytes]) -> None:
        """Shows a request of `client` to all that watch."""
        seconds, nanoseconds = divmod(self._now(), 1_000_000_000)
        address = client.address.encode("utf-8", "surrogateescape")
        if address.startswith(b"/"):
            address = b"unix:" + address.removesuffix(b":0")
        head = b"+%d.%06d [%d %b] " % (seconds, nanoseconds // 1000, client.database_number, address)
        words = redacted(request)
        size = sum(map(len, words))
        if size <= _BYTES_AT_ONCE and len(words) <= _WORDS_AT_ONCE and not self._waiting:
            self._show(self._clients.values(), (head, b" ".join(map(quoted, words)), b"\r\n"))
        else:
            self._show_later(head, words, size)

    def _show_later(self, head: bytes, words: list[bytes], size: int) -> None:
        """Leaves a request, the words of which have `size` bytes, to the task that quotes."""
        least = size + _QUOTES_AND_BLANK * len(words)
        held = size + _WAITING_WORD * len(words)
        clients = [
            each
            for each in list(self._clients.values())
            # One that is to be dropped need not be shown what takes long.
            if self._has_room(each, max(least, self._waiting_bytes + held if self._waiting else 0))
        ]
        if not clients:
            return
        if not self._waiting:
            self._start_soon(self._show_waiting)
        self._waiting.append(_Waiting(head, words, held, clients))
        self._waiting_bytes += held

    async def _show_waiting(self) -> None:
        """The task that quotes what takes long, as long as something waits."""
        turn_ends = time.perf_counter_ns() + _TURN_NANOSECONDS
        try:
            while self._waiting:
                line = self._waiting[0]
                parts = [line.head]
                for part in _quoted_in_parts(line.words):
                    parts.append(part)
                    if time.perf_counter_ns() > turn_ends:
                        await trio.lowlevel.checkpoint()
                        turn_ends = time.perf_counter_ns() + _TURN_NANOSECONDS
                    if not any(each in self for each in line.clients):
                        break
                self._show(line.clients, (*parts, b"\r\n"))
                self._waiting.popleft()
                self._waiting_bytes -= line.held
        except Exception:
            # There is no memory for it, perhaps. Nobody misses a line without a notice.
            for watching in list(self._clients.values()):
                self._drop(watching)
            raise
        finally:
            self._waiting.clear()
            self._waiting_bytes = 0

    def _show(self, clients: Collection[Client], parts: Sequence[bytes]) -> None:
        """Sends a line to those of the clients that still watch, and have room for it."""
        size = sum(map(len, parts))
        line = (b"".join(parts),) if size <= _BYTES_AT_ONCE else parts
        for watching in list(clients):
            if watching in self and self._has_room(watching, size):
                for part in line:
                    watching.push(part)

    def _has_room(self, watching: Client, size: int) -> bool:
        """Whether a client may be sent so many bytes more; one that may not is dropped."""
        if watching.buffered()[1] + size <= min(self._limit(), _MOST_BUFFERED):
            return True
        self._drop(watching)
        return False

    def _drop(self, watching: Client) -> None:
        self.remove(watching)
        watching.close()
        logger.warning(
            "a client that gave MONITOR does not read and is dropped",
            extra={"fields": {"address": watching.address}},
        )


def _quoted_in_parts(words: Sequence[bytes]) -> Iterator[bytes]:
    """Words as `quoted` has them, with blanks between them, in parts that are each made at once."""
    part: list[bytes] = []
    size = 0
    for piece in _quoted_pieces(words):
        part.append(piece)
        size += len(piece) + _WAITING_WORD
        if size >= _BYTES_AT_ONCE:
            yield b"".join(part)
            part.clear()
            size = 0
    yield b"".join(part)


def _quoted_pieces(words: Sequence[bytes]) -> Iterator[bytes]:
    """The same, word by word, and of a long word bit by bit."""
    blank = b""
    for word in words:
        if len(word) <= _BYTES_AT_ONCE:
            yield blank + quoted(word)
        else:
            yield blank + b'"'
            for start in range(0, len(word), _BYTES_AT_ONCE):
                yield escaped(word[start : start + _BYTES_AT_ONCE])
            yield b'"'
        blank = b" "
