"""Bounds on what a request may ask for."""

from __future__ import annotations

import pytest

from engram.commands.limits import check_keys
from engram.commands.registry import COMMANDS
from engram.config import Config
from engram.errors import CommandError
from tests.commands.conftest import add, bulks, search
from tests.conftest import Client, House, vector

OK = b"+OK\r\n"
QUERY = vector(0)


async def set_limit(client: Client, name: str, value: int) -> None:
    assert await client.call(f"CONFIG SET {name} {value}") == OK


@pytest.fixture
async def filled(client: Client) -> Client:
    """A client of a house with an index of one dimension and four members."""
    assert await client.call("VNEW a 1 METRIC l2") == OK
    for number in range(4):
        assert await add(client, "a", f"m{number}", number) == b":1\r\n"
    return client


async def test_dimension(client: Client) -> None:
    await set_limit(client, "vector-max-dimension", 8)
    assert await client.call("VNEW a 9") == b"-ERR dimension must be at most 8\r\n"
    assert await client.call("VNEW a 8") == OK


async def test_count_of_indices(client: Client) -> None:
    await set_limit(client, "vector-max-indices", 2)
    assert await client.call("VNEW a 1") == OK
    assert await client.call("VNEW b 1") == OK
    assert await client.call("VNEW b 1") == b"-ERR index already exists\r\n"
    assert await client.call("VNEW c 1") == b"-ERR there are 2 indices, as many as there may be\r\n"
    assert await client.call("DEL a") == b":1\r\n"
    assert await client.call("VNEW c 1") == OK


async def test_vectors_of_one_vmadd(filled: Client) -> None:
    await set_limit(filled, "vector-max-rows", 2)
    rows = [b"x", vector(1), b"y", vector(2), b"z", vector(3)]
    refused = b"-ERR the number of vectors must be at most 2\r\n"
    assert await filled.call([b"VMADD", b"a", *rows]) == refused
    with_attributes = [word for row in range(0, 6, 2) for word in (*rows[row : row + 2], b"{}")]
    assert await filled.call([b"VMADD", b"a", *with_attributes, b"ATTRS"]) == refused
    assert await filled.call("VCOUNT a") == b":4\r\n"
    assert await filled.call([b"VMADD", b"a", *rows[:4]]) == b":2\r\n"


async def test_results_of_a_search(filled: Client) -> None:
    await set_limit(filled, "vector-max-results", 3)
    refused = b"-ERR k must be at most 3\r\n"
    assert await search(filled, "a", QUERY, b"4") == refused
    assert await search(filled, "a", QUERY, b"9223372036854775807") == refused
    assert await filled.call([b"VMSEARCH", b"a", b"4", b"1", QUERY]) == refused
    await filled.call("VDEL a m3")
    # More than there are is all there are.
    found = bulks("m0", "0", "m1", "1", "m2", "2")
    assert await search(filled, "a", QUERY, b"9223372036854775807") == found


async def test_width_of_a_search(filled: Client) -> None:
    await set_limit(filled, "vector-max-ef", 3)
    refused = b"-ERR EF must be at most 3\r\n"
    assert await search(filled, "a", QUERY, b"1", b"EF", b"4") == refused
    assert await filled.call([b"VMSEARCH", b"a", b"1", b"1", QUERY, b"EF", b"4"]) == refused
    assert await search(filled, "a", QUERY, b"1", b"EF", b"3") == bulks("m0", "0")


async def test_queries_of_one_vmsearch(filled: Client) -> None:
    await set_limit(filled, "vector-max-queries", 2)
    refused = b"-ERR the number of queries must be at most 2\r\n"
    assert await filled.call([b"VMSEARCH", b"a", b"1", b"3", QUERY, QUERY, QUERY]) == refused
    found = bulks("m0", "0")
    assert await filled.call([b"VMSEARCH", b"a", b"1", b"2", QUERY, QUERY]) == b"*2\r\n" + 2 * found


@pytest.mark.parametrize(
    "command",
    [["VSEARCH", "a", "?", "1", "FILTER"], ["VCOUNT", "a", "FILTER"], ["VDELBY", "a", "FILTER"]],
)
async def test_filters(filled: Client, command: list[str]) -> None:
    words = [QUERY if word == "?" else word.encode() for word in command]
    await set_limit(filled, "vector-max-filter-length", 10)
    too_long = b"-ERR FILTER expression is longer than 10 bytes\r\n"
    assert await filled.call([*words, b".a == 1000"]) != too_long
    assert await filled.call([*words, b".a == 10000"]) == too_long
    await set_limit(filled, "vector-max-filter-depth", 2)
    too_deep = b"-ERR FILTER expression is nested too deeply\r\n"
    assert await filled.call([*words, b"1+(2+3)"]) == too_deep
    assert await filled.call([*words, b"(1+2)+3"]) != too_deep


async def test_members(filled: Client) -> None:
    await set_limit(filled, "max-key-length", 4)
    refused = b"-ERR member is longer than max-key-length, 4 bytes\r\n"
    assert await add(filled, "a", "12345", 1) == refused
    assert await filled.call([b"VMADD", b"a", b"1", vector(1), b"12345", vector(1)]) == refused
    assert await filled.call("VCOUNT a") == b":4\r\n"
    assert await add(filled, "a", "1234", 1) == b":1\r\n"


def test_keys() -> None:
    config = Config(max_key_length=4)
    for request in (
        [b"set", b"12345", b"v"],
        [b"mset", b"1", b"v", b"12345", b"v"],
        [b"vnew", b"12345", b"1"],
    ):
        with pytest.raises(CommandError) as refused:
            check_keys(COMMANDS[request[0]], request, config)
        assert str(refused.value) == "ERR key is longer than max-key-length, 4 bytes"
    for request in ([b"set", b"1234", b"vvvvv"], [b"get", b"12345"], [b"flushall"]):
        check_keys(COMMANDS[request[0]], request, config)


async def test_without_other_settings_bounds_are_wide(house: House) -> None:
    config = house.server.config
    assert config.max_key_length == config.proto_max_bulk_len
    client = house.connect()
    assert await client.call("VNEW a 65536") == OK
    assert await client.call("CONFIG SET vector-max-dimension 65537") == (
        b"-ERR CONFIG SET failed (possibly related to argument 'vector-max-dimension')"
        b" - argument must be between 1 and 65536 inclusive\r\n"
    )


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ([b"SCAN", b"0"], b"COUNT"),
        ([b"CLIENT", b"KILL"], b"ID"),
        ([b"EXPIRE", b"a", b"1"], b"NX"),
        ([b"SET", b"a", b"1"], b"KEEPTTL"),
        ([b"VSEARCH", b"index", b"query", b"1"], b"EXACT"),
    ],
)
async def test_options_are_not_looked_at_by_the_thousand(
    house: House, words: list[bytes], option: bytes
) -> None:
    """A million of them would hold up the others."""
    client = house.connect()
    name = b"|".join(words[:2]).lower() if words[0] == b"CLIENT" else words[0].lower()
    refused = b"-ERR wrong number of arguments for '%b' command\r\n" % name
    assert await client.call([*words, *[option] * 2000]) == refused
    assert await client.call([*words, *[option] * 20]) != refused
