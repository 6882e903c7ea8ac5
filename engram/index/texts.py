"""Many byte strings as two arrays, so that many of them move without a Python object for each."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from engram.columns import Array, pack_bytes, split_bytes

Positions = npt.NDArray[np.int64]


@attrs.frozen(eq=False)
class Texts:
    """`joined` (uint8) holds the strings one after the other, `ends` (n,) int64 where each ends."""

    joined: Array
    ends: Array

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Texts:
        packed = pack_bytes("texts", items)
        return cls(packed["texts-bytes"], packed["texts-ends"])

    @classmethod
    def concatenate(cls, parts: Sequence[Texts]) -> Texts:
        """The strings of all parts; there must be one part at least."""
        lengths = [np.diff(part.ends, prepend=0) for part in parts]
        return cls(np.concatenate([part.joined for part in parts]), np.cumsum(np.concatenate(lengths)))

    def at(self, positions: Positions) -> list[bytes]:
        """The strings at these positions."""
        picked = self.select(positions)
        return split_bytes(picked.joined, picked.ends)

    def all(self) -> list[bytes]:
        """All strings; sooner than `at` with every position."""
        return split_bytes(self.joined, self.ends)

    def select(self, positions: Positions) -> Texts:
        """The strings at these positions, as arrays."""
        starts, ends = self._bounds(positions)
        lengths = ends - starts
        new_ends = np.cumsum(lengths)
        sources = np.repeat(ends - new_ends, lengths) + np.arange(lengths.sum())
        return Texts(self.joined[sources], new_ends)

    def _bounds(self, positions: Positions) -> tuple[Array, Array]:
        return np.where(positions > 0, self.ends[positions - 1], 0), self.ends[positions]
