"""The order in which SCAN and its kin go through the keys of a collection, with all they need in the cursor.

Each key has a serial, the number of its birth. A scan goes from the greatest serial there is at its start
down to the least, and its cursor is the serial to go on with. So keys that come meanwhile never prolong it, a
key that is there throughout is met once, and the server remembers nothing of a scan.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import compress, islice
from operator import length_hint, not_
from typing import Any, Final

from engram.sizes import BYTES_OBJECT, INTEGER_OBJECT, table_bytes

# The keys of a block, and their serials in increasing order: a range while none is missing.
Block = tuple[tuple[bytes, ...], Sequence[int]]

BLOCK_KEYS: Final = 256
"""The most keys that a block has."""

# Clients that read numbers as doubles keep a cursor below this whole.
_CURSORS = 1 << 53

PAGE_BYTES: Final = 1 << 20
"""The bytes of keys after which a page ends."""

# The most keys of a page, the dead entries that it passes over, and entries looked at in one go.
_PAGE_KEYS = 1 << 14
_PASSED_OVER = 512
_STEP = 64

# A longer key has a block of its own, which goes with it.
_LONG_KEY = 1 << 14

# Dead entries may be so many, and one to so many living ones; their keys may take so many bytes, and so many
# for each living one. Beyond that each death has so many entries looked at, and one more for so many bytes.
_SPARE_DEAD = 64
_LIVING_TO_A_DEAD = 8
_SPARE_BYTES = 1 << 16
_DEAD_BYTES_TO_A_LIVING = 16
_SWEPT_FOR_A_DEATH = 8
_BYTES_FOR_AN_ENTRY = 32

_DRAWS = 64

# Two tuples, a range with its numbers, and a place in two lists; a place in a tuple or an array; a dead key
# with its share of a table.
_BLOCK_BYTES = 2 * 56 + 48 + 3 * INTEGER_OBJECT + 2 * 8
_PLACE_BYTES = 8
_DEAD_KEY_BYTES = BYTES_OBJECT + 40


def first_serial(now: int) -> int:
    """Where the serials of a server that starts at `now`, in microseconds since the epoch, begin.

    They are below those of a server that started before, so that its cursors are greater than all serials,
    and begin. (Until 2112, and with up to two new keys a microsecond.)
    """
    return max(1, _CURSORS - 2 * now)


class ScanOrder:
    """The keys of `held`, a dictionary that others change, by serial; the first of the serials is `first`.

    Whoever changes `held` tells of each key that comes (`add`, `extend`) or goes (`remove`), not of other
    values for keys that are there.

    An entry takes 8 bytes, and 16 once others of its block are gone. The entry of a key that is gone is
    dead. It stays until the key comes back or the sweep comes by, which each death pays a part of. Dead
    entries are at most about a third of the living, and a hundred.
    """

    def __init__(self, held: dict[bytes, Any], first: int = 1) -> None:
        self._held = held
        self._blocks: list[Block] = []
        # The least serial of each.
        self._firsts: list[int] = []
        # The newest keys, which become a block when they are enough, and the serial of the first.
        self._tail: list[bytes] = []
        self._tail_first = first
        # Keys that are gone and still have an entry, and their lengths.
        self._dead: dict[bytes, None] = {}
        self._dead_bytes = 0
        # The serials of keys that have a block of their own.
        self._long: dict[bytes, int] = {}
        # The block that the sweep looks at next, and how many entries it is behind.
        self._hand = 0
        self._debt = 0
        self._block_bytes = 0
        if held:
            self.extend(list(held), len(held))

    @property
    def next_serial(self) -> int:
        """That of the next key."""
        return self._tail_first + len(self._tail)

    @property
    def entries(self) -> int:
        """Living and dead ones."""
        return len(self._held) + len(self._dead)

    @property
    def bytes_held(self) -> int:
        """What this takes in memory beside the keys of `held`, in a few steps."""
        size = self._block_bytes + _PLACE_BYTES * len(self._tail)
        size += _DEAD_KEY_BYTES * len(self._dead) + self._dead_bytes
        if self._long:
            size += table_bytes(self._long) + INTEGER_OBJECT * len(self._long)
        return size

    def remains(self) -> tuple[list[Block], dict[bytes, Any], dict[bytes, Any]]:
        """What of this may be so large that it is to be freed in slices."""
        return self._blocks, self._dead, self._long

    def add(self, key: bytes) -> None:
        """The key has come."""
        if self._dead and key in self._dead:
            del self._dead[key]
            self._dead_bytes -= len(key)
            return
        if len(key) > _LONG_KEY:
            self._close()
            self._long[key] = self._tail_first
            self._tail.append(key)
            self._close()
            return
        tail = self._tail
        tail.append(key)
        if len(tail) >= BLOCK_KEYS:
            self._close()

    def extend(self, keys: Sequence[bytes], new: int) -> None:
        """Of these keys so many have come, which are the last of `held` by now."""
        if new < len(keys):
            keys = list(islice(reversed(self._held), new))[::-1]
        elif not self._dead and len(self._tail) + new < BLOCK_KEYS and len(b"".join(keys)) <= _LONG_KEY:
            # The loop below, for what is asked most often.
            self._tail += keys
            return
        start = 0
        while start < new:
            tail, dead = self._tail, self._dead
            chunk = keys[start : start + BLOCK_KEYS - len(tail)]
            start += len(chunk)
            # (To join keys is quicker than to look at the length of each.)
            if (dead and not dead.keys().isdisjoint(chunk)) or len(b"".join(chunk)) > _LONG_KEY:
                for key in chunk:
                    self.add(key)
                continue
            tail += chunk
            if len(tail) >= BLOCK_KEYS:
                self._close()

    def remove(self, key: bytes) -> None:
        """The key has gone."""
        living = len(self._held)
        if not living:
            self._forget()
            return
        if len(key) > _LONG_KEY:
            self._remove_block(bisect_left(self._firsts, self._long.pop(key)))
            return
        dead = self._dead
        dead[key] = None
        self._dead_bytes += len(key)
        if (
            len(dead) > _SPARE_DEAD + living // _LIVING_TO_A_DEAD
            or self._dead_bytes > _SPARE_BYTES + _DEAD_BYTES_TO_A_LIVING * living
        ):
            self._debt += _SWEPT_FOR_A_DEATH + len(key) // _BYTES_FOR_AN_ENTRY
            if self._debt >= BLOCK_KEYS:
                while self._debt > 0 and dead:
                    self._sweep()
                self._debt = 0

    def page(self, cursor: int, count: int, size: int = PAGE_BYTES) -> tuple[int, list[bytes]]:
        """The next keys of a scan, up to `count` (at least 1), and the cursor to go on with, 0 at the end.

        There are fewer where `count` is large, where many have gone, or where they take `size` bytes: a page
        takes a few milliseconds. The cursor 0 begins. The one to go on with is smaller than the one given, so
        that a scan ends whatever happens to `held`. A cursor greater than all serials begins, too; one that
        no scan can have got is at the end.
        """
        if cursor >= _CURSORS:
            return 0, []
        blocks, present = self._blocks, self._held.__contains__
        count = min(count, _PAGE_KEYS)
        left = count + _PASSED_OVER
        found: list[bytes] = []
        keys: Sequence[bytes] = self._tail
        serials: Sequence[int] = range(self._tail_first, self.next_serial)
        index = len(blocks)
        stop = len(keys)
        if 0 < cursor < self._tail_first:
            index = bisect_right(self._firsts, cursor) - 1
            if index < 0:
                return 0, []
            keys, serials = blocks[index]
        if cursor:
            stop = bisect_right(serials, cursor)
        while True:
            while not stop:
                if not index:
                    found.reverse()
                    return 0, found
                index -= 1
                keys, serials = blocks[index]
                stop = len(keys)
            if len(found) >= count or left <= 0 or size <= 0:
                found.reverse()
                return serials[stop - 1], found
            start = max(0, stop - _STEP)
            rest = reversed(keys[start:stop])
            more = list(islice(filter(present, rest), count - len(found)))
            found += more
            size -= sum(map(len, more))
            left -= stop - start
            stop = start + length_hint(rest)

    def freeze(self) -> tuple[list[Sequence[bytes]], dict[bytes, None]]:
        """All entries as they are now, for any thread: their keys in blocks, and those that are dead.

        This takes a step for 256 entries, and one for each dead one.
        """
        return [*(keys for keys, _ in self._blocks), tuple(self._tail)], self._dead.copy()

    def random(self) -> bytes:
        """Any key, each about as likely as any other; there must be one."""
        blocks, tail = self._blocks, self._tail
        pieces = len(blocks) + bool(tail)
        width = BLOCK_KEYS if pieces > 1 else len(blocks[0][0] if blocks else tail)
        for _ in range(_DRAWS):
            index, position = divmod(int(random.random() * pieces * width), width)  # noqa: S311
            keys = blocks[index][0] if index < len(blocks) else tail
            if position < len(keys) and keys[position] in self._held:
                return keys[position]
        # Most blocks are small, or most entries dead: the next that lives, from any block on.
        index = random.randrange(pieces)  # noqa: S311
        cursor = blocks[index][1][-1] if index < len(blocks) else 0
        while True:
            cursor, found = self.page(cursor, 1)
            if found:
                return found[0]

    def _close(self) -> None:
        """The tail becomes a block."""
        if self._tail:
            first, after = self._tail_first, self.next_serial
            self._firsts.append(first)
            block = tuple(self._tail), range(first, after)
            self._blocks.append(block)
            self._block_bytes += _block_bytes(block)
            self._tail = []
            self._tail_first = after

    def _forget(self) -> None:
        self._tail_first = self.next_serial
        self._blocks, self._firsts, self._tail = [], [], []
        self._dead, self._long = {}, {}
        self._dead_bytes = self._block_bytes = self._hand = self._debt = 0

    def _sweep(self) -> None:
        """Takes the dead entries out of one block, and joins it with the one before where both are small."""
        if self._hand >= len(self._blocks):
            self._close()
            self._hand = 0
        hand, dead = self._hand, self._dead
        keys, serials = block = self._blocks[hand]
        self._debt -= max(len(keys), BLOCK_KEYS // 16)
        gone = list(map(dead.__contains__, keys))
        if any(gone):
            for key in compress(keys, gone):
                del dead[key]
                self._dead_bytes -= len(key)
            lives = list(map(not_, gone))
            if not any(lives):
                self._remove_block(hand)
                return
            block = tuple(compress(keys, lives)), _as_serials(list(compress(serials, lives)))
            self._replace_block(hand, block)
        if hand and _may_join(self._blocks[hand - 1], block):
            keys, serials = self._blocks[hand - 1]
            self._replace_block(hand - 1, (keys + block[0], _as_serials([*serials, *block[1]])))
            self._remove_block(hand)
        else:
            self._hand = hand + 1

    def _replace_block(self, index: int, block: Block) -> None:
        self._block_bytes += _block_bytes(block) - _block_bytes(self._blocks[index])
        self._blocks[index] = block
        self._firsts[index] = block[1][0]

    def _remove_block(self, index: int) -> None:
        self._block_bytes -= _block_bytes(self._blocks[index])
        del self._blocks[index], self._firsts[index]
        if index < self._hand:
            self._hand -= 1


def _may_join(first: Block, second: Block) -> bool:
    return (
        len(first[0]) + len(second[0]) <= BLOCK_KEYS
        and len(first[0][0]) <= _LONG_KEY
        and len(second[0][0]) <= _LONG_KEY
    )


def _as_serials(serials: list[int]) -> Sequence[int]:
    """What takes the least memory."""
    first, after = serials[0], serials[-1] + 1
    return range(first, after) if after - first == len(serials) else array("Q", serials)


def _block_bytes(block: Block) -> int:
    keys, serials = block
    return _BLOCK_BYTES + len(keys) * (_PLACE_BYTES if isinstance(serials, range) else 2 * _PLACE_BYTES)
