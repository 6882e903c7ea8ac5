from __future__ import annotations

import pytest

from tests.commands.conftest import Conversation, Converse, add, parse
from tests.conftest import Client, House, vector

NO_FREQUENCY = (
    b"-ERR An LFU maxmemory policy is not selected, access frequency not tracked."
    b" Please note that when switching between policies at runtime"
    b" LRU and LFU data will take some time to adjust.\r\n"
)
HELP = (
    b"*15\r\n"
    b"+OBJECT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\r\n"
    b"+ENCODING <key>\r\n"
    b"+    Return the kind of internal representation used in order to store the value\r\n"
    b"+    associated with a <key>.\r\n"
    b"+FREQ <key>\r\n"
    b"+    Return the access frequency index of the <key>. The returned integer is\r\n"
    b"+    proportional to the logarithm of the recent access frequency of the key.\r\n"
    b"+IDLETIME <key>\r\n"
    b"+    Return the idle time of the <key>, that is the approximated number of\r\n"
    b"+    seconds elapsed since the last access to the key.\r\n"
    b"+REFCOUNT <key>\r\n"
    b"+    Return the number of references of the value associated with the specified\r\n"
    b"+    <key>.\r\n"
    b"+HELP\r\n"
    b"+    Print this help.\r\n"
)

CONVERSATIONS: dict[str, Conversation] = {
    "encodings": (
        ("SET k 12345", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$3\r\nint\r\n"),
        ("SET k -5", b"+OK\r\n"),
        ("object encoding k", b"$3\r\nint\r\n"),
        ("SET k 9223372036854775807", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$3\r\nint\r\n"),
        ("SET k 9223372036854775808", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$6\r\nembstr\r\n"),
        ("SET k 0123", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$6\r\nembstr\r\n"),
        ("SET k ''", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$6\r\nembstr\r\n"),
        ("SET k 12345678901234567890123456789012345678901234", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$6\r\nembstr\r\n"),
        ("SET k 123456789012345678901234567890123456789012345", b"+OK\r\n"),
        ("OBJECT ENCODING k", b"$3\r\nraw\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("OBJECT ENCODING v", b"$3\r\nraw\r\n"),
        ("OBJECT ENCODING nosuch", b"$-1\r\n"),
    ),
    "references, idle time and frequency": (
        ("SET k abc", b"+OK\r\n"),
        ("OBJECT REFCOUNT k", b":1\r\n"),
        ("SET k 9999", b"+OK\r\n"),
        ("OBJECT REFCOUNT k", b":2147483647\r\n"),
        ("SET k 10000", b"+OK\r\n"),
        ("OBJECT REFCOUNT k", b":1\r\n"),
        ("SET k -1", b"+OK\r\n"),
        ("OBJECT REFCOUNT k", b":1\r\n"),
        ("VNEW v 2", b"+OK\r\n"),
        ("OBJECT REFCOUNT v", b":1\r\n"),
        ("OBJECT IDLETIME v", b":0\r\n"),
        ("OBJECT IDLETIME k", b":0\r\n"),
        (
            "OBJECT FREQ k",
            NO_FREQUENCY,
        ),
        ("OBJECT REFCOUNT nosuch", b"$-1\r\n"),
        ("OBJECT IDLETIME nosuch", b"$-1\r\n"),
        ("OBJECT FREQ nosuch", b"$-1\r\n"),
    ),
    "object misused": (
        ("OBJECT", b"-ERR wrong number of arguments for 'object' command\r\n"),
        ("OBJECT FOO", b"-ERR unknown subcommand 'FOO'. Try OBJECT HELP.\r\n"),
        ("OBJECT FOO a", b"-ERR unknown subcommand 'FOO'. Try OBJECT HELP.\r\n"),
        ("OBJECT ENCODING", b"-ERR wrong number of arguments for 'object|encoding' command\r\n"),
        ("OBJECT ENCODING a b", b"-ERR wrong number of arguments for 'object|encoding' command\r\n"),
        ("OBJECT HELP a", b"-ERR wrong number of arguments for 'object|help' command\r\n"),
        (
            "OBJECT HELP",
            HELP,
        ),
    ),
    "memory usage misused": (
        ("MEMORY", b"-ERR wrong number of arguments for 'memory' command\r\n"),
        ("MEMORY FOO", b"-ERR unknown subcommand 'FOO'. Try MEMORY HELP.\r\n"),
        ("MEMORY USAGE", b"-ERR wrong number of arguments for 'memory|usage' command\r\n"),
        ("MEMORY USAGE nosuch", b"$-1\r\n"),
        ("MEMORY USAGE nosuch SAMPLES 5", b"$-1\r\n"),
        ("MEMORY USAGE nosuch SAMPLES", b"-ERR syntax error\r\n"),
        ("MEMORY USAGE nosuch SAMPLES -1", b"-ERR syntax error\r\n"),
        ("MEMORY USAGE nosuch SAMPLES a", b"-ERR value is not an integer or out of range\r\n"),
        ("MEMORY USAGE nosuch FOO 1", b"-ERR syntax error\r\n"),
        ("MEMORY USAGE nosuch SAMPLES 1 2", b"-ERR syntax error\r\n"),
        ("MEMORY USAGE nosuch SAMPLES 1 SAMPLES 2", b"$-1\r\n"),
        ("MEMORY HELP x", b"-ERR wrong number of arguments for 'memory|help' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


async def usage(client: Client, key: str, rest: str = "") -> int:
    size: int = parse(await client.call(f"MEMORY USAGE {key} {rest}"))
    return size


async def test_the_memory_of_a_string(client: Client) -> None:
    await client.call("SET k v")
    size = await usage(client, "k")
    assert 50 < size < 250
    await client.call("APPEND k " + "v" * 1000)
    assert await usage(client, "k") == size + 1000
    assert await usage(client, "k", "SAMPLES 0 samples 5") == size + 1000
    await client.call("EXPIRE k 100")
    assert await usage(client, "k") > size + 1000


async def test_the_memory_of_an_index(client: Client) -> None:
    await client.call("VNEW i 256")
    empty = await usage(client, "i")
    for number in range(100):
        await add(client, "i", f"key:{number}", *[number] * 256)
    assert await usage(client, "i") - empty > 100 * 256 * 4


async def test_help_of_memory(client: Client) -> None:
    lines = parse(await client.call("MEMORY HELP"))
    assert lines[0] == b"MEMORY <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"
    assert lines[-1] == b"    Print this help."


async def test_overwrites_without_attributes_take_no_memory_for_any(house: House) -> None:
    client = house.connect()
    await client.send("VNEW i 2", "VNEW j 2")
    for number in range(50):
        await client.call([b"VADD", b"i", b"00", vector(1, 2)])
        await client.call([b"VADD", b"j", b"%02d" % number, vector(1, 2)])
    await client.send(*([b"VDEL", b"j", b"%02d" % number] for number in range(1, 50)))
    await client.arrived()
    overwritten, deleted = [int((await client.call(f"MEMORY USAGE {key}"))[1:-2]) for key in ("i", "j")]
    assert overwritten <= deleted
