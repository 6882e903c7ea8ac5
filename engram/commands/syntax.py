"""The arguments of a command, read from its usage line.

The usage line is written as Redis's documentation writes it: `key value [NX | XX] [EX seconds]
[element ...]`. Words in capitals are tokens, others are values; brackets make optional, bars
alternate, dots repeat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs

_WORD = re.compile(r"\.\.\.|[\[\]|()]|[^\s\[\]|()]+")

_TYPES = {
    "key": "key",
    "index": "key",
    "newkey": "key",
    "source": "key",
    "destination": "key",
    "pattern": "pattern",
    "seconds": "integer",
    "milliseconds": "integer",
    "increment": "integer",
    "decrement": "integer",
    "cursor": "integer",
    "count": "integer",
    "database": "integer",
    "destination-db": "integer",
    "db": "integer",
    "index1": "integer",
    "index2": "integer",
    "start": "integer",
    "end": "integer",
    "offset": "integer",
    "client-id": "integer",
    "protover": "integer",
    "dimension": "integer",
    "k": "integer",
    "m": "integer",
    "n": "integer",
    # As in Redis, though they are in hexadecimal digits.
    "ifdeq-digest": "integer",
    "ifdne-digest": "integer",
    "ef": "integer",
    "recall": "double",
    "radius": "double",
    "unix-time-seconds": "unix-time",
    "unix-time-milliseconds": "unix-time",
}


@attrs.frozen
class Argument:
    """One argument, with the fields that COMMAND DOCS gives it.

    `type` is one of Redis's: key, string, integer, double, pattern, unix-time, pure-token, oneof, block.
    """

    name: str
    type: str
    token: str | None = None
    optional: bool = False
    multiple: bool = False
    arguments: tuple[Argument, ...] = ()


def parse_usage(usage: str) -> tuple[Argument, ...]:
    """The arguments of a usage line. Raises ValueError when it is malformed."""
    words = _WORD.findall(usage)
    arguments, rest = _sequence(words, closing=None)
    if rest:
        raise ValueError(f"malformed usage: {usage}")
    return tuple(arguments)


def _sequence(words: Sequence[str], closing: str | None) -> tuple[list[Argument], list[str]]:
    alternatives: list[list[Argument]] = [[]]
    rest = list(words)
    while rest and rest[0] != closing:
        word = rest.pop(0)
        current = alternatives[-1]
        if word == "|":
            alternatives.append([])
        elif word == "...":
            current[-1] = attrs.evolve(current[-1], multiple=True)
        elif word in ("[", "("):
            inner, rest = _sequence(rest, "]" if word == "[" else ")")
            if not rest:
                raise ValueError("unbalanced brackets")
            rest.pop(0)
            if word == "[" and _repeats(current, inner):
                # `key [key ...]` is one argument that may be given several times, and `key value [key value
                # ...]` one block.
                repeated = current[-len(inner) :]
                current[-len(inner) :] = [attrs.evolve(_one(repeated), multiple=True)]
            else:
                current.append(attrs.evolve(_one(inner), optional=word == "["))
        elif word in ("]", ")"):
            raise ValueError("unbalanced brackets")
        elif word == word.upper() and not word.isdigit():
            current.append(Argument(word.lower(), "pure-token", token=word))
        else:
            value = Argument(word, _TYPES.get(word, "string"))
            if current and current[-1].type == "pure-token" and not current[-1].optional:
                value = attrs.evolve(value, token=current.pop().token)
            current.append(value)
    if len(alternatives) == 1:
        return alternatives[0], rest
    choices = tuple(_one(alternative) for alternative in alternatives)
    return [Argument(choices[0].name, "oneof", arguments=choices)], rest


def _repeats(before: Sequence[Argument], inner: Sequence[Argument]) -> bool:
    if not inner or len(before) < len(inner):
        return False
    first, *rest = before[-len(inner) :]
    once = [attrs.evolve(first, token=None), *rest]
    return list(inner) == [*once[:-1], attrs.evolve(once[-1], multiple=True)]


def _one(arguments: Sequence[Argument]) -> Argument:
    if len(arguments) == 1:
        return arguments[0]
    if not arguments:
        raise ValueError("an empty group")
    return Argument(arguments[0].name, "block", arguments=tuple(arguments))
