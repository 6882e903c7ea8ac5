"""What clients and tools ask about replicas, clusters and modules, of which this server has none."""

from __future__ import annotations

import attrs

from engram.commands.arguments import integer
from engram.commands.session import Session
from engram.commands.table import Command, container, help_command
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, OK

_NO_CLUSTER = "ERR This instance has cluster support disabled"
_REFUSED = "Refused: there is no cluster."
_BAD_PORT = "ERR Invalid master port"


def _role(session: Session, arguments: list[bytes]) -> bytes:
    return replies.array((replies.bulk(b"master"), replies.integer(0), EMPTY_ARRAY))


def _replicate(session: Session, arguments: list[bytes]) -> bytes:
    if [word.upper() for word in arguments[1:]] == [b"NO", b"ONE"]:
        return OK
    if not 0 <= integer(arguments[2], _BAD_PORT) <= 65535:
        raise CommandError(_BAD_PORT)
    raise CommandError("ERR replication is not supported")


def _no_cluster(session: Session, arguments: list[bytes]) -> bytes:
    raise CommandError(_NO_CLUSTER)


def _list_modules(session: Session, arguments: list[bytes]) -> bytes:
    return EMPTY_ARRAY


_MODULE_HELP = (
    "MODULE <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "LIST",
    "    Return a list of loaded modules.",
    "HELP",
    "    Print this help.",
)

COMMANDS = (
    Command(
        "role",
        _role,
        1,
        "",
        "Returns the replication role: a master without replicas.",
        "server",
        ("noscript", "loading", "stale", "fast"),
        since="2.8.12",
        more_categories=("@admin", "@dangerous"),
    ),
    *(
        Command(
            name,
            _replicate,
            3,
            "(host port | NO ONE)",
            "Leaves the server a master; there is no replication.",
            "server",
            ("admin", "noscript", "stale", "no_async_loading"),
            since=since,
        )
        for name, since in (("replicaof", "5.0.0"), ("slaveof", "1.0.0"))
    ),
    *(
        Command(
            name,
            _no_cluster,
            1,
            "",
            _REFUSED,
            "cluster",
            flags,
            since="3.0.0",
            group_categories=("@connection",),
        )
        for name, flags in (
            ("readonly", ("loading", "stale", "fast")),
            ("readwrite", ("loading", "stale", "fast")),
            ("asking", ("fast",)),
        )
    ),
    container(
        "cluster",
        (
            Command(
                f"cluster|{name}",
                _no_cluster,
                arity,
                usage,
                _REFUSED,
                "cluster",
                (*flags, "stale"),
                since=since,
            )
            for name, arity, usage, flags, since in (
                ("info", 2, "", (), "3.0.0"),
                ("nodes", 2, "", (), "3.0.0"),
                ("slots", 2, "", ("loading",), "3.0.0"),
                ("shards", 2, "", ("loading",), "7.0.0"),
                ("myid", 2, "", (), "3.0.0"),
                ("keyslot", 3, "key", (), "3.0.0"),
                ("help", 2, "", ("loading",), "5.0.0"),
            )
        ),
        summary="A container for Redis Cluster commands. There is no cluster: all are refused.",
        group="cluster",
        since="3.0.0",
    ),
    container(
        "module",
        (
            Command(
                "module|list",
                _list_modules,
                2,
                "",
                "Returns all loaded modules: none.",
                "server",
                ("admin", "noscript"),
                since="4.0.0",
            ),
            attrs.evolve(help_command("module", "server", _MODULE_HELP), since="5.0.0"),
        ),
        summary="A container for module commands.",
        group="server",
        since="4.0.0",
    ),
)
