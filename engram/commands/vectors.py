"""Vector indices, in the dialect of the engine that engram grew from."""

from __future__ import annotations

from engram.commands.administration import save
from engram.commands.arguments import NOT_AN_INTEGER, SYNTAX_ERROR, integer
from engram.commands.session import Session, Slot
from engram.commands.table import Command
from engram.errors import CommandError
from engram.index.parameters import default_parameters
from engram.index.search import SearchResult
from engram.index.vector_index import VectorIndex
from engram.index.vectors import decode_vector
from engram.operations import AddVectors, CreateIndex, DeleteVectors
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, OK, ONE, ZERO

NO_INDEX = "ERR no such index"

MAXIMUM_DIMENSION = 1 << 16

# About what a key and its distance take in a reply.
_RESULT_BYTES = 64

METRICS = {b"cosine": "cosine", b"l2": "l2", b"euclidean": "l2", b"dot": "dot", b"ip": "dot"}


def _existing(session: Session, key: bytes) -> VectorIndex:
    index = session.database.index(key)
    if index is None:
        raise CommandError(NO_INDEX)
    return index


def _new(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    dimension = integer(arguments[2], "ERR dimension must be a positive integer")
    if dimension < 1:
        raise CommandError("ERR dimension must be a positive integer")
    if dimension > MAXIMUM_DIMENSION:
        raise CommandError(f"ERR dimension must be at most {MAXIMUM_DIMENSION}")
    metric = "cosine"
    if len(arguments) > 3:
        if len(arguments) != 5 or arguments[3].upper() != b"METRIC":
            raise CommandError(SYNTAX_ERROR)
        named = METRICS.get(arguments[4].lower())
        if named is None:
            raise CommandError("ERR unknown metric")
        metric = named
    if database.index(key) is not None:
        raise CommandError("ERR index already exists")
    parameters = default_parameters(dimension, metric)
    database.commit(
        CreateIndex(
            key,
            dimension,
            metric,
            parameters.connectivity,
            parameters.expansion,
            parameters.quantization,
        )
    )
    return OK


def _add(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    index = _existing(session, arguments[1])
    key, vector = arguments[2], arguments[3]
    decode_vector(vector, index.parameters.dimension)
    reply = ZERO if key in index else ONE
    database.commit(AddVectors(index.id, (key,), vector))
    database.changed(index)
    return reply


def _add_throttle(session: Session, arguments: list[bytes]) -> float:
    value = session.database.keyspace.values.get(arguments[1])
    if not isinstance(value, VectorIndex):
        return 0.0
    limit = session.server.config.max_unindexed_rows
    if value.rows_unindexed < limit:
        return 0.0
    return session.server.builder.delay(value, limit)


def _search(session: Session, arguments: list[bytes]) -> bytes | Slot:
    database = session.database
    index = _existing(session, arguments[1])
    query = decode_vector(arguments[2], index.parameters.dimension)
    k = integer(arguments[3])
    ef = None
    if len(arguments) > 4:
        if len(arguments) != 6 or arguments[4].upper() != b"EF":
            raise CommandError(SYNTAX_ERROR)
        ef = integer(arguments[5])
    if k < 0 or (ef is not None and ef < 1):
        raise CommandError(NOT_AN_INTEGER)
    if k == 0 or not len(index):
        return EMPTY_ARRAY
    slot = Slot(_RESULT_BYTES * min(k, len(index)))

    def done(result: SearchResult | Exception) -> None:
        if isinstance(result, Exception):
            session.server.statistics.error_replies += 1
            slot.fill(replies.error(f"ERR search failed: {result}"))
        else:
            found = [item for pair in zip(result.keys, result.distances, strict=True) for item in pair]
            slot.fill(replies.bulk_array(found))

    view = index.view(database.lsn)
    session.server.searches.submit(index.id, view, query, k, ef, done, lambda: slot.awaited)
    return slot


def _delete(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    index = _existing(session, arguments[1])
    key = arguments[2]
    if key not in index:
        return ZERO
    database.commit(DeleteVectors(index.id, (key,)))
    database.changed(index)
    return ONE


def _info(session: Session, arguments: list[bytes]) -> bytes:
    index = _existing(session, arguments[1])
    return replies.bulk_array(
        (
            b"dim",
            b"%d" % index.parameters.dimension,
            b"metric",
            index.parameters.metric.encode(),
            b"count",
            b"%d" % len(index),
        )
    )


_KEY = (1, 1, 1)

COMMANDS = (
    Command(
        "vnew",
        _new,
        -3,
        "index dimension [METRIC (cosine | l2 | dot)]",
        "Creates a vector index. Metrics: cosine distance (the default), Euclidean distance (l2, euclidean),"
        " negative inner product (dot, ip).",
        "vector",
        ("write", "denyoom"),
        _KEY,
        since="engram 0.1.0",
    ),
    Command(
        "vadd",
        _add,
        4,
        "index member vector",
        "Adds a vector, little-endian float32 bytes, or overwrites the one of that member.",
        "vector",
        ("write", "denyoom"),
        _KEY,
        since="engram 0.1.0",
        complexity="O(D) where D is the dimension; the graph is built in the background.",
        throttle=_add_throttle,
    ),
    Command(
        "vsearch",
        _search,
        -4,
        "index query k [EF ef]",
        "Returns the k members nearest to a vector and their distances, closest first.",
        "vector",
        ("readonly",),
        _KEY,
        since="engram 0.1.0",
        complexity="O(log(N)) distances over graphs and O(H) over the H newest rows.",
    ),
    Command(
        "vdel",
        _delete,
        3,
        "index member",
        "Removes a member from a vector index.",
        "vector",
        ("write",),
        _KEY,
        since="engram 0.1.0",
    ),
    Command(
        "vinfo",
        _info,
        2,
        "index",
        "Returns the dimension, the metric and the number of members of a vector index.",
        "vector",
        ("readonly", "fast"),
        _KEY,
        since="engram 0.1.0",
    ),
    Command(
        "vsave",
        save,
        1,
        "",
        "Writes a snapshot; answers when it is on disk. The same as SAVE.",
        "vector",
        ("admin",),
        since="engram 0.1.0",
        complexity="O(N), in a process of its own.",
    ),
)
