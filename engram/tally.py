"""Sums over values that change, without looking at those that have not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any, Generic, TypeVar

V = TypeVar("V", bound=Hashable)

# So many values that have changed are counted at once, a millisecond or so.
_MOST_CHANGED = 256


class Tally(Generic[V]):
    """The sums of what `measure` says of values, each of which is known by its identity.

    Whoever changes a value says so. Asking for the sums takes time in proportion to the values that have
    changed since they were last asked for. Those are a few hundred at most, for more are counted as they
    change.
    """

    def __init__(self, measure: Callable[[V], tuple[int, ...]], width: int) -> None:
        self._measure = measure
        self._sums = (0,) * width
        self._counted: dict[V, tuple[int, ...]] = {}
        # As a set, but it can be freed in slices like any large dictionary.
        self._changed: dict[V, None] = {}

    def change(self, value: V) -> None:
        """The value has come, or is another than before."""
        if value not in self._changed:
            self._changed[value] = None
            if len(self._changed) >= _MOST_CHANGED:
                self.sums()

    def remove(self, value: V) -> None:
        """The value is gone."""
        self._changed.pop(value, None)
        counted = self._counted.pop(value, None)
        if counted is not None:
            self._sums = tuple(total - one for total, one in zip(self._sums, counted, strict=True))

    def remove_many(self, values: Collection[V]) -> None:
        """As `remove`, of each of them."""
        for value in values:
            self._changed.pop(value, None)
        none = (0,) * len(self._sums)
        counted = [self._counted.pop(value, none) for value in values]
        gone = map(sum, zip(*counted, strict=True))
        self._sums = tuple(total - one for total, one in zip(self._sums, gone, strict=True))

    def remove_all(self) -> list[dict[V, Any]]:
        """All values are gone. Returns what may be large, to be freed."""
        remains: list[dict[V, Any]] = [self._counted, self._changed]
        self._counted, self._changed = {}, {}
        self._sums = (0,) * len(self._sums)
        return remains

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
