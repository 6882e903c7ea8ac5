from __future__ import annotations

import hiredis
import pytest

from tests.commands.conftest import Conversation, Converse, parse
from tests.conftest import House, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "slowlog misused": (
        ("SLOWLOG", b"-ERR wrong number of arguments for 'slowlog' command\r\n"),
        ("SLOWLOG FOO", b"-ERR unknown subcommand 'FOO'. Try SLOWLOG HELP.\r\n"),
        ("SLOWLOG GET a", b"-ERR count should be greater than or equal to -1\r\n"),
        ("SLOWLOG GET -2", b"-ERR count should be greater than or equal to -1\r\n"),
        (
            "SLOWLOG GET 1 2",
            b"-ERR unknown subcommand or wrong number of arguments for 'GET'. Try SLOWLOG HELP.\r\n",
        ),
        # What came before may have been slow on a busy machine.
        ("CONFIG SET slowlog-log-slower-than -1", b"+OK\r\n"),
        ("SLOWLOG RESET", b"+OK\r\n"),
        ("SLOWLOG GET", b"*0\r\n"),
        ("SLOWLOG LEN", b":0\r\n"),
        ("SLOWLOG LEN x", b"-ERR wrong number of arguments for 'slowlog|len' command\r\n"),
        ("SLOWLOG RESET", b"+OK\r\n"),
    ),
    "latency without monitoring": (
        ("LATENCY LATEST", b"*0\r\n"),
        ("LATENCY HISTORY foo", b"*0\r\n"),
        ("LATENCY HISTORY", b"-ERR wrong number of arguments for 'latency|history' command\r\n"),
        ("LATENCY RESET", b":0\r\n"),
        ("LATENCY RESET foo bar", b":0\r\n"),
        ("LATENCY GRAPH foo", b"-ERR No samples available for event 'foo'\r\n"),
        ("LATENCY FOO", b"-ERR unknown subcommand 'FOO'. Try LATENCY HELP.\r\n"),
    ),
    "monitor misused": (("MONITOR x", b"-ERR wrong number of arguments for 'monitor' command\r\n"),),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def test_calls_that_take_long_are_kept(house: House) -> None:
    client = house.connect()
    await client.call("CLIENT SETNAME me")
    await client.call("CONFIG SET slowlog-log-slower-than 0 slowlog-max-len 3")
    for request in ("AUTH default secret", "GET a", "SET a 1"):
        await client.call(request)
    entries = parse(await client.call("SLOWLOG GET"))
    assert [entry[3] for entry in entries] == [
        [b"SET", b"a", b"1"],
        [b"GET", b"a"],
        [b"AUTH", b"(redacted)", b"(redacted)"],
    ]
    assert all(len(entry) == 6 for entry in entries)
    assert entries[0][4:] == [b"127.0.0.1:1000", b"me"]
    assert entries[0][0] == entries[1][0] + 1
    assert len(parse(await client.call("SLOWLOG GET 1"))) == 1
    assert len(parse(await client.call("SLOWLOG GET -1"))) == 3
    assert await client.call("SLOWLOG LEN") == b":3\r\n"
    await client.call("CONFIG SET slowlog-log-slower-than -1")
    await client.call("SLOWLOG RESET")
    await client.call("GET a")
    assert await client.call("SLOWLOG LEN") == b":0\r\n"


async def test_quick_calls_are_not_kept(open_house: OpenHouse) -> None:
    async with open_house() as house:
        client = house.connect()
        house.server.config.slowlog_log_slower_than = 60_000_000
        await client.call("GET a")
        assert await client.call("SLOWLOG LEN") == b":0\r\n"


async def test_histograms_of_latency(house: House) -> None:
    usage = house.server.statistics.usage
    for nanoseconds in (900, 3000, 33_000, 40_000, 20_000_000):
        usage["get"].record(1, nanoseconds)
    usage["client|id"].record(2, 2000)
    usage["client|list"].record(1, 2000)
    client = house.connect()
    assert await client.call("LATENCY HISTOGRAM nosuch GET get") == (
        b"*2\r\n$3\r\nget\r\n*4\r\n$5\r\ncalls\r\n:5\r\n$14\r\nhistogram_usec\r\n"
        b"*8\r\n:1\r\n:1\r\n:4\r\n:2\r\n:66\r\n:4\r\n:33816\r\n:5\r\n"
    )
    found = parse(await client.call("LATENCY HISTOGRAM client"))
    assert found[::2] == [b"client|id", b"client|list"]
    assert await client.call("LATENCY HISTOGRAM nosuch") == b"*0\r\n"
    reader = hiredis.Reader()
    await client.call("HELLO 3")
    reader.feed(await client.call("LATENCY HISTOGRAM"))
    everything = reader.gets()
    assert everything[b"client|id"] == {b"calls": 2, b"histogram_usec": {1: 2}}
    assert {b"get", b"hello", b"latency|histogram"} <= set(everything)


async def test_a_long_slow_log_is_shown_in_order(house: House) -> None:
    client = house.connect()
    house.server.config.slowlog_max_len = 1000
    (session,) = house.server.sessions.values()
    for number in range(300):
        house.server.slowlog.add(session, [b"n%d" % number], 1)
    reply = await client.call("SLOWLOG GET -1")
    assert reply.startswith(b"*300\r\n")
    places = [reply.index(b"\r\nn%d\r\n" % number) for number in range(300)]
    assert places == sorted(places, reverse=True)
