"""What is truly nearest, by whole numbers: an oracle that knows no rounding.

A float32 is a whole multiple of 2**-149, so sums of products are whole numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from engram.index.search import SearchResult

Floats = npt.NDArray[np.float32]

_UNIT = 149
# Digits, in bits, of quotients and roots.
_PRECISION = 256
# Cosines are told apart to one of so many steps; see `engram.index.distances`.
_COSINE_STEPS = 2**50


def _whole(row: Floats) -> list[int]:
    return [
        numerator * (2**_UNIT // denominator)
        for numerator, denominator in map(float.as_integer_ratio, row.tolist())
    ]


@attrs.frozen(eq=False)
class Truth:
    """The distances of rows from a query, and by how much those of float64 may be off: whole numbers.

    Of l2 it is the squares, of cosine the fraction of 2**_PRECISION.
    """

    metric: str
    distances: list[int]
    errors: list[int]

    @classmethod
    def of(cls, metric: str, rows: Floats, query: Floats) -> Truth:
        asked = _whole(query)
        asked_square = sum(number * number for number in asked)
        # Roundings of products, of their sum, and of what is made of it; in units of 2**-53.
        roundings = len(asked) + 8
        distances, errors = [], []
        for row in rows:
            numbers = _whole(row)
            if metric == "l2":
                square = sum((a - b) ** 2 for a, b in zip(numbers, asked, strict=True))
                distances.append(square)
                errors.append((2 * roundings * square >> 53) + 1)
                continue
            products = [a * b for a, b in zip(numbers, asked, strict=True)]
            error = roundings * sum(map(abs, products)) >> 53
            if metric == "dot":
                distances.append(-sum(products))
                errors.append(error + 1)
                continue
            size = math.isqrt(sum(number * number for number in numbers) * asked_square << 2 * _PRECISION)
            one = 1 << _PRECISION
            distances.append(one - ((sum(products) << 2 * _PRECISION) // size if size else 0))
            errors.append(one // _COSINE_STEPS + (2 * roundings * one >> 53))
        return cls(metric, distances, errors)

    def check_order(self, found: Sequence[int], left: Sequence[int]) -> None:
        """Fails where float64 tells that a row is nearer than one found before it, or than one left out."""
        least = min((self.distances[row] + self.errors[row] for row in left), default=None)
        for row in reversed(found):
            assert least is None or least >= self.distances[row] - self.errors[row], row
            most = self.distances[row] + self.errors[row]
            least = most if least is None else min(least, most)

    def distance(self, row: int) -> float:
        """The distance to float64."""
        if self.metric == "l2":
            root = math.isqrt(self.distances[row] << 2 * _PRECISION)
            return root / (1 << _PRECISION + _UNIT)
        unit = _PRECISION if self.metric == "cosine" else 2 * _UNIT
        return float(self.distances[row] / (1 << unit))

    def slack(self, row: int) -> float:
        """By how much the distance of a row that is printed may be off."""
        if self.metric == "cosine":
            return 1.2e-7
        off = 1.2e-7 * abs(self.distance(row)) + 1.5e-45
        return off if self.metric == "l2" else off + self.errors[row] / (1 << 2 * _UNIT)


def check_nearest(metric: str, rows: Floats, query: Floats, k: int, result: SearchResult) -> None:
    """The result of a search whose keys are the numbers of rows holds the k nearest, in order.

    Of rows that are the same the older comes first; of others that float64 cannot tell apart either may.
    """
    truth = Truth.of(metric, rows, query)
    found = [int(key) for key in result.keys]
    assert len(found) == len(set(found)) == min(k, len(rows))
    left = sorted(set(range(len(rows))) - set(found))
    truth.check_order(found, left)
    latest: dict[bytes, int] = {}
    for row in (*found, *left):
        same = rows[row].tobytes()
        assert latest.get(same, -1) < row
        latest[same] = row
    assert b"-0" not in result.distances
    shown = [float(np.float32(text)) for text in result.distances]
    assert shown == sorted(shown)
    for row, distance in zip(found, shown, strict=True):
        assert abs(distance - truth.distance(row)) <= truth.slack(row), (row, distance)
