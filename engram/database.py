"""The live state: the engine, a clock, and the log that each change goes to."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import attrs

from engram.effects import CarryOut, Prepare, Touches
from engram.engine import Engine
from engram.errors import ChangeFailureError, CommandError, NothingChangedError, RecordTooLargeError
from engram.index.vector_index import VectorIndex
from engram.keyspace import FrozenKeys
from engram.kinds import KINDS
from engram.large_string import LargeString, String
from engram.operations import (
    LARGEST_TOGETHER,
    AddVectors,
    DeleteKeys,
    DeleteVectors,
    InstallSegment,
    Operation,
    SetAttributes,
)
from engram.watches import Watches

WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"

# What a record takes in the log beyond the bytes a client sent for it, generously.
RECORD_OVERHEAD = 256

# What a key takes in a record beside its bytes.
_KEY_BYTES = 8

EXPIRY_BATCH = 512


class Journal(Protocol):
    """What the database needs of the log; `persistence.Persistence` is the one that writes to disk."""

    @property
    def durable_lsn(self) -> int: ...

    def has_room(self, size: int) -> bool: ...

    async def admit(self, size: int) -> None: ...

    def reserve(self, lsn: int, operation: Operation) -> bytes: ...

    def encode(self, operation: Operation, before: int = 0) -> bytes: ...

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None: ...

    def append_together(self, first_lsn: int, payloads: Sequence[bytes]) -> None: ...

    def released(self, lsn: int) -> bool: ...

    def on_release(self, lsn: int, callback: Callable[[], None]) -> None: ...

    async def wait_durable(self, lsn: int) -> None: ...


def clock() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@attrs.define
class _Group:
    """Changes that go to the log together."""

    journal: Journal
    first_lsn: int
    payloads: list[bytes] = attrs.Factory(list)
    size: int = 0

    def reserve(self, lsn: int, operation: Operation) -> bytes:
        return self.journal.encode(operation, self.size)

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        self.payloads.append(payload)
        self.size += len(payload)


Observer = Callable[[Operation, Touches], None]
"""Is told of a change, and what says what it touches."""


class Database:
    """The one place where operations are made live, whichever of the numbered databases they are about.

    Everything here is synchronous: a command, from its first look at the state to its last change,
    is atomic.
    """

    def __init__(self, engine: Engine, journal: Journal | None, *, now: Callable[[], int] = clock) -> None:
        self.engine = engine
        self.journal = journal
        self.now = now
        self.expired_keys = 0
        # Whether the log has room for the end of every lapsed key that what is being carried out may find.
        self.covered = False
        self.watches = Watches(engine.keyspaces)
        # Why nothing can be changed, or may be shown, any more; and what is called when that has come.
        self.failure: ChangeFailureError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        # What `commit` raises for a change that is too large for the log.
        self.too_large: Callable[[RecordTooLargeError], Exception] = lambda error: error
        # Made ahead, for it is most likely when there is no memory.
        self._possible_failure = ChangeFailureError()
        self._watched = self.watches.by_key
        # The two steps of each change, who is told of it, and what says what it touches.
        self._effects: dict[type[Operation], tuple[Prepare | None, CarryOut, list[Observer], Touches]] = {
            operation: (effect.prepare, effect.carry_out, [], effect.touches)
            for operation, effect in KINDS.effects.items()
        }
        # Where changes go: to the log, or inside `together` to what is given to it at the end.
        self._reserve: Callable[[int, Operation], bytes] | None = None
        self._append: Callable[[int, Operation, bytes], None] | None = None
        if journal is not None:
            self._reserve, self._append = journal.reserve, journal.append
        self._together = False
        self._logical: dict[int, LogicalDatabase] = {}

    def logical(self, number: int) -> LogicalDatabase:
        """The database of that number."""
        found = self._logical.get(number)
        if found is None:
            found = self._logical[number] = LogicalDatabase(self, number)
        return found

    def observe(self, observer: Observer, operations: Collection[type[Operation]] | None = None) -> None:
        """Has an observer called after each change by one of these operations, by any when None.

        It must not make changes. What it raises leaves the change as it is.
        """
        for operation, (_, _, observers, _) in self._effects.items():
            if operations is None or operation in operations:
                observers.append(observer)

    def observe_indices(self, consider: Callable[[VectorIndex], None]) -> None:
        """Has `consider` called with a vector index after each change of its rows or graphs."""
        indices = self.engine.indices

        def observe(operation: Any, touches: Touches) -> None:
            index = indices.get(operation.index)
            if index is not None:
                consider(index)

        self.observe(observe, (AddVectors, SetAttributes, DeleteVectors, InstallSegment))

    @property
    def lsn(self) -> int:
        """The number of the last change made."""
        return self.engine.lsn

    def commit(self, operation: Operation) -> int:
        """Applies a change and queues it for the log; returns its LSN.

        Room in the log must have been admitted before. All that can fail for a cause comes before the first
        step that changes anything.

        Raises:
            ChangeFailureError: it has failed after that step, or one before it has. `failure` holds the error
                from then on, and whoever runs the database ends.
            RecordTooLargeError: or as `too_large` says. Nothing has changed.
            Exception: any other, such as MemoryError. Nothing has changed.
        """
        engine = self.engine
        lsn = engine.lsn + 1
        reserve = self._reserve
        try:
            payload = b"" if reserve is None else reserve(lsn, operation)
        except RecordTooLargeError as error:
            raise self.too_large(error) from None
        prepare, carry_out, observers, touches = self._effects[type(operation)]
        prepared = None if prepare is None else prepare(engine, lsn, operation)
        if self._watched:
            self.watches.about_to_change(touches(operation))
        try:
            carry_out(engine, lsn, operation, prepared)
            engine.lsn = lsn
            if (append := self._append) is not None:
                append(lsn, operation, payload)
        except NothingChangedError:
            raise
        except BaseException as error:
            self._fail(error)
        for observer in observers:
            observer(operation, touches)
        return lsn

    def _fail(self, error: BaseException) -> NoReturn:
        """Refuses everything from here on."""
        self._reserve = self._refuse
        if self.failure is None:
            self.failure = self._possible_failure
            self.failure.__cause__ = error
            self.on_failure()
        raise self.failure

    def _refuse(self, lsn: int, operation: Operation) -> bytes:
        assert self.failure is not None
        raise self.failure

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes made inside are recovered all or none. Inside another one it changes nothing."""
        reserve, append, journal = self._reserve, self._append, self.journal
        if append is None or journal is None or self._together or self.failure is not None:
            yield
            return
        group = _Group(journal, self.engine.lsn + 1)
        self._together = True
        self._reserve, self._append = group.reserve, group.append
        try:
            try:
                yield
            finally:
                self._together = False
                # Without the change that has failed, those before it are no whole.
                if self.failure is None:
                    self._reserve, self._append = reserve, append
                    if group.payloads:
                        journal.append_together(group.first_lsn, group.payloads)
                        group.payloads = []
        except BaseException as error:
            if group.payloads:
                self._fail(error)
            raise

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """As `together`, for the parts of one change: an error behind the first of them is one half-way."""
        lsn = self.engine.lsn
        with self.together():
            try:
                yield
            except Exception as error:
                if self.engine.lsn != lsn:
                    self._fail(error)
                raise

    def expire_due(self, limit: int = EXPIRY_BATCH) -> int:
        """Deletes up to `limit` keys that have lapsed, as many as the log has room for; returns how many."""
        deleted = 0
        now = self.now()
        for number, keyspace in list(self.engine.keyspaces.items()):
            keys = self.deletable(keyspace.expired(now, limit - deleted)) if keyspace.expiries else None
            if keys:
                self.expire(number, tuple(keys))
                deleted += len(keys)
        return deleted

    def next_expiry(self) -> int | None:
        """When the earliest key of all lapses, None when none will."""
        keyspaces = self.engine.keyspaces.values()
        found = (keyspace.next_expiry() for keyspace in keyspaces if keyspace.expiries)
        return min((time for time in found if time is not None), default=None)

    def deletable(self, keys: list[bytes]) -> list[bytes]:
        """As many of `keys`, from the first on, as the log has room for the deletion of."""
        while keys and not self.has_room_to_delete(keys):
            keys = keys[: len(keys) // 2]
        return keys

    def has_room_to_delete(self, keys: Sequence[bytes]) -> bool:
        """Whether the log has room for the deletion of keys now."""
        journal = self.journal
        if journal is None:
            return True
        # The log does not know yet what is changed together.
        size = RECORD_OVERHEAD + sum(map(len, keys)) + _KEY_BYTES * len(keys)
        return not self._together and size <= LARGEST_TOGETHER and journal.has_room(size)

    def expire(self, number: int, keys: tuple[bytes, ...]) -> None:
        """Deletes keys of a database that have lapsed."""
        self.commit(DeleteKeys(keys, number))
        self.expired_keys += len(keys)


class LogicalDatabase:
    """One of the numbered databases, as the commands of a client that has selected it see it.

    Attributes:
        keyspace: what is in it.
        commit: `Database.commit`, for operations that name `number`.
    """

    def __init__(self, database: Database, number: int) -> None:
        self.number = number
        self.keyspace = database.engine.keyspaces[number]
        self.engine = database.engine
        self.journal = database.journal
        self.commit = database.commit
        self.together = database.together
        self.as_one = database.as_one
        self.now = database.now
        self._database = database

    @property
    def lsn(self) -> int:
        """The number of the last change made, in any database."""
        return self.engine.lsn

    def lookup(self, key: bytes) -> Any:
        """What a key holds now; a key found to have lapsed is deleted."""
        keyspace = self.keyspace
        if keyspace.expiries:
            expires_at = keyspace.expiries.get(key)
            if expires_at is not None and expires_at <= self.now():
                # Reads go on without room in the log: the key is treated as gone, and deleted later.
                database = self._database
                if database.covered or database.has_room_to_delete((key,)):
                    database.expire(self.number, (key,))
                return None
        return keyspace.values.get(key)

    def string(self, key: bytes) -> String | None:
        """The string at a key, None when there is no such key.

        Raises:
            CommandError: the key holds something else.
        """
        # As `lookup`, which is the slower of the two for what is asked most often.
        keyspace = self.keyspace
        value = self.lookup(key) if keyspace.expiries else keyspace.values.get(key)
        if value is None or type(value) is bytes or isinstance(value, LargeString):
            return value
        raise CommandError(WRONG_TYPE)

    def index(self, key: bytes) -> VectorIndex | None:
        """The vector index at a key, None when there is no such key.

        Raises:
            CommandError: the key holds something else.
        """
        value = self.lookup(key)
        if value is None or isinstance(value, VectorIndex):
            return value
        raise CommandError(WRONG_TYPE)

    def live_keys(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that have not lapsed."""
        expiries = self.keyspace.expiries
        if not expiries:
            return list(keys)
        now = self.now()
        return [key for key in keys if (at := expiries.get(key)) is None or at > now]

    def keys(self) -> FrozenKeys:
        """The keys that there are now."""
        return self.keyspace.freeze(self.now())

    def keys_of(self, kind: type[Any]) -> FrozenKeys:
        """The keys that now hold a value of a type, which is not that of strings."""
        return self.keyspace.freeze_others(kind, self.now())
