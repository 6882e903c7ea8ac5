"""Reading the arguments of commands: numbers, vectors, options, cursors, expiries; with Redis's errors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from engram.commands.wording import in_words
from engram.config import Config
from engram.errors import CommandError
from engram.index.errors import VectorError
from engram.index.vectors import Vector, check_sizes, decode_vector, join_vectors
from engram.kinds.string import INTEGER_HIGH, integer_in
from engram.large_string import String
from engram.scan_order import PAGE_BYTES

NOT_AN_INTEGER = "ERR value is not an integer or out of range"
NOT_A_FLOAT = "ERR value is not a valid float"
SYNTAX_ERROR = "ERR syntax error"
NO_DATABASE = "ERR DB index is out of range"

_ZERO = ord("0")
# With fewer characters than this it is in range.
_SAFE_DIGITS = len(str(INTEGER_HIGH))

_CURSOR = re.compile(rb"[ \t\n\v\f\r]*([+-]?)(\d+)")
_BAD_CURSOR = "ERR invalid cursor"
# Bytes of the keys of a page times those of the pattern they are matched with: some 20 ms at worst.
_MATCH_STEPS = 1 << 24
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def integer(argument: bytes, message: str = NOT_AN_INTEGER) -> int:
    """A signed 64-bit integer, written as Redis writes it (no plus sign, no leading zeros).

    Raises CommandError with `message` for anything else.
    """
    length = len(argument)
    if length < _SAFE_DIGITS and argument.isdigit() and (argument[0] != _ZERO or length == 1):
        return int(argument)
    number = integer_in(argument)
    if number is None:
        raise CommandError(message)
    return number


def stored_integer(value: String) -> int:
    """As `integer`, of what a key holds."""
    # One in blocks has far more digits than any number.
    return integer(value if type(value) is bytes else b"")


def read_vector(argument: bytes, dimension: int) -> Vector:
    """A vector, as `decode_vector` gives it. Raises CommandError for anything else."""
    try:
        return decode_vector(argument, dimension)
    except VectorError as error:
        raise in_words(error) from None


def read_vectors(arguments: Sequence[bytes], dimension: int) -> bytes:
    """Vectors, as `join_vectors` gives them. Raises CommandError when one of them is none."""
    try:
        return join_vectors(arguments, dimension)
    except VectorError as error:
        raise in_words(error) from None


def check_vector_sizes(arguments: Sequence[bytes], dimension: int) -> None:
    """Raises CommandError when one of several vectors has not so many numbers."""
    try:
        check_sizes(arguments, dimension)
    except VectorError as error:
        raise in_words(error) from None


def small_integer(argument: bytes) -> int:
    """A signed 32-bit integer. Raises CommandError for anything else."""
    value = integer(argument)
    if not -(1 << 31) <= value < 1 << 31:
        raise CommandError("ERR value is out of range, value must between -2147483648 and 2147483647")
    return value


def database_number(argument: bytes, config: Config) -> int:
    """The number of a database. Raises CommandError when there is none of that number."""
    number = small_integer(argument)
    if not 0 <= number < config.databases:
        raise CommandError(NO_DATABASE)
    return number


def number(argument: bytes, message: str = NOT_A_FLOAT) -> float:
    """A finite number in decimal digits, perhaps with an exponent.

    Raises CommandError with `message` for anything else.
    """
    if _NUMBER.fullmatch(argument) and math.isfinite(value := float(argument)):
        return value
    raise CommandError(message)


def options(
    words: Sequence[bytes], valued: Collection[bytes], flags: Collection[bytes] = ()
) -> dict[bytes, bytes]:
    """What is given of options that come in any order, each at most once, by upper-case name.

    Those in `valued` are followed by a value; those in `flags` stand alone, and have an empty one here.
    Raises CommandError, a syntax error, for anything else.
    """
    given: dict[bytes, bytes] = {}
    rest = iter(words)
    for word in rest:
        name = word.upper()
        value = next(rest, None) if name in valued else b"" if name in flags else None
        if value is None or name in given:
            raise CommandError(SYNTAX_ERROR)
        given[name] = value
    return given


def scan_cursor(argument: bytes) -> int:
    """Where a scan goes on, an unsigned 64-bit integer as C's `strtoull` reads it.

    Raises CommandError for anything else, and for a negative number in its usual form.
    """
    match = _CURSOR.fullmatch(argument)
    # (int reads no more than some thousands of digits, and would take long over more.)
    digits = match[2].lstrip(b"0") or b"0" if match else b""
    if match is None or len(digits) > 20 or (cursor := int(digits)) >= 1 << 64:
        raise CommandError(_BAD_CURSOR)
    if match[1] == b"-":
        if b"-%d" % cursor == argument and cursor <= 1 << 63 and cursor:
            raise CommandError(_BAD_CURSOR)
        return -cursor % (1 << 64)
    return cursor


def scan_count(argument: bytes) -> int:
    """About how many items a scan returns at once. Raises CommandError for what is not positive."""
    count = integer(argument)
    if count < 1:
        raise CommandError(SYNTAX_ERROR)
    return count


def scan_size(pattern: bytes | None) -> int:
    """The bytes of keys after which a page of a scan ends: fewer for a longer pattern, which takes longer."""
    return PAGE_BYTES if not pattern else min(PAGE_BYTES, max(1, _MATCH_STEPS // len(pattern)))


def text(argument: bytes) -> str:
    """An argument as text; bytes that are not UTF-8 survive a round trip."""
    return argument.decode("utf-8", "surrogateescape")


# The milliseconds of what they count, and whether it is a time since the epoch.
EXPIRY_OPTIONS = {b"EX": (1000, False), b"PX": (1, False), b"EXAT": (1000, True), b"PXAT": (1, True)}


def expiry(option: bytes, argument: bytes, now: int, command: str) -> int:
    """When a key lapses by one of `EXPIRY_OPTIONS`, in milliseconds since the epoch, as `now` is.

    Raises CommandError when the argument is no integer, not positive or overflows, in the words of SET.
    """
    unit, absolute = EXPIRY_OPTIONS[option]
    number = integer(argument)
    at = number * unit if absolute else number * unit + now
    if number <= 0 or at > INTEGER_HIGH:
        raise CommandError(f"ERR invalid expire time in '{command}' command")
    return at


def clamp_range(start: int, end: int, length: int) -> tuple[int, int]:
    """The part from `start` up to and including `end` of something, as (start, stop) of a slice.

    Negative positions count from the end, and what lies outside is left out:
    https://redis.io/docs/latest/commands/getrange/. Nothing is (0, 0).
    """
    if end < start < 0:
        return 0, 0
    if start < 0:
        start = max(0, start + length)
    if end < 0:
        end = max(0, end + length)
    stop = min(end + 1, length)
    return (start, stop) if start < stop else (0, 0)
