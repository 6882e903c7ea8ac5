"""Which rows of an index a filter is true of."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np

from engram.index.filters import Filter, Mask
from engram.index.head import ALIVE, Chunk
from engram.index.segment import Segment
from engram.index.texts import Positions
from engram.index.vector_index import VectorIndex, View


@attrs.frozen
class Matching:
    """Keys and ids of rows."""

    keys: list[bytes]
    row_ids: list[int]


def segment_mask(segment: Segment, condition: Filter) -> Mask:
    """On which rows of a segment the filter is true, dead ones included: shape (rows,)."""
    return segment.masks.mask(condition, lambda: segment.attribute_columns)


def chunk_mask(chunk: Chunk, count: int, condition: Filter) -> Mask:
    """On which of the first `count` rows of a chunk the filter is true, dead ones included.

    Raises:
        ValueError: there are not so many rows.
    """
    if count < chunk.capacity:
        return condition.mask(chunk.attribute_columns(count))
    return chunk.masks.mask(condition, lambda: chunk.attribute_columns(count))


def count_matching(view: View, condition: Filter) -> int:
    """How many live rows of a view the filter is true of."""
    return sum(len(positions) for _, positions in _matching(view, condition, 0))


def find_matching(view: View, condition: Filter, since: int = 0) -> Matching:
    """The live rows of a view, with this id or a later one, that the filter is true of."""
    return _collect(_matching(view, condition, since))


def find_matching_since(index: VectorIndex, row_id: int, condition: Filter) -> Matching:
    """The rows that live now, with this id or a later one, that the filter is true of."""
    return _collect(_matching(index.view(ALIVE - 1), condition, row_id))


def _collect(parts: Iterator[tuple[Chunk | Segment, Positions]]) -> Matching:
    matching = Matching([], [])
    for source, positions in parts:
        matching.keys.extend(source.keys_at(positions))
        matching.row_ids.extend(source.row_ids[positions].tolist())
    return matching


def _matching(view: View, condition: Filter, since: int) -> Iterator[tuple[Chunk | Segment, Positions]]:
    for installed in view.segments:
        segment = installed.segment
        if segment.row_ids[-1] < since:
            continue
        qualifying = segment_mask(segment, condition) & (installed.deaths > view.lsn)
        yield segment, _from(np.flatnonzero(qualifying), segment.row_ids, since)
    for chunk, count in view.head:
        if chunk.row_ids[count - 1] < since:
            continue
        qualifying = chunk_mask(chunk, count, condition) & (chunk.deaths[:count] > view.lsn)
        yield chunk, _from(np.flatnonzero(qualifying), chunk.row_ids, since)


def _from(positions: Positions, row_ids: Positions, since: int) -> Positions:
    return positions[row_ids[positions] >= since]
