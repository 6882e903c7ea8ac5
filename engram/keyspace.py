"""Names and what they hold, and when they lapse. Synchronous and pure: no clock is read here."""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

from engram.errors import NothingChangedError
from engram.large_string import LargeString, String
from engram.scan_order import PAGE_BYTES, ScanOrder
from engram.sizes import BYTES_OBJECT, INTEGER_OBJECT, table_bytes

Other = TypeVar("Other")

Collected = dict[Any, Any] | deque[Any] | list[Any]
"""What may be so large that it is freed in slices."""

# What a key and its string take beside their lengths; an entry of the queue of expiries, a tuple that the
# collector knows; and an expiry.
_KEY_BYTES = 2 * BYTES_OBJECT
_QUEUE_ENTRY_BYTES = 72
_EXPIRY_BYTES = INTEGER_OBJECT + _QUEUE_ENTRY_BYTES

# As many of the oldest keys, and of the newest, stand for all where nobody counts.
_SAMPLED_KEYS = 1 << 11


class Keyspace(Generic[Other]):
    """A mapping of keys to strings or to values of another kind, with expiries.

    `values` and `expiries` are read directly by callers; they are changed only through the methods.
    Expiries are in milliseconds since the epoch. An expired key is still here until it is deleted:
    deciding what time it is belongs to the caller. Cursors of scans are numbers from `first_serial` on.
    """

    def __init__(self, first_serial: int = 1) -> None:
        self.values: dict[bytes, String | Other] = {}
        self.expiries: dict[bytes, int] = {}
        # (expiry, key), earliest first; an entry counts only while `expiries` agrees with it.
        self._queue: list[tuple[int, bytes]] = []
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
        if self._text_bytes is None:
            try:
                values[key] = value
            except MemoryError as error:
                raise NothingChangedError from error
        else:
            self._set_counted(key, value)
        if len(values) != before:
            self._order.add(key)

    def rename(self, source: bytes, destination: bytes) -> None:
        """What an existing key holds, and when it lapses, belongs to another key.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        if source != destination:
            self.set(destination, self.values[source], self.expiries.get(source))
            self.delete(source)

    def delete(self, key: bytes) -> String | Other | None:
        """Takes a key away; returns what it held, None when it was not there."""
        if key not in self.values:
            return None
        if self.expiries:
            self.expiries.pop(key, None)
        value = self.values.pop(key)
        if self._text_bytes is not None:
            self._text_bytes -= len(key) + _text_length(value)
        self._order.remove(key)
        return value

    def set_expiry(self, key: bytes, expires_at: int | None) -> None:
        """Changes when an existing key lapses."""
        if expires_at is None:
            self.expiries.pop(key, None)
        else:
            self._schedule(key, expires_at)

    def clear(self) -> list[Collected]:
        """Takes everything away; returns `values`, `expiries` and what else may be large, to be freed."""
        taken: list[Collected] = [self.values, self.expiries, *self._order.remains()]
        self.values, self.expiries, self._queue = {}, {}, []
        # A scan under way goes on below the serials of keys that are yet to come.
        self._order = ScanOrder(self.values, self._order.next_serial)
        if self._text_bytes is not None:
            self._text_bytes = 0
        return taken

    def load(self, values: dict[bytes, String | Other], expiries: dict[bytes, int]) -> None:
        """Takes these mappings over as its own."""
        self.values, self.expiries = values, expiries
        self._order = ScanOrder(values, self._order.next_serial)
        self._rebuild_queue()
        if self._text_bytes is not None:
            self._text_bytes = _text_bytes(values.items())

    def random_key(self) -> bytes | None:
        """Any key, about as likely as any other; None when there is none."""
        return self._order.random() if self.values else None

    def next_expiry(self) -> int | None:
        """When the earliest key lapses, None when none will."""
        while self._queue:
            expires_at, key = self._queue[0]
            if self.expiries.get(key) == expires_at:
                return expires_at
            heapq.heappop(self._queue)
        return None

    def expired(self, now: int, limit: int) -> list[bytes]:
        """Up to `limit` keys that have lapsed by `now`, earliest first; they stay until deleted."""
        found: dict[bytes, None] = {}
        entries: list[tuple[int, bytes]] = []
        while self._queue and self._queue[0][0] <= now and len(found) < limit:
            entry = heapq.heappop(self._queue)
            expires_at, key = entry
            if self.expiries.get(key) == expires_at and key not in found:
                found[key] = None
                entries.append(entry)
        for entry in entries:
            heapq.heappush(self._queue, entry)
        return list(found)

    def nearest_to_lapse(self, size: int, limit: int) -> list[bytes]:
        """Keys of strings, those that lapse first, until they take `size` bytes or are `limit` many.

        They stay until deleted; keys that hold something else are passed over.
        """
        found: dict[bytes, None] = {}
        entries: list[tuple[int, bytes]] = []
        while self._queue and size > 0 and len(found) < limit:
            entry = heapq.heappop(self._queue)
            expires_at, key = entry
            if self.expiries.get(key) != expires_at or key in found:
                continue
            entries.append(entry)
            value = self.values[key]
            if isinstance(value, String):
                found[key] = None
                size -= _KEY_BYTES + _EXPIRY_BYTES + len(key) + len(value)
        for entry in entries:
            heapq.heappush(self._queue, entry)
        return list(found)

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
        values, expiries, queue = self.values, self.expiries, self._queue
        size = self._estimated_text_bytes() if self._text_bytes is None else self._text_bytes
        size += table_bytes(values) + _KEY_BYTES * len(values) + self._order.bytes_held
        if queue:
            size += table_bytes(expiries) + INTEGER_OBJECT * len(expiries)
            size += sys.getsizeof(queue) + _QUEUE_ENTRY_BYTES * len(queue)
        return size

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

    def _schedule(self, key: bytes, expires_at: int) -> None:
        self.expiries[key] = expires_at
        heapq.heappush(self._queue, (expires_at, key))
        if len(self._queue) > 2 * len(self.expiries) + 64:
            self._rebuild_queue()

    def _rebuild_queue(self) -> None:
        self._queue = [(expires_at, key) for key, expires_at in self.expiries.items()]
        heapq.heapify(self._queue)


def _text_length(value: object) -> int:
    return len(value) if type(value) is bytes or type(value) is LargeString else 0


def _text_bytes(items: Iterable[tuple[bytes, object]]) -> int:
    return sum(len(key) + _text_length(value) for key, value in items)
