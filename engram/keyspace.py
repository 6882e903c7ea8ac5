"""Names and what they hold, and when they lapse. Synchronous and pure: no clock is read here."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, closing
from itertools import islice
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

import attrs

from engram.deadlines import DEADLINE_BYTES, Deadlines
from engram.errors import NothingChangedError
from engram.large_string import LargeString, String
from engram.scan_order import BLOCK_KEYS, PAGE_BYTES, ScanOrder
from engram.sizes import BYTES_OBJECT, table_bytes

Other = TypeVar("Other")

Collected = dict[Any, Any] | deque[Any] | list[Any]
"""What may be so large that it is freed in slices."""

# What a key and its string take beside their lengths.
_KEY_BYTES = 2 * BYTES_OBJECT

_POINTER_BYTES = 8

# As many of the oldest keys, and of the newest, stand for all where nobody counts.
_SAMPLED_KEYS = 1 << 11


@attrs.frozen(eq=False)
class FrozenKeys:
    """Keys as they are at one moment, whatever becomes of them. Any thread may go through them.

    Attributes:
        most: how many there are, at most.
        bytes_held: what is held for them beside the keys themselves.
    """

    most: int
    _blocks: Iterable[Sequence[bytes]]
    _gone: AbstractSet[bytes]
    # When those that have a deadline lapse; empty where none of them has lapsed.
    _expiries: Mapping[bytes, int]
    _now: int
    bytes_held: int

    def __iter__(self) -> Iterator[Sequence[bytes]]:
        """Some of them at a time."""
        gone, expiries, now = self._gone, self._expiries, self._now
        for keys in self._blocks:
            if gone and not gone.isdisjoint(keys):
                keys = [key for key in keys if key not in gone]
            if expiries:
                keys = [key for key in keys if (at := expiries.get(key)) is None or at > now]
            yield keys


class Keyspace(Generic[Other]):
    """A mapping of keys to strings or to values of another kind, with expiries.

    `values` and `expiries` are read directly by callers; they are changed only through the methods.
    Expiries are in milliseconds since the epoch. An expired key is still here until it is deleted:
    deciding what time it is belongs to the caller. Cursors of scans are numbers from `first_serial` on.
    `check` raises for a value that is no string and may not be kept.
    """

    def __init__(self, first_serial: int = 1, check: Callable[[Other], object] = lambda value: None) -> None:
        self.values: dict[bytes, String | Other] = {}
        # Those of the values that are no strings, and where they are.
        self.others: dict[Other, bytes] = {}
        self._check = check
        self._take_deadlines(Deadlines())
        self._order = ScanOrder(self.values, first_serial)
        # The lengths of all keys and strings, None while they are not counted.
        self._text_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    def set(self, key: bytes, value: String | Other, expires_at: int | None = None) -> None:
        """The key holds the value and lapses at `expires_at`, or never when None.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        self.update(key, value)
        if self.expiries or expires_at is not None:
            self.set_expiry(key, expires_at)

    def set_many(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """The keys hold these values, in order, and never lapse."""
        held = self.values
        before = len(held)
        if self._text_bytes is None:
            held.update(zip(keys, values, strict=True))
        else:
            try:
                for key, value in zip(keys, values, strict=True):
                    self._set_counted(key, value)
            except NothingChangedError as error:
                # Those before it have.
                raise MemoryError from error
        if len(held) > before:
            self._order.extend(keys, len(held) - before)
        if self.expiries:
            for key in keys:
                self.expiries.pop(key, None)

    def update(self, key: bytes, value: String | Other) -> None:
        """The key holds another value; when it lapses stays.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        values = self.values
        before = len(values)
        is_string = type(value) is bytes or type(value) is LargeString
        if not is_string:
            self._check(cast("Other", value))
        if self._text_bytes is None:
            try:
                values[key] = value
            except MemoryError as error:
                raise NothingChangedError from error
        else:
            self._set_counted(key, value)
        if not is_string:
            self.others[cast("Other", value)] = key
        if len(values) != before:
            self._order.add(key)

    def rename(self, source: bytes, destination: bytes) -> None:
        """What an existing key holds, and when it lapses, belongs to another key.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        if source != destination:
            value = self.values[source]
            self.set(destination, value, self.expiries.get(source))
            self.delete(source)
            if not isinstance(value, String):
                self.others[value] = destination

    def delete(self, key: bytes) -> String | Other | None:
        """Takes a key away; returns what it held, None when it was not there."""
        if key not in self.values:
            return None
        if self.expiries:
            self.expiries.pop(key, None)
        value = self.values.pop(key)
        if self._text_bytes is not None:
            self._text_bytes -= len(key) + _text_length(value)
        if self.others and not isinstance(value, String):
            self.others.pop(value, None)
        self._order.remove(key)
        return value

    def set_expiry(self, key: bytes, expires_at: int | None) -> None:
        """Changes when an existing key lapses."""
        if expires_at is None:
            self.expiries.pop(key, None)
        else:
            self._deadlines.set(key, expires_at)

    def clear(self) -> list[Collected]:
        """Takes everything away; returns `values`, `expiries` and what else may be large, to be freed."""
        taken: list[Collected] = [self.values, *self._deadlines.remains(), *self._order.remains()]
        self.values, self.others = {}, {}
        self._take_deadlines(Deadlines())
        # A scan under way goes on below the serials of keys that are yet to come.
        self._order = ScanOrder(self.values, self._order.next_serial)
        if self._text_bytes is not None:
            self._text_bytes = 0
        return taken

    def load(
        self,
        values: dict[bytes, String | Other],
        expiries: dict[bytes, int],
        others: Mapping[Other, bytes] = MappingProxyType({}),
    ) -> None:
        """Takes these mappings over as its own; `others` has the values that are no strings."""
        self.values, self.others = values, dict(others)
        self._order = ScanOrder(values, self._order.next_serial)
        self._take_deadlines(Deadlines(expiries))
        if self._text_bytes is not None:
            self._text_bytes = _text_bytes(values.items())

    def freeze(self, now: int) -> FrozenKeys:
        """The keys that are here and have not lapsed by `now`, a number of steps for each 256 of them.

        Where one has lapsed and is not deleted yet, those that will lapse are copied.
        """
        blocks, dead = self._order.freeze()
        expiries = self._expiries_at(now)
        size = _POINTER_BYTES * len(blocks) + table_bytes(dead) + table_bytes(expiries)
        return FrozenKeys(len(self.values), blocks, dead.keys(), expiries, now, size)

    def freeze_others(self, kind: type[Other], now: int) -> FrozenKeys:
        """As `freeze`, of the keys of values of one type, which are no strings."""
        keys, kinds = list(self.others.values()), list(map(type, self.others))

        def blocks() -> Iterator[Sequence[bytes]]:
            for start in range(0, len(keys), BLOCK_KEYS):
                some = zip(keys[start : start + BLOCK_KEYS], kinds[start : start + BLOCK_KEYS], strict=True)
                yield [key for key, each in some if each is kind]

        expiries = self._expiries_at(now)
        size = 2 * _POINTER_BYTES * len(keys) + table_bytes(expiries)
        return FrozenKeys(len(keys), blocks(), frozenset(), expiries, now, size)

    def _expiries_at(self, now: int) -> Mapping[bytes, int]:
        """When keys lapse, where one of them has by `now`."""
        first = self.next_expiry()
        return {} if first is None or first > now else self.expiries.copy()

    def random_key(self) -> bytes | None:
        """Any key, about as likely as any other; None when there is none."""
        return self._order.random() if self.values else None

    def exchange(self, other: Keyspace[Other]) -> None:
        """Each holds what the other has held, in a few steps."""
        for name in ("values", "others", "_deadlines", "expiries", "_order", "_text_bytes"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs)
            setattr(other, name, mine)

    def next_expiry(self) -> int | None:
        """When the earliest key lapses, None when none will."""
        return self._deadlines.next()

    def expired(self, now: int, limit: int) -> list[bytes]:
        """Up to `limit` keys that have lapsed by `now`, earliest first; they stay until deleted."""
        return self._deadlines.due(now, limit)

    def earliest(self) -> Generator[tuple[int, bytes], None, None]:
        """When keys lapse, and the keys, the earliest first: see `Deadlines.earliest`."""
        return self._deadlines.earliest()

    @property
    def counting(self) -> bool:
        """Whether `bytes_held` is exact: each change is counted, which a SET takes 0.1 us for.

        When it is set every key is looked at once: 0.1 s for a million.
        """
        return self._text_bytes is not None

    @counting.setter
    def counting(self, counting: bool) -> None:
        if counting != self.counting:
            self._text_bytes = _text_bytes(self.values.items()) if counting else None

    def bytes_held(self) -> int:
        """What keys, strings and expiries take in memory, and the tables they are in.

        Values of another kind are not counted. While `counting` is false and there are thousands of keys,
        some stand for all.
        """
        values = self.values
        size = self._estimated_text_bytes() if self._text_bytes is None else self._text_bytes
        size += table_bytes(values) + _KEY_BYTES * len(values) + self._order.bytes_held
        return size + self._deadlines.bytes_held()

    def _estimated_text_bytes(self) -> int:
        values = self.values
        if len(values) <= 2 * _SAMPLED_KEYS:
            return _text_bytes(values.items())
        oldest = _text_bytes(islice(values.items(), _SAMPLED_KEYS))
        newest = _text_bytes(islice(reversed(values.items()), _SAMPLED_KEYS))
        return (oldest + newest) * len(values) // (2 * _SAMPLED_KEYS)

    def _set_counted(self, key: bytes, value: String | Other) -> None:
        """The key holds the value, and its length is counted. Raises NothingChangedError as `set` does."""
        assert self._text_bytes is not None
        growth = _text_length(value)
        if key in self.values:
            growth -= _text_length(self.values[key])
        else:
            growth += len(key)
        try:
            self.values[key] = value
        except MemoryError as error:
            raise NothingChangedError from error
        self._text_bytes += growth

    def scan(self, cursor: int, count: int, size: int = PAGE_BYTES) -> tuple[int, list[bytes]]:
        """The next keys of a scan, up to `count`, and the cursor that continues it, 0 at the end.

        Every key present from the first call (cursor 0) to the last is returned: see `ScanOrder.page`, and
        https://redis.io/docs/latest/commands/scan/.
        """
        return self._order.page(cursor, count, size)

    def _take_deadlines(self, deadlines: Deadlines[bytes]) -> None:
        self._deadlines = deadlines
        # Looked up all the time.
        self.expiries = deadlines.at


def nearest_to_lapse(
    keyspaces: Mapping[int, Keyspace[Any]], size: int, limit: int, size_of: Callable[[Any], int | None]
) -> dict[int, list[bytes]]:
    """Keys that lapse first, by number of their keyspace: so many as take `size` bytes, or `limit`.

    They stay until deleted. `size_of` tells the bytes of a value, None for one whose key is passed over.
    """
    found: dict[int, list[bytes]] = {}
    with ExitStack() as stack:
        queues = [
            stack.enter_context(closing(_numbered(number, keyspace)))
            for number, keyspace in keyspaces.items()
            if keyspace.expiries
        ]
        for _, number, key in heapq.merge(*queues):
            held = size_of(keyspaces[number].values[key])
            if held is None:
                continue
            found.setdefault(number, []).append(key)
            size -= _KEY_BYTES + DEADLINE_BYTES + len(key) + held
            limit -= 1
            if size <= 0 or limit <= 0:
                break
    return found


def _numbered(number: int, keyspace: Keyspace[Any]) -> Generator[tuple[int, int, bytes], None, None]:
    with closing(keyspace.earliest()) as earliest:
        for at, key in earliest:
            yield at, number, key


def _text_length(value: object) -> int:
    return len(value) if type(value) is bytes or type(value) is LargeString else 0


def _text_bytes(items: Iterable[tuple[bytes, object]]) -> int:
    return sum(len(key) + _text_length(value) for key, value in items)
