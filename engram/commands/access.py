"""AUTH, and ACL over users: https://redis.io/docs/latest/commands/acl/."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence

import trio

from engram.access import (
    DEFAULT_USER,
    NO_FILE,
    LogEntry,
    User,
    check_username,
    describe_users,
    file_of_users,
)
from engram.commands.allowance import Allowance
from engram.commands.arguments import SYNTAX_ERROR, integer, text
from engram.commands.long_work import array_by_slices, beside_others, read
from engram.commands.session import Barrier, Server, Session
from engram.commands.table import Command, Reply, check_arity, container, help_command
from engram.errors import CommandError
from engram.permissions import (
    Denial,
    Reason,
    RuleError,
    Rules,
    Selector,
    UnmatchedParenthesisError,
    all_commands,
    categories,
)
from engram.protocol import replies
from engram.protocol.replies import OK, Encoder

logger = logging.getLogger("engram")

_WRONG_PASSWORD = "WRONGPASS invalid username-password pair or user is disabled."  # noqa: S105
_NO_PASSWORD_SET = (
    "ERR AUTH <password> called without any password configured for the default user."  # noqa: S105
    " Are you sure your configuration is correct?"
)
_NOT_SAVED = (
    "ERR There was an error trying to save the ACLs. Please check the server logs for more information"
)
_MOST_BITS = 4096
_BAD_BITS = (
    "ERR ACL GENPASS argument must be the number of bits for the output password,"
    f" a positive number up to {_MOST_BITS}"
)
_USUAL_BITS = 256
_USUAL_LOG_COUNT = 10
# Entries of the log that are shown in one turn.
_ENTRIES_A_TURN = 128
# What describing a user takes, where an element is a key that is looked at.
_ELEMENTS_OF_A_USER = 4


def authenticate(session: Session, request: list[bytes], name: bytes, password: bytes) -> None:
    """Lets the client be that user. Raises CommandError, and logs it, when the pair is wrong."""
    access = session.server.access
    user = access.authenticate(name, password)
    if user is None:
        access.record(session, Reason.AUTHENTICATION, request[0], name)
        raise CommandError(_WRONG_PASSWORD)
    session.log_in(user)


def _auth(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 3:
        raise CommandError(SYNTAX_ERROR)
    if len(arguments) == 2:
        if session.server.access.default.rules.nopass:
            raise CommandError(_NO_PASSWORD_SET)
        authenticate(session, arguments, DEFAULT_USER, arguments[1])
    else:
        authenticate(session, arguments, arguments[1], arguments[2])
    return OK


def _whoami(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk(session.user.name)


def _users(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk_array(sorted(session.server.access.users))


def _list(session: Session, arguments: list[bytes]) -> Reply:
    users = session.server.access.all_rules()

    def make(allowance: Allowance) -> bytes:
        return replies.bulk_array(describe_users(users))

    return read(session, make, "listing users failed", elements=_ELEMENTS_OF_A_USER * len(users))


def _getuser(session: Session, arguments: list[bytes]) -> bytes:
    user = session.server.access.users.get(arguments[2])
    encoder = session.encoder
    if user is None:
        return encoder.null
    rules = user.rules
    selectors = (encoder.map(_selector(selector)) for selector in rules.selectors)
    return encoder.map(
        (
            (replies.bulk(b"flags"), encoder.set(map(replies.bulk, rules.flags))),
            (replies.bulk(b"passwords"), replies.bulk_array(rules.passwords)),
            *_selector(rules.root),
            (replies.bulk(b"selectors"), replies.array(selectors)),
        )
    )


def _selector(selector: Selector) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (replies.bulk(b"commands"), replies.bulk(selector.describe_commands())),
        (replies.bulk(b"keys"), replies.bulk(selector.describe_keys())),
        (replies.bulk(b"channels"), replies.bulk(selector.describe_channels())),
    )


def _setuser(session: Session, arguments: list[bytes]) -> Reply:
    server, name, words = session.server, arguments[2], arguments[3:]
    check_username(name)

    def change() -> Mapping[bytes, Rules | None]:
        try:
            return {name: server.access.changed(name, words)}
        except UnmatchedParenthesisError as error:
            raise CommandError(
                f"ERR Unmatched parenthesis in acl selector starting at '{text(error.rule)}'."
            ) from error
        except RuleError as error:
            raise CommandError(f"ERR Error in ACL SETUSER modifier '{text(error.rule)}': {error}") from error

    # What is wrong is told at once, whatever else waits for the disk.
    change()

    def install() -> bytes:
        for user, rules in change().items():
            assert rules is not None
            server.access.put(user, rules)
        server.review_sessions(session)
        return OK

    if not server.access.automatic:
        return install()

    async def keep() -> bytes:
        async with server.files_lock:
            await _save(server, change())
            return install()

    return Barrier(keep)


def _deluser(session: Session, arguments: list[bytes]) -> Reply:
    server, names = session.server, arguments[2:]
    if DEFAULT_USER in names:
        raise CommandError("ERR The 'default' user cannot be removed")

    def install() -> bytes:
        deleted = sum(map(server.access.delete, names))
        server.review_sessions(session)
        return replies.integer(deleted)

    if not server.access.automatic or not any(name in server.access.users for name in names):
        return install()

    async def keep() -> bytes:
        async with server.files_lock:
            await _save(server, dict.fromkeys(names))
            return install()

    return Barrier(keep)


async def _save(server: Server, changes: Mapping[bytes, Rules | None] | None = None) -> None:
    """Writes the users as they are, or will be after changes, to their file."""
    access = server.access
    users = access.kept(changes)
    try:
        await trio.to_thread.run_sync(lambda: access.save(file_of_users(users)))
    except OSError as error:
        logger.warning("cannot save users to %s: %s", access.path, error.strerror)
        raise CommandError(_NOT_SAVED) from error


def _acl_save(session: Session, arguments: list[bytes]) -> Reply:
    server = session.server
    if server.access.path is None:
        raise CommandError(NO_FILE)

    async def save() -> bytes:
        async with server.files_lock:
            await _save(server)
        return OK

    return Barrier(save)


def _acl_load(session: Session, arguments: list[bytes]) -> Reply:
    server = session.server
    if server.access.path is None:
        raise CommandError(NO_FILE)

    async def load() -> bytes:
        async with server.files_lock:
            server.access.replace(await trio.to_thread.run_sync(server.access.read))
            server.review_sessions(session)
        return OK

    return Barrier(load)


def _cat(session: Session, arguments: list[bytes]) -> bytes:
    commands = session.server.access.commands
    if len(arguments) > 3:
        raise _misused(arguments)
    known = categories(commands)
    if len(arguments) == 2:
        return replies.bulk_array(category.encode() for category in known)
    wanted = text(arguments[2]).lower()
    if wanted not in known:
        raise CommandError(f"ERR Unknown category '{text(arguments[2])}'")
    return replies.bulk_array(
        command.name.encode() for command in all_commands(commands) if f"@{wanted}" in command.categories
    )


def _misused(arguments: list[bytes]) -> CommandError:
    return CommandError(
        f"ERR unknown subcommand or wrong number of arguments for '{text(arguments[1])}'. Try ACL HELP."
    )


def _genpass(session: Session, arguments: list[bytes]) -> bytes:
    if len(arguments) > 3:
        raise _misused(arguments)
    bits = _USUAL_BITS
    if len(arguments) == 3:
        bits = integer(arguments[2])
        if not 0 < bits <= _MOST_BITS:
            raise CommandError(_BAD_BITS)
    digits = (bits + 3) // 4
    return replies.bulk(secrets.token_hex((digits + 1) // 2)[:digits].encode())


def _dryrun(session: Session, arguments: list[bytes]) -> Reply:
    access = session.server.access
    user: User | None = access.users.get(arguments[2])
    if user is None:
        raise CommandError(f"ERR User '{text(arguments[2])}' not found")
    request = arguments[3:]
    command = access.commands.get(request[0].lower())
    if command is not None and command.subcommands and len(request) > 1:
        command = command.subcommands.get(request[1].lower())
    if not isinstance(command, Command):
        raise CommandError(f"ERR Command '{text(request[0])}' not found")
    check_arity(command, request)
    denial: Denial | None = None

    def turns() -> Iterator[None]:
        nonlocal denial
        denial = yield from user.rules.search(access.commands, command, request)

    def answer() -> bytes:
        if denial is None:
            return OK
        return _bulk(access.explain(user, denial, command, request))

    return beside_others(session, turns(), answer)


def _log(session: Session, arguments: list[bytes]) -> Reply:
    access, encoder = session.server.access, session.encoder
    if len(arguments) > 3:
        raise _misused(arguments)
    count = _USUAL_LOG_COUNT
    if len(arguments) == 3:
        if arguments[2].upper() == b"RESET":
            access.forget_log()
            return OK
        count = integer(arguments[2])

    def encode(some: Sequence[tuple[LogEntry, float]]) -> Iterator[bytes]:
        return (_entry(entry, age, encoder) for entry, age in some)

    return array_by_slices(session, access.log(count), _ENTRIES_A_TURN, encode)


def _entry(entry: LogEntry, age: float, encoder: Encoder) -> bytes:
    return encoder.map(
        (
            (replies.bulk(b"count"), replies.integer(entry.count)),
            (replies.bulk(b"reason"), _bulk(entry.reason.value)),
            (replies.bulk(b"context"), _bulk(entry.context)),
            (replies.bulk(b"object"), replies.bulk(entry.subject)),
            (replies.bulk(b"username"), replies.bulk(entry.username)),
            (replies.bulk(b"age-seconds"), _age(age, encoder)),
            (replies.bulk(b"client-info"), _bulk(entry.client)),
            (replies.bulk(b"entry-id"), replies.integer(entry.number)),
            (replies.bulk(b"timestamp-created"), replies.integer(int(entry.created * 1000))),
            (replies.bulk(b"timestamp-last-updated"), replies.integer(int(entry.updated * 1000))),
        )
    )


def _age(seconds: float, encoder: Encoder) -> bytes:
    return encoder.double(round(seconds, 3))


def _bulk(value: str) -> bytes:
    return replies.bulk(value.encode(errors="surrogateescape"))


_HELP = (
    "ACL <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "CAT [<category>]",
    "    List all commands that belong to <category>, or all command categories",
    "    when no category is specified.",
    "DELUSER <username> [<username> ...]",
    "    Delete a list of users.",
    "DRYRUN <username> <command> [<arg> ...]",
    "    Returns whether the user can execute the given command without executing the command.",
    "GETUSER <username>",
    "    Get the user's details.",
    "GENPASS [<bits>]",
    "    Generate a secure 256-bit user password. The optional `bits` argument can",
    "    be used to specify a different size.",
    "LIST",
    "    Show users details in config file format.",
    "LOAD",
    "    Reload users from the ACL file.",
    "LOG [<count> | RESET]",
    "    Show the ACL log entries.",
    "SAVE",
    "    Save the current config to the ACL file.",
    "SETUSER <username> <attribute> [<attribute> ...]",
    "    Create or modify a user with the specified attributes.",
    "USERS",
    "    List all the registered usernames.",
    "WHOAMI",
    "    Return the current connection username.",
    "HELP",
    "    Print this help.",
)

_GROUP = "server"
_ANYONE = ("noscript", "loading", "stale")
_ADMIN = ("admin", *_ANYONE)
# Those that may have to wait for the disk.
_PER_USER = "O(N). Where N is the number of configured users."

COMMANDS = (
    Command(
        "auth",
        _auth,
        -2,
        "[username] password",
        "Authenticates the connection.",
        "connection",
        ("noscript", "loading", "stale", "fast", "no_auth", "allow_busy"),
        complexity="O(N) where N is the number of passwords defined for the user",
    ),
    container(
        "acl",
        (
            Command(
                "acl|cat",
                _cat,
                -2,
                "[category]",
                "Lists the ACL categories, or the commands inside a category.",
                _GROUP,
                _ANYONE,
                since="6.0.0",
                complexity="O(1) since the categories and commands are a fixed set.",
            ),
            Command(
                "acl|deluser",
                _deluser,
                -3,
                "username [username ...]",
                "Deletes ACL users, and terminates their connections.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity="O(1) amortized time considering the typical user.",
            ),
            Command(
                "acl|dryrun",
                _dryrun,
                -4,
                "username command [arg ...]",
                "Simulates the execution of a command by a user, without executing the command.",
                _GROUP,
                _ADMIN,
                since="7.0.0",
                complexity="O(1).",
            ),
            Command(
                "acl|genpass",
                _genpass,
                -2,
                "[bits]",
                "Generates a pseudorandom, secure password that can be used to identify ACL users.",
                _GROUP,
                _ANYONE,
                since="6.0.0",
            ),
            Command(
                "acl|getuser",
                _getuser,
                3,
                "username",
                "Lists the ACL rules of a user.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity="O(N). Where N is the number of password, command and pattern rules that the user"
                " has.",
            ),
            Command(
                "acl|list",
                _list,
                2,
                "",
                "Dumps the effective rules in ACL file format.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity=_PER_USER,
            ),
            Command(
                "acl|load",
                _acl_load,
                2,
                "",
                "Reloads the rules from the configured ACL file.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity=_PER_USER,
            ),
            Command(
                "acl|log",
                _log,
                -2,
                "[count | RESET]",
                "Lists recent security events generated due to ACL rules.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity="O(N) with N being the number of entries shown.",
            ),
            Command(
                "acl|save",
                _acl_save,
                2,
                "",
                "Saves the effective ACL rules in the configured ACL file.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity=_PER_USER,
            ),
            Command(
                "acl|setuser",
                _setuser,
                -3,
                "username [rule [rule ...]]",
                "Creates and modifies an ACL user and its rules.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity="O(N). Where N is the number of rules provided.",
            ),
            Command(
                "acl|users",
                _users,
                2,
                "",
                "Lists all ACL users.",
                _GROUP,
                _ADMIN,
                since="6.0.0",
                complexity=_PER_USER,
            ),
            Command(
                "acl|whoami",
                _whoami,
                2,
                "",
                "Returns the authenticated username of the current connection.",
                _GROUP,
                _ANYONE,
                since="6.0.0",
            ),
            help_command("acl", _GROUP, _HELP),
        ),
        summary="A container for Access List Control commands.",
        group=_GROUP,
        since="6.0.0",
    ),
)
