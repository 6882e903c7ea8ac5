"""Sums over values that change, without looking at those that have not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V", bound=Hashable)


class Tally(Generic[V]):
    """The sums of what `measure` says of values, each of which is known by its identity.

    Whoever changes a value says so. Asking for the sums takes time in proportion to the values that have
    changed since they were last asked for.
    """

    def __init__(self, measure: Callable[[V], tuple[int, ...]], width: int) -> None:
        self._measure = measure
        self._sums = (0,) * width
        self._counted: dict[V, tuple[int, ...]] = {}
        self._changed: set[V] = set()

    def change(self, value: V) -> None:
        """The value has come, or is another than before."""
        self._changed.add(value)

    def remove(self, value: V) -> None:
        """The value is gone."""
        self._changed.discard(value)
        counted = self._counted.pop(value, None)
        if counted is not None:
            self._sums = tuple(total - one for total, one in zip(self._sums, counted, strict=True))

    def sums(self) -> tuple[int, ...]:
        """Of each number that `measure` returns."""
        for value in self._changed:
            now = self._measure(value)
            before = self._counted.get(value, (0,) * len(now))
            self._counted[value] = now
            self._sums = tuple(
                total + new - old for total, new, old in zip(self._sums, now, before, strict=True)
            )
        self._changed.clear()
        return self._sums
