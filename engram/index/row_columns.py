"""The columns that a row is stored in, listed once: the head, segments, snapshots and dumps walk the list.

A further column is a line in `ROW_COLUMNS`, and an attribute of that name in `Segment`. What is not in the
list is worked out from the vectors and the attributes (norms, codes, attributes as columns), or is told by
the head alone (`head.HEAD_COLUMNS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Protocol, TypeAlias

import attrs
import numpy as np

from engram.columns import Array, pack_bytes, unpack_bytes
from engram.index.texts import Positions, Selection, Strings, Texts

# The id of a place in a chunk without a row yet: above those of all rows.
_NO_ROW = np.iinfo(np.int64).max
# What a string takes in a list beside itself.
_PLACE_BYTES = 8


@attrs.frozen
class NumberColumn:
    """A number for each row, or one for each dimension where it is `wide`.

    Attributes:
        name: of the attribute of a chunk or a segment: an array, (rows,) or (rows, dimension).
        dtype: of that array.
        fill: what a chunk has where there is no row yet; None for whatever was in memory.
    """

    name: str
    dtype: type[np.generic]
    wide: bool = False
    fill: int | None = None

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that hold it in a segment: one."""
        return (_stored(self.name),)

    def shape(self, rows: int, dimension: int) -> tuple[int, ...]:
        """That of the array."""
        return (rows, dimension) if self.wide else (rows,)

    def row_bytes(self, dimension: int) -> int:
        """What a row takes of it in a chunk."""
        return np.dtype(self.dtype).itemsize * (dimension if self.wide else 1)

    def allocate(self, capacity: int, dimension: int) -> Array:
        """What a chunk holds it in, while there are no rows."""
        shape = self.shape(capacity, dimension)
        return np.empty(shape, self.dtype) if self.fill is None else np.full(shape, self.fill, self.dtype)

    def put(self, held: Array, start: int, values: Array) -> None:
        """Gives a chunk that of the rows from `start` on."""
        held[start : start + len(values)] = values

    def open(self, arrays: Mapping[str, Array]) -> Array:
        """What a segment with these arrays holds."""
        return arrays[self.arrays[0]]

    def pack(self, parts: Iterable[Array]) -> dict[str, Array]:
        """The array of a snapshot: all numbers of some rows and of the next ones, one after the other."""
        flat = [part.reshape(-1) for part in parts]
        return {_stored(self.name): np.concatenate(flat) if flat else np.empty(0, self.dtype)}

    def unpack(self, arrays: Mapping[str, Array], sizes: Iterable[tuple[int, int]]) -> list[Array]:
        """The inverse of `pack`, for parts of so many rows and dimensions each."""
        numbers, start = arrays[_stored(self.name)], 0
        parts = []
        for rows, dimension in sizes:
            shape = self.shape(rows, dimension)
            stop = start + math.prod(shape)
            parts.append(numbers[start:stop].reshape(shape))
            start = stop
        return parts


@attrs.frozen
class StringColumn:
    """A byte string for each row.

    Attributes:
        name: of the attribute of a chunk or a segment: a segment has `Texts` there, a chunk a list.
        sparse: it is empty in most rows, perhaps: a chunk has a dict, by position, of the others.
        saved_as: its name in a snapshot, where `keys` are those of the indices.
    """

    name: str
    sparse: bool = False
    saved_as: str = attrs.field(default=attrs.Factory(lambda self: _stored(self.name), takes_self=True))

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that hold it in a segment: of `Texts`."""
        name = _stored(self.name)
        return f"{name}-bytes", f"{name}-ends"

    def row_bytes(self, dimension: int) -> int:
        """What a row takes of it in a chunk, beside its string."""
        return 0 if self.sparse else _PLACE_BYTES

    def allocate(self, capacity: int, dimension: int) -> list[bytes] | dict[int, bytes]:
        """What a chunk holds it in, while there are no rows."""
        return {} if self.sparse else []

    def rest(self, held: Any, start: int) -> list[bytes] | dict[int, bytes]:
        """What a chunk holds that has the rows from `start` on of the one that holds this."""
        if self.sparse:
            return {position - start: value for position, value in held.items() if position >= start}
        found: list[bytes] = held[start:]
        return found

    def at(self, held: Any, positions: Positions) -> list[bytes]:
        """Those of the rows at these positions of what a chunk holds."""
        if self.sparse:
            return [held.get(position, b"") for position in positions.tolist()]
        return [held[position] for position in positions.tolist()]

    def put(self, held: Any, start: int, values: list[bytes]) -> None:
        """Gives a chunk those of the rows from `start` on, the first that it has none of."""
        if self.sparse:
            held.update((position, value) for position, value in enumerate(values, start) if value)
        else:
            held.extend(values)

    def open(self, arrays: Mapping[str, Array]) -> Texts:
        """What a segment with these arrays holds."""
        joined, ends = self.arrays
        return Texts(arrays[joined], arrays[ends])

    def pack(self, parts: Iterable[Sequence[bytes]]) -> dict[str, Array]:
        """The arrays of a snapshot: all strings of some rows and of the next ones."""
        return pack_bytes(self.saved_as, chain.from_iterable(parts))

    def unpack(self, arrays: Mapping[str, Array], sizes: Iterable[tuple[int, int]]) -> list[list[bytes]]:
        """The inverse of `pack`, for parts of so many rows and dimensions each."""
        strings = iter(unpack_bytes(self.saved_as, arrays))
        return [list(islice(strings, rows)) for rows, _ in sizes]


def _stored(name: str) -> str:
    return name.replace("_", "-")


Column: TypeAlias = NumberColumn | StringColumn

ROW_COLUMNS: tuple[Column, ...] = (
    NumberColumn("row_ids", np.int64, fill=_NO_ROW),
    StringColumn("keys", saved_as="row-keys"),
    NumberColumn("vectors", np.float32, wide=True),
    StringColumn("attributes", sparse=True),
)

Rows: TypeAlias = Mapping[str, Any]
"""Some rows, apart from where they are held: by name of the column an array, or a list of byte strings."""


class RowSource(Protocol):
    """Rows by position: a chunk of the head, or a segment. Columns of numbers are attributes, as arrays."""

    def strings_at(self, column: StringColumn, positions: Positions) -> list[bytes]:
        """The strings of the rows at these positions."""
        ...

    def strings_of(self, column: StringColumn, positions: Positions) -> Selection | Strings:
        """The same, to be copied block by block."""
        ...


def numbers_of(source: RowSource, column: NumberColumn) -> Array:
    """A column of all rows of a source."""
    numbers: Array = getattr(source, column.name)
    return numbers


def rows_at(source: RowSource, positions: Positions) -> Rows:
    """The rows at these positions of a source."""
    return {
        column.name: (
            numbers_of(source, column)[positions]
            if isinstance(column, NumberColumn)
            else source.strings_at(column, positions)
        )
        for column in ROW_COLUMNS
    }
