"""A kind of value that only tests know goes through all that a key may meet; no other file knows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from engram.keyspace import Keyspace
from engram.kinds import KINDS
from engram.kinds.kind import Kind
from tests.crash.server_process import ServerProcess, start_server

LAUNCHER = ("tests.kinds.launcher",)
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(*arguments: str, kill: bool = False) -> Iterator[tuple[ServerProcess, Redis]]:
    server = start_server(*arguments, module=LAUNCHER)
    try:
        with server.client() as client:
            yield server, client
        if kill:
            server.kill()
        else:
            assert server.terminate() == 0, server.errors
        assert "Traceback" not in server.errors, server.errors
    finally:
        server.close()


def put(client: Redis, key: str, **counts: int) -> None:
    for member, count in counts.items():
        client.execute_command("BAG.PUT", key, member, count)


def counts(client: Redis, key: str, *members: str) -> list[Any]:
    return [client.execute_command("BAG.COUNT", key, member) for member in members]


def test_it_survives_kills_and_snapshots(tmp_path: Path) -> None:
    folder = ("--dir", str(tmp_path / "data"))
    with serving(*folder, kill=True) as (_, client):
        put(client, "fruit", apple=2, pear=3)
        client.execute_command("SELECT", 3)
        put(client, "fruit", apple=7)
        client.execute_command("PEXPIREAT", "fruit", 4_102_444_800_000)
    with serving(*folder, kill=True) as (_, client):
        assert counts(client, "fruit", "apple", "pear", "plum") == [2, 3, 0]
        assert client.execute_command("SAVE") is True
        put(client, "fruit", apple=1)
    with serving(*folder) as (_, client):
        assert counts(client, "fruit", "apple", "pear") == [3, 3]
        client.execute_command("SELECT", 3)
        assert counts(client, "fruit", "apple", "pear") == [7, 0]
        assert client.execute_command("PEXPIRETIME", "fruit") == 4_102_444_800_000


def test_it_is_dumped_and_loaded(tmp_path: Path) -> None:
    data, dump = str(tmp_path / "data"), tmp_path / "dump.jsonl"
    with serving("--dir", data) as (_, client):
        put(client, "fruit", apple=2)
        client.execute_command("SELECT", 3)
        put(client, "fruit", pear=3)
        client.execute_command("PEXPIREAT", "fruit", 4_102_444_800_000)
        client.set("plain", "text")
    command = [sys.executable, "-P", "-m", *LAUNCHER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    check = subprocess.run([*command, "check", data], env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    subprocess.run([*command, "dump", data, "--output", dump], env=environment, check=True)
    with serving() as (server, client):
        load = [*command, "load", str(dump), "--port", str(server.port)]
        loaded = subprocess.run(load, env=environment, capture_output=True, text=True)
        assert loaded.stdout.startswith("loaded 3 keys and 0 vectors"), loaded.stderr
        assert counts(client, "fruit", "apple", "pear") == [2, 0]
        client.execute_command("SELECT", 3)
        assert counts(client, "fruit", "apple", "pear") == [0, 3]
        assert client.execute_command("PEXPIRETIME", "fruit") == 4_102_444_800_000
        assert client.get("plain") == b"text"


def test_commands_on_keys_of_any_kind_know_it() -> None:
    with serving() as (_, client):
        put(client, "bag", apple=2)
        assert client.type("bag") == b"bag"
        assert client.object("ENCODING", "bag") == b"hashtable"
        assert (client.memory_usage("bag") or 0) > 200
        assert client.copy("bag", "copy")
        put(client, "copy", apple=1)
        assert counts(client, "bag", "apple") + counts(client, "copy", "apple") == [2, 3]
        client.rename("copy", "renamed")
        assert counts(client, "renamed", "apple") == [3]
        client.set("text", "x")
        assert sorted(client.scan_iter(_type="bag")) == [b"bag", b"renamed"]
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            client.get("bag")
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            put(client, "text", apple=1)
        assert client.execute_command("MOVE", "renamed", 1) == 1
        assert sorted(client.scan_iter()) == [b"bag", b"text"]
        client.execute_command("SWAPDB", 0, 1)
        assert counts(client, "renamed", "apple") == [3]
        client.set("renamed", "a string instead")
        assert client.type("renamed") == b"string"
        client.execute_command("SWAPDB", 0, 1)
        client.pexpire("bag", 1)
        deadline = client.pttl("bag")
        while client.exists("bag"):
            pass
        assert deadline <= 1
        put(client, "bag", apple=5)
        assert client.flushall() is True
        assert counts(client, "bag", "apple") == [0]


def test_a_watch_of_it_breaks() -> None:
    with serving() as (server, client), server.client() as other:
        put(client, "bag", apple=1)
        with client.pipeline() as pipeline:
            pipeline.watch("bag")
            put(other, "bag", apple=1)
            pipeline.multi()
            pipeline.ping()
            with pytest.raises(Exception, match="Watched variable changed"):
                pipeline.execute()


def fill(client: Redis, name: str, *, lapsing: bool = False) -> None:
    for number in range(100):
        client.execute_command("BAG.PUT", f"{name}{number}", "m" * 20_000, 1)
        if lapsing:
            client.expire(f"{name}{number}", 100 + number)


def test_it_counts_for_maxmemory_and_gives_way() -> None:
    settings = ("--maxmemory", "1mb", "--maxmemory-policy", "volatile-ttl")
    with serving(*settings) as (_, client):
        fill(client, "bag", lapsing=True)
        held = client.dbsize()
        assert 20 < held < 60
        assert client.info("stats")["evicted_keys"] == 100 - held
        # Room is made for what is there, not for what comes.
        assert client.info("memory")["used_memory"] < (1 << 20) + 25_000
        for key in list(client.scan_iter()):
            client.persist(key)
        with pytest.raises(ResponseError, match="when used memory > 'maxmemory'"):
            fill(client, "lasting")


def test_what_is_of_no_kind_is_not_stored() -> None:
    keyspace: Keyspace[Any] = Keyspace(check=KINDS.of)
    with pytest.raises(TypeError, match="list is the type of no kind of value"):
        keyspace.set(b"k", [1])
    assert (dict(keyspace.values), keyspace.others) == ({}, {})


def test_no_two_kinds_have_a_name_or_a_type() -> None:
    string: Kind[Any] = KINDS.by_name["string"]
    with pytest.raises(ValueError, match="there is a kind string already"):
        KINDS.add(string)
