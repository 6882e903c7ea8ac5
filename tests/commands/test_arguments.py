from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.commands.arguments import INTEGER_HIGH, INTEGER_LOW, expiry, integer, text
from engram.errors import CommandError


@given(st.integers(INTEGER_LOW, INTEGER_HIGH))
def test_an_integer_is_read_as_it_is_written(number: int) -> None:
    assert integer(b"%d" % number) == number


@given(
    st.integers().filter(lambda number: not INTEGER_LOW <= number <= INTEGER_HIGH) | st.binary(max_size=25)
)
def test_nothing_else_is_an_integer(value: int | bytes) -> None:
    argument = b"%d" % value if isinstance(value, int) else value
    if re.fullmatch(rb"0|-?[1-9][0-9]*", argument) and INTEGER_LOW <= int(argument) <= INTEGER_HIGH:
        assert integer(argument) == int(argument)
    else:
        with pytest.raises(CommandError, match=r"^ERR value is not an integer or out of range$"):
            integer(argument)


@pytest.mark.parametrize(
    "argument", [b"", b"+1", b" 1", b"1 ", b"01", b"-0", b"1_0", b"1.0", b"0x1", b"\xb2"]
)
def test_numbers_that_python_would_take(argument: bytes) -> None:
    with pytest.raises(CommandError, match=r"^ERR other words$"):
        integer(argument, "ERR other words")


@given(st.binary())
def test_text_survives_a_round_trip(argument: bytes) -> None:
    assert text(argument).encode("utf-8", "surrogateescape") == argument


def test_expiries() -> None:
    assert expiry(b"5", 1000, 70, "set") == 5070
    assert expiry(b"5", 1, 0, "set") == 5
    assert expiry(b"%d" % INTEGER_HIGH, 1, 0, "set") == INTEGER_HIGH
    for argument, base in ((b"0", 0), (b"-1", 10), (b"%d" % INTEGER_HIGH, 1)):
        with pytest.raises(CommandError, match=r"^ERR invalid expire time in 'set' command$"):
            expiry(argument, 1, base, "set")
