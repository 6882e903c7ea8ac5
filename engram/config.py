"""The settings: defaults <- file <- command line <- CONFIG SET. One table, `Config`'s own fields."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from engram.errors import ConfigError
from engram.protocol.inline import split_inline

AppendFsync = Literal["always", "everysec", "no"]
MaxmemoryPolicy = Literal["noeviction", "volatile-ttl"]
LogLevel = Literal["debug", "verbose", "notice", "warning", "nothing"]
YesOrNo = Literal["yes", "no"]
TlsAuthClients = Literal["no", "yes", "optional"]

# Without digits it is 0, as in Redis.
_SIZE = re.compile(r"(\d{0,19})(b|k|kb|m|mb|g|gb)?", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}

# Policies of Redis that are not here.
_OTHER_POLICIES = frozenset(
    f"{keys}-{which}" for keys in ("allkeys", "volatile") for which in ("lru", "lfu", "random")
)

_NO_LIMIT = 1 << 50
# What is recovered together is one record of the log, whose length is a number of 32 bits. Beside the longest
# value there is some room for its key and the like.
_LARGEST_RECORD = 1 << 32
_LONGEST_VALUE = _LARGEST_RECORD - (1 << 20)
LONGEST_PASSWORD = 16_384
"""Bytes of a password; the longest argument that Redis takes of a client that is not authenticated."""
_LARGEST_INT = (1 << 31) - 1
_LARGEST_LONG = (1 << 63) - 1
# What a config file and the command line give as several words.
_OF_WORDS = ("bind", "client-output-buffer-limit")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"0|-?[1-9]\d{0,18}", text, re.ASCII) else None
        if number is None or not -(1 << 63) <= number < 1 << 63:
            raise ValueError("argument couldn't be parsed into an integer")
        if not low <= number <= high:
            raise ValueError(f"argument must be between {low} and {high} inclusive")
        return number

    return parse


def _size(low: int, high: int = 1 << 50) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError("argument must be a memory value")
        number = int(match[1] or 0) * _UNITS[(match[2] or "").lower()]
        if not low <= number <= high:
            raise ValueError(f"argument must be between {low} and {high} inclusive")
        return number

    return parse


def _output_limit(text: str) -> int:
    """A size, or Redis's `<class> <hard limit> <soft limit> <soft seconds>` once or more."""
    words = text.split()
    size = _size(1 << 16)
    if len(words) == 1:
        return size(text)
    if not words or len(words) % 4:
        raise ValueError("Wrong number of arguments in buffer limit configuration.")
    limit: int | None = None
    for name, hard, soft, seconds in zip(*(words[offset::4] for offset in range(4)), strict=True):
        if name.lower() not in ("normal", "replica", "slave", "pubsub"):
            raise ValueError("Invalid client class specified in buffer limit configuration.")
        if not (_SIZE.fullmatch(hard) and _SIZE.fullmatch(soft) and seconds.isdecimal()):
            raise ValueError("Error in hard, soft or soft_seconds setting in buffer limit configuration.")
        if name.lower() == "normal":
            limit = _NO_LIMIT if hard == "0" else size(hard)
    if limit is None:
        raise ValueError("only clients of the class 'normal' have a limit here")
    return limit


def _octal(text: str) -> str:
    if not re.fullmatch(r"[0-7]{1,19}", text, re.ASCII):
        raise ValueError("argument couldn't be parsed as an octal number")
    if int(text, 8) > 0o777:
        raise ValueError("argument must be between 0 and 777 inclusive")
    return format(int(text, 8), "o")


def _text(text: str) -> str:
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"argument(s) must be one of the following: {', '.join(words)}")
        return text.lower()

    return parse


def _yes_or_no(text: str) -> str:
    if text.lower() not in ("yes", "no"):
        raise ValueError("argument must be 'yes' or 'no'")
    return text.lower()


def _password(text: str) -> str:
    if len(text.encode("utf-8", "surrogateescape")) > LONGEST_PASSWORD:
        raise ValueError(f"argument must have no more than {LONGEST_PASSWORD} bytes")
    return text


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    if not words:
        raise ValueError("at least one address is needed")
    return words


def _policy(text: str) -> str:
    policy = text.lower()
    if policy in _OTHER_POLICIES:
        raise ValueError(f"{policy} is not supported here; use volatile-ttl or noeviction")
    return _one_of("volatile-ttl", "noeviction")(policy)


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
    """The settings of one server. Sizes are in bytes, times in seconds.

    Attributes:
        file: path of the file that settings were read from, which is no setting itself; empty: none.
        users: the words behind `user` of each such line in that file: a name, and rules of access.
    """

    bind: tuple[str, ...] = _setting(("127.0.0.1",), _words, "addresses to listen on")
    port: int = _setting(
        6380,
        _integer(0, 65535),
        "TCP port to listen on; 0: none, or a free one where neither tls-port nor unixsocket is set",
    )
    tls_port: int = _setting(0, _integer(0, 65535), "TCP port to listen on for TLS; 0: none")
    tls_cert_file: str = _setting(
        "", _text, "certificate of the server, and those between it and its root (PEM)", mutable=True
    )
    tls_key_file: str = _setting("", _text, "private key of that certificate (PEM)", mutable=True)
    tls_ca_cert_file: str = _setting("", _text, "certificates that sign those of clients (PEM)", mutable=True)
    tls_auth_clients: TlsAuthClients = _setting(
        "yes",
        _one_of("no", "yes", "optional"),
        "whether a TLS client must show a certificate: no, yes, or optional: if it does it must be good",
        mutable=True,
    )
    unixsocket: str = _setting("", _text, "path of a Unix socket to listen on; empty: none")
    unixsocketperm: str = _setting(
        "0", _octal, "mode of that socket's file, such as 770; 0: what the umask leaves"
    )
    timeout: int = _setting(
        0,
        _integer(0, _LARGEST_INT),
        "seconds without a request after which a client is dropped; 0: never",
        mutable=True,
    )
    tcp_keepalive: int = _setting(
        300,
        _integer(0, _LARGEST_INT),
        "seconds of silence after which the system asks a TCP client whether it is still there; 0: never",
        mutable=True,
    )
    protected_mode: YesOrNo = _setting(
        "yes",
        _yes_or_no,
        "whether TCP clients from elsewhere are refused while the default user has no password",
        mutable=True,
    )
    requirepass: str = _setting(
        "", _password, "password of the default user; empty: it needs none", mutable=True
    )
    aclfile: str = _setting("", _folder, "file that holds the users; empty: users.acl in `dir`")
    acllog_max_len: int = _setting(
        128, _integer(0, (1 << 63) - 1), "refusals that ACL LOG keeps", mutable=True
    )
    tcp_backlog: int = _setting(511, _integer(1, 65535), "connections that may wait to be accepted")
    maxclients: int = _setting(1024, _integer(1, 1_000_000), "clients served at once", mutable=True)
    dir: str = _setting("", _folder, "folder that holds the data; empty: nothing is kept")
    appendfsync: AppendFsync = _setting(
        "always",
        _one_of("everysec", "always", "no"),
        "when the log is synced: before a write is answered, once a second, or when the system likes",
        mutable=True,
    )
    save: str = _setting("", _empty, "always empty: snapshots follow the growth of the log", mutable=True)
    databases: int = _setting(16, _integer(1, 256), "numbered databases, of which a client selects one")
    log_file_size: int = _setting(64 << 20, _size(1 << 16, _LARGEST_RECORD), "size of one file of the log")
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
    proto_max_bulk_len: int = _setting(
        512 << 20, _size(1 << 20, _LONGEST_VALUE), "longest argument of a request"
    )
    client_query_buffer_limit: int = _setting(
        1 << 30, _size(1 << 20, _LARGEST_RECORD), "longest request of a client"
    )
    transaction_max_commands: int = _setting(
        1 << 18,
        _integer(1, _LARGEST_INT),
        "commands that may be queued for one EXEC",
        mutable=True,
    )
    client_output_buffer_limit: int = _setting(
        64 << 20,
        _output_limit,
        "replies that may wait for a client before its requests are left unread",
        mutable=True,
    )
    output_buffer_total_limit: int = _setting(
        1 << 30,
        _size(1 << 20),
        "replies that may wait for all clients before one of more than 64 KiB is refused",
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
    long_read_threads: int = _setting(
        0,
        _integer(0, 256),
        "threads for reads that take long, such as KEYS among many keys; 0: as many as search",
    )
    search_batch: int = _setting(64, _integer(1, 4096), "searches of one index that run together")
    slowlog_log_slower_than: int = _setting(
        10_000,
        _integer(-1, _LARGEST_LONG),
        "microseconds of a call from which on it is kept in SLOWLOG; -1: none is",
        mutable=True,
    )
    slowlog_max_len: int = _setting(128, _integer(0, _LARGEST_LONG), "calls that SLOWLOG keeps", mutable=True)
    search_queue_timeout: int = _setting(
        5000,
        _integer(0, _LARGEST_INT),
        "milliseconds that a search, or a long read, may wait for its turn before it is answered with BUSY;"
        " 0: for ever",
        mutable=True,
    )
    maxmemory: int = _setting(
        0, _size(0, (1 << 64) - 1), "bytes of memory that the data may take; 0: any number", mutable=True
    )
    maxmemory_policy: MaxmemoryPolicy = _setting(
        "noeviction",
        _policy,
        "what happens beyond maxmemory: writes are refused (noeviction), or strings that will lapse go first,"
        " the nearest of them before others (volatile-ttl)",
        mutable=True,
    )
    max_key_length: int = _setting(
        512 << 20,
        _size(1, 512 << 20),
        "longest key that a write may name, and longest member of an index",
        mutable=True,
    )
    vector_max_dimension: int = _setting(
        1 << 16, _integer(1, 1 << 16), "greatest dimension of a new index", mutable=True
    )
    vector_max_indices: int = _setting(
        100_000, _integer(0, 1 << 24), "indices that there may be before a new one is refused", mutable=True
    )
    vector_max_rows: int = _setting(
        1 << 16, _integer(1, 1 << 24), "vectors that one VMADD may add", mutable=True
    )
    vector_max_queries: int = _setting(
        1 << 14, _integer(1, 1 << 24), "queries that one VMSEARCH may have", mutable=True
    )
    vector_max_results: int = _setting(
        100_000, _integer(1, _LARGEST_INT), "members that a search may return for a query", mutable=True
    )
    vector_max_ef: int = _setting(1_000_000, _integer(1, 1_000_000), "greatest EF of a search", mutable=True)
    vector_max_filter_length: int = _setting(
        64 << 10, _size(1, 64 << 10), "longest expression of a FILTER", mutable=True
    )
    vector_max_filter_depth: int = _setting(
        256, _integer(1, 256), "values that an expression of a FILTER may have waiting at once", mutable=True
    )
    shutdown_timeout: int = _setting(
        10,
        _integer(0, 86400),
        "seconds clients have to take their last replies, at shutdown or after they stopped sending",
        mutable=True,
    )

    loglevel: LogLevel = _setting(
        "notice",
        _one_of("debug", "verbose", "notice", "warning", "nothing"),
        "how much is logged",
        mutable=True,
    )
    logfile: str = _setting("", _text, "file that the log lines are appended to; empty: standard error")
    metrics_port: int = _setting(
        0, _integer(0, 65535), "TCP port that answers Prometheus, at /metrics; 0: none"
    )
    metrics_bind: str = _setting("127.0.0.1", _text, "address of that port")
    file: str = ""
    users: list[tuple[str, ...]] = attrs.field(factory=list)

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
        if field.metadata
    )
}

USAGE = "usage: engram [config-file] [--setting value ...]; see engram --help"


def load_config(arguments: Sequence[str]) -> Config:
    """The settings that a command line asks for: `[config-file] [--name value ...]`.

    A config file holds lines `name value`, which may be quoted as in Redis, and those that begin with `#`.

    Raises:
        ConfigError: a setting is unknown or malformed, or the file cannot be read.
    """
    config = Config()
    rest = list(arguments)
    if rest and not rest[0].startswith("--"):
        path = Path(rest.pop(0))
        config.file = os.path.abspath(path)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read config file '{path}': {error.strerror}") from error
        for number, line in enumerate(text.split(b"\n"), 1):
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


def _apply_line(config: Config, line: bytes, where: str) -> None:
    try:
        words = split_line(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if words:
        _assign(config, words[0], words[1:], where)


def split_line(line: bytes) -> list[str]:
    """The words of a line of a config file; none of a comment. Bytes that are no UTF-8 become surrogates.

    Raises:
        ValueError: a quote is not closed.
    """
    if line.lstrip().startswith(b"#"):
        return []
    return [word.decode(errors="surrogateescape") for word in split_inline(line)]


def _assign(config: Config, name: str, values: list[str], where: str) -> None:
    name = name.lower()
    if name == "user" and values:
        config.users.append(tuple(values))
        return
    if name not in SETTINGS:
        raise ConfigError(f"{where}: unknown setting '{name}'")
    if not values or (len(values) > 1 and name not in _OF_WORDS):
        raise ConfigError(f"{where}: setting '{name}' takes {'a value' if not values else 'one value'}")
    try:
        config.set(name, " ".join(values))
    except ValueError as error:
        raise ConfigError(f"{where}: bad value '{' '.join(values)}' for setting '{name}': {error}") from error
