"""The replies to a client's requests on their way to its outbox."""

from __future__ import annotations

import time
from functools import partial
from typing import Protocol

import trio

from engram.commands.executor import Batch
from engram.commands.failures import excuse, fail
from engram.commands.guard import Wait
from engram.commands.meter import Meter
from engram.commands.session import Barrier, Pieces, Session, Slot, Turns
from engram.commands.states import Event, ReplyMode
from engram.commands.table import Command, Reply
from engram.errors import CommandError

# Replies are handed on when a burst of requests has made this many bytes of them.
_BURST_BYTES = 128 << 10


class Outbox(Protocol):
    """What sends replies, in order: see `engram.outbox`."""

    # The last LSN that replies so far show.
    observed_lsn: int

    @property
    def congested(self) -> bool: ...

    async def relieved(self) -> None: ...

    def send(self, reply: bytes | Pieces, lsn: int) -> None: ...

    def send_soon(self, reply: bytes, lsn: int) -> None: ...

    def expect(self, slot: Slot, lsn: int) -> None: ...


class Delivery:
    """Hands the replies of a burst of requests on together, with the state that they show.

    CLIENT REPLY is obeyed here, and here it is that a `Barrier` is waited for.
    """

    __slots__ = ("_database", "_meter", "_outbox", "_session", "batch")

    def __init__(self, session: Session, outbox: Outbox, meter: Meter) -> None:
        self.batch = Batch(_BURST_BYTES)
        self._session = session
        self._database = session.server.database
        self._outbox = outbox
        self._meter = meter

    @property
    def over(self) -> bool:
        return self._session.closing

    @property
    def observed_lsn(self) -> int:
        """The last LSN that a reply shows, in the batch or handed on."""
        return self._database.lsn if self.batch.replies else self._outbox.observed_lsn

    def hand_on(self, *, turn_over: bool) -> Wait | None:
        self.release()
        return self.make_way if turn_over or self._outbox.congested else None

    def settle(self, reply: Reply) -> Wait | None:
        if isinstance(reply, Barrier):
            # It is counted with the time until its reply is known.
            self._meter.calls -= 1
            assert self._meter.command is not None
            return partial(self._pass, reply, self._meter.command)
        assert not isinstance(reply, Turns)
        if isinstance(reply, Slot):
            self._meter.put_off(reply)
        if self._session.reply_mode is not ReplyMode.ON:
            if isinstance(reply, Slot):
                reply.awaited = False
            self._withhold()
            return None
        if isinstance(reply, bytes):
            self.batch.replies.append(reply)
            return None
        self.release()
        if isinstance(reply, Pieces):
            self._outbox.send(reply, self._database.lsn)
        else:
            self._outbox.expect(reply, self._database.lsn)
        return self.make_way if self._outbox.congested else None

    def half_done(self, error: Exception) -> None:
        raise error

    def end(self, latest: Command | None) -> None:
        if latest is not None:
            self._session.last_command = latest.name
        batch, outbox = self.batch, self._outbox
        if batch.replies:
            # A PING need not wait until what others wrote is durable.
            lsn = self._database.engine.lsn if batch.shows_data else outbox.observed_lsn
            outbox.send_soon(b"".join(batch.replies), lsn)
            batch.replies.clear()
            batch.made = 0
        batch.shows_data = False

    def release(self) -> None:
        """Hands the batch on."""
        if self.batch.replies:
            self._outbox.send(self.batch.take(), self._database.engine.lsn)

    def push(self, data: bytes) -> None:
        """Sends what is no reply, after the replies so far."""
        if self.batch.replies:
            self.batch.replies.append(data)
        else:
            self._outbox.send(data, self._outbox.observed_lsn)

    async def make_way(self) -> None:
        """Lets others go on, and waits until replies have gone."""
        await trio.lowlevel.checkpoint()
        await self._outbox.relieved()

    async def _pass(self, barrier: Barrier, command: Command) -> None:
        """Waits for the reply that stands behind a barrier, and hands it on."""
        began = time.perf_counter_ns()
        reply: bytes | Pieces
        try:
            reply = await barrier.reply()
        except CommandError as error:
            reply = fail(self._session, command, str(error))
        except Exception as error:
            # Others may have changed something meanwhile, too.
            if command.writes or command.name == "exec" or self._database.failure is not None:
                raise
            reply = fail(self._session, command, excuse(error, self._session))
        self._meter.record(command, time.perf_counter_ns() - began)
        if self._session.reply_mode is ReplyMode.ON:
            self._outbox.send(reply, self._database.lsn)
        else:
            self._withhold()

    def _withhold(self) -> None:
        """Holds a reply back, as CLIENT REPLY asked; SKIP ends after the reply of the next command."""
        self._outbox.observed_lsn = self._database.lsn
        if self._session.reply_mode is not ReplyMode.OFF:
            self._session.happen(Event.WITHHOLD)
