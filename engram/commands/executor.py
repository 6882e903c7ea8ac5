"""Carries out the requests of a client one after the other: as they come, or as EXEC has them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import attrs

from engram.commands.failures import excuse, fail, reject
from engram.commands.guard import Gate, Wait
from engram.commands.meter import Meter
from engram.commands.session import Session
from engram.commands.table import LONGEST_RUN, Command, Handler, Reply, Run, wrong_arity
from engram.errors import CommandError
from engram.protocol.requests import CROSS_PROTOCOL

logger = logging.getLogger(__name__)

# Where calls take little, the clock is looked at once in 64 of them.
_REQUESTS_A_LOOK = 63

_clock = time.perf_counter_ns


@attrs.define(eq=False)
class Batch:
    """Replies that are handed on together.

    Attributes:
        made: how many bytes they take.
        most: from how many bytes on they are handed on.
        shows_data: whether one of them may tell of what clients have stored.
    """

    most: int
    replies: list[bytes] = attrs.field(factory=list)
    made: int = 0
    shows_data: bool = False

    def take(self) -> bytes:
        """The replies, which are in it no more."""
        taken = b"".join(self.replies)
        self.replies.clear()
        self.made = 0
        return taken


class Outlet(Protocol):
    """Takes the replies.

    Attributes:
        batch: takes those that simply follow each other.
        over: whether no more requests are to be carried out.
    """

    batch: Batch

    @property
    def over(self) -> bool: ...

    def hand_on(self, *, turn_over: bool) -> Wait | None:
        """Hands the batch on; returns what has to be waited for before more is carried out."""

    def settle(self, reply: Reply) -> Wait | None:
        """Takes a reply that does not simply follow those before it; returns as `hand_on` does.

        That to a request which was not called has nothing to be waited for.
        """

    def half_done(self, error: Exception) -> None:
        """A call has failed behind its change, which an error reply would deny. May raise the error."""

    def end(self, latest: Command | None) -> None:
        """Hands the batch on, as nothing more is carried out for now; `latest` is what was called last."""


class Executor:
    """Carries out requests of one client, those for the same command that come one after the other at a time.

    There is no checkpoint inside. What differs between requests as they come and those of EXEC is in the gate
    and the outlet.
    """

    __slots__ = (
        "_alone_until",
        "_batch",
        "_count",
        "_database",
        "_gate",
        "_meter",
        "_outlet",
        "_position",
        "_requests",
        "_session",
        "_turn_ends",
    )

    def __init__(self, session: Session, gate: Gate, outlet: Outlet, meter: Meter) -> None:
        self._session = session
        self._database = session.server.database
        self._gate = gate
        self._outlet = outlet
        self._batch = outlet.batch
        self._meter = meter
        self._requests: Sequence[list[bytes]] = ()
        self._count = 0
        # Which of them is the next.
        self._position = 0
        # Up to where it is known that they cannot be carried out together.
        self._alone_until = 0
        self._turn_ends = 0

    @property
    def done(self) -> bool:
        """Whether all requests have been carried out."""
        return self._position >= self._count

    def take(self, requests: Sequence[list[bytes]]) -> None:
        """These are to be carried out, in place of what is left of those before."""
        self._requests, self._count = requests, len(requests)
        self._position = self._alone_until = 0

    def carry_out(self, turn_ends: int) -> Wait | None:
        """Carries out the requests that are left, up to one that has to wait; returns what for.

        `turn_ends` is the time by `time.perf_counter_ns` at which others are to have a turn.

        Raises:
            Exception: a request has failed, and may have changed something.
        """
        session, gate, meter, batch = self._session, self._gate, self._meter, self._batch
        requests, count, spellings = self._requests, self._count, session.table.by_spelling
        self._turn_ends = turn_ends
        wait: Wait | None = None
        while wait is None and (position := self._position) < count:
            request = requests[position]
            # What the next ones for the same command begin with; None when each has to be looked up.
            name: bytes | None = request[0]
            command = spellings.get(request[0])
            if command is None or command.subcommands:
                name = None
                if command is None and request[0].lower() in CROSS_PROTOCOL:
                    return self._end_http(request)
                try:
                    command = session.table.find(request)
                except CommandError as error:
                    wait = self._refuse(None, error, self._database.lsn)
                    continue
            if command is not meter.command:
                meter.turn_to(command)
            if command.shows_data:
                batch.shows_data = True
            handler = gate.begin(command)
            if handler is None:
                wait = self._ask(command, request)
            elif (
                command.run is not None
                and position + 1 < count
                and requests[position + 1][0] == name
                and len(request) == command.minimum
                and position >= self._alone_until
                and handler is command.handler
                and session.flowing
            ):
                wait = self._run(command.run, command.minimum)
            elif command.throttle is not None and gate.throttles:
                wait = self._ask(command, request)
            else:
                wait = self._call(command, handler, request, name)
        if self._position >= count:
            # A client may be silent for long, and requests be large.
            self._requests = ()
        latest = meter.command
        meter.turn_to(None)
        self._outlet.end(latest)
        return wait

    def _end_http(self, request: list[bytes]) -> Wait | None:
        """Ends a client that speaks HTTP, perhaps a browser that a hostile page has sent here."""
        word = request[0].decode("ascii")
        logger.warning(
            "client %s sent %s, as in HTTP: perhaps an attack; closed", self._session.address, word
        )
        self._batch.take()
        self._session.close()
        return None

    def _ask(self, command: Command, request: list[bytes]) -> Wait | None:
        """Carries out the next request, which has to be admitted by itself, or says what it waits for."""
        lsn = self._database.engine.lsn
        try:
            if not command.minimum <= len(request) <= command.maximum:
                raise wrong_arity(command.name)
            answer = self._gate.admit(command, request)
        except Exception as error:
            return self._refuse(command, error, lsn)
        if answer is None:
            return self._call(command, command.handler, request, None)
        if isinstance(answer, bytes):
            self._position += 1
            return self._keep(answer)
        return partial(self._wait, answer, command)

    async def _wait(self, wait: Wait, command: Command) -> None:
        """Waits for the next request, which is looked at afresh then, or is refused."""
        try:
            await wait()
        except CommandError as error:
            self._refuse(command, error, self._database.lsn)
            self._outlet.end(command)

    def _refuse(self, command: Command | None, error: Exception, lsn: int) -> Wait | None:
        """Answers the next request with an error, the state at `lsn` being as it was before."""
        text = self._text(error, lsn)
        self._position += 1
        return self._keep(reject(self._session, command, text))

    def _text(self, error: Exception, lsn: int) -> str:
        """What is answered to a request that failed, the state at `lsn` being as it was before."""
        self._batch.shows_data = True
        if isinstance(error, CommandError):
            return str(error)
        if self._database.failure is not None:
            raise error
        if self._database.lsn != lsn:
            self._outlet.half_done(error)
        return excuse(error, self._session)

    def _run(self, run_together: Run, size: int) -> Wait | None:
        """Carries out together what can be of the next requests of `size` words, perhaps none."""
        database, meter, batch, position = self._database, self._meter, self._batch, self._position
        run = _alike(self._requests, position, size)
        lsn = database.engine.lsn
        done, replies = 0, b""
        if len(run) > 1:
            try:
                done, replies = run_together(self._session, run)
            except Exception:
                if database.failure is not None or database.lsn != lsn:
                    raise
                # Each by itself learns why.
        if done < len(run):
            self._alone_until = position + len(run)
        if not done:
            return None
        self._position = position = position + done
        meter.calls += done
        meter.latest = run[done - 1]
        turn_over = False
        if meter.timed:
            turn_over = meter.lap() > self._turn_ends
        elif done > _REQUESTS_A_LOOK or not position & _REQUESTS_A_LOOK:
            turn_over = _clock() > self._turn_ends
        batch.replies.append(replies)
        batch.made += len(replies)
        if turn_over or batch.made >= batch.most:
            return self._outlet.hand_on(turn_over=turn_over)
        return None

    def _call(
        self, command: Command, handler: Handler, request: list[bytes], name: bytes | None
    ) -> Wait | None:
        """Carries out the next request, and those behind it that begin with the same name.

        It stops where more than that has to be looked at.
        """
        session, meter, batch, outlet = self._session, self._meter, self._batch, self._outlet
        engine = self._database.engine
        position = self._position
        wait: Wait | None = None
        turn_over = False
        while True:
            position += 1
            lsn = engine.lsn
            if len(request) == command.arity or command.minimum <= len(request) <= command.maximum:
                meter.calls += 1
                meter.latest = request
                try:
                    reply = handler(session, request)
                except Exception as error:
                    reply = fail(session, command, self._text(error, lsn))
                if meter.timed:
                    turn_over = meter.lap() > self._turn_ends
                elif not position & _REQUESTS_A_LOOK:
                    turn_over = _clock() > self._turn_ends
            else:
                batch.shows_data = True
                reply = reject(session, command, str(wrong_arity(command.name)))
                turn_over = not position & _REQUESTS_A_LOOK and _clock() > self._turn_ends
            if type(reply) is bytes and session.flowing:
                batch.replies.append(reply)
                batch.made += len(reply)
            elif (wait := outlet.settle(reply)) is not None:
                break
            elif outlet.over:
                position = self._count
                break
            if turn_over or batch.made >= batch.most:
                wait = outlet.hand_on(turn_over=turn_over)
                break
            if position == self._count or (request := self._requests[position])[0] != name:
                break
        self._position = position
        return wait

    def _keep(self, reply: bytes) -> Wait | None:
        """Takes the reply to a request that was not called."""
        batch = self._batch
        if self._session.flowing:
            batch.replies.append(reply)
            batch.made += len(reply)
        else:
            self._outlet.settle(reply)
        # To find that it is not to be called, or that it is to be queued, may have taken long.
        turn_over = _clock() > self._turn_ends
        if turn_over or batch.made >= batch.most:
            return self._outlet.hand_on(turn_over=turn_over)
        return None


def _alike(requests: Sequence[list[bytes]], start: int, size: int) -> Sequence[list[bytes]]:
    """The requests from `start` on that have the name of the one there, and `size` words as it does.

    Those of a long run are left for another one.
    """
    name, longest = requests[start][0], len(requests)
    if longest - start > LONGEST_RUN:
        longest = start + LONGEST_RUN
    for end in range(start + 1, longest):
        request = requests[end]
        if len(request) != size or request[0] != name:
            return requests[start:end]
    return requests[start:longest]
