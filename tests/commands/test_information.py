from __future__ import annotations

import re

import hiredis
import pytest

from engram import REDIS_VERSION, __version__
from engram.commands.information import human
from tests.commands.test_administration import Snapshots
from tests.conftest import Client, House, OpenHouse, vector


async def info(client: Client, *sections: str) -> dict[str, str]:
    reader = hiredis.Reader()
    reader.feed(await client.call(" ".join(("INFO", *sections))))
    text = reader.gets().decode()
    lines = text.split("\r\n")
    assert lines.pop() == ""
    fields = dict(line.split(":", 1) for line in lines if line and not line.startswith("# "))
    return {**fields, "sections": " ".join(line[2:] for line in lines if line.startswith("# "))}


async def test_what_clients_look_for(house: House) -> None:
    fields = await info(house.connect())
    assert fields["redis_version"] == REDIS_VERSION
    assert fields["engram_version"] == __version__
    assert fields["arch_bits"] == "64"
    assert fields["loading"] == fields["cluster_enabled"] == fields["aof_enabled"] == "0"
    assert fields["role"] == "master"
    assert fields["redis_mode"] == "standalone"
    assert fields["tcp_port"] == "6380"


async def test_sections(house: House) -> None:
    client = house.connect()
    usual = "Server Clients Memory Persistence Stats Replication CPU Errorstats Cluster Keyspace Vectors"
    everything = usual.replace("Errorstats", "Commandstats Errorstats Latencystats")
    for sections, expected in {
        "": usual,
        "default": usual,
        "all": everything,
        "everything": everything,
        "server default": usual,
        "server commandstats server": "Server Commandstats",
        "CPU server": "Server CPU",
        "default latencystats": usual.replace("Errorstats", "Errorstats Latencystats"),
        "keyspace all": everything,
    }.items():
        assert (await info(client, *sections.split()))["sections"] == expected
    assert await client.call("INFO nosuch") == b"$0\r\n\r\n"
    await client.call("HELLO 3")
    assert await client.call("INFO nosuch") == b"=4\r\ntxt:\r\n"
    assert (await client.call("INFO keyspace")) == b"=16\r\ntxt:# Keyspace\r\n\r\n"


async def test_commands_and_their_errors(house: House) -> None:
    client = house.connect()
    await client.call("SET a x")
    await client.call("GET a")
    await client.call("GET a")
    await client.call("INCR a")
    await client.call("GET")
    await client.call("CLIENT ID")
    await client.call("CLIENT NOSUCH")
    await client.call("HELLO 9")
    fields = await info(client, "commandstats", "errorstats", "latencystats")
    assert re.fullmatch(
        r"calls=2,usec=\d+,usec_per_call=\d+\.\d\d,rejected_calls=1,failed_calls=0", fields["cmdstat_get"]
    )
    assert fields["cmdstat_incr"].endswith(",rejected_calls=0,failed_calls=1")
    assert fields["cmdstat_client|id"].startswith("calls=1,")
    assert fields["errorstat_ERR"] == "count=3"
    assert fields["errorstat_NOPROTO"] == "count=1"
    assert re.fullmatch(
        r"p50=\d+\.\d{3},p99=\d+\.\d{3},p99\.9=\d+\.\d{3}", fields["latency_percentiles_usec_get"]
    )
    await client.call("CONFIG RESETSTAT")
    fields = await info(client, "commandstats", "errorstats", "latencystats")
    assert set(fields) == {
        "cmdstat_config|resetstat",
        "latency_percentiles_usec_config|resetstat",
        "sections",
    }


async def test_lookups(house: House) -> None:
    client = house.connect()
    await client.call("SET a x")
    await client.call("GET a")
    await client.call("GET b")
    await client.call("MGET a b c")
    await client.call("EXISTS a a d")
    fields = await info(client, "stats")
    assert (fields["keyspace_hits"], fields["keyspace_misses"]) == ("4", "4")


async def _lookups(house: House, command: str) -> tuple[str, str]:
    """Hits and misses of a command whose key is not there, and then is."""
    client = house.connect()
    await client.call(command)
    await client.call("SET k 5")
    await client.call(command)
    fields = await info(client, "stats")
    return fields["keyspace_hits"], fields["keyspace_misses"]


@pytest.mark.parametrize(
    "command",
    [
        *("BITCOUNT k", "COPY k l", "EXISTS k", "EXPIRETIME k", "GET k", "GETBIT k 1", "GETDEL k", "GETEX k"),
        *("GETRANGE k 0 1", "GETSET k v", "MGET k", "OBJECT ENCODING k", "SET k v GET", "STRLEN k", "TTL k"),
        *("TOUCH k", "TYPE k"),
    ],
)
async def test_who_asks_for_a_value_looks_it_up(house: House, command: str) -> None:
    assert await _lookups(house, command) == ("1", "1")


@pytest.mark.parametrize(
    "command", ["APPEND k 1", "DEL k", "EXPIRE k 9", "INCR k", "MEMORY USAGE k", "SET k v NX", "SETBIT k 1 1"]
)
async def test_who_changes_a_value_looks_nothing_up(house: House, command: str) -> None:
    assert await _lookups(house, command) == ("0", "0")


async def test_who_asks_of_an_index_looks_it_up(house: House) -> None:
    client = house.connect()
    commands = ["VCOUNT i", "VGETATTR i x", "VINFO i", "VSCAN i 0", "VMGET i x", "VGET i x"]
    for command in commands:
        await client.call(command)
    await client.call("VNEW i 2")
    for command in commands:
        await client.call(command)
    await client.call([b"VSEARCH", b"i", vector(1, 2), b"1"])
    fields = await info(client, "stats")
    assert (fields["keyspace_hits"], fields["keyspace_misses"]) == ("7", "6")


async def test_clients(house: House) -> None:
    client, watching, blocked = house.connect(), house.connect(), house.connect()
    await watching.call("WATCH a b")
    await blocked.send("WAIT 1 0")
    await blocked.arrived()
    fields = await info(client, "clients")
    assert fields["connected_clients"] == "3"
    assert fields["watching_clients"] == fields["blocked_clients"] == "1"
    assert fields["total_watched_keys"] == "2"


async def test_memory(house: House) -> None:
    client = house.connect()
    await client.call([b"SET", b"a", bytes(1 << 20)])
    fields = await info(client, "memory")
    assert int(fields["used_memory"]) > 1 << 20
    assert int(fields["used_memory_peak"]) >= int(fields["used_memory"])
    assert int(fields["used_memory_rss"]) > 1 << 20
    assert fields["maxmemory"] == "0"
    assert fields["maxmemory_policy"] == "noeviction"


async def test_counters(house: House) -> None:
    client = house.connect()
    await client.call("SET a 1 PX 5")
    await client.call("SET b 1")
    await client.call("SET c 1 EX 100")
    await client.call("NOSUCH")
    await client.call("VNEW v 1")
    await client.call([b"VADD", b"v", b"x", vector(1)])
    await client.call([b"VSEARCH", b"v", vector(1), b"1"])
    house.clock.time += 5
    await client.call("GET a")
    fields = await info(client)
    assert fields["db0"] == "keys=3,expires=1,avg_ttl=99995,subexpiry=0"
    assert fields["connected_clients"] == "1"
    assert fields["expired_keys"] == "1"
    assert fields["total_error_replies"] == "1"
    assert fields["total_commands_processed"] == "7"
    assert fields["vectors_indices"] == fields["vectors_rows"] == fields["vectors_rows_unindexed"] == "1"
    assert fields["vectors_searches"] == "1"
    assert int(fields["total_net_input_bytes"]) > 100
    await client.call("CONFIG RESETSTAT")
    fields = await info(client)
    assert fields["total_error_replies"] == fields["expired_keys"] == "0"
    assert fields["total_commands_processed"] == "1"


async def test_persistence(open_house: OpenHouse) -> None:
    storage = Snapshots()
    storage.held.allocation_error = "No space left on device"
    async with open_house(storage=storage) as house:
        fields = await info(house.connect(), "persistence")
    assert fields["aof_enabled"] == "1"
    assert fields["aof_last_write_status"] == "err"
    assert fields["log_allocation_error"] == "No space left on device"
    assert fields["rdb_last_bgsave_status"] == "ok"
    assert fields["rdb_last_bgsave_time_sec"] == "2"
    assert fields["rdb_changes_since_last_save"] == "7"
    assert fields["log_last_fsync_usec"] == "2000"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1023, "1023B"), (1536, "1.50K"), (3 << 20, "3.00M"), (1 << 50, "1024.00T")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text
