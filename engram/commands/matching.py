"""The members of a vector index that a filter is true of: counted, or deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from engram.commands.arguments import SYNTAX_ERROR
from engram.commands.indices import existing_index, read_index
from engram.commands.limits import Compiled, bounded_filter
from engram.commands.long_filters import filtering
from engram.commands.long_work import alone, outcome_of, read
from engram.commands.session import Barrier, Pieces, Session
from engram.commands.table import Command, Reply
from engram.database import RECORD_OVERHEAD, LogicalDatabase
from engram.errors import CommandError
from engram.index.filters import Filter
from engram.index.matching import Matching, count_matching, find_matching, find_matching_since
from engram.index.vector_index import VectorIndex, View
from engram.operations import DeleteVectors
from engram.protocol import replies
from engram.protocol.replies import ZERO

# What a key takes in a record beside its bytes.
_KEY_BYTES = 8

# Rows of the head that the step which deletes looks at; with more, a thread looks first, but not more often.
_LOOKED_AT_ONCE = 1024
_MOST_LOOKS = 16

# Members that are deleted in one turn.
_DELETED_AT_ONCE = 512

# The length of a record is a number of 32 bits; see `persistence.log_format`.
_LARGEST_RECORD = (1 << 32) - (1 << 10)


def _filter(session: Session, words: list[bytes], compiled: Compiled | None) -> Filter:
    if len(words) != 2 or words[0].upper() != b"FILTER":
        raise CommandError(SYNTAX_ERROR)
    return bounded_filter(session, words[1], compiled)


def _count(session: Session, arguments: list[bytes], compiled: Compiled | None) -> Reply:
    index = read_index(session, arguments[1])
    if len(arguments) == 2:
        return replies.integer(len(index))
    condition = _filter(session, arguments[2:], compiled)
    view = index.view(session.database.lsn)
    return read(session, lambda _: replies.integer(count_matching(view, condition)), "counting failed")


def _delete_by(session: Session, arguments: list[bytes], compiled: Compiled | None) -> Barrier:
    index = existing_index(session, arguments[1])
    return Barrier(partial(_delete_matching, session, index, _filter(session, arguments[2:], compiled)))


async def _delete_matching(session: Session, index: VectorIndex, condition: Filter) -> bytes | Pieces:
    """Deletes the members that the filter is true of when it is done, in one change.

    They are looked for in a thread, again where many have been added meanwhile. The last few are looked at in
    the step that deletes. An index that is dropped meanwhile has none.
    """
    database = session.database
    found = Matching([], [])
    looks = since = admitted = found_bytes = 0
    while not index.dropped:
        many = index.next_row - since > _LOOKED_AT_ONCE or index.last_row_in_segments >= since
        if not looks or (many and looks < _MOST_LOOKS):
            view = index.view(database.lsn)
            find = partial(_find_matching, view, condition, since)
            more, more_bytes = await outcome_of(session, find, "searching failed")
            found_bytes += more_bytes
            found.keys.extend(more.keys)
            found.row_ids.extend(more.row_ids)
            looks, since = looks + 1, view.next_row
            # Room in the log is for those who append at once.
            admitted = 0
            continue
        recent = find_matching_since(index, since, condition)
        count = len(found.keys) + len(recent.keys)
        if not count:
            break
        size = found_bytes + sum(map(len, recent.keys)) + _KEY_BYTES * count
        size += RECORD_OVERHEAD * (1 + count // _DELETED_AT_ONCE)
        if size > _LARGEST_RECORD:
            raise CommandError("ERR the keys to delete do not fit in one record; use a narrower filter")
        if size <= admitted:
            found.keys.extend(recent.keys)
            found.row_ids.extend(recent.row_ids)
            reply = alone(session.server, *_deletion(database, index, found))
            return await reply.reply() if isinstance(reply, Barrier) else reply
        # With some to spare for what is added until there is room.
        admitted = 2 * size
        await session.server.admit(admitted)
    return ZERO


def _find_matching(view: View, condition: Filter, since: int) -> tuple[Matching, int]:
    """What `find_matching` finds, and the lengths of its keys."""
    matching = find_matching(view, condition, since)
    return matching, sum(map(len, matching.keys))


def _deletion(
    database: LogicalDatabase, index: VectorIndex, found: Matching
) -> tuple[Iterator[None], Callable[[], bytes]]:
    """Deletes those of the members that were found which still have their row, in one change.

    What was found is taken away on the way: to free it all at once would take a turn of its own.

    Returns:
        The turns, and the reply behind the last of them: how many there were.
    """
    deleted = 0
    keys, row_ids, live = found.keys, found.row_ids, index.live

    def turns() -> Iterator[None]:
        nonlocal deleted
        with database.as_one():
            while keys:
                last = zip(keys[-_DELETED_AT_ONCE:], row_ids[-_DELETED_AT_ONCE:], strict=True)
                dying = tuple(key for key, row_id in last if live.get(key) == row_id)
                del keys[-_DELETED_AT_ONCE:], row_ids[-_DELETED_AT_ONCE:]
                if dying:
                    database.commit(DeleteVectors(index.id, dying))
                    deleted += len(dying)
                if keys:
                    yield

    return turns(), lambda: replies.integer(deleted)


_KEY = (1, 1, 1)

COMMANDS = (
    Command(
        "vcount",
        filtering(_count, 2),
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
        filtering(_delete_by, 2),
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
