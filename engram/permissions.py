"""What a user may do: rules about commands and keys, and passwords, as ACL SETUSER takes them.

They are Redis's: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/.
Channels are kept and shown only, since there is no publishing here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import groupby
from operator import itemgetter
from typing import Final, Literal, Protocol

import attrs

from engram.config import LONGEST_PASSWORD
from engram.key_patterns import KeyMatcher, KeyPattern

_SYNTAX: Final = "Syntax error"
UNKNOWN_COMMAND: Final = "Unknown command or category name in ACL"
_BAD_HASH: Final = (
    "The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters"
)
_NO_SUCH_PASSWORD: Final = "The password you are trying to remove from the user does not exist"  # noqa: S105
_USELESS_PATTERN: Final = (
    "Adding a pattern after the * pattern (or the '{}' flag) is not valid and does not have any effect. Try"
    " '{}' to start with an empty list of {}"
)

_HASH: Final = re.compile(rb"[0-9a-f]{64}")
_SPACE: Final = re.compile(rb"[\s\0]")

_WRITES: Final = frozenset({"insert", "update", "delete"})


class Command(Protocol):
    """What is asked of a command: see `engram.commands.table`."""

    @property
    def name(self) -> str: ...
    @property
    def flags(self) -> tuple[str, ...]: ...
    @property
    def categories(self) -> tuple[str, ...]: ...
    @property
    def subcommands(self) -> Mapping[bytes, Command]: ...

    def key_uses(self, arguments: Sequence[bytes], /) -> list[tuple[int, tuple[str, ...]]]: ...


Commands = Mapping[bytes, Command]
"""The containers and plain commands by lower-case name."""


Use = tuple[list[int], bool, bool]
"""The positions of keys in a request, whether they are read, and whether they are written."""


class RuleError(ValueError):
    """A rule is not one; the text says why, in Redis's words. `rule` is what it was, selectors joined."""

    def __init__(self, rule: bytes, reason: str) -> None:
        self.rule = rule
        super().__init__(reason)


class UnmatchedParenthesisError(RuleError):
    """A selector is opened and not closed."""


class Reason(Enum):
    """Why a client was refused, the more telling the later."""

    COMMAND = "command"
    KEY = "key"
    AUTHENTICATION = "auth"


@attrs.frozen
class Denial:
    """What a user may not do: run the command, or use the key at `position` of the request."""

    reason: Literal[Reason.COMMAND, Reason.KEY]
    position: int = 0


@attrs.frozen
class CommandRule:
    """`+target` or `-target`; a target is `get`, `client|list`, `select|0` or `@read`."""

    allows: bool
    target: bytes

    def describe(self) -> bytes:
        """The rule as it is written."""
        return (b"+" if self.allows else b"-") + self.target


@attrs.frozen
class Selector:
    """One set of rules about commands and keys; a user has one or more, each sufficient.

    `all_commands` says what holds for a command that none of `commands` is about.
    """

    all_commands: bool = False
    commands: tuple[CommandRule, ...] = ()
    all_keys: bool = False
    keys: tuple[KeyPattern, ...] = ()
    all_channels: bool = False
    channels: tuple[bytes, ...] = ()
    # What was found out about commands, by name.
    _verdicts: dict[str, tuple[bool, frozenset[bytes]]] = attrs.field(
        init=False, factory=dict, eq=False, repr=False
    )
    # Made when they are first needed: by whether keys are read, and whether they are written.
    _matchers: dict[tuple[bool, bool], KeyMatcher] = attrs.field(
        init=False, factory=dict, eq=False, repr=False
    )

    @property
    def unrestricted(self) -> bool:
        """Whether it allows every command on every key."""
        return self.all_keys and self.all_commands and all(rule.allows for rule in self.commands)

    def first_refused(
        self, request: Sequence[bytes], uses: Iterable[Use]
    ) -> Generator[None, None, int | None]:
        """The position of the first key that must not be used so, None without one. Yields between turns."""
        for positions, reads, writes in uses:
            matcher = self._matchers.get((reads, writes))
            if matcher is None:
                matcher = self._matchers[reads, writes] = KeyMatcher(
                    known.pattern for known in self.keys if known.reads >= reads and known.writes >= writes
                )
            for start in range(0, len(positions), matcher.keys_a_turn):
                if start:
                    yield
                some = positions[start : start + matcher.keys_a_turn]
                if (refused := matcher.first_unmatched(request, some)) is not None:
                    return refused
        return None

    def allows(self, commands: Commands, command: Command, request: Sequence[bytes] = ()) -> bool:
        """Whether the command may be run; a request is looked at for a first argument that is allowed."""
        verdict = self._verdicts.get(command.name)
        if verdict is None:
            verdict = self._verdicts[command.name] = self._judge(commands, command)
        allowed, first_arguments = verdict
        return allowed or (len(request) > 1 and request[1].lower() in first_arguments)

    def _judge(self, commands: Commands, command: Command) -> tuple[bool, frozenset[bytes]]:
        """Whether the command is allowed, and the first arguments with which it is even so."""
        name = command.name.encode()
        container = commands.get(name.partition(b"|")[0], command)
        targets = {
            name,
            container.name.encode(),
            *(category.encode() for each in (container, command) for category in each.categories),
        }
        first_arguments: set[bytes] = set()
        # The last word on a command counts; that on a first argument does no more than allow it.
        for rule in reversed(self.commands):
            if rule.target in targets:
                return rule.allows, frozenset(first_arguments)
            head, _, argument = rule.target.partition(b"|")
            if head == name and not command.subcommands:
                first_arguments.add(argument)
        return self.all_commands, frozenset(first_arguments)

    def apply(self, commands: Commands, rule: bytes) -> Selector:
        """The selector once a rule is applied. Raises RuleError."""
        match rule.lower():
            case b"allcommands" | b"+@all":
                return attrs.evolve(self, all_commands=True, commands=())
            case b"nocommands" | b"-@all":
                return attrs.evolve(self, all_commands=False, commands=())
            case b"allkeys" | b"~*":
                return attrs.evolve(self, all_keys=True, keys=())
            case b"resetkeys":
                return attrs.evolve(self, all_keys=False, keys=())
            case b"allchannels" | b"&*":
                return attrs.evolve(self, all_channels=True, channels=())
            case b"resetchannels":
                return attrs.evolve(self, all_channels=False, channels=())
            case b"":
                return self
        match rule[:1]:
            case b"+" | b"-":
                return self._apply_command(commands, rule)
            case b"~" | b"%":
                return self.add_keys((rule,))
            case b"&":
                return self._apply_channel(rule)
        raise RuleError(rule, _SYNTAX)

    def _apply_command(self, commands: Commands, rule: bytes) -> Selector:
        allows, target = rule[:1] == b"+", rule[1:].lower()
        if target.startswith(b"@"):
            if target[1:].decode("utf-8", "replace") not in categories(commands):
                raise RuleError(rule, UNKNOWN_COMMAND)
        elif _find(commands, target) is None:
            container, bar, last = target.rpartition(b"|")
            command = _find(commands, container)
            if not allows or not bar or command is None:
                raise RuleError(rule, UNKNOWN_COMMAND)
            if b"|" in container:
                raise RuleError(rule, "Allowing first-arg of a subcommand is not supported")
            if not last or has_space(last):
                raise RuleError(rule, _SYNTAX)
            if command.subcommands:
                raise RuleError(rule, UNKNOWN_COMMAND)
        kept = (
            other
            for other in self.commands
            if other.target != target and not other.target.startswith(target + b"|")
        )
        return attrs.evolve(self, commands=(*kept, CommandRule(allows, target)))

    def add_keys(self, rules: Iterable[bytes]) -> Selector:
        """The selector once rules that name patterns of keys are applied. Raises RuleError."""
        keys = {known.pattern: known for known in self.keys}
        for rule in rules:
            if self.all_keys:
                raise RuleError(rule, _USELESS_PATTERN.format("allkeys", "resetkeys", "patterns"))
            pattern, reads, writes = _read_key_rule(rule)
            known = keys.get(pattern)
            if known is not None:
                reads, writes = reads or known.reads, writes or known.writes
            keys[pattern] = KeyPattern(pattern, reads, writes)
        return attrs.evolve(self, keys=tuple(keys.values()))

    def _apply_channel(self, rule: bytes) -> Selector:
        if self.all_channels:
            raise RuleError(rule, _USELESS_PATTERN.format("allchannels", "resetchannels", "channels"))
        _check_pattern(rule, rule[1:])
        if rule[1:] in self.channels:
            return self
        return attrs.evolve(self, channels=(*self.channels, rule[1:]))

    def describe_commands(self) -> bytes:
        """The rules about commands."""
        return b" ".join(
            (b"+@all" if self.all_commands else b"-@all", *(rule.describe() for rule in self.commands))
        )

    def describe_keys(self) -> bytes:
        """The rules about keys."""
        return b"~*" if self.all_keys else b" ".join(pattern.describe() for pattern in self.keys)

    def describe_channels(self) -> bytes:
        """The rules about channels."""
        return b"&*" if self.all_channels else b" ".join(b"&" + channel for channel in self.channels)

    def describe(self) -> bytes:
        """All its rules; applied to an empty selector they make this one."""
        channels = self.describe_channels()
        parts = (
            self.describe_keys(),
            b"" if self.all_channels else b"resetchannels",
            channels,
            self.describe_commands(),
        )
        return b" ".join(filter(None, parts))


def has_space(value: bytes) -> bool:
    """Whether a value would break a line of users. (Redis refuses spaces and null bytes only.)"""
    return _SPACE.search(value) is not None


def _names_keys(rule: bytes) -> bool:
    """Whether a rule names a pattern of keys, as any number of rules one after the other may."""
    return rule[:1] in (b"~", b"%") and rule != b"~*"


def _read_key_rule(rule: bytes) -> tuple[bytes, bool, bool]:
    """The pattern of such a rule, and whether keys may be read and written. Raises RuleError."""
    reads = writes = True
    if rule[:1] == b"~":
        pattern = rule[1:]
    else:
        letters, _, pattern = rule[1:].partition(b"~")
        if letters.upper() not in (b"R", b"W", b"RW", b"WR"):
            raise RuleError(rule, _SYNTAX)
        reads, writes = b"R" in letters.upper(), b"W" in letters.upper()
    _check_pattern(rule, pattern)
    return pattern, reads, writes


def _check_pattern(rule: bytes, pattern: bytes) -> None:
    if has_space(pattern):
        raise RuleError(rule, _SYNTAX)


def _uses(command: Command, request: Sequence[bytes]) -> Iterator[Use]:
    """What is done with the keys of a request, those that come together at a time."""
    for flags, some in groupby(command.key_uses(request), itemgetter(1)):
        reads = "access" in flags
        if command.name == "set":
            reads = any(option.upper() == b"GET" for option in request[3:])
        yield list(map(itemgetter(0), some)), reads, not _WRITES.isdisjoint(flags)


def _find(commands: Commands, name: bytes) -> Command | None:
    container, bar, subcommand = name.partition(b"|")
    command = commands.get(container)
    return command.subcommands.get(subcommand) if command is not None and bar else command


REDIS_CATEGORIES: Final = (
    "keyspace",
    "read",
    "write",
    "set",
    "sortedset",
    "list",
    "hash",
    "string",
    "bitmap",
    "hyperloglog",
    "geo",
    "stream",
    "pubsub",
    "admin",
    "fast",
    "slow",
    "blocking",
    "dangerous",
    "connection",
    "transaction",
    "scripting",
)


def categories(commands: Commands) -> tuple[str, ...]:
    """The names of all categories: Redis's in its order, then those that only engram's commands have."""
    own = {category[1:]: None for command in all_commands(commands) for category in command.categories}
    return tuple(dict.fromkeys((*REDIS_CATEGORIES, *own)))


def all_commands(commands: Commands) -> Iterator[Command]:
    """Every command, each container followed by its subcommands."""
    for command in commands.values():
        yield command
        yield from command.subcommands.values()


@attrs.frozen
class Rules:
    """All that is kept of a user but the name. `passwords` are SHA-256 in hexadecimal digits.

    A new user is off, and may do nothing.
    """

    enabled: bool = False
    nopass: bool = False
    sanitizes_payload: bool = True
    passwords: tuple[bytes, ...] = ()
    root: Selector = Selector()
    selectors: tuple[Selector, ...] = ()

    @property
    def unrestricted(self) -> bool:
        """Whether every command on every key is allowed."""
        return any(selector.unrestricted for selector in (self.root, *self.selectors))

    def denial(self, commands: Commands, command: Command, request: Sequence[bytes]) -> Denial | None:
        """Why the request, for that command, is not allowed; None when it is.

        Of the selectors' reasons it is that of the one that comes closest.
        """
        search = self.search(commands, command, request)
        while True:
            try:
                next(search)
            except StopIteration as end:
                found: Denial | None = end.value
                return found

    def search(
        self, commands: Commands, command: Command, request: Sequence[bytes]
    ) -> Generator[None, None, Denial | None]:
        """Finds what `denial` does; yields between turns where the request has many keys."""
        closest = Denial(Reason.COMMAND)
        uses: list[Use] | None = None
        for selector in (self.root, *self.selectors):
            if "no_auth" not in command.flags and not selector.allows(commands, command, request):
                continue
            if selector.all_keys:
                return None
            if uses is None:
                uses = list(_uses(command, request))
            position = yield from selector.first_refused(request, uses)
            if position is None:
                return None
            if position > closest.position:
                closest = Denial(Reason.KEY, position)
        return closest

    def apply(self, commands: Commands, rules: Iterable[bytes]) -> Rules:
        """The rules of the user once others are applied, one after the other. Raises RuleError."""
        changed = self
        for of_keys, some in groupby(_join_selectors(rules), _names_keys):
            if of_keys:
                changed = attrs.evolve(changed, root=changed.root.add_keys(some))
                continue
            for rule in some:
                changed = changed._apply_one(commands, rule)
        return changed

    def _apply_one(self, commands: Commands, rule: bytes) -> Rules:
        match rule.lower():
            case b"on":
                return attrs.evolve(self, enabled=True)
            case b"off":
                return attrs.evolve(self, enabled=False)
            case b"nopass":
                return attrs.evolve(self, nopass=True, passwords=())
            case b"resetpass":
                return attrs.evolve(self, nopass=False, passwords=())
            case b"sanitize-payload":
                return attrs.evolve(self, sanitizes_payload=True)
            case b"skip-sanitize-payload":
                return attrs.evolve(self, sanitizes_payload=False)
            case b"clearselectors":
                return attrs.evolve(self, selectors=())
            case b"reset":
                return Rules()
        match rule[:1]:
            case b">" | b"<" | b"#" | b"!":
                return self._apply_password(rule)
            case b"(" if rule.endswith(b")"):
                return attrs.evolve(self, selectors=(*self.selectors, _read_selector(commands, rule)))
        return attrs.evolve(self, root=self.root.apply(commands, rule))

    def _apply_password(self, rule: bytes) -> Rules:
        kind, value = rule[:1], rule[1:]
        if kind in (b">", b"<"):
            if len(value) > LONGEST_PASSWORD:
                raise RuleError(rule[:1], f"The password must have no more than {LONGEST_PASSWORD} bytes")
            value = hash_password(value)
        elif not _HASH.fullmatch(value):
            raise RuleError(rule, _BAD_HASH)
        if kind in (b">", b"#"):
            passwords = dict.fromkeys((*self.passwords, value))
            return attrs.evolve(self, nopass=False, passwords=tuple(passwords))
        if value not in self.passwords:
            raise RuleError(rule, _NO_SUCH_PASSWORD)
        return attrs.evolve(self, passwords=tuple(other for other in self.passwords if other != value))

    @property
    def flags(self) -> tuple[bytes, ...]:
        """The words for what is on and off."""
        words = (
            b"on" if self.enabled else b"off",
            b"nopass" if self.nopass else b"",
            b"sanitize-payload" if self.sanitizes_payload else b"skip-sanitize-payload",
        )
        return tuple(filter(None, words))

    def describe(self) -> bytes:
        """The rules in one line; applied to a new user they make this one."""
        return b" ".join(
            (
                *self.flags,
                *(b"#" + password for password in self.passwords),
                self.root.describe(),
                *(b"(%b)" % selector.describe() for selector in self.selectors),
            )
        )


def _read_selector(commands: Commands, rule: bytes) -> Selector:
    """The selector that a rule in parentheses makes. Raises RuleError."""
    selector = Selector()
    try:
        for of_keys, some in groupby(_inner_rules(rule), _names_keys):
            if of_keys:
                selector = selector.add_keys(some)
                continue
            for inner in some:
                selector = selector.apply(commands, inner)
    except RuleError as error:
        raise RuleError(rule, str(error)) from error
    return selector


def _inner_rules(rule: bytes) -> Iterator[bytes]:
    """The rules of a selector in parentheses. Raises RuleError."""
    for inner in rule[1:-1].split():
        # It would seem to be the end of the selector where that is described.
        if inner.endswith(b")"):
            raise RuleError(rule, _SYNTAX)
        yield inner


def _join_selectors(rules: Iterable[bytes]) -> list[bytes]:
    """The rules, each selector one of them, whether it came in one word or in several.

    Raises UnmatchedParenthesisError, which goes before whatever else is wrong with the rules.
    """
    joined: list[bytes] = []
    opened: list[bytes] = []
    for rule in rules:
        if opened:
            opened.append(rule)
            if rule.endswith(b")"):
                joined.append(b" ".join(opened))
                opened = []
        elif rule.startswith(b"(") and not rule.endswith(b")"):
            opened.append(rule)
        else:
            joined.append(rule)
    if opened:
        raise UnmatchedParenthesisError(opened[0], "Unmatched parenthesis in selector definition")
    return joined


def hash_password(password: bytes) -> bytes:
    """SHA-256 in hexadecimal digits, the form in which Redis keeps passwords."""
    return hashlib.sha256(password).hexdigest().encode()
