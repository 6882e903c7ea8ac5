"""How wide a graph must be searched: measured on rows that are kept out of it at first, and their neighbours.

Recall is the part of the 10 truly nearest rows that a search finds. It grows with the width (ef) of the
walk, at a rate that depends on the rows and on how many there are, so it is measured for each graph.

Rows are found more easily than queries when others are nearly the same: a graph of rows of which each has
several copies, a little altered, found 0.993 of the neighbours of one more copy, and 0.96 of those of real
queries. So each row that serves as a query is kept out together with its nearest neighbours, in which a
query would find no copy of itself either. `benchmarks/recall_curves.py` compares the outcome with real
queries.

Of rows with many copies that are quite the same, those are the nearest, and what a walk may miss. So the same
queries are asked of the whole graph, too, and the lower of the two curves counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from engram.index.distances import TINY_NORM, Doubles, Floats, Queries
from engram.index.graph import Graph
from engram.index.texts import Positions

# Searches in a graph ask it for so many times k rows, so that quantisation does not cost neighbours.
OVERSAMPLING = 2
# A walk costs about as much for one of its width (ef) as a scan does for so many rows.
SCAN_ROWS_PER_EXPANSION = 32

NEIGHBORS = 10

# The widths that are measured, up to the first that finds nearly everything.
_EXPANSIONS = (24, 48, 96, 192, 384, 768, 1536)
_HIGHEST_RECALL = 0.995

_FEWEST_QUERIES = 256
_MOST_QUERIES = 512
_ROWS_PER_QUERY = 256
# A copy is nearer than this part of the distance of the last candidate; cosine grows as its square.
_COPY = 0.5
# The larger a set is, the more copies of one row it may have.
_ROWS_PER_HELD = 16_384
_MOST_HELD = 32

_BLOCK_ROWS = 4096
# The nearest rows that are looked at: enough to leave 10 when most that may be are held.
_CANDIDATES = 64
# So much less may be found in the whole graph by chance.
_CHANCE = 0.01
# What rounding to float32 may add to a distance, relative to it.
_ROUNDING = 1e-6

# Norms for which products with a unit vector, and their own squares, are float32 with all digits.
_LARGEST_PRODUCT = 1e37
_LEAST_SQUARED, _LARGEST_SQUARED = 1e-16, 1e16

Curve = tuple[tuple[int, float], ...]


def expansion_for(curve: Sequence[tuple[int, float]], recall: float) -> int:
    """The least ef that reaches a recall in (0, 1] on a curve of (ef, recall), 0 when none on it does.

    Between two measured ones, the logarithm of what is missed falls evenly with the logarithm of ef.
    """
    narrower, missed = 0, 1.0
    for ef, reached in curve:
        left = 1.0 - reached
        if reached < recall:
            narrower, missed = ef, left
        elif not narrower or not 0.0 < left < missed:
            return ef
        else:
            part = math.log(missed / (1.0 - recall)) / math.log(missed / left)
            return min(ef, math.ceil(narrower * math.pow(ef / narrower, part)))
    return 0


@attrs.frozen(eq=False)
class Sample:
    """Queries taken from the rows, to measure a graph by that has only the rows `inside` it.

    `inside` and `held` are positions and together all rows. `farthest` (n,) float32 is the greatest distance
    at which a row `inside` is a right answer, `farthest_of_all` that of any row. Without any queries there is
    nothing to measure.
    """

    queries: Queries
    farthest: Floats
    farthest_of_all: Floats
    inside: Positions
    held: Positions

    @classmethod
    def choose(cls, metric: str, rows: Floats, norms: Doubles) -> Sample:
        """Chooses among rows of shape (n, dimension) with their norms (n,); always the same ones."""
        if not _measurable(metric, norms):
            return cls._without_queries(metric, rows)
        count = min(len(rows) // 16, max(_FEWEST_QUERIES, min(_MOST_QUERIES, len(rows) // _ROWS_PER_QUERY)))
        if count < 2 or len(rows) <= _EXPANSIONS[0] * SCAN_ROWS_PER_EXPANSION:
            # It is scanned anyhow.
            return cls._without_queries(metric, rows)
        chosen = np.sort(np.random.default_rng(len(rows)).choice(len(rows), count, replace=False))
        queries = Queries.of(metric, rows[chosen])
        # The nearest by dot are the longest rows, which are the same for many queries.
        alike = queries if metric != "dot" else Queries.of("cosine", queries.vectors)
        candidates = _nearest(alike, rows, norms, _CANDIDATES)
        distances = alike.rounded(alike.distances_at(rows, norms, candidates))
        hidden = distances < (_COPY if metric == "l2" else _COPY**2) * distances[:, -1:]
        hidden[:, : 1 + len(rows) // _ROWS_PER_HELD] = True
        hidden[:, _MOST_HELD:] = False
        inside = np.ones(len(rows), bool)
        inside[candidates[hidden]] = False
        inside[chosen] = False
        if metric == "dot":
            candidates = _nearest(queries, rows, norms, _CANDIDATES)
            distances = queries.rounded(queries.distances_at(rows, norms, candidates))
        of_all = _farthest(distances)
        distances[~inside[candidates]] = np.inf
        farthest = _farthest(distances)
        # Where so many rows are alike that too few are left, there is no telling what is right.
        told = np.flatnonzero(np.isfinite(farthest))
        return cls(
            queries.select(told),
            farthest[told],
            of_all[told],
            np.flatnonzero(inside),
            np.flatnonzero(~inside),
        )

    @classmethod
    def _without_queries(cls, metric: str, rows: Floats) -> Sample:
        everything, none = np.arange(len(rows)), np.empty(0, np.float32)
        return cls(Queries.of(metric, rows[:0]), none, none, everything, everything[:0])

    def measure(self, graph: Graph, rows: Floats, norms: Doubles) -> Curve:
        """The recall at growing ef of a graph of the rows `inside`: what it is with good confidence.

        Of the mean over the queries half its standard error is subtracted, and half a neighbour of all.
        """
        return self._measure(graph, rows, norms, self.farthest)

    def measure_whole(self, graph: Graph, rows: Floats, norms: Doubles, curve: Curve) -> Curve:
        """The same once the graph has all rows, but no more than the `curve` of those `inside`."""
        whole = [
            (ef, round(reached + _CHANCE, 4))
            for ef, reached in self._measure(graph, rows, norms, self.farthest_of_all)
        ]
        expansions = sorted({ef for ef, _ in (*curve, *whole)})
        return tuple((ef, min(_reached(curve, ef), _reached(whole, ef))) for ef in expansions)

    def _measure(self, graph: Graph, rows: Floats, norms: Doubles, farthest: Floats) -> Curve:
        points: list[tuple[int, float]] = []
        count = len(farthest)
        if count < 2:
            return ()
        for expansion in _EXPANSIONS:
            if expansion * SCAN_ROWS_PER_EXPANSION >= len(rows):
                break
            recalls = self._recalls(graph, rows, norms, expansion, farthest)
            doubt = 0.5 * recalls.std(ddof=1) / math.sqrt(count) + 0.5 / (NEIGHBORS * count)
            points.append((expansion, round(max(0.0, float(recalls.mean() - doubt)), 4)))
            if points[-1][1] >= _HIGHEST_RECALL:
                break
        # That a wider search finds less is chance.
        least = np.minimum.accumulate([recall for _, recall in reversed(points)])[::-1].tolist()
        return tuple((ef, recall) for (ef, _), recall in zip(points, least, strict=True))

    def _recalls(
        self, graph: Graph, rows: Floats, norms: Doubles, expansion: int, farthest: Floats
    ) -> Doubles:
        queries = self.queries
        found = graph.search(queries.vectors, queries.norms, OVERSAMPLING * NEIGHBORS, expansion)
        distances = queries.rounded(queries.distances_at(rows, norms, found))
        right = (found >= 0) & (distances <= farthest[:, None])
        recalls: Doubles = np.minimum(np.count_nonzero(right, axis=1), NEIGHBORS) / NEIGHBORS
        return recalls


def _farthest(distances: Floats) -> Floats:
    """The distances, (n,), of the last of the nearest among some of n queries, (n, m), in no order."""
    farthest: Floats = np.partition(distances, NEIGHBORS - 1, axis=1)[:, NEIGHBORS - 1]
    farthest += np.float32(_ROUNDING) * np.abs(farthest)
    return farthest


def _reached(curve: Sequence[tuple[int, float]], expansion: int) -> float:
    """What a curve promises of a walk so wide."""
    return max((reached for ef, reached in curve if ef <= expansion), default=0.0)


def _measurable(metric: str, norms: Doubles) -> bool:
    """Whether ranks, which are float32, tell which of these rows are nearest; else these are scanned."""
    norms = norms[norms > 0.0]
    if not len(norms):
        return True
    if metric == "cosine":
        return bool(norms.min() >= TINY_NORM and norms.max() <= _LARGEST_PRODUCT)
    return bool(_LEAST_SQUARED <= norms.max() <= _LARGEST_SQUARED)


def _nearest(queries: Queries, rows: Floats, norms: Doubles, count: int) -> Positions:
    """Positions of the `count` nearest rows for each query, (n, count), nearest first."""
    ranks = np.empty((len(queries.vectors), 0), np.float32)
    positions = np.empty((len(queries.vectors), 0), np.int64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = np.arange(start, min(start + _BLOCK_ROWS, len(rows)))
        block = queries.terms(norms[part]).ranks(queries.scaled @ rows[start : start + _BLOCK_ROWS].T)
        if start:
            # Of a later block few columns hold anything near enough.
            near = np.flatnonzero((block < ranks[:, -1:]).any(axis=0))
            part, block = part[near], block[:, near]
        ranks = np.concatenate([ranks, block], axis=1)
        positions = np.concatenate([positions, np.broadcast_to(part, block.shape)], axis=1)
        if ranks.shape[1] > count:
            least = np.argpartition(ranks, count - 1, axis=1)[:, :count]
            ranks = np.take_along_axis(ranks, least, axis=1)
            positions = np.take_along_axis(positions, least, axis=1)
        order = np.argsort(ranks, axis=1)
        ranks = np.take_along_axis(ranks, order, axis=1)
        positions = np.take_along_axis(positions, order, axis=1)
    return positions
