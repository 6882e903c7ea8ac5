"""The three distances: exact, and by matrix product with a bound on the error.

    cosine   1 - q.x / (|q| |x|); 1 when either vector is zero
    l2       |q - x|
    dot      -q.x

The matrix product gives a value that orders rows as the distance does ("rank"), in float32. Summed in
whatever order, a float32 inner product of d terms is within gamma |q| |x| of the truth, gamma about
d 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Every row whose rank is within
these bounds of the k-th best is measured again in float64, so none of the true k nearest is lost. The
bounds allow for a few roundings of float32 more than there are, which is many more of float64: whatever is
passed over is farther by float64, too.
"""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt

METRICS = ("cosine", "l2", "dot")

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_UNIT_ROUNDOFF = 2.0**-24
# The least normal float32: products below it may lose all their digits.
_UNDERFLOW = 2.0**-126
# The least float32 of all.
_LEAST = 2.0**-149
# Below this norm, products with a unit vector may underflow.
TINY_NORM = 1e-28
# Numbers computed at once in float64: few enough to stay in a core's cache.
_BLOCK = 1 << 16
# Numbers of rows that are gathered at once.
_GATHERED_NUMBERS = 1 << 17
# Covers the rounding of ranks to float32, several times.
_SLACK = 1e-6

# Cosine distances are whole multiples of 1 / _COSINE_STEPS: about what float64 tells apart. Without, the same
# direction would be at some such distance from itself, or a negative one.
_COSINE_STEPS = 2.0**50


def row_norms(rows: Floats) -> Doubles:
    """The Euclidean norms, float64 of shape (n,), of rows of shape (n, dimension)."""
    norms = np.empty(len(rows))
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.float64)
        norms[start : start + step] = np.sqrt(np.vecdot(block, block))
    return norms


@attrs.frozen(eq=False)
class Terms:
    """What turns inner products with rows into ranks: rank = product * scale + shift, within `error`.

    `scale` and `shift` have shape (n,), float32, and are None where they change nothing; `error` is that of
    the row with the largest.
    """

    scale: Floats | None
    shift: Floats | None
    error: float

    def ranks(self, products: Floats) -> Floats:
        """Turns products with the rows, shape (..., n), into their ranks, in place."""
        if self.scale is not None:
            products *= self.scale
        if self.shift is not None:
            products += self.shift
        return products


@attrs.frozen(eq=False)
class Queries:
    """A batch of queries of one metric, shape (n, dimension).

    `scaled` holds the rows to multiply with. Ranks of different rows for one query may differ from
    the truth by `error` (shape (n,)) more than the rows' own errors.
    """

    metric: str
    vectors: Floats
    exact: Doubles
    norms: Doubles
    scaled: Floats
    error: Floats

    @classmethod
    def of(cls, metric: str, vectors: Floats) -> Queries:
        exact = vectors.astype(np.float64)
        norms = np.sqrt(np.vecdot(exact, exact))
        error = np.zeros(len(exact), np.float32)
        if metric == "l2":
            scaled = -2.0 * exact
            error = (4.0 * _gamma(exact.shape[1]) * norms**2).astype(np.float32)
        else:
            scaled = exact / -np.where(norms > 0.0, norms, 1.0)[:, None]
        return cls(metric, vectors, exact, norms, scaled.astype(np.float32), error)

    def terms(self, norms: Doubles) -> Terms:
        """The terms of rows with these norms, of which there is one at least."""
        gamma = _gamma(self.exact.shape[1])
        floor = self.exact.shape[1] * _UNDERFLOW
        if self.metric == "cosine":
            if norms.min() >= TINY_NORM:
                return Terms((1.0 / norms).astype(np.float32), None, gamma)
            tiny = norms < TINY_NORM
            scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=~tiny).astype(np.float32)
            return Terms(scale, None, 2.0 if (tiny & (norms > 0.0)).any() else gamma)
        if self.metric == "dot":
            return Terms(None, None, gamma * float(norms.max()) + floor)
        squares = norms * norms
        return Terms(None, squares.astype(np.float32), 2.0 * gamma * float(squares.max()) + 4.0 * floor)

    def select(self, which: npt.NDArray[np.intp]) -> Queries:
        """Some of the batch."""
        return Queries(
            self.metric,
            self.vectors[which],
            self.exact[which],
            self.norms[which],
            self.scaled[which],
            self.error[which],
        )

    def distances(self, which: npt.NDArray[np.intp], rows: Floats, norms: Doubles) -> Doubles:
        """The exact distances, (n,), of queries `which` to rows of shape (n, dimension), to float64."""
        distances = np.empty(len(rows))
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            numbers = which[part]
            distances[part] = self._distances(
                self.exact[numbers], self.norms[numbers], rows[part], norms[part]
            )
        return distances

    def distances_of_each(self, rows: Floats, norms: Doubles, first: int = 0) -> Doubles:
        """The exact distances, (n, m), of n queries from the `first` on, each to its own m rows.

        The rows have shape (n, m, dimension), their norms (n, m).
        """
        distances = np.empty(norms.shape)
        step = max(1, _BLOCK // (rows.shape[1] * rows.shape[2]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            asked = slice(first + start, first + min(start + step, len(rows)))
            distances[part] = self._distances(
                self.exact[asked, None], self.norms[asked, None], rows[part], norms[part]
            )
        return distances

    def distances_at(self, rows: Floats, norms: Doubles, positions: npt.NDArray[np.int64]) -> Doubles:
        """The exact distances, (n, m), of each query to the rows at its `positions`, (n, m).

        `rows` is (r, dimension), their norms (r,).
        """
        distances = np.empty(positions.shape)
        step = max(1, _GATHERED_NUMBERS // (positions.shape[1] * rows.shape[1]))
        for start in range(0, len(positions), step):
            near = positions[start : start + step]
            distances[start : start + step] = self.distances_of_each(rows[near], norms[near], start)
        return distances

    def _distances(self, queries: Doubles, query_norms: Doubles, rows: Floats, norms: Doubles) -> Doubles:
        wide = rows.astype(np.float64)
        if self.metric == "l2":
            wide -= queries
            lengths: Doubles = np.sqrt(np.vecdot(wide, wide))
            return lengths
        products: Doubles = np.vecdot(wide, queries)
        if self.metric == "dot":
            return -products
        sizes = norms * query_norms
        distances: Doubles = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0.0)
        np.subtract(1.0, distances, out=distances)
        distances *= _COSINE_STEPS
        np.rint(distances, out=distances)
        distances *= 1.0 / _COSINE_STEPS
        return distances

    def rounded(self, distances: Doubles) -> Floats:
        """Exact distances as clients see them, to float32.

        A similarity is rounded before it is taken from 1: what is left of it has no digits but its own.
        """
        if self.metric != "cosine":
            return distances.astype(np.float32)
        return np.float32(1.0) - (1.0 - distances).astype(np.float32)

    def upper_ranks(self, distances: Doubles) -> Floats:
        """No less than the ranks of rows at exact distances (n, m) of each query."""
        if self.metric == "cosine":
            return (distances - (1.0 - _SLACK)).astype(np.float32)
        if self.metric == "dot":
            ranks = distances / np.where(self.norms > 0.0, self.norms, 1.0)[:, None]
            return (ranks + (_SLACK * np.abs(ranks) + _LEAST)).astype(np.float32)
        squares = (self.norms**2)[:, None]
        wide = distances * distances
        return (wide - squares + _SLACK * (wide + squares)).astype(np.float32)


def _gamma(dimension: int) -> float:
    # The further terms are for rounding the scaled query, the norms and the ranks themselves.
    steps = (dimension + 32) * _UNIT_ROUNDOFF
    return 1.01 * steps / (1.0 - steps)
