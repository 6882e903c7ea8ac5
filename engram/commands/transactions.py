"""MULTI, EXEC, DISCARD, WATCH and UNWATCH: https://redis.io/docs/latest/develop/interact/transactions/."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice

import trio

from engram.commands.allowance import SMALL_REPLY, Allowance
from engram.commands.executor import Batch, Executor
from engram.commands.failures import excuse
from engram.commands.guard import Gate, Wait, show
from engram.commands.limits import check_reply
from engram.commands.long_work import alone
from engram.commands.meter import Meter
from engram.commands.session import Barrier, Bytes, Pieces, Queued, Session, Slot, Transaction, Turns
from engram.commands.states import Queueing
from engram.commands.table import LONGEST_RUN, TURN_NANOSECONDS, Command, Handler, Reply
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.index.vector_index import VectorIndex
from engram.permissions import Reason
from engram.protocol import replies
from engram.protocol.replies import OK

# Keys that are watched, and requests that EXEC looks at beforehand, until others have a turn.
_KEYS_A_TURN = 512
_FORESEEN_A_TURN = 512

_ANSWER_VALUES = frozenset({"getdel", "getex", "getset"})

_ABORTED = "EXECABORT Transaction discarded because of previous errors."


def _multi(session: Session, arguments: list[bytes]) -> bytes:
    if session.transaction is not None:
        raise CommandError("ERR MULTI calls can not be nested")
    session.begin()
    return OK


def _discard(session: Session, arguments: list[bytes]) -> bytes:
    if session.transaction is None:
        raise CommandError("ERR DISCARD without MULTI")
    session.discard()
    return OK


def _watch(session: Session, arguments: list[bytes]) -> Reply:
    if session.transaction is not None:
        raise CommandError("ERR WATCH inside MULTI is not allowed")
    if len(arguments) <= _KEYS_A_TURN:
        _watch_keys(session, arguments[1:])
        return OK

    async def watch() -> bytes:
        for start in range(1, len(arguments), _KEYS_A_TURN):
            _watch_keys(session, arguments[start : start + _KEYS_A_TURN])
            await trio.lowlevel.checkpoint()
            await session.server.exclusion.wait()
        return OK

    return Barrier(watch)


def _watch_keys(session: Session, keys: Sequence[bytes]) -> None:
    for key in keys:
        # One that has lapsed goes first, or its end would look like a change.
        session.database.lookup(key)
    session.server.database.watches.add(session.watch, session.database.number, keys)


def _unwatch(session: Session, arguments: list[bytes]) -> bytes:
    session.unwatch()
    return OK


def _exec(session: Session, arguments: list[bytes]) -> Reply:
    transaction = session.transaction
    if transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    if session.state.queueing is Queueing.FAILED:
        session.discard()
        raise CommandError(_ABORTED)

    name = arguments[0]
    room = transaction.room + RECORD_OVERHEAD if transaction.writes else 0
    journal = session.database.journal
    foresight = _Foresight(session)
    foreseen = transaction.foreseen
    foresight.look_at(foreseen[:_FORESEEN_A_TURN])
    later = range(_FORESEEN_A_TURN, len(foreseen), _FORESEEN_A_TURN)
    waits = [] if later else foresight.waits()
    if not (waits or later) and (not room or journal is None or journal.has_room(room)):
        return _execute(session, transaction, name)

    async def execute() -> bytes | Pieces:
        try:
            for start in later:
                await trio.lowlevel.checkpoint()
                foresight.look_at(foreseen[start : start + _FORESEEN_A_TURN])
            for wait in foresight.waits() if later else waits:
                await wait()
            await session.server.admit(room, writes=transaction.writes)
            # A client whose user has gone meanwhile is ended.
            session.follow()
            await trio.lowlevel.checkpoint_if_cancelled()
        except CommandError as error:
            session.discard()
            raise CommandError(f"EXECABORT Transaction discarded because of: {error}") from error
        reply = _execute(session, transaction, name)
        return await reply.reply() if isinstance(reply, Barrier) else reply

    return Barrier(execute)


class _Foresight:
    """What a transaction will bring to indices where many rows have no graph.

    Each request is looked at in the database that it will be about.
    """

    __slots__ = ("_database", "_rows", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._database = session.database
        self._rows: dict[VectorIndex, int] = {}

    def look_at(self, requests: Iterable[Queued]) -> None:
        """Adds what the next requests bring; their client does not notice."""
        session = self._session
        selected, session.database = session.database, self._database
        try:
            for command, request in requests:
                # What fails brings nothing and selects nothing, and is answered in its place.
                with suppress(CommandError):
                    self._look_at(command, request)
        finally:
            self._database, session.database = session.database, selected

    def _look_at(self, command: Command, request: list[bytes]) -> None:
        if command.throttle is None:
            # SELECT.
            command.handler(self._session, request)
        elif (adds := command.throttle(self._session, request)) is not None:
            index, rows = adds
            self._rows[index] = self._rows.get(index, 0) + rows

    def waits(self) -> list[Wait]:
        """What to wait for where the builder cannot keep up."""
        builder = self._session.server.builder
        admitted = [builder.admit(index, count) for index, count in self._rows.items()]
        return [wait for wait in admitted if wait is not None]


def _execute(session: Session, transaction: Transaction, name: bytes) -> bytes | Pieces | Barrier:
    """Carries everything out; what takes longer than a turn, or is found later, is behind the barrier.

    `name` is EXEC as the client has written it.
    """
    watch, monitors = session.watch, session.server.monitors
    broken = watch.broken or (watch.lapses_at is not None and watch.lapses_at <= session.database.now())
    count = len(transaction.commands)
    queued: deque[list[bytes]] = deque()
    if not broken:
        queued, transaction.commands = transaction.commands, queued
    session.discard()
    held_replies = session.server.held_replies
    allowance = held_replies.allowance(session, most=held_replies.longest)
    execution = _Execution(session, queued, allowance, transaction)

    def answer() -> bytes | Pieces | Barrier:
        if monitors:
            monitors.feed(session, [name])
        if execution.failure is not None:
            raise execution.failure
        return session.encoder.null_array if broken else _answer(session, count, execution.found, allowance)

    return alone(session.server, execution.turns(), answer)


def _answer(
    session: Session, count: int, found: Sequence[Reply], allowance: Allowance
) -> bytes | Pieces | Barrier:
    """The reply of an EXEC of `count` commands; `found` has theirs, several in one where they are known.

    What they take of the allowance is held until it is handed on.
    """
    header = replies.array_header(count)
    known = [reply for reply in found if isinstance(reply, bytes | Pieces)]
    if len(known) == len(found):
        allowance.release()
        return _joined((header, *known))
    allowance.hold()

    async def wait() -> bytes | Pieces:
        try:
            return _joined((header, *[await _result(session, reply) for reply in found]))
        finally:
            allowance.release()
            for reply in found:
                if isinstance(reply, Slot):
                    reply.awaited = False

    return Barrier(wait)


class _Execution(Gate):
    """What was queued, being carried out and taken away; the gate and the outlet of EXEC's executor.

    Rights are checked again where they have changed. Once the replies take too much, commands may only write;
    those that write what they also answer are refused as those that only read.

    Attributes:
        found: the replies so far, those that are known already joined.
        failure: an error of ours in a command behind its change: no reply may deny that, and what follows it
            in the transaction belongs to it.
    """

    __slots__ = (
        "_allowance",
        "_monitored",
        "_queued",
        "_rules",
        "_session",
        "_under_way",
        "_writes",
        "batch",
        "failure",
        "found",
        "over",
    )

    def __init__(
        self, session: Session, queued: deque[list[bytes]], allowance: Allowance, transaction: Transaction
    ) -> None:
        self.found: list[Reply] = []
        self.failure: Exception | None = None
        # Its bytes are not taken of the allowance yet, which is exceeded by `most` of them.
        self.batch = Batch(allowance.left + 1)
        # What has been begun is finished, whatever becomes of the client.
        self.over = False
        self._monitored = False
        # The command that takes further turns.
        self._under_way: Turns | None = None
        self._session = session
        self._queued = queued
        self._writes = transaction.writes
        # By which all has been allowed when it was queued.
        self._rules = transaction.rules
        self._allowance = allowance

    def turns(self) -> Iterator[bool]:
        """Carries everything out; yields True after each turn but the last.

        What is changed in all of them is one change.
        """
        session, database = self._session, self._session.server.database
        executor = Executor(session, self, self, Meter(session, each=True))
        session.execute(self._allowance)
        try:
            with database.together():
                while self._has_more(executor):
                    database.covered = self._writes
                    self._take_turn(executor)
                    database.covered = False
                    if self._has_more(executor):
                        self._allowance.hold()
                        yield True
        finally:
            session.finish()
            database.covered = False

    def _has_more(self, executor: Executor) -> bool:
        return bool(self._queued or self._under_way is not None or not executor.done)

    def _take_turn(self, executor: Executor) -> None:
        """Carries out what takes a turn."""
        if self._under_way is not None:
            self._go_on(self._under_way)
            return
        queued = self._queued
        self._monitored = bool(self._session.server.monitors)
        turn_ends = time.perf_counter_ns() + TURN_NANOSECONDS
        wait: Wait | None = None
        while wait is None and (queued or not executor.done):
            if executor.done:
                executor.take([queued.popleft() for _ in range(min(len(queued), LONGEST_RUN))])
            wait = executor.carry_out(turn_ends)

    def _go_on(self, under_way: Turns) -> None:
        """Takes one more turn of a command that takes several."""
        try:
            for _ in islice(under_way.turns, 1):
                return
            reply: Reply = under_way.answer()
        except Exception as error:
            if self._session.server.database.failure is not None:
                raise
            text = str(error) if isinstance(error, CommandError) else excuse(error, self._session)
            reply = self._session.server.error(text)
        self._under_way = None
        self.settle(reply)

    def begin(self, command: Command) -> Handler:
        self._take_allowance()
        # Nobody can begin to monitor within a turn.
        if self._allowed and self.batch.most > 0 and not self._monitored:
            return command.handler
        return partial(self._check_and_call, command)

    @property
    def _allowed(self) -> bool:
        """Whether the user may do all that was queued."""
        user = self._session.user
        return user.unrestricted or user.rules is self._rules

    def _check_and_call(self, command: Command, session: Session, request: list[bytes]) -> Reply:
        self._take_allowance()
        if self._monitored:
            show(session, command, request)
        if not self._allowed:
            _check_again(session, command, request)
        if self.batch.most <= 0 and (not command.writes or _answers_values(command, request)):
            check_reply(session, self._allowance.used)
        return command.handler(session, request)

    def _take_allowance(self) -> None:
        """Takes of the allowance what has been made. `most` is 0 or less once it is exceeded."""
        allowance, batch = self._allowance, self.batch
        allowance.made += batch.made
        batch.made, batch.most = 0, allowance.left + 1

    def hand_on(self, *, turn_over: bool) -> Wait | None:
        self._take_allowance()
        return trio.lowlevel.checkpoint if turn_over else None

    def settle(self, reply: Reply) -> Wait | None:
        self._take_allowance()
        if isinstance(reply, Turns):
            self.found.append(self.batch.take())
            self._under_way = reply
            return trio.lowlevel.checkpoint
        self.found += (self.batch.take(), reply)
        if isinstance(reply, bytes | Pieces):
            self.batch.made = reply.size if isinstance(reply, Pieces) else len(reply)
        return None

    def half_done(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error

    def end(self, latest: Command | None) -> None:
        self._take_allowance()
        if self.batch.replies:
            self.found.append(self.batch.take())


def _answers_values(command: Command, request: Sequence[bytes]) -> bool:
    """Whether a write may answer a string that somebody has stored."""
    return command.name in _ANSWER_VALUES or (
        command.name == "set" and any(word.lower() == b"get" for word in request[3:])
    )


def _check_again(session: Session, command: Command, request: list[bytes]) -> None:
    """Raises CommandError when the user has been restricted since the command was queued."""
    denial = session.server.access.denial(session, command, request)
    if denial is not None:
        by_key = denial.reason is Reason.KEY
        why = "touch the specified keys" if by_key else "execute the command or subcommand"
        raise CommandError(
            "NOPERM ACLs rules changed between the moment the transaction was accumulated and the EXEC call."
            f" This command is no longer allowed for the following reason: no permission to {why}"
        )


def _joined(found: Sequence[bytes | Pieces]) -> bytes | Pieces:
    parts: list[Bytes] = []
    for reply in found:
        parts += reply.parts if isinstance(reply, Pieces) else (reply,)
    pieces = Pieces(parts)
    return bytes(pieces) if pieces.size <= SMALL_REPLY else pieces


async def _result(session: Session, result: Reply) -> bytes | Pieces:
    if isinstance(result, bytes | Pieces):
        return result
    try:
        assert not isinstance(result, Turns)
        return await (wait_for(result) if isinstance(result, Slot) else result.reply())
    except CommandError as error:
        return session.server.error(str(error))


async def wait_for(slot: Slot) -> bytes:
    """The reply of a slot, once it is known."""
    if slot.reply is None:
        filled = trio.Event()
        slot.on_fill = filled.set
        await filled.wait()
    assert slot.reply is not None
    return slot.reply


_FLAGS = ("noscript", "loading", "stale", "fast", "allow_busy")
_GROUP = "transactions"

COMMANDS = (
    Command("multi", _multi, 1, "", "Starts a transaction.", _GROUP, _FLAGS, since="1.2.0"),
    Command(
        "exec",
        _exec,
        1,
        "",
        "Executes all commands in a transaction.",
        _GROUP,
        ("noscript", "loading", "stale", "skip_slowlog"),
        since="1.2.0",
        complexity="Depends on commands in the transaction",
    ),
    Command("discard", _discard, 1, "", "Discards a transaction.", _GROUP, _FLAGS, since="2.0.0"),
    Command(
        "watch",
        _watch,
        -2,
        "key [key ...]",
        "Monitors changes to keys to determine the execution of a transaction.",
        _GROUP,
        _FLAGS,
        (1, -1, 1),
        key_flags=("RO",),
        since="2.2.0",
        complexity="O(1) for every key.",
    ),
    Command(
        "unwatch",
        _unwatch,
        1,
        "",
        "Forgets about watched keys of a transaction.",
        _GROUP,
        _FLAGS,
        since="2.2.0",
    ),
)
