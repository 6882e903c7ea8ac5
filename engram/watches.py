"""WATCH: which clients want to know of changes of which keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram.effects import Touched
from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace

# Keys of a watch that are forgotten at once. With more, the rest is left for later.
_KEYS_AT_ONCE = 512


class Watch:
    """The keys that one client watches. Its length is their number.

    Attributes:
        keys: what it watches, by number of the database.
        broken: whether any of them has changed. Until then each holds what it held when it was watched.
        lapses_at: when the first of them lapses, in milliseconds since the epoch; None if none will.
    """

    def __init__(self) -> None:
        self.keys: dict[int, set[bytes]] = {}
        self.broken = False
        self.lapses_at: int | None = None
        self.indices: list[int] = []
        # Those where it watches a key that is there.
        self.databases: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self.keys.values()))


class Watches:
    """All watches on the keys of all databases.

    A change costs time in proportion to the keys that it names, to empty or to exchange databases in
    proportion to the clients that watch: whoever watches a key that changes is told once, and then is not in
    the way of the next change.

    Attributes:
        by_key: who watches a key, by number of the database. While it is empty no change need be looked at.
    """

    def __init__(self, keyspaces: Mapping[int, Keyspace[Any]]) -> None:
        self._keyspaces = keyspaces
        self.by_key: dict[bytes, dict[int, set[Watch]]] = {}
        # Who watches a key that holds the index of an id; and by database who any key, and who one that is
        # there.
        self._by_index: dict[int, set[Watch]] = {}
        self._by_database: dict[int, set[Watch]] = {}
        self._of_existing: dict[int, set[Watch]] = {}
        # By the database where they are watched, and by another one: keys that the other one has. Those that
        # are in the first as well may be left out.
        self._elsewhere: defaultdict[int, dict[int, set[bytes]]] = defaultdict(dict)
        # Where the last change has set or deleted a key that is watched in other databases.
        self._unsettled: list[tuple[int, bytes]] = []
        # Those that nobody asks any more, whose keys are still in `by_key`; and parts of `_elsewhere` that no
        # longer count.
        self._abandoned: list[Watch] = []
        self._outdated: list[set[bytes]] = []

    def add(self, watch: Watch, database: int, keys: Iterable[bytes]) -> None:
        """Watches further keys."""
        if watch.broken:
            return
        keyspace, by_key = self._keyspaces[database], self.by_key
        others = [
            (number, other.values)
            for number, other in self._keyspaces.items()
            if number != database and other
        ]
        watched = watch.keys.setdefault(database, set())
        self._by_database.setdefault(database, set()).add(watch)
        for key in keys:
            if key in watched:
                continue
            watched.add(key)
            watches = by_key.get(key)
            if watches is None:
                by_key[key] = {database: {watch}}
            elif database in watches:
                watches[database].add(watch)
            else:
                watches[database] = {watch}
            value = keyspace.values.get(key)
            if value is not None:
                self._add_existing(watch, database, key, value)
                continue
            for number, values in others:
                if key in values:
                    self._elsewhere[database].setdefault(number, set()).add(key)

    def _add_existing(self, watch: Watch, database: int, key: bytes, value: object) -> None:
        """Watches a key that is there."""
        if database not in watch.databases:
            watch.databases.add(database)
            self._of_existing.setdefault(database, set()).add(watch)
        if isinstance(value, VectorIndex):
            watch.indices.append(value.id)
            self._by_index.setdefault(value.id, set()).add(watch)
        lapses_at = self._keyspaces[database].expiries.get(key)
        if lapses_at is not None and (watch.lapses_at is None or lapses_at < watch.lapses_at):
            watch.lapses_at = lapses_at

    def remove(self, watch: Watch) -> None:
        """Forgets a watch: at once, or with many keys by calls of `clear_up`."""
        for database in watch.keys:
            _discard(self._by_database, database, watch)
        for database in watch.databases:
            _discard(self._of_existing, database, watch)
        if self._forget_keys(watch):
            self._abandoned.append(watch)

    def clear_up(self) -> bool:
        """Forgets some of the keys of watches that were removed; returns whether there is more to forget."""
        if self._outdated:
            keys = self._outdated[-1]
            for _ in range(min(_KEYS_AT_ONCE, len(keys))):
                keys.pop()
            if not keys:
                self._outdated.pop()
        elif self._abandoned and not self._forget_keys(self._abandoned[-1]):
            self._abandoned.pop()
        return bool(self._abandoned or self._outdated)

    def about_to_change(self, touched: Touched) -> None:
        """Breaks the watches on what a change touches, which is to be made next."""
        if self._unsettled:
            self._settle()
        by_key = self.by_key
        for database, keys in touched.keys:
            for key in keys:
                watches = by_key.get(key)
                if watches is not None:
                    self._change_key(database, key, watches)
        if touched.index:
            _break(self._by_index.pop(touched.index, ()))
        if touched.databases is None:
            self._empty(list(self._keyspaces))
        elif len(touched.databases) == 1:
            self._empty(touched.databases)
        elif touched.databases:
            self._exchange(*touched.databases)

    def _change_key(self, database: int, key: bytes, watches: dict[int, set[Watch]]) -> None:
        """Breaks the watches on a key of a database; `watches` are those on this key, of any database."""
        changed = watches.pop(database, None)
        if changed is not None:
            _break(changed)
            self._leave(database, key)
        if watches:
            self._unsettled.append((database, key))
        else:
            del self.by_key[key]

    def _settle(self) -> None:
        """Follows the change before, which had not been made when it was told of."""
        for database, key in self._unsettled:
            is_there = key in self._keyspaces[database].values
            for watched in self.by_key.get(key, ()):
                if watched != database:
                    keys = self._elsewhere[watched].setdefault(database, set())
                    (keys.add if is_there else keys.discard)(key)
        self._unsettled.clear()

    def _leave(self, database: int, key: bytes) -> None:
        """Nobody watches a key of a database any more."""
        if database in self._elsewhere:
            for keys in self._elsewhere[database].values():
                keys.discard(key)

    def _empty(self, databases: Sequence[int]) -> None:
        """Breaks the watches on keys that are in these databases, which will have none."""
        for database in databases:
            _break(self._of_existing.pop(database, ()))
            for there in self._elsewhere.values():
                self._put_aside(there.pop(database, None))

    def _exchange(self, first: int, second: int) -> None:
        """Breaks the watches on keys that are in one of these databases, whichever of the two they watch."""
        for database in (first, second):
            _break(self._of_existing.pop(database, ()))
        for watched, there in self._elsewhere.items():
            of_first, of_second = there.pop(first, None), there.pop(second, None)
            if watched in (first, second):
                for keys in (of_first, of_second):
                    self._break_any(watched, keys)
                    self._put_aside(keys)
                continue
            if of_first:
                there[second] = of_first
            if of_second:
                there[first] = of_second

    def _break_any(self, database: int, keys: set[bytes] | None) -> None:
        """Breaks the watches of a database on any of these keys."""
        if keys:
            for watch in self._by_database.get(database, ()):
                if not (watch.broken or keys.isdisjoint(watch.keys[database])):
                    watch.broken = True

    def _put_aside(self, keys: set[bytes] | None) -> None:
        """Has keys freed by `clear_up`."""
        if keys:
            self._outdated.append(keys)

    def _forget_keys(self, watch: Watch) -> bool:
        """Forgets some keys of a watch; returns whether it has more."""
        room = _KEYS_AT_ONCE
        while watch.keys and room > 0:
            database, keys = watch.keys.popitem()
            for _ in range(min(room, len(keys))):
                self._forget_key(watch, database, keys.pop())
                room -= 1
            if keys:
                watch.keys[database] = keys
        for _ in range(min(_KEYS_AT_ONCE, len(watch.indices))):
            _discard(self._by_index, watch.indices.pop(), watch)
        return bool(watch.keys or watch.indices)

    def _forget_key(self, watch: Watch, database: int, key: bytes) -> None:
        """Takes a watch off a key, if it is still there."""
        watches = self.by_key.get(key)
        if watches is not None:
            _discard(watches, database, watch)
            if database not in watches:
                self._leave(database, key)
            if not watches:
                del self.by_key[key]


def _discard(watches: dict[int, set[Watch]], name: int, watch: Watch) -> None:
    """Takes a watch off those of a name, if it is still there."""
    left = watches.get(name)
    if left is not None:
        left.discard(watch)
        if not left:
            del watches[name]


def _break(watches: Iterable[Watch]) -> None:
    for watch in watches:
        watch.broken = True
