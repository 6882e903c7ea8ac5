from __future__ import annotations

import math

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.protocol import replies
from engram.protocol.replies import RESP2, RESP3, Encoder


def read(encoded: bytes) -> object:
    """The one reply in `encoded`, as an independent client reads it."""
    reader = hiredis.Reader(replyError=ValueError)
    reader.feed(encoded)
    reply = reader.gets()
    assert not reader.has_data()
    assert reader.gets() is False
    return reply


def test_constants() -> None:
    constants = [replies.OK, replies.PONG, replies.QUEUED, replies.ZERO, replies.ONE]
    assert [read(constant) for constant in constants] == [b"OK", b"PONG", b"QUEUED", 0, 1]
    assert read(replies.EMPTY_ARRAY) == []
    assert read(replies.EMPTY_BULK) == b""


def test_simple() -> None:
    assert replies.simple("string") == b"+string\r\n"


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("ERR no such key", b"-ERR no such key\r\n"),
        ("ERR two\r\nlines\n", b"-ERR two  lines\r\n"),
        ("ERR got '\udcff'", b"-ERR got '\xff'\r\n"),
        ("ERR é", b"-ERR \xc3\xa9\r\n"),
    ],
)
def test_error(text: str, encoded: bytes) -> None:
    assert replies.error(text) == encoded


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_an_error_is_one_line(text: str) -> None:
    assert isinstance(read(replies.error(f"ERR {text}")), ValueError)


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(-2000, 2000))
def test_integers_come_back(value: int) -> None:
    assert read(replies.integer(value)) == value


@given(st.lists(st.binary()))
def test_bulk_strings_come_back(values: list[bytes]) -> None:
    assert read(replies.bulk_array(values)) == values
    assert read(replies.array(replies.bulk(value) for value in values)) == values


def test_arrays_nest() -> None:
    inner = replies.array([replies.integer(1), replies.bulk(b"a")])
    assert read(replies.array([inner, replies.OK])) == [[1, b"a"], b"OK"]


def test_null() -> None:
    assert (RESP2.null, RESP2.null_array) == (b"$-1\r\n", b"*-1\r\n")
    assert (RESP3.null, RESP3.null_array) == (b"_\r\n", b"_\r\n")


def test_map() -> None:
    pairs = [(replies.bulk(b"a"), replies.integer(1)), (replies.bulk(b"b"), replies.EMPTY_ARRAY)]
    assert RESP2.map(pairs) == b"*4\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n*0\r\n"
    assert RESP3.map(pairs) == b"%2\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n*0\r\n"
    assert RESP2.map([]) == b"*0\r\n"
    assert RESP3.map([]) == b"%0\r\n"


def test_set() -> None:
    assert RESP2.set([replies.ONE, replies.ZERO]) == b"*2\r\n:1\r\n:0\r\n"
    assert RESP3.set([replies.ONE, replies.ZERO]) == b"~2\r\n:1\r\n:0\r\n"


def test_boolean() -> None:
    assert [RESP2.boolean(True), RESP2.boolean(False)] == [b":1\r\n", b":0\r\n"]
    assert [RESP3.boolean(True), RESP3.boolean(False)] == [b"#t\r\n", b"#f\r\n"]


def test_verbatim() -> None:
    assert RESP2.verbatim("größe") == b"$7\r\ngr\xc3\xb6\xc3\x9fe\r\n"
    assert RESP3.verbatim("größe") == b"=11\r\ntxt:gr\xc3\xb6\xc3\x9fe\r\n"
    assert read(RESP3.verbatim("")) == b""


@pytest.mark.parametrize(
    ("value", "digits"),
    [
        # As ZSCORE of Redis 8.6.3 answers.
        (0.0, b"0"),
        (1.0, b"1"),
        (-1.5, b"-1.5"),
        (3.141, b"3.141"),
        (0.30000000000000004, b"0.30000000000000004"),
        (math.inf, b"inf"),
        (-math.inf, b"-inf"),
        (0.1, b"0.1"),
        (0.001234, b"0.001234"),
        (0.0001234, b"1.234e-4"),
        (-0.0001234, b"-1.234e-4"),
        (0.00001, b"0.00001"),
        (0.000001, b"0.000001"),
        (1e-7, b"1e-7"),
        (1.5e-7, b"1.5e-7"),
        (12345.678, b"12345.678"),
        (12345.67891234, b"1.234567891234e+4"),
        (123456789.125, b"123456789.125"),
        (4503599627370495.5, b"4503599627370495.5"),
        (9007199254740992.0, b"9007199254740992"),
        (1e16, b"10000000000000000"),
        (1.5e16, b"15000000000000000"),
        (2.0**60, b"1152921504606846976"),
        (9.2e18, b"9.2e+18"),
        (2.0**63, b"9223372036854776000"),
        (1e22, b"1e+22"),
        (1.5e100, b"1.5e+100"),
        (5e-324, b"5e-324"),
        (1.7976931348623157e308, b"1.7976931348623157e+308"),
    ],
)
def test_doubles_look_as_in_redis(value: float, digits: bytes) -> None:
    assert replies.format_double(value) == digits
    assert RESP2.double(value) == replies.bulk(digits)
    assert RESP3.double(value) == b",%b\r\n" % digits


@given(st.floats(allow_nan=False))
def test_doubles_come_back(value: float) -> None:
    back = float(replies.format_double(value))
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value)


def test_not_a_number() -> None:
    assert replies.format_double(math.nan) == b"nan"


def test_there_are_two_versions() -> None:
    with pytest.raises(ValueError, match="version"):
        Encoder(4)
