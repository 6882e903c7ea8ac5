"""Strings and counters."""

from __future__ import annotations

from engram.commands.arguments import INTEGER_HIGH, INTEGER_LOW, SYNTAX_ERROR, expiry, integer
from engram.commands.session import Session
from engram.commands.table import Command
from engram.errors import CommandError
from engram.operations import AppendString, SetString
from engram.protocol import replies
from engram.protocol.replies import OK, ZERO, bulk


def _set(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    if len(arguments) == 3:
        database.commit(SetString(arguments[1], arguments[2]))
        return OK
    key, value = arguments[1], arguments[2]
    options = _SetOptions(arguments, database.now())
    existing = database.lookup(key)
    reply = OK
    if options.get:
        previous = database.string(key)
        reply = session.encoder.null if previous is None else replies.bulk(previous)
    if (options.only_new and existing is not None) or (options.only_existing and existing is None):
        return reply if options.get else session.encoder.null
    expires_at = options.expires_at
    if options.keep_expiry and existing is not None:
        expires_at = database.keyspace.expiries.get(key)
    database.commit(SetString(key, value, expires_at))
    return reply


class _SetOptions:
    """The options of SET: https://redis.io/docs/latest/commands/set/."""

    def __init__(self, arguments: list[bytes], now: int) -> None:
        self.only_new = self.only_existing = self.get = self.keep_expiry = False
        self.expires_at: int | None = None
        rest = iter(arguments[3:])
        timed = b""
        deferred: tuple[bytes, int, int] | None = None
        for word in rest:
            option = word.upper()
            if option == b"NX" and not self.only_existing:
                self.only_new = True
            elif option == b"XX" and not self.only_new:
                self.only_existing = True
            elif option == b"GET":
                self.get = True
            elif option == b"KEEPTTL" and not timed:
                self.keep_expiry = True
            elif (
                option in _EXPIRIES
                and timed in (b"", option)
                and not self.keep_expiry
                and (operand := next(rest, None)) is not None
            ):
                timed = option
                unit, absolute = _EXPIRIES[option]
                deferred = (operand, unit, 0 if absolute else now)
            else:
                raise CommandError(SYNTAX_ERROR)
        if deferred is not None:
            self.expires_at = expiry(*deferred, "set")


_EXPIRIES = {b"EX": (1000, False), b"PX": (1, False), b"EXAT": (1000, True), b"PXAT": (1, True)}


def _get(session: Session, arguments: list[bytes]) -> bytes:
    value = session.database.string(arguments[1])
    if value is None:
        return session.encoder.null
    return bulk(value)


def _append(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key, suffix = arguments[1], arguments[2]
    value = database.string(key)
    length = len(suffix) + (len(value) if value is not None else 0)
    if length > session.server.config.proto_max_bulk_len:
        raise CommandError("ERR string exceeds maximum allowed size (proto-max-bulk-len)")
    database.commit(SetString(key, suffix) if value is None else AppendString(key, suffix))
    return replies.integer(length)


def _strlen(session: Session, arguments: list[bytes]) -> bytes:
    value = session.database.string(arguments[1])
    return ZERO if value is None else replies.integer(len(value))


def _add(session: Session, key: bytes, increment: int) -> bytes:
    database = session.database
    value = database.string(key)
    number = (0 if value is None else integer(value)) + increment
    if not INTEGER_LOW <= number <= INTEGER_HIGH:
        raise CommandError("ERR increment or decrement would overflow")
    expires_at = None if value is None else database.keyspace.expiries.get(key)
    digits = str(number).encode()
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


_WRITE = ("write", "denyoom")
_KEY = (1, 1, 1)

COMMANDS = (
    Command(
        "set",
        _set,
        -3,
        "key value [NX | XX] [GET] [EX seconds | PX milliseconds | EXAT unix-time-seconds"
        " | PXAT unix-time-milliseconds | KEEPTTL]",
        "Sets the string value of a key, ignoring its type. The key is created if it doesn't exist.",
        "string",
        _WRITE,
        _KEY,
        key_flags=("RW", "access", "update", "variable_flags"),
    ),
    Command(
        "get", _get, 2, "key", "Returns the string value of a key.", "string", ("readonly", "fast"), _KEY
    ),
    Command(
        "append",
        _append,
        3,
        "key value",
        "Appends a string to the value of a key. Creates the key if it doesn't exist.",
        "string",
        (*_WRITE, "fast"),
        _KEY,
        key_flags=("RW", "insert"),
        since="2.0.0",
    ),
    Command(
        "strlen",
        _strlen,
        2,
        "key",
        "Returns the length of a string value.",
        "string",
        ("readonly", "fast"),
        _KEY,
        key_flags=("RO",),
        since="2.2.0",
    ),
    Command(
        "incr",
        _incr,
        2,
        "key",
        "Increments the integer value of a key by one. Uses 0 as initial value if the key doesn't exist.",
        "string",
        (*_WRITE, "fast"),
        _KEY,
    ),
    Command(
        "decr",
        _decr,
        2,
        "key",
        "Decrements the integer value of a key by one. Uses 0 as initial value if the key doesn't exist.",
        "string",
        (*_WRITE, "fast"),
        _KEY,
    ),
    Command(
        "incrby",
        _incrby,
        3,
        "key increment",
        "Increments the integer value of a key by a number. Uses 0 as initial value if the key doesn't"
        " exist.",
        "string",
        (*_WRITE, "fast"),
        _KEY,
    ),
    Command(
        "decrby",
        _decrby,
        3,
        "key decrement",
        "Decrements a number from the integer value of a key. Uses 0 as initial value if the key doesn't"
        " exist.",
        "string",
        (*_WRITE, "fast"),
        _KEY,
    ),
)
