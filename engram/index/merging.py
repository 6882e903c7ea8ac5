"""Which segments of an index to build into one, and when.

A search walks every segment, and building a row again costs as much as building it once, more so in a large
segment. So runs of adjacent segments are merged that grow what is built again by a factor: a row is then
built a bounded number of times, and few segments are left. `benchmarks/merging.py` simulates it.
"""

from __future__ import annotations

from collections.abc import Sequence

# A merge yields at most so many rows: opening a segment takes time in proportion.
LARGEST_SEGMENT = 262_144
# A segment with a larger share of dead rows is rebuilt.
DEAD_FRACTION = 0.2

# A run is merged when it has so many times the rows of the largest segment in it.
_GROWTH = 1.7
# So is one that makes a segment so full that it is done with, of segments that are not.
_FULL = 0.9
_NOT_FULL = 0.8
# What starting a build takes, in rows that could be built meanwhile.
_BUILD_OVERHEAD = 4000
# While rows wait to be sealed, nothing is merged before there are so many small segments, of at most
# so many times the rows of the largest that is sealed at once; and then not into the largest ones.
_MANY_SMALL = 4
_SMALL = 2

Sizes = Sequence[tuple[int, int]]


def next_merge(
    sizes: Sizes, largest_seal: int, *, waiting: bool, largest: int = LARGEST_SEGMENT
) -> slice | None:
    """The adjacent segments to build into one next, None when they should stay as they are.

    `sizes` holds the numbers of rows and, among them, of dead rows of each segment, oldest first. `waiting`
    says that there are rows to seal, of which up to `largest_seal` become a segment. Without rows waiting, a
    segment with too many dead rows is always found, whatever its size; a run is once its living rows
    are few enough, and stays to be found as more of them die.
    """
    for number, (rows, dead) in enumerate(sizes):
        if dead == rows:
            return slice(number, number + 1)
    if waiting:
        if sum(rows <= _SMALL * largest_seal for rows, _ in sizes) < _MANY_SMALL:
            return None
        largest //= 2
    best: slice | None = None
    least = float("inf")
    for start in range(len(sizes)):
        total = living = biggest = 0
        for stop in range(start + 1, len(sizes) + 1):
            rows, dead = sizes[stop - 1]
            total, living, biggest = total + rows, living + rows - dead, max(biggest, rows)
            if living > largest:
                break
            if stop - start > 1:
                fills = total >= _FULL * largest and biggest <= _NOT_FULL * largest
                gain = float(stop - start - 1) if fills or total >= _GROWTH * biggest else 0.0
            else:
                gain = 0.5 + dead / rows if dead > DEAD_FRACTION * rows else 0.0
            # The least work for each segment that a search need not walk any more.
            if gain and (living + _BUILD_OVERHEAD) / gain < least:
                least = (living + _BUILD_OVERHEAD) / gain
                best = slice(start, stop)
    if best is None and not waiting:
        for number, (rows, dead) in enumerate(sizes):
            if dead > DEAD_FRACTION * rows:
                return slice(number, number + 1)
    return best
