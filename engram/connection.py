"""One client: requests in, replies out in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

import trio

from engram.commands.failures import excuse
from engram.commands.guard import admit, check, check_rights
from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Barrier, Pieces, Server, Session, Slot
from engram.commands.states import Event, ReplyMode
from engram.commands.table import (
    LONGEST_RUN,
    TURN_NANOSECONDS,
    Command,
    Handler,
    Reply,
    check_arity,
    log_room,
    unknown_command,
)
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.outbox import Outbox
from engram.protocol.requests import CROSS_PROTOCOL, RequestParser
from engram.transport import Transport

logger = logging.getLogger(__name__)

# Replies are handed on when a burst of requests has made this many bytes of them.
_BURST_BYTES = 128 << 10

# Where calls take little, the clock is looked at once in 64 of them.
_REQUESTS_A_LOOK = 63

# What has to be waited for before the next request.
Obstacle = Callable[[], Awaitable[None]]


def _no_handler(session: Session, request: list[bytes]) -> Reply:
    raise AssertionError("no command is known yet")


class Connection:
    """Serves one client over a transport, until it leaves or is told to.

    Commands run one after the other, without a checkpoint inside one but for those that answer with a
    `Barrier`. What a client may make the server hold is bounded: see `Outbox`.

    What arrives is carried out by plain calls, from wherever the transport makes them. The client's own task
    sleeps until there is something to wait for.
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
        # The requests that came together, which of them is the next, and what their writes may take in the
        # log.
        self._requests: list[list[bytes]] = []
        self._position = 0
        # Up to where it is known that what is left cannot be carried out together.
        self._looked_at = 0
        self._room = 0
        # Whether the next one has waited for all that it had to.
        self._cleared = False
        self._obstacle: Obstacle | None = None
        # No more is read.
        self._finished = False
        self._authenticated = True
        # Replies of the requests that are carried out, not handed on yet.
        self._burst: list[bytes] = []
        self._outbox = Outbox(
            transport,
            server,
            address,
            start_writer=self._start_writer,
            abort=self._scope.cancel,
            written=self._touch,
        )
        # Whether an obstacle is being waited for.
        self._held = False
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
            close=self._close,
            buffered=lambda: (self._parser.buffered, self._outbox.size),
            observed=lambda: self._database.lsn if self._burst else self._outbox.observed_lsn,
            push=self._push,
            hurry=self._outbox.hurry,
            awaiting=lambda: self._held or self._outbox.awaiting,
        )
        # From here on whatever changes what clients may do reaches this one.
        server.sessions[self.session.id] = self.session

    async def serve(self) -> None:
        """Answers requests until the client leaves, is killed, or `finish` is called."""
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
            self.session.discard()
            # Whoever no longer sees the client in CLIENT LIST may rely on its socket being closed.
            self._server.sessions.pop(self.session.id, None)

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

    def _close(self) -> None:
        """Ends the client: nobody sees it any more, and it is sent nothing more."""
        self._finished = True
        self.session.happen(Event.CLOSE)
        self._server.sessions.pop(self.session.id, None)
        self._transport.hang_up()
        self._outbox.discard()
        self._scope.cancel()

    async def _answer_requests(self) -> None:
        while not self._finished:
            await self._transport.deliver(self._take)
            while (obstacle := self._obstacle) is not None:
                self._obstacle = None
                self._held = True
                try:
                    await obstacle()
                    # Who was ended in the same moment changes nothing any more.
                    await trio.lowlevel.checkpoint_if_cancelled()
                except Exception:
                    self._give_up()
                finally:
                    self._held = False
                    self._touch()
                if not self._finished:
                    self._carry_on()

    def _take(self, data: bytes) -> bool:
        """Carries out what has arrived; returns whether more can be."""
        if self._finished or not data:
            self._finished = True
            return False
        self._touch()
        self._server.statistics.net_input_bytes += len(data)
        try:
            self._parse(data)
        except Exception:
            # Where in the stream the next request begins is not known any more.
            self._give_up()
            return False
        return self._carry_on()

    def _parse(self, data: bytes) -> None:
        session, parser = self.session, self._parser
        if session.authenticated is not self._authenticated:
            self._authenticated = parser.authenticated = self._outbox.authenticated = session.authenticated
        held = 0 if self._database.journal is None else parser.buffered
        requests = self._requests = parser.feed(data)
        self._position = self._looked_at = 0
        # Surely enough for what they write and for the end of each lapsed key they may name; where the log
        # has less, the need of each is looked at.
        self._room = 8 * (held + len(data)) + RECORD_OVERHEAD * len(requests)

    def _carry_on(self) -> bool:
        """Carries out the requests that are left; returns whether more can be read, and nothing waits."""
        try:
            obstacle = None if self.session.closing else self._execute()
        except Exception:
            self._give_up()
            return False
        finally:
            self._database.covered = False
        parser, outbox = self._parser, self._outbox
        if obstacle is not None:
            self._obstacle = obstacle
        elif self.session.closing:
            self._finished = True
        elif parser.suspended:
            self._obstacle = self._read_on
        elif parser.error is not None:
            outbox.send(self._server.error(f"ERR {parser.error}"), self._database.lsn)
            self._finished = True
        elif outbox.congested:
            self._obstacle = outbox.relieved
        return self._obstacle is None and not self._finished

    def _give_up(self) -> None:
        """Ends this client alone for the error at hand; it still learns what was done before."""
        self._finished = True
        # There may be no memory for either.
        with suppress(MemoryError):
            logger.exception("client %s ended by an error", self.session.address)
        with suppress(MemoryError):
            self._release(self._burst)

    def _excuse(self, error: Exception, command: Command | None, lsn: int, *, rejected: bool) -> bytes:
        """The reply to a request that failed by an error of ours, the state at `lsn` being as it was before.

        Raises:
            Exception: the error, if the request has changed something: an error reply would deny that.
        """
        if self._database.failure is not None or self._database.lsn != lsn:
            raise error
        return self._refuse(excuse(error, self.session), command, rejected=rejected)

    async def _read_on(self) -> None:
        """Has the parser go on with what it was given."""
        await self._make_way()
        self._parse(b"")

    async def _make_way(self) -> None:
        """Lets others go on, and waits until replies have gone."""
        await trio.lowlevel.checkpoint()
        await self._outbox.relieved()

    def _execute(self) -> Obstacle | None:
        """Carries out the requests that are left, up to one that has to wait; returns what for."""
        session, database, outbox, server = self.session, self._database, self._outbox, self._server
        journal, engine = database.journal, database.engine
        # One look at the log for the whole burst; only without room is each write looked at alone.
        admitted = journal is None or journal.has_room(self._room)
        obstacle: Obstacle | None = None
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
        turn_over, turn_ends = False, began + TURN_NANOSECONDS
        # The command for which the following holds, until it changes by another one or by another client.
        known: Command | None = None
        handler: Handler = _no_handler
        arity = 0
        special = timed = False
        latest: list[bytes] = []
        requests, position = self._requests, self._position
        count = len(requests)
        while position < count:
            request = requests[position]
            position += 1
            reply: Reply | None = None
            command = None
            lsn = engine.lsn
            try:
                found = spellings.get(request[0])
                if found is not None and found is known:
                    command = found
                else:
                    command = self._resolve(found, request)
                    if command is None:
                        return None
                    if command is not counted:
                        began = clock()
                        if calls and counted is not None:
                            self._count(counted, calls, began - first, slow, latest)
                        calls, first, counted = 0, began, command
                    known, handler, arity, timed = command, command.handler, command.arity, command.varies
                    shows_data = shows_data or command.shows_data
                    if command.logs_beyond:
                        # More than was looked at for the burst.
                        admitted = journal is None
                    special = session.guarded or server.guarded
                    special = special or (command.writes and (not admitted or command.throttle is not None))
                    database.covered = admitted or command.writes
                    if self._cleared:
                        self._cleared, special, known = False, False, None
                    elif (
                        position < count
                        and command.run is not None
                        and requests[position][0] == request[0]
                        and position > self._looked_at
                        and not (special or not session.flowing)
                    ):
                        run = _run(requests, position - 1, command)
                        if len(run) > 1:
                            done, replies = command.run(session, run)
                            if done:
                                reply = replies
                                position += done - 1
                                calls += done
                                latest = run[done - 1]
                                if done > _REQUESTS_A_LOOK:
                                    turn_over = clock() > turn_ends
                            if done == len(run):
                                # Another run may follow.
                                known = None
                            else:
                                self._looked_at = position + len(run) - max(done, 1)
                if len(request) != arity:
                    check_arity(command, request)
                if special:
                    known = None
                    if session.guarded or server.guarded:
                        check(session, command, request)
                        if server.pause.holds(writes := session.would_write(command)):
                            obstacle = partial(self._wait_for_pause, writes)
                            break
                        if server.exclusion.active and command.shows_data:
                            obstacle = self._wait_for_exclusion
                            break
                        reply = admit(session, command, request)
                        # Room in the log may go to what is evicted, or to a transaction.
                        admitted = journal is None
                    if reply is None and (obstacle := self._obstacle_to(command, request, admitted)):
                        break
            except CommandError as error:
                shows_data = True
                reply = self._refuse(str(error), command, rejected=True)
            except Exception as error:
                shows_data = True
                reply = self._excuse(error, command, lsn, rejected=True)
            if reply is None:
                calls += 1
                latest = request
                try:
                    reply = handler(session, request)
                except CommandError as error:
                    shows_data = True
                    reply = self._refuse(str(error), command, rejected=False)
                except Exception as error:
                    shows_data = True
                    reply = self._excuse(error, command, lsn, rejected=False)
            if timed:
                ended = clock()
                if ended - began > slow and latest is request and command is not None:
                    self._keep_slow(command, request, ended - began)
                began = ended
                turn_over = ended > turn_ends
            elif not position & _REQUESTS_A_LOOK:
                turn_over = clock() > turn_ends
            if type(reply) is bytes and session.flowing:
                burst.append(reply)
                burst_bytes += len(reply)
                if burst_bytes < _BURST_BYTES and not turn_over:
                    continue
            else:
                if isinstance(reply, Barrier):
                    # It is counted with the time until its reply is known.
                    calls -= 1
                    obstacle = partial(self._pass, reply, command)
                    break
                if isinstance(reply, Slot) and command is not None:
                    calls -= 1
                    self._measure(reply, command, request, slow)
                if session.reply_mode is not ReplyMode.ON:
                    if isinstance(reply, Slot):
                        reply.awaited = False
                    self._silence()
                elif isinstance(reply, bytes):
                    burst.append(reply)
                else:
                    self._release(burst)
                    if isinstance(reply, Pieces):
                        outbox.send(reply, database.lsn)
                    else:
                        outbox.expect(reply, database.lsn)
                    burst_bytes = _BURST_BYTES
                if session.closing:
                    break
            if burst_bytes >= _BURST_BYTES or turn_over:
                burst_bytes = self._release(burst)
                if outbox.congested or turn_over:
                    obstacle = self._make_way
                    break
        self._position = position
        if counted is not None:
            if calls:
                self._count(counted, calls, clock() - first, slow, latest)
            session.last_command = counted.name
        if burst:
            # A PING need not wait until what others wrote is durable.
            outbox.send_soon(b"".join(burst), database.engine.lsn if shows_data else outbox.observed_lsn)
            burst.clear()
        return obstacle

    def _resolve(self, found: Command | None, request: list[bytes]) -> Command | None:
        """The command, or subcommand, that a request is for; None when it has ended the client.

        `found` is what the usual spellings of names know. Raises CommandError when there is no such command.
        """
        if found is None:
            name = request[0].lower()
            if name in CROSS_PROTOCOL:
                self._end_http(request)
                return None
            found = COMMANDS.get(name)
            if found is None:
                raise unknown_command(request)
        return found.resolve(request)

    def _obstacle_to(self, command: Command, request: list[bytes], admitted: bool) -> Obstacle | None:
        """What a request has to wait for that nothing else forbids; None when it may be carried out now."""
        if not command.writes:
            return None
        adds = None if command.throttle is None else command.throttle(self.session, request)
        wait = None if adds is None else self._server.builder.admit(*adds)
        journal = self._database.journal
        if wait is None and (admitted or journal is None or journal.has_room(log_room(command, request))):
            return None
        return partial(self._clear, command, request, wait)

    async def _wait_for_pause(self, writes: bool) -> None:
        """Waits until a pause is over that holds the next request, which is looked at afresh then."""
        self.session.happen(Event.PAUSE)
        try:
            await self._server.pause.wait(writes)
        finally:
            self.session.happen(Event.RESUME)
        self._position -= 1

    async def _wait_for_exclusion(self) -> None:
        """Waits until another client's EXEC is over, for the next request, which is looked at afresh then."""
        await self._server.exclusion.wait()
        self._position -= 1

    async def _clear(self, command: Command, request: list[bytes], wait: Obstacle | None) -> None:
        """Waits until a write may be carried out: for the builder, and as long as the log has no room."""
        try:
            if wait is not None:
                await wait()
            await self._server.admit(log_room(command, request))
            # Its user may have changed meanwhile.
            check_rights(self.session, command, request)
        except CommandError as error:
            self._answer(self._refuse(str(error), command, rejected=True))
        else:
            self._position -= 1
            self._cleared = True

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
        self._close()

    def _refuse(self, text: str, command: Command | None, *, rejected: bool) -> bytes:
        """The reply to a request that failed, or was rejected before it was carried out."""
        if rejected and command is not None and command.name == "exec":
            self.session.discard()
            text = f"EXECABORT Transaction discarded because of: {text.removeprefix('ERR ')}"
        elif rejected:
            self.session.refuse()
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

    async def _pass(self, barrier: Barrier, command: Command | None) -> None:
        """Waits for the reply that stands behind a barrier, and hands it on."""
        began = time.perf_counter_ns()
        reply: bytes | Pieces
        try:
            reply = await barrier.reply()
        except CommandError as error:
            reply = self._refuse(str(error), command, rejected=False)
        except Exception as error:
            # Others may have changed something meanwhile, too.
            if command is None or command.writes or command.name == "exec":
                raise
            reply = self._excuse(error, command, self._database.lsn, rejected=False)
        if command is not None:
            self._server.statistics.usage[command.name].record(1, time.perf_counter_ns() - began)
        self._answer(reply)

    def _answer(self, reply: bytes | Pieces) -> None:
        """Hands on the reply of a request that has waited."""
        if self.session.reply_mode is ReplyMode.ON:
            self._outbox.send(reply, self._database.lsn)
        else:
            self._silence()

    def _silence(self) -> None:
        """Holds a reply back, as CLIENT REPLY asked; SKIP ends after the reply of the next command."""
        self._outbox.observed_lsn = self._database.lsn
        if self.session.reply_mode is not ReplyMode.OFF:
            self.session.happen(Event.WITHHOLD)


def _run(requests: Sequence[list[bytes]], start: int, command: Command) -> Sequence[list[bytes]]:
    """The requests from `start` on that are as the one there: of that name and no options.

    Those of a long run are left for another one.
    """
    first = requests[start]
    name, size = first[0], command.minimum
    if len(first) != size:
        return ()
    longest = len(requests)
    if longest - start > LONGEST_RUN:
        longest = start + LONGEST_RUN
    for end in range(start + 1, longest):
        request = requests[end]
        if len(request) != size or request[0] != name:
            return requests[start:end]
    return requests[start:longest]
