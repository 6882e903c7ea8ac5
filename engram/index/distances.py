"""The three distances: exact, and by matrix product with a bound on the error.

    cosine   1 - q.x / (|q| |x|); 1 when either vector is zero
    l2       |q - x|
    dot      -q.x

The matrix product gives a value that orders rows as the distance does ("rank"), in float32. Summed in
whatever order, a float32 inner product of d terms is within gamma |q| |x| of the truth, gamma about
d 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). Every row whose rank is within
these bounds of the k-th best is measured again in float64, so none of the true k nearest is lost.
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
# Below this norm, products with a unit vector may underflow.
TINY_NORM = 1e-28
_BLOCK = 1 << 20


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
    """What turns inner products with rows into ranks: rank = product * scale + shift, within error.

    Each has shape (n,), float32; `scale` and `shift` are None where they change nothing.
    """

    scale: Floats | None
    shift: Floats | None
    error: Floats

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
        """The terms of rows with these norms."""
        gamma = _gamma(self.exact.shape[1])
        floor = self.exact.shape[1] * _UNDERFLOW
        if self.metric == "cosine":
            tiny = norms < TINY_NORM
            scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=~tiny).astype(np.float32)
            error = np.full(len(norms), gamma, np.float32)
            if tiny.any():
                error[tiny & (norms > 0.0)] = 2.0
            return Terms(scale, None, error)
        if self.metric == "dot":
            return Terms(None, None, (gamma * norms + floor).astype(np.float32))
        squares = norms * norms
        return Terms(
            None, squares.astype(np.float32), (2.0 * gamma * squares + 4.0 * floor).astype(np.float32)
        )

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

    def distances(self, which: npt.NDArray[np.intp], rows: Floats, norms: Doubles) -> Floats:
        """The exact distances, float32 of shape (n,), of queries `which` to rows of shape (n, dimension).

        They are computed in float64 and rounded once. A similarity is rounded to float32 before it is
        taken from 1, so that the same direction is at distance 0.
        """
        distances = np.empty(len(rows), np.float32)
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            numbers = which[part]
            block = rows[part].astype(np.float64)
            queries = self.exact[numbers]
            if self.metric == "l2":
                np.subtract(block, queries, out=block)
                distances[part] = np.sqrt(np.vecdot(block, block))
                continue
            products = np.vecdot(block, queries)
            if self.metric == "dot":
                distances[part] = -products
                continue
            lengths = norms[part] * self.norms[numbers]
            similarities = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0.0)
            distances[part] = 1.0 - similarities.astype(np.float32)
        # Turns -0 into 0.
        return distances + np.float32(0.0)


def _gamma(dimension: int) -> float:
    # The further terms are for rounding the scaled query, the norms and the ranks themselves.
    steps = (dimension + 32) * _UNIT_ROUNDOFF
    return 1.01 * steps / (1.0 - steps)


def format_distances(distances: Floats) -> list[bytes]:
    """Decimal texts, the shortest that read back as the same float32, without exponent: `0`, `2.5`, `-6`."""
    texts: list[bytes] = distances.astype("S32").tolist()
    for position, text in enumerate(texts):
        if text.endswith(b".0"):
            texts[position] = text[:-2]
        elif b"e" in text:
            plain = np.format_float_positional(distances[position], unique=True, trim="-")
            texts[position] = plain.encode()
    return texts
