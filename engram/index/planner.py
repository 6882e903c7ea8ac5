"""How a segment is searched: by a walk of its graph, or by a scan of the rows that qualify.

A walk of width ef looks at the ef nearest rows. When only some of the rows qualify, because others are dead
or a filter is false on them, it must be wider in the same proportion; and at some point it costs more than
to scan just those that do.
"""

from __future__ import annotations

import attrs

from engram.index.recall import OVERSAMPLING, SCAN_ROWS_PER_EXPANSION

# The same as SCAN_ROWS_PER_EXPANSION where the rows are picked out of the segment one by one.
PICKED_ROWS_PER_EXPANSION = 6

# How much wider a walk that has not found enough is tried again.
_WIDER = 4


@attrs.frozen
class Walk:
    """A search of a graph: `expansion` is its ef, `count` how many of the nearest it is asked for."""

    expansion: int
    count: int

    def wider(self, rows: int, qualifying: int) -> Walk | None:
        """What to try when this has not found enough, None for a scan."""
        return _affordable(Walk(self.expansion * _WIDER, self.count * _WIDER), rows, qualifying)


def plan_walk(rows: int, qualifying: int, k: int, expansion: int) -> Walk | None:
    """The walk that finds the k nearest of the rows that qualify, None where a scan is better.

    `expansion` is the ef that finds them where all rows qualify, 0 when none does.
    """
    if not expansion or not qualifying:
        return None
    count = -(-OVERSAMPLING * k * rows // qualifying)
    return _affordable(Walk(max(-(-expansion * rows // qualifying), count), count), rows, qualifying)


def scans_all(rows: int, qualifying: int) -> bool:
    """Whether a scan of all rows, in order, is cheaper than one of those that qualify, picked one by one."""
    return qualifying * SCAN_ROWS_PER_EXPANSION >= rows * PICKED_ROWS_PER_EXPANSION


def _affordable(walk: Walk, rows: int, qualifying: int) -> Walk | None:
    per_expansion = SCAN_ROWS_PER_EXPANSION
    scanned = rows
    if not scans_all(rows, qualifying):
        per_expansion, scanned = PICKED_ROWS_PER_EXPANSION, qualifying
    return walk if walk.expansion * per_expansion < scanned else None
