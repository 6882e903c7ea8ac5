from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from engram.index.vector_index import VectorIndex
from tests.conftest import Client, HeldSearches, House, ManualJournal, OpenHouse, vector

NO_INDEX = b"-ERR no such index\r\n"
NOT_AN_INTEGER = b"-ERR value is not an integer or out of range\r\n"
SYNTAX_ERROR = b"-ERR syntax error\r\n"
WRONG_TYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"

EMPTY = b"*0\r\n"


def bulks(*texts: str) -> bytes:
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%b\r\n" % (len(t), t.encode()) for t in texts)


async def add(client: Client, index: str, key: str, *numbers: float) -> bytes:
    return await client.call([b"VADD", index.encode(), key.encode(), vector(*numbers)])


async def search(client: Client, index: str, query: bytes, *rest: bytes) -> bytes:
    return await client.call([b"VSEARCH", index.encode(), query, *rest])


@pytest.fixture(params=["HELLO 2", "HELLO 3"])
async def client(request: pytest.FixtureRequest, house: House) -> Client:
    client = house.connect()
    await client.call(request.param)
    return client


async def test_vnew(client: Client) -> None:
    assert await client.call("VNEW a 3") == b"+OK\r\n"
    assert await client.call("VNEW a 3") == b"-ERR index already exists\r\n"
    assert await client.call("TYPE a") == b"+vectorset\r\n"


@pytest.mark.parametrize("dimension", ["0", "-1", "x", "1.5", "+3", ""])
async def test_vnew_wants_a_positive_dimension(client: Client, dimension: str) -> None:
    reply = await client.call([b"VNEW", b"a", dimension.encode()])
    assert reply == b"-ERR dimension must be a positive integer\r\n"


async def test_a_dimension_beyond_the_limit_is_refused(client: Client) -> None:
    assert await client.call("VNEW a 65537") == b"-ERR dimension must be at most 65536\r\n"
    assert await client.call("VNEW a 65536") == b"+OK\r\n"


@pytest.mark.parametrize(
    ("metric", "canonical"),
    [
        ("cosine", "cosine"),
        ("COSINE", "cosine"),
        ("l2", "l2"),
        ("L2", "l2"),
        ("Euclidean", "l2"),
        ("dot", "dot"),
        ("IP", "dot"),
    ],
)
async def test_metrics_and_vinfo(client: Client, metric: str, canonical: str) -> None:
    assert await client.call(f"VNEW a 3 metric {metric}") == b"+OK\r\n"
    assert await client.call("VINFO a") == bulks("dim", "3", "metric", canonical, "count", "0")


async def test_cosine_is_the_default(client: Client) -> None:
    await client.call("VNEW a 3")
    await add(client, "a", "x", 1, 2, 3)
    assert await client.call("VINFO a") == bulks("dim", "3", "metric", "cosine", "count", "1")


async def test_vnew_misused(client: Client) -> None:
    assert await client.call("VNEW a 3 METRIC hamming") == b"-ERR unknown metric\r\n"
    assert await client.call("VNEW a 3 METRIC") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 FOO l2") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 METRIC l2 x") == SYNTAX_ERROR
    assert await client.call("VNEW a") == b"-ERR wrong number of arguments for 'vnew' command\r\n"
    assert await client.call("EXISTS a") == b":0\r\n"


async def test_vadd(client: Client) -> None:
    assert await add(client, "a", "x", 1, 2) == NO_INDEX
    await client.call("VNEW a 2")
    assert await add(client, "a", "x", 1, 2) == b":1\r\n"
    assert await add(client, "a", "x", 3, 4) == b":0\r\n"
    assert await client.call("VINFO a") == bulks("dim", "2", "metric", "cosine", "count", "1")


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", b"-ERR invalid vector encoding\r\n"),
        (b"12345", b"-ERR invalid vector encoding\r\n"),
        (vector(1, 2, 3), b"-ERR wrong vector dimension: index expects 4, got 3\r\n"),
        (vector(1, 2, 3, 4, 5), b"-ERR wrong vector dimension: index expects 4, got 5\r\n"),
        (vector(1, 2, 3, float("nan")), b"-ERR vector must be finite, with a norm of at most 1e+18\r\n"),
        (vector(1, 2, 3, float("inf")), b"-ERR vector must be finite, with a norm of at most 1e+18\r\n"),
        (vector(1, 2, 3, float("-inf")), b"-ERR vector must be finite, with a norm of at most 1e+18\r\n"),
        (vector(1, 2, 3, 3e38), b"-ERR vector must be finite, with a norm of at most 1e+18\r\n"),
    ],
)
async def test_bad_vectors(client: Client, blob: bytes, error: bytes) -> None:
    await client.call("VNEW a 4")
    assert await client.call([b"VADD", b"a", b"x", blob]) == error
    assert await search(client, "a", blob, b"1") == error
    assert await client.call("VINFO a") == bulks("dim", "4", "metric", "cosine", "count", "0")


async def test_vdel(client: Client) -> None:
    assert await client.call("VDEL a x") == NO_INDEX
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 2)
    assert await client.call("VDEL a x") == b":1\r\n"
    assert await client.call("VDEL a x") == b":0\r\n"
    assert await search(client, "a", vector(1, 2), b"1") == EMPTY
    assert await client.call("EXISTS a") == b":1\r\n"


async def test_what_is_no_index(client: Client) -> None:
    await client.call("SET s x")
    assert await client.call("VNEW s 2") == WRONG_TYPE
    assert await add(client, "s", "x", 1, 2) == WRONG_TYPE
    assert await search(client, "s", vector(1, 2), b"1") == WRONG_TYPE
    assert await client.call("VDEL s x") == WRONG_TYPE
    assert await client.call("VINFO s") == WRONG_TYPE
    assert await client.call("VINFO nosuch") == NO_INDEX
    assert await search(client, "nosuch", vector(1, 2), b"1") == NO_INDEX
    assert await client.call("GET s") == b"$1\r\nx\r\n"


async def test_euclidean_distances(client: Client) -> None:
    await client.call("VNEW a 2 METRIC l2")
    for key, numbers in {"origin": (0, 0), "near": (0, 1), "half": (1.5, 2), "far": (3, 4)}.items():
        await add(client, "a", key, *numbers)
    expected = bulks("origin", "0", "near", "1", "half", "2.5", "far", "5")
    assert await search(client, "a", vector(0, 0), b"10") == expected
    assert await search(client, "a", vector(0, 0), b"2") == bulks("origin", "0", "near", "1")


async def test_cosine_distances(client: Client) -> None:
    await client.call("VNEW a 2")
    for key, numbers in {"same": (2, 0), "across": (0, 5), "against": (-1, 0), "zero": (0, 0)}.items():
        await add(client, "a", key, *numbers)
    expected = bulks("same", "0", "across", "1", "zero", "1", "against", "2")
    assert await search(client, "a", vector(7, 0), b"10") == expected


async def test_inner_product_distances(client: Client) -> None:
    await client.call("VNEW a 2 METRIC dot")
    for key, numbers in {"with": (2, 2), "across": (1, -1), "against": (-0.5, -1)}.items():
        await add(client, "a", key, *numbers)
    expected = bulks("with", "-6", "across", "0", "against", "2.25")
    assert await search(client, "a", vector(1.5, 1.5), b"10") == expected


async def test_search_options(client: Client) -> None:
    await client.call("VNEW a 2")
    query = vector(1, 0)
    assert await search(client, "a", query, b"5") == EMPTY
    await add(client, "a", "x", 1, 0)
    assert await search(client, "a", query, b"0") == EMPTY
    assert await search(client, "a", query, b"5", b"EF", b"100") == bulks("x", "0")
    assert await search(client, "a", query, b"9223372036854775807") == bulks("x", "0")
    assert await search(client, "a", query, b"5", b"ef", b"9223372036854775807") == bulks("x", "0")
    for bad in (b"-1", b"x", b"1.5", b"9223372036854775808"):
        assert await search(client, "a", query, bad) == NOT_AN_INTEGER
    for bad in (b"0", b"-1", b"x"):
        assert await search(client, "a", query, b"5", b"EF", bad) == NOT_AN_INTEGER
    assert await search(client, "a", query, b"5", b"EF") == SYNTAX_ERROR
    assert await search(client, "a", query, b"5", b"FOO", b"1") == SYNTAX_ERROR
    assert await search(client, "a", query, b"5", b"EF", b"1", b"x") == SYNTAX_ERROR


async def test_a_search_sees_the_state_at_its_place_in_the_pipeline(client: Client) -> None:
    await client.call("VNEW a 2 METRIC l2")
    query = [b"VSEARCH", b"a", vector(0, 0), b"10"]
    await client.send(
        [b"VADD", b"a", b"x", vector(1, 0)],
        query,
        [b"VADD", b"a", b"x", vector(3, 0)],
        [b"VADD", b"a", b"y", vector(2, 0)],
        query,
        b"VDEL a x".split(),
        query,
        b"DEL a".split(),
        query,
    )
    assert [await client.reply() for _ in range(9)] == [
        b":1\r\n",
        bulks("x", "1"),
        b":0\r\n",
        b":1\r\n",
        bulks("y", "2", "x", "3"),
        b":1\r\n",
        bulks("y", "2"),
        b":1\r\n",
        NO_INDEX,
    ]


async def test_an_index_is_a_key_like_any_other(house: House) -> None:
    client = house.connect()
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 0)
    assert await client.call("EXPIRE a 10") == b":1\r\n"
    assert await client.call("TTL a") == b":10\r\n"
    assert await client.call("SCAN 0 TYPE vectorset") == b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\na\r\n"
    assert await client.call("SCAN 0 TYPE string") == b"*2\r\n$1\r\n0\r\n*0\r\n"
    house.clock.time += 10_000
    assert await client.call("VINFO a") == NO_INDEX
    assert house.engine.indices == {}
    assert await client.call("VNEW a 5") == b"+OK\r\n"
    assert await client.call("TTL a") == b":-1\r\n"
    assert await client.call("SET a x") == b"+OK\r\n"
    assert await client.call("GET a") == b"$1\r\nx\r\n"
    assert house.engine.indices == {}


# What Redis answers for a vector set.
async def test_string_commands_on_an_index(client: Client) -> None:
    await client.call("VNEW a 2")
    for request in (
        "GET a",
        "SET a x GET",
        "SET a x NX GET",
        "SET a x XX GET",
        "APPEND a x",
        "STRLEN a",
        "INCR a",
        "DECRBY a 1",
    ):
        assert (request, await client.call(request)) == (request, WRONG_TYPE)
    assert await client.call("SET a x NX") in (b"$-1\r\n", b"_\r\n")
    assert await client.call("TYPE a") == b"+vectorset\r\n"
    assert await client.call("DEL a") == b":1\r\n"
    assert await client.call("EXISTS a") == b":0\r\n"


async def test_a_search_that_fails_is_answered_with_an_error(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 2")
        await add(client, "a", "x", 1, 0)
        await client.send([b"VSEARCH", b"a", vector(1, 0), b"1"], "PING")
        assert await client.arrived() == b""
        searches.held.pop()(ValueError("out\nof order"))
        assert await client.arrived() == b"-ERR search failed: out of order\r\n+PONG\r\n"
        assert house.server.statistics.error_replies == 1


async def test_rows_without_a_graph_slow_their_writer_down_only(
    open_house: OpenHouse, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def delay(index: VectorIndex, limit: int) -> float:
        asked.append((index.rows_unindexed, limit))
        return 1.0

    async with open_house(ManualJournal(automatic=True), searches=HeldSearches()) as house:
        monkeypatch.setattr(house.server.builder, "delay", delay)
        house.server.config.max_unindexed_rows = 2
        writer, other = house.connect(), house.connect()
        await writer.call("VNEW a 1")
        await writer.call("VNEW b 1")
        await writer.send(*([b"VADD", b"a", b"%d" % number, vector(1)] for number in range(4)), "PING")
        assert [await writer.reply() for _ in range(2)] == [b":1\r\n"] * 2
        began = trio.current_time()
        assert await other.call([b"VADD", b"b", b"x", vector(1)]) == b":1\r\n"
        assert await other.call("PING") == b"+PONG\r\n"
        assert trio.current_time() == began
        assert [await writer.reply() for _ in range(3)] == [b":1\r\n", b":1\r\n", b"+PONG\r\n"]
        assert trio.current_time() - began == pytest.approx(2.0)
        assert asked == [(2, 2), (3, 2)]
