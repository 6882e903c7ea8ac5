"""What a client is told when a command is refused, or fails, by its own fault or by no fault of its own."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from engram.commands.session import Session

if TYPE_CHECKING:
    from engram.commands.table import Command

OUT_OF_MEMORY = "OOM Insufficient memory, failed allocating what the command needs"
_INTERNAL_ERROR = "ERR internal error, see the log of the server"

# What fails in one place is logged once in so many seconds: a client may have it fail as often as it likes.
_SILENCE_SECONDS = 60.0

logger = logging.getLogger(__name__)


def reject(session: Session, command: Command | None, text: str) -> bytes:
    """The reply to a request that was refused before it was called; EXEC will carry out none then.

    `command` is None where there is no such command.
    """
    if command is not None:
        session.server.statistics.usage[command.name].rejected += 1
        if command.name == "exec":
            session.discard()
            text = f"EXECABORT Transaction discarded because of: {text.removeprefix('ERR ')}"
    session.refuse()
    return session.server.error(text)


def fail(session: Session, command: Command, text: str) -> bytes:
    """The reply to a call that failed."""
    session.server.statistics.usage[command.name].failed += 1
    return session.server.error(text)


def excuse(error: Exception, session: Session) -> str:
    """The text of the reply to a command that failed by an error of ours, which is logged now and then."""
    # There may be no memory for that.
    with suppress(MemoryError):
        logged, now = session.server.failures_logged, trio.current_time()
        place = _place(error)
        if now >= logged.get(place, -_SILENCE_SECONDS) + _SILENCE_SECONDS:
            logged[place] = now
            logger.error("a command of client %s failed", session.address, exc_info=error)
    return OUT_OF_MEMORY if isinstance(error, MemoryError) else _INTERNAL_ERROR


def _place(error: Exception) -> tuple[type[Exception], str, int]:
    """Where in the code which kind of error was raised: there are so many, whatever clients send."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return type(error), "", 0
    return type(error), traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
