"""Strings that are numbers, counted up and down."""

from __future__ import annotations

from functools import partial

from engram.commands import long_double
from engram.commands.arguments import INTEGER_HIGH, INTEGER_LOW, NOT_A_FLOAT, integer
from engram.commands.session import Session
from engram.commands.table import Command
from engram.errors import CommandError
from engram.operations import SetString
from engram.protocol.replies import bulk


def _add(session: Session, key: bytes, increment: int) -> bytes:
    database = session.database
    value = database.string(key)
    if value is None:
        number, expires_at = increment, None
    else:
        number = integer(value) + increment
        if not INTEGER_LOW <= number <= INTEGER_HIGH:
            raise CommandError("ERR increment or decrement would overflow")
        expiries = database.keyspace.expiries
        expires_at = expiries.get(key) if expiries else None
    digits = b"%d" % number
    database.commit(SetString(key, digits, expires_at))
    return b":" + digits + b"\r\n"


def _incr(session: Session, arguments: list[bytes]) -> bytes:
    return _add(session, arguments[1], 1)


def _decr(session: Session, arguments: list[bytes]) -> bytes:
    return _add(session, arguments[1], -1)


def _incrby(session: Session, arguments: list[bytes]) -> bytes:
    return _add(session, arguments[1], integer(arguments[2]))


def _decrby(session: Session, arguments: list[bytes]) -> bytes:
    decrement = integer(arguments[2])
    if decrement == INTEGER_LOW:
        raise CommandError("ERR decrement would overflow")
    return _add(session, arguments[1], -decrement)


def _incrbyfloat(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    value = database.string(key)
    try:
        number = long_double.add(
            long_double.parse(b"0" if value is None else value), long_double.parse(arguments[2])
        )
    except ValueError as error:
        raise CommandError(NOT_A_FLOAT) from error
    if number is None:
        raise CommandError("ERR increment would produce NaN or Infinity")
    digits = long_double.render(number)
    database.commit(SetString(key, digits, database.keyspace.expiries.get(key)))
    return bulk(digits)


_counter = partial(Command, group="string", flags=("write", "denyoom", "fast"), keys=(1, 1, 1))
_ABSENT = "Uses 0 as initial value if the key doesn't exist."

COMMANDS = (
    _counter("incr", _incr, 2, "key", f"Increments the integer value of a key by one. {_ABSENT}"),
    _counter("decr", _decr, 2, "key", f"Decrements the integer value of a key by one. {_ABSENT}"),
    _counter(
        "incrby",
        _incrby,
        3,
        "key increment",
        f"Increments the integer value of a key by a number. {_ABSENT}",
    ),
    _counter(
        "decrby",
        _decrby,
        3,
        "key decrement",
        f"Decrements a number from the integer value of a key. {_ABSENT}",
    ),
    _counter(
        "incrbyfloat",
        _incrbyfloat,
        3,
        "key increment",
        f"Increment the floating point value of a key by a number. {_ABSENT}",
        since="2.6.0",
    ),
)
