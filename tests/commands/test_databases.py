"""Sixteen numbered databases, one of which a client selects: https://redis.io/docs/latest/commands/select/."""

from __future__ import annotations

import numpy as np
import pytest

from engram.commands.registry import COMMANDS
from engram.kinds import KINDS
from engram.operations import Flush
from tests.conftest import Client, House

OK, QUEUED, NULL = b"+OK\r\n", b"+QUEUED\r\n", b"$-1\r\n"
VECTOR = np.array([1, 2], "<f4").tobytes()


async def told(client: Client, *requests: str) -> list[bytes]:
    return [await client.call(request) for request in requests]


async def test_each_database_has_keys_of_its_own(house: House) -> None:
    client = house.connect()
    assert await told(client, "SET k zero", "SELECT 15", "GET k", "SET k fifteen", "GET k", "DBSIZE") == [
        OK,
        OK,
        NULL,
        OK,
        b"$7\r\nfifteen\r\n",
        b":1\r\n",
    ]
    assert await told(client, "SELECT 0", "GET k", "KEYS *", "SCAN 0", "RANDOMKEY") == [
        OK,
        b"$4\r\nzero\r\n",
        b"*1\r\n$1\r\nk\r\n",
        b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nk\r\n",
        b"$1\r\nk\r\n",
    ]
    other = house.connect()
    assert await other.call("GET k") == b"$4\r\nzero\r\n"


async def test_a_vector_index_is_found_where_it_was_made(house: House) -> None:
    client = house.connect()
    await told(client, "SELECT 3", "VNEW i 2")
    assert await client.call([b"VADD", b"i", b"m", VECTOR]) == b":1\r\n"
    assert await told(client, "VLIST", "SELECT 0", "VLIST", "VCOUNT i") == [
        b"*1\r\n$1\r\ni\r\n",
        OK,
        b"*0\r\n",
        b"-ERR no such index\r\n",
    ]
    assert await told(client, "SELECT 3", "MOVE i 0", "VLIST", "SELECT 0") == [OK, b":1\r\n", b"*0\r\n", OK]
    assert await client.call([b"VSEARCH", b"i", VECTOR, b"1"]) == b"*2\r\n$1\r\nm\r\n$1\r\n0\r\n"


@pytest.mark.parametrize("database", [0, 7])
async def test_move(house: House, database: int) -> None:
    client = house.connect()
    assert await told(
        client,
        f"SELECT {database}",
        "SET k v PXAT 1900000000000",
        "MOVE k 5",
        "EXISTS k",
        "MOVE k 5",
        "SELECT 5",
        "GET k",
        "PEXPIRETIME k",
    ) == [OK, OK, b":1\r\n", b":0\r\n", b":0\r\n", OK, b"$1\r\nv\r\n", b":1900000000000\r\n"]
    assert await told(client, f"SELECT {database}", "SET k other", "MOVE k 5", "GET k") == [
        OK,
        OK,
        b":0\r\n",
        b"$5\r\nother\r\n",
    ]


async def test_a_key_that_has_lapsed_is_in_nobody_s_way(house: House) -> None:
    client = house.connect()
    await told(client, "SELECT 1", "SET k old PX 10", "SELECT 0", "SET k new")
    house.clock.time += 10
    assert await told(client, "MOVE k 1", "SELECT 1", "GET k", "TTL k") == [
        b":1\r\n",
        OK,
        b"$3\r\nnew\r\n",
        b":-1\r\n",
    ]
    assert await told(client, "SET k x PX 10", "SELECT 0") == [OK, OK]
    house.clock.time += 10
    assert house.database.expire_due() == 1
    assert house.database.expired_keys == 2
    assert not any(house.engine.keyspaces.values())


async def test_copy_to_another_database(house: House) -> None:
    client = house.connect()
    assert await told(
        client,
        "SET k v PXAT 1900000000000",
        "COPY k k DB 2",
        "COPY k k DB 2",
        "APPEND k w",
        "COPY k k REPLACE DB 2",
        "COPY k l DB 0",
        "SELECT 2",
        "GET k",
        "PEXPIRETIME k",
        "DBSIZE",
    ) == [
        OK,
        b":1\r\n",
        b":0\r\n",
        b":2\r\n",
        b":1\r\n",
        b":1\r\n",
        OK,
        b"$2\r\nvw\r\n",
        b":1900000000000\r\n",
        b":1\r\n",
    ]


async def test_swapdb_is_seen_by_those_who_have_selected_either(house: House) -> None:
    first, second = house.connect(), house.connect()
    await told(first, "SET k zero PX 50", "VNEW i 2")
    await told(second, "SELECT 1", "SET k one", "SET l one")
    assert await first.call("SWAPDB 0 1") == OK
    assert await told(first, "GET k", "DBSIZE", "TTL k", "VLIST") == [
        b"$3\r\none\r\n",
        b":2\r\n",
        b":-1\r\n",
        b"*0\r\n",
    ]
    assert await told(second, "GET k", "PTTL k", "VLIST") == [
        b"$4\r\nzero\r\n",
        b":50\r\n",
        b"*1\r\n$1\r\ni\r\n",
    ]
    house.clock.time += 50
    assert house.database.expire_due() == 1
    assert await told(second, "DBSIZE", "SWAPDB 1 1", "SWAPDB 1 0", "VLIST") == [
        b":1\r\n",
        OK,
        OK,
        b"*0\r\n",
    ]
    assert await first.call("VLIST") == b"*1\r\n$1\r\ni\r\n"


async def test_flushdb_empties_one_and_flushall_every_database(house: House) -> None:
    client = house.connect()
    await told(client, "SET k v", "VNEW i 2", "SELECT 4", "SET k v", "VNEW i 2")
    assert await told(client, "FLUSHDB", "DBSIZE", "SELECT 0", "DBSIZE", "VLIST") == [
        OK,
        b":0\r\n",
        OK,
        b":2\r\n",
        b"*1\r\n$1\r\ni\r\n",
    ]
    assert len(house.engine.indices) == 1
    await told(client, "SELECT 4", "SET k v", "SELECT 9")
    assert await client.call("FLUSHALL") == OK
    assert not any(house.engine.keyspaces.values())
    assert not house.engine.indices


async def test_those_nearest_to_lapse_are_evicted_whichever_database_they_are_in(house: House) -> None:
    client = house.connect()
    for database, seconds in ((0, 100_000), (1, 200), (2, 300)):
        await client.call(f"SELECT {database}")
        for number in range(50):
            await client.call([b"SET", b"%d" % number, bytes(1000), b"EX", b"%d" % (seconds + number)])
    await told(client, "SELECT 0", "SET first x EX 50", "CONFIG SET maxmemory-policy volatile-ttl")
    house.server.config.maxmemory = house.server.memory.used() - 72_000
    house.server.memory.reconfigure()
    assert house.server.memory.used() <= house.server.config.maxmemory
    left = [len(house.engine.keyspaces[number]) for number in range(3)]
    assert left[:2] == [50, 0]
    assert 35 < left[2] < 50
    assert b"0" not in house.engine.keyspaces[2].values


async def test_info_lists_the_databases_that_hold_keys(house: House) -> None:
    client = house.connect()
    await told(client, "SET k v", "SELECT 11", "SET k v PX 5000", "SET l v", "SELECT 2", "SET k v", "DEL k")
    text = (await client.call("INFO keyspace")).decode()
    assert text.strip().splitlines()[2:] == [
        "db0:keys=1,expires=0,avg_ttl=0,subexpiry=0",
        "db11:keys=2,expires=1,avg_ttl=5000,subexpiry=0",
    ]


async def test_a_client_is_listed_with_its_database(house: House) -> None:
    client = house.connect()
    await client.call("SELECT 6")
    assert b" db=6 " in await client.call("CLIENT LIST")
    await client.call("RESET")
    assert b" db=0 " in await client.call("CLIENT INFO")


async def test_a_transaction_may_go_from_one_database_to_another(house: House) -> None:
    client = house.connect()
    requests = ["MULTI", "SET k a", "SELECT 1", "SET k b", "INCR n", "SELECT 0", "GET k", "EXEC"]
    *queued, reply = await told(client, *requests)
    assert queued == [OK, *[QUEUED] * 6]
    assert reply == b"*6\r\n+OK\r\n+OK\r\n+OK\r\n:1\r\n+OK\r\n$1\r\na\r\n"
    assert await told(client, "SELECT 1", "GET k", "GET n") == [OK, b"$1\r\nb\r\n", b"$1\r\n1\r\n"]


@pytest.mark.parametrize(
    ("watched", "change", "breaks"),
    [
        ((0, "k"), ("SELECT 1", "SET k x"), False),
        ((1, "k"), ("SELECT 1", "SET k x"), True),
        ((1, "k"), ("SET k x",), False),
        ((1, "k"), ("SET k x", "MOVE k 1"), True),
        ((0, "here"), ("MOVE here 1",), True),
        ((1, "here"), ("COPY here here DB 1",), True),
        ((0, "here"), ("COPY here here DB 1",), False),
        ((0, "here"), ("SWAPDB 0 1",), True),
        ((1, "here"), ("SWAPDB 0 1",), True),
        ((0, "nowhere"), ("SWAPDB 0 1",), False),
        ((0, "here"), ("SWAPDB 1 2",), False),
        ((0, "here"), ("SWAPDB 0 0",), False),
        ((0, "here"), ("SELECT 1", "FLUSHDB"), False),
        ((0, "here"), ("FLUSHDB",), True),
        ((0, "here"), ("SELECT 1", "FLUSHALL"), True),
        ((0, "nowhere"), ("FLUSHALL",), False),
        ((0, "index"), ("SELECT 1", "SWAPDB 0 1", "VDEL index m"), True),
    ],
)
async def test_watch(house: House, watched: tuple[int, str], change: tuple[str, ...], breaks: bool) -> None:
    client, other = house.connect(), house.connect()
    await told(other, "SET here v", "VNEW index 2")
    await other.call([b"VADD", b"index", b"m", VECTOR])
    await told(client, f"SELECT {watched[0]}", f"WATCH {watched[1]}", "SELECT 0", "MULTI", "PING")
    await told(other, *change)
    assert await client.call("EXEC") == (b"*-1\r\n" if breaks else b"*1\r\n+PONG\r\n")
    assert not house.database.watches.by_key


async def test_monitor_shows_the_database(house: House) -> None:
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    await client.call("SELECT 12")
    await watching.reply()
    await client.call("GET k")
    assert b" [12 " in await watching.reply()


# For each write what has to be there before, and one with something to change.
WRITES: dict[str, tuple[list[str], str]] = {
    "set": ([], "SET k v"),
    "setnx": ([], "SETNX k v"),
    "setex": ([], "SETEX k 100 v"),
    "psetex": ([], "PSETEX k 1000 v"),
    "mset": ([], "MSET k v l w"),
    "msetnx": ([], "MSETNX k v l w"),
    "append": (["SET k v"], "APPEND k w"),
    "setrange": (["SET k v"], "SETRANGE k 2 w"),
    "setbit": (["SET k v"], "SETBIT k 7 1"),
    "incr": ([], "INCR k"),
    "decr": ([], "DECR k"),
    "incrby": ([], "INCRBY k 5"),
    "decrby": ([], "DECRBY k 5"),
    "incrbyfloat": ([], "INCRBYFLOAT k 0.5"),
    "getset": ([], "GETSET k v"),
    "getdel": (["SET k v"], "GETDEL k"),
    "getex": (["SET k v"], "GETEX k EX 100"),
    "del": (["SET k v"], "DEL k"),
    "delex": (["SET k v"], "DELEX k"),
    "unlink": (["SET k v"], "UNLINK k"),
    "expire": (["SET k v"], "EXPIRE k 100"),
    "pexpire": (["SET k v"], "PEXPIRE k 100"),
    "expireat": (["SET k v"], "EXPIREAT k 1900000000"),
    "pexpireat": (["SET k v"], "PEXPIREAT k 1900000000000"),
    "persist": (["SET k v EX 100"], "PERSIST k"),
    "rename": (["SET k v"], "RENAME k l"),
    "renamenx": (["SET k v"], "RENAMENX k l"),
    "copy": (["SET l v"], "COPY l k"),
    "move": (["SET k v"], "MOVE k 9"),
    "swapdb": (["SET k v"], "SWAPDB 8 9"),
    "flushdb": (["SET k v"], "FLUSHDB"),
    "flushall": (["SET k v"], "FLUSHALL"),
    "vnew": ([], "VNEW k 1"),
    "vadd": (["VNEW k 1"], "VADD k m 1234"),
    "vmadd": (["VNEW k 1"], "VMADD k m 1234"),
    "vsetattr": (["VNEW k 1", "VADD k m 1234"], 'VSETATTR k m "{}"'),
    "vdel": (["VNEW k 1", "VADD k m 1234"], "VDEL k m"),
    "vdelby": (["VNEW k 1", "VADD k m 1234", 'VSETATTR k m {"n":1}'], "VDELBY k FILTER .n==1"),
}

# They change nothing that a key holds: a graph is built.
QUIET = {"voptimize"}


def test_every_write_is_named() -> None:
    names = {command.name for command in COMMANDS.values() if command.writes}
    assert names == WRITES.keys() | QUIET


@pytest.mark.parametrize("name", sorted(WRITES))
async def test_a_write_breaks_watches_and_is_told_to_observers(house: House, name: str) -> None:
    """In a database that is not the first: no write touches another one than it names."""
    before, request = WRITES[name]
    client, other = house.connect(), house.connect()
    await told(other, "SET k kept", "SELECT 8", *before)
    await told(client, "SELECT 8", "WATCH k", "MULTI", "PING")
    seen: list[str] = []
    house.database.observe(lambda operation, touches: seen.append(type(operation).__name__))
    lsn = house.database.lsn
    reply = await other.call(request)
    assert not reply.startswith(b"-"), reply
    assert await client.call("EXEC") == b"*-1\r\n"
    assert len(seen) == house.database.lsn - lsn > 0
    if name != "flushall":
        assert await told(other, "SELECT 0", "GET k") == [OK, b"$4\r\nkept\r\n"]


def test_every_operation_has_an_effect_and_says_what_it_touches() -> None:
    assert {effect.touches is not None for effect in KINDS.effects.values()} == {True}
    assert KINDS.effects[Flush].touches(Flush(3)).databases == (3,)
