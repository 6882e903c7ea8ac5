"""How wide a graph must be searched: measured on rows that are not in it yet."""

from __future__ import annotations

import math

import numpy as np

from engram.index.distances import Doubles, Floats, Queries
from engram.index.graph import Graph
from engram.index.texts import Positions

# Searches in a graph ask it for so many times k rows, so that quantisation does not cost neighbours.
OVERSAMPLING = 3
# A walk costs about as much for one of its width (ef) as a scan does for so many rows.
SCAN_ROWS_PER_EXPANSION = 32

_NEIGHBORS = 10
_EXPANSIONS = (96, 128, 192, 256, 384, 512, 768, 1024)
# The narrowest search that finds as much is chosen, else the widest if it finds enough.
_GOOD_RECALL = 0.985
_FAIR_RECALL = 0.95
_BLOCK_ROWS = 8192


def narrowest_expansion(rows: int) -> int:
    """The ef to try first in a graph of so many rows: 64, and from 16,384 on growing with the cube root.

    It guards against rows that have near duplicates, which other rows find easily and queries do not:
    with ten copies of each of 19,000 embeddings, ef 64 finds 0.998 of the neighbours of another copy and
    0.971 of those of a new embedding; ef 128 finds 0.989 of these.
    """
    return round(64 * math.cbrt(max(1.0, rows / 16_384)))


def measure_expansion(
    graph: Graph, metric: str, rows: Floats, norms: Doubles, inside: Positions, sample: Positions
) -> int:
    """The ef at which searches of `graph` find nearly all of the 10 nearest, 0 when none is wide enough.

    The graph holds the rows of (n, dimension) at positions `inside`, and not those at `sample`, which are
    the queries: queries that are rows of the graph would be found too easily.
    """
    narrowest = narrowest_expansion(len(inside))
    widest = len(inside) // SCAN_ROWS_PER_EXPANSION
    if narrowest >= widest:
        # It is scanned anyhow.
        return narrowest
    queries = Queries.of(metric, rows[sample])
    nearest = _least_ranks(queries, rows, norms, inside)
    fair = 0
    for expansion in (narrowest, *(wider for wider in _EXPANSIONS if narrowest < wider < widest)):
        found = graph.search(queries.vectors, queries.norms, OVERSAMPLING * _NEIGHBORS, expansion)
        terms = queries.terms(norms[found.ravel()])
        ranks = terms.ranks(np.matmul(rows[found], queries.scaled[:, :, None]).ravel()).reshape(found.shape)
        tolerance = terms.error.reshape(found.shape) + queries.error[:, None]
        hits = np.count_nonzero((found >= 0) & (ranks <= nearest[:, None] + tolerance), axis=1)
        recall = float(np.minimum(hits, _NEIGHBORS).mean()) / _NEIGHBORS
        if recall >= _GOOD_RECALL:
            return expansion
        if recall >= _FAIR_RECALL:
            fair = expansion
    return fair


def _least_ranks(queries: Queries, rows: Floats, norms: Doubles, inside: Positions) -> Floats:
    """The rank of the 10th nearest row, for each query."""
    best = np.empty((len(queries.vectors), 0), np.float32)
    for start in range(0, len(inside), _BLOCK_ROWS):
        part = inside[start : start + _BLOCK_ROWS]
        ranks = queries.terms(norms[part]).ranks(queries.scaled @ rows[part].T)
        best = np.concatenate([best, ranks], axis=1)
        best = np.partition(best, _NEIGHBORS - 1, axis=1)[:, :_NEIGHBORS]
    least: Floats = best[:, _NEIGHBORS - 1]
    return least
