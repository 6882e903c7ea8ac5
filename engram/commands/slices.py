"""Replies that take work in proportion to what there is, a slice at a time: others have turns in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from engram.commands.allowance import Allowance
from engram.commands.limits import check_reply
from engram.commands.session import Barrier, Session
from engram.commands.table import Reply
from engram.protocol import replies

# Items that are looked at between two turns of others: a millisecond or so.
SLICE = 2048

# What a list takes for each item.
_POINTER_BYTES = 8

# Some items, and what is answered of a slice of them.
View = tuple[Sequence[Any], Callable[[Sequence[Any]], Sequence[bytes]]]


def bulk_array(session: Session, count: int, look: Callable[[], View]) -> Reply:
    """An array of what is picked from about `count` items, all as they are when `look` is called.

    Few are looked at now. Of more, only one client's are held at a time: those of others are looked at when
    it is their turn. In EXEC that is at once, and what they take counts as a part of its replies.

    Raises:
        CommandError: the reply would be too long.
    """
    if count <= SLICE:
        items, pick = look()
        return replies.bulk_array(pick(items))
    allowance = session.allowance
    if allowance is None:

        async def reply() -> bytes:
            async with session.server.slices_lock:
                # Half of a transaction is not to be seen.
                await session.server.exclusion.wait()
                return await _in_slices(session, look(), None)

    else:
        allowance.take(_POINTER_BYTES * count)
        view = look()

        async def reply() -> bytes:
            return await _in_slices(session, view, allowance)

    return Barrier(reply)


async def _in_slices(session: Session, view: View, allowance: Allowance | None) -> bytes:
    items, pick = view
    parts = [b""]
    count = size = 0
    for start in range(0, len(items), SLICE):
        found = pick(items[start : start + SLICE])
        part = b"".join(map(replies.bulk, found))
        size += len(part)
        if allowance is None:
            check_reply(session, size)
        else:
            allowance.take(len(part))
        count += len(found)
        parts.append(part)
        await trio.lowlevel.checkpoint()
    parts[0] = replies.array_header(count)
    return b"".join(parts)
