"""Reading the arguments of commands: numbers, options, cursors and expiry times, with Redis's errors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from engram.errors import CommandError

NOT_AN_INTEGER = "ERR value is not an integer or out of range"
NOT_A_FLOAT = "ERR value is not a valid float"
SYNTAX_ERROR = "ERR syntax error"

INTEGER_LOW, INTEGER_HIGH = -(1 << 63), (1 << 63) - 1

_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def integer(argument: bytes, message: str = NOT_AN_INTEGER) -> int:
    """A signed 64-bit integer, written as Redis writes it (no plus sign, no leading zeros).

    Raises CommandError with `message` for anything else.
    """
    digits = argument[1:] if argument.startswith(b"-") else argument
    if digits.isdigit() and len(digits) < 20 and (not digits.startswith(b"0") or argument == b"0"):
        number = int(argument)
        if INTEGER_LOW <= number <= INTEGER_HIGH:
            return number
    raise CommandError(message)


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
    """Where a scan goes on, an unsigned 64-bit integer. Raises CommandError for anything else."""
    if not argument.isdigit() or len(argument) > 20 or int(argument) >= 1 << 64:
        raise CommandError("ERR invalid cursor")
    return int(argument)


def scan_count(argument: bytes) -> int:
    """About how many items a scan returns at once. Raises CommandError for what is not positive."""
    count = integer(argument)
    if count < 1:
        raise CommandError(SYNTAX_ERROR)
    return count


def text(argument: bytes) -> str:
    """An argument as text; bytes that are not UTF-8 survive a round trip."""
    return argument.decode("utf-8", "surrogateescape")


def expiry(argument: bytes, unit: int, base: int, command: str) -> int:
    """When a key lapses, in milliseconds since the epoch.

    `unit` is 1000 for seconds and 1 for milliseconds; `base` the time it counts from (0 for a Unix
    time). Raises CommandError when it is no integer, not positive or overflows, in the words of SET.
    """
    number = integer(argument)
    at = number * unit + base
    if number <= 0 or at > INTEGER_HIGH:
        raise CommandError(f"ERR invalid expire time in '{command}' command")
    return at
