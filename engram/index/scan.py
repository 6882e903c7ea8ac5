"""Scanning rows exactly, for a batch of queries at once.

Blocks of rows are ranked by matrix products, in float32 or by their int8 codes, with a bound on the error.
What is kept are all rows that can be among the k nearest, given these bounds: a superset of the truth, and
hardly more, whose distances are then computed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from engram.index.codes import QueryCodes, RowCodes
from engram.index.distances import Doubles, Floats, Queries
from engram.index.head import Chunk, Lsns
from engram.index.segment import Segment

Numbers = npt.NDArray[np.int64]
Source = Chunk | Segment

# Of long blocks only the least rank of each group is offered as one of the k least, which is hardly more.
_GROUP = 32

# Greater than any rank, so much that no error added to it overflows.
_LARGEST = np.float32(1e38)


@attrs.frozen(eq=False)
class Block:
    """Rows of a source: `vectors` and `norms` of those at `positions`, all (n,) or (n, dimension).

    `deaths` is None when none is dead, `mask` when none is left out. `offset` is how many rows of the head
    come before, None for rows that every view shows. With `codes`, the vectors are not looked at.
    """

    source: Source
    positions: Numbers
    vectors: Floats
    norms: Doubles
    deaths: Lsns | None = None
    mask: npt.NDArray[np.bool_] | None = None
    offset: int | None = None
    codes: RowCodes | None = None


@attrs.frozen(eq=False)
class Found:
    """Rows at `positions` of a source that may be near to the queries `which`; all (n,)."""

    source: Source
    which: Numbers
    positions: Numbers
    ranks: Floats
    errors: Floats


class Scan:
    """The k nearest of each query among the blocks that are added.

    `lsns` and `visible` (both (n,)) say for each query which deaths, and how many rows of the head, it sees.
    """

    def __init__(self, queries: Queries, k: int, lsns: Lsns, visible: Numbers) -> None:
        self._queries = queries
        self._k = k
        self._lsns = lsns
        self._visible = visible
        # No less than the ranks of the k nearest so far, in no order.
        self._least = np.full((len(lsns), k), _LARGEST)
        self._limits = np.full(len(lsns), _LARGEST)
        self._codes: QueryCodes | None = None
        self._found: list[Found] = []

    def offer(self, uppers: Floats, which: Numbers | slice = slice(None)) -> None:
        """Takes upper bounds of the ranks of rows, (len(which), n), each of a row not offered before."""
        k = self._k
        joined = np.concatenate([self._least[which], uppers], axis=1)
        least = np.partition(joined, k - 1, axis=1)[:, :k]
        self._least[which] = least
        self._limits[which] = least[:, k - 1] + self._queries.error[which]

    def add(self, blocks: Sequence[Block], which: Numbers | None = None) -> None:
        """Scans blocks for the queries `which`, for all when None; blocks with codes only for all."""
        part: Numbers | slice = slice(None)
        queries, lsns, visible = self._queries, self._lsns, self._visible
        if which is not None:
            part, queries, lsns, visible = which, queries.select(which), lsns[which], visible[which]
        ranked = []
        for block in blocks:
            ranks, errors = self._ranks(block, queries)
            _hide(ranks, block, lsns, visible)
            ranked.append((block, ranks, errors))
        uppers = [_least_of_groups(ranks, self._k) + errors[:, None] for _, ranks, errors in ranked]
        self.offer(np.concatenate(uppers, axis=1), part)
        limits = self._limits[part]
        for block, ranks, errors in ranked:
            (hits,) = (ranks <= np.minimum(limits + errors, _LARGEST)[:, None]).ravel().nonzero()
            if not len(hits):
                continue
            rows, columns = np.divmod(hits, ranks.shape[1])
            numbers = rows if which is None else which[rows]
            self._found.append(
                Found(block.source, numbers, block.positions[columns], ranks.ravel()[hits], errors[rows])
            )

    def found(self) -> list[Found]:
        """What may be among the k nearest of each query: the rest is farther than what was offered."""
        kept = []
        for found in self._found:
            near = found.ranks <= self._limits[found.which] + found.errors
            if near.any():
                which, positions = found.which[near], found.positions[near]
                kept.append(Found(found.source, which, positions, found.ranks[near], found.errors[near]))
        return kept

    def _ranks(self, block: Block, queries: Queries) -> tuple[Floats, Floats]:
        if block.codes is not None:
            if self._codes is None:
                self._codes = QueryCodes.of(self._queries.scaled)
            ranks, bounds = block.codes.ranks(self._codes)
            return ranks, bounds.astype(np.float32)
        terms = queries.terms(block.norms)
        ranks = terms.ranks(np.matmul(queries.scaled, block.vectors.T))
        return ranks, np.full(len(ranks), terms.error, np.float32)


def _hide(ranks: Floats, block: Block, lsns: Lsns, visible: Numbers) -> None:
    """Puts the rows out of reach that a query does not see."""
    if block.mask is not None:
        ranks[:, ~block.mask] = np.inf
    if block.deaths is not None:
        first, last = lsns.min(), lsns.max()
        ranks[:, block.deaths <= first] = np.inf
        # A row that died between the oldest and the newest view is dead to some of them only.
        some = np.flatnonzero((block.deaths > first) & (block.deaths <= last))
        if len(some):
            ranks[:, some] = np.where(block.deaths[some] <= lsns[:, None], np.float32(np.inf), ranks[:, some])
    if block.offset is not None and visible.min() < block.offset + ranks.shape[1]:
        for number, count in enumerate((visible - block.offset).tolist()):
            ranks[number, max(0, count) :] = np.inf


def _least_of_groups(ranks: Floats, k: int) -> Floats:
    """The least rank of each group of columns of (n, m), or all where there would be too few."""
    count, width = ranks.shape
    size = width // _GROUP
    if size < 4 * k:
        return ranks
    grouped = ranks[:, : size * _GROUP].reshape(count, _GROUP, size)
    least: Floats = grouped.min(axis=1)
    return least
