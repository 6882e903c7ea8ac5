"""Searching views, a batch of queries at a time.

A search collects candidates: of each segment those that its graph finds, of the head, and of segments that
are better scanned, all rows that can be among the k nearest. Their distances are computed exactly, so that
only a graph can miss a neighbour.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from engram.index.codes import RowCodes
from engram.index.distances import Doubles, Floats, Queries
from engram.index.filters import Filter, Mask
from engram.index.head import ALIVE, Chunk, Lsns
from engram.index.matching import chunk_mask, segment_mask
from engram.index.planner import Walk, plan_walk, scans_all
from engram.index.scan import Block, Numbers, Scan, Source
from engram.index.segment import Segment
from engram.index.vector_index import InstalledSegment, View

# Queries times k of one pass: bounds its memory.
_PASS_RESULTS = 1 << 16
# Rows whose ranks are held at once.
_SCAN_ROWS = 8192
# Numbers of candidates' vectors that are gathered at once.
_GATHER_NUMBERS = 1 << 17
# Bytes of the strings of results that are copied at once; those of one result may be more.
_COPIED_BYTES = 4 << 20

# Share(call, count, worker) calls call(number, worker) once for each number below count, in whatever search
# threads are free, each with its own worker number, and returns when all have returned.
Share = Callable[[Callable[[int, int], None], int, int], None]


def call_in_turn(call: Callable[[int, int], None], count: int, worker: int) -> None:
    """Shares with nobody."""
    for number in range(count):
        call(number, worker)


def _as_floats(distances: Floats) -> list[float]:
    floats: list[float] = distances.tolist()
    return floats


@attrs.frozen(cache_hash=True)
class SearchOptions:
    """What is asked of a search. Searches of equal options run together.

    Attributes:
        k: how many of the nearest, at least 1.
        ef: how wide graphs are walked; None for what reaches `recall`.
        recall: the part of the true k nearest that should be found, in (0, 1]; None for the index's target.
        filter: only rows it is true of.
        radius: only rows at this distance or nearer, as results say it: to float32.
        exact: without graphs: none of the nearest is missed.
        attributes, vectors: whether results hold them.
        most: a result whose strings would take more bytes is given without them.
        encode_distances: makes what results hold of many distances at once, (n,), in the search thread.
    """

    k: int
    ef: int | None = None
    recall: float | None = None
    filter: Filter | None = None
    radius: float | None = None
    exact: bool = False
    attributes: bool = False
    vectors: bool = False
    most: int = attrs.field(default=sys.maxsize, eq=False)
    encode_distances: Callable[[Floats], list[Any]] = _as_floats


@attrs.frozen
class SearchResult:
    """Keys and their distances, closest first; of equal distances the older row first.

    Distances are compared as float64. They are given as float32, or as what `SearchOptions.encode_distances`
    makes of these.
    `attributes` (JSON texts, empty for rows without) and `vectors` (float32 bytes) are empty lists unless
    they were asked for. Where more than `SearchOptions.most` bytes would have to be copied, all lists are
    empty, and `excess` is how many.
    """

    keys: list[bytes]
    distances: list[Any]
    attributes: list[bytes] = attrs.field(factory=list)
    vectors: list[bytes] = attrs.field(factory=list)
    excess: int = 0


class _Candidates:
    """Rows that may be among the nearest, with exact distances."""

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._parts: list[tuple[Numbers, Numbers, Numbers, Doubles]] = []

    def add(self, source: Source, which: Numbers, positions: Numbers, distances: Doubles) -> None:
        """Takes rows at `positions` of a source, each for one of the queries `which`; all (n,)."""
        if len(which):
            self._sources.append(source)
            self._parts.append((which, source.row_ids[positions], positions, distances))

    def best(self, queries: Queries, options: SearchOptions, k: int) -> Iterator[SearchResult]:
        """The k nearest for each query."""
        count = len(queries.vectors)
        if not self._parts:
            yield from (SearchResult([], []) for _ in range(count))
            return
        if len(self._parts) == 1:
            ((which, row_ids, positions, distances),) = self._parts
        else:
            which, row_ids, positions, distances = map(np.concatenate, zip(*self._parts, strict=True))
        order = np.lexsort((row_ids, distances) if count == 1 else (row_ids, distances, which))
        if options.radius is not None:
            order = order[queries.rounded(distances[order]) <= options.radius]
        if count == 1:
            order = order[:k]
            lengths = np.array([len(order)])
        else:
            sorted_which = which[order]
            edges = np.searchsorted(sorted_which, np.arange(count + 1))
            order = order[np.arange(len(order)) - edges[sorted_which] < k]
            lengths = np.minimum(edges[1:] - edges[:-1], k)
        if len(order) * self._longest_copied(options) <= _COPIED_BYTES:
            yield from self._results(order, lengths.tolist(), positions, distances, queries, options)
            return
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        copied = np.concatenate([[0], np.cumsum(self._copied(order, positions, options))])
        sizes = np.diff(copied[bounds]).tolist()
        first = 0
        while first < count:
            last, size = first + 1, sizes[first]
            while last < count and size + sizes[last] <= _COPIED_BYTES:
                size += sizes[last]
                last += 1
            if size > options.most and last == first + 1:
                yield SearchResult([], [], excess=size)
            else:
                part = order[bounds[first] : bounds[last]]
                yield from self._results(
                    part, lengths[first:last].tolist(), positions, distances, queries, options
                )
            first = last

    def _longest_copied(self, options: SearchOptions) -> int:
        """Bytes that the strings of a candidate take at most where they are copied: chunks hold them."""
        longest = 0
        for source, _ in zip(self._sources, self._parts, strict=True):
            size = 4 * source.vectors.shape[1] if options.vectors else 0
            if isinstance(source, Segment):
                size += source.keys.longest
                size += source.attributes.longest if options.attributes else 0
            longest = max(longest, size)
        return longest

    def _copied(self, order: Numbers, positions: Numbers, options: SearchOptions) -> Numbers:
        """Bytes of the strings of each candidate that would be copied, (n,)."""
        sizes = np.zeros(len(order), np.int64)
        for source, members in self._by_source(order):
            rows = positions[order[members]]
            if options.vectors:
                sizes[members] += 4 * source.vectors.shape[1]
            if isinstance(source, Segment):
                sizes[members] += source.keys.lengths(rows)
                if options.attributes:
                    sizes[members] += source.attributes.lengths(rows)
        return sizes

    def _results(
        self,
        order: Numbers,
        lengths: Sequence[int],
        positions: Numbers,
        distances: Doubles,
        queries: Queries,
        options: SearchOptions,
    ) -> list[SearchResult]:
        """The results of queries that have so many candidates each, `order` of them in all."""
        encoded = options.encode_distances(queries.rounded(distances[order]))
        rows = positions[order]
        keys = self._strings(order, rows, lambda source, rows: source.keys_at(rows))
        attributes: list[bytes] = []
        vectors: list[bytes] = []
        if options.attributes:
            attributes = self._strings(order, rows, lambda source, rows: source.attributes_at(rows))
        if options.vectors:
            vectors = self._strings(order, rows, _vectors_at)
        results = []
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            results.append(SearchResult(keys[part], encoded[part], attributes[part], vectors[part]))
            start = part.stop
        return results

    def _strings(
        self, candidates: Numbers, rows: Numbers, strings_at: Callable[[Source, Numbers], list[bytes]]
    ) -> list[bytes]:
        """What `strings_at` says of candidates, which are at `rows` of their sources; (n,) both."""
        if len(self._sources) == 1:
            return strings_at(self._sources[0], rows)
        strings = [b""] * len(candidates)
        for source, members in self._by_source(candidates):
            found = strings_at(source, rows[members])
            for place, string in zip(members.tolist(), found, strict=True):
                strings[place] = string
        return strings

    def _by_source(self, candidates: Numbers) -> Iterator[tuple[Source, Numbers]]:
        """Each source, and where among some candidates its own are."""
        start = 0
        for source, part in zip(self._sources, self._parts, strict=True):
            end = start + len(part[0])
            (members,) = ((candidates >= start) & (candidates < end)).nonzero()
            if len(members):
                yield source, members
            start = end


def _vectors_at(source: Source, rows: Numbers) -> list[bytes]:
    return [row.tobytes() for row in source.vectors[rows].astype("<f4")]


def search_each(
    views: Sequence[View],
    queries: Floats,
    options: SearchOptions,
    worker: int,
    share: Share = call_in_turn,
) -> Iterator[SearchResult]:
    """The k nearest live rows of each query, shape (n, dimension), as its view shows them.

    There is a view for each query, all of one index and one generation. With a filter there are k results
    wherever k rows match. No two calls with the same `worker` may run at once. The segments' graphs are
    walked through `share`. Results are made as they are asked for, some at a time.

    Raises:
        ValueError: k is not positive.
    """
    if options.k < 1:
        raise ValueError("k must be positive")
    k = max(1, min(options.k, max(view.rows for view in views)))
    step = max(1, _PASS_RESULTS // k)
    for start in range(0, len(views), step):
        part = slice(start, start + step)
        yield from _Pass(views[part], queries[part], k, options).run(worker, share)


def search_batch(
    views: Sequence[View],
    queries: Floats,
    options: SearchOptions,
    worker: int,
    share: Share = call_in_turn,
) -> list[SearchResult]:
    """All results of `search_each` at once."""
    return list(search_each(views, queries, options, worker, share))


@attrs.frozen(eq=False)
class _Near:
    """Rows at `positions` (n, m) for `queries`, `which` of the batch (n,): those `shown`, all when None.

    The distances of the others are infinite.
    """

    queries: Queries
    which: Numbers
    positions: Numbers
    distances: Doubles
    shown: Mask | None


@attrs.frozen(eq=False)
class _Walked:
    """What walks of one graph found, and the queries, if any, for which that is not enough."""

    found: list[_Near]
    short: Numbers | None


class _Pass:
    """One search of a batch of queries."""

    def __init__(self, views: Sequence[View], vectors: Floats, k: int, options: SearchOptions) -> None:
        self._views = views
        self._k = k
        self._options = options
        self._queries = Queries.of(views[0].parameters.metric, vectors)
        self._lsns: Lsns = np.array([view.lsn for view in views], np.int64)
        self._candidates = _Candidates()

    def run(self, worker: int, share: Share) -> Iterator[SearchResult]:
        planned: list[tuple[InstalledSegment, Mask | None, Walk]] = []
        scanned: list[tuple[InstalledSegment, Mask | None, Numbers | None]] = []
        for installed in self._views[0].segments:
            mask = None
            if self._options.filter is not None:
                mask = segment_mask(installed.segment, self._options.filter)
            walk = self._plan(installed, mask)
            if walk is None:
                scanned.append((installed, mask, None))
            else:
                planned.append((installed, mask, walk))
        found: list[_Near] = []
        for (installed, mask, _), walked in zip(planned, self._walk_all(planned, worker, share), strict=True):
            for near in walked.found:
                self._take(installed.segment, near)
            found += walked.found
            if walked.short is not None:
                scanned.append((installed, mask, walked.short))
        if scanned or any(view.head_rows for view in self._views):
            self._scan_all(scanned, found)
        return self._candidates.best(self._queries, self._options, self._k)

    def _walk_all(
        self, planned: Sequence[tuple[InstalledSegment, Mask | None, Walk]], worker: int, share: Share
    ) -> list[_Walked]:
        walked: dict[int, _Walked] = {}

        def call(number: int, worker: int) -> None:
            walked[number] = self._walk(*planned[number], worker)

        share(call, len(planned), worker)
        return [walked[number] for number in range(len(planned))]

    def _plan(self, installed: InstalledSegment, mask: Mask | None) -> Walk | None:
        options, segment = self._options, installed.segment
        if options.exact:
            return None
        expansion = options.ef
        if expansion is None:
            target = self._views[0].parameters.recall if options.recall is None else options.recall
            expansion = segment.expansion_for(target)
        return plan_walk(installed.rows, _qualifying(installed, mask), self._k, expansion)

    def _walk(self, installed: InstalledSegment, mask: Mask | None, walk: Walk, worker: int) -> _Walked:
        graph = installed.segment.graphs[worker]
        queries, which = self._queries, np.arange(len(self._lsns))
        found: list[_Near] = []
        while True:
            positions = graph.search(queries.vectors, queries.norms, walk.count, walk.expansion)
            shown = positions >= 0
            if installed.dead:
                shown &= installed.deaths[positions] > self._lsns[which, None]
            if mask is not None:
                shown &= mask[positions]
            distances = queries.distances_at(installed.segment.vectors, installed.segment.norms, positions)
            if shown.all():
                found.append(_Near(queries, which, positions, distances, None))
                return _Walked(found, None)
            short = self._short(installed, mask, which, shown.sum(axis=1))
            shown &= ~short[:, None]
            distances[~shown] = np.inf
            found.append(_Near(queries, which, positions, distances, shown))
            if not short.any():
                return _Walked(found, None)
            wider = walk.wider(installed.rows, _qualifying(installed, mask))
            queries, which = queries.select(np.flatnonzero(short)), which[short]
            if wider is None:
                return _Walked(found, which)
            walk = wider

    def _short(self, installed: InstalledSegment, mask: Mask | None, which: Numbers, found: Numbers) -> Mask:
        """For which queries fewer rows were `found` than there are, and than k."""
        short = found < self._k
        for number in np.flatnonzero(short).tolist():
            alive = installed.deaths > self._lsns[which[number]]
            short[number] = found[number] < np.count_nonzero(alive if mask is None else alive & mask)
        return short

    def _take(self, segment: Segment, near: _Near) -> None:
        kept: Any = slice(None)
        if near.shown is not None:
            (kept,) = near.shown.ravel().nonzero()
        which = near.which.repeat(near.positions.shape[1])[kept]
        self._candidates.add(segment, which, near.positions.ravel()[kept], near.distances.ravel()[kept])

    def _scan_all(
        self, scanned: Sequence[tuple[InstalledSegment, Mask | None, Numbers | None]], near: Sequence[_Near]
    ) -> None:
        """Scans these segments and the head; what graphs have found lets it pass over most rows."""
        visible = np.array([view.head_rows for view in self._views], np.int64)
        scan = Scan(self._queries, self._k, self._lsns, visible)
        for each in near:
            scan.offer(each.queries.upper_ranks(each.distances), each.which)
        for installed, mask, which in scanned:
            self._scan_segment(scan, installed, mask, which)
        self._scan_head(scan)
        for found in scan.found():
            source, rows = found.source, found.positions
            distances = self._queries.distances(found.which, source.vectors[rows], source.norms_at(rows))
            self._candidates.add(source, found.which, rows, distances)

    def _scan_segment(
        self, scan: Scan, installed: InstalledSegment, mask: Mask | None, which: Numbers | None
    ) -> None:
        segment, rows = installed.segment, installed.rows
        if mask is None or scans_all(rows, int(np.count_nonzero(mask))):
            for start in range(0, rows, _SCAN_ROWS):
                part = slice(start, min(start + _SCAN_ROWS, rows))
                block = _segment_block(installed, np.arange(start, part.stop), part, mask)
                scan.add([block], which)
            return
        (picked,) = mask.nonzero()
        step = max(1, _GATHER_NUMBERS // segment.vectors.shape[1])
        for start in range(0, len(picked), step):
            positions = picked[start : start + step]
            scan.add([_segment_block(installed, positions, positions, None)], which)

    def _scan_head(self, scan: Scan) -> None:
        # Within a generation heads only grow: the latest holds what all others show, and every death that one
        # of them may see. (One with as many rows may hold a chunk that has been replaced since.)
        latest = max(self._views, key=lambda view: view.lsn)
        blocks: list[Block] = []
        offset = rows = 0
        for chunk, count in latest.head:
            codes = chunk.codes(self._queries, count)
            coded = 0 if codes is None else codes.rows
            # Codes of more rows than any of these views shows are for other searches: those rows are hidden.
            covered = max(count, coded)
            mask = None
            if self._options.filter is not None:
                mask = chunk_mask(chunk, covered, self._options.filter)
            if mask is None or mask.any():
                rows += covered
                if codes is not None:
                    blocks.append(_head_block(chunk, slice(coded), mask, offset, codes))
                if coded < covered:
                    blocks.append(_head_block(chunk, slice(coded, covered), mask, offset, None))
            offset += count
            if rows >= _SCAN_ROWS:
                scan.add(blocks)
                blocks, rows = [], 0
        if blocks:
            scan.add(blocks)


def _segment_block(
    installed: InstalledSegment, positions: Numbers, part: slice | Numbers, mask: Mask | None
) -> Block:
    segment = installed.segment
    return Block(
        segment,
        positions,
        segment.vectors[part],
        segment.norms[part],
        installed.deaths[part] if installed.dead else None,
        None if mask is None else mask[part],
    )


def _head_block(chunk: Chunk, part: slice, mask: Mask | None, offset: int, codes: RowCodes | None) -> Block:
    start = part.start or 0
    return Block(
        chunk,
        np.arange(start, part.stop),
        chunk.vectors[part],
        chunk.norms(part.stop)[start:],
        chunk.deaths[part] if chunk.dead else None,
        None if mask is None else mask[part],
        offset + start,
        codes,
    )


def _qualifying(installed: InstalledSegment, mask: Mask | None) -> int:
    """How many rows of a segment live, and match."""
    if mask is None:
        return installed.live
    return int(np.count_nonzero(mask & (installed.deaths == ALIVE) if installed.dead else mask))
