"""CONFIG: the settings while the server runs. https://redis.io/docs/latest/commands/config-get/"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import trio

from engram.commands.arguments import SYNTAX_ERROR, text
from engram.commands.long_work import beside_others, by_slices
from engram.commands.session import Barrier, Session
from engram.commands.table import Command, Reply, container, help_command
from engram.config import SETTINGS
from engram.config_file import rewrite
from engram.errors import CommandError, ConfigError
from engram.protocol import replies
from engram.protocol.glob import compile_glob
from engram.protocol.replies import OK

# Of more, others have turns between two patterns.
_PATTERN_BYTES = 512


def _get(session: Session, arguments: list[bytes]) -> Reply:
    patterns = list(dict.fromkeys(arguments[2:]))
    found: dict[str, str] = {}

    def find(some: Sequence[bytes]) -> None:
        for pattern in some:
            _find(session, pattern, found)

    few = sum(map(len, patterns)) <= _PATTERN_BYTES
    turns = by_slices(patterns, max(1, len(patterns)) if few else 1, find)
    return beside_others(session, turns, lambda: _shown(session, found))


def _find(session: Session, pattern: bytes, found: dict[str, str]) -> None:
    config = session.server.config
    # Redis's own clients ask for this one; it follows from `dir` and is no setting here.
    derived = {"appendonly": "no" if session.server.storage is None else "yes"}
    matches = compile_glob(pattern.lower())
    for name in (*SETTINGS, *derived):
        if matches(name.encode()):
            # One that is named in full comes back as it was written.
            shown = text(pattern) if pattern.lower() == name.encode() else name
            found[shown] = derived[name] if name in derived else config.get(name)


def _shown(session: Session, found: Mapping[str, str]) -> bytes:
    return session.encoder.map(
        (replies.bulk(name.encode()), replies.bulk(value.encode("utf-8", "surrogateescape")))
        for name, value in found.items()
    )


def _set(session: Session, arguments: list[bytes]) -> bytes:
    words = arguments[2:]
    if len(words) % 2:
        raise CommandError(SYNTAX_ERROR)
    server = session.server
    failed = "ERR CONFIG SET failed (possibly related to argument '{}') - {}"
    values: dict[str, str] = {}
    for word, value in zip(words[::2], words[1::2], strict=True):
        given = text(word)
        name = given.lower()
        if name not in SETTINGS:
            raise CommandError(f"ERR Unknown option or number of arguments for CONFIG SET - '{given}'")
        if not SETTINGS[name].mutable:
            raise CommandError(failed.format(given, "can't set immutable config"))
        if name in values:
            raise CommandError(failed.format(given, "duplicate parameter"))
        values[name] = text(value)
    parsed = []
    for name, value_text in values.items():
        try:
            parsed.append((SETTINGS[name].field, SETTINGS[name].parse(value_text)))
        except ValueError as error:
            raise CommandError(failed.format(name, error)) from error
    before = [(field, getattr(server.config, field)) for field, _ in parsed]
    for field, value in parsed:
        setattr(server.config, field, value)
    try:
        server.reconfigure()
    except ConfigError as error:
        for field, value in before:
            setattr(server.config, field, value)
        # Nothing else can fail.
        name = next(name for name in values if name.startswith("tls-"))
        raise CommandError(failed.format(name, error)) from error
    return OK


def _resetstat(session: Session, arguments: list[bytes]) -> bytes:
    server = session.server
    server.statistics.reset()
    server.database.expired_keys = 0
    server.memory.evicted_keys = 0
    return OK


def _rewrite(session: Session, arguments: list[bytes]) -> Barrier:
    server = session.server
    if not server.config.file:
        raise CommandError("ERR The server is running without a config file")

    async def run() -> bytes:
        try:
            async with server.files_lock:
                # As it is then, whatever is set while the file is written.
                await trio.to_thread.run_sync(rewrite, attrs.evolve(server.config))
        except OSError as error:
            raise CommandError(f"ERR Rewriting config file: {error.strerror}") from error
        except ValueError as error:
            raise CommandError(f"ERR Rewriting config file: {error}") from error
        return OK

    return Barrier(run)


_HELP = (
    "CONFIG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "GET <pattern>",
    "    Return parameters matching the glob-like <pattern> and their values.",
    "SET <directive> <value>",
    "    Set the configuration <directive> to <value>.",
    "RESETSTAT",
    "    Reset statistics reported by the INFO command.",
    "REWRITE",
    "    Rewrite the configuration file.",
    "HELP",
    "    Print this help.",
)

_GROUP = "server"
_FLAGS = ("admin", "noscript", "loading", "stale")

COMMANDS = (
    container(
        "config",
        (
            Command(
                "config|get",
                _get,
                -3,
                "pattern [pattern ...]",
                "Returns the effective values of settings.",
                _GROUP,
                _FLAGS,
                since="2.0.0",
                complexity="O(N) where N is the number of settings",
            ),
            Command(
                "config|set",
                _set,
                -4,
                "parameter value [parameter value ...]",
                "Changes settings in flight.",
                _GROUP,
                _FLAGS,
                since="2.0.0",
            ),
            Command(
                "config|resetstat",
                _resetstat,
                2,
                "",
                "Resets the server's statistics.",
                _GROUP,
                _FLAGS,
                since="2.0.0",
            ),
            Command(
                "config|rewrite",
                _rewrite,
                2,
                "",
                "Writes the effective values of settings to the config file.",
                _GROUP,
                _FLAGS,
                since="2.8.0",
            ),
            help_command("config", _GROUP, _HELP),
        ),
        summary="A container for server configuration commands.",
        group=_GROUP,
        since="2.0.0",
    ),
)
