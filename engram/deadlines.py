"""When names lapse, and which of them do first: keys today; members and fields may do so as well."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Generator
from typing import Generic, TypeVar

from engram.sizes import INTEGER_OBJECT, table_bytes

Name = TypeVar("Name")

# An entry of the queue: a tuple that the collector knows.
_ENTRY_BYTES = 72
# Entries that are out of date may be as many as those that count, and so many.
_SPARE_ENTRIES = 64

DEADLINE_BYTES = INTEGER_OBJECT + _ENTRY_BYTES
"""What the deadline of a name takes beside its place in `at`."""


class Deadlines(Generic[Name]):
    """The times at which names lapse, in milliseconds since the epoch. No clock is read here.

    `at` is read directly by callers, and changed only through the methods. A name that has lapsed is still
    here until it is removed. Setting one costs O(log n), removing one O(1).
    """

    def __init__(self, at: dict[Name, int] | None = None) -> None:
        self.at: dict[Name, int] = {} if at is None else at
        # (time, name), earliest first; an entry counts only while `at` agrees with it.
        self._queue: list[tuple[int, Name]] = []
        if self.at:
            self._rebuild()

    def set(self, name: Name, time: int) -> None:
        """The name lapses then, whatever was said before."""
        self.at[name] = time
        heapq.heappush(self._queue, (time, name))
        if len(self._queue) > 2 * len(self.at) + _SPARE_ENTRIES:
            self._rebuild()

    def remove(self, name: Name) -> None:
        """The name never lapses, or is gone; it need not be here."""
        self.at.pop(name, None)

    def next(self) -> int | None:
        """When the earliest name lapses, None when none will."""
        queue = self._queue
        while queue:
            time, name = queue[0]
            if self.at.get(name) == time:
                return time
            heapq.heappop(queue)
        return None

    def earliest(self) -> Generator[tuple[int, Name], None, None]:
        """Times and names, the earliest first. They stay; nothing may change until it is closed."""
        queue, at = self._queue, self.at
        seen: set[Name] = set()
        taken: list[tuple[int, Name]] = []
        try:
            while queue:
                entry = heapq.heappop(queue)
                time, name = entry
                if at.get(name) == time and name not in seen:
                    seen.add(name)
                    taken.append(entry)
                    yield entry
        finally:
            for entry in taken:
                heapq.heappush(queue, entry)

    def due(self, now: int, limit: int) -> list[Name]:
        """Up to `limit` names that have lapsed by `now`, earliest first; they stay until removed."""
        found: list[Name] = []
        if not self._queue or self._queue[0][0] > now:
            return found
        earliest = self.earliest()
        for time, name in earliest:
            if time > now or len(found) >= limit:
                break
            found.append(name)
        earliest.close()
        return found

    def remains(self) -> tuple[dict[Name, int], list[tuple[int, Name]]]:
        """What of this may be so large that it is to be freed in slices."""
        return self.at, self._queue

    def bytes_held(self) -> int:
        """What this takes in memory, in a few steps, without the names."""
        if not self._queue:
            return 0
        size = table_bytes(self.at) + INTEGER_OBJECT * len(self.at)
        return size + sys.getsizeof(self._queue) + _ENTRY_BYTES * len(self._queue)

    def _rebuild(self) -> None:
        self._queue = [(time, name) for name, time in self.at.items()]
        heapq.heapify(self._queue)
