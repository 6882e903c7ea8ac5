"""The state of one vector index: its rows, which of them live, and what should be built next."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import repeat
from typing import Any

import attrs
import numpy as np

from engram.errors import DamagedDataError, NothingChangedError
from engram.index.distances import Floats
from engram.index.head import ALIVE, Chunk, Head, Lsns, RowIds
from engram.index.merging import DEAD_FRACTION, LARGEST_SEGMENT, next_merge
from engram.index.parameters import Parameters
from engram.index.row_columns import Rows
from engram.index.segment import Segment
from engram.index.texts import Positions
from engram.scan_order import PAGE_BYTES, ScanOrder
from engram.sizes import BYTES_OBJECT, INTEGER_OBJECT, table_bytes

# The head is sealed when it has so many rows, or takes so many bytes.
SEAL_ROWS = 8192
_HEAD_BYTES = 128 << 20

_CHUNK_ROWS = 4096
_CHUNK_BYTES = 8 << 20

# Heads of at most so many times the rows that seal one become one segment, so that the first rows of a
# large backlog get their graph soon.
_LARGEST_SEAL = 4

# Rows whose vectors are copied in one go.
_COPIED_ROWS = 1024
# One key in so many is measured to estimate what keys take; and what CPython takes for a key in a
# dictionary of row ids beyond its bytes and the table: the objects of the key and of the number.
_KEY_SAMPLING = 32
_KEY_OBJECT_BYTES = sys.getsizeof(b"") + sys.getsizeof(1 << 30)
# The same with what the allocator rounds up on average; the index itself; and a row of a segment: its death.
_LIVE_KEY_BYTES = BYTES_OBJECT + INTEGER_OBJECT
_INDEX_OBJECT_BYTES = 2500
_SEGMENT_ROW_BYTES = 8


@attrs.define(eq=False)
class InstalledSegment:
    """A segment as part of an index.

    Attributes:
        deaths: (rows,) the LSN that killed a row, or ALIVE.
        dead: how many rows are dead.
        mergeable: whether it may be built again, alone or with others.
    """

    segment: Segment
    deaths: Lsns
    dead: int
    mergeable: bool = True

    @property
    def id(self) -> str:
        return self.segment.id

    @property
    def rows(self) -> int:
        return len(self.segment.row_ids)

    @property
    def live(self) -> int:
        return self.rows - self.dead

    @property
    def removable(self) -> bool:
        """Whether another, or nothing, may take its place."""
        return self.mergeable or not self.live

    def kill(self, position: int, lsn: int) -> None:
        """Marks a living row as dead."""
        self.deaths[position] = lsn
        self.dead += 1

    def kill_many(self, positions: Positions, lsn: int) -> None:
        """Marks living rows as dead, each given once."""
        self.deaths[positions] = lsn
        self.dead += len(positions)


@attrs.frozen(eq=False)
class View:
    """An index at one LSN: what a search sees, whatever happens to the index meanwhile.

    All rows of the segments are there, and of each chunk in `head` its first few, at least one, as many as
    stand beside it (`head_rows` together), but for those that died at or before `lsn`; that is no more than
    `rows`. The generation changes with every segment installed: views of one generation differ only in how
    much of the head they see, and in deaths. Rows that are added later have ids from `next_row` on.
    """

    parameters: Parameters
    generation: int
    segments: tuple[InstalledSegment, ...]
    head: tuple[tuple[Chunk, int], ...]
    head_rows: int
    lsn: int
    rows: int
    next_row: int

    @property
    def attribute_bytes(self) -> int:
        """About how many bytes the JSON texts of all rows take."""
        segments = sum(installed.segment.attributes.joined.nbytes for installed in self.segments)
        return segments + sum(chunk.attribute_bytes for chunk, _ in self.head)

    def vectors_of(self, row_ids: Sequence[int]) -> list[bytes | None]:
        """The vectors of these rows, little-endian float32, in the order given; None where the id is -1.

        The other rows are in this view.
        """
        wanted = np.array(row_ids, np.int64)
        found: list[bytes | None] = [None] * len(row_ids)
        sources: list[tuple[Chunk | Segment, int]] = [(each.segment, each.rows) for each in self.segments]
        for source, count in (*sources, *self.head):
            held = source.row_ids[:count]
            (places,) = ((wanted >= held[0]) & (wanted <= held[-1])).nonzero()
            for start in range(0, len(places), _COPIED_ROWS):
                part = places[start : start + _COPIED_ROWS]
                rows = source.vectors[held.searchsorted(wanted[part])].astype("<f4")
                for place, row in zip(part.tolist(), rows, strict=True):
                    found[place] = row.tobytes()
        return found


# What a row is in and its position there; and several rows.
_Located = tuple[InstalledSegment | Chunk, int]
_AllLocated = list[tuple[InstalledSegment | Chunk, int | Positions]]


@attrs.frozen(eq=False)
class Addition:
    """Rows that are about to be added, with room for them: see `VectorIndex.prepare_addition`.

    `rows` maps distinct keys to row ids; `attributes` has a text or None for each, or is empty; `new` counts
    the keys that are new, `new_bytes` their lengths; `dying` are the rows that the keys had before; `spares`
    are chunks to come after the head's last.
    """

    rows: dict[bytes, int]
    row_ids: RowIds
    vectors: Floats
    attributes: Sequence[bytes | None]
    new_bytes: int
    new: int
    dying: _AllLocated
    spares: list[Chunk]


# The same for one row: the chunk it goes to, its key, vector and attributes, and the row the key had before.
OneAddition = tuple[Chunk, bytes, Floats, bytes | None, _Located | None]


@attrs.frozen(eq=False)
class Deletion:
    """Keys that are about to be deleted, and their rows."""

    keys: list[bytes]
    dying: _AllLocated


@attrs.frozen(eq=False)
class _Segments:
    """The segments of an index, oldest first, and what is looked up of them all the time.

    Attributes:
        starts: the least row id of each.
        last_row: the greatest of the last, -1 without any.
        rows: in all of them.
    """

    installed: tuple[InstalledSegment, ...] = ()
    starts: list[int] = attrs.Factory(list)
    last_row: int = -1
    rows: int = 0

    @classmethod
    def of(cls, segments: Sequence[InstalledSegment]) -> _Segments:
        return cls(
            tuple(segments),
            [int(installed.segment.row_ids[0]) for installed in segments],
            int(segments[-1].segment.row_ids[-1]) if segments else -1,
            sum(installed.rows for installed in segments),
        )


@attrs.frozen(eq=False)
class Installation:
    """What an index is about to consist of: see `VectorIndex.prepare_installation`."""

    segments: _Segments
    chunks: tuple[Chunk, ...]
    merge_wanted: bool
    released: list[str]


@attrs.frozen(eq=False)
class Plan:
    """Rows that should become one segment: adjacent segments, the head's oldest rows, or both.

    `chunks` holds each chunk and how many of its rows; `through` is the id of the last of these rows, -1
    when there are none.
    """

    sources: tuple[InstalledSegment, ...]
    chunks: tuple[tuple[Chunk, int], ...]
    through: int


@attrs.frozen
class IndexStatistics:
    """What an index holds. Sizes are in bytes.

    Attributes:
        head_rows: rows in no segment, dead ones included.
        rows_awaiting_graph: those of them that the builder should seal by now.
        bytes_in_memory: the chunks of the head, the deaths of rows in segments, and what Python holds for
            the keys, which is estimated from the lengths of some.
        bytes_mapped: sizes of the segments' files, which the system pages in as they are used.
        curves: for each segment its rows and its `curve`.
    """

    live_rows: int
    dead_rows: int
    head_rows: int
    segments: int
    rows_awaiting_graph: int
    bytes_in_memory: int
    bytes_mapped: int
    curves: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]


class VectorIndex:
    """One index. Its id is the LSN that created it; every method is synchronous.

    Rows have ids that increase and are never used again. An overwrite kills the old row and appends a
    new one. Row ids of segments are disjoint ranges in the order of `segments`, and below the head's.

    `live` maps each key to its row; only the index changes it. The owner calls `drop` once the index is gone,
    which sets `dropped` and calls `on_drop`, for those who work on it in the background. Cursors of scans are
    numbers from `first_serial` on.
    """

    def __init__(
        self,
        index_id: int,
        parameters: Parameters,
        *,
        seal_rows: int = SEAL_ROWS,
        largest_segment: int = LARGEST_SEGMENT,
        first_serial: int = 1,
    ) -> None:
        row_bytes = 4 * parameters.dimension
        self.id = index_id
        self.parameters = parameters
        self.dropped = False
        self.on_drop: Callable[[], None] | None = None
        self._segments = _Segments()
        self.live: dict[bytes, int] = {}
        self._order = ScanOrder(self.live, first_serial)
        # The lengths of the keys in it.
        self._key_bytes = 0
        self._seal_rows = min(seal_rows, max(16, _HEAD_BYTES // row_bytes))
        self._largest_segment = largest_segment
        chunk_rows = min(_CHUNK_ROWS, max(1, self._seal_rows // 2), max(4, _CHUNK_BYTES // row_bytes))
        self._head = Head(parameters.dimension, chunk_rows)
        self._next_row = 0
        self._merge_wanted = False
        self._generation = 0
        # Segments do not tell when their rows were born.
        self.oldest_view = index_id

    def drop(self) -> None:
        """The index is gone: those who work on it in the background stop."""
        self.dropped = True
        if self.on_drop is not None:
            self.on_drop()

    def remains(self) -> list[dict[Any, Any] | list[Any]]:
        """What of the index may be so large that it is to be freed in slices, once it is gone."""
        return [self.live, *self._order.remains()]

    @property
    def segments(self) -> tuple[InstalledSegment, ...]:
        """The segments, oldest rows first."""
        return self._segments.installed

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the head, oldest rows first."""
        return self._head.chunks

    def __len__(self) -> int:
        return len(self.live)

    def __contains__(self, key: bytes) -> bool:
        return key in self.live

    @property
    def rows_total(self) -> int:
        """Rows held, living or dead."""
        return self._segments.rows + self._head.rows

    @property
    def rows_unindexed(self) -> int:
        """Rows of the head: not in any graph yet."""
        return self._head.rows

    @property
    def rows_dead(self) -> int:
        """Rows held that no key points at any more."""
        return self.rows_total - len(self.live)

    @property
    def segment_bytes(self) -> int:
        """Bytes of the segments' files."""
        return sum(installed.segment.size for installed in self.segments)

    @property
    def bytes_reserved(self) -> int:
        """What the index takes in memory once it has been searched, in a few steps.

        That is its live keys, the head with codes, attributes and norms, and the deaths of rows in segments.
        What the system maps is not counted: it can be had back at any time.
        """
        return (
            _INDEX_OBJECT_BYTES
            + self._head.bytes_reserved
            + table_bytes(self.live)
            + len(self.live) * _LIVE_KEY_BYTES
            + self._key_bytes
            + self._order.bytes_held
            + self._segments.rows * _SEGMENT_ROW_BYTES
        )

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
        return self.add_prepared(lsn, self.prepare_addition(keys, vectors, attributes))

    def prepare_addition(
        self, keys: Sequence[bytes], vectors: Floats, attributes: Sequence[bytes | None] = ()
    ) -> Addition | OneAddition:
        """What `add` does of these, up to its first change: nobody can tell whether it was called.

        What is returned holds until the next change of the index.
        """
        if len(keys) == 1:
            return self.prepare_one(keys[0], vectors[0], (attributes[0] if attributes else None) or b"")
        last = dict(zip(keys, range(len(keys)), strict=True))
        if len(last) < len(keys):
            kept = sorted(last.values())
            keys = [keys[position] for position in kept]
            vectors = vectors[kept]
            attributes = [attributes[position] for position in kept] if attributes else ()
        row_ids = np.arange(self._next_row, self._next_row + len(keys), dtype=np.int64)
        return self._addition(row_ids, list(keys), vectors, attributes)

    def prepare_one(self, key: bytes, vector: Floats, text: bytes | None) -> OneAddition:
        """As `prepare_addition` for one row; without a text it has the attributes that the key has."""
        chunk = self._head.tail()
        old = self.live.get(key)
        if old is None:
            return chunk, key, vector, text, None
        located = self._locate_row(old)
        if text is None:
            source, position = located
            if isinstance(source, Chunk):
                text = source.attributes.get(position)
            else:
                text = source.segment.attributes_at(np.array([position]))[0]
        return chunk, key, vector, text, located

    def _addition(
        self, row_ids: RowIds, keys: list[bytes], vectors: Floats, attributes: Sequence[bytes | None]
    ) -> Addition:
        """Rows of distinct keys that are about to be added."""
        live = self.live
        spares = self._head.reserve(len(keys))
        known = list(filter(live.__contains__, keys))
        return Addition(
            dict(zip(keys, row_ids.tolist(), strict=True)),
            row_ids,
            vectors,
            attributes,
            sum(map(len, keys)) - sum(map(len, known)),
            len(keys) - len(known),
            self._locate(list(map(live.__getitem__, known))),
            spares,
        )

    def add_prepared(self, lsn: int, addition: Addition | OneAddition) -> int:
        """Carries out what `prepare_addition` has prepared.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        if type(addition) is not tuple:
            assert isinstance(addition, Addition)
            self._append(lsn, addition)
            return addition.new
        chunk, key, vector, text, old = addition
        row_id = self._next_row
        try:
            self.live[key] = row_id
        except MemoryError as error:
            raise NothingChangedError from error
        self._next_row = row_id + 1
        if text:
            chunk.describe(chunk.count, text)
        chunk.append(row_id, key, vector, lsn)
        if old is None:
            self._key_bytes += len(key)
            self._order.add(key)
            return 1
        self._kill(*old, lsn)
        return 0

    def _append(self, lsn: int, addition: Addition) -> None:
        """Appends rows and points their keys at them."""
        rows, vectors = addition.rows, addition.vectors
        self._next_row += len(rows)
        self._head.extend(addition.row_ids, list(rows), vectors, lsn, addition.spares, addition.attributes)
        self._key_bytes += addition.new_bytes
        live = self.live
        live.update(rows)
        if addition.new:
            self._order.extend(list(rows), addition.new)
        for source, positions in addition.dying:
            self._kill(source, positions, lsn)

    def delete(self, lsn: int, keys: Sequence[bytes]) -> int:
        """Kills the rows of these keys; returns how many there were."""
        return self.delete_prepared(lsn, self.prepare_deletion(keys))

    def prepare_deletion(self, keys: Sequence[bytes]) -> Deletion:
        """What `delete` does of these up to its first change; it holds until the next change of the index."""
        live = self.live
        rows = {key: row_id for key in keys if (row_id := live.get(key)) is not None}
        return Deletion(list(rows), self._locate(list(rows.values())))

    def delete_prepared(self, lsn: int, deletion: Deletion) -> int:
        """Carries out what `prepare_deletion` has prepared."""
        live = self.live
        for key in deletion.keys:
            del live[key]
            self._key_bytes -= len(key)
            self._order.remove(key)
        for source, positions in deletion.dying:
            self._kill(source, positions, lsn)
        return len(deletion.keys)

    def vector(self, key: bytes) -> bytes | None:
        """The vector of a key as it was added: little-endian float32."""
        found = self._find(key)
        return None if found is None else found[0].vectors[found[1]].tobytes()

    def attributes(self, key: bytes) -> bytes:
        """The JSON text of a key's attributes, empty when there is none or no such key."""
        found = self._find(key)
        return b"" if found is None else found[0].attributes_at(np.array([found[1]]))[0]

    def attributes_of(self, keys: Sequence[bytes]) -> list[bytes]:
        """As `attributes`, of each of these keys."""
        found = [b""] * len(keys)
        wanted = np.fromiter(map(self.live.get, keys, repeat(-1)), np.int64, len(keys))
        sources: list[tuple[Chunk | Segment, int]] = [(each.segment, each.rows) for each in self.segments]
        sources += [(chunk, chunk.count) for chunk in self._head.chunks if chunk.attributes]
        for source, count in sources:
            held = source.row_ids[:count]
            (places,) = ((wanted >= held[0]) & (wanted <= held[-1])).nonzero()
            if len(places):
                texts = source.attributes_at(held.searchsorted(wanted[places]))
                for place, text in zip(places.tolist(), texts, strict=True):
                    found[place] = text
        return found

    def _find(self, key: bytes) -> tuple[Chunk | Segment, int] | None:
        row_id = self.live.get(key)
        if row_id is None:
            return None
        installed = self._segment_of(row_id)
        if installed is None:
            return self._head.find(row_id)
        return installed.segment, installed.segment.position(row_id)

    @property
    def next_row(self) -> int:
        """The id of the next row that is added."""
        return self._next_row

    @property
    def last_row_in_segments(self) -> int:
        """The greatest id of a row in a segment, -1 without any."""
        return self._segments.last_row

    def scan(self, cursor: int, count: int, size: int = PAGE_BYTES) -> tuple[int, list[bytes]]:
        """The next keys of a scan, up to `count`, and the cursor that continues it, 0 at the end.

        A key that is there throughout is returned: see `ScanOrder.page`.
        """
        return self._order.page(cursor, count, size)

    def statistics(self) -> IndexStatistics:
        """What the index holds now; takes time in proportion to the chunks and segments."""
        head, segments = self._head, self.segments
        chunk_bytes = sum(chunk.bytes_held for chunk in head.chunks)
        key_bytes, keys_counted = 0, 0
        for chunk in head.chunks:
            counted = chunk.keys[::_KEY_SAMPLING]
            key_bytes += _KEY_SAMPLING * sum(map(len, counted))
            keys_counted += _KEY_SAMPLING * len(counted)
        key_bytes += sum(installed.segment.keys.joined.nbytes for installed in segments)
        keys_counted += self._segments.rows
        python_bytes = sys.getsizeof(self.live) + len(self.live) * (
            _KEY_OBJECT_BYTES + key_bytes // max(1, keys_counted)
        )
        return IndexStatistics(
            live_rows=len(self.live),
            dead_rows=self.rows_dead,
            head_rows=head.rows,
            segments=len(segments),
            rows_awaiting_graph=head.rows if self.seal_wanted else 0,
            bytes_in_memory=chunk_bytes + python_bytes + 8 * self._segments.rows,
            bytes_mapped=self.segment_bytes,
            curves=tuple((installed.rows, installed.segment.curve) for installed in segments),
        )

    def view(self, lsn: int) -> View:
        """The index as it was at `lsn`, which must not be before `oldest_view`."""
        head = self._head.born_by(lsn)
        return View(
            self.parameters,
            self._generation,
            self.segments,
            head,
            sum(count for _, count in head),
            lsn,
            self.rows_total,
            self._next_row,
        )

    @property
    def seal_wanted(self) -> bool:
        """Whether the head has rows enough for a segment."""
        return self._head.rows >= self._seal_rows

    @property
    def needs_maintenance(self) -> bool:
        """Whether `plan` has something to build."""
        return self._merge_wanted or self.seal_wanted

    def plan(self) -> Plan | None:
        """What should be built next: a graph for the head, before merges unless there are many to be made."""
        head = self._head
        if self.seal_wanted:
            merged = self._merge(waiting=True) if self._merge_wanted else None
            if merged is not None:
                return _plan(self.segments[merged], ())
            chunks: list[Chunk] = []
            rows = 0
            for chunk in head.chunks:
                if chunks and rows + chunk.count > _LARGEST_SEAL * self._seal_rows:
                    break
                chunks.append(chunk)
                rows += chunk.count
            return _plan((), chunks)
        merged = self._merge(waiting=False) if self._merge_wanted else None
        return None if merged is None else _plan(self.segments[merged], ())

    @property
    def optimized(self) -> bool:
        """Whether all rows are live and in one segment, or there are none."""
        head_rows = self._head.rows
        return not head_rows and not self.rows_dead and len(self.segments) <= 1

    def plan_optimization(self) -> Plan | None:
        """All rows there are, as one segment of whatever size; None when that is what they are."""
        return None if self.optimized else _plan(self.segments, self._head.chunks)

    def _merge(self, *, waiting: bool) -> slice | None:
        return self._merge_of(self.segments, waiting=waiting)

    def _merge_of(self, segments: Sequence[InstalledSegment], *, waiting: bool) -> slice | None:
        return next_merge(
            [
                # One that is larger than what merges yield is left as it is.
                (installed.rows, installed.dead) if installed.removable else (self._largest_segment + 1, 0)
                for installed in segments
            ],
            _LARGEST_SEAL * self._seal_rows,
            waiting=waiting,
            largest=self._largest_segment,
        )

    def leave_unmerged(self, segments: Container[str]) -> None:
        """Those of these segments, given by id, that are here stay as they are: none can be built again."""
        for installed in self.segments:
            if installed.id in segments:
                installed.mergeable = False
        self._merge_wanted = self._merge(waiting=False) is not None

    def install(self, lsn: int, segment: Segment | None, through: int, replaces: Sequence[str]) -> list[str]:
        """A segment takes the place of the head's rows up to row id `through` and of segments.

        `through` is -1 when no rows of the head are replaced; `segment` is None when all of the rows
        were dead. Rows that have died since the segment was planned are dead in it. Returns the ids of
        the segments that are no longer used: those in `replaces`.

        Raises:
            DamagedDataError: the segment is of another index.
            ValueError: a segment in `replaces` is not here.
        """
        return self.install_prepared(lsn, self.prepare_installation(lsn, segment, through, replaces))

    def prepare_installation(
        self, lsn: int, segment: Segment | None, through: int, replaces: Sequence[str]
    ) -> Installation:
        """What `install` does up to its first change, with the same errors; it holds until the next change of
        the index."""
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
        return Installation(
            _Segments.of(remaining),
            self._head.chunks_after(through),
            self._merge_of(remaining, waiting=False) is not None,
            list(replaces),
        )

    def install_prepared(self, lsn: int, installation: Installation) -> list[str]:
        """Carries out what `prepare_installation` has prepared."""
        self._head.replace(installation.chunks)
        self._generation += 1
        self.oldest_view = lsn
        self._segments = installation.segments
        self._merge_wanted = installation.merge_wanted
        return installation.released

    def _segment_of(self, row_id: int) -> InstalledSegment | None:
        """The segment that holds a row, None when the head does."""
        if row_id > self._segments.last_row:
            return None
        return self.segments[bisect_right(self._segments.starts, row_id) - 1]

    def _kill(self, source: InstalledSegment | Chunk, positions: int | Positions, lsn: int) -> None:
        """Marks living rows as dead."""
        if isinstance(positions, int):
            source.kill(positions, lsn)
        else:
            source.kill_many(positions, lsn)
        if (
            isinstance(source, InstalledSegment)
            and source.dead > DEAD_FRACTION * source.rows
            and source.removable
        ):
            self._merge_wanted = True

    def _locate_row(self, row_id: int) -> _Located:
        """Where a row is."""
        installed = self._segment_of(row_id)
        if installed is None:
            return self._head.find(row_id)
        return installed, installed.segment.position(row_id)

    def _locate(self, row_ids: Sequence[int]) -> _AllLocated:
        """Where rows are: one by one, or, where that is quicker, source by source."""
        if len(row_ids) <= len(self.segments) + len(self._head.chunks):
            return [self._locate_row(row_id) for row_id in row_ids]
        located: _AllLocated = []
        dying = np.sort(np.array(row_ids, np.int64))
        edges = dying.searchsorted([*self._segments.starts, self._segments.last_row + 1]).tolist()
        for installed, first, last in zip(self.segments, edges, edges[1:], strict=False):
            located.append((installed, installed.segment.row_ids.searchsorted(dying[first:last])))
        for chunk in self._head.chunks:
            if chunk.count:
                rows = chunk.row_ids[: chunk.count]
                first, last = dying.searchsorted([rows[0], rows[-1] + 1]).tolist()
                located.append((chunk, rows.searchsorted(dying[first:last])))
        return located

    @classmethod
    def restore(
        cls,
        index_id: int,
        parameters: Parameters,
        next_row: int,
        segments: Iterable[tuple[Segment, Positions]],
        rows: Rows,
        *,
        seal_rows: int = SEAL_ROWS,
        first_serial: int = 1,
    ) -> VectorIndex:
        """An index of these segments, each with the positions of its dead rows, and with `rows` in its head.

        Raises:
            DamagedDataError: a segment is of another index.
        """
        index = cls(index_id, parameters, seal_rows=seal_rows, first_serial=first_serial)
        live = index.live
        installed = []
        for segment, dead in segments:
            index._check(segment)
            deaths = np.full(len(segment.row_ids), ALIVE, np.int64)
            deaths[dead] = 0
            installed.append(InstalledSegment(segment, deaths, len(dead)))
            live.update(zip(segment.keys.all(), segment.row_ids.tolist(), strict=True))
            for key, row_id in zip(segment.keys_at(dead), segment.row_ids[dead].tolist(), strict=True):
                # A later row may have the key.
                if live[key] == row_id:
                    del live[key]
        index._head.fill(rows)
        for chunk in index._head.chunks:
            live.update(zip(chunk.keys, chunk.row_ids[: chunk.count].tolist(), strict=True))
        index._key_bytes = sum(map(len, live))
        index._order = ScanOrder(live, first_serial)
        index._segments = _Segments.of(installed)
        index._merge_wanted = index._merge(waiting=False) is not None
        index._next_row = next_row
        return index

    def _check(self, segment: Segment) -> None:
        if segment.index_id != self.id or segment.vectors.shape[1] != self.parameters.dimension:
            raise DamagedDataError(segment.path, f"not a segment of index {self.id}")


def _plan(sources: tuple[InstalledSegment, ...], chunks: Iterable[Chunk]) -> Plan:
    counted = tuple((chunk, chunk.count) for chunk in chunks if chunk.count)
    through = -1
    if counted:
        last, count = counted[-1]
        through = int(last.row_ids[count - 1])
    return Plan(sources, counted, through)


def _carry(row_ids: RowIds, deaths: Lsns, source_ids: RowIds, source_deaths: Lsns) -> None:
    """Copies the deaths of the rows that `source_ids` and `row_ids`, both increasing, share."""
    first, last = np.searchsorted(row_ids, [source_ids[0], source_ids[-1] + 1])
    wanted = row_ids[first:last]
    positions = np.searchsorted(source_ids, wanted)
    found = source_ids[positions] == wanted
    deaths[first:last][found] = source_deaths[positions[found]]
