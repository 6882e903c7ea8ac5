"""Filters that take long to compile: a thread does that, and others have turns meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from engram.commands.limits import Compiled
from engram.commands.long_work import outcome_of
from engram.commands.session import Barrier, Pieces, Session, Slot, Turns
from engram.commands.table import Reply
from engram.commands.transactions import wait_for
from engram.index.errors import FilterError
from engram.index.filters import compile_filter

# Shorter ones are compiled at once: a millisecond or two, and most have been compiled before.
_LONG_BYTES = 4 << 10


FilteringHandler = Callable[[Session, list[bytes], Compiled | None], Reply]
"""Carries out a request, given its filter where that has been compiled already."""


def filtering(handler: FilteringHandler, start: int) -> Callable[[Session, list[bytes]], Reply]:
    """Has a thread compile the filter in a request, if it is long, and the request be carried out then.

    The options of the request, FILTER among them, are from `start` on. What is wrong with them, or with the
    filter, the handler says. In EXEC each command has its place, and compiles its filter itself.
    """

    def handle(session: Session, arguments: list[bytes]) -> Reply:
        expression = _long_filter(arguments, start)
        most = session.server.config.vector_max_filter_length
        if expression is None or len(expression) > most or session.executing:
            return handler(session, arguments, None)
        return _compiled_first(session, arguments, expression, handler)

    return handle


def _compiled_first(
    session: Session, arguments: list[bytes], expression: bytes, handler: FilteringHandler
) -> Barrier:
    async def reply() -> bytes | Pieces:
        compiled = await outcome_of(session, partial(_compiled, expression), "compiling the filter failed")
        await session.server.exclusion.wait()
        found = handler(session, arguments, compiled)
        if isinstance(found, Barrier):
            return await found.reply()
        assert not isinstance(found, Turns)
        if not isinstance(found, Slot):
            return found
        try:
            return await wait_for(found)
        finally:
            found.awaited = False

    return Barrier(reply)


def _compiled(expression: bytes) -> Compiled:
    try:
        return compile_filter(expression)
    except FilterError as error:
        return error


def _long_filter(arguments: Sequence[bytes], start: int) -> bytes | None:
    """The first long word behind FILTER."""
    for position in range(start, len(arguments) - 1):
        word = arguments[position + 1]
        if len(word) > _LONG_BYTES and arguments[position].upper() == b"FILTER":
            return word
    return None
