"""Reading the arguments of commands: numbers, words and expiry times, with Redis's errors."""

from __future__ import annotations

from engram.errors import CommandError

NOT_AN_INTEGER = "ERR value is not an integer or out of range"
SYNTAX_ERROR = "ERR syntax error"

INTEGER_LOW, INTEGER_HIGH = -(1 << 63), (1 << 63) - 1


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
