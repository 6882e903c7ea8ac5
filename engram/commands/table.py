"""The one command table: dispatch, arity, COMMAND and the reference page all read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import attrs

from engram.commands.session import Barrier, Pieces, Session, Slot, Turns
from engram.commands.syntax import Argument, parse_usage
from engram.database import RECORD_OVERHEAD
from engram.errors import CommandError
from engram.index.vector_index import VectorIndex
from engram.protocol import replies

Reply = bytes | Pieces | Slot | Barrier | Turns
Handler = Callable[[Session, list[bytes]], Reply]
Run = Callable[[Session, Sequence[list[bytes]]], tuple[int, bytes]]
Throttle = Callable[[Session, list[bytes]], tuple[VectorIndex, int] | None]

# A client makes way for others after so much time.
TURN_NANOSECONDS: Final = 2_000_000

# Requests that are looked at for whether they can be carried out together. How many come after them makes
# no difference to what these cost.
LONGEST_RUN: Final = 1024

# The most words of a request whose options may come in any order and, as in Redis, more than once.
_MOST_WORDS = 1024

# What the log takes for a word of a request beside its bytes, were it a key that has lapsed.
_WORD_OVERHEAD = 16
_KEY_FLAGS = {"write": ("RW", "access", "update"), "readonly": ("RO", "access")}
_CATEGORIES = {
    "cluster": (),
    "generic": ("@keyspace",),
    "server": (),
    "transactions": ("@transaction",),
    "vector": ("@vectorset",),
}


@attrs.frozen(eq=False)
class Command:
    """One command, or a container of subcommands.

    Fields are those of Redis's command table: https://redis.io/docs/latest/commands/command/.
    `arity` counts the name; a negative one is a minimum. `keys` is (first, last, step), zeros when
    there are none. `key_flags` say what is done with the keys, `last_key_flags` what with the last one where
    that is something else. Of the ACL categories those of
    `group_categories` usually follow from the group, and containers have none of them; `more_categories` are
    those that follow neither from that nor from the flags.
    """

    name: str
    handler: Handler
    arity: int
    usage: str
    summary: str
    group: str
    flags: tuple[str, ...] = ()
    keys: tuple[int, int, int] = (0, 0, 0)
    since: str = "1.0.0"
    complexity: str = "O(1)"
    key_flags: tuple[str, ...] = attrs.field()
    last_key_flags: tuple[str, ...] = ()
    group_categories: tuple[str, ...] = attrs.field()
    more_categories: tuple[str, ...] = ()
    subcommands: Mapping[bytes, Command] = attrs.field(factory=dict)
    # Carries out requests of the least number of arguments that came one after the other, with the same
    # outcome as `handler` one by one. Returns how many, and their replies: it may leave out the last of them,
    # or all, which are then carried out one by one.
    run: Run | None = None
    # The index that a call adds rows to, and how many, if many rows there have no graph: it may have to wait.
    throttle: Throttle | None = None
    # Whether EXEC looks at a request before it carries any out: it may have to wait, or changes the database
    # that those behind it are about.
    foreseen: bool = attrs.field()
    # Bytes that a call may log beyond what its request has.
    logs_beyond: int = 0
    minimum: int = attrs.field(init=False)
    maximum: int = attrs.field(init=False)
    writes: bool = attrs.field(init=False)
    # Whether replies may tell of what clients have stored.
    shows_data: bool = attrs.field(init=False)
    # Whether one call may take much longer than another, or all take long, so that each has to be timed.
    varies: bool = attrs.field()
    arguments: tuple[Argument, ...] = attrs.field(init=False)

    @group_categories.default
    def _usual_categories(self) -> tuple[str, ...]:
        return _CATEGORIES.get(self.group, (f"@{self.group}",))

    @foreseen.default
    def _may_have_to_wait(self) -> bool:
        return self.throttle is not None

    @varies.default
    def _varies_by_complexity(self) -> bool:
        return self.complexity != "O(1)"

    @key_flags.default
    def _usual_key_flags(self) -> tuple[str, ...]:
        return next((_KEY_FLAGS[flag] for flag in self.flags if flag in _KEY_FLAGS), ())

    def __attrs_post_init__(self) -> None:
        arguments = parse_usage(self.usage)
        unbounded = 1 << 62 if any(map(_repeats, arguments)) else _MOST_WORDS
        object.__setattr__(self, "minimum", abs(self.arity))
        object.__setattr__(self, "maximum", self.arity if self.arity > 0 else unbounded)
        object.__setattr__(self, "writes", "write" in self.flags)
        object.__setattr__(self, "shows_data", self.group != "connection")
        object.__setattr__(self, "arguments", arguments)

    @property
    def categories(self) -> tuple[str, ...]:
        """The ACL categories, as Redis derives them from flags and group."""
        found = []
        if self.writes:
            found.append("@write")
        if "readonly" in self.flags:
            found.append("@read")
        if "admin" in self.flags:
            found += ["@admin", "@dangerous"]
        if not self.subcommands:
            found += self.group_categories
        found += self.more_categories
        found.append("@fast" if "fast" in self.flags else "@slow")
        return tuple(found)

    def resolve(self, request: Sequence[bytes]) -> Command:
        """The command that a request for this one means: of a container the subcommand.

        Raises CommandError when there is no such subcommand.
        """
        if not self.subcommands or len(request) < 2:
            return self
        command = self.subcommands.get(request[1].lower())
        if command is None:
            word = request[1][:128].decode("utf-8", "surrogateescape")
            raise CommandError(f"ERR unknown subcommand '{word}'. Try {self.name.upper()} HELP.")
        return command

    def key_positions(self, arguments: Sequence[bytes]) -> list[int]:
        """Where the keys are in a request, name included."""
        first, last, step = self.keys
        if not first:
            return []
        end = last if last >= 0 else len(arguments) + last
        return list(range(first, end + 1, step))

    def key_uses(self, arguments: Sequence[bytes]) -> list[tuple[int, tuple[str, ...]]]:
        """Where the keys are in a request, name included, and what is done with each."""
        uses = [(position, self.key_flags) for position in self.key_positions(arguments)]
        if self.last_key_flags and uses:
            uses[-1] = uses[-1][0], self.last_key_flags
        return uses


@attrs.frozen
class CommandTable:
    """All commands, by lower-case name and by the spellings that clients use, which need no lower case."""

    by_name: Mapping[bytes, Command]
    by_spelling: Mapping[bytes, Command]

    def find(self, request: Sequence[bytes]) -> Command:
        """The command, or subcommand, that a request is for.

        Raises:
            CommandError: there is no such command.
        """
        command = self.by_spelling.get(request[0]) or self.by_name.get(request[0].lower())
        if command is None:
            raise unknown_command(request)
        return command.resolve(request)


def _repeats(argument: Argument) -> bool:
    """Whether there may be any number of these."""
    return argument.multiple or any(map(_repeats, argument.arguments))


def container(name: str, subcommands: Iterable[Command], **fields: str) -> Command:
    """A command that only holds subcommands; theirs are named `container|subcommand`."""
    table = {command.name.partition("|")[2].encode(): command for command in subcommands}

    def handle(session: Session, arguments: list[bytes]) -> Reply:
        raise wrong_arity(name)

    return Command(
        name,
        handle,
        arity=-2,
        usage="",
        summary=fields["summary"],
        group=fields["group"],
        since=fields.get("since", "1.0.0"),
        complexity="Depends on subcommand.",
        subcommands=table,
    )


def help_command(name: str, group: str, lines: Iterable[str]) -> Command:
    """The HELP subcommand of a container."""
    reply = replies.array(map(replies.simple, lines))
    return Command(
        f"{name}|help",
        lambda session, arguments: reply,
        2,
        "",
        "Returns helpful text about the different subcommands.",
        group,
        ("loading", "stale"),
        since="5.0.0",
    )


def check_arity(command: Command, arguments: Sequence[bytes]) -> None:
    """Raises CommandError when a request has too few or too many arguments."""
    if not command.minimum <= len(arguments) <= command.maximum:
        raise wrong_arity(command.name)


def log_room(command: Command, arguments: Sequence[bytes]) -> int:
    """Bytes that a request may take in the log, with the end of each lapsed key that it names."""
    words = 2 * sum(map(len, arguments)) + _WORD_OVERHEAD * len(arguments)
    return words + command.logs_beyond + RECORD_OVERHEAD


def wrong_arity(name: str) -> CommandError:
    """The error for a number of arguments that a command does not take, in Redis's words."""
    return CommandError(f"ERR wrong number of arguments for '{name}' command")


def unknown_command(arguments: Sequence[bytes]) -> CommandError:
    """The error for a command that is not in the table, in Redis's words."""
    text = b"ERR unknown command '%b'" % arguments[0][:128]
    if len(arguments) > 1:
        shown = b""
        for argument in arguments[1:]:
            if len(shown) >= 128:
                break
            shown += b"'%b' " % argument[: 128 - len(shown)]
        text += b", with args beginning with: " + shown
    return CommandError(text.decode("utf-8", "surrogateescape"))
