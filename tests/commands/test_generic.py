from __future__ import annotations

import pytest

from engram.operations import SetExpiry, SetStrings
from tests.commands.conftest import Conversation, Converse, add, bulks, search
from tests.conftest import Client, House, ManualJournal, OpenHouse, vector

CONVERSATIONS: dict[str, Conversation] = {
    "del and exists": (
        ("SET a 1", b"+OK\r\n"),
        ("SET b 1", b"+OK\r\n"),
        ("EXISTS a a b nosuch", b":3\r\n"),
        ("DEL a a nosuch", b":1\r\n"),
        ("EXISTS a", b":0\r\n"),
        ("UNLINK b nosuch", b":1\r\n"),
        ("DEL b", b":0\r\n"),
    ),
    "type": (
        ("SET a 1", b"+OK\r\n"),
        ("TYPE a", b"+string\r\n"),
        ("TYPE nosuch", b"+none\r\n"),
    ),
    "expire": (
        ("EXPIRE a 10", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a 10", b":1\r\n"),
        ("TTL a", b":10\r\n"),
        ("PEXPIRE a 20000", b":1\r\n"),
        ("TTL a", b":20\r\n"),
        ("EXPIREAT a 99999999999", b":1\r\n"),
        ("EXPIRETIME a", b":99999999999\r\n"),
        ("PEXPIREAT a 99999999999999", b":1\r\n"),
        ("PEXPIRETIME a", b":99999999999999\r\n"),
        ("PERSIST a", b":1\r\n"),
        ("PERSIST a", b":0\r\n"),
        ("PERSIST nosuch", b":0\r\n"),
        ("TTL a", b":-1\r\n"),
        ("PTTL a", b":-1\r\n"),
        ("EXPIRETIME a", b":-1\r\n"),
        ("PEXPIRETIME a", b":-1\r\n"),
        ("TTL nosuch", b":-2\r\n"),
        ("PTTL nosuch", b":-2\r\n"),
        ("EXPIRETIME nosuch", b":-2\r\n"),
        ("PEXPIRETIME nosuch", b":-2\r\n"),
    ),
    "expire deletes at once what has lapsed": (
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a 0", b":1\r\n"),
        ("EXISTS a", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a -1", b":1\r\n"),
        ("EXISTS a", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("PEXPIRE a -9223372036854775808", b":1\r\n"),
        ("EXISTS a", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("EXPIREAT a 1", b":1\r\n"),
        ("EXISTS a", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("PEXPIREAT a -1", b":1\r\n"),
        ("DBSIZE", b":0\r\n"),
    ),
    "conditions of expire": (
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a 10 XX", b":0\r\n"),
        ("EXPIRE a 10 GT", b":0\r\n"),
        ("EXPIRE a 100 lt", b":1\r\n"),
        ("EXPIRE a 50 NX", b":0\r\n"),
        ("EXPIRE a 50 GT", b":0\r\n"),
        ("EXPIRE a 100 GT", b":0\r\n"),
        ("EXPIRE a 200 GT", b":1\r\n"),
        ("EXPIRE a 300 LT", b":0\r\n"),
        ("EXPIRE a 20 LT", b":1\r\n"),
        ("EXPIRE a 30 XX GT", b":1\r\n"),
        ("EXPIRE a 20 XX LT", b":1\r\n"),
        ("TTL a", b":20\r\n"),
        ("PERSIST a", b":1\r\n"),
        ("EXPIRE a 20 NX NX", b":1\r\n"),
    ),
    "conditions of expire that do not go together": (
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a 20 NX GT", b"-ERR NX and XX, GT or LT options at the same time are not compatible\r\n"),
        ("EXPIRE a 20 XX NX", b"-ERR NX and XX, GT or LT options at the same time are not compatible\r\n"),
        ("EXPIRE a 20 GT LT", b"-ERR GT and LT options at the same time are not compatible\r\n"),
        ("EXPIRE a 20 foo", b"-ERR Unsupported option foo\r\n"),
        ("EXPIRE nosuch 20 foo", b"-ERR Unsupported option foo\r\n"),
        ("TTL a", b":-1\r\n"),
    ),
    "bad expiries": (
        ("SET a 1", b"+OK\r\n"),
        ("EXPIRE a abc", b"-ERR value is not an integer or out of range\r\n"),
        ("EXPIRE a 9223372036854775807", b"-ERR invalid expire time in 'expire' command\r\n"),
        ("EXPIRE a 9223372036854776", b"-ERR invalid expire time in 'expire' command\r\n"),
        ("EXPIRE a -9223372036854775808", b"-ERR invalid expire time in 'expire' command\r\n"),
        ("PEXPIRE a 9223372036854775807", b"-ERR invalid expire time in 'pexpire' command\r\n"),
        ("EXPIREAT a 9223372036854775807", b"-ERR invalid expire time in 'expireat' command\r\n"),
        ("PEXPIREAT a 9223372036854775807", b":1\r\n"),
        ("PEXPIRETIME a", b":9223372036854775807\r\n"),
    ),
    "keys": (
        ("KEYS *", b"*0\r\n"),
        ("SET hello 1", b"+OK\r\n"),
        ("KEYS *", b"*1\r\n$5\r\nhello\r\n"),
        ("KEYS h*llo", b"*1\r\n$5\r\nhello\r\n"),
        ("KEYS h[a-f]llo", b"*1\r\n$5\r\nhello\r\n"),
        ("KEYS h[^f]llo", b"*1\r\n$5\r\nhello\r\n"),
        ("KEYS h[f-z]llo", b"*0\r\n"),
        ("KEYS x*", b"*0\r\n"),
    ),
    "scan": (
        ("SCAN 0", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SET hello 1", b"+OK\r\n"),
        ("SCAN 0", b"*2\r\n$1\r\n0\r\n*1\r\n$5\r\nhello\r\n"),
        ("SCAN 0 MATCH h* COUNT 100", b"*2\r\n$1\r\n0\r\n*1\r\n$5\r\nhello\r\n"),
        ("SCAN 0 match x*", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 TYPE string", b"*2\r\n$1\r\n0\r\n*1\r\n$5\r\nhello\r\n"),
        ("SCAN 0 TYPE STRING", b"*2\r\n$1\r\n0\r\n*1\r\n$5\r\nhello\r\n"),
        ("SCAN 0 TYPE hash", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 TYPE nosuch", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 COUNT 10 COUNT 5", b"*2\r\n$1\r\n0\r\n*1\r\n$5\r\nhello\r\n"),
    ),
    "scan misused": (
        ("SCAN", b"-ERR wrong number of arguments for 'scan' command\r\n"),
        ("SCAN a", b"-ERR invalid cursor\r\n"),
        ("SCAN -1", b"-ERR invalid cursor\r\n"),
        ("SCAN " + "9" * 5000, b"-ERR invalid cursor\r\n"),
        ("SCAN 18446744073709551616", b"-ERR invalid cursor\r\n"),
        ("SCAN 0 COUNT 0", b"-ERR syntax error\r\n"),
        ("SCAN 0 COUNT -1", b"-ERR syntax error\r\n"),
        ("SCAN 0 COUNT a", b"-ERR value is not an integer or out of range\r\n"),
        ("SCAN 0 COUNT", b"-ERR syntax error\r\n"),
        ("SCAN 0 MATCH", b"-ERR syntax error\r\n"),
        ("SCAN 0 foo", b"-ERR syntax error\r\n"),
        ("SCAN 0 foo bar", b"-ERR syntax error\r\n"),
    ),
    "rename": (
        ("SET a 1 EX 100", b"+OK\r\n"),
        ("SET b 2", b"+OK\r\n"),
        ("RENAME a b", b"+OK\r\n"),
        ("MGET a b", b"*2\r\n$-1\r\n$1\r\n1\r\n"),
        ("TTL b", b":100\r\n"),
        ("SET a 3", b"+OK\r\n"),
        ("RENAME a b", b"+OK\r\n"),
        ("GET b", b"$1\r\n3\r\n"),
        ("TTL b", b":-1\r\n"),
        ("RENAME b b", b"+OK\r\n"),
        ("GET b", b"$1\r\n3\r\n"),
        ("RENAME nosuch b", b"-ERR no such key\r\n"),
        ("RENAME nosuch nosuch", b"-ERR no such key\r\n"),
        ("RENAME b", b"-ERR wrong number of arguments for 'rename' command\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("RENAME v w", b"+OK\r\n"),
        ("EXISTS v", b":0\r\n"),
        ("TYPE w", b"+vectorset\r\n"),
        ("RENAME w b", b"+OK\r\n"),
        ("TYPE b", b"+vectorset\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("RENAME a b", b"+OK\r\n"),
        ("TYPE b", b"+string\r\n"),
    ),
    "renamenx": (
        ("SET a 1 EX 100", b"+OK\r\n"),
        ("SET b 2", b"+OK\r\n"),
        ("RENAMENX a b", b":0\r\n"),
        ("RENAMENX a a", b":0\r\n"),
        ("RENAMENX a c", b":1\r\n"),
        ("TTL c", b":100\r\n"),
        ("MGET a b c", b"*3\r\n$-1\r\n$1\r\n2\r\n$1\r\n1\r\n"),
        ("RENAMENX nosuch a", b"-ERR no such key\r\n"),
        ("RENAMENX nosuch nosuch", b"-ERR no such key\r\n"),
        ("RENAMENX a", b"-ERR wrong number of arguments for 'renamenx' command\r\n"),
    ),
    "copy": (
        ("SET a 1 EX 100", b"+OK\r\n"),
        ("COPY a b", b":1\r\n"),
        ("MGET a b", b"*2\r\n$1\r\n1\r\n$1\r\n1\r\n"),
        ("TTL b", b":100\r\n"),
        ("SET a 2", b"+OK\r\n"),
        ("COPY a b", b":0\r\n"),
        ("COPY a b REPLACE", b":1\r\n"),
        ("GET b", b"$1\r\n2\r\n"),
        ("TTL b", b":-1\r\n"),
        ("COPY a c DB 0 REPLACE DB 0 replace", b":1\r\n"),
        ("COPY nosuch a", b":0\r\n"),
        ("COPY nosuch a REPLACE", b":0\r\n"),
        ("GET a", b"$1\r\n2\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("COPY v a", b":0\r\n"),
        ("COPY v w", b"-ERR not supported for this module key\r\n"),
        ("COPY v a REPLACE", b"-ERR not supported for this module key\r\n"),
        ("GET a", b"$1\r\n2\r\n"),
        ("COPY a v", b":0\r\n"),
        ("COPY a v REPLACE", b":1\r\n"),
        ("TYPE v", b"+string\r\n"),
    ),
    "copy misused": (
        ("SET a 1", b"+OK\r\n"),
        ("COPY a a", b"-ERR source and destination objects are the same\r\n"),
        ("COPY a a REPLACE", b"-ERR source and destination objects are the same\r\n"),
        ("COPY nosuch nosuch", b"-ERR source and destination objects are the same\r\n"),
        ("COPY a b DB", b"-ERR syntax error\r\n"),
        ("COPY a b FOO", b"-ERR syntax error\r\n"),
        ("COPY nosuch b FOO", b"-ERR syntax error\r\n"),
        ("COPY a b DB a", b"-ERR value is not an integer or out of range\r\n"),
        ("COPY a b DB 16", b"-ERR DB index is out of range\r\n"),
        ("COPY a b DB -1", b"-ERR DB index is out of range\r\n"),
        ("COPY a b DB 16 FOO", b"-ERR DB index is out of range\r\n"),
        ("COPY nosuch b DB 16", b"-ERR DB index is out of range\r\n"),
        (
            "COPY a b DB 99999999999",
            b"-ERR value is out of range, value must between -2147483648 and 2147483647\r\n",
        ),
        ("COPY a", b"-ERR wrong number of arguments for 'copy' command\r\n"),
        ("EXISTS b", b":0\r\n"),
    ),
    "numbers of databases": (
        ("SET a 1", b"+OK\r\n"),
        ("SELECT 0", b"+OK\r\n"),
        ("SELECT 16", b"-ERR DB index is out of range\r\n"),
        ("SELECT -1", b"-ERR DB index is out of range\r\n"),
        ("SELECT a", b"-ERR value is not an integer or out of range\r\n"),
        (
            "SELECT 4294967296",
            b"-ERR value is out of range, value must between -2147483648 and 2147483647\r\n",
        ),
        ("SELECT 99999999999999999999", b"-ERR value is not an integer or out of range\r\n"),
        ("SWAPDB 0 0", b"+OK\r\n"),
        ("SWAPDB 0 16", b"-ERR DB index is out of range\r\n"),
        ("SWAPDB -1 0", b"-ERR DB index is out of range\r\n"),
        ("SWAPDB a 0", b"-ERR invalid first DB index\r\n"),
        ("SWAPDB a b", b"-ERR invalid first DB index\r\n"),
        ("SWAPDB 0 b", b"-ERR invalid second DB index\r\n"),
        ("SWAPDB 99999999999999 0", b"-ERR invalid first DB index\r\n"),
        ("SWAPDB 0", b"-ERR wrong number of arguments for 'swapdb' command\r\n"),
        ("MOVE a 0", b"-ERR source and destination objects are the same\r\n"),
        ("MOVE nosuch 0", b"-ERR source and destination objects are the same\r\n"),
        ("MOVE a 16", b"-ERR DB index is out of range\r\n"),
        ("MOVE a -1", b"-ERR DB index is out of range\r\n"),
        ("MOVE a b", b"-ERR value is not an integer or out of range\r\n"),
        (
            "MOVE a 99999999999999",
            b"-ERR value is out of range, value must between -2147483648 and 2147483647\r\n",
        ),
        ("MOVE a", b"-ERR wrong number of arguments for 'move' command\r\n"),
        ("GET a", b"$1\r\n1\r\n"),
    ),
    "touch and randomkey": (
        ("RANDOMKEY", b"$-1\r\n"),
        ("TOUCH a", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("RANDOMKEY", b"$1\r\na\r\n"),
        ("TOUCH a a b", b":2\r\n"),
        ("TOUCH", b"-ERR wrong number of arguments for 'touch' command\r\n"),
        ("RANDOMKEY x", b"-ERR wrong number of arguments for 'randomkey' command\r\n"),
        ("PEXPIREAT a 99999999999999", b":1\r\n"),
        ("RANDOMKEY", b"$1\r\na\r\n"),
    ),
    "cursors of scan": (
        ("SCAN 00", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN +0", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN -0", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN ' 0'", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN '0 '", b"-ERR invalid cursor\r\n"),
        ("SCAN ''", b"-ERR invalid cursor\r\n"),
        ("SCAN 0x10", b"-ERR invalid cursor\r\n"),
        ("SCAN 1e1", b"-ERR invalid cursor\r\n"),
        ("SCAN -1", b"-ERR invalid cursor\r\n"),
        ("SCAN a FOO", b"-ERR invalid cursor\r\n"),
        ("SCAN 18446744073709551615", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 COUNT a MATCH", b"-ERR value is not an integer or out of range\r\n"),
        ("SCAN 0 COUNT 9223372036854775807", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 COUNT 9223372036854775808", b"-ERR value is not an integer or out of range\r\n"),
    ),
    "a type that is a vector set": (
        ("VNEW v 2", b"+OK\r\n"),
        ("TYPE v", b"+vectorset\r\n"),
        ("SCAN 0 TYPE vectorset", b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nv\r\n"),
        ("SCAN 0 TYPE string", b"*2\r\n$1\r\n0\r\n*0\r\n"),
        ("EXPIRETIME v", b":-1\r\n"),
        ("PERSIST v", b":0\r\n"),
        ("EXPIRE v 100", b":1\r\n"),
        ("TTL v", b":100\r\n"),
    ),
    "numbers of arguments": (
        ("DEL", b"-ERR wrong number of arguments for 'del' command\r\n"),
        ("UNLINK", b"-ERR wrong number of arguments for 'unlink' command\r\n"),
        ("EXISTS", b"-ERR wrong number of arguments for 'exists' command\r\n"),
        ("TYPE", b"-ERR wrong number of arguments for 'type' command\r\n"),
        ("TYPE a b", b"-ERR wrong number of arguments for 'type' command\r\n"),
        ("EXPIRE a", b"-ERR wrong number of arguments for 'expire' command\r\n"),
        ("TTL", b"-ERR wrong number of arguments for 'ttl' command\r\n"),
        ("TTL a b", b"-ERR wrong number of arguments for 'ttl' command\r\n"),
        ("PERSIST", b"-ERR wrong number of arguments for 'persist' command\r\n"),
        ("KEYS", b"-ERR wrong number of arguments for 'keys' command\r\n"),
        ("KEYS a b", b"-ERR wrong number of arguments for 'keys' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def test_an_index_answers_under_its_new_name(house: House) -> None:
    client = house.connect()
    await client.call("VNEW i 2 METRIC l2")
    await client.call("VNEW other 3")
    await add(client, "i", "x", 1, 0)
    await client.call("EXPIRE i 100")
    assert await client.call("RENAME i other") == b"+OK\r\n"
    assert await search(client, "other", vector(1, 0), b"1") == bulks("x", "0")
    assert await search(client, "i", vector(1, 0), b"1") == b"-ERR no such index\r\n"
    assert await add(client, "other", "y", 2, 0) == b":1\r\n"
    assert await client.call("TTL other") == b":100\r\n"
    assert await client.call("DBSIZE") == b":1\r\n"
    assert len(house.engine.indices) == 1


async def test_names_of_what_has_lapsed(house: House) -> None:
    client = house.connect()
    await client.call("SET a 1 PX 10")
    await client.call("SET b 2 PX 10")
    await client.call("SET c 3")
    house.clock.time += 10
    assert await client.call("RENAME a d") == b"-ERR no such key\r\n"
    assert await client.call("COPY a d") == b":0\r\n"
    assert await client.call("RENAMENX c b") == b":1\r\n"
    assert await client.call("TTL b") == b":-1\r\n"
    assert await client.call("TOUCH a b c") == b":1\r\n"
    assert await client.call("RANDOMKEY") == b"$1\r\nb\r\n"


async def test_a_random_key_is_never_one_that_has_lapsed(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client = house.connect()
        await client.call("SET a 1 PX 10")
        await client.call("SET b 2 PX 10")
        house.clock.time += 10
        journal.room = False
        assert await client.call("RANDOMKEY") == b"$-1\r\n"


async def test_random_keys_are_all_keys(client: Client) -> None:
    await client.call("MSET a 1 b 2 c 3")
    found = {await client.call("RANDOMKEY") for _ in range(200)}
    assert found == {b"$1\r\na\r\n", b"$1\r\nb\r\n", b"$1\r\nc\r\n"}


async def test_random_keys_among_many_that_have_lapsed(house: House) -> None:
    client = house.connect()
    house.database.commit(SetStrings(tuple(b"%d" % number for number in range(5000)), (b"",) * 5000))
    for number in range(4900):
        house.database.commit(SetExpiry(b"%d" % number, house.clock.time + 10))
    house.clock.time += 10
    for _ in range(10):
        drawn = (await client.call("RANDOMKEY")).split()[1]
        assert 4900 <= int(drawn) < 5000


async def scan(client: Client, cursor: bytes, *options: bytes) -> tuple[bytes, list[bytes]]:
    """One call of SCAN: the next cursor, and the keys, which are numbers."""
    await client.send([b"SCAN", cursor, *options])
    words = (await client.reply()).split(b"\r\n")
    assert words[0] == b"*2"
    return words[2], words[5::2]


async def test_any_number_of_scans_end(client: Client) -> None:
    for number in range(20):
        await client.call(f"SET {number} x")
    scans: dict[int, tuple[bytes, list[bytes]]] = dict.fromkeys(range(300), (b"0", []))
    for _ in range(2):
        for number, (cursor, found) in scans.items():
            cursor, more = await scan(client, cursor, b"COUNT", b"10")
            scans[number] = cursor, found + more
            await client.call(f"SET {1000 + number} x")
            await client.call(f"DEL {1000 + number - 5}")
    for cursor, found in scans.values():
        assert cursor == b"0" or len(found) == 20
    assert set(scans[0][1]) == {b"%d" % number for number in range(20)}


async def test_a_scan_takes_some_thousand_keys_at_once(house: House) -> None:
    keys = tuple(b"%d" % number for number in range(50_000))
    house.database.commit(SetStrings(keys, (b"",) * len(keys)))
    client = house.connect()
    cursor, found = await scan(client, b"0", b"COUNT", b"9223372036854775807")
    calls = 1
    while cursor != b"0":
        assert 0 < len(found) <= calls << 14
        cursor, more = await scan(client, cursor, b"COUNT", b"1000000", b"MATCH", b"*")
        found += more
        calls += 1
    assert sorted(found) == sorted(keys)
    # Fewer where each is looked at.
    for options in ((b"MATCH", b"?*"), (b"TYPE", b"string")):
        cursor, found = await scan(client, b"0", b"COUNT", b"1000000", *options)
        assert len(found) == 4096
        while cursor != b"0":
            cursor, more = await scan(client, cursor, b"COUNT", b"1000000", *options)
            found += more
        assert sorted(found) == sorted(keys)
    # The longer a pattern is, the longer each key may take to match with it.
    cursor, found = await scan(client, b"0", b"COUNT", b"1000000", b"MATCH", b"*" + b"[0-9]*" * 600)
    assert cursor != b"0"
    assert len(found) < 2000
