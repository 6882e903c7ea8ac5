from __future__ import annotations

import hiredis
import pytest

from engram.commands.registry import COMMANDS
from engram.protocol.replies import bulk, bulk_array
from tests.commands.conftest import Conversation, Converse
from tests.conftest import House

CONVERSATIONS: dict[str, Conversation] = {
    "keys of a request": (
        ("COMMAND GETKEYS get a", b"*1\r\n$1\r\na\r\n"),
        ("COMMAND GETKEYS SET a b", b"*1\r\n$1\r\na\r\n"),
        ("COMMAND GETKEYS del a b c", b"*3\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n"),
        ("COMMAND GETKEYS get", b"-ERR Invalid number of arguments specified for command\r\n"),
        ("COMMAND GETKEYS get a b", b"-ERR Invalid number of arguments specified for command\r\n"),
        ("COMMAND GETKEYS nosuch", b"-ERR Invalid command specified\r\n"),
        ("COMMAND GETKEYS ping", b"-ERR The command has no key arguments\r\n"),
        ("COMMAND GETKEYS client id", b"-ERR The command has no key arguments\r\n"),
        ("COMMAND GETKEYS", b"-ERR wrong number of arguments for 'command|getkeys' command\r\n"),
    ),
    "info of what is not there": (
        ("COMMAND INFO nosuch", b"*1\r\n$-1\r\n"),
        ("COMMAND INFO get|x", b"*1\r\n$-1\r\n"),
        ("COMMAND INFO client|x", b"*1\r\n$-1\r\n"),
    ),
    "lists": (
        ("COMMAND LIST FILTERBY PATTERN get", b"*1\r\n$3\r\nget\r\n"),
        ("COMMAND LIST FILTERBY PATTERN nosuch", b"*0\r\n"),
        ("COMMAND LIST FILTERBY MODULE nosuch", b"*0\r\n"),
        ("COMMAND LIST FILTERBY ACLCAT nosuch", b"*0\r\n"),
        ("COMMAND LIST FILTERBY", b"-ERR syntax error\r\n"),
        ("COMMAND LIST FILTERBY foo bar", b"-ERR syntax error\r\n"),
        ("COMMAND LIST foo", b"-ERR syntax error\r\n"),
    ),
    "subcommands": (
        ("COMMAND FOO", b"-ERR unknown subcommand 'FOO'. Try COMMAND HELP.\r\n"),
        ("COMMAND COUNT x", b"-ERR wrong number of arguments for 'command|count' command\r\n"),
    ),
    "unknown commands": (
        ("FOOBAR", b"-ERR unknown command 'FOOBAR'\r\n"),
        ("FOOBAR x", b"-ERR unknown command 'FOOBAR', with args beginning with: 'x' \r\n"),
        (
            [b"foobar", b"a b", b"c"],
            b"-ERR unknown command 'foobar', with args beginning with: 'a b' 'c' \r\n",
        ),
        # At most 128 bytes of arguments, not characters.
        (
            [b"foobar", "\u00e9".encode() * 3, b"y" * 200],
            b"-ERR unknown command 'foobar', with args beginning with: '%b' '%b' \r\n"
            % ("\u00e9".encode() * 3, b"y" * 119),
        ),
        ([b"x\r\ny", b"a\r\nb"], b"-ERR unknown command 'x  y', with args beginning with: 'a  b' \r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


# As Redis 8 answers, in both versions.
INFO_GET = {
    2: (
        b"*1\r\n*10\r\n$3\r\nget\r\n:2\r\n*2\r\n+readonly\r\n+fast\r\n:1\r\n:1\r\n:1\r\n"
        b"*3\r\n+@read\r\n+@string\r\n+@fast\r\n*0\r\n*1\r\n*6\r\n$5\r\nflags\r\n*2\r\n+RO\r\n+access\r\n"
        b"$12\r\nbegin_search\r\n*4\r\n$4\r\ntype\r\n$5\r\nindex\r\n$4\r\nspec\r\n*2\r\n$5\r\nindex\r\n:1\r\n"
        b"$9\r\nfind_keys\r\n*4\r\n$4\r\ntype\r\n$5\r\nrange\r\n$4\r\nspec\r\n"
        b"*6\r\n$7\r\nlastkey\r\n:0\r\n$7\r\nkeystep\r\n:1\r\n$5\r\nlimit\r\n:0\r\n*0\r\n"
    ),
    3: (
        b"*1\r\n*10\r\n$3\r\nget\r\n:2\r\n~2\r\n+readonly\r\n+fast\r\n:1\r\n:1\r\n:1\r\n"
        b"~3\r\n+@read\r\n+@string\r\n+@fast\r\n~0\r\n~1\r\n%3\r\n$5\r\nflags\r\n~2\r\n+RO\r\n+access\r\n"
        b"$12\r\nbegin_search\r\n%2\r\n$4\r\ntype\r\n$5\r\nindex\r\n$4\r\nspec\r\n%1\r\n$5\r\nindex\r\n:1\r\n"
        b"$9\r\nfind_keys\r\n%2\r\n$4\r\ntype\r\n$5\r\nrange\r\n$4\r\nspec\r\n"
        b"%3\r\n$7\r\nlastkey\r\n:0\r\n$7\r\nkeystep\r\n:1\r\n$5\r\nlimit\r\n:0\r\n~0\r\n"
    ),
}
DOCS_PERSIST = {
    2: (
        b"*2\r\n$7\r\npersist\r\n*10\r\n$7\r\nsummary\r\n$37\r\nRemoves the expiration time of a key.\r\n"
        b"$5\r\nsince\r\n$5\r\n2.2.0\r\n$5\r\ngroup\r\n$7\r\ngeneric\r\n$10\r\ncomplexity\r\n$4\r\nO(1)\r\n"
        b"$9\r\narguments\r\n*1\r\n*8\r\n$4\r\nname\r\n$3\r\nkey\r\n$4\r\ntype\r\n$3\r\nkey\r\n"
        b"$12\r\ndisplay_text\r\n$3\r\nkey\r\n$14\r\nkey_spec_index\r\n:0\r\n"
    ),
    3: (
        b"%1\r\n$7\r\npersist\r\n%5\r\n$7\r\nsummary\r\n$37\r\nRemoves the expiration time of a key.\r\n"
        b"$5\r\nsince\r\n$5\r\n2.2.0\r\n$5\r\ngroup\r\n$7\r\ngeneric\r\n$10\r\ncomplexity\r\n$4\r\nO(1)\r\n"
        b"$9\r\narguments\r\n*1\r\n%4\r\n$4\r\nname\r\n$3\r\nkey\r\n$4\r\ntype\r\n$3\r\nkey\r\n"
        b"$12\r\ndisplay_text\r\n$3\r\nkey\r\n$14\r\nkey_spec_index\r\n:0\r\n"
    ),
}


@pytest.mark.parametrize("version", [2, 3])
async def test_info_and_docs_in_full(house: House, version: int) -> None:
    client = house.connect()
    await client.call(f"HELLO {version}")
    assert await client.call("COMMAND INFO GET") == INFO_GET[version]
    assert await client.call("COMMAND DOCS Persist") == DOCS_PERSIST[version]
    assert await client.call("COMMAND DOCS nosuch") == (b"*0\r\n" if version == 2 else b"%0\r\n")


@pytest.mark.parametrize("version", [2, 3])
async def test_the_whole_table_can_be_read(house: House, version: int) -> None:
    client = house.connect()
    await client.call(f"HELLO {version}")
    reader = hiredis.Reader()
    names = set(COMMANDS)
    for request in ("COMMAND", "COMMAND INFO"):
        reader.feed(await client.call(request))
        entries = reader.gets()
        assert {entry[0] for entry in entries} == names
        assert {len(entry) for entry in entries} == {10}
    reader.feed(await client.call("COMMAND DOCS"))
    docs = reader.gets()
    assert set(docs if version == 3 else docs[::2]) == names
    assert await client.call("COMMAND COUNT") == b":%d\r\n" % len(names)
    reader.feed(await client.call("COMMAND LIST"))
    listed = reader.gets()
    assert {name for name in listed if b"|" not in name} == names
    assert b"client|setname" in listed


async def test_subcommands_have_entries_of_their_own(house: House) -> None:
    client = house.connect()
    reader = hiredis.Reader()
    reader.feed(await client.call("COMMAND INFO config|get"))
    [entry] = reader.gets()
    assert entry[:2] == [b"config|get", -3]
    reader.feed(await client.call("COMMAND LIST FILTERBY PATTERN config|*"))
    assert set(reader.gets()) == {
        b"config|get",
        b"config|set",
        b"config|resetstat",
        b"config|rewrite",
        b"config|help",
    }


async def test_commands_of_a_category(house: House) -> None:
    client = house.connect()
    reader = hiredis.Reader()
    reader.feed(await client.call("COMMAND LIST FILTERBY ACLCAT vectorset"))
    assert {b"vnew", b"vadd", b"vsearch"} <= set(reader.gets())
    reader.feed(await client.call("COMMAND LIST FILTERBY ACLCAT admin"))
    admin = set(reader.gets())
    assert {b"config|set", b"shutdown", b"client|kill", b"lastsave"} <= admin
    assert b"config|help" not in admin
    assert b"get" not in admin


async def test_help(house: House) -> None:
    client = house.connect()
    reader = hiredis.Reader()
    for name in ("COMMAND", "CONFIG", "CLIENT"):
        reader.feed(await client.call(f"{name} HELP"))
        first, *rest = reader.gets()
        expected = f"{name} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"
        assert first == expected.encode()
        assert rest[-2:] == [b"HELP", b"    Print this help."]


async def test_keys_that_are_used_in_two_ways(house: House) -> None:
    """RENAME deletes the one and writes the other: two specifications."""
    client = house.connect()
    reader = hiredis.Reader()
    reader.feed(await client.call("COMMAND INFO renamenx"))
    [info] = reader.gets()

    def specification(first: int, *flags: bytes) -> list[object]:
        begin = [b"type", b"index", b"spec", [b"index", first]]
        keys = [b"type", b"range", b"spec", [b"lastkey", 0, b"keystep", 1, b"limit", 0]]
        return [b"flags", list(flags), b"begin_search", begin, b"find_keys", keys]

    assert info[3:6] == [1, 2, 1]
    assert info[8] == [specification(1, b"RW", b"access", b"delete"), specification(2, b"OW", b"insert")]
    reader.feed(await client.call("COMMAND DOCS renamenx"))
    [_, docs] = reader.gets()
    arguments = docs[docs.index(b"arguments") + 1]
    assert [each[each.index(b"key_spec_index") + 1] for each in arguments] == [0, 1]
    reader.feed(await client.call("COMMAND GETKEYSANDFLAGS renamenx a b"))
    assert reader.gets() == [[b"a", [b"RW", b"access", b"delete"]], [b"b", [b"OW", b"insert"]]]


async def test_names_are_told_of_as_often_as_they_are_asked_for(house: House) -> None:
    client = house.connect()
    get, client_list = await client.call("COMMAND INFO GET"), await client.call("COMMAND INFO CLIENT|LIST")
    request = [b"COMMAND", b"INFO", *[b"nosuch", b"gEt", b"client|list", b"get|x", b"GET|"] * 100]
    shown = get.removeprefix(b"*1\r\n"), client_list.removeprefix(b"*1\r\n")
    parts = b"$-1\r\n", shown[0], shown[1], b"$-1\r\n", shown[0]
    assert await client.call(request) == b"*500\r\n" + b"".join(parts) * 100


async def test_many_keys_are_told_as_few_are(house: House) -> None:
    client = house.connect()
    keys = [b"k%d" % number for number in range(3000)]
    assert await client.call([b"COMMAND", b"GETKEYS", b"MGET", *keys]) == bulk_array(keys)
    pairs = [word for key in keys for word in (key, b"")]
    reply = await client.call([b"COMMAND", b"GETKEYSANDFLAGS", b"MSET", *pairs])
    flags = (await client.call("COMMAND GETKEYSANDFLAGS MSET k v")).removeprefix(b"*1\r\n*2\r\n$1\r\nk\r\n")
    assert reply == b"*3000\r\n" + b"".join(b"*2\r\n" + bulk(key) + flags for key in keys)
