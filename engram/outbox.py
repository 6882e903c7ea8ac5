"""The replies of one client on their way out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

import trio

from engram.commands.allowance import SMALL_REPLY
from engram.commands.session import Bytes, Pieces, Server, Slot
from engram.database import Journal
from engram.transport import Transport

logger = logging.getLogger(__name__)

# Replies that may wait for the log or for a search before further requests are left unread.
_UNRELEASED_REPLIES = 1024
_UNRELEASED_BYTES = 4 << 20

_WRITE_SIZE = 256 << 10
# Of parts of replies, so many such sizes, or as many that are longer, are sent before others have a turn.
_SENDS_AT_ONCE = 8

# Replies that may wait for a client that has yet to authenticate (Redis drops it beyond as many).
_UNAUTHENTICATED_BYTES = 1024


class Outbox:
    """Sends replies in order, each once it is known and the state it shows is durable.

    `flush` is what moves replies along, and it is synchronous: the connection calls it after a burst of
    requests, the log when a batch is durable, a search when it is done. So a batch that releases the
    replies of fifty clients wakes no task. An error on that way ends this client alone. Only what a socket
    will not take at once is left to a writer task. `start_writer` starts `write` in the client's nursery,
    `abort` ends the client, and `written` is called when a client that reads late has read some.

    While `authenticated` is false, next to nothing may wait for the client.
    """

    def __init__(
        self,
        transport: Transport,
        server: Server,
        address: str,
        *,
        start_writer: Callable[[], None],
        abort: Callable[[], None],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.authenticated = True
        self._transport = transport
        self._server = server
        self._address = address
        self._journal = server.database.journal
        self._rounds = server.rounds
        # What is held here is counted there, too.
        self._held = server.held_replies
        self._start_writer = start_writer
        self._abort = abort
        self._written = written
        self._waiting: deque[tuple[Bytes | Slot, int]] = deque()
        self._waiting_bytes = 0
        # About how many bytes those will have that are not known yet.
        self._expected_bytes = 0
        # The last LSN that replies so far show.
        self.observed_lsn = 0
        self._registered = False
        self._departing: list[bytes] = []
        self._unsent: deque[Bytes] = deque()
        self._unsent_bytes = 0
        self._write_scope: trio.CancelScope | None = None
        self._progress = trio.lowlevel.ParkingLot()
        self._broken = False

    @property
    def size(self) -> int:
        """Bytes of replies held."""
        return self._waiting_bytes + sum(map(len, self._departing)) + self._unsent_bytes

    @property
    def awaiting(self) -> bool:
        """Whether replies wait for the log or for a search, and not for the client."""
        return bool(self._waiting)

    @property
    def _limit(self) -> int:
        """Bytes that may wait for the client before its requests do."""
        limit = self._server.config.client_output_buffer_limit
        return limit if self.authenticated else min(limit, _UNAUTHENTICATED_BYTES)

    @property
    def congested(self) -> bool:
        """Whether further requests of this client should wait."""
        if not self._unsent_bytes and not self._waiting:
            return False
        return (
            self._unsent_bytes > self._limit
            or len(self._waiting) > _UNRELEASED_REPLIES
            or self._waiting_bytes + self._expected_bytes > _UNRELEASED_BYTES
        )

    async def relieved(self) -> None:
        """Waits until the outbox is not congested."""
        while self.congested:
            await self._progress.park()

    async def drained(self) -> None:
        """Waits until every reply has been sent."""
        self.depart()
        while (self._waiting or self._unsent or self._write_scope is not None) and not self._broken:
            await self._progress.park()

    def send(self, reply: bytes | Pieces, lsn: int) -> None:
        """Sends an encoded reply, or several, that show the state at `lsn`: now, or in its turn."""
        self.observed_lsn = lsn
        if not self._waiting:
            if self._journal is None or self._journal.released(lsn):
                if isinstance(reply, Pieces):
                    self._send_parts(reply.parts)
                else:
                    self._send(reply)
                return
            self._register(self._journal, lsn)
        parts = reply.parts if isinstance(reply, Pieces) else (reply,)
        size = sum(map(len, parts))
        self._waiting_bytes += size
        self._held.waiting += size
        self._waiting += ((part, lsn) for part in parts)

    def send_soon(self, reply: bytes, lsn: int) -> None:
        """As `send`, but when there is a round of clients, at its end."""
        rounds = self._rounds
        if (
            not rounds.under_way
            or len(reply) >= _WRITE_SIZE
            or self._waiting
            or not (self._journal is None or self._journal.released(lsn))
        ):
            self.send(reply, lsn)
            return
        self.observed_lsn = lsn
        self._departing.append(reply)
        if len(self._departing) == 1:
            rounds.at_end(self.depart)

    def depart(self) -> None:
        """Sends what `send_soon` put off."""
        departing, self._departing = self._departing, []
        if departing:
            try:
                self._send(departing[0] if len(departing) == 1 else b"".join(departing))
            except Exception:
                self._end()

    def expect(self, slot: Slot, lsn: int) -> None:
        """Keeps the place of a reply that will show the state at `lsn`, or at the slot's own."""
        if slot.lsn is not None:
            lsn = slot.lsn
        self.observed_lsn = max(self.observed_lsn, lsn)
        slot.on_fill = partial(self._filled, slot)
        self._expected_bytes += slot.size
        self._waiting.append((slot, lsn))
        if slot.reply is not None:
            self._count(slot, slot.reply)
        self.flush()

    def flush(self) -> None:
        """Sends every reply that is ready, up to the first that is not."""
        waiting, journal = self._waiting, self._journal
        ready: list[Bytes] = []
        ready_bytes = 0
        while waiting:
            reply, lsn = waiting[0]
            if isinstance(reply, Slot):
                if reply.reply is None:
                    break
                content: Bytes = reply.reply
            else:
                content = reply
            if journal is not None and not journal.released(lsn):
                self._register(journal, lsn)
                break
            waiting.popleft()
            size = len(content)
            self._waiting_bytes -= size
            self._held.waiting -= size
            ready_bytes += size
            ready.append(content)
        if ready:
            if len(ready) == 1:
                self._send(ready[0])
            elif ready_bytes <= _WRITE_SIZE:
                self._send(b"".join(ready))
            else:
                self._send_parts(ready)
            if self._progress:
                self._progress.unpark_all()

    def discard(self) -> None:
        """Forgets everything: the client is gone."""
        self._broken = True
        # They are the client's, which refers to this: only the garbage collector would free both.
        self._start_writer = self._written = _nothing
        for reply, _ in self._waiting:
            if isinstance(reply, Slot):
                reply.on_fill = None
                reply.awaited = False
        self._waiting.clear()
        self._departing.clear()
        self._unsent.clear()
        self._held.waiting -= self._waiting_bytes + self._unsent_bytes
        self._waiting_bytes = self._expected_bytes = self._unsent_bytes = 0
        self._progress.unpark_all()

    def _register(self, journal: Journal, lsn: int) -> None:
        """Has `flush` called once a reply that shows the state at `lsn` may leave."""
        if not self._registered:
            self._registered = True
            journal.on_release(lsn, self._released)

    def _released(self) -> None:
        self._registered = False
        self._attempt_flush()

    def _filled(self, slot: Slot) -> None:
        assert slot.reply is not None
        self._count(slot, slot.reply)
        self._attempt_flush()

    def _count(self, slot: Slot, reply: bytes) -> None:
        """Counts a reply that is known from now on."""
        self._expected_bytes -= slot.size
        self._waiting_bytes += len(reply)
        self._held.waiting += len(reply)

    def _attempt_flush(self) -> None:
        """Moves replies along for somebody whom an error is no concern of: it ends this client."""
        try:
            self.flush()
        except Exception:
            self._end()

    def _end(self) -> None:
        """Ends this client for the error at hand."""
        # There may be no memory for a line of the log.
        with suppress(MemoryError):
            logger.exception("client %s ended by an error", self._address)
        self.discard()
        self._abort()

    def _send(self, data: Bytes) -> None:
        if self._broken:
            return
        if self._departing:
            self._send_parts((data,))
            return
        sent = 0
        if self._write_scope is None:
            try:
                sent = self._transport.send_now(data)
            except OSError:
                self.discard()
                self._abort()
                return
            self._server.statistics.net_output_bytes += sent
            if sent == len(data):
                return
        self._leave((memoryview(data)[sent:],))

    def _send_parts(self, parts: Sequence[Bytes]) -> None:
        """As `_send` for several, in order: long ones without a copy, and some of many later."""
        rest = deque((*self._departing, *parts))
        self._departing = []
        for _ in range(_SENDS_AT_ONCE):
            if rest and self._write_scope is None:
                self._send(_next_of(rest))
        if rest and not self._broken:
            self._leave(rest)

    def _leave(self, parts: Collection[Bytes]) -> None:
        """Leaves these to the writer task."""
        if self._write_scope is None:
            self._write_scope = trio.CancelScope()
            self._start_writer()
        size = sum(map(len, parts))
        self._unsent += parts
        self._unsent_bytes += size
        self._held.waiting += size
        self._limit_writing(self._write_scope)

    def _limit_writing(self, scope: trio.CancelScope) -> None:
        # Only a client that holds up its own requests is hurried; one that reads late may.
        backed_up = self._unsent_bytes > self._limit
        if not backed_up:
            scope.deadline = float("inf")
        elif scope.deadline == float("inf"):
            scope.deadline = trio.current_time() + self._server.config.client_write_timeout

    def hurry(self) -> None:
        """Drops the client unless it takes some of what it has left unread, however little that is."""
        scope = self._write_scope
        if scope is not None and self._unsent_bytes > SMALL_REPLY and scope.deadline == float("inf"):
            scope.deadline = trio.current_time() + self._server.config.client_write_timeout

    async def write(self) -> None:
        """The writer task: sends what the socket would not take at once, then ends."""
        scope = self._write_scope
        assert scope is not None
        finished = False
        try:
            with scope, suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                while self._unsent:
                    data = self._next_write()
                    await self._transport.send_all(data)
                    if self._broken:
                        # What was not sent is no longer counted.
                        break
                    self._unsent_bytes -= len(data)
                    self._held.waiting -= len(data)
                    self._server.statistics.net_output_bytes += len(data)
                    self._written()
                    scope.deadline = float("inf")
                    self._limit_writing(scope)
                    self._progress.unpark_all()
                finished = True
        finally:
            self._write_scope = None
            if scope.cancelled_caught:
                timeout = self._server.config.client_write_timeout
                logger.warning("client %s dropped: it took no reply for %d s", self._address, timeout)
            if not finished:
                # Part of it may have been sent: nothing can follow.
                self.discard()
                self._abort()
            self._progress.unpark_all()

    def _next_write(self) -> Bytes:
        data = _next_of(self._unsent)
        if len(data) > _WRITE_SIZE:
            rest = memoryview(data)
            self._unsent.appendleft(rest[_WRITE_SIZE:])
            data = rest[:_WRITE_SIZE]
        return data


def _nothing() -> None:
    """In place of a call to what has ended."""


def _next_of(parts: deque[Bytes]) -> Bytes:
    """Takes the first, or several that are short as one."""
    first = parts.popleft()
    size = len(first)
    if size >= _WRITE_SIZE or not parts:
        return first
    taken = [first]
    while parts and size + len(parts[0]) <= _WRITE_SIZE:
        taken.append(parts.popleft())
        size += len(taken[-1])
    return b"".join(taken)
