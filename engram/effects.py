"""What an operation does to the state, and what it touches there.

The operations themselves are below (operations.py), where the log knows them. Each kind of value binds its
own (kinds); those that are about keys of any kind are bound in key_effects.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import attrs

from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.keyspace import Collected, Keyspace
from engram.tally import Tally


class Keyspaces(dict[int, Keyspace[Any]]):
    """The keyspaces by the numbers of their databases. Each is there as soon as somebody asks for it.

    `check` raises for a value that is no string and may not be kept.
    """

    def __init__(self, first_serial: int, check: Callable[[Any], object]) -> None:
        super().__init__()
        self._first_serial = first_serial
        self._check = check
        self._counting = False
        self.__missing__(0)

    def __missing__(self, number: int) -> Keyspace[Any]:
        made = self[number] = Keyspace(self._first_serial, self._check)
        made.counting = self._counting
        return made

    def count(self, counting: bool) -> None:
        """Has each keyspace, those to come as well, count what it holds: see `Keyspace.counting`."""
        if counting != self._counting:
            self._counting = counting
            for keyspace in self.values():
                keyspace.counting = counting


class State(Protocol):
    """What effects know of the engine."""

    lsn: int
    keyspaces: Keyspaces
    indices: dict[int, VectorIndex]
    index_totals: Tally[VectorIndex]
    segments: SegmentStore
    seal_rows: int
    first_serial: int
    released_segments: list[str]
    dropped: list[Collected]

    def place(self, database: int, key: bytes, value: Any, expires_at: int | None = None) -> None:
        """A key holds a value of any kind, in place of what it held."""

    def resize(self, value: Any) -> None:
        """A value that is no string may take more or less memory now."""

    def resize_index(self, index: VectorIndex) -> None:
        """As `resize`, of a vector index."""

    def drop(self, database: int, value: Any) -> None:
        """Lets go of what no key of a database holds any more, if it is something."""

    def copy_of(self, value: Any) -> Any:
        """The same value for another key."""

    def flush(self, databases: Iterable[int]) -> None:
        """Takes all keys of these databases away."""


@attrs.frozen
class Touched:
    """What an operation changes.

    Attributes:
        keys: by number of the database, the keys of which the value or the expiry changes.
        index: the id of the vector index of which members change, 0 for none.
        databases: those of which all keys change. One loses them, two exchange theirs; None says that every
            database loses its own.
    """

    keys: Sequence[tuple[int, Sequence[bytes]]] = ()
    index: int = 0
    databases: Sequence[int] | None = ()


CarryOut = Callable[[State, int, Any, Any], None]
Prepare = Callable[[State, int, Any], Any]
Touches = Callable[[Any], Touched]


@attrs.frozen
class Effect:
    """The two steps of a change, and what it touches.

    `prepare`, if any, is called with the engine, the LSN and the operation. All that can fail for a cause
    comes there: what it raises has changed nothing. What it returns is for `carry_out`, which is called at
    once, with all of that. What `carry_out` raises, but for a NothingChangedError, leaves the state between
    two operations. The caller of both sets `Engine.lsn` then.
    """

    carry_out: CarryOut
    touches: Touches
    prepare: Prepare | None = None


def touch_key(operation: Any) -> Touched:
    """What an operation on one key touches: it has a `key` and a `database`."""
    return Touched(((operation.database, (operation.key,)),))


def touch_keys(operation: Any) -> Touched:
    """What an operation on several keys of a database touches."""
    return Touched(((operation.database, operation.keys),))
