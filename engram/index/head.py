"""The newest rows of an index: float32 in chunks, scanned exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress

import numpy as np
import numpy.typing as npt

from engram.index.attributes import AttributeColumns, GrowingAttributes
from engram.index.codes import UNCODED_ROWS, GrowingCodes, RowCodes, coded_row_bytes
from engram.index.distances import Doubles, Floats, Queries, row_norms
from engram.index.masks import MaskCache
from engram.index.row_columns import ROW_COLUMNS, Column, NumberColumn, Rows, StringColumn, numbers_of
from engram.index.texts import Positions, Strings
from engram.sizes import BYTES_OBJECT

# The death of a row that lives.
ALIVE = np.iinfo(np.int64).max

# What a chunk holds of each row. Its birth is the LSN that added it, 0 when that was long ago, its death the
# LSN that killed it, or ALIVE.
HEAD_COLUMNS: tuple[Column, ...] = (
    *ROW_COLUMNS,
    NumberColumn("births", np.int64, fill=0),
    NumberColumn("deaths", np.int64, fill=ALIVE),
)

_FIRST_CAPACITY = 16

# What a row takes in a chunk, its norm included, beside what it takes for each dimension.
_ROW_BYTES = sum(column.row_bytes(0) for column in HEAD_COLUMNS) + 8
_DIMENSION_BYTES = sum(column.row_bytes(1) - column.row_bytes(0) for column in HEAD_COLUMNS)
# The objects of a chunk and of its arrays; and of a JSON text, with what it takes in a dictionary.
_CHUNK_OBJECT_BYTES = 1500
_ATTRIBUTES_OBJECT_BYTES = BYTES_OBJECT + 96

RowIds = npt.NDArray[np.int64]
Lsns = npt.NDArray[np.int64]


class Chunk:
    """A block of rows with room for `capacity` of them.

    Rows are only appended, and of what is there only a death is ever changed, once. So a search, in
    another thread, may read the first `count` rows of the moment it was asked for, without a lock.

    Each of HEAD_COLUMNS is an attribute. Row ids increase.
    """

    __slots__ = (
        "_attribute_columns",
        "_codes",
        "_norms",
        "attribute_bytes",
        "capacity",
        "count",
        "dead",
        "masks",
        "norms_known",
        *(column.name for column in HEAD_COLUMNS),
    )

    row_ids: RowIds
    keys: list[bytes]
    vectors: Floats
    # JSON texts, of the rows that have them.
    attributes: dict[int, bytes]
    births: Lsns
    deaths: Lsns

    def __init__(self, capacity: int, dimension: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.dead = 0
        for column in HEAD_COLUMNS:
            setattr(self, column.name, column.allocate(capacity, dimension))
        # What the texts of attributes take.
        self.attribute_bytes = 0
        self._norms: Doubles = np.empty(capacity, np.float64)
        self._attribute_columns: GrowingAttributes | None = None
        self._codes: GrowingCodes | None = None
        self.masks = MaskCache()
        self.norms_known = 0

    def _check(self, count: int) -> None:
        # What is cached of rows that are not there yet would be taken for theirs when they come.
        if not 0 <= count <= self.count:
            raise ValueError(f"{count} of the {self.count} rows of a chunk")

    def codes(self, queries: Queries, count: int) -> RowCodes | None:
        """Codes of nearly all of the first `count` rows, None while there are few; for a search.

        They may cover more rows, which another search has asked for.

        Raises:
            ValueError: there are not so many rows.
        """
        self._check(count)
        codes = self._codes
        if codes is None:
            if count < UNCODED_ROWS:
                return None
            codes = self._codes = GrowingCodes(*self.vectors.shape)
        return codes.latest(self.vectors[:count], self.norms(count), queries)

    @property
    def bytes_held(self) -> int:
        """What the arrays take; keys and attributes come beside."""
        columns = sum(
            numbers_of(self, column).nbytes for column in HEAD_COLUMNS if isinstance(column, NumberColumn)
        )
        return columns + self._norms.nbytes + (0 if self._codes is None else self._codes.bytes_held)

    @property
    def bytes_reserved(self) -> int:
        """What the arrays take once they have been searched, codes included, and attributes; without keys."""
        capacity = self.capacity
        dimension = int(self.vectors.shape[1])
        row = _DIMENSION_BYTES * dimension + _ROW_BYTES
        if capacity >= UNCODED_ROWS:
            row += coded_row_bytes(dimension)
        return _CHUNK_OBJECT_BYTES + capacity * row + self.attribute_bytes

    def describe(self, position: int, text: bytes) -> None:
        """Gives a row that has none its attributes, a JSON text."""
        self.attributes[position] = text
        self.attribute_bytes += _ATTRIBUTES_OBJECT_BYTES + len(text)

    def norms(self, count: int) -> Doubles:
        """The norms of the first `count` rows, computed at the first search that needs them.

        Two threads may compute the same ones at once: they write the same numbers.

        Raises:
            ValueError: there are not so many rows.
        """
        self._check(count)
        known = self.norms_known
        if known < count:
            self._norms[known:count] = row_norms(self.vectors[known:count])
            self.norms_known = count
        return self._norms[:count]

    def append(self, row_id: int, key: bytes, vector: Floats, lsn: int = 0) -> None:
        """Appends one row, born at `lsn`; there must be room."""
        position = self.count
        self.births[position] = lsn
        self.vectors[position] = vector
        self.row_ids[position] = row_id
        self.keys.append(key)
        self.count = position + 1

    def extend(
        self,
        row_ids: RowIds,
        keys: list[bytes],
        vectors: Floats,
        lsns: Lsns | int = 0,
        attributes: Sequence[bytes | None] = (),
    ) -> None:
        """Appends rows, born at `lsns`; there must be room. `attributes` are theirs, or empty."""
        start, end = self.count, self.count + len(keys)
        if any(attributes):
            # Without a step for each of them.
            described = dict(
                zip(compress(range(start, end), attributes), filter(None, attributes), strict=True)
            )
            self.attributes.update(described)
            self.attribute_bytes += _attribute_bytes(described)
        self.births[start:end] = lsns
        self.vectors[start:end] = vectors
        self.row_ids[start:end] = row_ids
        self.keys.extend(keys)
        self.count = end

    def take(self, rows: Rows, part: slice) -> None:
        """Appends some of the rows of a snapshot; there must be room."""
        for column in ROW_COLUMNS:
            column.put(getattr(self, column.name), self.count, rows[column.name][part])
        self.count += part.stop - part.start
        self.attribute_bytes = _attribute_bytes(self.attributes)

    def norms_at(self, positions: Positions) -> Doubles:
        """The norms of rows that a search has asked `norms` for."""
        return self._norms[positions]

    def keys_at(self, positions: Positions) -> list[bytes]:
        """The keys of the rows at these positions."""
        keys = self.keys
        return [keys[position] for position in positions.tolist()]

    def attributes_at(self, positions: Positions) -> list[bytes]:
        """The JSON texts of the rows at these positions, empty for those without."""
        return [self.attributes.get(position, b"") for position in positions.tolist()]

    def attribute_columns(self, count: int) -> AttributeColumns:
        """The attributes of the first `count` rows as columns; a row is decoded at the first search for it.

        Two threads may make the columns at once: those of one are lost.

        Raises:
            ValueError: there are not so many rows.
        """
        self._check(count)
        if not self.attributes:
            return AttributeColumns(count, {}, None, self.attributes_at)
        growing = self._attribute_columns
        if growing is None:
            growing = self._attribute_columns = GrowingAttributes(self.capacity)
        return growing.columns(count, self.attributes_at)

    def strings_at(self, column: StringColumn, positions: Positions) -> list[bytes]:
        """The strings of the rows at these positions."""
        return column.at(getattr(self, column.name), positions)

    def strings_of(self, column: StringColumn, positions: Positions) -> Strings:
        """The same, to be copied block by block."""
        return Strings(self.strings_at(column, positions))

    def position(self, row_id: int) -> int:
        """Where a row is that is known to be here."""
        return int(self.row_ids[: self.count].searchsorted(row_id))

    def kill(self, position: int, lsn: int) -> None:
        """Marks a living row as dead."""
        self.deaths[position] = lsn
        self.dead += 1

    def kill_many(self, positions: Positions, lsn: int) -> None:
        """Marks living rows as dead, each given once."""
        self.deaths[positions] = lsn
        self.dead += len(positions)

    def copy(self, start: int, capacity: int, dimension: int) -> Chunk:
        """A chunk of another capacity that holds the rows from `start` on.

        This one stays as it is for those who search it.
        """
        copied = Chunk(capacity, dimension)
        for column in HEAD_COLUMNS:
            held = getattr(self, column.name)
            if isinstance(column, NumberColumn):
                column.put(getattr(copied, column.name), 0, held[start : self.count])
            else:
                setattr(copied, column.name, column.rest(held, start))
        copied.count = self.count - start
        copied.dead = int(np.count_nonzero(copied.deaths[: copied.count] != ALIVE))
        copied.attribute_bytes = _attribute_bytes(copied.attributes)
        return copied


def _attribute_bytes(texts: Mapping[int, bytes]) -> int:
    return _ATTRIBUTES_OBJECT_BYTES * len(texts) + sum(map(len, texts.values()))


class Head:
    """The chunks, oldest first, and appending to the last of them."""

    def __init__(self, dimension: int, chunk_rows: int) -> None:
        self.dimension = dimension
        self.chunk_rows = chunk_rows
        # Replaced, not changed, when a chunk comes or goes: views hold it.
        self.chunks: tuple[Chunk, ...] = ()
        # Rows in all chunks but the last, and the bytes reserved for those.
        self.rows_before_tail = 0
        self._bytes_before_tail = 0

    @property
    def rows(self) -> int:
        """How many rows there are, dead ones included."""
        return self.rows_before_tail + (self.chunks[-1].count if self.chunks else 0)

    @property
    def bytes_reserved(self) -> int:
        """What the chunks take once they have been searched; without keys."""
        return self._bytes_before_tail + (self.chunks[-1].bytes_reserved if self.chunks else 0)

    def born_by(self, lsn: int) -> tuple[tuple[Chunk, int], ...]:
        """The chunks with rows that were there at `lsn`, and how many those are: at least one, the first.

        No row must have left since.
        """
        chunks = self.chunks
        for number in reversed(range(len(chunks))):
            chunk = chunks[number]
            born = int(chunk.births[: chunk.count].searchsorted(lsn, "right"))
            if born:
                return (*((before, before.count) for before in chunks[:number]), (chunk, born))
        return ()

    def tail(self, spares: list[Chunk] | None = None) -> Chunk:
        """A last chunk with room for at least one row more; it may have none yet.

        A new one is one of `spares`, if there are any. The first chunk starts small and grows by half, so
        that a small index takes little memory.
        """
        chunks = self.chunks
        if not chunks:
            tail = Chunk(min(_FIRST_CAPACITY, self.chunk_rows), self.dimension)
            self.chunks = (tail,)
            return tail
        tail = chunks[-1]
        if tail.count < tail.capacity:
            return tail
        if tail.count < self.chunk_rows:
            return self._grow(tail, tail.count + 1)
        new = spares.pop() if spares else Chunk(self.chunk_rows, self.dimension)
        rows = self.rows_before_tail + tail.count
        size = self._bytes_before_tail + tail.bytes_reserved
        self.chunks, self.rows_before_tail, self._bytes_before_tail = (*chunks, new), rows, size
        return new

    def _grow(self, tail: Chunk, rows: int) -> Chunk:
        """A last chunk with the rows of the last one, and room for `rows` as far as a chunk may have it."""
        capacity = tail.capacity
        while capacity < min(rows, self.chunk_rows):
            capacity = min(capacity * 3 // 2, self.chunk_rows)
        if capacity > tail.capacity:
            tail = tail.copy(0, capacity, self.dimension)
            self.chunks = (*self.chunks[:-1], tail)
        return tail

    def reserve(self, rows: int) -> list[Chunk]:
        """Makes room for so many more rows; returns the chunks that `extend` takes beside the last one."""
        if not rows:
            return []
        tail = self.tail()
        tail = self._grow(tail, tail.count + rows)
        room = tail.capacity - tail.count
        needed = max(0, -((room - rows) // self.chunk_rows))
        return [Chunk(self.chunk_rows, self.dimension) for _ in range(needed)]

    def extend(
        self,
        row_ids: RowIds,
        keys: list[bytes],
        vectors: Floats,
        lsn: int = 0,
        spares: list[Chunk] | None = None,
        attributes: Sequence[bytes | None] = (),
    ) -> None:
        """Appends rows, born at `lsn`; their ids are greater than all here. `spares` are of `reserve`.

        `attributes` has a JSON text or None for each, or is empty.
        """
        done = 0
        while done < len(keys):
            tail = self.tail(spares)
            part = slice(done, min(done + tail.capacity - tail.count, len(keys)))
            tail.extend(row_ids[part], keys[part], vectors[part], lsn, attributes[part])
            done = part.stop

    def fill(self, rows: Rows) -> None:
        """Takes the rows of a snapshot while there are none; they were born long ago."""
        count = len(rows["row_ids"])
        spares = self.reserve(count)
        done = 0
        while done < count:
            tail = self.tail(spares)
            part = slice(done, min(done + tail.capacity - tail.count, count))
            tail.take(rows, part)
            done = part.stop

    def find(self, row_id: int) -> tuple[Chunk, int]:
        """Where a row is that is known to be here."""
        chunks = self.chunks
        chunk = chunks[-1]
        if row_id < chunk.row_ids[0]:
            low, high = 0, len(chunks) - 1
            while high - low > 1:
                middle = (low + high) // 2
                if row_id < chunks[middle].row_ids[0]:
                    high = middle
                else:
                    low = middle
            chunk = chunks[low]
        return chunk, chunk.position(row_id)

    def drop_through(self, row_id: int) -> None:
        """Lets go of the rows up to and including `row_id`."""
        self.replace(self.chunks_after(row_id))

    def chunks_after(self, row_id: int) -> tuple[Chunk, ...]:
        """The chunks without the rows up to and including `row_id`, for `replace`."""
        chunks = list(self.chunks)
        while chunks and chunks[0].row_ids[chunks[0].count - 1] <= row_id:
            del chunks[0]
        if chunks and chunks[0].row_ids[0] <= row_id:
            first = chunks[0]
            start = int(first.row_ids[: first.count].searchsorted(row_id, "right"))
            chunks[0] = first.copy(start, max(first.count - start, _FIRST_CAPACITY), self.dimension)
        return tuple(chunks)

    def replace(self, chunks: tuple[Chunk, ...]) -> None:
        """The head has these chunks."""
        rows = sum(chunk.count for chunk in chunks[:-1])
        size = sum(chunk.bytes_reserved for chunk in chunks[:-1])
        self.chunks, self.rows_before_tail, self._bytes_before_tail = chunks, rows, size
