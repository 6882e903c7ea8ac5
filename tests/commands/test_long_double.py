from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.commands.long_double import LongDouble, add, parse, render

# Where C's long double is what it is on x86, numpy has the same numbers.
same_as_numpy = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant != 63, reason="the long double of this machine is not that of x86"
)
texts = st.from_regex(r"[+-]?[0-9]{1,25}(\.[0-9]{0,25})?([eE][+-]?[0-9]{1,2})?", fullmatch=True).map(
    str.encode
)


def fraction(number: LongDouble | None) -> Fraction:
    assert number is not None
    assert abs(number.mantissa) < 2**64
    return number.mantissa * Fraction(2) ** number.exponent


def exact(number: np.longdouble) -> Fraction:
    mantissa, exponent = np.frexp(number)
    return Fraction(int(mantissa * np.longdouble(2) ** 64)) * Fraction(2) ** (int(exponent) - 64)


@same_as_numpy
@given(texts, texts)
def test_numbers_are_read_and_added_as_long_doubles(first: bytes, second: bytes) -> None:
    one, other = np.longdouble(first.decode()), np.longdouble(second.decode())
    assert fraction(parse(first)) == exact(one)
    assert fraction(add(parse(first), parse(second))) == exact(one + other)


@same_as_numpy
@given(texts)
def test_numbers_are_written_as_numpy_writes_them(text: bytes) -> None:
    digits = np.format_float_positional(np.longdouble(text.decode()), precision=17, unique=False, trim="-")
    number = parse(text)
    assert number is not None
    assert render(number).decode() == ("0" if digits == "-0" else digits)


@given(st.integers(-(2**63), 2**63))
def test_integers_survive(number: int) -> None:
    digits = b"%d" % number
    read = parse(digits)
    assert read is not None
    assert render(read) == digits


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_doubles_are_exact(number: float) -> None:
    assert fraction(parse(number.hex().encode())) == Fraction(number)


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        (b"0.1", b"0.1"),
        (b"-.5", b"-0.5"),
        (b"5.", b"5"),
        (b"+00012", b"12"),
        (b"-0", b"0"),
        (b"0e99999999999999999999", b"0"),
        (b"5e-18", b"0"),
        (b"-5e-18", b"0"),
        (b"3.14159265358979323846", b"3.14159265358979324"),
        (b"0x10", b"16"),
        (b"0X.8p+1", b"1"),
        (b"1e20", b"100000000000000000000"),
        (b"9" * 20 + b"." + b"9" * 4900, b"100000000000000000000"),
        (b"0" * 5000 + b"1", b"1"),
        (b"1" + b"0" * 4932 + b"e-4932", b"1"),
    ],
)
def test_digits(text: bytes, digits: bytes) -> None:
    number = parse(text)
    assert number is not None
    assert render(number) == digits


def test_the_greatest_and_the_least() -> None:
    greatest = parse(b"0x0.ffffffffffffffffp16384")
    assert greatest is not None
    assert fraction(greatest) == 2**16384 - 2**16320
    assert add(greatest, greatest) is None
    assert len(render(greatest)) == math.floor(math.log10(2) * 16384) + 1
    assert parse(b"1e4932") is not None
    assert parse(b"0x1p-16445") == LongDouble(1, -16445)
    assert parse(b"3.7e-4951") == LongDouble(1, -16445)


@pytest.mark.parametrize("text", [b"inf", b"-Infinity", b"+INF"])
def test_what_is_infinite(text: bytes) -> None:
    assert parse(text) is None
    assert add(parse(text), LongDouble(1, 0)) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b".",
        b"e5",
        b"1e",
        b"1e+",
        b" 1",
        b"1 ",
        b"1_0",
        b"0x",
        b"0x1p",
        b"nan",
        b"infin",
        b"--1",
        b"1\0",
        b"\xff",
        b"\xd9\xa1",
        b"1e4933",
        b"1e5000",
        b"1e99999999999999999999",
        b"1e-4952",
        b"1e-99999999999999999999",
        b"0x1p16384",
        b"0x1p-16447",
        b"0" * 5120,
    ],
)
def test_what_is_no_number(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - Python's own for bytes that are not ASCII is one too
        parse(text)
