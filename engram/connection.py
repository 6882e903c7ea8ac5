"""One client: requests in, replies out in order."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

import trio

from engram.commands.delivery import Delivery
from engram.commands.executor import Executor
from engram.commands.guard import Guard, Wait
from engram.commands.meter import Meter
from engram.commands.registry import TABLE
from engram.commands.session import Server, Session
from engram.commands.states import Event
from engram.commands.table import TURN_NANOSECONDS
from engram.database import RECORD_OVERHEAD
from engram.outbox import Outbox
from engram.protocol.requests import RequestParser
from engram.transport import Transport

logger = logging.getLogger(__name__)

_clock = time.perf_counter_ns


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
        # What has to be waited for before the next request.
        self._obstacle: Wait | None = None
        # No more is read.
        self._finished = False
        self._authenticated = True
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
            database=server.database.logical(0),
            table=TABLE,
            address=address,
            local_address=local_address,
            descriptor=descriptor,
            created=now,
            last_active=now,
            close=self._close,
            buffered=lambda: (self._parser.buffered, self._outbox.size),
            observed=lambda: self._delivery.observed_lsn,
            push=lambda data: self._delivery.push(data),
            hurry=self._outbox.hurry,
            awaiting=lambda: self._held or self._outbox.awaiting,
        )
        meter = Meter(self.session)
        self._guard = Guard(self.session)
        self._delivery = Delivery(self.session, self._outbox, meter)
        self._executor = Executor(self.session, self._guard, self._delivery, meter)
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
            # What refers to itself only the garbage collector would free: see `engram.collector`.
            self._nursery = self._obstacle = None
            self.session.part()

    def _touch(self) -> None:
        self.session.last_active = time.monotonic()

    def finish(self) -> None:
        """Takes no more requests, and leaves once the replies so far are sent."""
        self._reading.cancel()

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
        self.session.last_active = time.monotonic()
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
            session.follow()
            if self._finished:
                # Its user is gone.
                return
            self._authenticated = parser.authenticated = self._outbox.authenticated = session.authenticated
        held = 0 if self._database.journal is None else parser.buffered
        requests = parser.feed(data)
        self._executor.take(requests)
        # Surely enough for what they write and for the end of each lapsed key they may name; where the log
        # has less, the need of each is looked at.
        self._guard.room = 8 * (held + len(data)) + RECORD_OVERHEAD * len(requests)

    def _carry_on(self) -> bool:
        """Carries out the requests that are left; returns whether more can be read, and nothing waits."""
        session = self.session
        # The log may have been used since it was looked at.
        self._guard.admitted = None
        try:
            obstacle = None if session.closing else self._executor.carry_out(_clock() + TURN_NANOSECONDS)
        except Exception:
            self._give_up()
            return False
        finally:
            self._database.covered = False
        parser, outbox = self._parser, self._outbox
        if obstacle is not None:
            self._obstacle = obstacle
        elif session.closing:
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
            self._delivery.release()

    async def _read_on(self) -> None:
        """Has the parser go on with what it was given."""
        await self._delivery.make_way()
        self._parse(b"")
