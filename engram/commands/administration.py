"""Commands about the server: its settings, its state, snapshots and shutdown."""

from __future__ import annotations

import time

from engram.commands.arguments import SYNTAX_ERROR, text
from engram.commands.information import render
from engram.commands.session import Server, Session, Slot, Statistics
from engram.commands.table import Command, container, help_command
from engram.config import SETTINGS
from engram.errors import CommandError
from engram.operations import Flush
from engram.protocol import replies
from engram.protocol.glob import compile_glob
from engram.protocol.replies import OK

NOT_PERSISTENT = "ERR persistence not enabled; start with a data dir"


def _dbsize(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(len(session.database.keyspace))


def _flush(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2 or (len(arguments) == 2 and arguments[1].upper() not in (b"SYNC", b"ASYNC")):
        raise CommandError(SYNTAX_ERROR)
    session.database.commit(Flush())
    return OK


def _time(session: Session, arguments: list[bytes]) -> bytes:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return replies.bulk_array((b"%d" % seconds, b"%d" % (nanoseconds // 1000)))


def _info(session: Session, arguments: list[bytes]) -> bytes:
    return session.encoder.verbatim(render(session.server, [text(word).lower() for word in arguments[1:]]))


def save(session: Session, arguments: list[bytes]) -> bytes | Slot:
    """SAVE and VSAVE: answers when the snapshot is on disk. Writers are not held up meanwhile."""
    storage = session.server.storage
    if storage is None:
        raise CommandError(NOT_PERSISTENT)
    slot = Slot()

    async def run() -> None:
        try:
            await storage.snapshot()
        except CommandError as error:
            session.server.statistics.error_replies += 1
            slot.fill(replies.error(str(error)))
        else:
            slot.fill(OK)

    session.server.start_soon(run)
    return slot


def _bgsave(session: Session, arguments: list[bytes]) -> bytes:
    storage = session.server.storage
    if len(arguments) > 2 or (len(arguments) == 2 and arguments[1].upper() != b"SCHEDULE"):
        raise CommandError(SYNTAX_ERROR)
    if storage is None:
        raise CommandError(NOT_PERSISTENT)
    if storage.status.snapshot_running:
        raise CommandError("ERR Background save already in progress")
    storage.request_snapshot()
    return replies.simple("Background saving started")


def _lastsave(session: Session, arguments: list[bytes]) -> bytes:
    storage = session.server.storage
    return replies.integer(int(session.server.started) if storage is None else storage.status.last_save_time)


def _shutdown(session: Session, arguments: list[bytes]) -> bytes:
    words = [word.upper() for word in arguments[1:]]
    if words == [b"ABORT"]:
        raise CommandError("ERR No shutdown in progress.")
    if {b"SAVE", b"NOSAVE"} <= set(words) or not {b"SAVE", b"NOSAVE", b"NOW", b"FORCE"}.issuperset(words):
        raise CommandError(SYNTAX_ERROR)
    session.leave()
    session.server.shut_down()
    return b""


def _config_get(session: Session, arguments: list[bytes]) -> bytes:
    config = session.server.config
    found: dict[str, str] = {}
    # Redis's own clients ask for this one; it follows from `dir` and is no setting here.
    derived = {"appendonly": "no" if session.server.storage is None else "yes"}
    for pattern in arguments[2:]:
        matches = compile_glob(pattern.lower())
        for name in (*SETTINGS, *derived):
            if matches(name.encode()):
                found[name] = derived[name] if name in derived else config.get(name)
    return session.encoder.map(
        (replies.bulk(name.encode()), replies.bulk(value.encode("utf-8", "surrogateescape")))
        for name, value in found.items()
    )


def _config_set(session: Session, arguments: list[bytes]) -> bytes:
    words = arguments[2:]
    if len(words) % 2:
        raise CommandError(SYNTAX_ERROR)
    server = session.server
    pairs = [(text(name).lower(), text(value)) for name, value in zip(words[::2], words[1::2], strict=True)]
    for name, _ in pairs:
        if name not in SETTINGS:
            raise CommandError(f"ERR Unknown option or number of arguments for CONFIG SET - '{name}'")
    failed = "ERR CONFIG SET failed (possibly related to argument '{}') - {}"
    names = [name for name, _ in pairs]
    for name in names:
        if not SETTINGS[name].mutable:
            raise CommandError(failed.format(name, "can't set immutable config"))
        if names.count(name) > 1:
            raise CommandError(failed.format(name, "duplicate parameter"))
    parsed = []
    for name, value in pairs:
        try:
            parsed.append((SETTINGS[name].field, SETTINGS[name].parse(value)))
        except ValueError as error:
            raise CommandError(failed.format(name, error)) from error
    for field, value in parsed:
        setattr(server.config, field, value)
    server.reconfigure()
    return OK


def _config_resetstat(session: Session, arguments: list[bytes]) -> bytes:
    _reset_statistics(session.server)
    return OK


def _reset_statistics(server: Server) -> None:
    server.statistics = Statistics()
    server.database.expired_keys = 0


_CONFIG_HELP = (
    "CONFIG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "GET <pattern>",
    "    Return parameters matching the glob-like <pattern> and their values.",
    "SET <directive> <value>",
    "    Set the configuration <directive> to <value>.",
    "RESETSTAT",
    "    Reset statistics reported by the INFO command.",
    "HELP",
    "    Print this help.",
)

_GROUP = "server"
_ADMIN = ("admin", "noscript", "loading", "stale")

COMMANDS = (
    Command(
        "dbsize",
        _dbsize,
        1,
        "",
        "Returns the number of keys in the database.",
        _GROUP,
        ("readonly", "fast"),
        more_categories=("@keyspace",),
    ),
    *(
        Command(
            name,
            _flush,
            -1,
            "[ASYNC | SYNC]",
            "Removes all keys. There is one database; what is large is freed afterwards.",
            _GROUP,
            ("write",),
            complexity="O(1), and O(N) in slices afterwards",
            more_categories=("@keyspace", "@dangerous"),
        )
        for name in ("flushdb", "flushall")
    ),
    Command(
        "time", _time, 1, "", "Returns the server time.", _GROUP, ("loading", "stale", "fast"), since="2.6.0"
    ),
    Command(
        "info",
        _info,
        -1,
        "[section [section ...]]",
        "Returns information and statistics about the server.",
        _GROUP,
        ("loading", "stale"),
        more_categories=("@dangerous",),
    ),
    Command(
        "save",
        save,
        1,
        "",
        "Writes a snapshot; answers when it is on disk. Other clients are served meanwhile.",
        _GROUP,
        ("admin", "noscript"),
        complexity="O(N), in a process of its own",
    ),
    Command(
        "bgsave",
        _bgsave,
        -1,
        "[SCHEDULE]",
        "Starts to write a snapshot.",
        _GROUP,
        ("admin", "noscript"),
        complexity="O(1)",
    ),
    Command(
        "lastsave",
        _lastsave,
        1,
        "",
        "Returns the Unix timestamp of the last successful snapshot.",
        _GROUP,
        ("loading", "stale", "fast"),
        more_categories=("@admin", "@dangerous"),
    ),
    Command(
        "shutdown",
        _shutdown,
        -1,
        "[NOSAVE | SAVE] [NOW] [FORCE] [ABORT]",
        "Shuts the server down. Every acknowledged write is in the log, so nothing needs saving.",
        _GROUP,
        ("admin", "noscript", "loading", "stale", "allow_busy"),
        complexity="O(1)",
    ),
    container(
        "config",
        (
            Command(
                "config|get",
                _config_get,
                -3,
                "pattern [pattern ...]",
                "Returns the effective values of settings.",
                _GROUP,
                _ADMIN,
                since="2.0.0",
                complexity="O(N) where N is the number of settings",
            ),
            Command(
                "config|set",
                _config_set,
                -4,
                "parameter value [parameter value ...]",
                "Changes settings in flight.",
                _GROUP,
                _ADMIN,
                since="2.0.0",
            ),
            Command(
                "config|resetstat",
                _config_resetstat,
                2,
                "",
                "Resets the server's statistics.",
                _GROUP,
                _ADMIN,
                since="2.0.0",
            ),
            help_command("config", _GROUP, _CONFIG_HELP),
        ),
        summary="A container for server configuration commands.",
        group=_GROUP,
        since="2.0.0",
    ),
)
