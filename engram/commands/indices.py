"""Vector indices as a whole: how they are made, what they hold, and putting them in order."""

from __future__ import annotations

from typing import Any

import attrs

from engram.commands.administration import save
from engram.commands.arguments import integer, number, options
from engram.commands.key_lists import list_keys
from engram.commands.limits import check
from engram.commands.session import Barrier, Session
from engram.commands.table import Command, Reply
from engram.errors import CommandError
from engram.index.builder import BuildError
from engram.index.parameters import Parameters, default_parameters
from engram.index.vector_index import IndexStatistics, VectorIndex
from engram.operations import CreateIndex
from engram.protocol import replies
from engram.protocol.replies import OK

NO_INDEX = "ERR no such index"

# A node of a graph has twice as many neighbours in the lowest layer: 4 KiB of them at most.
CONNECTIVITY_BOUNDS = 4, 512
EXPANSION_BOUNDS = 1, 4096

METRICS = {b"cosine": "cosine", b"l2": "l2", b"euclidean": "l2", b"dot": "dot", b"ip": "dot"}
QUANTIZATIONS = {b"f32": "f32", b"int8": "int8", b"bf16": "bf16"}


def existing_index(session: Session, key: bytes) -> VectorIndex:
    """The index at a key. Raises CommandError when there is none."""
    return _present(session.database.index(key))


def read_index(session: Session, key: bytes) -> VectorIndex:
    """The index at a key, counted as found or as not found. Raises CommandError when there is none."""
    return _present(session.read_index(key))


def _present(index: VectorIndex | None) -> VectorIndex:
    if index is None:
        raise CommandError(NO_INDEX)
    return index


def recall_target(argument: bytes) -> float:
    """The operand of RECALL, above 0 and at most 1. Raises CommandError for anything else."""
    wrong = "ERR RECALL must be a number above 0 and at most 1"
    recall = number(argument, wrong)
    if not 0.0 < recall <= 1.0:
        raise CommandError(wrong)
    return recall


def _bounded(argument: bytes, name: str, bounds: tuple[int, int]) -> int:
    low, high = bounds
    wrong = f"ERR {name} must be an integer from {low} to {high}"
    value = integer(argument, wrong)
    if not low <= value <= high:
        raise CommandError(wrong)
    return value


def _parameters(arguments: list[bytes], most: int) -> Parameters:
    dimension = integer(arguments[2], "ERR dimension must be a positive integer")
    if dimension < 1:
        raise CommandError("ERR dimension must be a positive integer")
    check(dimension, most, "dimension")
    given = options(arguments[3:], (b"METRIC", b"M", b"EF_CONSTRUCTION", b"QUANT", b"RECALL"))
    metric = METRICS.get(given.get(b"METRIC", b"cosine").lower())
    if metric is None:
        raise CommandError("ERR unknown metric")
    parameters = default_parameters(dimension, metric)
    chosen: dict[str, Any] = {}
    if (word := given.get(b"M")) is not None:
        chosen["connectivity"] = _bounded(word, "M", CONNECTIVITY_BOUNDS)
    if (word := given.get(b"EF_CONSTRUCTION")) is not None:
        chosen["expansion"] = _bounded(word, "EF_CONSTRUCTION", EXPANSION_BOUNDS)
    if (word := given.get(b"QUANT")) is not None:
        if word.lower() not in QUANTIZATIONS:
            raise CommandError("ERR unknown quantization")
        chosen["quantization"] = QUANTIZATIONS[word.lower()]
    if (word := given.get(b"RECALL")) is not None:
        chosen["recall"] = recall_target(word)
    return attrs.evolve(parameters, **chosen)


def _new(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    config = session.server.config
    parameters = _parameters(arguments, config.vector_max_dimension)
    if database.index(key) is not None:
        raise CommandError("ERR index already exists")
    if len(database.engine.indices) >= config.vector_max_indices:
        raise CommandError(f"ERR there are {config.vector_max_indices} indices, as many as there may be")
    database.commit(
        CreateIndex(
            key,
            parameters.dimension,
            parameters.metric,
            parameters.connectivity,
            parameters.expansion,
            parameters.quantization,
            parameters.recall,
            database.number,
        )
    )
    return OK


def _info(session: Session, arguments: list[bytes]) -> bytes:
    index = read_index(session, arguments[1])
    parameters, statistics = index.parameters, index.statistics()
    fields: dict[str, object] = {
        "dim": parameters.dimension,
        "metric": parameters.metric,
        "count": statistics.live_rows,
        "m": parameters.connectivity,
        "ef-construction": parameters.expansion,
        "quant": parameters.quantization,
        "recall": replies.format_double(parameters.recall).decode(),
        "live-rows": statistics.live_rows,
        "dead-rows": statistics.dead_rows,
        "head-rows": statistics.head_rows,
        "segments": statistics.segments,
        "rows-awaiting-graph": statistics.rows_awaiting_graph,
        "bytes-in-memory": statistics.bytes_in_memory,
        "bytes-mapped": statistics.bytes_mapped,
        "recall-curve": _curves(statistics),
        "last-build-error": session.server.builder.last_error_of(index),
    }
    return replies.bulk_array(str(item).encode() for field in fields.items() for item in field)


def _curves(statistics: IndexStatistics) -> str:
    return "; ".join(
        " ".join((str(rows), *(f"{ef}:{recall:.4g}" for ef, recall in curve)))
        for rows, curve in statistics.curves
    )


def _list(session: Session, arguments: list[bytes]) -> Reply:
    return list_keys(session, session.database.keys_of(VectorIndex))


def _optimize(session: Session, arguments: list[bytes]) -> Barrier:
    index = existing_index(session, arguments[1])

    async def optimized() -> bytes:
        try:
            await session.server.builder.optimize(index)
        except BuildError as error:
            raise CommandError(f"ERR optimization failed: {error}") from error
        return OK

    return Barrier(optimized)


_KEY = (1, 1, 1)

COMMANDS = (
    Command(
        "vnew",
        _new,
        -3,
        "index dimension [METRIC (cosine | l2 | dot)] [M m] [EF_CONSTRUCTION ef]"
        " [QUANT (f32 | int8 | bf16)] [RECALL recall]",
        "Creates a vector index. Metrics: cosine distance (the default), Euclidean distance (l2, euclidean),"
        " negative inner product (dot, ip). M and EF_CONSTRUCTION are those of HNSW, QUANT is how the graphs"
        " hold the vectors, and RECALL is the share of the nearest members that searches aim to find.",
        "vector",
        ("write", "denyoom"),
        _KEY,
        since="engram 0.1.0",
    ),
    Command(
        "vinfo",
        _info,
        2,
        "index",
        "Returns the parameters of a vector index, what it holds, the recall measured in its graphs (for"
        " each segment its rows, and what each width (EF) of a search found of the nearest), and why the last"
        " graph could not be built, if so.",
        "vector",
        ("readonly", "fast"),
        _KEY,
        since="engram 0.1.0",
        complexity="O(S) where S is the number of segments and of blocks of newest rows.",
    ),
    Command(
        "vlist",
        _list,
        1,
        "",
        "Returns the keys that hold vector indices.",
        "vector",
        ("readonly",),
        since="engram 0.1.0",
        complexity="O(N) where N is the number of keys in the database.",
    ),
    Command(
        "voptimize",
        _optimize,
        2,
        "index",
        "Makes one graph of all rows of a vector index, without the dead; answers when it is in use. The"
        " client's next command waits for it, other clients do not.",
        "vector",
        ("write", "no_multi"),
        _KEY,
        since="engram 0.1.0",
        complexity="O(N*log(N)), in a process of its own.",
    ),
    Command(
        "vsave",
        save,
        1,
        "",
        "Writes a snapshot; answers when it is on disk. The same as SAVE.",
        "vector",
        ("admin", "no_multi"),
        since="engram 0.1.0",
        complexity="O(N), in a process of its own.",
    ),
)
