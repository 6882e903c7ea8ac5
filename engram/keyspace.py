"""Names and what they hold, and when they lapse. Synchronous and pure: no clock is read here."""

from __future__ import annotations

import heapq
import secrets
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from engram.errors import NothingChangedError
from engram.sizes import BYTES_OBJECT, INTEGER_OBJECT, table_bytes

Other = TypeVar("Other")

# A cursor holds the number of its scan above the position in it, and stays below 2**53 so that clients
# which read numbers as doubles keep it whole.
_POSITION_BITS = 40
_SCAN_NUMBERS = 1 << 12
_OPEN_SCANS = 256
# Keys that the snapshots of open scans hold together, but for the last scan.
_SCANNED_KEYS = 1 << 24

# Keys that are stepped over to reach a random one. With more keys they are drawn from a list, which is made
# anew when so many of its keys are gone, or so many others have come, that it no longer stands for all.
_STEPPED_KEYS = 1 << 12
_DRAWS = 16

# What a key and its string take beside their lengths; an entry of the queue of expiries, a tuple that the
# collector knows; and an expiry.
_KEY_BYTES = 2 * BYTES_OBJECT
_QUEUE_ENTRY_BYTES = 72
_EXPIRY_BYTES = INTEGER_OBJECT + _QUEUE_ENTRY_BYTES

# As many of the oldest keys, and of the newest, stand for all where nobody counts.
_SAMPLED_KEYS = 1 << 11


class Keyspace(Generic[Other]):
    """A mapping of keys to strings (bytes) or to values of another kind, with expiries.

    `values` and `expiries` are read directly by callers; they are changed only through the methods.
    Expiries are in milliseconds since the epoch. An expired key is still here until it is deleted:
    deciding what time it is belongs to the caller.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | Other] = {}
        self.expiries: dict[bytes, int] = {}
        # (expiry, key), earliest first; an entry counts only while `expiries` agrees with it.
        self._queue: list[tuple[int, bytes]] = []
        # Snapshots of the keys, by scan number. A key present for the whole of a scan is in the
        # snapshot taken at its start, which is all that SCAN promises.
        self._scans: OrderedDict[int, list[bytes]] = OrderedDict()
        self._last_scan = 0
        # What random keys are drawn from.
        self._drawn_from: list[bytes] = []
        # The lengths of all keys and strings, None while they are not counted.
        self._text_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    def set(self, key: bytes, value: bytes | Other, expires_at: int | None = None) -> None:
        """The key holds the value and lapses at `expires_at`, or never when None.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        if self._text_bytes is None:
            try:
                self.values[key] = value
            except MemoryError as error:
                raise NothingChangedError from error
        else:
            self._set_counted(key, value)
        if self.expiries or expires_at is not None:
            self.set_expiry(key, expires_at)

    def set_many(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """The keys hold these values, in order, and never lapse."""
        if self._text_bytes is None:
            self.values.update(zip(keys, values, strict=True))
        else:
            try:
                for key, value in zip(keys, values, strict=True):
                    self._set_counted(key, value)
            except NothingChangedError as error:
                # Those before it have.
                raise MemoryError from error
        if self.expiries:
            for key in keys:
                self.expiries.pop(key, None)

    def update(self, key: bytes, value: bytes | Other) -> None:
        """The key holds another value; when it lapses stays.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        if self._text_bytes is None:
            try:
                self.values[key] = value
            except MemoryError as error:
                raise NothingChangedError from error
        else:
            self._set_counted(key, value)

    def rename(self, source: bytes, destination: bytes) -> None:
        """What an existing key holds, and when it lapses, belongs to another key.

        Raises:
            NothingChangedError: there is no memory for one more key.
        """
        self.set(destination, self.values[source], self.expiries.get(source))
        self.delete(source)

    def delete(self, key: bytes) -> bytes | Other | None:
        """Takes a key away; returns what it held, None when it was not there."""
        if self.expiries:
            self.expiries.pop(key, None)
        if self._text_bytes is not None and key in self.values:
            self._text_bytes -= len(key) + _text_length(self.values[key])
        return self.values.pop(key, None)

    def set_expiry(self, key: bytes, expires_at: int | None) -> None:
        """Changes when an existing key lapses."""
        if expires_at is None:
            self.expiries.pop(key, None)
        else:
            self._schedule(key, expires_at)

    def clear(self) -> tuple[dict[bytes, bytes | Other], dict[bytes, int]]:
        """Takes everything away; returns what `values` and `expiries` held."""
        taken = self.values, self.expiries
        self.values, self.expiries, self._queue = {}, {}, []
        self._scans.clear()
        self._drawn_from = []
        if self._text_bytes is not None:
            self._text_bytes = 0
        return taken

    def load(self, values: dict[bytes, bytes | Other], expiries: dict[bytes, int]) -> None:
        """Takes these mappings over as its own."""
        self.values, self.expiries = values, expiries
        self._rebuild_queue()
        if self._text_bytes is not None:
            self._text_bytes = _text_bytes(values.items())

    def random_key(self) -> bytes | None:
        """Any key, about as likely as any other; None when there is none.

        With thousands of keys, one that has come lately may not be drawn until there are an eighth more.
        """
        count = len(self.values)
        if count <= _STEPPED_KEYS:
            self._drawn_from = []
            return next(islice(self.values, secrets.randbelow(count), None)) if count else None
        if not count * 7 // 8 <= len(self._drawn_from) <= count * 8 // 7:
            self._drawn_from = list(self.values)
        for _ in range(_DRAWS):
            key = secrets.choice(self._drawn_from)
            if key in self.values:
                return key
        self._drawn_from = list(self.values)
        return secrets.choice(self._drawn_from)

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
            if type(value) is bytes:
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
        size += table_bytes(values) + _KEY_BYTES * len(values)
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

    def _set_counted(self, key: bytes, value: bytes | Other) -> None:
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

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """The next `count` keys of a scan and the cursor that continues it, 0 at the end.

        Every key present from the first call (cursor 0) to the last is returned at least once. Some
        hundreds of scans may be open at once; beyond that the one that was not used for longest is
        forgotten, and its cursor starts over. See https://redis.io/docs/latest/commands/scan/.
        """
        number, position = cursor >> _POSITION_BITS, cursor & ((1 << _POSITION_BITS) - 1)
        keys = self._scans.get(number)
        if keys is None:
            keys, position = list(self.values), 0
            self._last_scan = number = self._last_scan % (_SCAN_NUMBERS - 1) + 1
            self._scans[number] = keys
            held = sum(map(len, self._scans.values()))
            while len(self._scans) > _OPEN_SCANS or (held > _SCANNED_KEYS and len(self._scans) > 1):
                held -= len(self._scans.popitem(last=False)[1])
        self._scans.move_to_end(number)
        end = position + count
        found = [key for key in keys[position:end] if key in self.values]
        if end >= len(keys):
            del self._scans[number]
            return 0, found
        return (number << _POSITION_BITS) | end, found

    def _schedule(self, key: bytes, expires_at: int) -> None:
        self.expiries[key] = expires_at
        heapq.heappush(self._queue, (expires_at, key))
        if len(self._queue) > 2 * len(self.expiries) + 64:
            self._rebuild_queue()

    def _rebuild_queue(self) -> None:
        self._queue = [(expires_at, key) for key, expires_at in self.expiries.items()]
        heapq.heapify(self._queue)


def _text_length(value: object) -> int:
    return len(value) if type(value) is bytes else 0


def _text_bytes(items: Iterable[tuple[bytes, object]]) -> int:
    return sum(len(key) + (len(value) if type(value) is bytes else 0) for key, value in items)
