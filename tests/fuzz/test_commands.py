"""Random requests made from the command table: each gets one reply, and the server lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hiredis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.commands.registry import COMMANDS
from engram.protocol.requests import CROSS_PROTOCOL
from tests.conftest import encode_request
from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, running_server
from tests.fuzz.grammar import OPENING, leaves, requests_for

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

SENTINEL = b"the last reply"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One where SETRANGE and the like make no strings of hundreds of megabytes."""
    with running_server("--proto-max-bulk-len", "1mb") as server:
        yield server


def is_harmless(request: list[bytes]) -> bool:
    """Neither ends nor silences the connection, nor takes a setting that others need away."""
    lowered = [word.lower() for word in request[:3]]
    container = b"|".join(lowered[:2]).decode(errors="replace")
    if (
        container in EXCLUDED
        or lowered[0].decode(errors="replace") in EXCLUDED
        or lowered[0] in CROSS_PROTOCOL
    ):
        return False
    return not (lowered[:2] == [b"config", b"set"] and KEPT_SETTINGS & set(map(bytes.lower, request)))


table = [command for command in leaves(COMMANDS.values()) if command.name not in EXCLUDED]
requests = requests_for(table).filter(is_harmless)


def exchange(client: socket.socket, batch: Sequence[Sequence[bytes]]) -> list[Any]:
    """The replies up to the sentinel's, which is asked for last, outside a transaction."""
    client.sendall(b"".join(map(encode_request, [*batch, (b"DISCARD",), (b"ECHO", SENTINEL)])))
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
    opening = [[b"HELLO", protocol], *OPENING]
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
