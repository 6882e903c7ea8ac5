"""Commands on keys of any kind: deletion, names, types, expiry and iteration."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence

from engram.commands.arguments import (
    NO_DATABASE,
    SYNTAX_ERROR,
    database_number,
    integer,
    scan_count,
    scan_cursor,
    scan_size,
    small_integer,
    text,
)
from engram.commands.key_lists import list_keys
from engram.commands.limits import check_reply
from engram.commands.long_work import ELEMENTS_A_TURN, in_turns
from engram.commands.session import Session
from engram.commands.table import Command, Reply
from engram.database import LogicalDatabase
from engram.errors import CommandError
from engram.kinds import KINDS
from engram.kinds.string import INTEGER_HIGH, INTEGER_LOW
from engram.operations import CopyKey, DeleteKeys, ExchangeDatabases, MoveKey, RenameKey, SetExpiry
from engram.protocol import replies
from engram.protocol.glob import compile_glob
from engram.protocol.replies import OK, ONE, ZERO

NO_KEY, NO_EXPIRY = -2, -1

_SAME_KEY = "ERR source and destination objects are the same"

# Draws of a random key that may have lapsed, before all keys are looked through; and where they are more than
# so many, which are not.
_DRAWS = 100
_MORE_DRAWS = 2048

# Keys of a page of SCAN that are looked at one by one, for their type or a pattern.
_EXAMINED = 4096


def _delete(session: Session, arguments: list[bytes]) -> Reply:
    if len(arguments) <= ELEMENTS_A_TURN:
        return replies.integer(_delete_keys(session.database, arguments[1:]))
    deleted = 0

    def turns() -> Iterator[None]:
        nonlocal deleted
        with session.database.as_one():
            for start in range(1, len(arguments), ELEMENTS_A_TURN):
                deleted += _delete_keys(session.database, arguments[start : start + ELEMENTS_A_TURN])
                yield

    return in_turns(session, turns(), lambda: replies.integer(deleted))


def _delete_keys(database: LogicalDatabase, keys: Sequence[bytes]) -> int:
    """Deletes those that are there; returns how many that are."""
    found = [key for key in dict.fromkeys(keys) if database.lookup(key) is not None]
    if found:
        database.commit(DeleteKeys(tuple(found), database.number))
    return len(found)


def _exists(session: Session, arguments: list[bytes]) -> Reply:
    if len(arguments) <= ELEMENTS_A_TURN:
        return replies.integer(_count_existing(session, arguments[1:]))
    existing = 0

    def turns() -> Iterator[None]:
        nonlocal existing
        for start in range(1, len(arguments), ELEMENTS_A_TURN):
            existing += _count_existing(session, arguments[start : start + ELEMENTS_A_TURN])
            yield

    return in_turns(session, turns(), lambda: replies.integer(existing))


def _count_existing(session: Session, keys: Sequence[bytes]) -> int:
    values = session.read_many(keys)
    return len(values) - values.count(None)


def _rename(session: Session, arguments: list[bytes]) -> bytes:
    _change_name(session, arguments[1], arguments[2])
    return OK


def _rename_new(session: Session, arguments: list[bytes]) -> bytes:
    return ONE if _change_name(session, arguments[1], arguments[2], only_new=True) else ZERO


def _change_name(session: Session, source: bytes, destination: bytes, *, only_new: bool = False) -> bool:
    database = session.database
    if database.lookup(source) is None:
        raise CommandError("ERR no such key")
    if source == destination or (only_new and database.lookup(destination) is not None):
        return False
    database.commit(RenameKey(source, destination, database.number))
    return True


def _copy(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    source, destination = arguments[1], arguments[2]
    replace, target = False, database
    rest = iter(arguments[3:])
    for word in rest:
        option = word.upper()
        number = next(rest, None) if option == b"DB" else None
        if number is not None:
            target = session.server.database.logical(database_number(number, session.server.config))
        elif option == b"REPLACE":
            replace = True
        else:
            raise CommandError(SYNTAX_ERROR)
    if source == destination and target is database:
        raise CommandError(_SAME_KEY)
    value = session.read(source)
    if value is None or (target.lookup(destination) is not None and not replace):
        return ZERO
    if KINDS.of(value).copy is None:
        raise CommandError("ERR not supported for this module key")
    database.commit(CopyKey(source, destination, database.number, target.number))
    return ONE


def _move(session: Session, arguments: list[bytes]) -> bytes:
    database, key = session.database, arguments[1]
    target = session.server.database.logical(database_number(arguments[2], session.server.config))
    if target is database:
        raise CommandError(_SAME_KEY)
    if database.lookup(key) is None or target.lookup(key) is not None:
        return ZERO
    database.commit(MoveKey(key, database.number, target.number))
    return ONE


def _swap_databases(session: Session, arguments: list[bytes]) -> bytes:
    numbers = []
    for argument, which in zip(arguments[1:], ("first", "second"), strict=True):
        try:
            numbers.append(small_integer(argument))
        except CommandError as error:
            raise CommandError(f"ERR invalid {which} DB index") from error
    first, second = numbers
    databases = session.server.config.databases
    if not (0 <= first < databases and 0 <= second < databases):
        raise CommandError(NO_DATABASE)
    if first != second:
        session.database.commit(ExchangeDatabases(first, second))
    return OK


def _random_key(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    keyspace = database.keyspace
    few = len(keyspace) <= _MORE_DRAWS
    for _ in range(_DRAWS if few else _MORE_DRAWS):
        key = keyspace.random_key()
        if key is None:
            return session.encoder.null
        # Those that have lapsed are not deleted here: any number may be drawn, and the log may be full.
        if database.live_keys((key,)):
            return replies.bulk(key)
    live = database.live_keys(keyspace.values) if few else ()
    return replies.bulk(secrets.choice(live)) if live else session.encoder.null


def type_name(value: object) -> str:
    """The answer of TYPE."""
    return "none" if value is None else KINDS.of(value).name


def _type(session: Session, arguments: list[bytes]) -> bytes:
    return replies.simple(type_name(session.read(arguments[1])))


def _expire_by(name: str, unit: int, *, absolute: bool) -> Callable[[Session, list[bytes]], bytes]:
    def handle(session: Session, arguments: list[bytes]) -> bytes:
        database = session.database
        key = arguments[1]
        options = _expire_options(arguments[3:])
        now = database.now()
        amount = integer(arguments[2])
        expires_at = amount * unit + (0 if absolute else now)
        if not INTEGER_LOW <= amount * unit <= INTEGER_HIGH or expires_at > INTEGER_HIGH:
            raise CommandError(f"ERR invalid expire time in '{name}' command")
        if database.lookup(key) is None:
            return ZERO
        current = database.keyspace.expiries.get(key)
        if not _expire_applies(options, current, expires_at):
            return ZERO
        if expires_at <= now:
            database.commit(DeleteKeys((key,), database.number))
        else:
            database.commit(SetExpiry(key, expires_at, database.number))
        return ONE

    return handle


def _expire_options(words: list[bytes]) -> set[bytes]:
    options: set[bytes] = set()
    for word in words:
        option = word.upper()
        if option not in (b"NX", b"XX", b"GT", b"LT"):
            raise CommandError(f"ERR Unsupported option {text(word)}")
        options.add(option)
    if b"NX" in options and len(options) > 1:
        raise CommandError("ERR NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= options:
        raise CommandError("ERR GT and LT options at the same time are not compatible")
    return options


def _expire_applies(options: set[bytes], current: int | None, expires_at: int) -> bool:
    """Whether EXPIRE's conditions hold; a key without expiry counts as lapsing after all others."""
    return not (
        (b"NX" in options and current is not None)
        or (b"XX" in options and current is None)
        or (b"GT" in options and (current is None or expires_at <= current))
        or (b"LT" in options and current is not None and expires_at >= current)
    )


def _remaining(unit: int, *, absolute: bool) -> Callable[[Session, list[bytes]], bytes]:
    def handle(session: Session, arguments: list[bytes]) -> bytes:
        database = session.database
        if session.read(arguments[1]) is None:
            return replies.integer(NO_KEY)
        expires_at = database.keyspace.expiries.get(arguments[1])
        if expires_at is None:
            return replies.integer(NO_EXPIRY)
        if absolute:
            return replies.integer((expires_at + unit // 2) // unit if unit > 1 else expires_at)
        remaining = max(0, expires_at - database.now())
        return replies.integer((remaining + unit // 2) // unit if unit > 1 else remaining)

    return handle


def _persist(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key = arguments[1]
    if database.lookup(key) is None or key not in database.keyspace.expiries:
        return ZERO
    database.commit(SetExpiry(key, None, database.number))
    return ONE


def _keys(session: Session, arguments: list[bytes]) -> Reply:
    matches = None if arguments[1] == b"*" else compile_glob(arguments[1])
    return list_keys(session, session.database.keys(), matches)


def _scan(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    cursor, count = scan_cursor(arguments[1]), 10
    pattern = kind = None
    words = iter(arguments[2:])
    for word in words:
        operand = next(words, None)
        if operand is None:
            raise CommandError(SYNTAX_ERROR)
        match word.upper():
            case b"COUNT":
                count = scan_count(operand)
            case b"MATCH":
                pattern = operand
            case b"TYPE":
                kind = text(operand).lower()
            case _:
                raise CommandError(SYNTAX_ERROR)
    keyspace = database.keyspace
    if kind is not None or (pattern is not None and pattern != b"*"):
        count = min(count, _EXAMINED)
    cursor, keys = keyspace.scan(cursor, count, scan_size(pattern))
    keys = database.live_keys(keys)
    if pattern is not None and pattern != b"*":
        keys = list(filter(compile_glob(pattern), keys))
    if kind is not None:
        keys = [key for key in keys if type_name(keyspace.values.get(key)) == kind]
    check_reply(session, sum(map(len, keys)))
    return replies.array((replies.bulk(b"%d" % cursor), replies.bulk_array(keys)))


_KEY = (1, 1, 1)
_ALL_KEYS = (1, -1, 1)
_BOTH_KEYS = (1, 2, 1)
_LOOKED_AT, _UPDATED, _REMOVED = ("RO",), ("RW", "update"), ("RM", "delete")
_CONDITIONS = "[NX | XX | GT | LT]"


def _expire_command(name: str, unit: int, *, absolute: bool, operand: str, since: str) -> Command:
    what = "a Unix timestamp" if absolute else "a number of"
    span = "milliseconds" if unit == 1 else "seconds"
    return Command(
        name,
        _expire_by(name, unit, absolute=absolute),
        -3,
        f"key {operand} {_CONDITIONS}",
        f"Sets the expiration time of a key to {what}{' in' if absolute else ''} {span}.",
        "generic",
        ("write", "fast"),
        _KEY,
        key_flags=_UPDATED,
        since=since,
    )


def _remaining_command(name: str, unit: int, *, absolute: bool, since: str) -> Command:
    what = "expiration time of a key as a Unix timestamp" if absolute else "time to live of a key"
    span = "milliseconds" if unit == 1 else "seconds"
    return Command(
        name,
        _remaining(unit, absolute=absolute),
        2,
        "key",
        f"Returns the {what} in {span}.",
        "generic",
        ("readonly", "fast"),
        _KEY,
        since=since,
    )


COMMANDS = (
    Command(
        "del",
        _delete,
        -2,
        "key [key ...]",
        "Deletes one or more keys.",
        "generic",
        ("write",),
        _ALL_KEYS,
        key_flags=_REMOVED,
        complexity="O(N) where N is the number of keys; a vector index is freed in slices afterwards.",
    ),
    Command(
        "unlink",
        _delete,
        -2,
        "key [key ...]",
        "Deletes one or more keys; large values are freed afterwards.",
        "generic",
        ("write", "fast"),
        _ALL_KEYS,
        key_flags=_REMOVED,
        since="4.0.0",
        complexity="O(N) where N is the number of keys.",
    ),
    Command(
        "exists",
        _exists,
        -2,
        "key [key ...]",
        "Determines whether one or more keys exist.",
        "generic",
        ("readonly", "fast"),
        _ALL_KEYS,
        key_flags=_LOOKED_AT,
        complexity="O(N) where N is the number of keys to check.",
    ),
    Command(
        "touch",
        _exists,
        -2,
        "key [key ...]",
        "Returns the number of existing keys out of those specified; engram keeps no times of access.",
        "generic",
        ("readonly", "fast"),
        _ALL_KEYS,
        key_flags=_LOOKED_AT,
        since="3.2.1",
        complexity="O(N) where N is the number of keys that will be touched.",
    ),
    Command(
        "rename",
        _rename,
        3,
        "key newkey",
        "Renames a key and overwrites the destination.",
        "generic",
        ("write",),
        _BOTH_KEYS,
        key_flags=("RW", "access", "delete"),
        last_key_flags=("OW", "update"),
    ),
    Command(
        "renamenx",
        _rename_new,
        3,
        "key newkey",
        "Renames a key only when the target key name doesn't exist.",
        "generic",
        ("write", "fast"),
        _BOTH_KEYS,
        key_flags=("RW", "access", "delete"),
        last_key_flags=("OW", "insert"),
    ),
    Command(
        "copy",
        _copy,
        -3,
        "source destination [DB destination-db] [REPLACE]",
        "Copies the value of a key to a new key, perhaps of another database. A vector index is not copied.",
        "generic",
        ("write", "denyoom"),
        _BOTH_KEYS,
        key_flags=("RO", "access"),
        last_key_flags=("OW", "update"),
        since="6.2.0",
    ),
    Command(
        "move",
        _move,
        3,
        "key db",
        "Moves a key to another database.",
        "generic",
        ("write", "fast"),
        _KEY,
    ),
    Command(
        "swapdb",
        _swap_databases,
        3,
        "index1 index2",
        "Swaps two Redis databases.",
        "server",
        ("write", "fast"),
        since="4.0.0",
        more_categories=("@keyspace", "@dangerous"),
    ),
    Command(
        "randomkey",
        _random_key,
        1,
        "",
        "Returns a random key name from the database.",
        "generic",
        ("readonly",),
        complexity="O(1).",
    ),
    Command(
        "type",
        _type,
        2,
        "key",
        "Determines the type of value stored at a key.",
        "generic",
        ("readonly", "fast"),
        _KEY,
        key_flags=_LOOKED_AT,
    ),
    _expire_command("expire", 1000, absolute=False, operand="seconds", since="1.0.0"),
    _expire_command("pexpire", 1, absolute=False, operand="milliseconds", since="2.6.0"),
    _expire_command("expireat", 1000, absolute=True, operand="unix-time-seconds", since="1.2.0"),
    _expire_command("pexpireat", 1, absolute=True, operand="unix-time-milliseconds", since="2.6.0"),
    _remaining_command("ttl", 1000, absolute=False, since="1.0.0"),
    _remaining_command("pttl", 1, absolute=False, since="2.6.0"),
    _remaining_command("expiretime", 1000, absolute=True, since="7.0.0"),
    _remaining_command("pexpiretime", 1, absolute=True, since="7.0.0"),
    Command(
        "persist",
        _persist,
        2,
        "key",
        "Removes the expiration time of a key.",
        "generic",
        ("write", "fast"),
        _KEY,
        key_flags=_UPDATED,
        since="2.2.0",
    ),
    Command(
        "keys",
        _keys,
        2,
        "pattern",
        "Returns all key names that match a pattern.",
        "generic",
        ("readonly",),
        complexity="O(N) where N is the number of keys in the database.",
        more_categories=("@dangerous",),
    ),
    Command(
        "scan",
        _scan,
        -2,
        "cursor [MATCH pattern] [COUNT count] [TYPE type]",
        "Iterates over the key names in the database, each call over older ones than the"
        " call before. One that is there throughout is returned, and the iteration ends, whatever others do.",
        "generic",
        ("readonly",),
        since="2.8.0",
        complexity="O(COUNT) for every call, of which some thousands are done at once; O(N) for a complete"
        " iteration.",
    ),
)
