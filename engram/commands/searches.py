"""Searches of a vector index: one query, or several at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from engram.commands.allowance import Allowance, reply_too_long
from engram.commands.arguments import (
    NOT_AN_INTEGER,
    SYNTAX_ERROR,
    integer,
    number,
    options,
    read_vector,
    read_vectors,
)
from engram.commands.distances import format_distances
from engram.commands.indices import read_index, recall_target
from engram.commands.limits import Compiled, bounded_filter, check
from engram.commands.long_filters import filtering
from engram.commands.session import Session, Slot
from engram.commands.table import Command, Reply
from engram.errors import CommandError
from engram.index.distances import Floats
from engram.index.search import SearchOptions, SearchResult
from engram.index.vector_index import VectorIndex, View
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, Encoder

# About what a key and its distance take in a reply, and what stands around an attribute or a vector.
_RESULT_BYTES = 64
_FRAME_BYTES = 16

# Parts of a reply that are joined in one go: nothing else runs in this process meanwhile.
_PARTS_AT_ONCE = 1 << 14

_VALUED = (b"EF", b"RECALL", b"FILTER", b"RADIUS")
_FLAGS = (b"EXACT", b"WITHATTRS", b"WITHVECTORS")

# No distance is greater, and a float32 can be as great.
_LARGEST_RADIUS = 1e38


@lru_cache(maxsize=64)
def _plain_options(k: int, most: int) -> SearchOptions:
    # Searches are put together by their options: the same object is compared at no cost.
    return SearchOptions(k, most=most, encode_distances=format_distances)


def _options(
    session: Session, index: VectorIndex, k: int, words: Sequence[bytes], compiled: Compiled | None
) -> SearchOptions:
    most = session.server.config.client_output_buffer_limit
    if not words:
        return _plain_options(k, most)
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
        condition = bounded_filter(session, word, compiled)
    return SearchOptions(
        k,
        ef,
        recall,
        condition,
        radius,
        exact=b"EXACT" in given,
        attributes=b"WITHATTRS" in given,
        vectors=b"WITHVECTORS" in given,
        most=most,
        encode_distances=format_distances,
    )


def _wanted_results(session: Session, index: VectorIndex, argument: bytes) -> int:
    k = integer(argument)
    if k < 0:
        raise CommandError(NOT_AN_INTEGER)
    # More than there are is all there are.
    check(min(k, len(index)), session.server.config.vector_max_results, "k")
    return k


def _search(session: Session, arguments: list[bytes], compiled: Compiled | None) -> Reply:
    index = read_index(session, arguments[1])
    query = read_vector(arguments[2], index.parameters.dimension)
    search = _options(session, index, _wanted_results(session, index, arguments[3]), arguments[4:], compiled)
    if search.k == 0 or not len(index):
        return EMPTY_ARRAY
    return _submit(session, index, query[None], search, _One)


def _search_many(session: Session, arguments: list[bytes], compiled: Compiled | None) -> Reply:
    index = read_index(session, arguments[1])
    k, count = _wanted_results(session, index, arguments[2]), integer(arguments[3])
    if count < 1:
        raise CommandError(NOT_AN_INTEGER)
    blobs, rest = arguments[4 : 4 + count], arguments[4 + count :]
    if len(blobs) < count:
        raise CommandError(SYNTAX_ERROR)
    check(count, session.server.config.vector_max_queries, "the number of queries")
    dimension = index.parameters.dimension
    queries = np.frombuffer(read_vectors(blobs, dimension), "<f4").reshape(count, dimension)
    search = _options(session, index, k, rest, compiled)
    if k == 0 or not len(index):
        return replies.array([EMPTY_ARRAY] * count)
    return _submit(session, index, queries, search, _Many)


def _submit(
    session: Session, index: VectorIndex, queries: Floats, search: SearchOptions, reply: type[_One]
) -> Slot:
    lsn = max(session.readable_lsn, index.oldest_view)
    view = index.view(lsn)
    server = session.server
    slot = Slot(len(queries) * min(search.k, len(index)) * _result_size(view, search), lsn)
    allowance = server.held_replies.allowance(session, session.allowance)
    encoding = reply(search, session.encoder, allowance, slot)
    began = time.perf_counter_ns()

    def done(outcome: bytes | Exception) -> None:
        taken = time.perf_counter_ns() - began
        # From here on the outbox counts it.
        allowance.release()
        session.fill(slot, outcome, "search failed")
        server.statistics.searches.record(len(queries), len(queries) * taken)

    server.searches.submit(
        index.id, view, queries, search, done, lambda: slot.awaited, session.id, encoding=encoding
    )
    return slot


def _result_size(view: View, search: SearchOptions) -> int:
    """About how many bytes one result takes in a reply."""
    size = _RESULT_BYTES
    if search.attributes:
        size += _FRAME_BYTES + view.attribute_bytes // max(1, view.rows)
    if search.vectors:
        size += _FRAME_BYTES + 4 * view.parameters.dimension
    return size


class _One:
    """The reply to one query. Its bytes are counted before they are joined."""

    def __init__(self, search: SearchOptions, encoder: Encoder, allowance: Allowance, slot: Slot) -> None:
        self._search = search
        self._encoder = encoder
        self._allowance = allowance
        self._slot = slot

    def encode(self, result: SearchResult) -> bytes:
        """The flat array of keys, distances, and what else was asked for."""
        if not self._slot.awaited:
            return b""
        if result.excess:
            raise reply_too_long(result.excess)
        parts = self._parts(result)
        joined = []
        for start in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[start : start + _PARTS_AT_ONCE]
            self._allowance.take(sum(map(len, some)))
            joined.append(b"".join(some))
        return joined[0] if len(joined) == 1 else b"".join(joined)

    def _parts(self, result: SearchResult) -> list[bytes]:
        search = self._search
        columns = [result.keys, result.distances]
        if search.attributes:
            columns.append(result.attributes)
        if search.vectors:
            columns.append(result.vectors)
        width = len(columns)
        flat = [b""] * (width * len(result.keys))
        for place, column in enumerate(columns):
            flat[place::width] = column
        parts = replies.bulk_array_parts(flat)
        if search.attributes:
            # Of all these, attributes alone are null when they are empty.
            for place, text in enumerate(result.attributes):
                if not text:
                    start = 1 + 3 * (place * width + 2)
                    parts[start : start + 3] = self._encoder.null, b"", b""
        return parts

    def join(self, encoded: list[bytes]) -> bytes:
        """The reply to the only query."""
        (reply,) = encoded
        return reply


class _Many(_One):
    """The reply to several queries: an array for each."""

    def join(self, encoded: list[bytes]) -> bytes:
        """An array of them all."""
        return replies.array(encoded)


_KEY = (1, 1, 1)
_USAGE = "[EF ef] [RECALL recall] [FILTER expression] [RADIUS radius] [EXACT] [WITHATTRS] [WITHVECTORS]"
_COMPLEXITY = "O(log(N)) distances over graphs and O(H) over the H newest rows; O(N) with EXACT."

COMMANDS = (
    Command(
        "vsearch",
        filtering(_search, 4),
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
        filtering(_search_many, 5),
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
