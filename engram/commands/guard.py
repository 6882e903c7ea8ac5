"""What stands between a client and a command: authentication, permission, memory, and MULTI."""

from __future__ import annotations

from engram.commands.limits import check_keys
from engram.commands.session import Session
from engram.commands.states import Queueing
from engram.commands.table import Command, log_room
from engram.errors import CommandError
from engram.protocol import replies

_QUEUED = replies.simple("QUEUED")
_NO_AUTHENTICATION = "NOAUTH Authentication required."

# Carried out at once inside MULTI.
_NEVER_QUEUED = frozenset({"exec", "discard", "multi", "watch", "quit", "reset"})


def check(session: Session, command: Command, request: list[bytes]) -> None:
    """Notes a command as the client's last. Raises CommandError for what it must not do now.

    The checks are in Redis's order.
    """
    session.last_command = command.name
    check_authentication(session, command)
    transaction = session.transaction
    if transaction is not None and "no_multi" in command.flags:
        raise CommandError("ERR Command not allowed inside a transaction")
    server = session.server
    check_permission(session, command, request)
    if server.config.max_key_length < server.config.proto_max_bulk_len:
        check_keys(command, request, server.config)
    if session.monitoring and {"write", "readonly"} & set(command.flags):
        raise CommandError("ERR Replica can't interact with the keyspace")


def admit(session: Session, command: Command, request: list[bytes]) -> bytes | None:
    """Makes room in memory for a command; queues it in MULTI, or shows it to the clients that gave MONITOR.

    To be called when no pause holds it: nothing is evicted before. Returns the reply of a command that was
    queued, None for one that is to be carried out.

    Raises:
        CommandError: there is no room, or the transaction has more than `transaction-max-commands` or takes
            more than `client-query-buffer-limit`.
    """
    transaction, server = session.transaction, session.server
    if server.config.maxmemory and (
        "denyoom" in command.flags
        or (transaction is not None and transaction.grows and command.name == "exec")
    ):
        server.memory.admit(command)
    if transaction is not None and command.name not in _NEVER_QUEUED:
        if len(transaction.commands) >= server.config.transaction_max_commands:
            raise CommandError("ERR the transaction has more commands than transaction-max-commands")
        if session.state.queueing is Queueing.QUEUEING:
            transaction.queue(command, request, log_room(command, request))
        if transaction.size > server.config.client_query_buffer_limit:
            raise CommandError("ERR the transaction takes more than client-query-buffer-limit")
        return _QUEUED
    # EXEC is shown after what it carries out, if it does.
    if server.monitors and (command.name != "exec" or session.state.queueing is not Queueing.QUEUEING):
        show(session, command, request)
    return None


def check_rights(session: Session, command: Command, request: list[bytes]) -> None:
    """Raises CommandError when a session may not do this: it is nobody's, or its user may not."""
    check_authentication(session, command)
    check_permission(session, command, request)


def check_authentication(session: Session, command: Command) -> None:
    """Raises CommandError when a session has to authenticate first."""
    if not session.authenticated and "no_auth" not in command.flags:
        raise CommandError(_NO_AUTHENTICATION)


def check_permission(session: Session, command: Command, request: list[bytes]) -> None:
    """Raises CommandError when the user of a session may not do this."""
    if not session.user.unrestricted:
        session.server.access.check(session, command, request)


def show(session: Session, command: Command, request: list[bytes]) -> None:
    """Shows a request to the clients that gave MONITOR, unless it is an operator's."""
    if not {"admin", "skip_monitor"} & set(command.flags):
        session.server.monitors.feed(session, request)
