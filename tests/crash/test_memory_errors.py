"""Errors in the midst of a change, and memory that runs out, in a server of its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from tests.crash.server_process import ServerProcess, running_server, start_server
from tests.crash.shortage import Shortage


def server_with_error(folder: Path, module: str, function: str, word: str) -> ServerProcess:
    """A server in which a function raises MemoryError: see `tests.crash.failing`."""
    arguments = ("--dir", str(folder / "data"))
    return start_server(*arguments, module=("tests.crash.failing", module, function, word))


@pytest.mark.parametrize(
    ("module", "function", "word"),
    [
        ("engram.keyspace", "Keyspace.set", "after-trip"),
        ("engram.persistence.queue", "RunQueue.append", "before-trip"),
        ("engram.persistence.queue", "RunQueue.append", "after-trip"),
    ],
)
def test_an_error_after_the_first_step_of_a_change_ends_the_server(
    tmp_path: Path, module: str, function: str, word: str
) -> None:
    server = server_with_error(tmp_path, module, function, word)
    try:
        with server.client() as client, server.client() as other:
            client.set("a", "1")
            other.ping()
            with pytest.raises(RedisConnectionError):
                client.set(word, "1")
            with pytest.raises(RedisConnectionError):
                other.get("a")
        assert server.wait() == 1
        assert "engram: a change failed half-way (MemoryError())" in server.errors
    finally:
        server.close()
    with running_server("--dir", str(tmp_path / "data")) as again, again.client() as client:
        assert client.get("a") == b"1"
        # It was not acknowledged.
        assert client.get(word) in (None, b"1")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("engram.persistence.queue", "encode"),
        ("engram.database", "Database.commit"),
        ("engram.database", "LogicalDatabase.string"),
    ],
)
def test_an_error_before_it_or_in_a_read_ends_one_request(tmp_path: Path, module: str, function: str) -> None:
    server = server_with_error(tmp_path, module, function, "before-trip")
    try:
        with server.client() as client:
            client.set("a", "1")
            with pytest.raises(OutOfMemoryError):
                client.set("before-trip", "1", get=True)
            assert client.get("a") == b"1"
            client.set("b", "2")
        assert server.terminate() == 0
    finally:
        server.close()
    with running_server("--dir", str(tmp_path / "data")) as again, again.client() as client:
        assert client.mget("a", "before-trip", "b") == [b"1", None, b"2"]


def test_a_server_that_hears_no_thread_any_more_ends(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    server = start_server("--dir", str(tmp_path / "data"), module=("tests.crash.deaf", str(deaf)))
    try:
        with server.client() as client:
            client.set("a", "1")
            deaf.touch()
            with pytest.raises(RedisConnectionError):
                client.set("b", "1")
        assert server.wait() == 1
        assert "engram: the word of threads does not arrive any more" in server.errors
    finally:
        server.close()
    with running_server("--dir", str(tmp_path / "data")) as again, again.client() as client:
        assert client.get("a") == b"1"


def test_what_was_acknowledged_survives_a_lack_of_memory(tmp_path: Path) -> None:
    shortage = Shortage(tmp_path / "data", 2026)
    shortage.round()
    # Or the limit was none.
    assert shortage.errors or shortage.ended
