"""The members of a vector index that a filter is true of: counted, or deleted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from engram.commands.arguments import SYNTAX_ERROR
from engram.commands.indices import existing_index, read_index
from engram.commands.limits import bounded_filter
from engram.commands.session import Barrier, Session, Slot
from engram.commands.table import Command
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.index.filters import Filter
from engram.index.matching import Matching, count_matching, find_matching, find_matching_since
from engram.index.vector_index import VectorIndex
from engram.operations import DeleteVectors
from engram.protocol import replies
from engram.protocol.replies import ZERO

# What a key takes in a record beside its bytes.
_KEY_BYTES = 8

# Rows of the head that the step which deletes looks at; with more, a thread looks first, but not more often.
_LOOKED_AT_ONCE = 1024
_MOST_LOOKS = 16

# The length of a record is a number of 32 bits; see `persistence.log_format`.
_LARGEST_RECORD = (1 << 32) - (1 << 10)


def _filter(session: Session, words: list[bytes]) -> Filter:
    if len(words) != 2 or words[0].upper() != b"FILTER":
        raise CommandError(SYNTAX_ERROR)
    return bounded_filter(session, words[1])


def _count(session: Session, arguments: list[bytes]) -> bytes | Slot:
    index = read_index(session, arguments[1])
    if len(arguments) == 2:
        return replies.integer(len(index))
    condition = _filter(session, arguments[2:])
    slot = Slot()

    def done(count: int | Exception) -> None:
        found = count if isinstance(count, Exception) else replies.integer(count)
        session.fill(slot, found, "counting failed")

    view = index.view(session.database.lsn)
    session.server.searches.submit_work(
        partial(count_matching, view, condition), done, lambda: slot.awaited, session.id
    )
    return slot


def _delete_by(session: Session, arguments: list[bytes]) -> Barrier:
    index = existing_index(session, arguments[1])
    return Barrier(partial(_delete_matching, session, index, _filter(session, arguments[2:])))


async def _delete_matching(session: Session, index: VectorIndex, condition: Filter) -> bytes:
    """Deletes the members that the filter is true of when it is done, in one change.

    They are looked for in a thread, again where many have been added meanwhile. The last few are looked at in
    the step that deletes. An index that is dropped meanwhile has none.
    """
    database = session.database
    found = Matching([], [])
    looks = since = admitted = 0
    while not index.dropped:
        many = index.next_row - since > _LOOKED_AT_ONCE or index.last_row_in_segments >= since
        if not looks or (many and looks < _MOST_LOOKS):
            view = index.view(database.lsn)
            more = await _find(session, partial(find_matching, view, condition, since))
            found.keys.extend(more.keys)
            found.row_ids.extend(more.row_ids)
            looks, since = looks + 1, view.next_row
            continue
        live = index.live
        keys = [key for key, row_id in zip(found.keys, found.row_ids, strict=True) if live.get(key) == row_id]
        keys += find_matching_since(index, since, condition).keys
        if not keys:
            break
        size = sum(map(len, keys)) + _KEY_BYTES * len(keys) + RECORD_OVERHEAD
        if size > _LARGEST_RECORD:
            raise CommandError("ERR the keys to delete do not fit in one record; use a narrower filter")
        if size <= admitted:
            database.commit(DeleteVectors(index.id, tuple(keys)))
            database.changed(index)
            return replies.integer(len(keys))
        # With some to spare for what is added until there is room.
        admitted = 2 * size
        await session.server.admit(admitted)
    return ZERO


async def _find(session: Session, find: Callable[[], Matching]) -> Matching:
    """What a search thread finds. Raises CommandError when it fails."""
    outcomes: list[Matching | Exception] = []
    found = trio.Event()
    wanted = True

    def done(outcome: Matching | Exception) -> None:
        outcomes.append(outcome)
        found.set()

    session.server.searches.submit_work(find, done, lambda: wanted, session.id)
    try:
        await found.wait()
    finally:
        wanted = False
    outcome = outcomes.pop()
    if isinstance(outcome, CommandError):
        raise outcome
    if isinstance(outcome, Exception):
        raise CommandError(f"ERR searching failed: {outcome}") from outcome
    return outcome


_KEY = (1, 1, 1)

COMMANDS = (
    Command(
        "vcount",
        _count,
        -2,
        "index [FILTER expression]",
        "Returns the number of members of a vector index, or of those a filter is true of.",
        "vector",
        ("readonly",),
        _KEY,
        since="engram 0.1.0",
        complexity="O(1), and O(N) with FILTER.",
    ),
    Command(
        "vdelby",
        _delete_by,
        4,
        "index FILTER expression",
        "Removes the members that a filter is true of, all at once, and returns their number. The client's"
        " next command waits for it, other clients do not.",
        "vector",
        ("write", "no_multi"),
        _KEY,
        since="engram 0.1.0",
        complexity="O(N) where N is the number of members.",
    ),
)
