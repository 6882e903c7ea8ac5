"""Lists of keys: all of a database, or those of one kind."""

from __future__ import annotations

from collections.abc import Callable

from engram.commands.allowance import Allowance
from engram.commands.long_work import read
from engram.commands.session import Session
from engram.commands.table import Reply
from engram.keyspace import FrozenKeys
from engram.protocol import replies


def list_keys(session: Session, keys: FrozenKeys, matches: Callable[[bytes], bool] | None = None) -> Reply:
    """An array of the keys, or of those that match.

    Raises:
        CommandError: the reply would be too long.
    """

    def make(allowance: Allowance) -> bytes:
        parts = [b""]
        count = 0
        for some in keys:
            found = some if matches is None else list(filter(matches, some))
            part = b"".join(map(replies.bulk, found))
            allowance.take(len(part))
            count += len(found)
            parts.append(part)
        parts[0] = replies.array_header(count)
        return b"".join(parts)

    return read(
        session,
        make,
        "listing keys failed",
        elements=keys.most,
        held=keys.bytes_held,
        most=session.server.held_replies.longest,
    )
