from __future__ import annotations

import pytest

from engram.commands.syntax import Argument, parse_usage


def test_values_tokens_and_choices() -> None:
    assert parse_usage("key value [NX | XX] [EX seconds | KEEPTTL] [element ...]") == (
        Argument("key", "key"),
        Argument("value", "string"),
        Argument(
            "nx",
            "oneof",
            optional=True,
            arguments=(Argument("nx", "pure-token", "NX"), Argument("xx", "pure-token", "XX")),
        ),
        Argument(
            "seconds",
            "oneof",
            optional=True,
            arguments=(Argument("seconds", "integer", "EX"), Argument("keepttl", "pure-token", "KEEPTTL")),
        ),
        Argument("element", "string", optional=True, multiple=True),
    )


def test_a_token_with_two_operands_is_a_block() -> None:
    assert parse_usage("[AUTH username password]") == (
        Argument(
            "username",
            "block",
            optional=True,
            arguments=(Argument("username", "string", "AUTH"), Argument("password", "string")),
        ),
    )


def test_several_values_that_repeat_together_are_a_block() -> None:
    pair = (Argument("key", "key"), Argument("value", "string"))
    pairs = Argument("key", "block", multiple=True, arguments=pair)
    triples = Argument("key", "block", multiple=True, arguments=(*pair, Argument("other", "string")))
    all_of_them = Argument("key", "block", arguments=(triples, Argument("all", "pure-token", "ALL")))
    assert parse_usage("key value [key value ...]") == (pairs,)
    assert parse_usage("count key value [key value ...] [NX]")[1:] == (
        pairs,
        Argument("nx", "pure-token", "NX", optional=True),
    )
    assert parse_usage("(key value [key value ...] | key value other [key value other ...] ALL)") == (
        Argument("key", "oneof", arguments=(pairs, all_of_them)),
    )


@pytest.mark.parametrize("usage", ["[key", "key]", "[]"])
def test_a_malformed_line_is_refused(usage: str) -> None:
    with pytest.raises(ValueError, match=r"unbalanced|malformed|empty"):
        parse_usage(usage)
