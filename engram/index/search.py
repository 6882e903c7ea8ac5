"""Searching views, in batches, and the service that gathers the batches.

A search collects candidates: of the head all rows that can be among the k nearest, of each segment those
that its graph finds. Their distances are then computed exactly, so that only a graph can miss a neighbour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import trio
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engram.index.distances import Doubles, Floats, Queries, format_distances
from engram.index.head import Chunk, Lsns
from engram.index.recall import OVERSAMPLING, SCAN_ROWS_PER_EXPANSION
from engram.index.segment import Segment
from engram.index.vector_index import InstalledSegment, View

# Queries times k of one pass: bounds its memory.
_PASS_RESULTS = 1 << 16
# Rows of the head, or of a segment, whose ranks are held at once.
_SCAN_ROWS = 8192
# Numbers of candidates' vectors that are gathered at once.
_GATHER_NUMBERS = 1 << 21
_GROUP = 32

# Greater than any rank, so much that no error added to it overflows.
_LARGEST = np.float32(1e38)

Numbers = npt.NDArray[np.int64]


@attrs.frozen
class SearchResult:
    """Keys and the texts of their distances, closest first; of equal distances the older row first."""

    keys: list[bytes]
    distances: list[bytes]


@attrs.frozen(eq=False)
class _Block:
    """Rows to be scanned, from position `start` of a source; `offset` rows come before them in the scan."""

    source: int
    start: int
    offset: int
    vectors: Floats
    norms: Doubles
    deaths: Lsns | None


class _Candidates:
    """What may be among the nearest: number of the query, source, position in it, rank and its error."""

    def __init__(self) -> None:
        self.sources: list[Chunk | Segment] = []
        self._parts: list[tuple[Numbers, Numbers, Numbers, Floats, Floats]] = []

    def add_source(self, source: Chunk | Segment) -> int:
        self.sources.append(source)
        return len(self.sources) - 1

    def add(self, queries: Numbers, source: int, positions: Numbers, ranks: Floats, errors: Floats) -> None:
        self._parts.append((queries, np.full(len(queries), source), positions, ranks, errors))

    def best(self, queries: Queries, k: int) -> list[SearchResult]:
        """The k nearest for each query, by exact distances."""
        count = len(queries.vectors)
        if not self._parts:
            return [SearchResult([], []) for _ in range(count)]
        which, sources, positions, ranks, errors = map(np.concatenate, zip(*self._parts, strict=True))

        upper = ranks + errors
        order = np.lexsort((upper, which))
        starts, stops = _bounds(which[order], count)
        limits = np.full(count, _LARGEST, np.float32)
        full = stops - starts > k
        limits[full] = upper[order[starts[full] + k - 1]] + queries.error[full]
        kept = np.flatnonzero(ranks <= limits[which] + errors)
        which, sources, positions = which[kept], sources[kept], positions[kept]

        distances = np.empty(len(kept), np.float32)
        row_ids = np.empty(len(kept), np.int64)
        step = max(1, _GATHER_NUMBERS // queries.vectors.shape[1])
        for source, members in self._by_source(sources):
            row_ids[members] = source.row_ids[positions[members]]
            for start in range(0, len(members), step):
                part = members[start : start + step]
                rows = positions[part]
                distances[part] = queries.distances(which[part], source.vectors[rows], source.norms_at(rows))

        order = np.lexsort((row_ids, distances, which))
        starts, stops = _bounds(which[order], count)
        stops = np.minimum(stops, starts + k)
        lengths = (stops - starts).tolist()
        chosen = order[np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])]
        texts = format_distances(distances[chosen])
        sources, positions = sources[chosen], positions[chosen]
        keys = [b""] * len(chosen)
        for source, members in self._by_source(sources):
            for place, key in zip(members.tolist(), source.keys_at(positions[members]), strict=True):
                keys[place] = key
        results = []
        start = 0
        for length in lengths:
            stop = start + length
            results.append(SearchResult(keys[start:stop], texts[start:stop]))
            start = stop
        return results

    def _by_source(self, sources: Numbers) -> list[tuple[Chunk | Segment, Numbers]]:
        members = ((source, np.flatnonzero(sources == number)) for number, source in enumerate(self.sources))
        return [(source, found) for source, found in members if len(found)]


def _bounds(sorted_numbers: Numbers, count: int) -> tuple[Numbers, Numbers]:
    """Where the run of each number below `count` starts and stops."""
    edges = np.searchsorted(sorted_numbers, np.arange(count + 1))
    return edges[:-1], edges[1:]


def search_batch(
    views: Sequence[View], queries: Floats, k: int, ef: int | None, worker: int
) -> list[SearchResult]:
    """The k nearest live rows of each query, shape (n, dimension), as its view shows them.

    All views are of one index and one generation. `ef` is how wide graphs are searched, None
    for what was measured to be enough. No two calls with the same `worker` may run at once.

    Raises:
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError("k must be positive")
    k = max(1, min(k, max(view.live for view in views)))
    step = max(1, _PASS_RESULTS // k)
    results: list[SearchResult] = []
    for start in range(0, len(views), step):
        part = slice(start, start + step)
        results += _search_pass(views[part], queries[part], k, ef, worker)
    return results


def _search_pass(
    views: Sequence[View], vectors: Floats, k: int, ef: int | None, worker: int
) -> list[SearchResult]:
    queries = Queries.of(views[0].parameters.metric, vectors)
    lsns = np.array([view.lsn for view in views], np.int64)
    candidates = _Candidates()
    _search_head(candidates, views, queries, lsns, k)
    for installed in views[0].segments:
        _search_segment(candidates, installed, queries, lsns, k, ef, worker)
    return candidates.best(queries, k)


def _search_head(
    candidates: _Candidates, views: Sequence[View], queries: Queries, lsns: Lsns, k: int
) -> None:
    # Within a generation heads only grow: the longest holds what all others show.
    longest = max(views, key=lambda view: view.head_rows)
    visible = np.array([view.head_rows for view in views], np.int64)
    blocks: list[_Block] = []
    offset = rows = 0
    for chunk in longest.chunks:
        count = min(chunk.count, longest.head_rows - offset)
        deaths = chunk.deaths[:count] if chunk.dead else None
        blocks.append(
            _Block(candidates.add_source(chunk), 0, offset, chunk.vectors[:count], chunk.norms(count), deaths)
        )
        offset += count
        rows += count
        if rows >= _SCAN_ROWS:
            _scan(candidates, blocks, queries, np.arange(len(lsns)), lsns, visible, k)
            blocks, rows = [], 0
    if blocks:
        _scan(candidates, blocks, queries, np.arange(len(lsns)), lsns, visible, k)


def _search_segment(
    candidates: _Candidates,
    installed: InstalledSegment,
    queries: Queries,
    lsns: Lsns,
    k: int,
    ef: int | None,
    worker: int,
) -> None:
    segment, rows = installed.segment, installed.rows
    source = candidates.add_source(segment)
    everything = np.arange(len(lsns))
    expansion = segment.expansion if ef is None else ef
    # What is dead takes places among the candidates.
    count = OVERSAMPLING * k * rows // max(1, installed.live)
    expansion = max(expansion * rows // max(1, installed.live), count) if expansion else rows
    if expansion * SCAN_ROWS_PER_EXPANSION >= rows:
        _scan_segment(candidates, source, installed, queries, everything, lsns, k)
        return
    positions = segment.graphs[worker].search(queries.vectors, queries.norms, count, expansion)
    shown = positions >= 0
    if installed.dead:
        shown &= installed.deaths[positions] > lsns[:, None]
    found = np.count_nonzero(shown, axis=1)
    if found.min() < k:
        # A graph may hold rows that no walk reaches.
        short = [
            number
            for number in np.flatnonzero(found < k).tolist()
            if found[number] < np.count_nonzero(installed.deaths > lsns[number])
        ]
        if short:
            _scan_segment(candidates, source, installed, queries, np.array(short), lsns, k)
            shown[short] = False
    step = max(1, _GATHER_NUMBERS // (count * segment.vectors.shape[1]))
    for start in range(0, len(lsns), step):
        part = slice(start, start + step)
        near = positions[part]
        terms = queries.terms(segment.norms[near.ravel()])
        products = np.matmul(segment.vectors[near], queries.scaled[part, :, None])[:, :, 0]
        ranks = terms.ranks(products.ravel())
        kept = np.flatnonzero(shown[part].ravel())
        candidates.add(
            everything[part].repeat(count)[kept], source, near.ravel()[kept], ranks[kept], terms.error[kept]
        )


def _scan_segment(
    candidates: _Candidates,
    source: int,
    installed: InstalledSegment,
    queries: Queries,
    which: Numbers,
    lsns: Lsns,
    k: int,
) -> None:
    segment, rows = installed.segment, installed.rows
    visible = np.full(len(lsns), rows)
    for start in range(0, rows, _SCAN_ROWS):
        part = slice(start, start + _SCAN_ROWS)
        deaths = installed.deaths[part] if installed.dead else None
        block = _Block(source, start, start, segment.vectors[part], segment.norms[part], deaths)
        _scan(candidates, [block], queries, which, lsns, visible, k)


def _scan(
    candidates: _Candidates,
    blocks: Sequence[_Block],
    queries: Queries,
    which: Numbers,
    lsns: Lsns,
    visible: Numbers,
    k: int,
) -> None:
    """Adds every row of the blocks that may be among the k nearest of a query in `which`.

    `visible` says how many rows of the whole scan each query of the batch sees.
    """
    width = sum(len(block.vectors) for block in blocks)
    padded = -(-width // _GROUP) * _GROUP
    scaled, lsns, visible = queries.scaled[which], lsns[which], visible[which]
    ranks = np.empty((len(which), padded), np.float32)
    ranks[:, width:] = np.inf
    errors = np.zeros(padded, np.float32)
    sources = np.empty(width, np.int64)
    positions = np.empty(width, np.int64)
    column = 0
    for block in blocks:
        end = column + len(block.vectors)
        part = ranks[:, column:end]
        np.matmul(scaled, block.vectors.T, out=part)
        terms = queries.terms(block.norms)
        terms.ranks(part)
        _hide(part, block, lsns, visible)
        errors[column:end] = terms.error
        sources[column:end] = block.source
        positions[column:end] = np.arange(block.start, block.start + end - column)
        column = end
    limits = np.minimum(_kth_least(ranks + errors, k) + queries.error[which], _LARGEST)
    rows, columns = np.divmod(np.flatnonzero(ranks <= limits[:, None] + errors), padded)
    for block in blocks:
        members = sources[columns] == block.source
        candidates.add(
            which[rows[members]],
            block.source,
            positions[columns[members]],
            ranks[rows[members], columns[members]],
            errors[columns[members]],
        )


def _hide(ranks: Floats, block: _Block, lsns: Lsns, visible: Numbers) -> None:
    """Puts the rows out of reach that a query does not see."""
    if block.deaths is not None:
        first, last = lsns.min(), lsns.max()
        ranks[:, block.deaths <= first] = np.inf
        # A row that died between the oldest and the newest view is dead to some of them only.
        for column in np.flatnonzero((block.deaths > first) & (block.deaths <= last)):
            ranks[lsns >= block.deaths[column], column] = np.inf
    if visible.min() < block.offset + ranks.shape[1]:
        for number, count in enumerate((visible - block.offset).tolist()):
            ranks[number, max(0, count) :] = np.inf


def _kth_least(values: Floats, k: int) -> Floats:
    """No less than the k-th least value of each row (shape (n, a multiple of _GROUP)), infinite without one.

    Of long rows only the least of every group is looked at, which is hardly more and much quicker.
    """
    count, width = values.shape
    if width // _GROUP >= 4 * k:
        values = values.reshape(count, _GROUP, width // _GROUP).min(axis=1)
        width //= _GROUP
    if k > width:
        return np.full(count, np.inf, np.float32)
    return np.partition(values, k - 1, axis=1)[:, k - 1]


Done = Callable[[SearchResult | Exception], None]


@attrs.frozen(eq=False)
class _Search:
    view: View
    query: Floats
    k: int
    ef: int | None
    done: Done
    wanted: Callable[[], bool]


class SearchService:
    """Runs searches in `workers` threads, in batches of up to `max_batch`.

    A batch is what waits for one index: without a timer, the next one is what has come in during the
    last. The counters are `searches` and `batches` run, and searches `waiting`.
    """

    def __init__(self, workers: int, max_batch: int) -> None:
        self._workers = workers
        self._max_batch = max_batch
        # In the order in which the indices are next.
        self._queues: dict[int, deque[_Search]] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self._limiter = trio.CapacityLimiter(workers)
        self.searches = 0
        self.batches = 0
        self.waiting = 0

    def submit(
        self,
        index_id: int,
        view: View,
        query: Floats,
        k: int,
        ef: int | None,
        done: Done,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Queues a search; `done` is called on the loop with its result, or with what went wrong.

        `query` has shape (dimension,). See `search_batch` for k and ef. A search that is not `wanted` any
        more when its turn comes is dropped.
        """
        queue = self._queues.get(index_id)
        if queue is None:
            queue = self._queues[index_id] = deque()
        queue.append(_Search(view, query, k, ef, done, wanted))
        self.waiting += 1
        self._idle.unpark()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled. A search under way is finished first; the rest is not answered."""
        # BLAS threads of its own would spin beside the workers. The limit is the whole process's.
        threadpool_limits(1, user_api="blas")
        async with trio.open_nursery() as nursery:
            for worker in range(self._workers):
                nursery.start_soon(self._work, worker)
            task_status.started()

    async def _work(self, worker: int) -> None:
        while True:
            if not self._queues:
                await self._idle.park()
                continue
            await self._search(worker)

    async def _search(self, worker: int) -> None:
        # What this holds, views of indices that may be dropped, is let go of before a worker idles.
        batch = self._take()
        if not batch:
            return
        outcomes = await trio.to_thread.run_sync(_run_batch, batch, worker, limiter=self._limiter)
        self.batches += 1
        self.searches += len(batch)
        for search, outcome in zip(batch, outcomes, strict=True):
            search.done(outcome)

    def _take(self) -> list[_Search]:
        index_id, queue = next(iter(self._queues.items()))
        batch = [queue.popleft() for _ in range(min(len(queue), self._max_batch))]
        del self._queues[index_id]
        if queue:
            self._queues[index_id] = queue
        self.waiting -= len(batch)
        return [search for search in batch if search.wanted()]


def _run_batch(batch: Sequence[_Search], worker: int) -> list[SearchResult | Exception]:
    """The outcome of each search; those of equal generation, k and ef are run together."""
    groups: dict[tuple[int, int, int | None], list[int]] = {}
    for number, search in enumerate(batch):
        groups.setdefault((search.view.generation, search.k, search.ef), []).append(number)
    outcomes: list[SearchResult | Exception] = [SearchResult([], [])] * len(batch)
    for members in groups.values():
        searches = [batch[number] for number in members]
        for number, outcome in zip(members, _run_group(searches, worker), strict=True):
            outcomes[number] = outcome
    return outcomes


def _run_group(searches: Sequence[_Search], worker: int) -> Sequence[SearchResult | Exception]:
    first = searches[0]
    try:
        queries = np.stack([search.query for search in searches])
        return search_batch([search.view for search in searches], queries, first.k, first.ef, worker)
    except Exception as error:
        if len(searches) == 1:
            return [error]
    # Whichever of them it was, the others have an answer.
    return [outcome for search in searches for outcome in _run_group([search], worker)]
