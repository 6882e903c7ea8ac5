"""Commands about the connection itself: handshake, identity and CLIENT."""

from __future__ import annotations

import time

from engram import REDIS_VERSION
from engram.commands.arguments import SYNTAX_ERROR, integer, text
from engram.commands.session import ReplyMode, Session
from engram.commands.table import Command, container, help_command
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.replies import OK, PONG, RESP2, RESP3

_ENCODERS = {2: RESP2, 3: RESP3}
_WRONG_PASSWORD = "WRONGPASS invalid username-password pair or user is disabled."  # noqa: S105


def _ping(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2:
        raise CommandError("ERR wrong number of arguments for 'ping' command")
    return PONG if len(arguments) == 1 else replies.bulk(arguments[1])


def _echo(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk(arguments[1])


def _quit(session: Session, arguments: list[bytes]) -> bytes:
    session.leave()
    return OK


def _select(session: Session, arguments: list[bytes]) -> bytes:
    if integer(arguments[1]) != 0:
        raise CommandError("ERR DB index is out of range")
    return OK


def _reset(session: Session, arguments: list[bytes]) -> bytes:
    session.reset()
    return replies.simple("RESET")


def _auth(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 3:
        raise CommandError(SYNTAX_ERROR)
    if len(arguments) == 2:
        raise CommandError(
            "ERR AUTH <password> called without any password configured for the default user."
            " Are you sure your configuration is correct?"
        )
    _authenticate(arguments[1])
    return OK


def _authenticate(user: bytes) -> None:
    # The default user has no password, so any will do, as in Redis.
    if user != b"default":
        raise CommandError(_WRONG_PASSWORD)


def _hello(session: Session, arguments: list[bytes]) -> bytes:
    encoder = session.encoder
    if len(arguments) > 1:
        version = integer(arguments[1], "ERR Protocol version is not an integer or out of range")
        if version not in _ENCODERS:
            raise CommandError("NOPROTO unsupported protocol version")
        encoder = _ENCODERS[version]
    name: str | None = None
    user: bytes | None = None
    position = 2
    while position < len(arguments):
        option = arguments[position].upper()
        if option == b"AUTH" and position + 2 < len(arguments):
            user = arguments[position + 1]
            position += 3
        elif option == b"SETNAME" and position + 1 < len(arguments):
            name = _client_name(arguments[position + 1])
            position += 2
        else:
            raise CommandError(f"ERR Syntax error in HELLO option '{text(arguments[position])}'")
    if user is not None:
        _authenticate(user)
    session.encoder = encoder
    if name is not None:
        session.name = name
    return encoder.map(
        (
            (replies.bulk(b"server"), replies.bulk(b"redis")),
            (replies.bulk(b"version"), replies.bulk(REDIS_VERSION.encode())),
            (replies.bulk(b"proto"), replies.integer(encoder.version)),
            (replies.bulk(b"id"), replies.integer(session.id)),
            (replies.bulk(b"mode"), replies.bulk(b"standalone")),
            (replies.bulk(b"role"), replies.bulk(b"master")),
            (replies.bulk(b"modules"), replies.EMPTY_ARRAY),
        )
    )


def _printable(argument: bytes, message: str) -> str:
    if any(not 33 <= byte <= 126 for byte in argument):
        raise CommandError(message)
    return argument.decode("ascii")


def _client_name(argument: bytes) -> str:
    return _printable(argument, "ERR Client names cannot contain spaces, newlines or special characters.")


def describe(session: Session) -> str:
    """A client's line in CLIENT LIST: https://redis.io/docs/latest/commands/client-list/."""
    now = time.monotonic()
    query_buffer, output_buffer = session.buffered()
    fields = {
        "id": session.id,
        "addr": session.address,
        "laddr": session.local_address,
        "fd": session.descriptor,
        "name": session.name,
        "age": int(now - session.created),
        "idle": int(now - session.last_active),
        "flags": "N",
        "db": 0,
        "sub": 0,
        "psub": 0,
        "ssub": 0,
        "multi": -1,
        "watch": 0,
        "qbuf": query_buffer,
        "qbuf-free": 0,
        "obl": 0,
        "oll": 0,
        "omem": output_buffer,
        "tot-mem": query_buffer + output_buffer,
        "events": "r",
        "cmd": session.last_command,
        "user": "default",
        "redir": -1,
        "resp": session.encoder.version,
        "lib-name": session.library_name,
        "lib-ver": session.library_version,
    }
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _client_id(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(session.id)


def _client_info(session: Session, arguments: list[bytes]) -> bytes:
    return session.encoder.verbatim(describe(session) + "\n")


def _client_list(session: Session, arguments: list[bytes]) -> bytes:
    sessions = list(session.server.sessions.values())
    if len(arguments) > 2:
        option = arguments[2].upper()
        if option == b"TYPE" and len(arguments) == 4:
            kind = arguments[3].lower()
            if kind not in (b"normal", b"master", b"replica", b"slave", b"pubsub"):
                raise CommandError(f"ERR Unknown client type '{text(arguments[3])}'")
            sessions = sessions if kind == b"normal" else []
        elif option == b"ID" and len(arguments) > 3:
            wanted = {integer(word, "ERR Invalid client ID") for word in arguments[3:]}
            sessions = [other for other in sessions if other.id in wanted]
        else:
            raise CommandError(SYNTAX_ERROR)
    return session.encoder.verbatim("".join(describe(other) + "\n" for other in sessions))


def _client_getname(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk(session.name.encode()) if session.name else session.encoder.null


def _client_setname(session: Session, arguments: list[bytes]) -> bytes:
    session.name = _client_name(arguments[2])
    return OK


def _client_setinfo(session: Session, arguments: list[bytes]) -> bytes:
    option = arguments[2].lower()
    if option not in (b"lib-name", b"lib-ver"):
        raise CommandError(f"ERR Unrecognized option '{text(arguments[2])}'")
    value = _printable(
        arguments[3],
        f"ERR {text(arguments[2])} cannot contain spaces, newlines or special characters.",
    )
    if option == b"lib-name":
        session.library_name = value
    else:
        session.library_version = value
    return OK


def _client_kill(session: Session, arguments: list[bytes]) -> bytes:
    sessions = list(session.server.sessions.values())
    if len(arguments) == 3:
        address = text(arguments[2])
        for other in sessions:
            if other.address == address:
                _kill(session, other)
                return OK
        raise CommandError("ERR No such client")
    victims = _kill_filter(session, sessions, arguments[2:])
    for other in victims:
        _kill(session, other)
    return replies.integer(len(victims))


def _kill_filter(session: Session, sessions: list[Session], words: list[bytes]) -> list[Session]:
    if len(words) % 2:
        raise CommandError(SYNTAX_ERROR)
    skip_self = True
    for option, operand in zip(words[::2], words[1::2], strict=True):
        value = text(operand)
        match option.upper():
            case b"ID":
                client_id = integer(operand, "ERR client-id should be greater than 0")
                if client_id < 1:
                    raise CommandError("ERR client-id should be greater than 0")
                sessions = [other for other in sessions if other.id == client_id]
            case b"ADDR":
                sessions = [other for other in sessions if other.address == value]
            case b"LADDR":
                sessions = [other for other in sessions if other.local_address == value]
            case b"USER":
                if value != "default":
                    raise CommandError(f"ERR No such user '{value}'")
            case b"TYPE":
                if value.lower() not in ("normal", "master", "replica", "slave", "pubsub"):
                    raise CommandError(f"ERR Unknown client type '{value}'")
                sessions = sessions if value.lower() == "normal" else []
            case b"MAXAGE":
                age = integer(operand, "ERR maxage is not an integer or out of range")
                if age < 1:
                    raise CommandError("ERR maxage should be greater than 0")
                now = time.monotonic()
                sessions = [other for other in sessions if now - other.created >= age]
            case b"SKIPME":
                if value.lower() not in ("yes", "no"):
                    raise CommandError(SYNTAX_ERROR)
                skip_self = value.lower() == "yes"
            case _:
                raise CommandError(SYNTAX_ERROR)
    return [other for other in sessions if not (skip_self and other is session)]


def _kill(session: Session, other: Session) -> None:
    if other is session:
        # The reply still goes out.
        session.leave()
    else:
        other.close()


def _client_reply(session: Session, arguments: list[bytes]) -> bytes:
    match arguments[2].upper():
        case b"ON":
            session.reply_mode = ReplyMode.ON
        case b"OFF":
            session.reply_mode = ReplyMode.OFF
        case b"SKIP":
            if session.reply_mode is not ReplyMode.OFF:
                session.reply_mode = ReplyMode.SKIP_NEXT
        case _:
            raise CommandError(SYNTAX_ERROR)
    return OK


_HELP = (
    "CLIENT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "GETNAME",
    "    Return the name of the current connection.",
    "ID",
    "    Return the ID of the current connection.",
    "INFO",
    "    Return information about the current client connection.",
    "KILL <ip:port>",
    "    Kill connection made from <ip:port>.",
    "KILL <option> <value> [<option> <value> [...]]",
    "    Kill connections. Options are: ADDR, LADDR, TYPE, USER, ID, MAXAGE, SKIPME.",
    "LIST [options ...]",
    "    Return information about client connections. Options: TYPE <type>, ID <id> [<id>...]",
    "REPLY (ON|OFF|SKIP)",
    "    Control the replies sent to the current connection.",
    "SETINFO <option> <value>",
    "    Set client meta attr. Options are: LIB-NAME, LIB-VER.",
    "SETNAME <name>",
    "    Assign the name <name> to the current connection.",
    "HELP",
    "    Print this help.",
)

_FAST = ("noscript", "loading", "stale", "fast")
_SLOW = ("noscript", "loading", "stale")
_GROUP = "connection"

COMMANDS = (
    Command("ping", _ping, -1, "[message]", "Returns the server's liveliness response.", _GROUP, ("fast",)),
    Command("echo", _echo, 2, "message", "Returns the given string.", _GROUP, ("loading", "stale", "fast")),
    Command("quit", _quit, -1, "", "Closes the connection.", _GROUP, (*_FAST, "no_auth", "allow_busy")),
    Command(
        "select",
        _select,
        2,
        "database",
        "Changes the selected database. There is one, number 0.",
        _GROUP,
        ("loading", "stale", "fast"),
    ),
    Command(
        "auth",
        _auth,
        -2,
        "[username] password",
        "Authenticates the connection.",
        _GROUP,
        (*_FAST, "no_auth", "allow_busy"),
    ),
    Command(
        "hello",
        _hello,
        -1,
        "[protover [AUTH username password] [SETNAME clientname]]",
        "Handshakes with the server: chooses RESP2 or RESP3.",
        _GROUP,
        (*_FAST, "no_auth", "allow_busy"),
        since="6.0.0",
    ),
    Command(
        "reset",
        _reset,
        1,
        "",
        "Resets the connection.",
        _GROUP,
        (*_FAST, "no_auth", "allow_busy"),
        since="6.2.0",
    ),
    container(
        "client",
        (
            Command(
                "client|id",
                _client_id,
                2,
                "",
                "Returns the unique client ID of the connection.",
                _GROUP,
                _SLOW,
                since="5.0.0",
            ),
            Command(
                "client|info",
                _client_info,
                2,
                "",
                "Returns information about the connection.",
                _GROUP,
                _SLOW,
                since="6.2.0",
            ),
            Command(
                "client|list",
                _client_list,
                -2,
                "[TYPE client-type] [ID client-id [client-id ...]]",
                "Lists open connections.",
                _GROUP,
                ("admin", *_SLOW),
                since="2.4.0",
                complexity="O(N) where N is the number of client connections",
            ),
            Command(
                "client|getname",
                _client_getname,
                2,
                "",
                "Returns the name of the connection.",
                _GROUP,
                _SLOW,
                since="2.6.9",
            ),
            Command(
                "client|setname",
                _client_setname,
                3,
                "connection-name",
                "Sets the connection name.",
                _GROUP,
                _SLOW,
                since="2.6.9",
            ),
            Command(
                "client|setinfo",
                _client_setinfo,
                4,
                "(LIB-NAME libname | LIB-VER libver)",
                "Sets information specific to the client or connection.",
                _GROUP,
                _SLOW,
                since="7.2.0",
            ),
            Command(
                "client|kill",
                _client_kill,
                -3,
                "(ip:port | [ID client-id] [TYPE client-type] [USER username] [ADDR ip:port] [LADDR ip:port]"
                " [SKIPME yes/no] [MAXAGE maxage])",
                "Terminates open connections.",
                _GROUP,
                ("admin", *_SLOW),
                since="2.4.0",
                complexity="O(N) where N is the number of client connections",
            ),
            Command(
                "client|reply",
                _client_reply,
                3,
                "(ON | OFF | SKIP)",
                "Instructs the server whether to reply to commands.",
                _GROUP,
                _SLOW,
                since="3.2.0",
            ),
            help_command("client", _GROUP, _HELP),
        ),
        summary="A container for client connection commands.",
        group=_GROUP,
        since="2.4.0",
    ),
)
