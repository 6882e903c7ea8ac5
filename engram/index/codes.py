"""int8 codes of rows: a quarter of the bytes to scan, with a bound on what that costs in exactness.

A row x is held as t y, y of int8 and t its scale, and the norm of what is lost, x - t y, is its residual.
For a query q, likewise s c, the inner product is no further from that of the codes than (Cauchy-Schwarz)

    |q.x - s t c.y|  <=  |q - s c| |x|  +  |s c| |x - t y|

So a scan of the codes tells which rows can be among the nearest: some 25 of 20,000 embeddings for k = 10.
"""

from __future__ import annotations

import attrs
import numkong
import numpy as np

from engram.columns import Array
from engram.index.distances import Doubles, Floats, Queries, Terms

_LEVELS = np.float32(127.0)
# The newest rows are scanned as they are, up to so many.
UNCODED_ROWS = 128
# Rows whose largest number is below are lost as a whole: their scale would lose its digits.
_TINY = np.float32(1e-30)
# Covers the rounding of float32 in what is computed here.
_ROUNDING = 1e-6


def _encode(rows: Floats, norms: Doubles) -> tuple[Array, Floats, Doubles]:
    """int8 codes (n, dimension), scales (n,) and residuals (n,) of rows with these norms."""
    largest = np.abs(rows).max(axis=1)
    held = largest > _TINY
    inverse = np.divide(_LEVELS, largest, out=np.zeros_like(largest), where=held)
    scaled = rows * inverse[:, None]
    codes = np.rint(scaled)
    scaled -= codes
    scales = np.where(held, largest / _LEVELS, np.float32(0.0))
    residuals = np.sqrt(np.vecdot(scaled, scaled)) * scales + _ROUNDING * norms
    return codes.astype(np.int8), scales, np.where(held, residuals, norms)


@attrs.frozen(eq=False)
class QueryCodes:
    """Queries as codes, int8 (n, dimension), with `scales`, `residuals` and `lengths` (|s c|), each (n,)."""

    codes: Array
    scales: Floats
    residuals: Doubles
    lengths: Doubles

    @classmethod
    def of(cls, queries: Floats) -> QueryCodes:
        norms = np.sqrt(np.vecdot(queries, queries)).astype(np.float64)
        codes, scales, residuals = _encode(queries, norms)
        return cls(codes, scales, residuals, norms + residuals)


class RowCodes:
    """Rows as codes, int8 (n, dimension), and the terms that make ranks of products with them."""

    __slots__ = ("_error", "_factors", "_norm", "_packed", "_residual", "_shift", "rows")

    def __init__(
        self, codes: Array, scales: Floats, residuals: Doubles, norms: Doubles, terms: Terms
    ) -> None:
        self.rows = len(codes)
        scale = np.float32(1.0) if terms.scale is None else terms.scale
        self._packed = numkong.dots_pack(codes)
        self._factors = scales * scale
        self._shift = terms.shift
        self._norm = float((norms * scale).max())
        self._residual = float((residuals * scale).max())
        self._error = terms.error

    @classmethod
    def of(cls, rows: Floats, norms: Doubles, terms: Terms) -> RowCodes:
        """The codes of rows, (n, dimension), with norms (n,)."""
        return cls(*_encode(rows, norms), norms, terms)

    def ranks(self, queries: QueryCodes) -> tuple[Floats, Doubles]:
        """Ranks, float32 (len(queries), n), and how far those of each query may be off, (len(queries),)."""
        products = np.asarray(numkong.dots_packed(queries.codes, self._packed))
        ranks = np.multiply(products, self._factors, dtype=np.float32)
        ranks *= queries.scales[:, None]
        if self._shift is not None:
            ranks += self._shift
        bound = queries.residuals * self._norm + queries.lengths * self._residual
        return ranks, (1.0 + _ROUNDING) * bound + self._error


def coded_row_bytes(dimension: int) -> int:
    """What `GrowingCodes` take for a row: codes, the same packed, scale and residual, and their factor."""
    return 2 * dimension + 4 + 8 + 4


class GrowingCodes:
    """The codes of rows to which more are appended: each row is encoded once."""

    __slots__ = ("_codes", "_known", "_latest", "_residuals", "_scales")

    def __init__(self, capacity: int, dimension: int) -> None:
        self._codes: Array = np.empty((capacity, dimension), np.int8)
        self._scales: Floats = np.empty(capacity, np.float32)
        self._residuals: Doubles = np.empty(capacity, np.float64)
        self._known = 0
        self._latest: RowCodes | None = None

    @property
    def bytes_held(self) -> int:
        """What the codes take, those packed for products included."""
        return int(self._codes.nbytes) + self._known * int(self._codes.shape[1])

    def latest(self, vectors: Floats, norms: Doubles, queries: Queries) -> RowCodes | None:
        """Codes of the first rows of `vectors`, (n, dimension), of which at most a few are left out.

        None while there are few. `norms` are (n,). Two threads may do this at once: they write the same.

        Raises:
            ValueError: there is no room for so many rows, or they have not as many norms.
        """
        count, capacity = len(vectors), len(self._codes)
        if not len(norms) == count <= capacity:
            raise ValueError(f"{count} rows with {len(norms)} norms, where there is room for {capacity}")
        latest = self._latest
        done = 0 if latest is None else latest.rows
        if count - done >= UNCODED_ROWS or (done < count == capacity >= UNCODED_ROWS):
            known = self._known
            new = slice(known, count)
            self._codes[new], self._scales[new], self._residuals[new] = _encode(vectors[new], norms[new])
            self._known = count
            part = slice(count)
            latest = self._latest = RowCodes(
                self._codes[part], self._scales[part], self._residuals[part], norms, queries.terms(norms)
            )
        return latest
