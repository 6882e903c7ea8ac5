"""CLIENT: who is connected, and what is done about it. https://redis.io/docs/latest/commands/client-list/"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import repeat

import attrs

from engram.commands.arguments import SYNTAX_ERROR, integer, text
from engram.commands.limits import check_reply
from engram.commands.long_work import ELEMENTS_A_TURN, beside_others, by_slices
from engram.commands.session import Session
from engram.commands.states import Event
from engram.commands.table import Command, Reply, container, help_command
from engram.commands.waiting import timeout
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, OK, ONE, ZERO

# About what a connected client takes without anything held for it: its task, parser and outbox.
_OVERHEAD = 12 << 10

# Clients that are described or ended in one turn: a millisecond or so.
_CLIENTS_A_TURN = 128

_TYPES = (b"normal", b"master", b"replica", b"slave", b"pubsub")


def printable(argument: bytes, message: str) -> str:
    """An argument without spaces or control characters; raises CommandError with `message` otherwise."""
    if any(not 33 <= byte <= 126 for byte in argument):
        raise CommandError(message)
    return argument.decode("ascii")


def client_name(argument: bytes) -> str:
    """A name that a client may give itself."""
    return printable(argument, "ERR Client names cannot contain spaces, newlines or special characters.")


def user_name(session: Session) -> str:
    """The user that a client is authenticated as, or the default one."""
    return text(session.user.name)


def _flags(session: Session) -> str:
    conditions = (
        ("O", session.monitoring),
        ("x", session.transaction is not None),
        ("b", session.blocked),
        ("d", session.watch.broken),
        ("c", session.closing),
        ("U", session.address.startswith("/")),
        ("e", session.no_evict),
        ("T", session.no_touch),
    )
    return "".join(letter for letter, holds in conditions if holds) or "N"


def describe(session: Session) -> str:
    """A client's line in CLIENT LIST."""
    now = time.monotonic()
    query_buffer, output_buffer = session.buffered()
    transaction = session.transaction
    queued = 0 if transaction is None else transaction.size
    fields = {
        "id": session.id,
        "addr": session.address,
        "laddr": session.local_address,
        "fd": session.descriptor,
        "name": session.name,
        "age": int(now - session.created),
        "idle": int(now - session.last_active),
        "flags": _flags(session),
        "db": session.database.number,
        "sub": 0,
        "psub": 0,
        "ssub": 0,
        "multi": -1 if transaction is None else len(transaction.commands),
        "watch": len(session.watch),
        "qbuf": query_buffer,
        "qbuf-free": 0,
        "argv-mem": 0,
        "multi-mem": queued,
        "rbs": 0,
        "rbp": 0,
        "obl": 0,
        "oll": int(output_buffer > 0),
        "omem": output_buffer,
        "tot-mem": _OVERHEAD + query_buffer + queued + output_buffer,
        "events": "rw" if output_buffer else "r",
        "cmd": session.last_command,
        "user": user_name(session),
        "redir": -1,
        "resp": session.encoder.version,
        "lib-name": session.library_name,
        "lib-ver": session.library_version,
        "io-thread": 0,
    }
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _id(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(session.id)


def _info(session: Session, arguments: list[bytes]) -> bytes:
    session.last_command = "client|info"
    return session.encoder.verbatim(describe(session) + "\n")


def _client_type(argument: bytes) -> bytes:
    kind = argument.lower()
    if kind not in _TYPES:
        raise CommandError(f"ERR Unknown client type '{text(argument)}'")
    return kind


def _list(session: Session, arguments: list[bytes]) -> Reply:
    session.last_command = "client|list"
    sessions = session.server.sessions
    if len(arguments) > 2:
        option = arguments[2].upper()
        if option == b"ID" and len(arguments) > 3:
            return _list_named(session, arguments[3:])
        if option != b"TYPE" or len(arguments) != 4:
            raise CommandError(SYNTAX_ERROR)
        if _client_type(arguments[3]) != b"normal":
            return session.encoder.verbatim("")
    lines: dict[int, str] = {}

    def answer() -> bytes:
        return session.encoder.verbatim("".join(lines.values()))

    return beside_others(session, _describe_all(session, list(sessions), lines), answer)


def _list_named(session: Session, words: Sequence[bytes]) -> Reply:
    """CLIENT LIST ID: a line for each time that a client is named."""
    wanted: list[int] = []
    lines: dict[int, str] = {}

    def turns() -> Iterator[None]:
        yield from by_slices(words, ELEMENTS_A_TURN, read_ids)
        yield from _describe_all(session, list(dict.fromkeys(wanted)), lines)

    def read_ids(some: Sequence[bytes]) -> None:
        wanted.extend(integer(word, "ERR Invalid client ID") for word in some)

    def answer() -> bytes:
        check_reply(session, sum(map(len, map(lines.get, wanted, repeat("")))))
        return session.encoder.verbatim("".join(map(lines.get, wanted, repeat(""))))

    return beside_others(session, turns(), answer)


def _describe_all(session: Session, ids: Sequence[int], lines: dict[int, str]) -> Iterator[None]:
    """Finds the lines of some clients, by id, in turns: each as it is then, and none of one that has gone."""
    sessions = session.server.sessions

    def look(some: Sequence[int]) -> None:
        lines.update((number, describe(sessions[number]) + "\n") for number in some if number in sessions)

    return by_slices(ids, _CLIENTS_A_TURN, look)


def _getname(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk(session.name.encode()) if session.name else session.encoder.null


def _setname(session: Session, arguments: list[bytes]) -> bytes:
    session.name = client_name(arguments[2])
    return OK


def _setinfo(session: Session, arguments: list[bytes]) -> bytes:
    option = arguments[2].lower()
    if option not in (b"lib-name", b"lib-ver"):
        raise CommandError(f"ERR Unrecognized option '{text(arguments[2])}'")
    value = printable(
        arguments[3],
        f"ERR {text(arguments[2])} cannot contain spaces, newlines or special characters.",
    )
    if option == b"lib-name":
        session.library_name = value
    else:
        session.library_version = value
    return OK


@attrs.define
class _Filter:
    """Which clients CLIENT KILL means; None where anything goes. Given twice, the last one counts."""

    id: int | None = None
    address: str | None = None
    local_address: str | None = None
    type: bytes | None = None
    user: str | None = None
    age: int | None = None
    skip_self: bool = True

    def matches(self, session: Session, now: float) -> bool:
        return (
            self.id in (None, session.id)
            and self.address in (None, session.address)
            and self.local_address in (None, session.local_address)
            and self.type in (None, b"normal")
            and self.user in (None, user_name(session))
            and (self.age is None or now - session.created >= self.age)
        )


def _kill(session: Session, arguments: list[bytes]) -> Reply:
    sessions = session.server.sessions
    if len(arguments) == 3:
        address = text(arguments[2])
        for other in sessions.values():
            if other.address == address:
                _end(session, other)
                return OK
        raise CommandError("ERR No such client")
    wanted = _read_filter(session, arguments[2:])
    now = time.monotonic()
    ended: list[int] = []

    def end_matching(ids: Sequence[int]) -> None:
        for number in ids:
            other = sessions.get(number)
            if other is None or (wanted.skip_self and other is session) or not wanted.matches(other, now):
                continue
            _end(session, other)
            ended.append(number)

    ids = list(sessions) if wanted.id is None else [wanted.id]
    turns = by_slices(ids, _CLIENTS_A_TURN, end_matching)
    return beside_others(session, turns, lambda: replies.integer(len(ended)))


def _read_filter(session: Session, words: Sequence[bytes]) -> _Filter:
    wanted = _Filter()
    for option, operand in zip(words[::2], (*words[1::2], None), strict=False):
        if operand is None:
            raise CommandError(SYNTAX_ERROR)
        match option.upper():
            case b"ID":
                wanted.id = _positive(operand, "client-id should be greater than 0")
            case b"ADDR":
                wanted.address = text(operand)
            case b"LADDR":
                wanted.local_address = text(operand)
            case b"USER":
                if not _is_user(session, operand):
                    raise CommandError(f"ERR No such user '{text(operand)}'")
                wanted.user = text(operand)
            case b"TYPE":
                wanted.type = _client_type(operand)
            case b"MAXAGE":
                integer(operand, "ERR maxage is not an integer or out of range")
                wanted.age = _positive(operand, "maxage should be greater than 0")
            case b"SKIPME":
                if operand.lower() not in (b"yes", b"no"):
                    raise CommandError(SYNTAX_ERROR)
                wanted.skip_self = operand.lower() == b"yes"
            case _:
                raise CommandError(SYNTAX_ERROR)
    return wanted


def _positive(argument: bytes, message: str) -> int:
    number = integer(argument, f"ERR {message}")
    if number < 1:
        raise CommandError(f"ERR {message}")
    return number


def _is_user(session: Session, name: bytes) -> bool:
    return name in session.server.access.users


def _end(session: Session, other: Session) -> None:
    if other is session:
        # The reply still goes out.
        session.leave()
    else:
        other.close()


def _reply(session: Session, arguments: list[bytes]) -> bytes:
    match arguments[2].upper():
        case b"ON":
            session.happen(Event.REPLY_ON)
        case b"OFF":
            session.happen(Event.REPLY_OFF)
        case b"SKIP":
            session.happen(Event.REPLY_SKIP)
        case _:
            raise CommandError(SYNTAX_ERROR)
    return OK


def _pause(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 4:
        raise CommandError(
            f"ERR unknown subcommand or wrong number of arguments for '{text(arguments[1])}'."
            " Try CLIENT HELP."
        )
    everything = True
    if len(arguments) == 4:
        if arguments[3].upper() not in (b"ALL", b"WRITE"):
            raise CommandError("ERR CLIENT PAUSE mode must be WRITE or ALL")
        everything = arguments[3].upper() == b"ALL"
    milliseconds = timeout(arguments[2], session.database.now())
    server = session.server
    if server.pause.start(milliseconds / 1000, everything=everything):
        server.start_soon(server.pause.run)
    return OK


def _unpause(session: Session, arguments: list[bytes]) -> bytes:
    session.server.pause.end()
    return OK


def _unblock(session: Session, arguments: list[bytes]) -> bytes:
    with_error = False
    if len(arguments) == 4:
        reason = arguments[3].lower()
        if reason not in (b"timeout", b"error"):
            raise CommandError("ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR")
        with_error = reason == b"error"
    if len(arguments) > 4:
        raise CommandError(
            f"ERR unknown subcommand or wrong number of arguments for '{text(arguments[1])}'."
            " Try CLIENT HELP."
        )
    other = session.server.sessions.get(integer(arguments[2]))
    if other is None or other.unblock is None:
        return ZERO
    other.unblock(with_error)
    return ONE


def _switch(argument: bytes) -> bool:
    if argument.lower() not in (b"on", b"off"):
        raise CommandError(SYNTAX_ERROR)
    return argument.lower() == b"on"


def _no_evict(session: Session, arguments: list[bytes]) -> bytes:
    session.no_evict = _switch(arguments[2])
    return OK


def _no_touch(session: Session, arguments: list[bytes]) -> bytes:
    session.no_touch = _switch(arguments[2])
    return OK


def _tracking(session: Session, arguments: list[bytes]) -> bytes:
    if _switch(arguments[2]):
        raise CommandError("ERR client-side caching is not supported: keys are not tracked")
    return OK


def _trackinginfo(session: Session, arguments: list[bytes]) -> bytes:
    encoder = session.encoder
    return encoder.map(
        (
            (replies.bulk(b"flags"), encoder.set((replies.bulk(b"off"),))),
            (replies.bulk(b"redirect"), replies.integer(-1)),
            (replies.bulk(b"prefixes"), EMPTY_ARRAY),
        )
    )


def _caching(session: Session, arguments: list[bytes]) -> bytes:
    raise CommandError(
        "ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode"
        " enabled"
    )


def _getredir(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(-1)


_HELP = (
    "CLIENT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "CACHING (YES|NO)",
    "    Enable/disable tracking of the keys for next command in OPTIN/OPTOUT modes.",
    "GETREDIR",
    "    Return the client ID we are redirecting to when tracking is enabled.",
    "GETNAME",
    "    Return the name of the current connection.",
    "ID",
    "    Return the ID of the current connection.",
    "INFO",
    "    Return information about the current client connection.",
    "KILL <ip:port>",
    "    Kill connection made from <ip:port>.",
    "KILL <option> <value> [<option> <value> [...]]",
    "    Kill connections. Options are:",
    "    * ADDR (<ip:port>|<unixsocket>:0)",
    "      Kill connections made from the specified address",
    "    * LADDR (<ip:port>|<unixsocket>:0)",
    "      Kill connections made to specified local address",
    "    * TYPE (NORMAL|MASTER|REPLICA|PUBSUB)",
    "      Kill connections by type.",
    "    * USER <username>",
    "      Kill connections authenticated by <username>.",
    "    * SKIPME (YES|NO)",
    "      Skip killing current connection (default: yes).",
    "    * ID <client-id>",
    "      Kill connections by client id.",
    "    * MAXAGE <maxage>",
    "      Kill connections older than the specified age.",
    "LIST [options ...]",
    "    Return information about client connections. Options:",
    "    * TYPE (NORMAL|MASTER|REPLICA|PUBSUB)",
    "      Return clients of specified type.",
    "UNPAUSE",
    "    Stop the current client pause, resuming traffic.",
    "PAUSE <timeout> [WRITE|ALL]",
    "    Suspend all, or just write, clients for <timeout> milliseconds.",
    "REPLY (ON|OFF|SKIP)",
    "    Control the replies sent to the current connection.",
    "SETNAME <name>",
    "    Assign the name <name> to the current connection.",
    "SETINFO <option> <value>",
    "    Set client meta attr. Options are:",
    "    * LIB-NAME: the client lib name.",
    "    * LIB-VER: the client lib version.",
    "UNBLOCK <clientid> [TIMEOUT|ERROR]",
    "    Unblock the specified blocked client.",
    "TRACKING (ON|OFF) [REDIRECT <id>] [BCAST] [PREFIX <prefix> [...]]",
    "         [OPTIN] [OPTOUT] [NOLOOP]",
    "    Control server assisted client side caching.",
    "TRACKINGINFO",
    "    Report tracking status for the current connection.",
    "NO-EVICT (ON|OFF)",
    "    Protect current client connection from eviction.",
    "NO-TOUCH (ON|OFF)",
    "    Will not touch LRU/LFU stats when this mode is on.",
    "HELP",
    "    Print this help.",
)

_FLAGS = ("noscript", "loading", "stale")
_ADMIN = ("admin", *_FLAGS)
_GROUP = "connection"
_PER_CLIENT = "O(N) where N is the number of client connections"

COMMANDS = (
    container(
        "client",
        (
            Command(
                "client|id",
                _id,
                2,
                "",
                "Returns the unique client ID of the connection.",
                _GROUP,
                _FLAGS,
                since="5.0.0",
            ),
            Command(
                "client|info",
                _info,
                2,
                "",
                "Returns information about the connection.",
                _GROUP,
                _FLAGS,
                since="6.2.0",
            ),
            Command(
                "client|list",
                _list,
                -2,
                "[TYPE client-type] [ID client-id [client-id ...]]",
                "Lists open connections.",
                _GROUP,
                _ADMIN,
                since="2.4.0",
                complexity=_PER_CLIENT,
            ),
            Command(
                "client|getname",
                _getname,
                2,
                "",
                "Returns the name of the connection.",
                _GROUP,
                _FLAGS,
                since="2.6.9",
            ),
            Command(
                "client|setname",
                _setname,
                3,
                "connection-name",
                "Sets the connection name.",
                _GROUP,
                _FLAGS,
                since="2.6.9",
            ),
            Command(
                "client|setinfo",
                _setinfo,
                4,
                "(LIB-NAME libname | LIB-VER libver)",
                "Sets information specific to the client or connection.",
                _GROUP,
                _FLAGS,
                since="7.2.0",
            ),
            Command(
                "client|kill",
                _kill,
                -3,
                "(ip:port | [ID client-id] [TYPE client-type] [USER username] [ADDR ip:port] [LADDR ip:port]"
                " [SKIPME yes/no] [MAXAGE maxage])",
                "Terminates open connections.",
                _GROUP,
                _ADMIN,
                since="2.4.0",
                complexity=_PER_CLIENT,
            ),
            Command(
                "client|pause",
                _pause,
                -3,
                "timeout [WRITE | ALL]",
                "Holds the commands of all clients, or those that write, for so many milliseconds.",
                _GROUP,
                _ADMIN,
                since="3.0.0",
            ),
            Command(
                "client|unpause",
                _unpause,
                2,
                "",
                "Lets commands go on after CLIENT PAUSE.",
                _GROUP,
                _ADMIN,
                since="6.2.0",
                complexity=_PER_CLIENT,
            ),
            Command(
                "client|unblock",
                _unblock,
                -3,
                "client-id [TIMEOUT | ERROR]",
                "Ends what another client is blocked in: WAIT or WAITAOF.",
                _GROUP,
                _ADMIN,
                since="5.0.0",
            ),
            Command(
                "client|no-evict",
                _no_evict,
                3,
                "(ON | OFF)",
                "Noted in CLIENT LIST. No client is dropped for the memory that all take together.",
                _GROUP,
                _ADMIN,
                since="7.0.0",
            ),
            Command(
                "client|no-touch",
                _no_touch,
                3,
                "(ON | OFF)",
                "Noted in CLIENT LIST. When a key was last used is not kept.",
                _GROUP,
                _FLAGS,
                since="7.2.0",
            ),
            Command(
                "client|reply",
                _reply,
                3,
                "(ON | OFF | SKIP)",
                "Instructs the server whether to reply to commands.",
                _GROUP,
                _FLAGS,
                since="3.2.0",
            ),
            Command(
                "client|tracking",
                _tracking,
                -3,
                "(ON | OFF)",
                "Client-side caching, which is refused.",
                _GROUP,
                _FLAGS,
                since="6.0.0",
            ),
            Command(
                "client|trackinginfo",
                _trackinginfo,
                2,
                "",
                "Returns that keys are not tracked for the connection.",
                _GROUP,
                _FLAGS,
                since="6.2.0",
            ),
            Command(
                "client|caching",
                _caching,
                3,
                "(YES | NO)",
                "An error, as keys are not tracked.",
                _GROUP,
                _FLAGS,
                since="6.0.0",
            ),
            Command(
                "client|getredir",
                _getredir,
                2,
                "",
                "Returns -1, as keys are not tracked.",
                _GROUP,
                _FLAGS,
                since="6.0.0",
            ),
            help_command("client", _GROUP, _HELP),
        ),
        summary="A container for client connection commands.",
        group=_GROUP,
        since="2.4.0",
    ),
)
