"""Requests made from the command table, for Hypothesis: as the usage of a command has them, or nearly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

from engram.commands.registry import COMMANDS
from engram.commands.syntax import Argument
from engram.commands.table import Command
from engram.config import SETTINGS

T = TypeVar("T")

DIMENSION = 4

# What a command may fail to find, and what it may find of the wrong kind.
OPENING: Sequence[Sequence[bytes]] = (
    (b"VNEW", b"index", b"%d" % DIMENSION),
    (b"SET", b"number", b"1"),
    (b"VADD", b"index", b"a", bytes(4 * DIMENSION)),
    (b"VADD", b"index", b"b", np.ones(DIMENSION, "<f4").tobytes()),
    (b"VSETATTR", b"index", b"b", b'{"n":1,"s":"text"}'),
)


def _alternatives(listed: str) -> st.SearchStrategy[bytes]:
    return st.sampled_from([word.encode() for word in listed.split()])


keys = st.sampled_from([b"a", b"b", b"number", b"index", b"other", b"", b"\x00\xff", b"*"])
vectors = st.lists(st.floats(width=32) | st.just(0.0), min_size=DIMENSION - 1, max_size=DIMENSION + 1).map(
    lambda numbers: np.array(numbers, "<f4").tobytes()
)
small_integers = st.integers(-3, 20).map(lambda number: b"%d" % number)
_edges = [2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30]
integers = small_integers | st.sampled_from([b"%d" % number for number in _edges])
oddities = st.sampled_from(
    [b"", b"nan", b"inf", b"-0", b"+1", b" 1", b"1_0", b"\xd9\xa1", b"\r\n", b"(", b"%s", b"[a-"]
)
doubles = st.floats().map(lambda number: b"%g" % number)
names = st.sampled_from(sorted(COMMANDS))
settings = st.sampled_from(sorted(SETTINGS)).map(str.encode)
texts = st.one_of(st.binary(max_size=20), vectors, oddities, integers, settings, names)
documents = st.one_of(
    _alternatives(r"""{} [] 1 null {"n":1} {"n":-0.5,"s":"text"} {"n":"1","n":2} {"n":1e400} {"n":"""),
    _alternatives(
        r"""{"s":["a","b"],"n":true} {"n":{"n":[{}]},"s":null} {"s":"\ud800\u0000"} {"":0,"a.b":0}"""
    ),
    st.sampled_from([b"", b'{"n":' + b"9" * 40 + b"}", b"[" * 2000 + b"]" * 2000, b'{"s":"\xff"}']),
)
_tokens = _alternatives(
    """( ) [ ] . .n .s .missing 1 -0.5 1e400 "text" 'a' " [1,2] ["a"] == != < >= in and or not ! && || + - * /
    % ** true null"""
)
expressions = st.one_of(
    st.sampled_from([b".n > 0", b'.s == "text" or not .n', b".n in [1,2]", b'"a" in .s', b".n / 0 < 1"]),
    st.lists(_tokens, max_size=8).map(b" ".join),
    st.sampled_from([b"(" * 5000, b"not " * 5000 + b".n", b".n" + b" + .n" * 5000, b"\xff", b""]),
)
patterns = st.one_of(
    _alternatives(r"* ? [a-z]* [^a \ [] *a*a*a*a*b in* [z-a]"),
    st.text("*?[]^-\\ab", max_size=8).map(str.encode),
)
rules = _alternatives(
    """on off nopass resetpass reset allkeys resetkeys allcommands nocommands +@all -@all +@read -@write +get
    -get +client|list -acl|whoami +@nothing ~* ~a* %R~a %W~b %RW~ %X~a ~ &* resetchannels clearselectors
    >secret <secret #0 (+get (+set + - @"""
) | st.sampled_from([b"(+get ~a)", b"#" + b"0" * 64, b"!" + b"0" * 64])

_BY_NAME = {
    "vector": vectors,
    "query": vectors,
    "member": keys,
    "element": keys,
    "attributes": documents,
    "expression": expressions,
    "pattern": patterns,
    "username": _alternatives("default reader writer no|body"),
    "rule": rules,
    "password": _alternatives("secret wrong"),
    "ip:port": _alternatives("127.0.0.1:1000 127.0.0.1:1001 127.0.0.1:6380 localhost"),
    "client-id": small_integers,
    "parameter": settings,
    "command": names,
    "command-name": names,
    "dimension": small_integers | integers,
    "timeout": small_integers | integers,
}
_BY_TYPE = {
    "key": keys,
    "integer": integers | oddities,
    "unix-time": integers | oddities,
    "double": doubles | oddities,
}


def joined(parts: Iterable[list[T]]) -> list[T]:
    """What is in all parts."""
    return list(chain.from_iterable(parts))


def leaves(commands: Iterable[Command]) -> list[Command]:
    """Commands and subcommands, containers left out."""
    found: list[Command] = []
    for command in commands:
        found += leaves(command.subcommands.values()) if command.subcommands else [command]
    return found


def value(argument: Argument) -> st.SearchStrategy[list[bytes]]:
    """Words for an argument that is there once, its token left out."""
    match argument.type:
        case "oneof":
            return st.one_of([words(each) for each in argument.arguments])
        case "block":
            return st.tuples(*map(words, argument.arguments)).map(joined)
        case "pure-token":
            return st.just([])
    usual = _BY_NAME.get(argument.name, _BY_TYPE.get(argument.type, texts))
    # One in eight is anything.
    return st.one_of(*[usual] * 7, texts).map(lambda text: [text])


def words(argument: Argument) -> st.SearchStrategy[list[bytes]]:
    """Words for an argument, as the command's usage has it."""
    token = [] if argument.token is None else [argument.token.encode()]
    once = value(argument).map(lambda found: [*token, *found])
    if argument.multiple:
        once = st.lists(once, min_size=1, max_size=4).map(joined)
    return st.just([]) | once if argument.optional else once


def requests_of(command: Command) -> st.SearchStrategy[list[bytes]]:
    """Requests that follow the command's usage, or nearly."""
    name = [word.encode() for word in command.name.split("|")]
    proper = st.tuples(*map(words, command.arguments)).map(lambda parts: [*name, *joined(parts)])
    loose = st.lists(texts | keys, max_size=6).map(lambda rest: [*name, *rest])
    return proper | proper | proper | loose


def requests_for(commands: Sequence[Command]) -> st.SearchStrategy[list[bytes]]:
    """Requests for any of these commands, and some that are for none."""
    request = st.one_of(*map(requests_of, commands), st.lists(texts, min_size=1, max_size=5))

    # Hypothesis writes a strategy out when a filter finds nothing; this one has a name.
    @st.composite
    def any_request(draw: st.DrawFn) -> list[bytes]:
        return draw(request)

    return any_request()
