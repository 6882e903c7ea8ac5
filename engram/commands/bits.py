"""Strings as arrays of bits, the most significant of a byte first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from engram.commands.arguments import SYNTAX_ERROR, clamp_range, integer
from engram.commands.long_work import read
from engram.commands.session import Session
from engram.commands.table import Command, Reply
from engram.errors import CommandError
from engram.large_string import BLOCK_SIZE, String, pieces
from engram.operations import SetRange
from engram.protocol import replies
from engram.protocol.replies import ONE, ZERO

_BAD_OFFSET = "ERR bit offset is not an integer or out of range"
_BAD_BIT = "ERR bit is not an integer or out of range"

# Up to so many bytes are counted as one number of Python.
_FEW_BYTES = 1 << 10

# Blocks of a string whose bits are counted until others have a turn: a millisecond or so.
_BLOCKS_A_TURN = 32


def _offset(session: Session, argument: bytes) -> int:
    offset = integer(argument, _BAD_OFFSET)
    if not 0 <= offset < 8 * session.server.config.proto_max_bulk_len:
        raise CommandError(_BAD_OFFSET)
    return offset


def _set_bit(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    place, bit = divmod(_offset(session, arguments[2]), 8)
    wanted = integer(arguments[3], _BAD_BIT)
    if wanted not in (0, 1):
        raise CommandError(_BAD_BIT)
    value = database.string(key) or b""
    byte = value[place] if place < len(value) else 0
    mask = 0x80 >> bit
    changed = byte | mask if wanted else byte & ~mask
    if changed != byte or place >= len(value):
        database.commit(SetRange(key, place, bytes((changed,)), database.number))
    return ONE if byte & mask else ZERO


def _get_bit(session: Session, arguments: list[bytes]) -> bytes:
    place, bit = divmod(_offset(session, arguments[2]), 8)
    value = session.read_string(arguments[1])
    if value is None or place >= len(value):
        return ZERO
    return ONE if value[place] & 0x80 >> bit else ZERO


def _count_bits(session: Session, arguments: list[bytes]) -> Reply:
    bounds = None
    by_bit = False
    if len(arguments) > 2:
        if len(arguments) not in (4, 5):
            raise CommandError(SYNTAX_ERROR)
        bounds = integer(arguments[2]), integer(arguments[3])
        unit = arguments[4].upper() if len(arguments) == 5 else b"BYTE"
        if unit not in (b"BYTE", b"BIT"):
            raise CommandError(SYNTAX_ERROR)
        by_bit = unit == b"BIT"
    value = session.read_string(arguments[1])
    if value is None:
        return ZERO
    start, stop = 0, 8 * len(value)
    if bounds is not None:
        start, stop = clamp_range(*bounds, 8 * len(value) if by_bit else len(value))
        if not by_bit:
            start, stop = 8 * start, 8 * stop
    counts = ones(value, start, stop)
    if stop - start <= 8 * BLOCK_SIZE * _BLOCKS_A_TURN:
        return replies.integer(sum(counts))

    # The value stays as it is, whatever becomes of its key.
    return read(session, lambda _: replies.integer(sum(counts)), "counting failed")


def ones(value: String, start: int, stop: int) -> Iterator[int]:
    """How many bits from `start` up to and without `stop`, both within the value, are set: the summands."""
    if start < stop:
        first, last = start // 8, (stop - 1) // 8
        # What is outside of the first byte and of the last one.
        yield -(value[first] >> 8 - start % 8).bit_count()
        yield -(value[last] & (1 << -stop % 8) - 1).bit_count()
        yield from map(_count_in_bytes, pieces(value, first, last + 1))


def _count_in_bytes(data: bytes | memoryview) -> int:
    if len(data) <= _FEW_BYTES:
        return int.from_bytes(data).bit_count()
    whole = len(data) & ~7
    words = np.frombuffer(data, np.uint64, count=whole // 8)
    count = int(np.bitwise_count(words).sum(dtype=np.int64))
    return count + int.from_bytes(data[whole:]).bit_count()


_bitmap = partial(Command, group="bitmap", keys=(1, 1, 1))

COMMANDS = (
    _bitmap(
        "setbit",
        _set_bit,
        4,
        "key offset value",
        "Sets or clears the bit at offset of the string value. Creates the key if it doesn't exist.",
        flags=("write", "denyoom"),
        since="2.2.0",
        complexity="O(1) for a short string; O(N/65536) for one of N bytes.",
    ),
    _bitmap(
        "getbit",
        _get_bit,
        3,
        "key offset",
        "Returns a bit value by offset.",
        flags=("readonly", "fast"),
        since="2.2.0",
    ),
    _bitmap(
        "bitcount",
        _count_bits,
        -2,
        "key [start end [BYTE | BIT]]",
        "Counts the number of set bits (population counting) in a string.",
        flags=("readonly",),
        since="2.6.0",
        complexity="O(N)",
    ),
)
