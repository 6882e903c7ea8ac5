"""Indices in a snapshot: as columns, and descriptions that JSON can hold.

The columns are those of `row_columns`, with the live rows of all heads, one index after the other, and:

    dead-rows              int64, the positions of the dead rows in each of the segments, one after the other

A description holds the id and the parameters of an index, the id of its next row, how many rows of its head
there are, and the segments: their ids, their checksums, and how many of their rows are dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from engram.columns import Array
from engram.index.head import ALIVE
from engram.index.parameters import Parameters
from engram.index.row_columns import ROW_COLUMNS, Rows, rows_at
from engram.index.segment import SegmentStore
from engram.index.texts import Positions
from engram.index.vector_index import SEAL_ROWS, VectorIndex

_DEAD_ROWS = "dead-rows"


def export_indices(indices: Iterable[VectorIndex]) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """The columns of all indices together, and the description of each; `restore_indices` is the inverse."""
    parts: list[Rows] = []
    dead: list[Positions] = []
    descriptions = []
    for index in indices:
        heads = [
            rows_at(chunk, np.flatnonzero(chunk.deaths[: chunk.count] == ALIVE)) for chunk in index.chunks
        ]
        deaths = [np.flatnonzero(installed.deaths != ALIVE) for installed in index.segments]
        descriptions.append(
            {
                "id": index.id,
                "parameters": attrs.asdict(index.parameters),
                "next_row": index.next_row,
                "head_rows": sum(len(rows["row_ids"]) for rows in heads),
                "segments": [
                    {
                        "id": installed.id,
                        "checksum": installed.segment.checksum,
                        "dead_rows": len(positions),
                    }
                    for installed, positions in zip(index.segments, deaths, strict=True)
                ],
            }
        )
        parts += heads
        dead += deaths
    columns: dict[str, Array] = {}
    for column in ROW_COLUMNS:
        columns |= column.pack([rows[column.name] for rows in parts])
    columns[_DEAD_ROWS] = np.concatenate(dead) if dead else np.empty(0, np.int64)
    return columns, descriptions


def named_segments(descriptions: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The segments of indices that are described so, by id, with their checksums."""
    return {
        segment["id"]: segment["checksum"] for described in descriptions for segment in described["segments"]
    }


def restore_indices(
    columns: Mapping[str, Array],
    descriptions: Sequence[Mapping[str, Any]],
    store: SegmentStore,
    *,
    seal_rows: int = SEAL_ROWS,
    first_serial: int = 1,
) -> list[VectorIndex]:
    """The indices that `export_indices` gave these of; their segments are taken from `store`.

    Raises:
        DamagedDataError: a segment is missing, or is not what was written.
    """
    parameters = [Parameters(**described["parameters"]) for described in descriptions]
    sizes = [
        (described["head_rows"], own.dimension)
        for described, own in zip(descriptions, parameters, strict=True)
    ]
    heads: dict[str, list[Any]] = {column.name: column.unpack(columns, sizes) for column in ROW_COLUMNS}
    dead, start = columns[_DEAD_ROWS], 0
    indices = []
    for number, (described, own) in enumerate(zip(descriptions, parameters, strict=True)):
        segments = []
        for segment in described["segments"]:
            stop = start + segment["dead_rows"]
            segments.append((store.take(segment["id"], segment["checksum"]), dead[start:stop]))
            start = stop
        indices.append(
            VectorIndex.restore(
                described["id"],
                own,
                described["next_row"],
                segments,
                {name: rows[number] for name, rows in heads.items()},
                seal_rows=seal_rows,
                first_serial=first_serial,
            )
        )
    return indices
