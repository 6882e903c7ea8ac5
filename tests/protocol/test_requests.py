from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engram.protocol.inline import quoted, split_inline
from engram.protocol.replies import bulk_array
from engram.protocol.requests import ProtocolError, RequestParser

PING = b"*1\r\n$4\r\nPING\r\n"
ECHO = b"*2\r\n$4\r\nECHO\r\n"
MANY = PING * 20
"""Enough small commands for the reader of bursts."""

Outcome = tuple[list[list[bytes]], str | None, int]


def parse(stream: bytes, *, size: int | None = None) -> Outcome:
    """Requests, error and bytes left over after feeding `stream` in pieces of `size` bytes."""
    parser = RequestParser()
    requests: list[list[bytes]] = []
    step = size or max(len(stream), 1)
    for start in range(0, len(stream), step):
        requests += parser.feed(stream[start : start + step])
    return requests, str(parser.error) if parser.error else None, parser.buffered


ACCEPTED = [
    # Expected outcomes here and below are those of Redis 8.6.3; it waits longer for the end of a length.
    (b"*2\r\n$4\r\nECHO\r\n$6\r\n\r\n*1\r\n\r\n" + PING, [[b"ECHO", b"\r\n*1\r\n"], [b"PING"]]),
    (ECHO + b"$0\r\n\r\n", [[b"ECHO", b""]]),
    (b"*1\r\n$0\r\n\r\n" + PING, [[b""], [b"PING"]]),
    (b"*0\r\n" + PING, [[b"PING"]]),
    (b"*-1\r\n" + PING, [[b"PING"]]),
    (b"*-5\r\n" + PING, [[b"PING"]]),
    (b"*-9223372036854775808\r\n" + PING, [[b"PING"]]),
    (b"\r\n\r\n\n \t \r\n" + PING, [[b"PING"]]),
    (b"*2\rX$4\rXECHO\r\n$1\r\na\r\n", [[b"ECHO", b"a"]]),
    (b"*2\r\n$4\r\nECHOXX$1\r\naYY" + PING, [[b"ECHO", b"a"], [b"PING"]]),
    (ECHO + b"$1\r\n\r\r\n", [[b"ECHO", b"\r"]]),
    (b"PING\r\n", [[b"PING"]]),
    (b"PING\n", [[b"PING"]]),
    (b"PING\r\r\n", [[b"PING"]]),
    (b"  PING  \r\nPING\n" + PING + b"PING\r\n", [[b"PING"]] * 4),
    (b"$4\r\nPING\r\n", [[b"$4"], [b"PING"]]),
    (b"$0\r\n\r\n", [[b"$0"]]),
    (b":5\r\n", [[b":5"]]),
    (b"+OK\r\n", [[b"+OK"]]),
    (b"~1\r\n$1\r\na\r\n", [[b"~1"], [b"$1"], [b"a"]]),
    (b"|1\r\n$1\r\na\r\n$1\r\nb\r\n", [[b"|1"], [b"$1"], [b"a"], [b"$1"], [b"b"]]),
    (b">1\r\n$4\r\nPING\r\n", [[b">1"], [b"$4"], [b"PING"]]),
]

REFUSED = [
    (ECHO + b"+x\r\n", "expected '$', got '+'"),
    (ECHO + b":5\r\n", "expected '$', got ':'"),
    (ECHO + b"=7\r\ntxt:abc\r\n", "expected '$', got '='"),
    (ECHO + b"(7\r\n", "expected '$', got '('"),
    (ECHO + b"*1\r\n$1\r\na\r\n", "expected '$', got '*'"),
    (b"*2\r\n$4\r\nECHOXX+a\r\n", "expected '$', got '+'"),
    (b"*1\r\n~2\r\n", "expected '$', got '~'"),
    (b"*1\r\nPING\r\n", "expected '$', got 'P'"),
    (b"*1\r\n\r\n", "expected '$', got '\r'"),
    (b"*1\r\n\n\r\n", "expected '$', got '\n'"),
    (b"*1\r\n\xff\r\n", "expected '$', got '\udcff'"),
    (ECHO + b"$-1\r\n", "invalid bulk length"),
    (b"*1\r\n$\r\n", "invalid bulk length"),
    (b"*1\r\n$+4\r\nPING\r\n", "invalid bulk length"),
    (b"*1\r\n$04\r\nPING\r\n", "invalid bulk length"),
    (b"*1\r\n$4 \r\nPING\r\n", "invalid bulk length"),
    (b"*1\r\n$-0\r\n\r\n", "invalid bulk length"),
    (b"*1\r\n$536870913\r\n", "invalid bulk length"),
    (b"*1\r\n$9223372036854775808\r\n", "invalid bulk length"),
    (b"*1\r\n$" + b"1" * 100 + b"\r\n", "invalid bulk length"),
    (b"*\r\n", "invalid multibulk length"),
    (b"*-0\r\n", "invalid multibulk length"),
    (b"*+1\r\n", "invalid multibulk length"),
    (b"* 1\r\n", "invalid multibulk length"),
    (b"*01\r\n", "invalid multibulk length"),
    (b"*1a\r\n", "invalid multibulk length"),
    (b"*1_0\r\n", "invalid multibulk length"),
    (b"*1\n$4\nPING\n*1\r\n", "invalid multibulk length"),
    (b"*2147483648\r\n", "invalid multibulk length"),
    (b"*9223372036854775808\r\n", "invalid multibulk length"),
    (b"*-9223372036854775809\r\n", "invalid multibulk length"),
    (b'X "a\r\n', "unbalanced quotes in request"),
    (b"X 'a'b\r\n", "unbalanced quotes in request"),
    (b"a" * 70_000, "too big inline request"),
    (b"*" + b"1" * 70_000, "too big mbulk count string"),
    (b"*1\r\n$" + b"1" * 70_000, "too big bulk count string"),
    (b"*1\r\n" + b"x" * 70_000, "too big bulk count string"),
]

INCOMPLETE = [
    b"PING",
    b"*",
    b"*1\r",
    b"*1\r\n",
    b"*1\r\n$4",
    b"*1\r\n$4\r",
    b"*1\r\n$4\r\n",
    b"*1\r\n$4\r\nPING",
    b"*1\r\n$4\r\nPING\r",
    b"*1\r\n 4\r",
    b"*2\r\n$1\r\n*\r\n",
    b"*1\r\n$536870912\r\n",
]


@pytest.mark.parametrize("before", [b"", MANY])
@pytest.mark.parametrize("after", [b"", MANY])
@pytest.mark.parametrize(("stream", "requests"), ACCEPTED)
def test_accepts_what_redis_accepts(
    stream: bytes, requests: list[list[bytes]], before: bytes, after: bytes
) -> None:
    pings_before, pings_after = [[b"PING"]] * bool(before) * 20, [[b"PING"]] * bool(after) * 20
    assert parse(before + stream + after) == (pings_before + requests + pings_after, None, 0)


@pytest.mark.parametrize("before", [b"", MANY])
@pytest.mark.parametrize(("stream", "reason"), REFUSED)
def test_refuses_what_redis_refuses(stream: bytes, reason: str, before: bytes) -> None:
    requests = [[b"PING"]] * bool(before) * 20
    assert parse(before + stream) == (requests, f"Protocol error: {reason}", 0)


@pytest.mark.parametrize("before", [b"", MANY])
@pytest.mark.parametrize("stream", INCOMPLETE)
def test_waits_for_the_rest(stream: bytes, before: bytes) -> None:
    assert parse(before + stream) == ([[b"PING"]] * bool(before) * 20, None, len(stream))


def test_parses_nothing_after_an_error() -> None:
    parser = RequestParser()
    assert parser.feed(PING + b"*x\r\n" + PING) == [[b"PING"]]
    error = parser.error
    assert isinstance(error, ProtocolError)
    assert parser.feed(PING) == []
    assert parser.error is error


def test_an_error_forgets_what_was_held() -> None:
    parser = RequestParser()
    parser.feed(b"*3\r\n$3\r\nSET\r\n$1000\r\n" + bytes(1000) + b"\r\n")
    assert parser.buffered > 1000
    parser.feed(b"+\r\n")
    assert parser.error is not None
    assert parser.buffered == 0


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        (b'X "a b" c', [b"X", b"a b", b"c"]),
        (b'X a"b c"', [b"X", b"ab c"]),
        (b"X a'b c'", [b"X", b"ab c"]),
        (b'X "\\x41\\x4\\xzz\\n\\q\\"\\\\"', [b"X", b'Ax4xzz\nq"\\']),
        (b'X "\\t\\b\\a\\r\\n\\x00\\xff\\v"', [b"X", b"\t\b\a\r\n\x00\xffv"]),
        (b"X 'a\\'b\\n\\\\'", None),
        (b"X 'a\\'b\\n\\\\ '", [b"X", b"a'b\\n\\\\ "]),
        (b"X 'a\\'", None),
        (b'X "a\\', None),
        (b'X "a"b', None),
        (b'X a"b', None),
        (b"X \"a\"'b'", None),
        (b'X \\"a', None),
        (b'X "" \'\' ""', [b"X", b"", b"", b""]),
        (b'""', [b""]),
        (b"X '\"' \"'\"", [b"X", b'"', b"'"]),
        (b'X "a"\x0bb', [b"X", b"a", b"b"]),
        (b"X a\x0bb\x0cc", [b"X", b"a\x0bb\x0cc"]),
        (b"\x0bX\x0c a \x0bb", [b"X\x0c", b"a", b"b"]),
        (b"X a\rb", [b"X", b"a", b"b"]),
        (b"X a\tb", [b"X", b"a", b"b"]),
        (b'ECHO "a\tb"', [b"ECHO", b"a\tb"]),
        (b"X \xff\xfe", [b"X", b"\xff\xfe"]),
        (b"", []),
        (b" \t\x0b\x0c ", []),
    ],
)
def test_splits_inline_commands_as_redis_does(line: bytes, arguments: list[bytes] | None) -> None:
    if arguments is None:
        with pytest.raises(ValueError, match="unbalanced quotes"):
            split_inline(line)
    else:
        assert split_inline(line) == arguments


def hexadecimal(argument: bytes) -> bytes:
    return b'"%b"' % b"".join(b"\\x%02x" % byte for byte in argument)


@pytest.mark.parametrize("quote", [quoted, hexadecimal])
@given(st.lists(st.binary(max_size=20)))
def test_quoted_inline_arguments_come_back(quote: Callable[[bytes], bytes], arguments: list[bytes]) -> None:
    assert split_inline(b" ".join(map(quote, arguments))) == arguments


@given(st.text("ab\x00\xff\x1c\\ \t\r\v\f").map(lambda text: text.encode("latin-1")))
def test_a_line_without_quotes_is_split_as_any_other(line: bytes) -> None:
    assert [*split_inline(line), b""] == split_inline(line + b' ""')


def test_a_line_may_be_as_long_as_its_limit() -> None:
    parser = RequestParser(inline_limit=10)
    assert parser.feed(b"a" * 10 + b"\n" + b"b" * 10) == [[b"a" * 10]]
    assert parser.feed(b"\n") == [[b"b" * 10]]
    parser.feed(b"c" * 11)
    assert str(parser.error) == "Protocol error: too big inline request"


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a" * 11, "too big inline request"),
        (b"*" + b"1" * 10, "too big mbulk count string"),
        (b"*1\r\n$" + b"1" * 10, "too big bulk count string"),
    ],
)
def test_a_line_beyond_its_limit_is_refused_however_it_is_cut(line: bytes, reason: str, size: int) -> None:
    parser = RequestParser(inline_limit=10)
    stream = line + b"\r\n"
    for start in range(0, len(stream), size):
        assert parser.feed(stream[start : start + size]) == []
    assert str(parser.error) == f"Protocol error: {reason}"


@pytest.mark.parametrize("before", [b"", MANY])
def test_limits_are_the_parsers_own(before: bytes) -> None:
    bulk = RequestParser(max_bulk_length=4)
    bulk.feed(before + PING + b"*1\r\n$5\r\nHELLO\r\n")
    assert str(bulk.error) == "Protocol error: invalid bulk length"
    arguments = RequestParser(max_arguments=2)
    arguments.feed(before + ECHO + b"$1\r\na\r\n" + b"*3\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n")
    assert str(arguments.error) == "Protocol error: invalid multibulk length"


def test_takes_a_million_arguments_but_not_one_more() -> None:
    assert parse(b"*1048576\r\n") == ([], None, 10)
    assert parse(b"*1048577\r\n") == ([], "Protocol error: invalid multibulk length", 0)


@given(st.lists(st.binary(min_size=5, max_size=50), min_size=1, max_size=5), st.integers(1, 60))
def test_every_byte_of_an_incomplete_request_counts(arguments: list[bytes], size: int) -> None:
    stream = bulk_array(arguments)[:-1]
    assert parse(stream, size=size) == ([], None, len(stream))


def test_what_is_held_of_one_request_is_limited() -> None:
    parser = RequestParser(query_buffer_limit=100)
    assert parser.feed(PING * 1000) == [[b"PING"]] * 1000
    parser.feed(b"*2\r\n$50\r\n" + bytes(50) + b"\r\n$80\r\n" + bytes(20))
    assert parser.error is None
    parser.feed(bytes(20))
    assert str(parser.error) == "Protocol error: query buffer limit exceeded"


@pytest.mark.parametrize("before", [b"", MANY])
@pytest.mark.parametrize(
    "announcement",
    [b"*2000000000\r\n", b"*1048576\r\n", b"*1\r\n$536870912\r\n", b"*9999\r\n" * 100, b"*99\r\n" * 100],
)
def test_an_announced_length_reserves_no_memory(announcement: bytes, before: bytes) -> None:
    parser = RequestParser()
    tracemalloc.start()
    try:
        parser.feed(before + announcement)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_a_large_argument_arrives_in_pieces() -> None:
    value = bytes(range(256)) * 8192
    stream = bulk_array([b"SET", b"key", value])
    parser = RequestParser()
    step = 65_536
    received = 0
    for start in range(0, len(stream) - 1, step):
        piece = stream[start : min(start + step, len(stream) - 1)]
        received += len(piece)
        assert parser.feed(piece) == []
        assert parser.buffered == received
    assert parser.feed(stream[-1:] + PING) == [[b"SET", b"key", value], [b"PING"]]
    assert parser.buffered == 0


texts = st.binary(max_size=8) | st.text("abc:*$+=(~|\r\n0123456789", max_size=12).map(str.encode)
requests_lists = st.lists(st.lists(st.binary(max_size=40) | texts, min_size=1, max_size=5), max_size=30)


@given(requests_lists, st.integers(1, 300))
def test_what_is_encoded_is_parsed(requests: list[list[bytes]], size: int) -> None:
    assert parse(b"".join(map(bulk_array, requests)), size=size) == (requests, None, 0)


pieces_of_lines = [b"\r\n", b"\r", b"\n", b" ", b'"', b"'", b"\\x4a", b"\x00", b"\xff", b"0", b"1", b"-1"]
pieces_of_arrays = [b"*", b"*0\r\n", b"*1\r\n", b"*2\r\n", b"*-1\r\n", b"*99\r\n", b"*999\r\n"]
pieces_of_bulks = [b"$", b"$0\r\n\r\n", b"$4\r\n", b"$5\r\nprobe\r\n", b"$1\r\naXX", b"$5\r\n\r\n$1+\r\n"]
other_lines = [b"+a\r\n", b"-a\r\n", b":1\r\n", b"_\r\n", b"#t\r\n", b",1.5\r\n", b"(1\r\n"]
other_aggregates = [b"=5\r\ntxt:a\r\n", b"~1\r\n", b"%1\r\n", b"|1\r\n", b">1\r\n"]
whole_requests = [b"PING\r\n", PING, ECHO + b"$1\r\na\r\n", MANY]
fragments = st.sampled_from(
    pieces_of_lines + pieces_of_arrays + pieces_of_bulks + other_lines + other_aggregates + whole_requests
)
streams = st.lists(fragments | st.binary(max_size=3), max_size=30).map(b"".join)


@given(streams, st.integers(1, 40))
@example(MANY + b"*2\r\n*1\r\n$4\r\nPING\r\n", 1)
@example(MANY + b"*2\r\n$4\r\nECHOXX+a\r\n" + PING, 1)
@example(MANY + b"*1\r\n$15\r\n*1\r\n$5\r\nprobe\r\n\r\n", 1)
@example(b"|1\r\n$1\r\na\r\n$1\r\nb\r\n" + MANY, 1)
def test_the_same_stream_parses_the_same_however_it_is_cut(stream: bytes, size: int) -> None:
    assert parse(stream, size=size) == parse(stream)


def test_a_burst_parses_the_same_cut_at_every_byte() -> None:
    requests = [[b"SET", b"key:%d" % number, b"value\r\n*1\r\n"] for number in range(12)]
    stream = b"".join(map(bulk_array, requests))
    for cut in range(len(stream) + 1):
        parser = RequestParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) == requests
        assert parser.error is None
        assert parser.buffered == 0


@pytest.mark.parametrize(
    "request_", [[b"GET", b"k"], [b"SET", b"k", b""], [b"ECHO", b"\r\n"], [b"%d" % word for word in range(9)]]
)
def test_one_small_request_with_any_byte_wrong_parses_the_same_however_it_is_cut(
    request_: list[bytes],
) -> None:
    stream = bulk_array(request_)
    assert parse(stream) == ([request_], None, 0)
    for at in range(len(stream) + 1):
        for wrong in (b"", b"0", b"1", b"2", b"9", b"$", b"*", b"\r", b"\n", b" ", b"-"):
            for rest in (stream[at:], stream[at + 1 :], b""):
                changed = stream[:at] + wrong + rest
                assert parse(changed) == parse(changed, size=1), changed


@given(st.binary(max_size=300) | streams)
def test_any_bytes_give_requests_or_an_error(stream: bytes) -> None:
    requests, error, buffered = parse(stream)
    assert all(type(argument) is bytes for request in requests for argument in request)
    assert all(requests)
    assert 0 <= buffered <= len(stream)
    assert error is None or (error.startswith("Protocol error: ") and buffered == 0)


def unauthenticated() -> RequestParser:
    parser = RequestParser()
    parser.authenticated = False
    return parser


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"*10\r\n", None),
        (b"*11\r\n", "unauthenticated multibulk length"),
        (b"*2\r\n$4\r\nAUTH\r\n$16384\r\n", None),
        (b"*2\r\n$4\r\nAUTH\r\n$16385\r\n", "unauthenticated bulk length"),
        (b"*1048577\r\n", "invalid multibulk length"),
        (b"*1\r\n$536870913\r\n", "invalid bulk length"),
        (b"PING" + b" x" * 20 + b"\r\n", None),
    ],
)
def test_before_authentication_requests_are_small(stream: bytes, error: str | None) -> None:
    parser = unauthenticated()
    parser.feed(stream)
    assert not parser.suspended
    assert (str(parser.error) if parser.error else None) == (error and f"Protocol error: {error}")


LARGE = [
    (b"*11\r\n" + b"$1\r\na\r\n" * 11, [b"a"] * 11),
    (ECHO + b"$20000\r\n" + b"x" * 20000 + b"\r\n", [b"ECHO", b"x" * 20000]),
]


@pytest.mark.parametrize(("large", "request_"), LARGE)
@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_a_large_request_is_read_once_one_before_it_has_authenticated(
    large: bytes, request_: list[bytes], size: int
) -> None:
    parser = unauthenticated()
    requests: list[list[bytes]] = []
    stream = b"AUTH password\r\n" + large + PING
    for start in range(0, len(stream), size):
        requests += parser.feed(stream[start : start + size])
        while parser.suspended:
            assert parser.error is None
            parser.authenticated = True
            requests += parser.feed(b"")
        parser.authenticated = parser.authenticated or bool(requests)
    assert requests == [[b"AUTH", b"password"], request_, [b"PING"]]
    assert (parser.error, parser.buffered) == (None, 0)


@pytest.mark.parametrize("large", [large for large, _ in LARGE])
def test_a_large_request_is_refused_when_what_came_before_it_has_not_authenticated(large: bytes) -> None:
    parser = unauthenticated()
    assert parser.feed(PING + PING + large) == [[b"PING"], [b"PING"]]
    assert (parser.suspended, parser.error) == (True, None)
    assert parser.feed(b"") == []
    assert not parser.suspended
    assert str(parser.error).startswith("Protocol error: unauthenticated ")
    assert parser.buffered == 0


def test_what_one_may_hold_before_authentication_is_bounded() -> None:
    parser = unauthenticated()
    for _ in range(100):
        parser.feed(b"*10\r\n" + (b"$16384\r\n" + b"x" * 16384 + b"\r\n") * 9)
        assert parser.buffered < 10 * 17000
        if parser.error is not None:
            break
    assert parser.error is not None


@pytest.mark.parametrize("request_", [PING, b"PING\r\n"])
def test_before_authentication_few_requests_are_returned_at_once(request_: bytes) -> None:
    parser = unauthenticated()
    counts = [len(parser.feed(request_ * 300))]
    while parser.suspended:
        counts.append(len(parser.feed(b"")))
    assert counts == [128, 128, 44]
    assert len(parser.feed(request_ * 128)) == 128
    assert not parser.suspended
    assert parser.buffered == 0
    assert len(parser.feed(request_ * 300)) == 128
    parser.authenticated = True
    assert len(parser.feed(request_)) == 173


@pytest.mark.parametrize("line", [b"PING\r\n", b"*1\r\n$4\r\nP=NG\r\n", b"\r\n"])
def test_nobody_has_thousands_of_requests_read_at_once(line: bytes) -> None:
    """But for what hiredis reads, which takes a quarter of a microsecond each."""
    parser = RequestParser()
    counts = [len(parser.feed(line * 1500))]
    while parser.suspended:
        counts.append(len(parser.feed(b"")))
    assert len(counts) == 3
    assert counts in ([512, 512, 476], [0, 0, 0])
    assert parser.buffered == 0


def test_a_long_argument_is_not_copied_when_it_is_whole() -> None:
    size = 8 << 20
    parser = RequestParser()
    tracemalloc.start()
    try:
        parser.feed(b"*2\r\n$3\r\nGET\r\n$%d\r\n" % size)
        for _ in range(size >> 16):
            parser.feed(b"x" * (1 << 16))
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        (request,) = parser.feed(b"\r\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert request == [b"GET", b"x" * size]
    assert peak < before + size // 8
