from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.commands.bits import ones
from tests.commands.conftest import Conversation, Converse
from tests.conftest import Client, HeldSearches, House, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "setbit and getbit": (
        ("SETBIT b 7 1", b":0\r\n"),
        ("GET b", b"$1\r\n\x01\r\n"),
        ("SETBIT b 7 1", b":1\r\n"),
        ("SETBIT b 7 0", b":1\r\n"),
        ("GET b", b"$1\r\n\x00\r\n"),
        ("SETBIT b 17 1", b":0\r\n"),
        ("GET b", b"$3\r\n\x00\x00@\r\n"),
        ("GETBIT b 17", b":1\r\n"),
        ("GETBIT b 16", b":0\r\n"),
        ("GETBIT b 4294967295", b":0\r\n"),
        ("GETBIT nosuch 0", b":0\r\n"),
        ("SETBIT nosuch 3 0", b":0\r\n"),
        ("GET nosuch", b"$1\r\n\x00\r\n"),
        ("SET e 1 EX 100", b"+OK\r\n"),
        ("SETBIT e 6 1", b":0\r\n"),
        ("GET e", b"$1\r\n3\r\n"),
        ("TTL e", b":100\r\n"),
    ),
    "setbit and getbit misused": (
        ("SETBIT b a 1", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("SETBIT b -1 1", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("SETBIT b 4294967296 1", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("SETBIT b 4294967295 2", b"-ERR bit is not an integer or out of range\r\n"),
        ("SETBIT b 0 -1", b"-ERR bit is not an integer or out of range\r\n"),
        ("SETBIT b 0 a", b"-ERR bit is not an integer or out of range\r\n"),
        ("SETBIT b a a", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("EXISTS b", b":0\r\n"),
        ("GETBIT b a", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("GETBIT b -1", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("GETBIT b 4294967296", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SETBIT v 0 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SETBIT v 0 2", b"-ERR bit is not an integer or out of range\r\n"),
        ("GETBIT v 0", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETBIT v a", b"-ERR bit offset is not an integer or out of range\r\n"),
        ("SETBIT b 0", b"-ERR wrong number of arguments for 'setbit' command\r\n"),
        ("GETBIT b", b"-ERR wrong number of arguments for 'getbit' command\r\n"),
    ),
    "bitcount": (
        ("SET b foobar", b"+OK\r\n"),
        ("BITCOUNT b", b":26\r\n"),
        ("BITCOUNT b 0 0", b":4\r\n"),
        ("BITCOUNT b 1 1", b":6\r\n"),
        ("BITCOUNT b 1 1 BYTE", b":6\r\n"),
        ("BITCOUNT b 5 30 BIT", b":17\r\n"),
        ("BITCOUNT b 5 30 bit", b":17\r\n"),
        ("BITCOUNT b 0 -1 BIT", b":26\r\n"),
        ("BITCOUNT b -2 -1 BIT", b":1\r\n"),
        ("BITCOUNT b -10 -1 BIT", b":5\r\n"),
        ("BITCOUNT b 3 3 BIT", b":0\r\n"),
        ("BITCOUNT b 4 4 BIT", b":0\r\n"),
        ("BITCOUNT b -5 -6", b":0\r\n"),
        ("BITCOUNT b -100 -200", b":0\r\n"),
        ("BITCOUNT b -200 -100", b":4\r\n"),
        ("BITCOUNT b 100 200", b":0\r\n"),
        ("BITCOUNT b 5 2 BIT", b":0\r\n"),
        ("BITCOUNT nosuch", b":0\r\n"),
        ("BITCOUNT nosuch 0 1 BIT", b":0\r\n"),
    ),
    "bitcount misused": (
        ("SET b foobar", b"+OK\r\n"),
        ("BITCOUNT b 0", b"-ERR syntax error\r\n"),
        ("BITCOUNT b 5 30 FOO", b"-ERR syntax error\r\n"),
        ("BITCOUNT b a 30 FOO", b"-ERR value is not an integer or out of range\r\n"),
        ("BITCOUNT b 0 b", b"-ERR value is not an integer or out of range\r\n"),
        ("BITCOUNT b 0 5 BIT x", b"-ERR syntax error\r\n"),
        ("BITCOUNT nosuch 0", b"-ERR syntax error\r\n"),
        ("BITCOUNT nosuch a b", b"-ERR value is not an integer or out of range\r\n"),
        ("BITCOUNT nosuch 0 1 FOO", b"-ERR syntax error\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("BITCOUNT v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("BITCOUNT v a b", b"-ERR value is not an integer or out of range\r\n"),
        ("BITCOUNT v 0", b"-ERR syntax error\r\n"),
        ("BITCOUNT", b"-ERR wrong number of arguments for 'bitcount' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


@given(st.binary(max_size=3000) | st.binary(min_size=2000, max_size=3000), st.data())
def test_bits_are_counted_as_one_counts_them(value: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 8 * len(value)))
    stop = data.draw(st.integers(start, 8 * len(value)))
    digits = "".join(f"{byte:08b}" for byte in value)
    assert sum(ones(value, start, stop)) == digits[start:stop].count("1")


async def test_bits_of_a_long_string(client: Client) -> None:
    await client.call("SETBIT b 8000007 1")
    assert await client.call("BITCOUNT b") == b":1\r\n"
    assert await client.call("BITCOUNT b 8000007 8000007 BIT") == b":1\r\n"
    assert await client.call("BITCOUNT b 0 8000006 BIT") == b":0\r\n"
    assert await client.call("STRLEN b") == b":1000001\r\n"


async def test_no_bit_beyond_the_longest_string(house: House) -> None:
    house.server.config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    refused = b"-ERR bit offset is not an integer or out of range\r\n"
    assert await client.call("SETBIT b 8388608 1") == refused
    assert await client.call("GETBIT b 8388608") == refused
    assert await client.call("GETBIT b 8388607") == b":0\r\n"


async def test_bits_are_counted_as_they_were(house: House) -> None:
    """Others go on while those of a long string are counted."""
    client, other = house.connect(), house.connect()
    await client.call("SETBIT b 79999999 1")
    await client.send(
        "MULTI", "BITCOUNT b", "SETBIT b 0 1", "BITCOUNT b", "DEL b", "BITCOUNT b 0 1 BIT", "EXEC"
    )
    assert await other.call("PING") == b"+PONG\r\n"
    *_, found = [await client.reply() for _ in range(7)]
    assert found == b"*5\r\n:1\r\n:0\r\n:2\r\n:1\r\n:0\r\n"


async def test_bits_of_a_long_string_are_counted_in_a_thread(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await client.call("SETBIT b 799999999 1")
        await client.send("BITCOUNT b", "PING")
        assert await client.arrived() == b""
        await other.send("STRLEN b", "SETBIT b 0 1", "DEL b")
        assert await other.arrived() == b":100000000\r\n:0\r\n:1\r\n"
        searches.work.pop()()
        assert await client.arrived() == b":1\r\n+PONG\r\n"
