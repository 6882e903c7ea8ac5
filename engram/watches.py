"""WATCH: which clients want to know of changes of which keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

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


class Watch:
    """The keys that one client watches; `broken` once any of them has changed."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.broken = False


class Watches:
    """All watches on a keyspace. While `by_key` is empty no change need be looked at."""

    def __init__(self, keyspace: Keyspace[VectorIndex]) -> None:
        self._keyspace = keyspace
        self.by_key: dict[bytes, set[Watch]] = {}

    def add(self, watch: Watch, keys: Iterable[bytes]) -> None:
        """Watches further keys."""
        for key in keys:
            watch.keys.add(key)
            self.by_key.setdefault(key, set()).add(watch)

    def remove(self, watch: Watch) -> None:
        """Forgets a watch."""
        for key in watch.keys:
            watches = self.by_key[key]
            watches.discard(watch)
            if not watches:
                del self.by_key[key]
        watch.keys.clear()

    def about_to_change(self, operation: Operation) -> None:
        """Breaks the watches on keys that an operation changes, which is to be applied next."""
        for key in _CHANGED[type(operation)](operation, self):
            for watch in self.by_key.get(key, ()):
                watch.broken = True

    def existing(self) -> list[bytes]:
        """The watched keys that are there."""
        values = self._keyspace.values
        return [key for key in self.by_key if key in values]

    def of_index(self, index_id: int) -> list[bytes]:
        """The watched key, if any, that holds the index of that id."""
        values = self._keyspace.values
        return [
            key
            for key in self.by_key
            if isinstance(value := values.get(key), VectorIndex) and value.id == index_id
        ]


_CHANGED: dict[type[Operation], Callable[[Any, Watches], Iterable[bytes]]] = {
    SetString: lambda operation, watches: (operation.key,),
    AppendString: lambda operation, watches: (operation.key,),
    SetRange: lambda operation, watches: (operation.key,),
    SetStrings: lambda operation, watches: operation.keys,
    RenameKey: lambda operation, watches: (operation.source, operation.destination),
    CopyKey: lambda operation, watches: (operation.destination,),
    DeleteKeys: lambda operation, watches: operation.keys,
    SetExpiry: lambda operation, watches: (operation.key,),
    Flush: lambda operation, watches: watches.existing(),
    CreateIndex: lambda operation, watches: (operation.key,),
    AddVectors: lambda operation, watches: watches.of_index(operation.index),
    DeleteVectors: lambda operation, watches: watches.of_index(operation.index),
    SetAttributes: lambda operation, watches: watches.of_index(operation.index),
    # A new graph changes no answer that is exact.
    InstallSegment: lambda operation, watches: (),
}
