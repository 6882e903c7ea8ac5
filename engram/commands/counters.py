"""Strings that are numbers, counted up and down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from engram.commands import long_double
from engram.commands.arguments import NOT_A_FLOAT, integer, stored_integer
from engram.commands.session import Session
from engram.commands.table import Command
from engram.errors import CommandError
from engram.kinds.string import INTEGER_HIGH, INTEGER_LOW
from engram.large_string import LargeString
from engram.operations import SetString, SetStrings
from engram.protocol.replies import bulk

# By how much a counter goes up: always, or what says so of a request.
Increment = int | Callable[[list[bytes]], int]


def _add(increment: Increment, session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    change = increment if isinstance(increment, int) else increment(arguments)
    value = database.string(key)
    total = change if value is None else stored_integer(value) + change
    if not INTEGER_LOW <= total <= INTEGER_HIGH:
        raise CommandError("ERR increment or decrement would overflow")
    expires_at = database.keyspace.expiries.get(key)
    digits = b"%d" % total
    database.commit(SetString(key, digits, expires_at, database.number))
    return b":" + digits + b"\r\n"


def _add_run(increment: Increment, session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
    """Several additions are one change, to what the numbers are in the end.

    A key that lapses some day is left to `_add`: setting many strings at once makes them stay.
    """
    database = session.database
    values, expiries = database.keyspace.values, database.keyspace.expiries
    numbers: dict[bytes, int] = {}
    found: list[int] = []
    change, change_by = (increment, None) if isinstance(increment, int) else (0, increment)
    low, high = INTEGER_LOW, INTEGER_HIGH
    try:
        for request in requests:
            key = request[1]
            total = numbers.get(key)
            if total is None:
                if key in expiries:
                    break
                value = values.get(key)
                if value is None:
                    total = 0
                elif type(value) is bytes:
                    total = integer(value)
                else:
                    break
            total += change if change_by is None else change_by(request)
            if not low <= total <= high:
                break
            numbers[key] = total
            found.append(total)
    except CommandError:
        # The request will be refused when it is carried out by itself.
        pass
    # What can fail comes before the change.
    replies = (b":%d\r\n" * len(found)) % tuple(found)
    if found:
        database.commit(
            SetStrings(tuple(numbers), tuple([b"%d" % total for total in numbers.values()]), database.number)
        )
    return len(found), replies


def _given(arguments: list[bytes]) -> int:
    return integer(arguments[2])


def _minus_given(arguments: list[bytes]) -> int:
    decrement = integer(arguments[2])
    if decrement == INTEGER_LOW:
        raise CommandError("ERR decrement would overflow")
    return -decrement


def _incrbyfloat(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    value = database.string(key)
    if isinstance(value, LargeString):
        raise CommandError(NOT_A_FLOAT)
    try:
        total = long_double.add(
            long_double.parse(b"0" if value is None else value), long_double.parse(arguments[2])
        )
    except ValueError as error:
        raise CommandError(NOT_A_FLOAT) from error
    if total is None:
        raise CommandError("ERR increment would produce NaN or Infinity")
    digits = long_double.render(total)
    database.commit(SetString(key, digits, database.keyspace.expiries.get(key), database.number))
    return bulk(digits)


_command = partial(Command, group="string", flags=("write", "denyoom", "fast"), keys=(1, 1, 1))
_ABSENT = "Uses 0 as initial value if the key doesn't exist."


def _counter(name: str, increment: Increment, arity: int, usage: str, summary: str) -> Command:
    return _command(
        name, partial(_add, increment), arity, usage, f"{summary} {_ABSENT}", run=partial(_add_run, increment)
    )


COMMANDS = (
    _counter("incr", 1, 2, "key", "Increments the integer value of a key by one."),
    _counter("decr", -1, 2, "key", "Decrements the integer value of a key by one."),
    _counter("incrby", _given, 3, "key increment", "Increments the integer value of a key by a number."),
    _counter(
        "decrby", _minus_given, 3, "key decrement", "Decrements a number from the integer value of a key."
    ),
    _command(
        "incrbyfloat",
        _incrbyfloat,
        3,
        "key increment",
        f"Increment the floating point value of a key by a number. {_ABSENT}",
        since="2.6.0",
        logs_beyond=long_double.LONGEST_TEXT,
        varies=True,
    ),
)
