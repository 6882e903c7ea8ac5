"""Searches of a vector index: one query, or several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from engram.commands.arguments import NOT_AN_INTEGER, SYNTAX_ERROR, integer, number, options
from engram.commands.indices import read_index, recall_target
from engram.commands.limits import bounded_filter, check
from engram.commands.session import Session, Slot
from engram.commands.table import Command
from engram.commands.vectors import check_reply_size
from engram.errors import CommandError
from engram.index.distances import Floats
from engram.index.search import SearchOptions, SearchResult
from engram.index.vector_index import VectorIndex
from engram.index.vectors import decode_vector, join_vectors
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, Encoder

# About what a key and its distance take in a reply, and a JSON text.
_RESULT_BYTES = 64
_ATTRIBUTES_BYTES = 256

_VALUED = (b"EF", b"RECALL", b"FILTER", b"RADIUS")
_FLAGS = (b"EXACT", b"WITHATTRS", b"WITHVECTORS")

# No distance is greater, and a float32 can be as great.
_LARGEST_RADIUS = 1e38


def _options(session: Session, index: VectorIndex, k: int, words: Sequence[bytes]) -> SearchOptions:
    if not words:
        return SearchOptions(k)
    given = options(words, _VALUED, _FLAGS)
    ef = recall = condition = radius = None
    if (word := given.get(b"EF")) is not None:
        ef = integer(word)
        if ef < 1:
            raise CommandError(NOT_AN_INTEGER)
        # A wider search than there are members is a scan of them.
        check(min(ef, len(index)), session.server.config.vector_max_ef, "EF")
    if (word := given.get(b"RECALL")) is not None:
        recall = recall_target(word)
    if (word := given.get(b"RADIUS")) is not None:
        radius = max(-_LARGEST_RADIUS, min(number(word), _LARGEST_RADIUS))
    if (word := given.get(b"FILTER")) is not None:
        condition = bounded_filter(session, word)
    return SearchOptions(
        k,
        ef,
        recall,
        condition,
        radius,
        exact=b"EXACT" in given,
        attributes=b"WITHATTRS" in given,
        vectors=b"WITHVECTORS" in given,
    )


def _wanted_results(session: Session, index: VectorIndex, argument: bytes) -> int:
    k = integer(argument)
    if k < 0:
        raise CommandError(NOT_AN_INTEGER)
    # More than there are is all there are.
    check(min(k, len(index)), session.server.config.vector_max_results, "k")
    return k


def _search(session: Session, arguments: list[bytes]) -> bytes | Slot:
    index = read_index(session, arguments[1])
    query = decode_vector(arguments[2], index.parameters.dimension)
    search = _options(session, index, _wanted_results(session, index, arguments[3]), arguments[4:])
    if search.k == 0 or not len(index):
        return EMPTY_ARRAY
    encoder = session.encoder
    return _submit(session, index, query[None], search, lambda results: _encode(results[0], search, encoder))


def _search_many(session: Session, arguments: list[bytes]) -> bytes | Slot:
    index = read_index(session, arguments[1])
    k, count = _wanted_results(session, index, arguments[2]), integer(arguments[3])
    if count < 1:
        raise CommandError(NOT_AN_INTEGER)
    blobs, rest = arguments[4 : 4 + count], arguments[4 + count :]
    if len(blobs) < count:
        raise CommandError(SYNTAX_ERROR)
    check(count, session.server.config.vector_max_queries, "the number of queries")
    dimension = index.parameters.dimension
    queries = np.frombuffer(join_vectors(blobs, dimension), "<f4").reshape(count, dimension)
    search = _options(session, index, k, rest)
    if k == 0 or not len(index):
        return replies.array([EMPTY_ARRAY] * count)
    encoder = session.encoder
    return _submit(
        session,
        index,
        queries,
        search,
        lambda results: replies.array(_encode(result, search, encoder) for result in results),
    )


def _submit(
    session: Session,
    index: VectorIndex,
    queries: Floats,
    search: SearchOptions,
    encode: Callable[[list[SearchResult]], bytes],
) -> Slot:
    lsn = max(session.readable_lsn, index.oldest_view)
    slot = Slot(len(queries) * min(search.k, len(index)) * _result_size(index, search), lsn)
    check_reply_size(session, slot.size)

    began = time.perf_counter_ns()

    def done(results: list[SearchResult] | Exception) -> None:
        taken = time.perf_counter_ns() - began
        session.server.statistics.searches.record(len(queries), len(queries) * taken)
        if isinstance(results, CommandError):
            slot.fill(session.server.error(str(results)))
        elif isinstance(results, Exception):
            slot.fill(session.server.error(f"ERR search failed: {results}"))
        else:
            slot.fill(encode(results))

    session.server.searches.submit(
        index.id, index.view(lsn), queries, search, done, lambda: slot.awaited, session.id
    )
    return slot


def _result_size(index: VectorIndex, search: SearchOptions) -> int:
    """About how many bytes one result takes in a reply."""
    size = _RESULT_BYTES
    if search.attributes:
        size += _ATTRIBUTES_BYTES
    if search.vectors:
        size += 4 * index.parameters.dimension
    return size


def _encode(result: SearchResult, search: SearchOptions, encoder: Encoder) -> bytes:
    """The flat array of keys, distances, and what else was asked for."""
    columns = [result.keys, result.distances]
    if search.attributes:
        columns.append(result.attributes)
    if search.vectors:
        columns.append(result.vectors)
    width = len(columns)
    flat = [b""] * (width * len(result.keys))
    for place, column in enumerate(columns):
        flat[place::width] = column
    if not search.attributes:
        return replies.bulk_array(flat)
    # Of all these, attributes alone are null when they are empty.
    return replies.array(
        replies.bulk(item) if item or place % width != 2 else encoder.null for place, item in enumerate(flat)
    )


_KEY = (1, 1, 1)
_USAGE = "[EF ef] [RECALL recall] [FILTER expression] [RADIUS radius] [EXACT] [WITHATTRS] [WITHVECTORS]"
_COMPLEXITY = "O(log(N)) distances over graphs and O(H) over the H newest rows; O(N) with EXACT."

COMMANDS = (
    Command(
        "vsearch",
        _search,
        -4,
        f"index query k {_USAGE}",
        "Returns the k members nearest to a vector and their distances, closest first: of those a FILTER is"
        " true of, and at most at distance RADIUS. Graphs are searched EF wide, or as wide as reaches a"
        " RECALL, or not at all (EXACT). After each distance come the attributes or null (WITHATTRS) and the"
        " vector (WITHVECTORS).",
        "vector",
        ("readonly",),
        _KEY,
        since="engram 0.1.0",
        complexity=_COMPLEXITY,
    ),
    Command(
        "vmsearch",
        _search_many,
        -5,
        f"index k n query [query ...] {_USAGE}",
        "Searches for the members nearest to each of n vectors, as VSEARCH does for one, and returns an array"
        " for each.",
        "vector",
        ("readonly",),
        _KEY,
        since="engram 0.1.0",
        complexity=f"For each query {_COMPLEXITY}",
    ),
)
