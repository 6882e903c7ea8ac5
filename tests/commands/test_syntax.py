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


@pytest.mark.parametrize("usage", ["[key", "key]", "[]"])
def test_a_malformed_line_is_refused(usage: str) -> None:
    with pytest.raises(ValueError, match=r"unbalanced|malformed|empty"):
        parse_usage(usage)
