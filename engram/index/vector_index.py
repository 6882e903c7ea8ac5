"""The state of one vector index: its rows, which of them live, and what should be built next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from engram.columns import Array, pack_bytes, unpack_bytes
from engram.errors import DamagedDataError
from engram.index.distances import Floats
from engram.index.head import ALIVE, Chunk, Head, Lsns, RowIds
from engram.index.parameters import Parameters
from engram.index.segment import Segment, SegmentStore

# The head is sealed when it has so many rows, or takes so many bytes.
SEAL_ROWS = 8192
_HEAD_BYTES = 128 << 20

_CHUNK_ROWS = 2048
_CHUNK_BYTES = 8 << 20

# Heads of at most so many times the rows that seal one become one segment, so that the first rows of a
# large backlog get their graph soon.
_LARGEST_SEAL = 4
# A merge yields at most so many rows: opening a segment takes time in proportion.
LARGEST_SEGMENT = 262_144
# So many adjacent segments of about one size are merged. Of small ones two are enough: each costs a
# search as much as a large one, and building them again takes seconds.
_MERGE_FACTOR = 4
_SMALL_MERGE_FACTOR = 2
# A segment with more dead rows than this is rebuilt.
_DEAD_FRACTION = 0.2


@attrs.define(eq=False)
class InstalledSegment:
    """A segment as part of an index: `deaths` (rows,) holds the LSN that killed a row, or ALIVE."""

    segment: Segment
    deaths: Lsns
    dead: int

    @property
    def id(self) -> str:
        return self.segment.id

    @property
    def rows(self) -> int:
        return len(self.segment.row_ids)

    @property
    def live(self) -> int:
        return self.rows - self.dead


@attrs.frozen(eq=False)
class View:
    """An index at one LSN: what a search sees, whatever happens to the index meanwhile.

    The first `head_rows` rows of the chunks and all rows of the segments are there, but for those that
    died at or before `lsn`. `live` counts them. The generation changes with every segment installed: views
    of one generation differ only in how much of the head they see, and in deaths.
    """

    parameters: Parameters
    generation: int
    segments: tuple[InstalledSegment, ...]
    chunks: tuple[Chunk, ...]
    head_rows: int
    lsn: int
    live: int


@attrs.frozen(eq=False)
class SealPlan:
    """Rows of the head that should become a segment: all of `chunks`, up to row id `through`."""

    chunks: tuple[Chunk, ...]
    through: int


@attrs.frozen(eq=False)
class MergePlan:
    """Adjacent segments that should become one."""

    sources: tuple[InstalledSegment, ...]


@attrs.frozen(eq=False)
class SegmentState:
    """A segment in a snapshot; `dead` holds the positions of its dead rows, int64."""

    id: str
    checksum: int
    dead: npt.NDArray[np.int64]


@attrs.frozen(eq=False)
class IndexState:
    """An index in a snapshot: the live rows of its head, shape (n, dimension), and its segments."""

    id: int
    parameters: Parameters
    next_row: int
    row_ids: RowIds
    keys: list[bytes]
    vectors: Floats
    attributes: list[bytes]
    segments: list[SegmentState]

    def describe(self) -> dict[str, Any]:
        """What of the state is not in columns; JSON can hold it."""
        return {
            "id": self.id,
            "parameters": attrs.asdict(self.parameters),
            "next_row": self.next_row,
            "head_rows": len(self.keys),
            "segments": [
                {"id": segment.id, "checksum": segment.checksum, "dead_rows": len(segment.dead)}
                for segment in self.segments
            ],
        }

    @staticmethod
    def pack(states: Sequence[IndexState]) -> dict[str, Array]:
        """The columns of all the indices of a snapshot, one index after the other."""
        dead = [segment.dead for state in states for segment in state.segments]
        return {
            "index-row-ids": _join([state.row_ids for state in states], np.int64),
            **pack_bytes("index-row-keys", [key for state in states for key in state.keys]),
            "index-vectors": _join([state.vectors.reshape(-1) for state in states], np.float32),
            **pack_bytes("index-attributes", [text for state in states for text in state.attributes]),
            "index-dead-rows": _join(dead, np.int64),
        }

    @staticmethod
    def unpack(descriptions: Sequence[dict[str, Any]], columns: Mapping[str, Array]) -> list[IndexState]:
        """The inverse of `describe` and `pack`."""
        keys = unpack_bytes("index-row-keys", columns)
        attributes = unpack_bytes("index-attributes", columns)
        states = []
        row = number = death = 0
        for described in descriptions:
            parameters = Parameters(**described["parameters"])
            rows = slice(row, row + described["head_rows"])
            numbers = slice(number, number + described["head_rows"] * parameters.dimension)
            row, number = rows.stop, numbers.stop
            segments = []
            for segment in described["segments"]:
                deaths = slice(death, death + segment["dead_rows"])
                death = deaths.stop
                dead = columns["index-dead-rows"][deaths]
                segments.append(SegmentState(segment["id"], segment["checksum"], dead))
            states.append(
                IndexState(
                    described["id"],
                    parameters,
                    described["next_row"],
                    columns["index-row-ids"][rows],
                    keys[rows],
                    columns["index-vectors"][numbers].reshape(-1, parameters.dimension),
                    attributes[rows],
                    segments,
                )
            )
        return states


def _join(parts: Sequence[Array], dtype: npt.DTypeLike) -> Array:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


class VectorIndex:
    """One index. Its id is the LSN that created it; every method is synchronous.

    Rows have ids that increase and are never used again. An overwrite kills the old row and appends a
    new one. Row ids of segments are disjoint ranges in the order of `segments`, and below the head's.

    `live` maps each key to its row; only the index changes it. `dropped` is set by the owner once the index
    is gone, for those who work on it in the background.
    """

    def __init__(
        self,
        index_id: int,
        parameters: Parameters,
        *,
        seal_rows: int = SEAL_ROWS,
        largest_segment: int = LARGEST_SEGMENT,
    ) -> None:
        row_bytes = 4 * parameters.dimension
        self.id = index_id
        self.parameters = parameters
        self.dropped = False
        self.segments: tuple[InstalledSegment, ...] = ()
        self.live: dict[bytes, int] = {}
        self._seal_rows = min(seal_rows, max(16, _HEAD_BYTES // row_bytes))
        self._largest_segment = largest_segment
        chunk_rows = min(_CHUNK_ROWS, max(1, self._seal_rows // 4), max(4, _CHUNK_BYTES // row_bytes))
        self._head = Head(parameters.dimension, chunk_rows)
        self._next_row = 0
        # The least row id of each segment, and the greatest of the last.
        self._segment_starts: list[int] = []
        self._last_segment_row = -1
        self._rows_in_segments = 0
        self._merge_wanted = False
        self._generation = 0

    def __len__(self) -> int:
        return len(self.live)

    def __contains__(self, key: bytes) -> bool:
        return key in self.live

    @property
    def rows_total(self) -> int:
        """Rows held, living or dead."""
        return self._rows_in_segments + self._head.rows

    @property
    def rows_unindexed(self) -> int:
        """Rows of the head: not in any graph yet."""
        return self._head.rows

    @property
    def rows_dead(self) -> int:
        """Rows held that no key points at any more."""
        return self.rows_total - len(self.live)

    def add(
        self,
        lsn: int,
        keys: Sequence[bytes],
        vectors: Floats,
        attributes: Sequence[bytes | None] = (),
    ) -> int:
        """Appends rows, overwriting keys that are there; of a key given twice the last row counts.

        `vectors` is float32 of shape (len(keys), dimension); `attributes` holds a JSON text or None for
        each key, or is empty. Returns how many keys are new.
        """
        if len(keys) == 1:
            key = keys[0]
            row_id = self._next_row
            self._next_row = row_id + 1
            tail = self._head.tail()
            if attributes and (text := attributes[0]) is not None:
                tail.attributes[tail.count] = text
            tail.append(row_id, key, vectors[0])
            live = self.live
            old = live.get(key)
            live[key] = row_id
            if old is None:
                return 1
            self._kill(old, lsn)
            return 0
        return self._add_many(lsn, keys, vectors, attributes)

    def _add_many(
        self, lsn: int, keys: Sequence[bytes], vectors: Floats, attributes: Sequence[bytes | None]
    ) -> int:
        last = {key: position for position, key in enumerate(keys)}
        if len(last) < len(keys):
            kept = sorted(last.values())
            keys = [keys[position] for position in kept]
            vectors = vectors[kept]
            attributes = [attributes[position] for position in kept] if attributes else ()
        live = self.live
        old = [row_id for key in keys if (row_id := live.get(key)) is not None]
        row_ids = np.arange(self._next_row, self._next_row + len(keys), dtype=np.int64)
        self._next_row += len(keys)
        self._append(row_ids, list(keys), vectors, attributes)
        for row_id in old:
            self._kill(row_id, lsn)
        return len(keys) - len(old)

    def _append(
        self, row_ids: RowIds, keys: list[bytes], vectors: Floats, attributes: Sequence[bytes | None]
    ) -> None:
        """Appends rows of distinct keys and points the keys at them."""
        self._head.extend(row_ids, keys, vectors)
        for row_id, text in zip(row_ids.tolist(), attributes, strict=False):
            if text:
                chunk, position = self._head.find(row_id)
                chunk.attributes[position] = text
        self.live.update(zip(keys, row_ids.tolist(), strict=True))

    def delete(self, lsn: int, keys: Sequence[bytes]) -> int:
        """Kills the rows of these keys; returns how many there were."""
        deleted = 0
        for key in keys:
            row_id = self.live.pop(key, None)
            if row_id is not None:
                self._kill(row_id, lsn)
                deleted += 1
        return deleted

    def vector(self, key: bytes) -> Floats | None:
        """The vector of a key, float32 of shape (dimension,), as it was added."""
        row_id = self.live.get(key)
        if row_id is None:
            return None
        installed = self._segment_of(row_id)
        if installed is not None:
            segment = installed.segment
            found: Floats = segment.vectors[segment.position(row_id)]
        else:
            chunk, position = self._head.find(row_id)
            found = chunk.vectors[position]
        return found

    def attributes(self, key: bytes) -> bytes | None:
        """The JSON text of a key's attributes, if it has any."""
        row_id = self.live.get(key)
        if row_id is None:
            return None
        installed = self._segment_of(row_id)
        if installed is not None:
            position = installed.segment.position(row_id)
            return installed.segment.attributes_at(np.array([position]))[0] or None
        chunk, position = self._head.find(row_id)
        return chunk.attributes.get(position)

    def view(self, lsn: int) -> View:
        """The index as it is now, at `lsn`, the last change made."""
        head = self._head
        return View(
            self.parameters, self._generation, self.segments, head.chunks, head.rows, lsn, len(self.live)
        )

    @property
    def needs_maintenance(self) -> bool:
        """Whether `plan` has something to build."""
        return self._merge_wanted or self._head.rows_in_whole_chunks >= self._seal_rows

    def plan(self) -> SealPlan | MergePlan | None:
        """What should be built next: first a graph for the head, then merges."""
        head = self._head
        if head.rows_in_whole_chunks >= self._seal_rows:
            chunks: list[Chunk] = []
            rows = 0
            for chunk in head.chunks:
                if chunk is head.chunks[-1] and chunk.count < head.chunk_rows:
                    break
                if chunks and rows + chunk.count > _LARGEST_SEAL * self._seal_rows:
                    break
                chunks.append(chunk)
                rows += chunk.count
            return SealPlan(tuple(chunks), int(chunks[-1].row_ids[chunks[-1].count - 1]))
        sources = self._merge_sources()
        return MergePlan(sources) if sources else None

    def _merge_sources(self) -> tuple[InstalledSegment, ...]:
        segments = self.segments
        for installed in segments:
            if installed.dead > _DEAD_FRACTION * installed.rows:
                return (installed,)
        limit = _MERGE_FACTOR * self._seal_rows
        for start in range(len(segments) - _SMALL_MERGE_FACTOR + 1):
            run = segments[start : start + _SMALL_MERGE_FACTOR]
            if sum(installed.rows for installed in run) <= min(limit, self._largest_segment):
                return run
        while limit < _MERGE_FACTOR * self._largest_segment:
            for start in range(len(segments) - _MERGE_FACTOR + 1):
                run = segments[start : start + _MERGE_FACTOR]
                sizes = [installed.rows for installed in run]
                if max(sizes) < limit and sum(sizes) <= self._largest_segment:
                    return run
            limit *= _MERGE_FACTOR
        return ()

    def install(self, lsn: int, segment: Segment | None, through: int, replaces: Sequence[str]) -> list[str]:
        """A segment takes the place of the head's rows up to row id `through` and of segments.

        `through` is -1 when no rows of the head are replaced; `segment` is None when all of the rows
        were dead. Rows that have died since the segment was planned are dead in it. Returns the ids of
        the segments that are no longer used: those in `replaces`.

        Raises:
            DamagedDataError: the segment is of another index.
            ValueError: a segment in `replaces` is not here.
        """
        names = [installed.id for installed in self.segments]
        replaced = [self.segments[names.index(name)] for name in replaces]
        remaining = [installed for installed in self.segments if installed not in replaced]
        if segment is not None:
            self._check(segment)
            # A row that is nowhere any more was dead before a snapshot left it out.
            deaths = np.full(len(segment.row_ids), lsn, np.int64)
            for installed in replaced:
                _carry(segment.row_ids, deaths, installed.segment.row_ids, installed.deaths)
            for chunk in self._head.chunks:
                if chunk.row_ids[0] > through:
                    break
                _carry(segment.row_ids, deaths, chunk.row_ids[: chunk.count], chunk.deaths)
            new = InstalledSegment(segment, deaths, int(np.count_nonzero(deaths != ALIVE)))
            position = bisect_right(
                [int(installed.segment.row_ids[0]) for installed in remaining], int(segment.row_ids[0])
            )
            remaining.insert(position, new)
        self._head.drop_through(through)
        self._generation += 1
        self._set_segments(remaining)
        return list(replaces)

    def _set_segments(self, segments: list[InstalledSegment]) -> None:
        self.segments = tuple(segments)
        self._segment_starts = [int(installed.segment.row_ids[0]) for installed in segments]
        self._last_segment_row = int(segments[-1].segment.row_ids[-1]) if segments else -1
        self._rows_in_segments = sum(installed.rows for installed in segments)
        self._merge_wanted = bool(self._merge_sources())

    def _segment_of(self, row_id: int) -> InstalledSegment | None:
        """The segment that holds a row, None when the head does."""
        if row_id > self._last_segment_row:
            return None
        return self.segments[bisect_right(self._segment_starts, row_id) - 1]

    def _kill(self, row_id: int, lsn: int) -> None:
        installed = self._segment_of(row_id)
        if installed is None:
            chunk, position = self._head.find(row_id)
            chunk.kill(position, lsn)
            return
        installed.deaths[installed.segment.position(row_id)] = lsn
        installed.dead += 1
        if installed.dead > _DEAD_FRACTION * installed.rows:
            self._merge_wanted = True

    def export(self) -> IndexState:
        """The state as a snapshot holds it."""
        row_ids: list[RowIds] = []
        vectors: list[Floats] = []
        keys: list[bytes] = []
        attributes: list[bytes] = []
        for chunk in self._head.chunks:
            alive = np.flatnonzero(chunk.deaths[: chunk.count] == ALIVE)
            row_ids.append(chunk.row_ids[alive])
            vectors.append(chunk.vectors[alive])
            keys += chunk.keys_at(alive)
            attributes += chunk.attributes_at(alive)
        return IndexState(
            self.id,
            self.parameters,
            self._next_row,
            _join(row_ids, np.int64),
            keys,
            np.concatenate(vectors) if vectors else np.empty((0, self.parameters.dimension), np.float32),
            attributes,
            [
                SegmentState(
                    installed.id, installed.segment.checksum, np.flatnonzero(installed.deaths != ALIVE)
                )
                for installed in self.segments
            ],
        )

    @classmethod
    def restore(cls, state: IndexState, store: SegmentStore, *, seal_rows: int = SEAL_ROWS) -> VectorIndex:
        """The index that `export` gave the state of.

        Raises:
            DamagedDataError: a segment is missing, or is not what was written.
        """
        index = cls(state.id, state.parameters, seal_rows=seal_rows)
        installed = []
        for saved in state.segments:
            segment = store.take(saved.id, saved.checksum)
            index._check(segment)
            deaths = np.full(len(segment.row_ids), ALIVE, np.int64)
            deaths[saved.dead] = 0
            installed.append(InstalledSegment(segment, deaths, len(saved.dead)))
            alive = np.flatnonzero(deaths == ALIVE)
            index.live.update(zip(segment.keys_at(alive), segment.row_ids[alive].tolist(), strict=True))
        index._set_segments(installed)
        index._append(state.row_ids, state.keys, state.vectors, state.attributes)
        index._next_row = state.next_row
        return index

    def _check(self, segment: Segment) -> None:
        if segment.index_id != self.id or segment.vectors.shape[1] != self.parameters.dimension:
            raise DamagedDataError(segment.path, f"not a segment of index {self.id}")


def _carry(row_ids: RowIds, deaths: Lsns, source_ids: RowIds, source_deaths: Lsns) -> None:
    """Copies the deaths of the rows that `source_ids` and `row_ids`, both increasing, share."""
    first, last = np.searchsorted(row_ids, [source_ids[0], source_ids[-1] + 1])
    wanted = row_ids[first:last]
    positions = np.searchsorted(source_ids, wanted)
    found = source_ids[positions] == wanted
    deaths[first:last][found] = source_deaths[positions[found]]
