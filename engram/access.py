"""The users of a server: who is let in, what they were refused, and the file that keeps them.

Access is that of Redis: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import attrs

from engram.config import LONGEST_PASSWORD, Config
from engram.errors import CommandError, ConfigError, OperatorError
from engram.files import DiskFiles, Files, read_file, replace_file, rewrite_file
from engram.permissions import (
    UNKNOWN_COMMAND,
    Command,
    Commands,
    Denial,
    Reason,
    RuleError,
    Rules,
    Selector,
    has_space,
    hash_password,
)
from engram.protocol import replies

DEFAULT_USER: Final = b"default"
FILE_NAME: Final = "users.acl"
"""Where a data directory keeps its users, unless the setting `aclfile` names another file."""

PROTECTED: Final = replies.error(
    "DENIED Redis is running in protected mode because protected mode is enabled and no password is set for"
    " the default user. In this mode connections are only accepted from the loopback interface. If you want"
    " to connect from external computers to Redis you may adopt one of the following solutions: 1) Just"
    " disable protected mode sending the command 'CONFIG SET protected-mode no' from the loopback interface"
    " by connecting to Redis from the same host the server is running, however MAKE SURE Redis is not"
    " publicly accessible from internet if you do so. Use CONFIG REWRITE to make this change permanent. 2)"
    " Alternatively you can just disable the protected mode by editing the Redis configuration file, and"
    " setting the protected mode option to 'no', and then restarting the server. 3) If you started the server"
    " manually just for testing, restart it with the '--protected-mode no' option. 4) Set up an"
    " authentication password for the default user. NOTE: You only need to do one of the above things in"
    " order for the server to start accepting connections from the outside."
)
"""What a client from elsewhere is told before it is closed; in Redis's words, which clients look for."""

NO_FILE: Final = (
    "ERR This Redis instance is not configured to use an ACL file. You may want to specify users via the ACL"
    " SETUSER command and then issue a CONFIG REWRITE (assuming you have a Redis configuration file set) in"
    " order to store users in the Redis configuration."
)

_UNCHANGED: Final = "WARNING: ACL errors detected, no change to the previously active ACL rules was performed"
_NOBODYS_PASSWORD: Final = b"0" * 64

_MODE: Final = 0o600
_LOG_WINDOW: Final = 60.0
_LOG_SCAN: Final = 10
_LONGEST_LOGGED: Final = 1024
_OPEN: Final = Rules(
    enabled=True, nopass=True, root=Selector(all_commands=True, all_keys=True, all_channels=True)
)


@attrs.define(eq=False)
class User:
    """One user. Sessions hold on to it, so that a change of its rules holds for them at once."""

    name: bytes
    rules: Rules
    # Whether every command on every key is allowed.
    unrestricted: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.change(self.rules)

    def change(self, rules: Rules) -> None:
        """Gives the user other rules, which its sessions have to follow: see `Access.take_changed`."""
        self.rules = rules
        self.unrestricted = rules.unrestricted


class Client(Protocol):
    """What is asked of a session."""

    @property
    def user(self) -> User: ...
    @property
    def transaction(self) -> object | None: ...
    @property
    def executing(self) -> bool: ...


@attrs.define(eq=False)
class LogEntry:
    """What was refused, `count` times within a minute: https://redis.io/docs/latest/commands/acl-log/.

    Times are seconds since the epoch. `client` is the line of CLIENT LIST at the last time.
    """

    number: int
    reason: Reason
    context: str
    subject: bytes
    username: bytes
    client: str
    created: float
    updated: float
    count: int = 1


class Access:
    """The users of one server, and the log of what they were refused.

    Args:
        commands: the table of commands, by lower-case name.
        password: that of the default user; empty: it needs none.
        path: the file that holds the users; None where nothing is kept.
        automatic: whether each change of a user is kept in that file.
        describe: a client's line in CLIENT LIST.
        log_length: how many entries the log keeps.
        files: through which the file is written; the real ones when None.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        password: bytes = b"",
        path: Path | None = None,
        automatic: bool = False,
        describe: Callable[[Any], str] = lambda client: "",
        log_length: Callable[[], int] = lambda: 128,
        files: Files | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.commands = commands
        self.path = path
        self.automatic = automatic
        self.default = User(DEFAULT_USER, _OPEN)
        self.users: dict[bytes, User] = {DEFAULT_USER: self.default}
        self.denied: Counter[str] = Counter()
        # Those that have been changed or deleted since they were last taken.
        self._changed: set[User] = set()
        self._log: deque[LogEntry] = deque()
        self._logged = 0
        self._describe = describe
        self._log_length = log_length
        self._files: Files = DiskFiles() if files is None else files
        self._now = now
        self._password = b""
        # What holds for the default user where the file does not name it.
        self._configured = _OPEN
        self.require(password)

    @property
    def is_open(self) -> bool:
        """Whether clients need no password: they are the default user from the start."""
        return self.default.rules.nopass and self.default.rules.enabled

    def configure(self, users: Mapping[bytes, Rules]) -> None:
        """Lets these be the users, those of the config file."""
        self._configured = users.get(DEFAULT_USER, self._configured)
        self.replace(users)

    def require(self, password: bytes) -> None:
        """Sets the password that the setting `requirepass` gives the default user; an empty one is none.

        Nothing happens when it is the one that was set so last.
        """
        if password == self._password:
            return
        self._password = password
        change = [b"resetpass", b">" + password] if password else [b"nopass"]
        self._configured = self._configured.apply(self.commands, change)
        self.put(DEFAULT_USER, self.default.rules.apply(self.commands, change))

    def authenticate(self, name: bytes, password: bytes) -> User | None:
        """The user of that name when it is on and the password is one of its.

        The work is the same whether there is such a user or not, and which of its passwords matches.
        """
        user = self.users.get(name)
        passwords = user.rules.passwords if user is not None else ()
        # What is longer is nobody's password, and hashing it would hold other clients up.
        given = hash_password(password[:LONGEST_PASSWORD])
        matching = sum(hmac.compare_digest(given, known) for known in passwords or (_NOBODYS_PASSWORD,))
        known = bool(passwords and matching and len(password) <= LONGEST_PASSWORD)
        if user is not None and user.rules.enabled and (user.rules.nopass or known):
            return user
        return None

    def refuses_peer(self, host: str, *, protected: bool) -> bool:
        """Whether protected mode keeps out who connects from that address over TCP."""
        return protected and self.default.rules.nopass and not _is_loopback(host)

    def check(self, client: Client, command: Command, request: Sequence[bytes]) -> None:
        """Raises CommandError when the client's user may not do what it asks for, and logs that.

        `command` is that of the subcommand where there is one.
        """
        for _ in self.checking(client, command, request):
            pass

    def checking(
        self, client: Client, command: Command, request: Sequence[bytes]
    ) -> Generator[None, None, None]:
        """Does what `check` does, by the rules that are the user's now; yields between turns."""
        user = client.user
        if user.unrestricted:
            return
        denial = yield from user.rules.search(self.commands, command, request)
        if denial is None:
            return
        self._log_denial(client, denial, command, request)
        if denial.reason is Reason.KEY:
            raise CommandError("NOPERM No permissions to access a key")
        raise CommandError(f"NOPERM {self.explain(user, denial, command, request)}")

    def denial(self, client: Client, command: Command, request: Sequence[bytes]) -> Denial | None:
        """What of a request the client's user may not do, which is logged; None when it may do all."""
        user = client.user
        if user.unrestricted or (denial := user.rules.denial(self.commands, command, request)) is None:
            return None
        self._log_denial(client, denial, command, request)
        return denial

    def _log_denial(self, client: Client, denial: Denial, command: Command, request: Sequence[bytes]) -> None:
        by_key = denial.reason is Reason.KEY
        subject = request[denial.position] if by_key else command.name.encode()
        self.record(client, Reason.KEY if by_key else Reason.COMMAND, subject, client.user.name)

    def explain(self, user: User, denial: Denial, command: Command, request: Sequence[bytes]) -> str:
        """A denial in the words of ACL DRYRUN."""
        who = f"User {_text(user.name)} has no permissions to"
        if denial.reason is Reason.KEY:
            return f"{who} access the '{_text(request[denial.position])}' key"
        return f"{who} run the '{command.name}' command"

    def record(self, client: Client, reason: Reason, subject: bytes, username: bytes) -> None:
        """Logs that a client was refused something, with what is alike within the last minute."""
        self.denied[reason.value] += 1
        now, line = self._now(), self._describe(client)
        context = "multi" if client.executing or client.transaction is not None else "toplevel"
        subject, username = subject[:_LONGEST_LOGGED], username[:_LONGEST_LOGGED]
        what = (reason, context, subject, username)
        for entry in islice(self._log, _LOG_SCAN):
            alike = (entry.reason, entry.context, entry.subject, entry.username) == what
            if alike and now - entry.updated <= _LOG_WINDOW:
                self._log.remove(entry)
                entry.count += 1
                entry.client, entry.updated = line, now
                break
        else:
            entry = LogEntry(self._logged, *what, line, now, now)
            self._logged += 1
        self._log.appendleft(entry)
        while len(self._log) > self._log_length():
            self._log.pop()

    def log(self, count: int) -> list[tuple[LogEntry, float]]:
        """The last entries of the log, the newest first, each with its age in seconds."""
        now = self._now()
        return [(entry, max(0.0, now - entry.updated)) for entry in islice(self._log, max(0, count))]

    def forget_log(self) -> None:
        """Empties the log."""
        self._log.clear()

    def changed(self, name: bytes, rules: Iterable[bytes]) -> Rules:
        """What a user's rules would be once others are applied; nothing is changed yet.

        Raises:
            RuleError: one of them is wrong.
        """
        user = self.users.get(name)
        return (Rules() if user is None else user.rules).apply(self.commands, rules)

    def put(self, name: bytes, rules: Rules) -> None:
        """Gives a user these rules; makes it when there is none of that name."""
        user = self.users.get(name)
        if user is None:
            self.users[name] = User(name, rules)
        else:
            user.change(rules)
            self._changed.add(user)

    def delete(self, name: bytes) -> bool:
        """Deletes a user, and returns whether there was one. The default user stays."""
        user = None if name == DEFAULT_USER else self.users.pop(name, None)
        if user is None:
            return False
        self._changed.add(user)
        return True

    def take_changed(self) -> set[User]:
        """The users that were changed or deleted since this was last called."""
        changed, self._changed = self._changed, set()
        return changed

    def replace(self, users: Mapping[bytes, Rules]) -> None:
        """Lets these be the users; the default user is as configured when it is not one of them."""
        for name in self.users.keys() - users.keys():
            self.delete(name)
        for name, rules in {DEFAULT_USER: self._configured, **users}.items():
            self.put(name, rules)

    def all_rules(self) -> dict[bytes, Rules]:
        """The rules of each user as they are now."""
        return {name: user.rules for name, user in self.users.items()}

    def kept(self, changes: Mapping[bytes, Rules | None] | None = None) -> dict[bytes, Rules]:
        """The rules of the users that the file is to hold after changes; a user with None is deleted.

        A file that is kept automatically leaves out a default user that is as configured, so that another
        `requirepass` holds at the next start.
        """
        rules = self.all_rules()
        for name, change in (changes or {}).items():
            rules.pop(name, None)
            if change is not None:
                rules[name] = change
        if self.automatic and rules[DEFAULT_USER] == self._configured:
            del rules[DEFAULT_USER]
        return rules

    def save(self, content: bytes) -> None:
        """Replaces the file, durably. Blocks; one call at a time may. Raises OSError."""
        assert self.path is not None
        if self.automatic:
            replace_file(self._files, self.path, content)
        else:
            rewrite_file(self._files, self.path, [content], _MODE)

    def read(self) -> dict[bytes, Rules]:
        """The users in the file. Blocks. Raises CommandError when it cannot be read, or holds errors."""
        assert self.path is not None
        try:
            content = read_file(self.path)
        except OSError as error:
            raise CommandError(
                f"ERR Error loading ACLs, opening file '{self.path}': {error.strerror}"
            ) from error
        return parse_users(self.commands, content, str(self.path))


def describe_users(users: Mapping[bytes, Rules]) -> list[bytes]:
    """A line of a file for each user, by name."""
    return [b"user %b %b" % (name, rules.describe()) for name, rules in sorted(users.items())]


def file_of_users(users: Mapping[bytes, Rules]) -> bytes:
    """The content of a file that holds the users."""
    return b"".join(line + b"\n" for line in describe_users(users))


def parse_users(commands: Commands, content: bytes, where: str) -> dict[bytes, Rules]:
    """The users in the content of a file named `where`. Raises CommandError, which names every bad line."""
    users: dict[bytes, Rules] = {}
    errors = []
    for number, line in enumerate(content.split(b"\n"), 1):
        words = line.strip(b" \t\r\n").split(b" ")
        if words == [b""]:
            continue
        if len(words) < 2 or words[0] != b"user":
            errors.append(f"{where}:{number} should start with user keyword followed by the username. ")
            continue
        name = words[1]
        if name in users:
            errors.append(f"WARNING: Duplicate user '{_text(name)}' found on line {number}. ")
            continue
        try:
            users[name] = Rules().apply(commands, words[2:])
        except RuleError as error:
            reason = str(error)
            if reason == UNKNOWN_COMMAND:
                reason = f"Error in applying operation '{_text(error.rule)}': {reason}"
            errors.append(f"{where}:{number}: {reason}. ")
    if errors:
        raise CommandError(f"ERR {''.join(errors)}{_UNCHANGED}")
    return users


def check_username(name: bytes) -> None:
    """Raises CommandError for what cannot be the name of a user."""
    if has_space(name):
        raise CommandError("ERR Usernames can't contain spaces or null characters")


def open_access(
    commands: Commands,
    config: Config,
    directory: Path | None,
    *,
    describe: Callable[[Any], str],
    warn: Callable[[str], None],
) -> Access:
    """The users that the settings and the file of users ask for. Blocks.

    The file in a data directory, once there is one, says all about users: lines of the config file that tell
    of others are left aside, with a warning.

    Raises:
        ConfigError: the settings contradict each other, or a `user` line is wrong.
        OperatorError: the file of users cannot be read, or holds errors.
    """
    if config.aclfile and config.users:
        raise ConfigError(
            "Configuring Redis with users defined in redis.conf and at the same setting an ACL file path is"
            " invalid. This setup is very likely to lead to configuration errors and security holes, please"
            " define either an ACL file or declare users directly in your redis.conf, but not both."
        )
    automatic = not config.aclfile and directory is not None
    path = Path(config.aclfile) if config.aclfile else None
    if automatic and directory is not None:
        path = directory / FILE_NAME
    access = Access(
        commands,
        password=config.requirepass.encode("utf-8", "surrogateescape"),
        path=path,
        automatic=automatic,
        describe=describe,
        log_length=lambda: config.acllog_max_len,
    )
    access.configure(_configured_users(commands, config))
    if path is None or (automatic and not path.exists()):
        return access
    try:
        access.replace(access.read())
    except CommandError as error:
        raise OperatorError(str(error).removeprefix("ERR ").removesuffix(_UNCHANGED).rstrip()) from error
    if config.users:
        warn(f"users are those of {path}, not those of the config file")
    return access


def _configured_users(commands: Commands, config: Config) -> dict[bytes, Rules]:
    users: dict[bytes, Rules] = {}
    for words in config.users:
        name, *rules = (word.encode("utf-8", "surrogateescape") for word in words)
        try:
            check_username(name)
            if name in users:
                raise ConfigError("Duplicate user found. A user can only be defined once in config files")
            users[name] = Rules().apply(commands, rules)
        except (CommandError, RuleError) as error:
            reason = str(error).removeprefix("ERR ")
            raise ConfigError(f"Error in user declaration '{words[0]}': {reason}") from error
    return users


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
