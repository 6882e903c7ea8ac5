"""One client: requests in, replies out in order."""

from __future__ import annotations

import logging
import time

import trio

from engram.commands.guard import guard
from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Barrier, ReplyMode, Server, Session, Slot
from engram.commands.table import Command, Handler, Reply, check_arity, unknown_command
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.outbox import Outbox
from engram.protocol.requests import CROSS_PROTOCOL, RequestParser
from engram.transport import Transport

logger = logging.getLogger(__name__)

# Replies are handed on when a burst of requests has made this many bytes of them.
_BURST_BYTES = 128 << 10

# A burst of commands that take long makes way for other clients after so much time.
_TURN_NANOSECONDS = 5_000_000


def _no_handler(session: Session, request: list[bytes]) -> Reply:
    raise AssertionError("no command is known yet")


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
        self._outbox = Outbox(
            transport,
            server,
            start_writer=self._start_writer,
            abort=self._scope.cancel,
            written=self._touch,
        )
        # Whether a barrier is being waited for.
        self._passing = False
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
            push=self._push,
            awaiting=lambda: self._passing or self._outbox.awaiting,
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
            self._server.monitors.remove(self.session)
            self.session.unwatch()
            # Whoever no longer sees the client in CLIENT LIST may rely on its socket being closed.
            del sessions[self.session.id]

    def _touch(self) -> None:
        self.session.last_active = time.monotonic()

    def finish(self) -> None:
        """Takes no more requests, and leaves once the replies so far are sent."""
        self._reading.cancel()

    def _push(self, data: bytes) -> None:
        if self._burst:
            self._burst.append(data)
        else:
            self._outbox.send(data, self._outbox.observed_lsn)

    def _start_writer(self) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._outbox.write)

    async def _answer_requests(self) -> None:
        parser, session, outbox = self._parser, self.session, self._outbox
        journal = self._database.journal
        authenticated = True
        while True:
            data = await self._transport.receive()
            if not data:
                return
            self._touch()
            self._server.statistics.net_input_bytes += len(data)
            held = 0 if journal is None else parser.buffered
            while True:
                if session.authenticated is not authenticated:
                    authenticated = parser.authenticated = outbox.authenticated = session.authenticated
                requests = parser.feed(data)
                if requests:
                    await self._execute(requests, held + len(data))
                if session.closing:
                    return
                if not parser.suspended:
                    break
                held, data = parser.buffered, b""
                await trio.lowlevel.checkpoint()
                await outbox.relieved()
            if parser.error is not None:
                outbox.send(self._server.error(f"ERR {parser.error}"), self._database.lsn)
                return
            if outbox.congested:
                await outbox.relieved()

    async def _execute(self, requests: list[list[bytes]], size: int) -> None:
        """Carries out a burst of requests that took `size` bytes."""
        session, database, outbox, server = self.session, self._database, self._outbox, self._server
        journal = database.journal
        # One look at the log for the whole burst; only without room is each write looked at alone.
        admitted = journal is None or journal.has_room(2 * size + RECORD_OVERHEAD * len(requests))
        statistics = server.statistics
        statistics.commands_processed += len(requests)
        burst = self._burst
        burst_bytes = 0
        shows_data = False
        spellings = SPELLINGS
        clock = time.perf_counter_ns
        slowest = server.config.slowlog_log_slower_than * 1000
        slow = slowest if slowest >= 0 else float("inf")
        # Calls of one command after the other are counted together: `calls` of them since `first`.
        counted: Command | None = None
        calls = 0
        first = began = clock()
        turn_over, turn_ends = False, began + _TURN_NANOSECONDS
        # The command for which the following holds, until it changes by another one or by another client.
        known: Command | None = None
        handler: Handler = _no_handler
        arity = 0
        special = timed = False
        latest = requests[0]
        for request in requests:
            reply: Reply | None = None
            command = None
            try:
                command = spellings.get(request[0]) or COMMANDS.get(request[0].lower())
                if command is None or command is not known:
                    if command is None:
                        if request[0].lower() in CROSS_PROTOCOL:
                            self._end_http(request)
                            return
                        raise unknown_command(request)
                    if command.subcommands:
                        container, command = command, None
                        command = container.resolve(request)
                    if command is not counted:
                        began = clock()
                        if calls and counted is not None:
                            self._count(counted, calls, began - first, slow, latest)
                        calls, first, counted = 0, began, command
                    known, handler, arity, timed = command, command.handler, command.arity, command.varies
                    shows_data = shows_data or command.shows_data
                    special = session.guarded or server.guarded
                    special = special or (command.writes and (not admitted or command.throttle is not None))
                if len(request) != arity:
                    check_arity(command, request)
                if special:
                    waiting = clock()
                    if session.guarded or server.guarded:
                        reply = guard(session, command, request)
                        if server.config.maxmemory:
                            # Room in the log may have gone to what was evicted.
                            admitted = journal is None
                        if reply is None and server.pause.holds(command):
                            burst_bytes = self._release(burst)
                            await server.pause.wait(command)
                            admitted = journal is None
                    if reply is None and command.writes:
                        if command.throttle is not None and (delay := command.throttle(session, request)):
                            burst_bytes = self._release(burst)
                            await trio.sleep(delay)
                            admitted = journal is None
                        if not admitted and journal is not None:
                            room = 2 * sum(map(len, request)) + RECORD_OVERHEAD
                            if not journal.has_room(room):
                                burst_bytes = self._release(burst)
                                await journal.admit(room)
                    waited = clock() - waiting
                    first, began, known = first + waited, began + waited, None
            except CommandError as error:
                shows_data = True
                reply = self._refuse(str(error), command, rejected=True)
            if reply is None:
                calls += 1
                latest = request
                try:
                    reply = handler(session, request)
                except CommandError as error:
                    shows_data = True
                    reply = self._refuse(str(error), command, rejected=False)
                except Exception:
                    # It ends the client, who should still learn what was done before.
                    self._release(burst)
                    raise
            if timed:
                ended = clock()
                if ended - began > slow and latest is request and command is not None:
                    self._keep_slow(command, request, ended - began)
                began = ended
                turn_over = ended > turn_ends
            if type(reply) is bytes and not session.changed_course:
                burst.append(reply)
                burst_bytes += len(reply)
                if burst_bytes < _BURST_BYTES and not turn_over:
                    continue
            else:
                if isinstance(reply, Slot) and command is not None:
                    # It is counted with the time until its reply is known.
                    calls -= 1
                    self._measure(reply, command, request, slow)
                if isinstance(reply, Barrier):
                    burst_bytes = self._release(burst)
                    reply = await self._pass(reply)
                    admitted, known = journal is None, None
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
            if burst_bytes >= _BURST_BYTES or turn_over:
                burst_bytes = self._release(burst)
                if outbox.congested or turn_over:
                    waiting = clock()
                    await trio.lowlevel.checkpoint()
                    await outbox.relieved()
                    turn_over, turn_ends = False, clock() + _TURN_NANOSECONDS
                    waited = clock() - waiting
                    first, began = first + waited, began + waited
                    admitted, known = journal is None, None
        if counted is not None:
            if calls:
                self._count(counted, calls, clock() - first, slow, latest)
            session.last_command = counted.name
        if burst:
            # A PING need not wait until what others wrote is durable.
            outbox.send_soon(b"".join(burst), database.engine.lsn if shows_data else outbox.observed_lsn)
            burst.clear()

    def _count(
        self, command: Command, calls: int, nanoseconds: int, slow: float, latest: list[bytes]
    ) -> None:
        """Counts calls of one command that came one after the other, the last of them `latest`."""
        self._server.statistics.usage[command.name].record(calls, nanoseconds)
        if not command.varies and nanoseconds > slow * calls:
            self._keep_slow(command, latest, nanoseconds // calls)

    def _keep_slow(self, command: Command, request: list[bytes], nanoseconds: int) -> None:
        if "skip_slowlog" not in command.flags:
            self._server.slowlog.add(self.session, request, nanoseconds)

    def _measure(self, slot: Slot, command: Command, request: list[bytes], slow: float) -> None:
        """Counts a call whose reply comes later, once it is there."""
        began = time.perf_counter_ns()

        def measure() -> None:
            nanoseconds = time.perf_counter_ns() - began
            self._server.statistics.usage[command.name].record(1, nanoseconds)
            if nanoseconds > slow:
                self._server.slowlog.add(self.session, request, nanoseconds)

        slot.measure = measure

    def _end_http(self, request: list[bytes]) -> None:
        """Ends a client that speaks HTTP, perhaps a browser that a hostile page has sent here."""
        word = request[0].decode("ascii")
        logger.warning("client %s sent %s, as in HTTP: perhaps an attack; closed", self.session.address, word)
        self._burst.clear()
        self._scope.cancel()

    def _refuse(self, text: str, command: Command | None, *, rejected: bool) -> bytes:
        """The reply to a request that failed, or was rejected before it was carried out."""
        if rejected and command is not None and command.name == "exec":
            self.session.discard()
            text = f"EXECABORT Transaction discarded because of: {text.removeprefix('ERR ')}"
        elif rejected and (transaction := self.session.transaction) is not None:
            transaction.failed = True
        if command is not None:
            usage = self._server.statistics.usage[command.name]
            if rejected:
                usage.rejected += 1
            else:
                usage.failed += 1
        return self._server.error(text)

    def _release(self, burst: list[bytes]) -> int:
        """Hands on the replies of a burst so far; returns 0, the bytes left in it."""
        if burst:
            self._outbox.send(b"".join(burst), self._database.engine.lsn)
            burst.clear()
        return 0

    async def _pass(self, barrier: Barrier) -> bytes:
        """Waits for the reply that stands behind a barrier."""
        self._passing = True
        try:
            return await barrier.reply()
        except CommandError as error:
            return self._server.error(str(error))
        finally:
            self._passing = False
            self._touch()

    def _silence(self) -> None:
        """Holds a reply back, as CLIENT REPLY asked; SKIP ends after the reply of the next command."""
        self._outbox.observed_lsn = self._database.lsn
        session = self.session
        if session.reply_mode is ReplyMode.SKIP_NEXT:
            session.reply_mode = ReplyMode.SKIP
        elif session.reply_mode is ReplyMode.SKIP:
            session.reply_mode = ReplyMode.ON
