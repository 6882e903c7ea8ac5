"""Names and what they hold, and when they lapse. Synchronous and pure: no clock is read here."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Generic, TypeVar

Other = TypeVar("Other")

# A cursor holds the number of its scan above the position in it, and stays below 2**53 so that clients
# which read numbers as doubles keep it whole.
_POSITION_BITS = 40
_SCAN_NUMBERS = 1 << 12
_OPEN_SCANS = 256
# Keys that the snapshots of open scans hold together, but for the last scan.
_SCANNED_KEYS = 1 << 24


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

    def __len__(self) -> int:
        return len(self.values)

    def set(self, key: bytes, value: bytes | Other, expires_at: int | None = None) -> None:
        """The key holds the value and lapses at `expires_at`, or never when None."""
        self.values[key] = value
        if self.expiries or expires_at is not None:
            self.set_expiry(key, expires_at)

    def delete(self, key: bytes) -> bytes | Other | None:
        """Takes a key away; returns what it held, None when it was not there."""
        if self.expiries:
            self.expiries.pop(key, None)
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
        return taken

    def load(self, values: dict[bytes, bytes | Other], expiries: dict[bytes, int]) -> None:
        """Takes these mappings over as its own."""
        self.values, self.expiries = values, expiries
        self._rebuild_queue()

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
