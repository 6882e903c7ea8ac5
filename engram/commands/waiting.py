"""WAIT and WAITAOF: until what a client wrote is safe.

https://redis.io/docs/latest/commands/waitaof/
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from engram.commands.arguments import integer
from engram.commands.session import Barrier, Session
from engram.commands.table import Command, Reply
from engram.errors import CommandError
from engram.kinds.string import INTEGER_HIGH
from engram.protocol import replies
from engram.protocol.replies import ZERO

_UNBLOCKED = "UNBLOCKED client unblocked via CLIENT UNBLOCK"


def timeout(argument: bytes, now: int) -> int:
    """Milliseconds to wait. Raises CommandError for what is none, or ends after the end of time.

    `now` is in milliseconds since the epoch.
    """
    milliseconds = integer(argument, "ERR timeout is not an integer or out of range")
    if milliseconds < 0:
        raise CommandError("ERR timeout is negative")
    if milliseconds > INTEGER_HIGH - now:
        raise CommandError("ERR timeout is out of range")
    return milliseconds


def _seconds(session: Session, argument: bytes) -> float:
    """As `timeout`, in seconds; 0 is for ever."""
    return timeout(argument, session.database.now()) / 1000 or math.inf


def _wait(session: Session, arguments: list[bytes]) -> Reply:
    replicas = integer(arguments[1])
    seconds = _seconds(session, arguments[2])
    # There are no replicas.
    if replicas <= 0 or session.executing:
        return ZERO
    return _block(session, seconds, trio.sleep_forever, lambda: ZERO)


def _waitaof(session: Session, arguments: list[bytes]) -> Reply:
    out_of_range = "ERR value is out of range, value must between 0 and 1"
    local = integer(arguments[1])
    if not 0 <= local <= 1:
        raise CommandError(out_of_range)
    replicas = integer(arguments[2], "ERR value is out of range, must be positive")
    if replicas < 0:
        raise CommandError("ERR value is out of range, must be positive")
    seconds = _seconds(session, arguments[3])
    journal = session.database.journal
    if local and journal is None:
        raise CommandError("ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.")
    lsn = session.database.lsn

    def reply() -> bytes:
        synced = journal is not None and journal.durable_lsn >= lsn
        return replies.array((replies.integer(int(synced)), ZERO))

    done = not local or journal is None or journal.durable_lsn >= lsn
    if session.executing or (done and not replicas):
        return reply()

    async def wait() -> None:
        if journal is not None and local:
            await journal.wait_durable(lsn)
        if replicas:
            await trio.sleep_forever()

    return _block(session, seconds, wait, reply)


def _block(
    session: Session, seconds: float, wait: Callable[[], Awaitable[None]], reply: Callable[[], bytes]
) -> Barrier:
    """The reply once `wait` has ended, `seconds` have passed, or CLIENT UNBLOCK says so."""
    scope = trio.CancelScope(deadline=trio.current_time() + seconds)
    failed = False

    def unblock(with_error: bool) -> None:
        nonlocal failed
        failed = with_error
        session.go_on()
        scope.cancel()

    async def blocked() -> bytes:
        try:
            with scope:
                await wait()
        finally:
            session.go_on()
        if failed:
            raise CommandError(_UNBLOCKED)
        return reply()

    # From now on, although the wait begins when the client's task is woken.
    session.block(unblock)
    return Barrier(blocked)


_GROUP = "connection"

COMMANDS = (
    Command(
        "wait",
        _wait,
        3,
        "numreplicas timeout",
        "Blocks until so many replicas have the client's writes. There are none, so until the timeout.",
        _GROUP,
        ("blocking",),
        since="3.0.0",
        group_categories=("@blocking", "@connection"),
    ),
    Command(
        "waitaof",
        _waitaof,
        4,
        "numlocal numreplicas timeout",
        "Blocks until the client's writes are synced to the log.",
        _GROUP,
        ("blocking",),
        since="7.2.0",
        group_categories=("@blocking", "@connection"),
    ),
)
