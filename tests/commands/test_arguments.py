from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.commands.arguments import (
    clamp_range,
    expiry,
    integer,
    number,
    options,
    read_vector,
    read_vectors,
    scan_count,
    scan_cursor,
    small_integer,
    text,
)
from engram.errors import CommandError
from engram.kinds.string import INTEGER_HIGH, INTEGER_LOW


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
    assert expiry(b"EX", b"5", 70, "set") == 5070
    assert expiry(b"PX", b"5", 70, "set") == 75
    assert expiry(b"EXAT", b"5", 70, "set") == 5000
    assert expiry(b"PXAT", b"5", 70, "set") == 5
    assert expiry(b"PXAT", b"%d" % INTEGER_HIGH, 70, "set") == INTEGER_HIGH
    for option, argument in ((b"PX", b"0"), (b"PXAT", b"-1"), (b"PX", b"%d" % INTEGER_HIGH)):
        with pytest.raises(CommandError, match=r"^ERR invalid expire time in 'set' command$"):
            expiry(option, argument, 1, "set")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_as_it_is_written(value: float) -> None:
    assert number(repr(value).encode()) == value


@pytest.mark.parametrize("argument", [b"0", b"-.5", b"+1.", b"1e3", b"1E-3", b"007"])
def test_spellings_of_numbers(argument: bytes) -> None:
    assert number(argument) == float(argument)


@pytest.mark.parametrize(
    "argument", [b"", b"nan", b"inf", b"1e999", b"1_0", b" 1", b"1\n", b"0x1", b".", b"1e", b"\xb2"]
)
def test_what_is_no_finite_number(argument: bytes) -> None:
    with pytest.raises(CommandError, match=r"^ERR value is not a valid float$"):
        number(argument)


def test_options_come_in_any_order() -> None:
    assert options([], (b"A",)) == {}
    assert options([b"b", b"a", b"b"], (b"A",), (b"B",)) == {b"B": b"", b"A": b"b"}


@pytest.mark.parametrize("words", [[b"C"], [b"A"], [b"A", b"1", b"a", b"2"], [b"B", b"b"], [b"B", b"1"]])
def test_options_misused(words: list[bytes]) -> None:
    with pytest.raises(CommandError, match=r"^ERR syntax error$"):
        options(words, (b"A",), (b"B",))


def test_cursors_and_counts_of_scans() -> None:
    assert scan_cursor(b"0") == 0
    assert scan_cursor(b"18446744073709551615") == (1 << 64) - 1
    for wrong in (b"", b"-1", b"18446744073709551616", b"x"):
        with pytest.raises(CommandError, match=r"^ERR invalid cursor$"):
            scan_cursor(wrong)
    assert scan_count(b"1") == 1
    with pytest.raises(CommandError, match=r"^ERR syntax error$"):
        scan_count(b"0")


def test_small_integers() -> None:
    for argument in (b"-2147483648", b"0", b"2147483647"):
        assert small_integer(argument) == int(argument)
    wrong = r"^ERR value is out of range, value must between -2147483648 and 2147483647$"
    for argument in (b"-2147483649", b"2147483648", b"9223372036854775807"):
        with pytest.raises(CommandError, match=wrong):
            small_integer(argument)


@given(st.binary(max_size=8), st.integers(-12, 12), st.integers(-12, 12))
def test_a_range_is_clamped_as_redis_does(value: bytes, start: int, end: int) -> None:
    first, stop = clamp_range(start, end, len(value))
    assert 0 <= first <= stop <= len(value)
    low = start if start >= 0 else max(0, start + len(value))
    high = end if end >= 0 else max(0, end + len(value))
    expected = b"" if end < start < 0 else value[low : high + 1]
    assert value[first:stop] == expected


@pytest.mark.parametrize(
    ("argument", "cursor"),
    [
        (b" 7", 7),
        (b"+7", 7),
        (b"007", 7),
        (b"-00", 0),
        (b"-07", (1 << 64) - 7),
        (b"18446744073709551615", (1 << 64) - 1),
    ],
)
def test_cursors_in_forms_that_c_reads(argument: bytes, cursor: int) -> None:
    assert scan_cursor(argument) == cursor


def test_a_vector_that_is_none_is_refused() -> None:
    assert read_vector(bytes(16), 4).tolist() == [0.0] * 4
    assert read_vectors([bytes(16), bytes(16)], 4) == bytes(32)
    with pytest.raises(CommandError, match=r"^ERR wrong vector dimension: index expects 4, got 3$"):
        read_vector(bytes(12), 4)
    with pytest.raises(CommandError, match=r"^ERR invalid vector encoding$"):
        read_vectors([bytes(16), b"odd"], 4)
