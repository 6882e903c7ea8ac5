"""Strings as a whole and parts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import attrs
import xxhash

from engram.commands.allowance import SMALL_REPLY
from engram.commands.arguments import EXPIRY_OPTIONS, SYNTAX_ERROR, clamp_range, expiry, integer
from engram.commands.limits import check_reply
from engram.commands.long_work import ELEMENTS_A_TURN, in_turns
from engram.commands.session import Bytes, Pieces, Session
from engram.commands.table import Command, Reply, wrong_arity
from engram.database import LogicalDatabase
from engram.errors import CommandError
from engram.large_string import String, pieces
from engram.operations import AppendString, DeleteKeys, SetExpiry, SetRange, SetString, SetStrings
from engram.protocol import replies
from engram.protocol.replies import BULK_HEADERS, EMPTY_BULK, KNOWN_LENGTHS, OK, ONE, ZERO, bulk

# Values of a run of GETs are copied into replies together up to so many bytes.
_RUN_BYTES = 128 << 10

# Strings up to so many bytes are copied into replies; longer ones are sent as they are.
_COPIED_BYTES = 128 << 10

# Keys and values of an MSET that are looked at in one turn.
_WORDS_A_TURN = 2 * ELEMENTS_A_TURN

# A digest in hexadecimal digits.
_DIGEST_LENGTH = 16
_MATCHES = (b"IFEQ", b"IFNE", b"IFDEQ", b"IFDNE")

TOO_LONG = "ERR string exceeds maximum allowed size (proto-max-bulk-len)"


def _bulk(value: String) -> bytes | Pieces:
    """The reply that is a string as a key holds it."""
    if type(value) is bytes and len(value) <= _COPIED_BYTES:
        return bulk(value)
    return Pieces(_long_bulk(value))


def _long_bulk(value: String) -> tuple[Bytes, ...]:
    parts = (value,) if type(value) is bytes else pieces(value, 0, len(value))
    return b"$%d\r\n" % len(value), *parts, b"\r\n"


class _Array:
    """The reply that is an array of strings, in the making: null where there is none."""

    def __init__(self, count: int, null: bytes) -> None:
        self._null = null
        self._parts: list[Bytes] = [replies.array_header(count)]

    def add(self, values: Iterable[String | None]) -> None:
        """Takes the next strings. Those that are long are not copied."""
        short: list[bytes] = []
        for value in values:
            if value is None:
                short.append(self._null)
            elif type(value) is bytes and len(value) <= _COPIED_BYTES:
                short.append(bulk(value))
            else:
                self._parts += (b"".join(short), *_long_bulk(value))
                short.clear()
        self._parts.append(b"".join(short))

    def reply(self) -> Pieces:
        return Pieces(self._parts)


def _set(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    database = session.database
    if len(arguments) == 3:
        database.commit(SetString(arguments[1], arguments[2], None, database.number))
        return OK
    key, value = arguments[1], arguments[2]
    options = _set_options(arguments)
    expires_at = None
    if options.operand is not None:
        expires_at = expiry(options.lifetime, options.operand, database.now(), "set")
    reply: bytes | Pieces = OK
    if options.get:
        previous = session.read_string(key)
        check_reply(session, len(previous or b""))
        reply = session.encoder.null if previous is None else _bulk(previous)
    refused = reply if options.get else session.encoder.null
    if options.existence and (database.lookup(key) is None) is (options.existence == b"XX"):
        return refused
    if options.match and not _matches(options.match, options.wanted, database.string(key)):
        return refused
    if options.lifetime == b"KEEPTTL" and database.lookup(key) is not None:
        expires_at = database.keyspace.expiries.get(key)
    database.commit(SetString(key, value, expires_at, database.number))
    return reply


def _set_run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
    """Several SETs without options are one change, as an MSET is."""
    keys: list[bytes] = []
    values: list[bytes] = []
    for _, key, value in requests:
        keys.append(key)
        values.append(value)
    database = session.database
    database.commit(SetStrings(tuple(keys), tuple(values), database.number))
    return len(requests), OK * len(requests)


@attrs.define
class _SetOptions:
    """The options of SET: https://redis.io/docs/latest/commands/set/. Each is empty when it is not given.

    `existence` is NX or XX, `match` one of `_MATCHES` and `wanted` what follows it, `lifetime` the option
    that says how long the key lives and `operand` what follows that.
    """

    existence: bytes = b""
    match: bytes = b""
    wanted: bytes = b""
    get: bool = False
    lifetime: bytes = b""
    operand: bytes | None = None


def _set_options(arguments: list[bytes]) -> _SetOptions:
    found = _SetOptions()
    rest = iter(arguments[3:])

    def operand() -> bytes:
        word = next(rest, None)
        if word is None:
            raise CommandError(SYNTAX_ERROR)
        return word

    for word in rest:
        option = word.upper()
        if option in EXPIRY_OPTIONS and found.lifetime in (b"", option):
            found.lifetime, found.operand = option, operand()
        elif option in (b"NX", b"XX") and found.existence in (b"", option):
            found.existence = option
        # As in Redis, NX or XX may follow a match, and both must then hold, but not come before one.
        elif option in _MATCHES and found.match in (b"", option) and not found.existence:
            found.match, found.wanted = option, operand()
        elif option == b"GET":
            found.get = True
        elif option == b"KEEPTTL" and found.lifetime in (b"", option):
            found.lifetime = option
        else:
            raise CommandError(SYNTAX_ERROR)
    return found


def _matches(match: bytes, wanted: bytes, value: String | None) -> bool:
    """Whether a string, None for a key that is not there, is as one of `_MATCHES` demands.

    Raises CommandError when `wanted` should be a digest and has not its length.
    """
    if value is None:
        return match in (b"IFNE", b"IFDNE")
    if match in (b"IFEQ", b"IFNE"):
        return (value == wanted) is (match == b"IFEQ")
    if len(wanted) != _DIGEST_LENGTH:
        raise CommandError("ERR must be exactly 16 hexadecimal characters")
    return (_digest_of(value) == wanted.lower()) is (match == b"IFDEQ")


def _digest_of(value: String) -> bytes:
    digest = xxhash.xxh3_64()
    for piece in pieces(value, 0, len(value)):
        digest.update(piece)
    return digest.hexdigest().encode()


def _digest(session: Session, arguments: list[bytes]) -> bytes:
    value = session.read_string(arguments[1])
    return session.encoder.null if value is None else bulk(_digest_of(value))


def _delete_if(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) not in (2, 4):
        raise wrong_arity("delex")
    database = session.database
    key = arguments[1]
    value = database.lookup(key)
    if value is None:
        return ZERO
    if len(arguments) == 4:
        if not isinstance(value, String):
            raise CommandError("ERR Key should be of string type if conditions are specified")
        match = arguments[2].upper()
        if match not in _MATCHES:
            raise CommandError("ERR Invalid condition. Use IFEQ, IFNE, IFDEQ, or IFDNE")
        if not _matches(match, arguments[3], value):
            return ZERO
    database.commit(DeleteKeys((key,), database.number))
    return ONE


def _set_for(command: str, option: bytes, session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    expires_at = expiry(option, arguments[2], database.now(), command)
    database.commit(SetString(arguments[1], arguments[3], expires_at, database.number))
    return OK


def _set_new(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    if database.lookup(arguments[1]) is not None:
        return ZERO
    database.commit(SetString(arguments[1], arguments[2], None, database.number))
    return ONE


def _set_many(session: Session, arguments: list[bytes]) -> Reply:
    if not len(arguments) & 1:
        raise wrong_arity("mset")
    database = session.database
    if len(arguments) <= _WORDS_A_TURN:
        database.commit(SetStrings(tuple(arguments[1::2]), tuple(arguments[2::2]), database.number))
        return OK
    return in_turns(session, _set_in_turns(database, arguments), lambda: OK)


def _set_many_new(session: Session, arguments: list[bytes]) -> Reply:
    if not len(arguments) & 1:
        raise wrong_arity("msetnx")
    database = session.database
    if len(arguments) <= _WORDS_A_TURN:
        keys = tuple(arguments[1::2])
        if any(database.lookup(key) is not None for key in keys):
            return ZERO
        database.commit(SetStrings(keys, tuple(arguments[2::2]), database.number))
        return ONE
    free = True

    def turns() -> Iterator[None]:
        nonlocal free
        for start in range(1, len(arguments), _WORDS_A_TURN):
            keys = arguments[start : start + _WORDS_A_TURN : 2]
            if any(database.lookup(key) is not None for key in keys):
                free = False
                return
            yield
        yield from _set_in_turns(database, arguments)

    return in_turns(session, turns(), lambda: ONE if free else ZERO)


def _set_in_turns(database: LogicalDatabase, arguments: Sequence[bytes]) -> Iterator[None]:
    with database.as_one():
        for start in range(1, len(arguments), _WORDS_A_TURN):
            words = arguments[start : start + _WORDS_A_TURN]
            database.commit(SetStrings(tuple(words[::2]), tuple(words[1::2]), database.number))
            yield


def _get(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    value = session.database.string(arguments[1])
    if value is None:
        session.server.statistics.get_misses += 1
        return session.encoder.null
    if len(value) > SMALL_REPLY:
        check_reply(session, len(value))
        return _bulk(value)
    return bulk(value) if type(value) is bytes else _bulk(value)


def _get_run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
    parts: list[bytes] = []
    size = misses = 0
    done = len(requests)
    null = session.encoder.null
    keyspace = session.database.keyspace
    lookup = session.database.lookup if keyspace.expiries else keyspace.values.get
    for position, request in enumerate(requests):
        value = lookup(request[1])
        if value is None:
            misses += 1
            parts.append(null)
            continue
        if type(value) is not bytes or size > _RUN_BYTES or (length := len(value)) > _RUN_BYTES:
            done = position
            break
        size += length
        # As `replies.bulk` would put it together.
        parts += (BULK_HEADERS[length] if length < KNOWN_LENGTHS else b"$%d\r\n" % length, value, b"\r\n")
    session.server.statistics.get_misses += misses
    return done, b"".join(parts)


def _get_many(session: Session, arguments: list[bytes]) -> Reply:
    null = session.encoder.null
    array = _Array(len(arguments) - 1, null)
    size = 0

    def look(keys: Sequence[bytes]) -> list[String | None]:
        nonlocal size
        strings = [value if isinstance(value, String) else None for value in session.read_many(keys)]
        size += sum(len(value) for value in strings if value is not None)
        check_reply(session, size)
        return strings

    if len(arguments) <= ELEMENTS_A_TURN:
        strings = look(arguments[1:])
        if size <= SMALL_REPLY:
            # None of them is in blocks.
            return replies.array(bulk(value) if type(value) is bytes else null for value in strings)
        array.add(strings)
        return array.reply()

    def turns() -> Iterator[None]:
        for start in range(1, len(arguments), ELEMENTS_A_TURN):
            array.add(look(arguments[start : start + ELEMENTS_A_TURN]))
            yield

    return in_turns(session, turns(), array.reply)


def _get_and_set(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    database = session.database
    value = session.read_string(arguments[1])
    check_reply(session, len(value or b""))
    database.commit(SetString(arguments[1], arguments[2], None, database.number))
    return session.encoder.null if value is None else _bulk(value)


def _get_and_delete(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    database = session.database
    value = session.read_string(arguments[1])
    if value is None:
        return session.encoder.null
    check_reply(session, len(value))
    database.commit(DeleteKeys((arguments[1],), database.number))
    return _bulk(value)


def _get_and_expire(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    database = session.database
    key = arguments[1]
    lifetime, operand = _lifetime(arguments)
    value = session.read_string(key)
    if value is None:
        return session.encoder.null
    check_reply(session, len(value))
    if operand is not None:
        now = database.now()
        expires_at = expiry(lifetime, operand, now, "getex")
        database.commit(
            DeleteKeys((key,), database.number)
            if expires_at <= now
            else SetExpiry(key, expires_at, database.number)
        )
    elif lifetime and key in database.keyspace.expiries:
        database.commit(SetExpiry(key, None, database.number))
    return _bulk(value)


def _lifetime(arguments: list[bytes]) -> tuple[bytes, bytes | None]:
    """The option of GETEX, empty when there is none, and what follows it."""
    lifetime = b""
    operand: bytes | None = None
    rest = iter(arguments[2:])
    for word in rest:
        option = word.upper()
        if lifetime not in (b"", option):
            raise CommandError(SYNTAX_ERROR)
        lifetime = option
        if option in EXPIRY_OPTIONS:
            operand = next(rest, None)
            if operand is None:
                raise CommandError(SYNTAX_ERROR)
        elif option != b"PERSIST":
            raise CommandError(SYNTAX_ERROR)
    return lifetime, operand


def _append(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key, suffix = arguments[1], arguments[2]
    value = database.string(key)
    length = len(suffix) + (len(value) if value is not None else 0)
    if length > session.server.config.proto_max_bulk_len:
        raise CommandError(TOO_LONG)
    number = database.number
    if value is None:
        database.commit(SetString(key, suffix, None, number))
    else:
        database.commit(AppendString(key, suffix, number))
    return replies.integer(length)


def _strlen(session: Session, arguments: list[bytes]) -> bytes:
    value = session.read_string(arguments[1])
    return ZERO if value is None else replies.integer(len(value))


def _get_range(session: Session, arguments: list[bytes]) -> bytes | Pieces:
    start, end = integer(arguments[2]), integer(arguments[3])
    value = session.read_string(arguments[1])
    if value is None:
        return EMPTY_BULK
    start, stop = clamp_range(start, end, len(value))
    check_reply(session, stop - start)
    if stop - start <= _COPIED_BYTES:
        return bulk(value[start:stop])
    return Pieces((b"$%d\r\n" % (stop - start), *pieces(value, start, stop), b"\r\n"))


def _set_range(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key, data = arguments[1], arguments[3]
    offset = integer(arguments[2])
    if offset < 0:
        raise CommandError("ERR offset is out of range")
    value = database.string(key)
    length = 0 if value is None else len(value)
    if not data:
        return replies.integer(length)
    if offset + len(data) > session.server.config.proto_max_bulk_len:
        raise CommandError(TOO_LONG)
    database.commit(SetRange(key, offset, data, database.number))
    return replies.integer(max(length, offset + len(data)))


_WRITE = ("write", "denyoom")
_FAST_WRITE = (*_WRITE, "fast")
_FAST_READ = ("readonly", "fast")
_KEY = (1, 1, 1)
_PAIRS = (1, -1, 2)
_READS, _OVERWRITES, _INSERTS = ("RO",), ("OW", "update"), ("OW", "insert")
_SET_KEYS = "O(N) where N is the number of keys to set."
_RANGE = "O(N) where N is the length of the returned string."

_string = partial(Command, group="string")

COMMANDS = (
    _string(
        "set",
        _set,
        -3,
        "key value [NX | XX | IFEQ ifeq-value | IFNE ifne-value | IFDEQ ifdeq-digest | IFDNE ifdne-digest]"
        " [GET] [EX seconds | PX milliseconds | EXAT unix-time-seconds | PXAT unix-time-milliseconds"
        " | KEEPTTL]",
        "Sets the string value of a key, ignoring its type. The key is created if it doesn't exist.",
        flags=_WRITE,
        keys=_KEY,
        key_flags=("RW", "access", "update", "variable_flags"),
        run=_set_run,
    ),
    _string(
        "get",
        _get,
        2,
        "key",
        "Returns the string value of a key.",
        flags=_FAST_READ,
        keys=_KEY,
        run=_get_run,
    ),
    _string(
        "mget",
        _get_many,
        -2,
        "key [key ...]",
        "Atomically returns the string values of one or more keys.",
        flags=_FAST_READ,
        keys=(1, -1, 1),
        complexity="O(N) where N is the number of keys to retrieve.",
    ),
    _string(
        "mset",
        _set_many,
        -3,
        "key value [key value ...]",
        "Atomically creates or modifies the string values of one or more keys.",
        flags=_WRITE,
        keys=_PAIRS,
        key_flags=_OVERWRITES,
        since="1.0.1",
        complexity=_SET_KEYS,
    ),
    _string(
        "msetnx",
        _set_many_new,
        -3,
        "key value [key value ...]",
        "Atomically modifies the string values of one or more keys only when all keys don't exist.",
        flags=_WRITE,
        keys=_PAIRS,
        key_flags=_INSERTS,
        since="1.0.1",
        complexity=_SET_KEYS,
    ),
    _string(
        "setnx",
        _set_new,
        3,
        "key value",
        "Set the string value of a key only when the key doesn't exist.",
        flags=_FAST_WRITE,
        keys=_KEY,
        key_flags=_INSERTS,
    ),
    _string(
        "setex",
        partial(_set_for, "setex", b"EX"),
        4,
        "key seconds value",
        "Sets the string value and expiration time of a key. Creates the key if it doesn't exist.",
        flags=_WRITE,
        keys=_KEY,
        key_flags=_OVERWRITES,
        since="2.0.0",
    ),
    _string(
        "psetex",
        partial(_set_for, "psetex", b"PX"),
        4,
        "key milliseconds value",
        "Sets both string value and expiration time in milliseconds of a key. The key is created if it"
        " doesn't exist.",
        flags=_WRITE,
        keys=_KEY,
        key_flags=_OVERWRITES,
        since="2.6.0",
    ),
    _string(
        "getset",
        _get_and_set,
        3,
        "key value",
        "Returns the previous string value of a key after setting it to a new value.",
        flags=_FAST_WRITE,
        keys=_KEY,
    ),
    _string(
        "getdel",
        _get_and_delete,
        2,
        "key",
        "Returns the string value of a key after deleting the key.",
        flags=("write", "fast"),
        keys=_KEY,
        key_flags=("RW", "access", "delete"),
        since="6.2.0",
    ),
    _string(
        "delex",
        _delete_if,
        -2,
        "key [IFEQ ifeq-value | IFNE ifne-value | IFDEQ ifdeq-digest | IFDNE ifdne-digest]",
        "Conditionally removes the specified key based on value or digest comparison.",
        flags=("write", "fast"),
        keys=_KEY,
        key_flags=("RW", "delete", "variable_flags"),
        since="8.4.0",
        complexity="O(1) for IFEQ/IFNE, O(N) for IFDEQ/IFDNE where N is the length of the string value.",
    ),
    _string(
        "digest",
        _digest,
        2,
        "key",
        "Returns the XXH3 hash of a string value.",
        flags=_FAST_READ,
        keys=_KEY,
        key_flags=_READS,
        since="8.4.0",
        complexity="O(N) where N is the length of the string value.",
    ),
    _string(
        "getex",
        _get_and_expire,
        -2,
        "key [EX seconds | PX milliseconds | EXAT unix-time-seconds | PXAT unix-time-milliseconds | PERSIST]",
        "Returns the string value of a key after setting its expiration time.",
        flags=("write", "fast"),
        keys=_KEY,
        since="6.2.0",
    ),
    _string(
        "append",
        _append,
        3,
        "key value",
        "Appends a string to the value of a key. Creates the key if it doesn't exist.",
        flags=_FAST_WRITE,
        keys=_KEY,
        key_flags=("RW", "insert"),
        since="2.0.0",
        complexity="O(1) for a short string; O(N/65536) for one of N bytes.",
    ),
    _string(
        "strlen",
        _strlen,
        2,
        "key",
        "Returns the length of a string value.",
        flags=_FAST_READ,
        keys=_KEY,
        key_flags=_READS,
        since="2.2.0",
    ),
    _string(
        "getrange",
        _get_range,
        4,
        "key start end",
        "Returns a substring of the string stored at a key.",
        flags=("readonly",),
        keys=_KEY,
        since="2.4.0",
        complexity=_RANGE,
    ),
    _string(
        "substr",
        _get_range,
        4,
        "key start end",
        "Returns a substring from a string value.",
        flags=("readonly",),
        keys=_KEY,
        complexity=_RANGE,
    ),
    _string(
        "setrange",
        _set_range,
        4,
        "key offset value",
        "Overwrites a part of a string value with another by an offset. Creates the key if it doesn't exist.",
        flags=_WRITE,
        keys=_KEY,
        key_flags=("RW", "update"),
        since="2.2.0",
        complexity="O(1) for a short string; O(N/65536) for one of N bytes.",
    ),
)
