"""The settings: defaults <- file <- command line <- CONFIG SET. One table, `Config`'s own fields."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from engram.errors import ConfigError

AppendFsync = Literal["always", "everysec", "no"]

_SIZE = re.compile(r"(\d{1,19})(b|k|kb|m|mb|g|gb)?", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
            raise ValueError("argument couldn't be parsed into an integer")
        number = int(text)
        if not low <= number <= high:
            raise ValueError(f"argument must be between {low} and {high} inclusive")
        return number

    return parse


def _size(low: int, high: int = 1 << 50) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError("argument must be a memory value")
        number = int(match[1]) * _UNITS[(match[2] or "").lower()]
        if not low <= number <= high:
            raise ValueError(f"argument must be between {low} and {high} inclusive")
        return number

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"argument(s) must be one of the following: {', '.join(words)}")
        return text.lower()

    return parse


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    if not words:
        raise ValueError("at least one address is needed")
    return words


def _folder(text: str) -> str:
    return os.path.abspath(text) if text else ""


def _empty(text: str) -> str:
    if text:
        raise ValueError("engram snapshots by the growth of its log; only an empty value is known")
    return text


def _render(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _setting(
    default: Any, parse: Callable[[str], Any], summary: str, *, name: str | None = None, mutable: bool = False
) -> Any:
    return attrs.field(
        default=default, metadata={"name": name, "parse": parse, "summary": summary, "mutable": mutable}
    )


@attrs.frozen
class Setting:
    """One row of the table of settings."""

    name: str
    field: str
    parse: Callable[[str], Any]
    summary: str
    mutable: bool
    default: Any

    @property
    def default_text(self) -> str:
        return _render(self.default)


@attrs.define
class Config:
    """The settings of one server. Sizes are in bytes, times in seconds."""

    bind: tuple[str, ...] = _setting(("127.0.0.1",), _words, "addresses to listen on")
    port: int = _setting(6380, _integer(0, 65535), "TCP port to listen on; 0 picks a free one")
    tcp_backlog: int = _setting(511, _integer(1, 65535), "connections that may wait to be accepted")
    maxclients: int = _setting(1024, _integer(1, 1_000_000), "clients served at once", mutable=True)
    dir: str = _setting("", _folder, "folder that holds the data; empty: nothing is kept")
    appendfsync: AppendFsync = _setting(
        "always",
        _one_of("always", "everysec", "no"),
        "when the log is synced: before a write is answered, once a second, or when the system likes",
        mutable=True,
    )
    save: str = _setting("", _empty, "always empty: snapshots follow the growth of the log", mutable=True)
    databases: int = _setting(1, _integer(1, 1), "always 1")
    log_file_size: int = _setting(64 << 20, _size(1 << 16), "size of one file of the log")
    log_queue_size: int = _setting(
        64 << 20, _size(1 << 16), "bytes of writes that may wait for the log", mutable=True
    )
    snapshot_log_size: int = _setting(
        256 << 20,
        _size(1 << 16),
        "growth of the log, at least, that starts a snapshot by itself",
        mutable=True,
    )
    snapshot_log_percentage: int = _setting(
        100,
        _integer(0, 1_000_000),
        "growth of the log, in percent of the last snapshot, that starts the next; 0: none is made by itself",
        mutable=True,
    )
    proto_max_bulk_len: int = _setting(512 << 20, _size(1 << 20), "longest argument of a request")
    client_query_buffer_limit: int = _setting(1 << 30, _size(1 << 20), "longest request of a client")
    client_output_buffer_limit: int = _setting(
        64 << 20,
        _size(1 << 16),
        "replies that may wait for a client before its requests are left unread",
        mutable=True,
    )
    client_write_timeout: int = _setting(
        60, _integer(1, 86400), "seconds such a client has to take a reply before it is dropped", mutable=True
    )
    max_unindexed_rows: int = _setting(
        16_384,
        _integer(1, 1 << 40),
        "rows of an index without a graph, beyond which VADD is slowed",
        mutable=True,
    )
    seal_rows: int = _setting(
        8192, _integer(16, 1 << 24), "newest rows of an index that are scanned, not walked"
    )
    builds_at_once: int = _setting(
        1, _integer(1, 256), "graphs that are built at once, each in a process of low priority"
    )
    search_threads: int = _setting(0, _integer(0, 256), "threads that search; 0: half as many as cores")
    search_batch: int = _setting(64, _integer(1, 4096), "searches of one index that run together")
    shutdown_timeout: int = _setting(
        10, _integer(0, 86400), "seconds clients have to take their last replies at shutdown", mutable=True
    )

    def get(self, name: str) -> str:
        """The text of a setting's value."""
        return _render(getattr(self, SETTINGS[name].field))

    def set(self, name: str, text: str) -> None:
        """Changes a setting.

        Raises:
            ValueError: the text is not one of its values; says why in Redis's words.
            KeyError: there is no such setting.
        """
        setting = SETTINGS[name]
        setattr(self, setting.field, setting.parse(text))


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name=field.metadata["name"] or field.name.replace("_", "-"),
            field=field.name,
            parse=field.metadata["parse"],
            summary=field.metadata["summary"],
            mutable=field.metadata["mutable"],
            default=field.default,
        )
        for field in attrs.fields(Config)
    )
}

USAGE = "usage: engram [config-file] [--setting value ...]; see engram --help"


def load_config(arguments: Sequence[str]) -> Config:
    """The settings that a command line asks for: `[config-file] [--name value ...]`.

    A config file holds `name value` lines and `#` comments; a value may be quoted.

    Raises:
        ConfigError: a setting is unknown or malformed, or the file cannot be read.
    """
    config = Config()
    rest = list(arguments)
    if rest and not rest[0].startswith("--"):
        path = Path(rest.pop(0))
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"cannot read config file '{path}': {reason}") from error
        for number, line in enumerate(text.splitlines(), 1):
            _apply_line(config, line, f"{path}, line {number}")
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument '{word}'; {USAGE}")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else list(_values(rest))
        _assign(config, name, values, f"--{name}")
    return config


def _values(rest: list[str]) -> Iterable[str]:
    while rest and not rest[0].startswith("--"):
        yield rest.pop(0)


def _apply_line(config: Config, line: str, where: str) -> None:
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if words:
        _assign(config, words[0], words[1:], where)


def _assign(config: Config, name: str, values: list[str], where: str) -> None:
    name = name.lower()
    if name not in SETTINGS:
        raise ConfigError(f"{where}: unknown setting '{name}'")
    if not values or (len(values) > 1 and name != "bind"):
        raise ConfigError(f"{where}: setting '{name}' takes {'a value' if not values else 'one value'}")
    try:
        config.set(name, " ".join(values))
    except ValueError as error:
        raise ConfigError(f"{where}: bad value '{' '.join(values)}' for setting '{name}': {error}") from error
