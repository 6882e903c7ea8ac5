"""Commands about the server: its state, snapshots and shutdown."""

from __future__ import annotations

import time

from engram import REDIS_VERSION, __version__
from engram.commands import configuration, monitoring, topology, waiting
from engram.commands.arguments import SYNTAX_ERROR, integer, text
from engram.commands.information import render
from engram.commands.session import Session, Slot
from engram.commands.storage_errors import refusals_in_words, worded
from engram.commands.table import Command
from engram.errors import CommandError, SnapshotRunningError, StorageError
from engram.operations import Flush
from engram.protocol import replies
from engram.protocol.replies import OK

_NO_DEBUG = (
    'ERR DEBUG command not allowed. If the enable-debug-command option is set to "local", you can run it'
    " from a local connection, otherwise you need to set this option in the configuration file, and then"
    " restart the server."
)

# The nearest neighbours of a point.
_DRAWING = r"""
   .        o
       o   \  .
  o ------- * --- o
     .    / |
        o   o    .
"""

NOT_PERSISTENT = "ERR persistence not enabled; start with a data dir"


def _dbsize(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(len(session.database.keyspace))


def _flush_all(session: Session, arguments: list[bytes]) -> bytes:
    _flush(session, arguments, None)
    return OK


def _flush_database(session: Session, arguments: list[bytes]) -> bytes:
    _flush(session, arguments, session.database.number)
    return OK


def _flush(session: Session, arguments: list[bytes], database: int | None) -> None:
    if len(arguments) > 2 or (len(arguments) == 2 and arguments[1].upper() not in (b"SYNC", b"ASYNC")):
        raise CommandError(SYNTAX_ERROR)
    session.database.commit(Flush(database))


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
        except StorageError as error:
            slot.fill(session.server.error(str(worded(error))))
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
        raise worded(SnapshotRunningError())
    with refusals_in_words():
        storage.request_snapshot()
    return replies.simple("Background saving started")


def _bgrewriteaof(session: Session, arguments: list[bytes]) -> bytes:
    # The log begins anew behind each snapshot.
    storage = session.server.storage
    if storage is None:
        raise CommandError(NOT_PERSISTENT)
    if storage.status.snapshot_running:
        raise CommandError("ERR Background append only file rewriting already in progress")
    with refusals_in_words():
        storage.request_snapshot()
    return replies.simple("Background append only file rewriting started")


def _lastsave(session: Session, arguments: list[bytes]) -> bytes:
    storage = session.server.storage
    saved = 0 if storage is None else storage.status.last_save_time
    # Before the first snapshot it is when the server started, as in Redis.
    return replies.integer(saved or int(session.server.started))


def _debug(session: Session, arguments: list[bytes]) -> bytes:
    # What it offers in Redis holds all clients up, ends the server or shows addresses in memory.
    raise CommandError(_NO_DEBUG)


def _lolwut(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2 and arguments[1].upper() == b"VERSION":
        integer(arguments[2])
    return session.encoder.verbatim(f"{_DRAWING}\nengram {__version__}. Redis ver. {REDIS_VERSION}\n")


def _shutdown(session: Session, arguments: list[bytes]) -> bytes:
    words = [word.upper() for word in arguments[1:]]
    if words == [b"ABORT"]:
        raise CommandError("ERR No shutdown in progress.")
    if {b"SAVE", b"NOSAVE"} <= set(words) or not {b"SAVE", b"NOSAVE", b"NOW", b"FORCE"}.issuperset(words):
        raise CommandError(SYNTAX_ERROR)
    session.leave()
    session.server.shut_down()
    return b""


_GROUP = "server"

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
            handler,
            -1,
            "[ASYNC | SYNC]",
            f"Removes all keys from {which}. What is large is freed afterwards.",
            _GROUP,
            ("write",),
            complexity="O(1), and O(N) in slices afterwards",
            more_categories=("@keyspace", "@dangerous"),
        )
        for name, handler, which in (
            ("flushdb", _flush_database, "the current database"),
            ("flushall", _flush_all, "all databases"),
        )
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
        varies=True,
    ),
    Command(
        "save",
        save,
        1,
        "",
        "Writes a snapshot; answers when it is on disk. Other clients are served meanwhile.",
        _GROUP,
        ("admin", "no_multi", "noscript"),
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
        "bgrewriteaof",
        _bgrewriteaof,
        1,
        "",
        "Starts to write a snapshot, which the log then follows anew.",
        _GROUP,
        ("admin", "noscript", "no_async_loading"),
    ),
    Command(
        "debug",
        _debug,
        -2,
        "subcommand",
        "Refused, as Redis refuses it unless it is told not to.",
        _GROUP,
        ("admin", "noscript", "loading", "stale"),
    ),
    Command(
        "lolwut",
        _lolwut,
        -1,
        "[VERSION version]",
        "Draws a picture, and tells the version.",
        _GROUP,
        ("readonly", "fast"),
        since="5.0.0",
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
        ("admin", "no_multi", "noscript", "loading", "stale", "allow_busy"),
        complexity="O(1)",
    ),
    *configuration.COMMANDS,
    *monitoring.COMMANDS,
    *topology.COMMANDS,
    *waiting.COMMANDS,
)
