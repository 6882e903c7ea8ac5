"""WATCH: which clients want to know of changes of which keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from engram.effects import Touched
from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace

# Keys of a watch that are forgotten at once. With more, the rest is left for later.
_KEYS_AT_ONCE = 512

Place = tuple[int, bytes]
"""The number of a database, and a key in it."""


class Watch:
    """The keys that one client watches.

    Attributes:
        keys: what it watches.
        broken: whether any of them has changed. Until then each holds what it held when it was watched.
        lapses_at: when the first of them lapses, in milliseconds since the epoch; None if none will.
    """

    def __init__(self) -> None:
        self.keys: set[Place] = set()
        self.broken = False
        self.lapses_at: int | None = None
        self.indices: list[int] = []
        self.databases: set[int] = set()


class Watches:
    """All watches on the keys of all databases.

    A change costs time in proportion to the keys that it names: whoever watches them is told once, and then
    is not in the way of the next change.

    Attributes:
        by_key: who watches a key. While it is empty no change need be looked at.
    """

    def __init__(self, keyspaces: Mapping[int, Keyspace[Any]]) -> None:
        self._keyspaces = keyspaces
        self.by_key: dict[Place, set[Watch]] = {}
        # Who watches a key that holds the index of an id, and who any key that is there, by database.
        self._by_index: dict[int, set[Watch]] = {}
        self._of_existing: dict[int, set[Watch]] = {}
        # Those that nobody asks any more, whose keys are still in `by_key`.
        self._abandoned: list[Watch] = []

    def add(self, watch: Watch, database: int, keys: Iterable[bytes]) -> None:
        """Watches further keys."""
        keyspace, by_key = self._keyspaces[database], self.by_key
        for key in keys:
            if watch.broken:
                return
            place = database, key
            if place in watch.keys:
                continue
            watch.keys.add(place)
            watches = by_key.get(place)
            if watches is None:
                by_key[place] = {watch}
            else:
                watches.add(watch)
            value = keyspace.values.get(key)
            if value is None:
                continue
            if database not in watch.databases:
                watch.databases.add(database)
                self._of_existing.setdefault(database, set()).add(watch)
            if isinstance(value, VectorIndex):
                watch.indices.append(value.id)
                self._by_index.setdefault(value.id, set()).add(watch)
            lapses_at = keyspace.expiries.get(key)
            if lapses_at is not None and (watch.lapses_at is None or lapses_at < watch.lapses_at):
                watch.lapses_at = lapses_at

    def remove(self, watch: Watch) -> None:
        """Forgets a watch: at once, or with many keys by calls of `clear_up`."""
        for database in watch.databases:
            _discard(self._of_existing, database, watch)
        if self._forget_keys(watch):
            self._abandoned.append(watch)

    def clear_up(self) -> bool:
        """Forgets some of the keys of watches that were removed; returns whether there are more."""
        if self._abandoned and not self._forget_keys(self._abandoned[-1]):
            self._abandoned.pop()
        return bool(self._abandoned)

    def about_to_change(self, touched: Touched) -> None:
        """Breaks the watches on what a change touches, which is to be made next."""
        for database, keys in touched.keys:
            for key in keys:
                _break(self.by_key.pop((database, key), ()))
        if touched.index:
            _break(self._by_index.pop(touched.index, ()))
        if touched.databases is None:
            for watches in self._of_existing.values():
                _break(watches)
            self._of_existing.clear()
        elif touched.databases:
            self._change_databases(touched.databases)

    def _change_databases(self, numbers: Sequence[int]) -> None:
        """Breaks the watches on keys that are in one of these databases, whichever of these they watch."""
        for number in numbers:
            _break(self._of_existing.pop(number, ()))
        if len(numbers) > 1:
            present = [self._keyspaces[number].values for number in numbers]
            for (number, key), watches in self.by_key.items():
                if number in numbers and any(key in values for values in present):
                    _break(watches)

    def _forget_keys(self, watch: Watch) -> bool:
        """Forgets some keys of a watch; returns whether it has more."""
        for _ in range(min(_KEYS_AT_ONCE, len(watch.keys))):
            _discard(self.by_key, watch.keys.pop(), watch)
        for _ in range(min(_KEYS_AT_ONCE, len(watch.indices))):
            _discard(self._by_index, watch.indices.pop(), watch)
        return bool(watch.keys or watch.indices)


Name = TypeVar("Name", Place, int)


def _discard(watches: dict[Name, set[Watch]], name: Name, watch: Watch) -> None:
    """Takes a watch off those of a name, if it is still there."""
    left = watches.get(name)
    if left is not None:
        left.discard(watch)
        if not left:
            del watches[name]


def _break(watches: Iterable[Watch]) -> None:
    for watch in watches:
        watch.broken = True
