"""Random requests made from the command table: each gets one reply, and the server lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.commands.registry import COMMANDS
from engram.commands.syntax import Argument
from engram.commands.table import Command
from engram.config import SETTINGS
from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, running_server

# They end the server or the connection, take replies away, make them wait, or lock others out, by design.
EXCLUDED = frozenset(
    {
        *("shutdown", "quit", "client|kill", "client|reply", "client|pause", "monitor", "wait", "waitaof"),
        *("acl|setuser", "acl|deluser", "acl|load"),
    }
)
# Settings that would do so.
KEPT_SETTINGS = frozenset(
    {
        *(b"maxclients", b"requirepass", b"maxmemory", b"timeout", b"max-key-length"),
        *(b"client-output-buffer-limit", b"logfile", b"dir"),
    }
)

# Enough for about a minute in the test suite; `python -m tests.fuzz` asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4000"))
# What the server may have grown to when everything is deleted again.
MOST_RESIDENT_BYTES = 400 << 20

CORPUS = Path(__file__).parent / "corpus"

DIMENSION = 4
SENTINEL = b"the last reply"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One where SETRANGE and the like make no strings of hundreds of megabytes."""
    with running_server("--proto-max-bulk-len", "1mb") as server:
        yield server


keys = st.sampled_from([b"a", b"b", b"number", b"index", b"other", b"", b"\x00\xff", b"*"])
vectors = st.lists(st.floats(width=32) | st.just(0.0), min_size=DIMENSION - 1, max_size=DIMENSION + 1).map(
    lambda numbers: np.array(numbers, "<f4").tobytes()
)
integers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30]),
).map(lambda number: b"%d" % number)
oddities = st.sampled_from(
    [b"", b"nan", b"inf", b"-0", b"+1", b" 1", b"1_0", b"\xd9\xa1", b"\r\n", b"(", b"%s", b"[a-"]
)
texts = st.one_of(
    st.binary(max_size=20),
    vectors,
    oddities,
    integers,
    st.sampled_from(sorted(SETTINGS)).map(str.encode),
    st.sampled_from(sorted(COMMANDS)),
)


def joined(parts: Iterable[list[bytes]]) -> list[bytes]:
    return list(chain.from_iterable(parts))


def leaves(commands: Sequence[Command]) -> list[Command]:
    """Commands and subcommands, containers left out."""
    found: list[Command] = []
    for command in commands:
        found += leaves(list(command.subcommands.values())) if command.subcommands else [command]
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
        case "key":
            return keys.map(lambda key: [key])
        case "integer" | "unix-time":
            return (integers | oddities).map(lambda number: [number])
        case "double":
            return (st.floats().map(lambda number: b"%g" % number) | oddities).map(lambda number: [number])
        case _ if argument.name in ("vector", "query"):
            return vectors.map(lambda vector: [vector])
        case _:
            return texts.map(lambda text: [text])


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


def is_harmless(request: list[bytes]) -> bool:
    """Neither ends nor silences the connection, nor takes a setting that others need away."""
    lowered = [word.lower() for word in request[:3]]
    container = b"|".join(lowered[:2]).decode(errors="replace")
    if container in EXCLUDED or lowered[0].decode(errors="replace") in EXCLUDED:
        return False
    return not (lowered[:2] == [b"config", b"set"] and KEPT_SETTINGS & set(map(bytes.lower, request)))


table = [command for command in leaves(list(COMMANDS.values())) if command.name not in EXCLUDED]
requests = st.one_of(
    st.one_of([requests_of(command) for command in table]),
    st.lists(texts, min_size=1, max_size=5),
).filter(is_harmless)


def encode(request: Sequence[bytes]) -> bytes:
    return b"*%d\r\n%s" % (len(request), b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in request))


def exchange(client: socket.socket, batch: Sequence[Sequence[bytes]]) -> list[Any]:
    """The replies up to the sentinel's, which is asked for last, outside a transaction."""
    client.sendall(b"".join(map(encode, [*batch, (b"DISCARD",), (b"ECHO", SENTINEL)])))
    nothing = object()
    reader = hiredis.Reader(notEnoughData=nothing)
    found: list[Any] = []
    while not found or found[-1] != SENTINEL:
        reply = reader.gets()
        if reply is not nothing:
            found.append(reply)
            continue
        data = client.recv(65536)
        assert data, f"the connection ended after {len(found)} of {len(batch)} replies"
        reader.feed(data)
    return found[:-2]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests, min_size=1, max_size=20), protocol=st.sampled_from([b"2", b"3"]))
def test_each_request_gets_one_reply(
    server: ServerProcess, batch: list[list[bytes]], protocol: bytes
) -> None:
    opening = [[b"HELLO", protocol], [b"VNEW", b"index", b"%d" % DIMENSION], [b"SET", b"number", b"1"]]
    with socket.create_connection((HOST, server.port), DEADLINE_SECONDS) as client:
        replies = exchange(client, [*opening, *batch])
    assert len(replies) == len(opening) + len(batch)
    assert "ended by an error" not in server.errors, server.errors


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_=requests.filter(lambda request: len(request) > 1), size=st.integers(0, 8))
def test_a_request_cut_short_or_drawn_out_is_answered(
    server: ServerProcess, request_: list[bytes], size: int
) -> None:
    batch = [request_[: max(1, size)], [*request_, *request_[:size]]]
    batch = [request for request in batch if is_harmless(request)]
    with socket.create_connection((HOST, server.port), DEADLINE_SECONDS) as client:
        assert len(exchange(client, batch)) == len(batch)
    assert "ended by an error" not in server.errors, server.errors


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.resp")), ids=lambda path: path.stem)
def test_the_corpus(server: ServerProcess, path: Path) -> None:
    data = path.read_bytes()
    reader = hiredis.Reader()
    reader.feed(data)
    batch = list(iter(reader.gets, False))
    assert batch
    for protocol in (b"2", b"3"):
        with socket.create_connection((HOST, server.port), DEADLINE_SECONDS) as client:
            assert len(exchange(client, [[b"HELLO", protocol], *batch])) == len(batch) + 1
    assert "ended by an error" not in server.errors, server.errors


def test_nothing_is_left_in_memory(server: ServerProcess) -> None:
    with socket.create_connection((HOST, server.port), DEADLINE_SECONDS) as client:
        [_, size] = exchange(client, [[b"FLUSHALL"], [b"DBSIZE"]])
    assert size == 0
    assert server.resident_bytes() < MOST_RESIDENT_BYTES
