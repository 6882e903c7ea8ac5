"""COMMAND: the table, as clients ask for it. https://redis.io/docs/latest/commands/command/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import repeat
from typing import TypeVar

import attrs

from engram.commands.arguments import SYNTAX_ERROR, text
from engram.commands.limits import check_reply
from engram.commands.long_work import ELEMENTS_A_TURN, array_by_slices
from engram.commands.session import Pieces, Session
from engram.commands.syntax import Argument
from engram.commands.table import Command, Reply, check_arity, container, help_command
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.glob import compile_glob
from engram.protocol.replies import Encoder

T = TypeVar("T")

# So many parts of a reply become one where they are short.
_JOINED = 64
_JOINED_BYTES = 4096


def command_info(command: Command, encoder: Encoder) -> bytes:
    """A command's entry in COMMAND: ten fields."""
    first, last, step = command.keys
    specifications = (_key_specification(keys, flags, encoder) for keys, flags in _key_ranges(command))
    return replies.array(
        (
            _bulk(command.name),
            replies.integer(command.arity),
            encoder.set(map(replies.simple, command.flags)),
            replies.integer(first),
            replies.integer(last),
            replies.integer(step),
            encoder.set(map(replies.simple, command.categories)),
            encoder.set(()),
            encoder.set(specifications),
            encoder.set(command_info(each, encoder) for each in command.subcommands.values()),
        )
    )


def command_docs(command: Command, encoder: Encoder) -> bytes:
    """A command's entry in COMMAND DOCS, without its name."""
    pairs = [
        (_bulk("summary"), _bulk(command.summary)),
        (_bulk("since"), _bulk(command.since)),
        (_bulk("group"), _bulk(command.group)),
        (_bulk("complexity"), _bulk(command.complexity)),
    ]
    if command.arguments:
        described = replies.array(_arguments(command, encoder))
        pairs.append((_bulk("arguments"), described))
    if command.subcommands:
        inner = ((_bulk(each.name), command_docs(each, encoder)) for each in command.subcommands.values())
        pairs.append((_bulk("subcommands"), encoder.map(inner)))
    return encoder.map(pairs)


def _bulk(word: str) -> bytes:
    return replies.bulk(word.encode())


def _arguments(command: Command, encoder: Encoder) -> Iterator[bytes]:
    last_range = max(0, len(_key_ranges(command)) - 1)
    keys = 0
    for argument in command.arguments:
        yield _argument(argument, encoder, min(keys, last_range))
        keys += argument.type == "key"


def _argument(argument: Argument, encoder: Encoder, key_range: int) -> bytes:
    pairs = [(_bulk("name"), _bulk(argument.name)), (_bulk("type"), _bulk(argument.type))]
    if not argument.arguments:
        pairs.append((_bulk("display_text"), _bulk(argument.name)))
    if argument.type == "key":
        pairs.append((_bulk("key_spec_index"), replies.integer(key_range)))
    if argument.token is not None:
        pairs.append((_bulk("token"), _bulk(argument.token)))
    flags = [name for name in ("optional", "multiple") if getattr(argument, name)]
    if flags:
        pairs.append((_bulk("flags"), encoder.set(map(replies.simple, flags))))
    if argument.arguments:
        inner = replies.array(_argument(each, encoder, key_range) for each in argument.arguments)
        pairs.append((_bulk("arguments"), inner))
    return encoder.map(pairs)


def _key_ranges(command: Command) -> list[tuple[tuple[int, int, int], tuple[str, ...]]]:
    """(first, last, step) of keys with which the same is done, and what."""
    first, last, step = command.keys
    if not first:
        return []
    if not command.last_key_flags:
        return [(command.keys, command.key_flags)]
    return [((first, last - step, step), command.key_flags), ((last, last, step), command.last_key_flags)]


def _key_specification(keys: tuple[int, int, int], flags: tuple[str, ...], encoder: Encoder) -> bytes:
    first, last, step = keys

    def pairs(**fields: int) -> bytes:
        return encoder.map((_bulk(name), replies.integer(value)) for name, value in fields.items())

    def search(kind: str, specification: bytes) -> bytes:
        return encoder.map(((_bulk("type"), _bulk(kind)), (_bulk("spec"), specification)))

    relative = last if last < 0 else last - first
    return encoder.map(
        (
            (_bulk("flags"), encoder.set(map(replies.simple, flags))),
            (_bulk("begin_search"), search("index", pairs(index=first))),
            (_bulk("find_keys"), search("range", pairs(lastkey=relative, keystep=step, limit=0))),
        )
    )


class _Introspection:
    """The commands that tell of a table, by lower-case names, in which they are themselves."""

    def __init__(self, table: Mapping[bytes, Command]) -> None:
        self._table = table
        self._info_of = cache(command_info)
        self._docs_of = cache(_named_docs)

    @cached_property
    def _named(self) -> Mapping[bytes, Command]:
        """All commands by the lower-case names that INFO and DOCS know them by."""
        named: dict[bytes, Command] = {}
        for name, command in self._table.items():
            named[name] = named[name + b"|"] = command
            named |= {name + b"|" + part: each for part, each in command.subcommands.items()}
        return named

    def _described(
        self,
        session: Session,
        names: list[bytes],
        describe: Callable[[Command, Encoder], bytes],
        missing: bytes,
    ) -> list[bytes]:
        """What is said of each command named, as often as it is; raises CommandError for too much.

        There may be many names, which take no step each.
        """
        encoder, named = session.encoder, self._named
        lower = list(map(bytes.lower, names))
        known = {name: describe(named[name], encoder) for name in set(filter(named.__contains__, lower))}
        found = list(map(known.get, lower, repeat(missing)))
        check_reply(session, sum(map(len, found)))
        return found

    def everything(self, session: Session, arguments: list[bytes]) -> bytes:
        """COMMAND: all entries."""
        return replies.array(self._info_of(each, session.encoder) for each in self._table.values())

    def info(self, session: Session, arguments: list[bytes]) -> Reply:
        """COMMAND INFO."""
        if len(arguments) == 2:
            return self.everything(session, arguments)
        found = self._described(session, arguments[2:], self._info_of, session.encoder.null)
        return _joined(replies.array_header(len(found)), found)

    def docs(self, session: Session, arguments: list[bytes]) -> Reply:
        """COMMAND DOCS."""
        if len(arguments) == 2:
            found = [self._docs_of(each, session.encoder) for each in self._table.values()]
        else:
            found = list(filter(None, self._described(session, arguments[2:], self._docs_of, b"")))
        # Each is a name with what is said of it.
        return _joined(session.encoder.map_header(len(found)), found)

    def count(self, session: Session, arguments: list[bytes]) -> bytes:
        """COMMAND COUNT."""
        return replies.integer(len(self._table))

    def _keyed(self, request: list[bytes]) -> Command:
        """The command that a request is for; raises CommandError when it has no keys."""
        command = self._table.get(request[0].lower())
        if command is not None and command.subcommands and len(request) > 1:
            command = command.subcommands.get(request[1].lower())
        if command is None:
            raise CommandError("ERR Invalid command specified")
        if not command.keys[0]:
            raise CommandError("ERR The command has no key arguments")
        try:
            check_arity(command, request)
        except CommandError as error:
            raise CommandError("ERR Invalid number of arguments specified for command") from error
        return command

    def get_keys(self, session: Session, arguments: list[bytes]) -> Reply:
        """COMMAND GETKEYS."""
        request = arguments[2:]
        keys = list(map(request.__getitem__, self._keyed(request).key_positions(request)))
        return array_by_slices(session, keys, ELEMENTS_A_TURN, partial(map, replies.bulk))

    def get_keys_and_flags(self, session: Session, arguments: list[bytes]) -> Reply:
        """COMMAND GETKEYSANDFLAGS."""
        request, encoder = arguments[2:], session.encoder
        encoded: dict[tuple[str, ...], bytes] = {}

        def encode(uses: Sequence[tuple[int, tuple[str, ...]]]) -> Iterator[bytes]:
            for position, flags in uses:
                if flags not in encoded:
                    encoded[flags] = encoder.set(map(replies.simple, flags))
                yield b"*2\r\n" + replies.bulk(request[position]) + encoded[flags]

        uses = self._keyed(request).key_uses(request)
        return array_by_slices(session, uses, ELEMENTS_A_TURN, encode)

    def listing(self, session: Session, arguments: list[bytes]) -> bytes:
        """COMMAND LIST."""
        listed = [
            each for command in self._table.values() for each in (command, *command.subcommands.values())
        ]
        if len(arguments) > 2:
            if len(arguments) != 5 or arguments[2].upper() != b"FILTERBY":
                raise CommandError(SYNTAX_ERROR)
            match arguments[3].upper():
                case b"PATTERN":
                    matches = compile_glob(arguments[4].lower())
                    listed = [each for each in listed if matches(each.name.encode())]
                case b"ACLCAT":
                    category = f"@{text(arguments[4]).lower()}"
                    listed = [each for each in listed if category in each.categories]
                case b"MODULE":
                    listed = []
                case _:
                    raise CommandError(SYNTAX_ERROR)
        return replies.bulk_array(each.name.encode() for each in listed)


def _joined(header: bytes, found: Sequence[bytes]) -> Pieces:
    """What is found one after the other; what is short is joined, what is long is not copied."""
    parts = [header]
    for start in range(0, len(found), _JOINED):
        some = found[start : start + _JOINED]
        parts += (b"".join(some),) if sum(map(len, some)) <= _JOINED_BYTES else some
    return Pieces(parts)


def _named_docs(command: Command, encoder: Encoder) -> bytes:
    return _bulk(command.name) + command_docs(command, encoder)


def introspection(table: Mapping[bytes, Command]) -> Command:
    """The COMMAND command over a table of lower-case names (itself included, once it is added)."""
    told = _Introspection(table)
    parts = (*_parts(told), attrs.evolve(help_command("command", _GROUP, _HELP), more_categories=_CATEGORIES))
    summary = "Returns detailed information about all commands."
    held = container("command", parts, summary=summary, group=_GROUP, since=_SINCE)
    return Command(
        "command",
        told.everything,
        -1,
        "",
        summary,
        _GROUP,
        _FLAGS,
        since=_SINCE,
        complexity="O(N) where N is the number of commands",
        more_categories=_CATEGORIES,
        subcommands=held.subcommands,
    )


def _parts(told: _Introspection) -> tuple[Command, ...]:
    part = partial(Command, group=_GROUP, flags=_FLAGS, more_categories=_CATEGORIES)
    return (
        part("command|count", told.count, 2, "", "Returns a count of commands.", since=_SINCE),
        part(
            "command|info",
            told.info,
            -2,
            "[command-name [command-name ...]]",
            "Returns information about one, multiple or all commands.",
            since=_SINCE,
            complexity="O(N) where N is the number of commands to look up",
        ),
        part(
            "command|docs",
            told.docs,
            -2,
            "[command-name [command-name ...]]",
            "Returns documentary information about one, multiple or all commands.",
            since="7.0.0",
            complexity="O(N) where N is the number of commands to look up",
        ),
        part(
            "command|getkeys",
            told.get_keys,
            -3,
            "command [arg ...]",
            "Extracts the key names from an arbitrary command.",
            since=_SINCE,
            complexity="O(N) where N is the number of arguments to the command",
        ),
        part(
            "command|getkeysandflags",
            told.get_keys_and_flags,
            -3,
            "command [arg ...]",
            "Extracts the key names from an arbitrary command, and what it does with them.",
            since="7.0.0",
            complexity="O(N) where N is the number of arguments to the command",
        ),
        part(
            "command|list",
            told.listing,
            -2,
            "[FILTERBY (MODULE module-name | ACLCAT category | PATTERN pattern)]",
            "Returns a list of command names.",
            since="7.0.0",
            complexity="O(N) where N is the number of commands",
        ),
    )


_GROUP, _FLAGS, _CATEGORIES, _SINCE = "server", ("loading", "stale"), ("@connection",), "2.8.13"

_HELP = (
    "COMMAND <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "(no subcommand)",
    "    Return details about all commands.",
    "COUNT",
    "    Return the total number of commands in this server.",
    "LIST [FILTERBY (MODULE module-name | ACLCAT category | PATTERN pattern)]",
    "    Return a list of all commands in this server.",
    "INFO [<command-name> ...]",
    "    Return details about multiple commands.",
    "DOCS [<command-name> ...]",
    "    Return documentation details about multiple commands.",
    "GETKEYS <full-command>",
    "    Return the keys from a full command.",
    "GETKEYSANDFLAGS <full-command>",
    "    Return the keys and the access flags from a full command.",
    "HELP",
    "    Print this help.",
)
