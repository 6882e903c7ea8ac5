"""Commands about the connection itself: handshake and identity."""

from __future__ import annotations

from engram import REDIS_VERSION
from engram.commands import client
from engram.commands.access import authenticate
from engram.commands.arguments import database_number, integer, text
from engram.commands.session import Session
from engram.commands.table import Command
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.replies import OK, PONG, RESP2, RESP3

_ENCODERS = {2: RESP2, 3: RESP3}
_NO_AUTHENTICATION = (
    "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH"
    " <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the"
    " same time"
)


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
    session.select(database_number(arguments[1], session.server.config))
    return OK


def _reset(session: Session, arguments: list[bytes]) -> bytes:
    session.reset()
    return replies.simple("RESET")


def _hello(session: Session, arguments: list[bytes]) -> bytes:
    encoder = session.encoder
    if len(arguments) > 1:
        version = integer(arguments[1], "ERR Protocol version is not an integer or out of range")
        if version not in _ENCODERS:
            raise CommandError("NOPROTO unsupported protocol version")
        encoder = _ENCODERS[version]
    name: str | None = None
    credentials: tuple[bytes, bytes] | None = None
    position = 2
    while position < len(arguments):
        option = arguments[position].upper()
        if option == b"AUTH" and position + 2 < len(arguments):
            credentials = arguments[position + 1], arguments[position + 2]
            position += 3
        elif option == b"SETNAME" and position + 1 < len(arguments):
            name = client.client_name(arguments[position + 1])
            position += 2
        else:
            raise CommandError(f"ERR Syntax error in HELLO option '{text(arguments[position])}'")
    if credentials is not None:
        authenticate(session, arguments, *credentials)
    if not session.logged_in:
        raise CommandError(_NO_AUTHENTICATION)
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


_FAST = ("noscript", "loading", "stale", "fast")
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
        "Changes the selected database.",
        _GROUP,
        ("loading", "stale", "fast"),
        foreseen=True,
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
    *client.COMMANDS,
)
