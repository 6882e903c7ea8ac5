"""What stands between a client and a command: authentication, permission, memory, MULTI, room in the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from engram.commands.limits import check_keys
from engram.commands.session import Session, Transaction
from engram.commands.states import Event, Queueing, Role
from engram.commands.table import Command, Handler, log_room
from engram.errors import CommandError
from engram.permissions import Rules
from engram.protocol import replies

# What has to be waited for before a request is looked at again. Raises CommandError when it is refused.
Wait = Callable[[], Awaitable[None]]

_QUEUED = replies.simple("QUEUED")
_NO_AUTHENTICATION = "NOAUTH Authentication required."

_OVER = object()

_QUEUEING = Queueing.QUEUEING
_MONITOR = Role.MONITOR

# Carried out at once inside MULTI.
_NEVER_QUEUED = frozenset({"exec", "discard", "multi", "watch", "quit", "reset"})


class Gate:
    """Lets every request through.

    Attributes:
        throttles: whether requests of commands with a `throttle` have to be admitted one by one, unless they
            are carried out together.
    """

    __slots__ = ()

    throttles = False

    def begin(self, command: Command) -> Handler | None:
        """Called before requests for one command that come one after the other.

        Returns what carries out each of them; None when the next has to be admitted by itself.
        """
        return command.handler

    def admit(self, command: Command, request: list[bytes]) -> bytes | Wait | None:
        """Looks at a request by itself.

        Returns the reply of one that is not to be carried out now, or what it has to wait for; None for one
        that is to be carried out.

        Raises:
            CommandError: it is refused.
        """
        return None


class Guard(Gate):
    """The gate for requests as they come. Most of them pass without being looked at.

    A request is looked at while the session or the server is `guarded`; and a write when the log is not known
    to have room for it, or when it adds rows of which many may have no graph.

    Attributes:
        room: bytes that the log surely needs for the requests that came together.
        admitted: whether it has so much; None until it has been asked.
    """

    __slots__ = (
        "_cleared",
        "_database",
        "_journal",
        "_permitted",
        "_server",
        "_session",
        "admitted",
        "room",
    )

    throttles = True

    def __init__(self, session: Session) -> None:
        self.room = 0
        self.admitted: bool | None = None
        self._session = session
        self._server = session.server
        self._database = session.server.database
        self._journal = session.server.database.journal
        # Whether the next request has waited for all that it had to.
        self._cleared = False
        # The request with many keys that was last found to be allowed, and the rules that allow it.
        self._permitted: tuple[list[bytes], Rules] | None = None

    def begin(self, command: Command) -> Handler | None:
        admitted = self.admitted
        if admitted is None:
            journal = self._journal
            admitted = self.admitted = journal is None or journal.has_room(self.room)
        if command.writes:
            self._database.covered = True
            if command.logs_beyond:
                # More than was asked for.
                admitted = self.admitted = self._journal is None
            if not admitted or (self._cleared and command.throttle is not None):
                return None
        else:
            self._database.covered = admitted
        if self._session.guarded or self._server.guarded:
            return None
        self._cleared = False
        return command.handler

    def admit(self, command: Command, request: list[bytes]) -> bytes | Wait | None:
        if self._cleared:
            self._cleared = False
            return None
        session, server = self._session, self._server
        if session.guarded or server.guarded:
            # In Redis's order; nothing is evicted in a pause.
            check_standing(session, command)
            if not session.user.unrestricted and (wait := self._look_at_rights(command, request)) is not None:
                return wait
            check_shape(session, command, request)
            if server.pause.active and server.pause.holds(writes := session.would_write(command)):
                return partial(self._wait_for_pause, writes)
            if server.exclusion.active and command.shows_data:
                return server.exclusion.wait
            if server.config.maxmemory:
                make_room(session, command)
            # Room in the log may go to what was evicted, or to a transaction.
            self.admitted = self._journal is None
            transaction = session.transaction
            if transaction is not None and command.name not in _NEVER_QUEUED:
                return queue(session, transaction, command, request)
            # EXEC is shown after what it carries out, if it does.
            if server.monitors and (command.name != "exec" or session.state.queueing is not _QUEUEING):
                show(session, command, request)
        return self._obstacle(command, request) if command.writes else None

    def _look_at_rights(self, command: Command, request: list[bytes]) -> Wait | None:
        """What has to be waited for until it is known that a restricted user may do this; None if it is.

        Raises:
            CommandError: it may not.
        """
        session, permitted, rules = self._session, self._permitted, self._session.user.rules
        self._permitted = None
        if permitted is not None and permitted[0] is request and permitted[1] is rules:
            return None
        turns = session.server.access.checking(session, command, request)
        if next(turns, _OVER) is _OVER:
            return None

        async def go_on() -> None:
            await trio.lowlevel.checkpoint()
            for _ in turns:
                await trio.lowlevel.checkpoint()
            self._permitted = request, rules

        return go_on

    def _obstacle(self, command: Command, request: list[bytes]) -> Wait | None:
        """What a write has to wait for that nothing else forbids."""
        adds = None if command.throttle is None else command.throttle(self._session, request)
        wait = None if adds is None else self._server.builder.admit(*adds)
        journal = self._journal
        if wait is None and (
            self.admitted or journal is None or journal.has_room(log_room(command, request))
        ):
            return None
        return partial(self._clear, command, request, wait, self._session.user.rules)

    async def _clear(
        self, command: Command, request: list[bytes], wait: Wait | None, permitting: Rules
    ) -> None:
        """Waits until a write may be carried out: for the builder, and as long as the log has no room."""
        if wait is not None:
            await wait()
        await self._server.admit(log_room(command, request))
        # Its user may have changed meanwhile.
        check_authentication(self._session, command)
        if self._session.user.rules is not permitting:
            self._server.access.check(self._session, command, request)
        self._cleared = True

    async def _wait_for_pause(self, writes: bool) -> None:
        session = self._session
        session.happen(Event.PAUSE)
        try:
            await self._server.pause.wait(writes)
        finally:
            session.happen(Event.RESUME)


def check_standing(session: Session, command: Command) -> None:
    """Notes a command as the client's last. Raises CommandError when it cannot be given now by anyone."""
    session.last_command = command.name
    if not session.authenticated:
        check_authentication(session, command)
    if session.transaction is not None and "no_multi" in command.flags:
        raise CommandError("ERR Command not allowed inside a transaction")


def check_shape(session: Session, command: Command, request: list[bytes]) -> None:
    """Raises CommandError for a key that is too long, or where one who monitors asks for data."""
    config = session.server.config
    if config.max_key_length < config.proto_max_bulk_len:
        check_keys(command, request, config)
    if session.state.role is _MONITOR and {"write", "readonly"} & set(command.flags):
        raise CommandError("ERR Replica can't interact with the keyspace")


def check_authentication(session: Session, command: Command) -> None:
    """Raises CommandError when a session has to authenticate first."""
    session.follow()
    if not session.authenticated and "no_auth" not in command.flags:
        raise CommandError(_NO_AUTHENTICATION)


def make_room(session: Session, command: Command) -> None:
    """Makes room in memory for a command that may take some. Raises CommandError when there is none."""
    transaction = session.transaction
    grows = transaction is not None and transaction.grows and command.name == "exec"
    if grows or "denyoom" in command.flags:
        session.server.memory.admit(command)


def queue(session: Session, transaction: Transaction, command: Command, request: list[bytes]) -> bytes:
    """Keeps a command for EXEC, unless that will carry out none; returns the reply.

    Raises:
        CommandError: the transaction has more than `transaction-max-commands`, or takes more than
            `client-query-buffer-limit`.
    """
    config = session.server.config
    if len(transaction.commands) >= config.transaction_max_commands:
        raise CommandError("ERR the transaction has more commands than transaction-max-commands")
    if session.state.queueing is _QUEUEING:
        transaction.queue(command, request, log_room(command, request))
    if transaction.size > config.client_query_buffer_limit:
        raise CommandError("ERR the transaction takes more than client-query-buffer-limit")
    return _QUEUED


def show(session: Session, command: Command, request: list[bytes]) -> None:
    """Shows a request to the clients that gave MONITOR, unless it is an operator's."""
    if not {"admin", "skip_monitor"} & set(command.flags):
        session.server.monitors.feed(session, request)
