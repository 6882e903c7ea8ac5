"""Strings that are too long to be copied for each change of a few bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, overload

BLOCK_SIZE: Final = 1 << 16
"""Bytes of a block. A change of a few bytes copies one, and the list of them: 8,192 for 512 MiB."""

LONGEST_PLAIN: Final = 1 << 18
"""Bytes up to which the result of a change is copied as a whole."""


class LargeString:
    """An immutable sequence of bytes in blocks, which it shares with those that were made from it.

    All blocks but the last have `BLOCK_SIZE` bytes. Those that nobody has changed are views of the bytes that
    it was made from at first, which stay in memory until the last of them is changed. Zeros that a change has
    put in between are one block, however many they are.
    """

    __slots__ = ("_blocks", "_length")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: bytes) -> None:
        view = memoryview(value)
        self._length = len(view)
        self._blocks: list[bytes | memoryview] = [
            view[start : start + BLOCK_SIZE] for start in range(0, len(view), BLOCK_SIZE)
        ]

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return b"".join(self._blocks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes | LargeString):
            return NotImplemented
        return len(self) == len(other) and bytes(self) == bytes(other)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> bytes: ...
    def __getitem__(self, place: int | slice) -> int | bytes:
        """As of bytes, but for steps and places that count from the end."""
        if isinstance(place, slice):
            return b"".join(self.pieces(*place.indices(self._length)[:2]))
        return self._blocks[place // BLOCK_SIZE][place % BLOCK_SIZE]

    def pieces(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """What is from `start` up to and without `stop`, in pieces of up to `BLOCK_SIZE` bytes."""
        stop = min(stop, self._length)
        while start < stop:
            number, offset = divmod(start, BLOCK_SIZE)
            block = self._blocks[number]
            end = min(len(block), offset + stop - start)
            yield block if end - offset == len(block) else memoryview(block)[offset:end]
            start += end - offset

    def with_range(self, offset: int, data: bytes) -> LargeString:
        """The string with these bytes at `offset`, and zeros up to it where it was shorter.

        It takes time in proportion to the data and to the number of blocks, not to their bytes.
        """
        blocks = self._blocks.copy()
        _extend(blocks, self._length, offset)
        end = offset + len(data)
        first, last = offset // BLOCK_SIZE, end // BLOCK_SIZE
        before = blocks[first][: offset % BLOCK_SIZE] if first < len(blocks) else b""
        after = blocks[last][end % BLOCK_SIZE :] if last < len(blocks) else b""
        changed = b"".join((before, data, after))
        blocks[first : last + 1] = (
            [changed]
            if 0 < len(changed) <= BLOCK_SIZE
            else [changed[start : start + BLOCK_SIZE] for start in range(0, len(changed), BLOCK_SIZE)]
        )
        made = LargeString(b"")
        made._blocks, made._length = blocks, max(self._length, end)
        return made


def _extend(blocks: list[bytes | memoryview], length: int, size: int) -> None:
    """Puts zeros behind blocks of `length` bytes, so that these become `size` at least."""
    missing = size - length
    zeros = bytes(min(BLOCK_SIZE, max(0, missing)))
    if missing > 0 and length % BLOCK_SIZE:
        filling = min(missing, BLOCK_SIZE - length % BLOCK_SIZE)
        blocks[-1] = b"".join((blocks[-1], zeros[:filling]))
        missing -= filling
    if missing > 0:
        blocks += [zeros] * (missing // BLOCK_SIZE)
        if missing % BLOCK_SIZE:
            blocks.append(zeros[: missing % BLOCK_SIZE])


String = bytes | LargeString
"""A string as a key holds it: one that is large, and was changed in part, is in blocks."""


def pieces(value: String, start: int, stop: int) -> Iterator[bytes | memoryview]:
    """What is from `start` up to and without `stop`, in pieces of up to `BLOCK_SIZE` bytes."""
    if isinstance(value, LargeString):
        yield from value.pieces(start, stop)
    else:
        view = memoryview(value)[start:stop]
        for start in range(0, len(view), BLOCK_SIZE):
            yield view[start : start + BLOCK_SIZE]


def with_range(value: String, offset: int, data: bytes) -> String:
    """The string with these bytes at `offset`, and zeros up to it where it was shorter."""
    if type(value) is bytes:
        length, end = len(value), offset + len(data)
        if length <= LONGEST_PLAIN and end <= LONGEST_PLAIN:
            if offset == length:
                return value + data
            return b"".join((value[:offset], bytes(max(0, offset - length)), data, value[end:]))
        value = LargeString(value)
    assert isinstance(value, LargeString)
    return value.with_range(offset, data)
