"""Many byte strings as two arrays, so that many of them move without a Python object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import attrs
import numpy as np
import numpy.typing as npt

from engram.columns import Array, pack_bytes, split_bytes

Positions = npt.NDArray[np.int64]

# How many bytes are picked at a time.
_BLOCK_BYTES = 1 << 18


@attrs.frozen(eq=False)
class Texts:
    """`joined` (uint8) holds the strings one after the other, `ends` (n,) int64 where each ends."""

    joined: Array
    ends: Array

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Texts:
        packed = pack_bytes("texts", items)
        return cls(packed["texts-bytes"], packed["texts-ends"])

    def at(self, positions: Positions) -> list[bytes]:
        """The strings at these positions."""
        picked = self.select(positions)
        return split_bytes(picked.joined, picked.ends)

    def all(self) -> list[bytes]:
        """All strings; sooner than `at` with every position."""
        return split_bytes(self.joined, self.ends)

    def lengths(self, positions: Positions) -> Positions:
        """How many bytes the strings at these positions have."""
        starts, ends = self._bounds(positions)
        lengths: Positions = ends - starts
        return lengths

    def select(self, positions: Positions) -> Texts:
        """The strings at these positions, as arrays."""
        starts, ends = self._bounds(positions)
        lengths = ends - starts
        stops = np.cumsum(lengths, dtype=np.int64)
        total = int(stops[-1]) if len(stops) else 0
        if total <= _BLOCK_BYTES:
            return Texts(self._pick(ends - stops, lengths, 0, total), stops)
        joined = np.empty(total, np.uint8)
        start = 0
        for block in self.blocks(positions):
            joined[start : start + len(block)] = block
            start += len(block)
        return Texts(joined, stops)

    def blocks(self, positions: Positions) -> Iterator[Array]:
        """The strings at these positions one after the other, in arrays of bounded size."""
        starts, ends = self._bounds(positions)
        stops = np.cumsum(ends - starts, dtype=np.int64)
        # Where a byte is here less where it is there.
        shifts = ends - stops
        total = int(stops[-1]) if len(stops) else 0
        for start in range(0, total, _BLOCK_BYTES):
            stop = min(start + _BLOCK_BYTES, total)
            first, last = np.searchsorted(stops, (start, stop - 1), "right")
            near = slice(first, last + 1)
            counts = np.diff(np.minimum(stops[near], stop), prepend=start)
            # What is empty may be anywhere.
            filled = shifts[near][counts > 0]
            if filled[0] == filled[-1] and (filled == filled[0]).all():
                yield self.joined[start + filled[0] : stop + filled[0]]
            else:
                yield self._pick(filled, counts[counts > 0], start, stop)

    def _pick(self, shifts: Array, counts: Array, start: int, stop: int) -> Array:
        """The bytes from `start` to `stop` of what is selected: so many of each shift.

        It takes some sixteen times the memory of the bytes, so they must be few.
        """
        places = np.repeat(shifts, counts)
        places += np.arange(start, stop)
        picked: Array = self.joined[places]
        return picked

    @cached_property
    def longest(self) -> int:
        """The length of the longest string."""
        return int(np.diff(self.ends, prepend=0).max(initial=0))

    def _bounds(self, positions: Positions) -> tuple[Array, Array]:
        return np.where(positions > 0, self.ends[positions - 1], 0), self.ends[positions]


@attrs.frozen(eq=False)
class Selection:
    """Some of many strings, to be copied elsewhere: `lengths` (n,) int64 first, then block by block."""

    texts: Texts
    positions: Positions

    @property
    def lengths(self) -> Positions:
        return self.texts.lengths(self.positions)

    def blocks(self) -> Iterator[Array]:
        return self.texts.blocks(self.positions)


@attrs.frozen(eq=False)
class Strings:
    """Strings that are objects, to be copied elsewhere as a selection is."""

    items: Sequence[bytes]

    @property
    def lengths(self) -> Positions:
        return np.fromiter(map(len, self.items), np.int64, len(self.items))

    def blocks(self) -> Iterator[Array]:
        """The strings one after the other; only those of a block are copied at a time."""
        block: list[bytes] = []
        size = 0
        for item in self.items:
            block.append(item)
            size += len(item)
            if size >= _BLOCK_BYTES:
                yield np.frombuffer(b"".join(block), np.uint8)
                block, size = [], 0
        if size:
            yield np.frombuffer(b"".join(block), np.uint8)
