"""What a command sees: its client, the server around it, and a place for an answer that comes later."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs
import trio

from engram.access import Access, User
from engram.commands.allowance import Allowance, HeldReplies, NoRoomError
from engram.commands.states import ClientState, Course, Event, Queueing, ReplyMode, Role, Standing
from engram.commands.storage_errors import refusals_in_words, worded
from engram.commands.wording import in_words
from engram.config import Config
from engram.database import Database, LogicalDatabase
from engram.errors import CommandError
from engram.exclusion import Exclusion
from engram.index.builder import Builder
from engram.index.errors import RefusalError
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex
from engram.index.verification import Verification
from engram.large_string import String
from engram.memory import MemoryLimit
from engram.monitors import Monitors
from engram.pause import Pause
from engram.permissions import Rules
from engram.protocol import replies
from engram.protocol.replies import RESP2, Encoder
from engram.rounds import Rounds
from engram.sizes import BYTES_OBJECT
from engram.slowlog import SlowLog
from engram.statistics import Statistics
from engram.watches import Watch

if TYPE_CHECKING:
    from engram.commands.table import Command, CommandTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

Queued = tuple["Command", list[bytes]]

Bytes = bytes | memoryview

# Looking a member of an enumeration up costs a call and more, and these come with each transaction.
_MULTI, _END_MULTI, _EXECUTE, _FINISH = Event.MULTI, Event.END_MULTI, Event.EXECUTE, Event.FINISH

# What a queued request takes beside its words, about: a list of them, and its place in the queue.
_REQUEST_BYTES = 200

# Freeing a million requests would hold every client up: more than these are freed bit by bit.
_FREED_AT_ONCE = 512
# Sessions that follow a change of their users until others have a turn.
_FOLLOWING_A_TURN = 128
# Clients are hurried at most so often.
_HURRY_SECONDS = 1.0


class Slot:
    """The place of a reply that is not known yet; whoever finds it calls `fill`, once.

    `size` is about how many bytes the reply will have, where that may be many: the client is not read from
    while too much is expected for it. `lsn` is the state that it will show, None for that of the moment at
    which it was asked for. `awaited` is false once nobody waits for the reply: CLIENT REPLY silences it, or
    the client is gone. Any thread may look.
    """

    __slots__ = ("awaited", "lsn", "measure", "on_fill", "reply", "size")

    def __init__(self, size: int = 0, lsn: int | None = None) -> None:
        self.size = size
        self.lsn = lsn
        self.awaited = True
        self.reply: bytes | None = None
        self.on_fill: Callable[[], None] | None = None
        # Called when the reply is known, before `on_fill`.
        self.measure: Callable[[], None] | None = None

    def fill(self, reply: bytes) -> None:
        """Gives the encoded reply and lets the connection know."""
        self.reply = reply
        if self.measure is not None:
            self.measure()
        # What is called may hold this slot, and a long reply should go as soon as it has been sent.
        on_fill, self.on_fill = self.on_fill, None
        if on_fill is not None:
            on_fill()


@attrs.frozen(eq=False)
class Pieces:
    """A long reply in parts that are sent one after the other: strings go out as they are, without a copy."""

    parts: Sequence[Bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)


@attrs.frozen(eq=False)
class Barrier:
    """A reply that the client's next request waits for; other clients go on meanwhile.

    The connection awaits `reply`, which returns the encoded reply or raises CommandError. When the client is
    gone or the server shuts down, it is cancelled, and nobody is answered.
    """

    reply: Callable[[], Awaitable[bytes | Pieces]]


@attrs.frozen(eq=False)
class Turns:
    """A reply of a command in EXEC that takes further turns of the loop, which EXEC takes for it.

    `answer` is called behind the last of the turns. Both may raise CommandError.
    """

    turns: Iterator[object]
    answer: Callable[[], bytes | Pieces]


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
class Transaction:
    """What a client has queued since MULTI.

    Attributes:
        commands: the requests.
        foreseen: those, with their commands, that EXEC looks at before it carries any out.
        size: bytes that the requests take in memory.
        room: bytes that they may take in the log.
        rules: those of the user when it was begun.
        writes: whether one of them changes data.
        grows: whether one of them may take memory.
    """

    rules: Rules
    commands: deque[list[bytes]] = attrs.field(factory=deque)
    foreseen: list[Queued] = attrs.field(factory=list)
    size: int = 0
    room: int = 0
    writes: bool = False
    grows: bool = False

    def queue(self, command: Command, request: list[bytes], room: int) -> None:
        """Keeps a command, which may take `room` bytes of the log."""
        self.commands.append(request)
        self.room += room
        if command.foreseen:
            self.foreseen.append((command, request))
        self.size += _REQUEST_BYTES + BYTES_OBJECT * len(request) + sum(map(len, request))
        self.writes = self.writes or command.writes
        self.grows = self.grows or "denyoom" in command.flags


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
    # Called after CONFIG SET has changed the configuration; raises ConfigError when it cannot be as it is.
    reconfigure: Callable[[], None]
    access: Access
    sessions: dict[int, Session] = attrs.field(factory=dict)
    rounds: Rounds = attrs.field(factory=Rounds)
    statistics: Statistics = attrs.field(factory=Statistics)
    slowlog: SlowLog = attrs.field()
    monitors: Monitors = attrs.field()
    pause: Pause = attrs.field()
    exclusion: Exclusion = attrs.field()
    # Commands that rewrite a file of the operator's, or read it again, come one after the other.
    files_lock: trio.Lock = attrs.field(factory=trio.Lock)
    memory: MemoryLimit = attrs.field()
    held_replies: HeldReplies = attrs.field()
    # When a command that failed by an error of ours was last logged, by the place of that error.
    failures_logged: dict[object, float] = attrs.field(factory=dict)
    # When clients were last hurried, by the monotonic clock.
    _hurried: float = -math.inf
    last_client_id: int = 0
    # Whether commands of any client have more to pass than those of its own `guarded`.
    guarded: bool = False

    @slowlog.default
    def _slowlog(self) -> SlowLog:
        return SlowLog(lambda: self.config.slowlog_max_len)

    @monitors.default
    def _monitors(self) -> Monitors:
        return Monitors(
            lambda: self.config.client_output_buffer_limit,
            lambda job: self.start_soon(job),
            self.reconsider,
        )

    @pause.default
    def _pause(self) -> Pause:
        return Pause(self.reconsider)

    @exclusion.default
    def _exclusion(self) -> Exclusion:
        return Exclusion(self.reconsider)

    @held_replies.default
    def _held_replies(self) -> HeldReplies:
        return HeldReplies(self.config)

    @memory.default
    def _memory(self) -> MemoryLimit:
        return MemoryLimit(self.config, self.database)

    def __attrs_post_init__(self) -> None:
        # Handlers and the connection meet the log through the database and `admit`: they know words only.
        self.database.too_large = worded
        self.searches.soon = self.rounds.soon
        self.reconsider()

    def error(self, text: str) -> bytes:
        """An error reply, counted."""
        self.statistics.error_replies += 1
        self.statistics.errors.count(text)
        return replies.error(text)

    def reconsider(self) -> None:
        """Finds `guarded` again, after what it follows from has changed."""
        config = self.config
        self.guarded = (
            bool(self.monitors)
            or self.pause.active
            or self.exclusion.active
            or config.maxmemory > 0
            or config.max_key_length < config.proto_max_bulk_len
        )

    async def admit(self, room: int, *, writes: bool = True) -> None:
        """Waits until nobody holds up what is to be done, and a write has `room` bytes in the log.

        It is done before the next checkpoint, or not at all. A client that has been ended does nothing: this
        raises Cancelled then. Raises CommandError when the log has no room and will not have any soon.
        """
        journal = self.database.journal
        while True:
            await self.pause.wait(writes)
            await self.exclusion.wait()
            if writes and journal is not None and not journal.has_room(room):
                with refusals_in_words():
                    await journal.admit(room)
            if not (self.pause.holds(writes) or self.exclusion.active):
                break
        await trio.lowlevel.checkpoint_if_cancelled()

    def hurry_clients(self) -> None:
        """Replies held for clients leave no room for others: who takes none from here on is dropped."""
        now = time.monotonic()
        if now - self._hurried >= _HURRY_SECONDS:
            self._hurried = now
            for session in self.sessions.values():
                session.hurry()

    def review_sessions(self, changing: Session | None = None) -> None:
        """Lets changes of users hold for their sessions; those whose user is gone end.

        They hold at once: whatever a session asks for next, it follows them first. Of many sessions those
        that ask for nothing follow in further turns. `changing` is the session that made the change, which
        still gets its reply.
        """
        changed = self.access.take_changed()
        if not changed:
            return
        concerned = [session for session in self.sessions.values() if session.user in changed]
        for session in concerned:
            session.stale, session.guarded, session.authenticated = True, True, False
        if changing is not None:
            changing.follow(changing=True)
        turns = _follow(concerned)
        for _ in turns:
            break
        else:
            return

        async def go_on() -> None:
            for _ in turns:
                await trio.lowlevel.checkpoint()

        try:
            self.start_soon(go_on)
        except RuntimeError:
            # The server shuts down.
            for _ in turns:
                pass


def _follow(sessions: Sequence[Session]) -> Iterator[None]:
    """Has sessions follow changes of their users; yields between two turns."""
    for number, session in enumerate(sessions):
        if number and not number % _FOLLOWING_A_TURN:
            yield
        session.follow()


@attrs.define(eq=False)
class Session:
    """One client as its commands see it. Times are those of the monotonic clock, in seconds.

    What the client may do now is its `state`, which changes by events only. What of it is asked for with
    every request is kept beside it:

    Attributes:
        authenticated: whether the client is in, and that is certain.
        stale: whether its user has changed, which the session has yet to follow.
        guarded: whether a command of this client has more to pass than its arity: see
            `engram.commands.guard`.
        closing, flowing: as in `ClientState`.
    """

    id: int
    server: Server
    # The one that the client has selected.
    database: LogicalDatabase
    # The commands that there are.
    table: CommandTable
    address: str
    local_address: str
    descriptor: int
    created: float
    close: Callable[[], None]
    buffered: Callable[[], tuple[int, int]]
    # The last LSN that a reply to this client shows, sent or not.
    observed: Callable[[], int]
    # Sends what is no reply, after the replies so far.
    push: Callable[[bytes], None] = lambda data: None
    # Drops the client unless it takes some of what waits for it within `client-write-timeout`.
    hurry: Callable[[], None] = lambda: None
    # Whether a reply to this client is still being made: it is not idle then.
    awaiting: Callable[[], bool] = lambda: False
    encoder: Encoder = RESP2
    name: str = ""
    library_name: str = ""
    library_version: str = ""
    state: ClientState = attrs.field(init=False, factory=ClientState)
    authenticated: bool = attrs.field(init=False, default=False)
    guarded: bool = attrs.field(init=False, default=True)
    stale: bool = attrs.field(init=False, default=False)
    closing: bool = attrs.field(init=False, default=False)
    flowing: bool = attrs.field(init=False, default=True)
    last_active: float = 0.0
    last_command: str = "NULL"
    # A client is the default user from the start.
    user: User = attrs.field()
    # What is queued since MULTI.
    transaction: Transaction | None = None
    watch: Watch = attrs.field(factory=Watch)
    # Ends what the client is blocked in, None while it is not: by an error, or else as by a timeout.
    unblock: Callable[[bool], None] | None = None
    # What CLIENT NO-EVICT and CLIENT NO-TOUCH asked for.
    no_evict: bool = False
    no_touch: bool = False
    # Bytes of replies that are being made for the client, beside those in its outbox.
    reserved: int = 0
    # What the replies of EXEC may take together, while it is carrying commands out, which see each other's
    # changes.
    allowance: Allowance | None = None

    @user.default
    def _first_user(self) -> User:
        return self.server.access.default

    def __attrs_post_init__(self) -> None:
        self._enter()

    def happen(self, event: Event) -> None:
        """Moves the state on. Raises ImpossibleEventError, and changes nothing, where that cannot be."""
        state = self.state
        state.happen(event)
        self.authenticated = state.authenticated and not self.stale
        self.guarded = not self.authenticated or state.in_multi or not self.user.unrestricted
        self.closing = state.closing
        self.flowing = state.flowing

    @property
    def logged_in(self) -> bool:
        """Whether the client stays in when others have to authenticate."""
        return self.state.standing is Standing.MEMBER or self.state.standing is Standing.REMOVED

    @property
    def executing(self) -> bool:
        """Whether EXEC is carrying commands out."""
        return self.state.queueing is Queueing.EXECUTING

    @property
    def reply_mode(self) -> ReplyMode:
        """What CLIENT REPLY asked for."""
        return self.state.replies

    @property
    def monitoring(self) -> bool:
        """Whether the client has given MONITOR."""
        return self.state.role is Role.MONITOR

    @property
    def blocked(self) -> bool:
        """Whether a command waits for others: for copies, for a sync, or for the end of a pause."""
        return self.state.course is Course.BLOCKED or self.state.course is Course.PAUSED

    @property
    def readable_lsn(self) -> int:
        """The LSN that a search may show without having to wait for the log.

        What is not durable has been acknowledged to nobody, so it may come after the search; but not when
        this client has been shown it, or is about to be.
        """
        journal = self.database.journal
        lsn = self.database.lsn
        if journal is None or self.executing or journal.released(lsn):
            return lsn
        return max(journal.durable_lsn, self.observed())

    def read(self, key: bytes) -> Any:
        """What a key holds, counted as found or as not found."""
        return self._counted(self.database.lookup(key))

    def read_many(self, keys: Iterable[bytes]) -> list[Any]:
        """What each of some keys holds, counted as found or as not found."""
        values = list(map(self.database.lookup, keys))
        statistics = self.server.statistics
        statistics.keyspace_misses += (misses := values.count(None))
        statistics.keyspace_hits += len(values) - misses
        return values

    def read_string(self, key: bytes) -> String | None:
        """The string at a key, counted as found or as not found. Raises CommandError as `Database.string`."""
        return self._counted(self.database.string(key))

    def read_index(self, key: bytes) -> VectorIndex | None:
        """The index at a key, counted as found or as not found. Raises CommandError as `Database.index`."""
        return self._counted(self.database.index(key))

    def _counted(self, value: T) -> T:
        if value is None:
            self.server.statistics.keyspace_misses += 1
        else:
            self.server.statistics.keyspace_hits += 1
        return value

    def fill(self, slot: Slot, outcome: bytes | Exception, failed: str) -> None:
        """Answers with what has been found, or with the error why nothing was; `failed` says what has.

        To be called from where an error would end the server. If no answer can be made, the client ends.
        """
        try:
            if isinstance(outcome, RefusalError):
                outcome = in_words(outcome)
            if isinstance(outcome, NoRoomError):
                self.server.hurry_clients()
            if isinstance(outcome, MemoryError):
                outcome = CommandError(f"OOM {failed}: there is not enough memory for it")
            if isinstance(outcome, Exception):
                text = str(outcome) if isinstance(outcome, CommandError) else f"ERR {failed}: {outcome}"
                outcome = self.server.error(text)
            slot.fill(outcome)
        except Exception:
            logger.exception("client %s ended by an error", self.address)
            self.close()

    def would_write(self, command: Command) -> bool:
        """Whether a command changes data: by itself, or as EXEC does with what is queued."""
        transaction = self.transaction
        return command.writes or (command.name == "exec" and transaction is not None and transaction.writes)

    def follow(self, *, changing: bool = False) -> None:
        """Follows a change of its user: of what it may do, or of whether anyone has to authenticate.

        Nothing happens where there was none. When the user is gone the client ends; one that made the change,
        `changing`, once its replies are sent.
        """
        if not self.stale:
            return
        self.stale = False
        access = self.server.access
        if access.users.get(self.user.name) is self.user:
            self.happen(Event.OPEN if access.is_open else Event.SHUT)
            return
        self.happen(Event.LOSE_USER)
        if changing:
            self.leave()
        else:
            self.close()

    def _enter(self) -> None:
        """Is the default user, and in when that needs no password."""
        if self.server.access.is_open:
            self.happen(Event.LOG_IN)
        else:
            self.happen(Event.SHUT)

    def log_in(self, user: User) -> None:
        """Lets the client be that user from now on."""
        self.user = user
        self.happen(Event.LOG_IN)

    def begin(self) -> None:
        """MULTI: commands are queued from now on."""
        transaction = Transaction(self.user.rules)
        self.happen(_MULTI)
        self.transaction = transaction

    def refuse(self) -> None:
        """A command was refused: the transaction, if there is one, carries none out any more."""
        if self.transaction is not None:
            self.happen(Event.REFUSE)

    def discard(self) -> None:
        """Forgets what was queued, and all watches."""
        self.happen(_END_MULTI)
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            for queued in (transaction.commands, transaction.foreseen):
                if len(queued) > _FREED_AT_ONCE:
                    self.server.database.engine.dropped.append(queued)
        self.unwatch()

    def execute(self, allowance: Allowance) -> None:
        """EXEC carries commands out from now on, whose replies take of the allowance."""
        self.happen(_EXECUTE)
        self.allowance = allowance

    def finish(self) -> None:
        """EXEC carries out no more."""
        self.allowance = None
        self.happen(_FINISH)

    def select(self, number: int) -> None:
        """Has the commands of the client see another database from now on."""
        self.database = self.server.database.logical(number)

    @property
    def database_number(self) -> int:
        """The number of the database that the client has selected."""
        return self.database.number

    def unwatch(self) -> None:
        """Forgets all watches."""
        self.server.database.watches.remove(self.watch)
        self.watch = Watch()

    def block(self, unblock: Callable[[bool], None]) -> None:
        """A command waits until `go_on`; `unblock` ends its waiting, by an error or else as by a timeout."""
        self.happen(Event.BLOCK)
        self.unblock = unblock

    def go_on(self) -> None:
        """The command that `block` was called for waits no more. That may be said twice."""
        if self.unblock is not None:
            self.unblock = None
            self.happen(Event.UNBLOCK)

    def monitor(self) -> None:
        """MONITOR: the client is shown what others ask for."""
        self.happen(Event.MONITOR)
        self.server.monitors.add(self)

    def leave(self) -> None:
        """Ends the connection once the replies so far are sent."""
        self.happen(Event.LEAVE)

    def part(self) -> None:
        """Lets go of the connection, which has ended. What still goes on for the client reaches nobody.

        The two refer to each other: only the garbage collector would free them.
        """
        self.close = self.hurry = lambda: None
        self.buffered = lambda: (0, 0)
        self.observed = lambda: 0
        self.push = lambda data: None
        self.awaiting = lambda: False

    def reset(self) -> None:
        """Back to how a client starts: https://redis.io/docs/latest/commands/reset/."""
        self.select(0)
        self.discard()
        self.user = self.server.access.default
        self.happen(Event.RESET)
        self._enter()
        self.server.monitors.remove(self)
        self.no_evict = self.no_touch = False
        self.encoder = RESP2
        self.name = ""
