"""The members of a vector index: their vectors and attributes, written, read and iterated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate

from engram.commands.allowance import Allowance
from engram.commands.arguments import (
    check_vector_sizes,
    options,
    read_vector,
    read_vectors,
    scan_count,
    scan_cursor,
    scan_size,
)
from engram.commands.indices import existing_index, read_index
from engram.commands.limits import check, check_members, check_reply, check_results
from engram.commands.long_work import ELEMENTS_A_TURN, in_turns, read
from engram.commands.session import Session, Slot
from engram.commands.table import Command, Reply, wrong_arity
from engram.database import LogicalDatabase
from engram.index.vector_index import VectorIndex
from engram.operations import AddVectors, DeleteVectors, SetAttributes
from engram.protocol import replies
from engram.protocol.glob import compile_glob
from engram.protocol.replies import ONE, ZERO

_ATTRIBUTES = b"ATTRS"
_SCAN_COUNT = 10

# Fewer VADDs are carried out sooner one by one.
_SHORTEST_RUN = 5

# Vectors that VMGET reads itself; a thread reads more.
_GOT_AT_ONCE = 1024

# Rows that VMADD looks at or adds in one turn, and bytes of their vectors or attributes: some milliseconds.
_ROWS_A_TURN = 2 * ELEMENTS_A_TURN
_BYTES_A_TURN = 2 << 20


def _add(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    index = existing_index(session, arguments[1])
    key, vector = arguments[2], arguments[3]
    read_vector(vector, index.parameters.dimension)
    config = session.server.config
    if len(key) > config.max_key_length:
        check_members((key,), config)
    reply = ZERO if key in index else ONE
    database.commit(AddVectors(index.id, (key,), vector))
    return reply


def _add_run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
    """Several VADDs to one index are one change, as a VMADD is; from a member that comes again another is."""
    name = requests[0][1]
    index = session.database.index(name) if len(requests) >= _SHORTEST_RUN else None
    if index is None:
        return 0, b""
    config = session.server.config
    room = config.max_unindexed_rows - index.rows_unindexed
    keys: dict[bytes, None] = {}
    blobs: list[bytes] = []
    for _, to, key, vector in requests[:room] if room > 0 else ():
        if to != name or key in keys:
            break
        keys[key] = None
        blobs.append(vector)
    if len(keys) < _SHORTEST_RUN:
        return 0, b""
    check_members(keys, config)
    vectors = read_vectors(blobs, index.parameters.dimension)
    live = index.live
    replies = b"".join([ZERO if key in live else ONE for key in keys])
    session.database.commit(AddVectors(index.id, tuple(keys), vectors))
    return len(keys), replies


def _add_many(session: Session, arguments: list[bytes]) -> Reply:
    index = existing_index(session, arguments[1])
    dimension = index.parameters.dimension
    keys, blobs, attributes = _rows(arguments, dimension)
    config = session.server.config
    check(len(keys), config.vector_max_rows, "the number of vectors")
    check_members(keys, config)
    check_vector_sizes(blobs, dimension)
    before = len(index)
    turns = _add_in_turns(session.database, index, keys, blobs, attributes)
    return in_turns(session, turns, lambda: replies.integer(len(index) - before))


def _add_in_turns(
    database: LogicalDatabase,
    index: VectorIndex,
    keys: Sequence[bytes],
    blobs: Sequence[bytes],
    attributes: Sequence[bytes],
) -> Iterator[None]:
    """Looks at all rows and then adds them; yields between two turns.

    Raises CommandError before it adds any.
    """
    dimension = index.parameters.dimension
    parts = _parts(len(keys), 4 * dimension, attributes)
    for part in parts:
        read_vectors(blobs[part], dimension)
        if len(parts) > 1:
            yield
    last = dict(zip(keys, range(len(keys)), strict=True))
    if len(last) < len(keys):
        # Of a key given twice the last counts.
        kept = sorted(last.values())
        keys = list(map(keys.__getitem__, kept))
        blobs = list(map(blobs.__getitem__, kept))
        attributes = list(map(attributes.__getitem__, kept)) if attributes else ()
        parts = _parts(len(keys), 4 * dimension, attributes)
    with database.as_one() if len(parts) > 1 else nullcontext():
        for part in parts:
            if part.start:
                yield
            vectors = b"".join(blobs[part])
            database.commit(AddVectors(index.id, tuple(keys[part]), vectors, tuple(attributes[part])))


def _parts(count: int, vector_bytes: int, attributes: Sequence[bytes]) -> list[slice]:
    """Which of so many rows are looked at, or added, in each turn."""
    most = min(_ROWS_A_TURN, max(1, _BYTES_A_TURN // vector_bytes))
    # Where the attributes of each row end, were they one after the other.
    ends = list(accumulate(map(len, attributes), initial=0))
    parts = []
    start = 0
    while start < count:
        stop = min(start + most, count)
        if ends[-1] > _BYTES_A_TURN:
            stop = min(stop, max(start + 1, bisect_right(ends, ends[start] + _BYTES_A_TURN) - 1))
        parts.append(slice(start, stop))
        start = stop
    return parts


def _rows(arguments: list[bytes], dimension: int) -> tuple[Sequence[bytes], Sequence[bytes], Sequence[bytes]]:
    """Keys, vectors and attributes (empty without ATTRS) of VMADD."""
    words, width = arguments[2:], 2
    # At the end it cannot be a vector; at the beginning it may be the key of the first of some pairs.
    if words[-1].upper() == _ATTRIBUTES:
        words, width = words[:-1], 3
    elif words[0].upper() == _ATTRIBUTES and (len(words) % 2 or len(words[1]) != 4 * dimension):
        words, width = words[1:], 3
    if not words or len(words) % width:
        raise wrong_arity("vmadd")
    return words[::width], words[1::width], words[2::3] if width == 3 else ()


def _throttle(session: Session, arguments: list[bytes]) -> tuple[VectorIndex, int] | None:
    value = session.database.keyspace.values.get(arguments[1])
    if type(value) is not VectorIndex or value.rows_unindexed < session.server.config.max_unindexed_rows:
        return None
    # Only VMADD has more words than one row takes.
    rows = 1 if len(arguments) == 4 else len(_rows(arguments, value.parameters.dimension)[0])
    return value, rows


def _get(session: Session, arguments: list[bytes]) -> bytes:
    vector = read_index(session, arguments[1]).vector(arguments[2])
    return session.encoder.null if vector is None else replies.bulk(vector)


def _get_many(session: Session, arguments: list[bytes]) -> bytes | Slot:
    index = read_index(session, arguments[1])
    keys = arguments[2:]
    live = index.live
    check_results(session, 4 * index.parameters.dimension * sum(map(live.__contains__, keys)))
    null = session.encoder.null
    if len(keys) <= _GOT_AT_ONCE:
        found = map(index.vector, keys)
        return replies.array(null if vector is None else replies.bulk(vector) for vector in found)

    view, row_ids = index.view(session.database.lsn), [live.get(key, -1) for key in keys]

    def encode(allowance: Allowance) -> bytes:
        found = [null if vector is None else replies.bulk(vector) for vector in view.vectors_of(row_ids)]
        allowance.take(sum(map(len, found)))
        return replies.array(found)

    size = 4 * index.parameters.dimension * len(keys)
    return read(session, encode, "reading vectors failed", size=size)


def _delete(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    index = existing_index(session, arguments[1])
    key = arguments[2]
    if key not in index:
        return ZERO
    database.commit(DeleteVectors(index.id, (key,)))
    return ONE


def _set_attributes(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    index = database.index(arguments[1])
    key, attributes = arguments[2], arguments[3]
    if index is None or key not in index:
        return session.encoder.boolean(False)
    if attributes != index.attributes(key):
        database.commit(SetAttributes(index.id, (key,), (attributes,)))
    return session.encoder.boolean(True)


def _get_attributes(session: Session, arguments: list[bytes]) -> bytes:
    index = session.read_index(arguments[1])
    attributes = b"" if index is None else index.attributes(arguments[2])
    check_reply(session, len(attributes))
    return replies.bulk(attributes) if attributes else session.encoder.null


def _scan(session: Session, arguments: list[bytes]) -> bytes:
    index = read_index(session, arguments[1])
    cursor = scan_cursor(arguments[2])
    given = options(arguments[3:], (b"COUNT", b"MATCH"))
    count = scan_count(given[b"COUNT"]) if b"COUNT" in given else _SCAN_COUNT
    pattern = given.get(b"MATCH")
    cursor, keys = index.scan(cursor, count, scan_size(pattern))
    if pattern is not None:
        keys = list(filter(compile_glob(pattern), keys))
    check_reply(session, sum(map(len, keys)))
    return replies.array((replies.bulk(b"%d" % cursor), replies.bulk_array(keys)))


_KEY = (1, 1, 1)
_GROUP = "vector"
_SINCE = "engram 0.1.0"

COMMANDS = (
    Command(
        "vadd",
        _add,
        4,
        "index member vector",
        "Adds a vector, little-endian float32 bytes, or overwrites the one of that member, whose attributes"
        " stay.",
        _GROUP,
        ("write", "denyoom"),
        _KEY,
        since=_SINCE,
        complexity="O(D) where D is the dimension; the graph is built in the background.",
        run=_add_run,
        throttle=_throttle,
    ),
    Command(
        "vmadd",
        _add_many,
        -4,
        "index (member vector [member vector ...] | member vector attributes [member vector attributes ...]"
        " ATTRS)",
        "Adds or overwrites several vectors, all or none, with attributes (JSON, empty for none) when ATTRS"
        " is given. Returns the number of new members.",
        _GROUP,
        ("write", "denyoom"),
        _KEY,
        since=_SINCE,
        complexity="O(N*D) for N vectors of dimension D; the graph is built in the background.",
        throttle=_throttle,
    ),
    Command(
        "vget",
        _get,
        3,
        "index member",
        "Returns the vector of a member, little-endian float32 bytes, as it was added.",
        _GROUP,
        ("readonly", "fast"),
        _KEY,
        since=_SINCE,
    ),
    Command(
        "vmget",
        _get_many,
        -3,
        "index member [member ...]",
        "Returns the vectors of several members, null for those that are not there.",
        _GROUP,
        ("readonly", "fast"),
        _KEY,
        since=_SINCE,
        complexity="O(N) where N is the number of members asked for.",
    ),
    Command(
        "vdel",
        _delete,
        3,
        "index member",
        "Removes a member from a vector index.",
        _GROUP,
        ("write",),
        _KEY,
        since=_SINCE,
    ),
    Command(
        "vsetattr",
        _set_attributes,
        4,
        "index member attributes",
        "Sets the attributes of a member, a JSON text; an empty one removes them.",
        _GROUP,
        ("write", "denyoom"),
        _KEY,
        since="8.0.0",
        throttle=_throttle,
    ),
    Command(
        "vgetattr",
        _get_attributes,
        3,
        "index member",
        "Returns the attributes of a member, null when it has none.",
        _GROUP,
        ("readonly", "fast"),
        _KEY,
        since="8.0.0",
    ),
    Command(
        "vscan",
        _scan,
        -3,
        "index cursor [COUNT count] [MATCH pattern]",
        "Iterates over the members of a vector index, each call over older ones than the"
        " call before. One that is there throughout is returned, and the iteration ends, whatever others do.",
        _GROUP,
        ("readonly",),
        _KEY,
        since=_SINCE,
        complexity="O(COUNT) for every call, of which some thousands are done at once; O(N) for a complete"
        " iteration.",
    ),
)
