"""WATCH: which clients want to know of changes of which keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace
from engram.operations import (
    AddVectors,
    AppendString,
    CopyKey,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    Flush,
    InstallSegment,
    Operation,
    RenameKey,
    SetAttributes,
    SetExpiry,
    SetRange,
    SetString,
    SetStrings,
)

# Keys of a watch that are forgotten at once. With more, the rest is left for later.
_KEYS_AT_ONCE = 512


class Watch:
    """The keys that one client watches.

    Attributes:
        keys: what it watches.
        broken: whether any of them has changed. Until then each holds what it held when it was watched.
        lapses_at: when the first of them lapses, in milliseconds since the epoch; None if none will.
    """

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.broken = False
        self.lapses_at: int | None = None
        self.indices: list[int] = []


class Watches:
    """All watches on a keyspace.

    A change costs time in proportion to the keys that it names: whoever watches them is told once, and then
    is not in the way of the next change.

    Attributes:
        by_key: who watches a key. While it is empty no change need be looked at.
    """

    def __init__(self, keyspace: Keyspace[VectorIndex]) -> None:
        self._keyspace = keyspace
        self.by_key: dict[bytes, set[Watch]] = {}
        # Who watches a key that holds the index of an id, and who watches any key that is there.
        self._by_index: dict[int, set[Watch]] = {}
        self._of_existing: set[Watch] = set()
        # Those that nobody asks any more, whose keys are still in `by_key`.
        self._abandoned: list[Watch] = []

    def add(self, watch: Watch, keys: Iterable[bytes]) -> None:
        """Watches further keys."""
        keyspace, by_key = self._keyspace, self.by_key
        for key in keys:
            if watch.broken:
                return
            if key in watch.keys:
                continue
            watch.keys.add(key)
            watches = by_key.get(key)
            if watches is None:
                by_key[key] = {watch}
            else:
                watches.add(watch)
            value = keyspace.values.get(key)
            if value is None:
                continue
            self._of_existing.add(watch)
            if isinstance(value, VectorIndex):
                watch.indices.append(value.id)
                self._by_index.setdefault(value.id, set()).add(watch)
            lapses_at = keyspace.expiries.get(key)
            if lapses_at is not None and (watch.lapses_at is None or lapses_at < watch.lapses_at):
                watch.lapses_at = lapses_at

    def remove(self, watch: Watch) -> None:
        """Forgets a watch: at once, or with many keys by calls of `clear_up`."""
        self._of_existing.discard(watch)
        if self._forget_keys(watch):
            self._abandoned.append(watch)

    def clear_up(self) -> bool:
        """Forgets some of the keys of watches that were removed; returns whether there are more."""
        if self._abandoned and not self._forget_keys(self._abandoned[-1]):
            self._abandoned.pop()
        return bool(self._abandoned)

    def about_to_change(self, operation: Operation) -> None:
        """Breaks the watches on keys that an operation changes, which is to be applied next."""
        _BREAK[type(operation)](operation, self)

    def break_keys(self, keys: Iterable[bytes]) -> None:
        """Breaks the watches on these keys."""
        for key in keys:
            _break(self.by_key.pop(key, ()))

    def break_index(self, index_id: int) -> None:
        """Breaks the watches on the key that holds the index of that id."""
        _break(self._by_index.pop(index_id, ()))

    def break_existing(self) -> None:
        """Breaks the watches on keys that are there."""
        _break(self._of_existing)
        self._of_existing = set()

    def _forget_keys(self, watch: Watch) -> bool:
        """Forgets some keys of a watch; returns whether it has more."""
        for _ in range(min(_KEYS_AT_ONCE, len(watch.keys))):
            _discard(self.by_key, watch.keys.pop(), watch)
        for _ in range(min(_KEYS_AT_ONCE, len(watch.indices))):
            _discard(self._by_index, watch.indices.pop(), watch)
        return bool(watch.keys or watch.indices)


Name = TypeVar("Name", bytes, int)


def _discard(watches: dict[Name, set[Watch]], name: Name, watch: Watch) -> None:
    """Takes a watch off those of a key or an index, if it is still there."""
    left = watches.get(name)
    if left is not None:
        left.discard(watch)
        if not left:
            del watches[name]


def _break(watches: Iterable[Watch]) -> None:
    for watch in watches:
        watch.broken = True


_BREAK: dict[type[Operation], Callable[[Any, Watches], None]] = {
    SetString: lambda operation, watches: watches.break_keys((operation.key,)),
    AppendString: lambda operation, watches: watches.break_keys((operation.key,)),
    SetRange: lambda operation, watches: watches.break_keys((operation.key,)),
    SetStrings: lambda operation, watches: watches.break_keys(operation.keys),
    RenameKey: lambda operation, watches: watches.break_keys((operation.source, operation.destination)),
    CopyKey: lambda operation, watches: watches.break_keys((operation.destination,)),
    DeleteKeys: lambda operation, watches: watches.break_keys(operation.keys),
    SetExpiry: lambda operation, watches: watches.break_keys((operation.key,)),
    Flush: lambda operation, watches: watches.break_existing(),
    CreateIndex: lambda operation, watches: watches.break_keys((operation.key,)),
    AddVectors: lambda operation, watches: watches.break_index(operation.index),
    DeleteVectors: lambda operation, watches: watches.break_index(operation.index),
    SetAttributes: lambda operation, watches: watches.break_index(operation.index),
    # A new graph changes no answer that is exact.
    InstallSegment: lambda operation, watches: None,
}
