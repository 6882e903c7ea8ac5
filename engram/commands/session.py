"""What a command sees: its client, the server around it, and a place for an answer that comes later."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Protocol

import attrs

from engram.config import Config
from engram.database import Database
from engram.departures import Departures
from engram.index.builder import Builder
from engram.index.service import SearchService
from engram.index.verification import Verification
from engram.protocol.replies import RESP2, Encoder


class Slot:
    """The place of a reply that is not known yet; whoever finds it calls `fill`, once.

    `size` is about how many bytes the reply will have, where that may be many. `lsn` is the state that it
    will show, None for that of the moment at which it was asked for. `awaited` is false once nobody waits
    for the reply: CLIENT REPLY silences it, or the client is gone. Any thread may look.
    """

    __slots__ = ("awaited", "lsn", "on_fill", "reply", "size")

    def __init__(self, size: int = 0, lsn: int | None = None) -> None:
        self.size = size
        self.lsn = lsn
        self.awaited = True
        self.reply: bytes | None = None
        self.on_fill: Callable[[], None] | None = None

    def fill(self, reply: bytes) -> None:
        """Gives the encoded reply and lets the connection know."""
        self.reply = reply
        if self.on_fill is not None:
            self.on_fill()


@attrs.frozen(eq=False)
class Barrier:
    """A reply that the client's next request waits for; other clients go on meanwhile.

    The connection awaits `reply`, which returns the encoded reply or raises CommandError. When the client is
    gone or the server shuts down, it is cancelled, and nobody is answered.
    """

    reply: Callable[[], Awaitable[bytes]]


class ReplyMode(Enum):
    """CLIENT REPLY: https://redis.io/docs/latest/commands/client-reply/."""

    ON = "on"
    OFF = "off"
    SKIP_NEXT = "skip next"
    SKIP = "skip"


class StorageStatus(Protocol):
    """What INFO shows of the persistence task. Times are in seconds, sizes in bytes."""

    @property
    def appended_lsn(self) -> int: ...
    @property
    def durable_lsn(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def batches(self) -> int: ...
    @property
    def last_fsync_seconds(self) -> float: ...
    @property
    def log_file(self) -> int: ...
    @property
    def log_bytes(self) -> int: ...
    @property
    def allocation_error(self) -> str: ...
    @property
    def snapshot_running(self) -> bool: ...
    @property
    def last_save_time(self) -> int: ...
    @property
    def last_save_ok(self) -> bool: ...
    @property
    def last_save_error(self) -> str: ...
    @property
    def last_save_seconds(self) -> float: ...
    @property
    def cleanup_error(self) -> str: ...
    @property
    def changes_since_save(self) -> int: ...


class Storage(Protocol):
    """What commands need of the persistence task."""

    @property
    def status(self) -> StorageStatus: ...

    async def snapshot(self) -> None: ...

    def request_snapshot(self) -> None: ...


@attrs.define
class Statistics:
    """Counters for INFO."""

    connections_received: int = 0
    connections_rejected: int = 0
    commands_processed: int = 0
    net_input_bytes: int = 0
    net_output_bytes: int = 0
    error_replies: int = 0


@attrs.define(eq=False)
class Server:
    """What all clients share. `storage` is None where nothing is kept on disk."""

    config: Config
    database: Database
    storage: Storage | None
    searches: SearchService
    builder: Builder
    verification: Verification
    run_id: str
    started: float
    port: int
    # Runs a task beside the clients, for a command whose answer comes later.
    start_soon: Callable[[Callable[[], Awaitable[None]]], None]
    shut_down: Callable[[], None]
    # Called after CONFIG SET has changed the configuration.
    reconfigure: Callable[[], None]
    sessions: dict[int, Session] = attrs.field(factory=dict)
    departures: Departures = attrs.field(factory=Departures)
    statistics: Statistics = attrs.field(factory=Statistics)
    last_client_id: int = 0


@attrs.define(eq=False)
class Session:
    """One client as its commands see it. Times are those of the monotonic clock, in seconds."""

    id: int
    server: Server
    database: Database
    address: str
    local_address: str
    descriptor: int
    created: float
    close: Callable[[], None]
    buffered: Callable[[], tuple[int, int]]
    # The last LSN that a reply to this client shows, sent or not.
    observed: Callable[[], int]
    encoder: Encoder = RESP2
    name: str = ""
    library_name: str = ""
    library_version: str = ""
    _reply_mode: ReplyMode = ReplyMode.ON
    _closing: bool = False
    # Whether a command may have asked for more than its reply to be sent; looked at after each.
    changed_course: bool = False
    last_active: float = 0.0
    last_command: str = "NULL"

    @property
    def reply_mode(self) -> ReplyMode:
        """What CLIENT REPLY asked for."""
        return self._reply_mode

    @reply_mode.setter
    def reply_mode(self, mode: ReplyMode) -> None:
        self._reply_mode = mode
        self.changed_course = self._closing or mode is not ReplyMode.ON

    @property
    def closing(self) -> bool:
        """Whether the connection ends once the replies so far are sent."""
        return self._closing

    @property
    def readable_lsn(self) -> int:
        """The LSN that a search may show without having to wait for the log.

        What is not durable has been acknowledged to nobody, so it may come after the search; but not when
        this client has been shown it, or is about to be.
        """
        journal = self.database.journal
        lsn = self.database.lsn
        if journal is None or journal.released(lsn):
            return lsn
        return max(journal.durable_lsn, self.observed())

    def leave(self) -> None:
        """Ends the connection once the replies so far are sent."""
        self._closing = self.changed_course = True

    def reset(self) -> None:
        """Back to how a client starts: https://redis.io/docs/latest/commands/reset/."""
        self.encoder = RESP2
        self.name = ""
        self.reply_mode = ReplyMode.ON
