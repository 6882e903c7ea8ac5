"""One client: requests in, replies out in order."""

from __future__ import annotations

import time

import trio

from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Barrier, ReplyMode, Server, Session, Slot
from engram.commands.table import Reply, check_arity, unknown_command
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.outbox import Outbox
from engram.protocol import replies
from engram.protocol.requests import RequestParser
from engram.transport import Transport

# Replies are handed on when a burst of requests has made this many bytes of them.
_BURST_BYTES = 128 << 10


class Connection:
    """Serves one client over a transport, until it leaves or is told to.

    Commands run one after the other, without a checkpoint inside one but for those that answer with a
    `Barrier`. What a client may make the server hold is bounded: see `Outbox`.
    """

    def __init__(
        self,
        transport: Transport,
        server: Server,
        *,
        address: str = "",
        local_address: str = "",
        descriptor: int = -1,
    ) -> None:
        config = server.config
        self._transport = transport
        self._server = server
        self._database = server.database
        self._parser = RequestParser(
            max_bulk_length=config.proto_max_bulk_len,
            query_buffer_limit=config.client_query_buffer_limit,
        )
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        # Replies of the requests that are carried out, not handed on yet.
        self._burst: list[bytes] = []
        self._outbox = Outbox(transport, server, start_writer=self._start_writer, abort=self._scope.cancel)
        server.last_client_id += 1
        now = time.monotonic()
        self.session = Session(
            id=server.last_client_id,
            server=server,
            database=server.database,
            address=address,
            local_address=local_address,
            descriptor=descriptor,
            created=now,
            last_active=now,
            close=self._scope.cancel,
            buffered=lambda: (self._parser.buffered, self._outbox.size),
            observed=lambda: self._database.lsn if self._burst else self._outbox.observed_lsn,
        )

    async def serve(self) -> None:
        """Answers requests until the client leaves, is killed, or `finish` is called."""
        sessions = self._server.sessions
        sessions[self.session.id] = self.session
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    try:
                        with self._reading:
                            await self._answer_requests()
                        with trio.move_on_after(self._server.config.shutdown_timeout):
                            await self._outbox.drained()
                    finally:
                        # A reply released from here on must not start a writer in a nursery that closes.
                        self._outbox.discard()
                        nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._transport.close()
            # Whoever no longer sees the client in CLIENT LIST may rely on its socket being closed.
            del sessions[self.session.id]

    def finish(self) -> None:
        """Takes no more requests, and leaves once the replies so far are sent."""
        self._reading.cancel()

    def _start_writer(self) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._outbox.write)

    async def _answer_requests(self) -> None:
        parser, session, outbox = self._parser, self.session, self._outbox
        journal = self._database.journal
        while True:
            data = await self._transport.receive()
            if not data:
                return
            session.last_active = time.monotonic()
            self._server.statistics.net_input_bytes += len(data)
            held = 0 if journal is None else parser.buffered
            requests = parser.feed(data)
            if requests:
                await self._execute(requests, held + len(data))
            if session.closing:
                return
            if parser.error is not None:
                outbox.send(self._error(f"ERR {parser.error}"), self._database.lsn)
                return
            if outbox.congested:
                await outbox.relieved()

    async def _execute(self, requests: list[list[bytes]], size: int) -> None:
        """Carries out a burst of requests that took `size` bytes."""
        session, database, outbox = self.session, self._database, self._outbox
        journal = database.journal
        # One look at the log for the whole burst; only without room is each write looked at alone.
        admitted = journal is None or journal.has_room(2 * size + RECORD_OVERHEAD * len(requests))
        self._server.statistics.commands_processed += len(requests)
        burst = self._burst
        burst_bytes = 0
        shows_data = False
        spellings = SPELLINGS
        for request in requests:
            reply: Reply
            try:
                command = spellings.get(request[0]) or COMMANDS.get(request[0].lower())
                if command is None:
                    raise unknown_command(request)
                if len(request) != command.arity:
                    check_arity(command, request)
                if command.writes:
                    if command.throttle is not None and (delay := command.throttle(session, request)):
                        burst_bytes = self._release(burst)
                        await trio.sleep(delay)
                        admitted = journal is None
                    if not admitted and journal is not None:
                        room = 2 * sum(map(len, request)) + RECORD_OVERHEAD
                        if not journal.has_room(room):
                            burst_bytes = self._release(burst)
                            await journal.admit(room)
                shows_data = shows_data or command.shows_data
                reply = command.handler(session, request)
            except CommandError as error:
                shows_data = True
                reply = self._error(str(error))
            except Exception:
                # It ends the client, who should still learn what was done before.
                self._release(burst)
                raise
            if type(reply) is bytes and not session.changed_course:
                burst.append(reply)
                burst_bytes += len(reply)
                if burst_bytes < _BURST_BYTES:
                    continue
            else:
                if isinstance(reply, Barrier):
                    burst_bytes = self._release(burst)
                    reply = await self._pass(reply)
                    admitted = journal is None
                if session.reply_mode is not ReplyMode.ON:
                    if isinstance(reply, Slot):
                        reply.awaited = False
                    self._silence()
                elif isinstance(reply, bytes):
                    burst.append(reply)
                else:
                    self._release(burst)
                    outbox.expect(reply, database.lsn)
                    burst_bytes = _BURST_BYTES
            if session.closing:
                break
            if burst_bytes >= _BURST_BYTES:
                burst_bytes = self._release(burst)
                if outbox.congested:
                    await outbox.relieved()
                    admitted = journal is None
        if command is not None:
            session.last_command = command.name
        if burst:
            # A PING need not wait until what others wrote is durable.
            outbox.send_soon(b"".join(burst), database.engine.lsn if shows_data else outbox.observed_lsn)
            burst.clear()

    def _release(self, burst: list[bytes]) -> int:
        """Hands on the replies of a burst so far; returns 0, the bytes left in it."""
        if burst:
            self._outbox.send(b"".join(burst), self._database.engine.lsn)
            burst.clear()
        return 0

    async def _pass(self, barrier: Barrier) -> bytes:
        """Waits for the reply that stands behind a barrier."""
        try:
            return await barrier.reply()
        except CommandError as error:
            return self._error(str(error))

    def _error(self, text: str) -> bytes:
        self._server.statistics.error_replies += 1
        return replies.error(text)

    def _silence(self) -> None:
        """Holds a reply back, as CLIENT REPLY asked; SKIP ends after the reply of the next command."""
        self._outbox.observed_lsn = self._database.lsn
        session = self.session
        if session.reply_mode is ReplyMode.SKIP_NEXT:
            session.reply_mode = ReplyMode.SKIP
        elif session.reply_mode is ReplyMode.SKIP:
            session.reply_mode = ReplyMode.ON
