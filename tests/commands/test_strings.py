from __future__ import annotations

import pytest

from tests.commands.conftest import Conversation, Converse
from tests.conftest import House

CONVERSATIONS: dict[str, Conversation] = {
    "set and get": (
        ("SET k v", b"+OK\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ([b"SET", b"k", b""], b"+OK\r\n"),
        ("GET k", b"$0\r\n\r\n"),
        ("GET nosuch", b"$-1\r\n"),
    ),
    "set if absent": (
        ("SET k v NX", b"+OK\r\n"),
        ("SET k w NX", b"$-1\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SET k w nx", b"$-1\r\n"),
    ),
    "set if present": (
        ("SET k v XX", b"$-1\r\n"),
        ("GET k", b"$-1\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("SET k w XX", b"+OK\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
    ),
    "set and get the old value": (
        ("SET k v GET", b"$-1\r\n"),
        ("SET k w GET", b"$1\r\nv\r\n"),
        ("SET k x NX GET", b"$1\r\nw\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("SET n x NX GET", b"$-1\r\n"),
        ("GET n", b"$1\r\nx\r\n"),
        ("SET m x XX GET", b"$-1\r\n"),
        ("EXISTS m", b":0\r\n"),
        ("SET k y GET XX", b"$1\r\nw\r\n"),
        ("GET k", b"$1\r\ny\r\n"),
        ("SET k z GET GET", b"$1\r\ny\r\n"),
    ),
    "set with an expiry": (
        ("SET k v EX 100", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("SET k v px 100000", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("SET k v EXAT 99999999999", b"+OK\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("SET k v PXAT 99999999999123", b"+OK\r\n"),
        ("PEXPIRETIME k", b":99999999999123\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("SET k v PXAT 99999999999700", b"+OK\r\n"),
        ("EXPIRETIME k", b":100000000000\r\n"),
        ("SET k w", b"+OK\r\n"),
        ("TTL k", b":-1\r\n"),
        ("SET k v EX 100 NX", b"$-1\r\n"),
        ("TTL k", b":-1\r\n"),
        ("SET k v EX 100 XX GET", b"$1\r\nw\r\n"),
        ("TTL k", b":100\r\n"),
    ),
    "set keeps an expiry when asked": (
        ("SET k v EX 100", b"+OK\r\n"),
        ("SET k w KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("SET n v KEEPTTL", b"+OK\r\n"),
        ("TTL n", b":-1\r\n"),
        ("SET k x KEEPTTL KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":100\r\n"),
    ),
    "set to a time that has passed": (
        ("SET k v PXAT 1", b"+OK\r\n"),
        ("GET k", b"$-1\r\n"),
        ("EXISTS k", b":0\r\n"),
        ("SET k v EXAT 1", b"+OK\r\n"),
        ("TTL k", b":-2\r\n"),
    ),
    "options of set that do not go together": (
        ("SET k v NX XX", b"-ERR syntax error\r\n"),
        ("SET k v XX NX", b"-ERR syntax error\r\n"),
        ("SET k v EX", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 PX 10", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 EX 10", b"+OK\r\n"),
        ("SET k v KEEPTTL EX 10", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 KEEPTTL", b"-ERR syntax error\r\n"),
        ("SET k v foo", b"-ERR syntax error\r\n"),
        ("SET k v EX 10 foo", b"-ERR syntax error\r\n"),
        ("EXISTS k", b":1\r\n"),
    ),
    "bad expiries of set": (
        ("SET k v EX 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX -1", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX a", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v EX 1.5", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v PX 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EXAT 0", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v PXAT -5", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854775807", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854776", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v PX 9223372036854775807", b"-ERR invalid expire time in 'set' command\r\n"),
        ("SET k v EX 9223372036854775808", b"-ERR value is not an integer or out of range\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "append and strlen": (
        ("APPEND k abc", b":3\r\n"),
        ([b"APPEND", b"k", b""], b":3\r\n"),
        ("APPEND k de", b":5\r\n"),
        ("GET k", b"$5\r\nabcde\r\n"),
        ("STRLEN k", b":5\r\n"),
        ("STRLEN nosuch", b":0\r\n"),
        ("SET e 5 EX 100", b"+OK\r\n"),
        ("APPEND e 7", b":2\r\n"),
        ("TTL e", b":100\r\n"),
        ("GET e", b"$2\r\n57\r\n"),
    ),
    "lifetimes of set": (
        ("SET k v EX 10 EX 20", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k v KEEPTTL KEEPTTL", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k w XX KEEPTTL GET", b"$1\r\nv\r\n"),
        ("TTL k", b":20\r\n"),
        ("SET k v EX 10 PX 20", b"-ERR syntax error\r\n"),
        ("SET k v KEEPTTL EX 5", b"-ERR syntax error\r\n"),
        ("SET k v EX 5 KEEPTTL", b"-ERR syntax error\r\n"),
        ("SET k v PERSIST", b"-ERR syntax error\r\n"),
        ("SET k v EX NX", b"-ERR value is not an integer or out of range\r\n"),
        ("SET k v EXAT 1", b"+OK\r\n"),
        ("EXISTS k", b":0\r\n"),
        ("SET k v PXAT 5 GET", b"$-1\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "conditions of set and what was there": (
        ("SET k v NX XX", b"-ERR syntax error\r\n"),
        ("SET k v XX NX", b"-ERR syntax error\r\n"),
        ("SET k v XX", b"$-1\r\n"),
        ("SET k v XX GET", b"$-1\r\n"),
        ("SET k v NX NX", b"+OK\r\n"),
        ("SET k w NX", b"$-1\r\n"),
        ("SET k w NX GET", b"$1\r\nv\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SET k w XX GET GET", b"$1\r\nv\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SET v 1 GET", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET v 1 NX GET", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SET v 1 NX", b"$-1\r\n"),
        ("SET v 1 XX", b"+OK\r\n"),
        ("GET v", b"$1\r\n1\r\n"),
    ),
    "mget and mset": (
        ("MSET a 1 b 2", b"+OK\r\n"),
        ("MGET a b nosuch a", b"*4\r\n$1\r\n1\r\n$1\r\n2\r\n$-1\r\n$1\r\n1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("MGET v a", b"*2\r\n$-1\r\n$1\r\n1\r\n"),
        ("SET a x EX 100", b"+OK\r\n"),
        ("MSET a 1 v 2 a 3", b"+OK\r\n"),
        ("MGET a v", b"*2\r\n$1\r\n3\r\n$1\r\n2\r\n"),
        ("TTL a", b":-1\r\n"),
        ("MSET a", b"-ERR wrong number of arguments for 'mset' command\r\n"),
        ("MSET a 1 b", b"-ERR wrong number of arguments for 'mset' command\r\n"),
        ("MGET", b"-ERR wrong number of arguments for 'mget' command\r\n"),
    ),
    "msetnx": (
        ("MSETNX a 1 b 2 a 3", b":1\r\n"),
        ("MGET a b", b"*2\r\n$1\r\n3\r\n$1\r\n2\r\n"),
        ("MSETNX c 1 b 2", b":0\r\n"),
        ("EXISTS c", b":0\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("MSETNX c 1 v 2", b":0\r\n"),
        ("MSETNX c 1 d", b"-ERR wrong number of arguments for 'msetnx' command\r\n"),
        ("MSETNX c", b"-ERR wrong number of arguments for 'msetnx' command\r\n"),
    ),
    "setnx, setex and psetex": (
        ("SETNX k v", b":1\r\n"),
        ("SETNX k w", b":0\r\n"),
        ("GET k", b"$1\r\nv\r\n"),
        ("SETEX k 10 w", b"+OK\r\n"),
        ("TTL k", b":10\r\n"),
        ("GET k", b"$1\r\nw\r\n"),
        ("PSETEX k 20000 x", b"+OK\r\n"),
        ("TTL k", b":20\r\n"),
        ("SETEX k 0 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k -1 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k a v", b"-ERR value is not an integer or out of range\r\n"),
        ("SETEX k 9223372036854775807 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("SETEX k 9223372036854775 v", b"-ERR invalid expire time in 'setex' command\r\n"),
        ("PSETEX k 0 v", b"-ERR invalid expire time in 'psetex' command\r\n"),
        ("PSETEX k 9223372036854775807 v", b"-ERR invalid expire time in 'psetex' command\r\n"),
        ("GET k", b"$1\r\nx\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SETNX v 1", b":0\r\n"),
        ("SETEX v 10 1", b"+OK\r\n"),
        ("GET v", b"$1\r\n1\r\n"),
        ("SETNX k", b"-ERR wrong number of arguments for 'setnx' command\r\n"),
        ("SETEX k 1", b"-ERR wrong number of arguments for 'setex' command\r\n"),
        ("PSETEX k 1", b"-ERR wrong number of arguments for 'psetex' command\r\n"),
    ),
    "getset and getdel": (
        ("GETSET k 1", b"$-1\r\n"),
        ("SET k 1 EX 100", b"+OK\r\n"),
        ("GETSET k 2", b"$1\r\n1\r\n"),
        ("TTL k", b":-1\r\n"),
        ("GETDEL k", b"$1\r\n2\r\n"),
        ("GETDEL k", b"$-1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETSET v 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETDEL v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETSET k", b"-ERR wrong number of arguments for 'getset' command\r\n"),
        ("GETDEL k x", b"-ERR wrong number of arguments for 'getdel' command\r\n"),
    ),
    "getex": (
        ("SET k v", b"+OK\r\n"),
        ("GETEX k", b"$1\r\nv\r\n"),
        ("GETEX k EX 10", b"$1\r\nv\r\n"),
        ("TTL k", b":10\r\n"),
        ("GETEX k", b"$1\r\nv\r\n"),
        ("TTL k", b":10\r\n"),
        ("GETEX k PX 20000 PX 30000", b"$1\r\nv\r\n"),
        ("TTL k", b":30\r\n"),
        ("GETEX k PERSIST PERSIST", b"$1\r\nv\r\n"),
        ("TTL k", b":-1\r\n"),
        ("GETEX k PERSIST", b"$1\r\nv\r\n"),
        ("GETEX k EXAT 99999999999", b"$1\r\nv\r\n"),
        ("EXPIRETIME k", b":99999999999\r\n"),
        ("GETEX k PXAT 99999999999999", b"$1\r\nv\r\n"),
        ("PEXPIRETIME k", b":99999999999999\r\n"),
        ("GETEX k PXAT 1", b"$1\r\nv\r\n"),
        ("EXISTS k", b":0\r\n"),
    ),
    "getex misused": (
        ("GETEX nosuch EX 0", b"$-1\r\n"),
        ("GETEX nosuch EX a", b"$-1\r\n"),
        ("GETEX nosuch FOO", b"-ERR syntax error\r\n"),
        ("SET k v", b"+OK\r\n"),
        ("GETEX k EX 10 PERSIST", b"-ERR syntax error\r\n"),
        ("GETEX k PERSIST EX 10", b"-ERR syntax error\r\n"),
        ("GETEX k EX 10 PX 10", b"-ERR syntax error\r\n"),
        ("GETEX k EX abc PX 5", b"-ERR syntax error\r\n"),
        ("GETEX k EX", b"-ERR syntax error\r\n"),
        ("GETEX k KEEPTTL", b"-ERR syntax error\r\n"),
        ("GETEX k EX 0", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EX -1", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EX 1.5", b"-ERR value is not an integer or out of range\r\n"),
        ("GETEX k EX 9223372036854775807", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k PX 9223372036854775807", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("GETEX k EXAT 0", b"-ERR invalid expire time in 'getex' command\r\n"),
        ("TTL k", b":-1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETEX v", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETEX v EX 0", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETEX", b"-ERR wrong number of arguments for 'getex' command\r\n"),
    ),
    "getrange": (
        ("SET k hello", b"+OK\r\n"),
        ("GETRANGE k 0 -1", b"$5\r\nhello\r\n"),
        ("GETRANGE k -3 -1", b"$3\r\nllo\r\n"),
        ("GETRANGE k -100 1", b"$2\r\nhe\r\n"),
        ("GETRANGE k -1 -100", b"$0\r\n\r\n"),
        ("GETRANGE k -100 -200", b"$0\r\n\r\n"),
        ("GETRANGE k -200 -100", b"$1\r\nh\r\n"),
        ("GETRANGE k -5 -6", b"$0\r\n\r\n"),
        ("GETRANGE k 4 100", b"$1\r\no\r\n"),
        ("GETRANGE k 5 100", b"$0\r\n\r\n"),
        ("GETRANGE k 3 2", b"$0\r\n\r\n"),
        ("GETRANGE k 9223372036854775807 9223372036854775807", b"$0\r\n\r\n"),
        ("GETRANGE k -9223372036854775808 9223372036854775807", b"$5\r\nhello\r\n"),
        ("SUBSTR k 1 2", b"$2\r\nel\r\n"),
        ("GETRANGE nosuch 0 1", b"$0\r\n\r\n"),
        ("GETRANGE nosuch a 1", b"-ERR value is not an integer or out of range\r\n"),
        ("GETRANGE k 0 b", b"-ERR value is not an integer or out of range\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("GETRANGE v 0 1", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("GETRANGE v a 1", b"-ERR value is not an integer or out of range\r\n"),
        ("GETRANGE k 0", b"-ERR wrong number of arguments for 'getrange' command\r\n"),
        ("SUBSTR k", b"-ERR wrong number of arguments for 'substr' command\r\n"),
    ),
    "setrange": (
        ("SETRANGE nosuch 5 ''", b":0\r\n"),
        ("SETRANGE nosuch -1 ''", b"-ERR offset is out of range\r\n"),
        ("SETRANGE nosuch 9223372036854775807 ''", b":0\r\n"),
        ("EXISTS nosuch", b":0\r\n"),
        ("SET k hello EX 100", b"+OK\r\n"),
        ("SETRANGE k 1 XY", b":5\r\n"),
        ("SETRANGE k 4 Z!", b":6\r\n"),
        ("SETRANGE k 100 ''", b":6\r\n"),
        ("GET k", b"$6\r\nhXYlZ!\r\n"),
        ("TTL k", b":100\r\n"),
        ("SETRANGE k 8 z", b":9\r\n"),
        ("GET k", b"$9\r\nhXYlZ!\x00\x00z\r\n"),
        ("SETRANGE p 2 ab", b":4\r\n"),
        ("GET p", b"$4\r\n\x00\x00ab\r\n"),
        ("SETRANGE k -1 z", b"-ERR offset is out of range\r\n"),
        ("SETRANGE k x z", b"-ERR value is not an integer or out of range\r\n"),
        ("SETRANGE k 536870912 x", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        ("SETRANGE k 536870911 xx", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        (
            "SETRANGE k 9223372036854775807 x",
            b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n",
        ),
        ("SETRANGE nosuch 536870912 x", b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"),
        ("EXISTS nosuch", b":0\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("SETRANGE v 5 ''", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SETRANGE v 5 x", b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"),
        ("SETRANGE k 0", b"-ERR wrong number of arguments for 'setrange' command\r\n"),
    ),
    "numbers of arguments": (
        ("SET k", b"-ERR wrong number of arguments for 'set' command\r\n"),
        ("SET", b"-ERR wrong number of arguments for 'set' command\r\n"),
        ("GET", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("GET a b", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("APPEND k", b"-ERR wrong number of arguments for 'append' command\r\n"),
        ("STRLEN", b"-ERR wrong number of arguments for 'strlen' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def test_no_string_is_longer_than_an_argument_may_be(house: House) -> None:
    house.server.config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    refused = b"-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"
    assert await client.call("SETRANGE k 1048575 xy") == refused
    assert await client.call("EXISTS k") == b":0\r\n"
    assert await client.call("SETRANGE k 1048575 x") == b":1048576\r\n"
    assert await client.call("SETRANGE k 0 abc") == b":1048576\r\n"
    assert await client.call("APPEND k x") == refused
    assert await client.call("GETRANGE k 1048570 -1") == b"$6\r\n\0\0\0\0\0x\r\n"


async def test_a_string_is_not_sent_more_often_than_memory_holds(house: House) -> None:
    house.server.config.proto_max_bulk_len = house.server.config.client_output_buffer_limit = 1 << 20
    client = house.connect()
    await client.call("SETRANGE k 99999 x")
    assert len(await client.call([b"MGET", *[b"k"] * 10])) > 1_000_000
    assert await client.call([b"MGET", *[b"k"] * 11]) == (
        b"-ERR the reply would take 1100000 bytes, more than client-output-buffer-limit and"
        b" proto-max-bulk-len\r\n"
    )


async def test_what_has_lapsed_is_not_there(house: House) -> None:
    client = house.connect()
    await client.call("MSET a 1 b 2")
    await client.call("PEXPIRE a 10")
    house.clock.time += 10
    assert await client.call("MGET a b") == b"*2\r\n$-1\r\n$1\r\n2\r\n"
    await client.call("SETEX a 1 x")
    house.clock.time += 1000
    assert await client.call("GETEX a PERSIST") == b"$-1\r\n"
    assert await client.call("MSETNX a 1 c 2") == b":1\r\n"
    await client.call("GETEX a PX 10")
    house.clock.time += 10
    assert await client.call("GETDEL a") == b"$-1\r\n"
    await client.call("SETEX a 1 x")
    house.clock.time += 1000
    assert await client.call("SETRANGE a 1 x") == b":2\r\n"
    assert await client.call("TTL a") == b":-1\r\n"
