"""MULTI, EXEC, DISCARD, WATCH and UNWATCH: https://redis.io/docs/latest/develop/interact/transactions/."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice, takewhile

import trio

from engram.commands.failures import excuse
from engram.commands.guard import show
from engram.commands.limits import check_reply_of_strings, longest_reply
from engram.commands.session import Barrier, Session, Slot, Transaction
from engram.commands.table import Command, Reply, log_room
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.permissions import Reason
from engram.protocol import replies
from engram.protocol.replies import OK

_ANSWER_VALUES = frozenset({"getdel", "getex", "getset"})

# Commands that are looked at for whether they can be carried out together.
_LONGEST_RUN = 256

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


def _watch(session: Session, arguments: list[bytes]) -> bytes:
    if session.transaction is not None:
        raise CommandError("ERR WATCH inside MULTI is not allowed")
    database = session.database
    for key in arguments[1:]:
        # One that has lapsed goes first, or its end would look like a change.
        database.lookup(key)
    database.watches.add(session.watch, arguments[1:])
    return OK


def _unwatch(session: Session, arguments: list[bytes]) -> bytes:
    session.unwatch()
    return OK


def _exec(session: Session, arguments: list[bytes]) -> Reply:
    transaction = session.transaction
    if transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    if transaction.failed:
        session.discard()
        raise CommandError(_ABORTED)

    name = arguments[0]
    delay, room = _needs(session, transaction)
    journal = session.database.journal
    if not delay and (not room or journal is None or journal.has_room(room)):
        return _execute(session, transaction, name)

    async def execute() -> bytes:
        try:
            await trio.sleep(delay)
            if room:
                await session.server.admit(room)
        except CommandError as error:
            session.discard()
            raise CommandError(f"EXECABORT Transaction discarded because of: {error}") from error
        reply = _execute(session, transaction, name)
        return reply if isinstance(reply, bytes) else await reply.reply()

    return Barrier(execute)


def _needs(session: Session, transaction: Transaction) -> tuple[float, int]:
    """Seconds to wait for a builder that cannot keep up, and bytes of room in the log; 0 without writes."""
    written = [(command, request) for command, request in transaction.commands if command.writes]
    delays = (
        command.throttle(session, request) for command, request in written if command.throttle is not None
    )
    if not written:
        return 0.0, 0
    room = sum(log_room(command, request) for command, request in transaction.commands)
    watched = sum(RECORD_OVERHEAD + len(key) for key in session.watch.keys)
    return max(delays, default=0.0), room + watched + RECORD_OVERHEAD


def _execute(session: Session, transaction: Transaction, name: bytes) -> bytes | Barrier:
    """Carries everything out; what is found later is waited for behind the barrier.

    `name` is EXEC as the client has written it.
    """
    database = session.database
    queued = transaction.commands
    results: list[Reply] = []
    failures: list[Exception] = []
    position = size = 0
    longest = longest_reply(session)
    database.covered = transaction.writes
    try:
        for key in session.watch.keys:
            database.lookup(key)
        broken = session.watch.broken
        session.discard()
        if broken:
            queued = []
        session.executing = True
        with database.together():
            while position < len(queued):
                done = 0
                if size <= longest:
                    done, result = _carry_out_run(session, queued, position)
                if not done:
                    done, result = 1, _carry_out(session, *queued[position], size, failures)
                size += _size(result)
                results.append(result)
                position += done
    finally:
        session.executing = database.covered = False
    if session.server.monitors:
        session.server.monitors.feed(session, [name])
    if broken:
        return session.encoder.null_array
    if failures:
        raise failures[0]
    header = replies.array_header(len(queued))
    known = [result for result in results if isinstance(result, bytes)]
    if len(known) == len(results):
        return header + b"".join(known)

    async def wait() -> bytes:
        try:
            return header + b"".join([await _result(session, result) for result in results])
        finally:
            for result in results:
                if isinstance(result, Slot):
                    result.awaited = False

    return Barrier(wait)


def _carry_out_run(
    session: Session, queued: Sequence[tuple[Command, list[bytes]]], start: int
) -> tuple[int, Reply]:
    """Carries out commands that can be together; returns how many, perhaps none, and their replies."""
    command, first = queued[start]
    run, size = command.run, command.minimum
    if run is None or len(first) != size or session.server.monitors or not session.user.unrestricted:
        return 0, b""
    alike = takewhile(
        lambda each: each[0] is command and len(each[1]) == size, islice(queued, start, start + _LONGEST_RUN)
    )
    requests = [request for _, request in alike]
    if len(requests) < 2:
        return 0, b""
    began = time.perf_counter_ns()
    lsn = session.database.lsn
    try:
        done, joined = run(session, requests)
    except Exception:
        if session.database.failure is not None or session.database.lsn != lsn:
            raise
        # Each by itself learns why.
        return 0, b""
    if done:
        _count(session, command, requests[done - 1], done, time.perf_counter_ns() - began)
    return done, joined


def _size(result: Reply) -> int:
    """Bytes of a reply, about; 0 where nobody knows yet."""
    if isinstance(result, bytes):
        return len(result)
    return result.size if isinstance(result, Slot) else 0


def _carry_out(
    session: Session, command: Command, request: list[bytes], size: int, failures: list[Exception]
) -> Reply:
    """Carries out one command, behind `size` bytes of replies: when that is too much, it may only write.

    Those that write what they also answer are refused as those that only read. What fails by an error of ours
    after its change is in `failures` then: no reply may deny it, and the commands behind it belong to it.
    """
    server = session.server
    lsn = session.database.lsn
    if server.monitors:
        show(session, command, request)
    began = time.perf_counter_ns()
    try:
        _check_again(session, command, request)
        if not command.writes or _answers_values(command, request):
            check_reply_of_strings(session, size)
        return command.handler(session, request)
    except CommandError as error:
        server.statistics.usage[command.name].failed += 1
        return server.error(str(error))
    except Exception as error:
        if session.database.failure is not None:
            raise
        if session.database.lsn != lsn:
            failures.append(error)
        server.statistics.usage[command.name].failed += 1
        return server.error(excuse(error, session))
    finally:
        _count(session, command, request, 1, time.perf_counter_ns() - began)


def _answers_values(command: Command, request: Sequence[bytes]) -> bool:
    """Whether a write may answer a string that somebody has stored."""
    return command.name in _ANSWER_VALUES or (
        command.name == "set" and any(word.lower() == b"get" for word in request[3:])
    )


def _count(session: Session, command: Command, latest: list[bytes], calls: int, nanoseconds: int) -> None:
    server = session.server
    server.statistics.usage[command.name].record(calls, nanoseconds)
    if (
        0 <= server.config.slowlog_log_slower_than * 1000 < nanoseconds // calls
        and "skip_slowlog" not in command.flags
    ):
        server.slowlog.add(session, latest, nanoseconds // calls)


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


async def _result(session: Session, result: Reply) -> bytes:
    if isinstance(result, bytes):
        return result
    try:
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
