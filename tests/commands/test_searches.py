from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from trio.testing import lockstep_stream_pair

from engram.commands.distances import format_distances
from engram.commands.wording import BUSY
from engram.index.filters import compile_filter
from engram.index.search import SearchOptions, SearchResult
from engram.index.service import SearchService
from engram.protocol import replies
from engram.transport import SocketTransport
from tests.commands.conftest import (
    EMPTY,
    NO_INDEX,
    NOT_AN_INTEGER,
    SYNTAX_ERROR,
    add,
    array,
    bulk,
    bulks,
    parse,
    search,
)
from tests.conftest import Client, HeldSearches, House, ManualJournal, OpenHouse, vector


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


async def test_a_search_that_has_waited_for_too_long_is_answered_with_busy(open_house: OpenHouse) -> None:
    searches = SearchService(1, max_batch=64)
    searches.timeout = 1e-9
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await add(client, "a", "x", 1)
        many = [b"VMSEARCH", b"a", b"1", b"100", *[vector(1)] * 100]
        requests = ([b"VSEARCH", b"a", vector(1), b"1"], many, [b"VCOUNT", b"a", b"FILTER", b".n"])
        await client.send(*requests, [b"VDELBY", b"a", b"FILTER", b".n"])
        assert await client.arrived() == b""
        searches.refuse_late()
        assert await client.arrived() == 4 * f"-{BUSY}\r\n".encode()
        assert (searches.refused, searches.waiting) == (103, 0)
        assert house.server.statistics.error_replies == 4


async def fill(client: Client) -> None:
    """An index "a" of four members on a line, some with attributes."""
    await client.call("VNEW a 2 METRIC l2")
    rows = (("w", 0, '{"n":0}'), ("x", 1, '{"n":1,"t":"odd"}'), ("y", 2, '{"n":2}'), ("z", 3, ""))
    words = [word for key, n, text in rows for word in (key.encode(), vector(n, 0), text.encode())]
    assert await client.call([b"VMADD", b"a", *words, b"ATTRS"]) == b":4\r\n"


async def test_a_radius_is_within(client: Client) -> None:
    await fill(client)
    origin = vector(0, 0)
    assert await search(client, "a", origin, b"9", b"RADIUS", b"1") == bulks("w", "0", "x", "1")
    assert await search(client, "a", origin, b"1", b"RADIUS", b"1") == bulks("w", "0")
    assert await search(client, "a", origin, b"9", b"RADIUS", b"0") == bulks("w", "0")
    assert await search(client, "a", origin, b"9", b"radius", b"-1") == EMPTY
    for large in (b"1e300", b"3.5e38", b"+3."):
        assert len(parse(await search(client, "a", origin, b"9", b"RADIUS", large))) == 8
    for bad in (b"", b"x", b"nan", b"inf", b"1e999", b"1_0", b" 1", b"0x1"):
        reply = await search(client, "a", origin, b"9", b"RADIUS", bad)
        assert (bad, reply) == (bad, b"-ERR value is not a valid float\r\n")


async def test_a_distance_as_it_was_answered_is_within_itself(client: Client) -> None:
    await client.call("VNEW a 3")
    for key in range(20):
        await add(client, "a", f"{key}", 1 + key, 2, 3)
    query = vector(1, 0.3, 0.7)
    found = parse(await search(client, "a", query, b"20"))
    for rank, distance in enumerate(found[1::2]):
        near = parse(await search(client, "a", query, b"20", b"RADIUS", distance))
        assert near[: 2 * rank + 2] == found[: 2 * rank + 2]


async def test_a_radius_of_inner_products_may_be_negative(client: Client) -> None:
    await client.call("VNEW a 1 METRIC dot")
    await add(client, "a", "x", 5)
    await add(client, "a", "y", 2)
    assert await search(client, "a", vector(1), b"9", b"RADIUS", b"-3") == bulks("x", "-5")


async def test_attributes_and_vectors_with_the_results(client: Client) -> None:
    await fill(client)
    null = await client.call("GET missing")
    query = vector(3, 0)
    assert await search(client, "a", query, b"2", b"WITHATTRS") == array(
        bulk("z"), bulk("0"), null, bulk("y"), bulk("1"), bulk('{"n":2}')
    )
    assert await search(client, "a", query, b"1", b"WITHVECTORS") == bulks("z", "0", vector(3, 0))
    assert await search(client, "a", query, b"2", b"withvectors", b"withattrs") == array(
        bulk("z"),
        bulk("0"),
        null,
        bulk(vector(3, 0)),
        bulk("y"),
        bulk("1"),
        bulk('{"n":2}'),
        bulk(vector(2, 0)),
    )


async def test_a_filter(client: Client) -> None:
    await fill(client)
    query = vector(0, 0)
    assert await search(client, "a", query, b"9", b"FILTER", b".n >= 1") == bulks("x", "1", "y", "2")
    assert await search(client, "a", query, b"1", b"FILTER", b".n >= 1") == bulks("x", "1")
    assert await search(client, "a", query, b"9", b"FILTER", b".t == 'odd'", b"WITHATTRS") == bulks(
        "x", "1", '{"n":1,"t":"odd"}'
    )
    assert await search(client, "a", query, b"9", b"FILTER", b".nothing") == EMPTY
    everything = (b"FILTER", b".n >= 1", b"RADIUS", b"1.5", b"EF", b"10", b"EXACT", b"RECALL", b"0.5")
    assert await search(client, "a", query, b"9", *everything) == bulks("x", "1")


@pytest.mark.parametrize("expression", [b"", b".n >", b"(", b".n === 1", b"'open"])
async def test_a_filter_that_is_none(client: Client, expression: bytes) -> None:
    await fill(client)
    error = b"-ERR syntax error in FILTER expression near: "
    for request in (
        [b"VSEARCH", b"a", vector(0, 0), b"1", b"FILTER", expression],
        [b"VMSEARCH", b"a", b"1", b"1", vector(0, 0), b"FILTER", expression],
        [b"VCOUNT", b"a", b"FILTER", expression],
        [b"VDELBY", b"a", b"FILTER", expression],
    ):
        assert (await client.call(request)).startswith(error)
    assert await client.call("VCOUNT a") == b":4\r\n"


@pytest.mark.parametrize(
    "prefix", [[b"VSEARCH", b"a", vector(0, 0), b"1"], [b"VMSEARCH", b"a", b"1", b"1", vector(0, 0)]]
)
async def test_options_misused(client: Client, prefix: list[bytes]) -> None:
    await fill(client)
    for options in (
        "EF",
        "RECALL",
        "FILTER",
        "RADIUS",
        "EXACT EXACT",
        "EF 10 EF 10",
        "WITHATTRS WITHATTRS",
        "WITHVECTORS x",
        "WITHSCORES",
        "EXACT EF",
        "10",
    ):
        assert (options, await client.call([*prefix, *options.encode().split()])) == (options, SYNTAX_ERROR)
    recall = b"-ERR RECALL must be a number above 0 and at most 1\r\n"
    for value in (b"0", b"1.1", b"-1", b"x", b"nan"):
        assert (value, await client.call([*prefix, b"RECALL", value])) == (value, recall)


async def test_options_reach_the_search(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await add(client, "a", "x", 1)
        query = [b"VSEARCH", b"a", vector(1), b"3"]
        await client.send(
            query,
            [*query, *b"WITHATTRS EF 7 RADIUS 0.5 EXACT RECALL 0.75 WITHVECTORS FILTER .n".split()],
        )
        await client.arrived()
        assert searches.options == [
            SearchOptions(3, encode_distances=format_distances),
            SearchOptions(
                3,
                7,
                0.75,
                compile_filter(b".n"),
                0.5,
                exact=True,
                attributes=True,
                vectors=True,
                encode_distances=format_distances,
            ),
        ]


async def test_vmsearch(client: Client) -> None:
    await fill(client)
    queries = [vector(0, 0), vector(3, 0)]
    request = [b"VMSEARCH", b"a", b"2", b"2", *queries]
    assert await client.call(request) == array(bulks("w", "0", "x", "1"), bulks("z", "0", "y", "1"))
    assert await client.call([*request, b"RADIUS", b"0.5", b"WITHATTRS"]) == array(
        bulks("w", "0", '{"n":0}'), array(bulk("z"), bulk("0"), await client.call("GET missing"))
    )
    assert await client.call([*request, b"FILTER", b".n == 1"]) == array(bulks("x", "1"), bulks("x", "2"))
    assert await client.call([b"VMSEARCH", b"a", b"1", b"1", queries[0]]) == array(bulks("w", "0"))


async def test_vmsearch_of_nothing(client: Client) -> None:
    await client.call("VNEW a 1")
    assert await client.call([b"VMSEARCH", b"a", b"5", b"2", vector(1), vector(2)]) == array(EMPTY, EMPTY)
    await add(client, "a", "x", 1)
    assert await client.call([b"VMSEARCH", b"a", b"0", b"2", vector(1), vector(2)]) == array(EMPTY, EMPTY)


async def test_vmsearch_misused(client: Client) -> None:
    await fill(client)
    query = vector(0, 0)
    for k, n in ((b"-1", b"1"), (b"x", b"1"), (b"1", b"0"), (b"1", b"-1"), (b"1", b"x"), (b"1", b"1.0")):
        assert await client.call([b"VMSEARCH", b"a", k, n, query]) == NOT_AN_INTEGER
    assert await client.call([b"VMSEARCH", b"a", b"1", b"2", query]) == SYNTAX_ERROR
    assert await client.call([b"VMSEARCH", b"a", b"1", b"9223372036854775807", query]) == SYNTAX_ERROR
    assert await client.call([b"VMSEARCH", b"a", b"1", b"1", query, query]) == SYNTAX_ERROR
    assert (await client.call([b"VMSEARCH", b"a", b"1", b"2", query, b"EXACT"])).startswith(b"-ERR ")
    assert await client.call("VMSEARCH a 1 1") == b"-ERR wrong number of arguments for 'vmsearch' command\r\n"


async def test_more_queries_than_run_together(client: Client) -> None:
    await fill(client)
    queries = [vector(n % 4, 0) for n in range(300)]
    found = parse(await client.call([b"VMSEARCH", b"a", b"1", b"300", *queries]))
    assert found == [[b"wxyz"[n % 4 : n % 4 + 1], b"0"] for n in range(300)]


async def test_a_reply_is_in_the_protocol_of_its_request(house: House) -> None:
    client = house.connect()
    await fill(client)
    query = [b"VSEARCH", b"a", vector(3, 0), b"1", b"WITHATTRS"]
    await client.send(query, "HELLO 3", query)
    assert await client.reply() == array(bulk("z"), bulk("0"), b"$-1\r\n")
    await client.reply()
    assert await client.reply() == array(bulk("z"), bulk("0"), b"_\r\n")


async def test_a_search_is_wanted_before_its_reply_has_a_place(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search thread may look while the command that asks is still being carried out."""
    searches = HeldSearches()
    answers = []

    def submit(*arguments: Any, encoding: object = None) -> None:
        *_, wanted, _ = arguments
        answers.append(wanted())

    monkeypatch.setattr(searches, "submit", submit)
    monkeypatch.setattr(searches, "submit_read", submit)
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await add(client, "a", "x", 1)
        await client.send([b"VSEARCH", b"a", vector(1), b"1"], [b"VCOUNT", b"a", b"FILTER", b".n"])
        await client.arrived()
        assert answers == [True, True]


async def test_who_searches_behind_the_log_costs_nobody_anything(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    rows = np.random.default_rng(3).normal(size=(7000, 16)).astype("<f4")

    def load(start: int, end: int, group: int) -> list[bytes]:
        text = b'{"g":%d}' % group
        numbers = range(start, end)
        words = [word for number in numbers for word in (b"%d" % number, rows[number].tobytes(), text)]
        return [b"VMADD", b"a", *words, b"ATTRS"]

    async with open_house(journal) as house:
        writer, reader = house.connect(), house.connect()
        await writer.send("VNEW a 16 METRIC l2", load(0, 4000, 0))
        await trio.testing.wait_all_tasks_blocked()
        journal.release()
        assert [await writer.reply() for _ in range(2)] == [b"+OK\r\n", b":4000\r\n"]
        asked = [b"VSEARCH", b"a", rows[6500].tobytes(), b"3", b"EXACT", b"FILTER", b".g >= 0"]
        # The writer sees rows of the next chunk, which others do not see before the log has them.
        await writer.send(load(4000, 6000, 0), asked)
        for _ in range(3):
            assert all(int(key) < 4000 for key in parse(await reader.call(asked))[::2])
        journal.release()
        assert await writer.reply() == b":2000\r\n"
        assert len(parse(await writer.reply())) == 6
        await writer.send(load(6000, 7000, 1))
        await trio.testing.wait_all_tasks_blocked()
        journal.release()
        assert await writer.reply() == b":1000\r\n"
        for number in (4100, 5999, 6000, 6500, 6999):
            asked[2] = rows[number].tobytes()
            assert parse(await reader.call(asked))[:2] == [b"%d" % number, b"0"]
        assert await reader.call("VCOUNT a FILTER .g==1") == b":1000\r\n"
        journal.automatic = True
        assert await writer.call("VDELBY a FILTER .g==1") == b":1000\r\n"


# How large a reply may be


TOO_LONG = b" bytes, more than client-output-buffer-limit\r\n"


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """How many bytes more there have been at once since the last call than there were then."""
    tracemalloc.start()
    level = 0

    def measure() -> int:
        nonlocal level
        before = level
        level, most = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return most - before

    yield measure
    tracemalloc.stop()


async def fill_with_texts(client: Client, rows: int, size: int) -> None:
    """An index "a" of members on a line with attributes of `size` bytes."""
    await client.call("VNEW a 1 METRIC l2")
    text = b'"%b"' % (b"x" * (size - 2))
    words = [word for row in range(rows) for word in (b"m%d" % row, vector(row), text)]
    assert await client.call([b"VMADD", b"a", *words, b"ATTRS"]) == b":%d\r\n" % rows


async def test_a_reply_that_would_be_too_long_is_not_made(house: House, peak: Callable[[], int]) -> None:
    """However little its request is, and however little is said about it beforehand."""
    house.server.config.client_output_buffer_limit = 1 << 20
    client = house.connect()
    await fill_with_texts(client, 40, 50_000)
    queries = [vector(n) for n in range(100)]
    request = [b"VMSEARCH", b"a", b"40", b"100", *queries, b"WITHATTRS"]
    peak()
    reply = await client.call(request)
    assert peak() < 4 << 20
    assert reply.startswith(b"-ERR the reply would take ")
    assert reply.endswith(TOO_LONG)
    for k in (21, 40):
        assert (await search(client, "a", vector(0), b"%d" % k, b"WITHATTRS")).endswith(TOO_LONG)
    assert len(parse(await search(client, "a", vector(0), b"20", b"WITHATTRS"))) == 60
    assert house.server.held_replies.reserved == 0


async def test_a_reply_may_be_as_long_as_the_limit(house: House) -> None:
    client = house.connect()
    await fill_with_texts(client, 10, 1000)
    request = [b"VMSEARCH", b"a", b"10", b"10", *[vector(0)] * 10, b"WITHATTRS", b"WITHVECTORS"]
    reply = await client.call(request)
    # What stands before the replies to the queries is not counted.
    size = len(reply) - len(b"*10\r\n")
    house.server.config.client_output_buffer_limit = size
    assert await client.call(request) == reply
    house.server.config.client_output_buffer_limit = size - 1
    assert await client.call(request) == b"-ERR the reply would take %d" % size + TOO_LONG


async def test_what_a_search_does_not_find_is_not_counted(house: House) -> None:
    house.server.config.client_output_buffer_limit = 1 << 16
    client = house.connect()
    await client.call("VNEW a 256 METRIC l2")
    for number in range(100):
        await add(client, "a", f"{number}", *[number] * 256)
    found = await search(client, "a", vector(*[7] * 256), b"100", b"RADIUS", b"0", b"WITHVECTORS")
    assert found == bulks("7", "0", vector(*[7] * 256))


async def test_replies_that_wait_for_one_client_are_bounded(open_house: OpenHouse) -> None:
    """Also where each is much longer than anybody could think."""
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        house.server.config.client_output_buffer_limit = 1 << 20
        client, other = house.connect(), house.connect()
        await client.call("VNEW a 1")
        await add(client, "a", "x", 1)
        query = [b"VSEARCH", b"a", vector(1), b"1"]
        await client.send(*[query] * 5)
        await client.arrived()
        first = searches.held.pop(0)
        large = [SearchResult([b"k" * 700_000], [b"0"])]
        while searches.held:
            searches.held.pop(0)(large)
        first([SearchResult([b"x"], [b"0"])])
        got = [parse(await client.reply()) for _ in range(3)]
        assert [len(reply[0]) for reply in got] == [1, 700_000, 700_000]
        for _ in range(2):
            refused = await client.reply()
            assert refused.startswith(b"-ERR the replies that wait for this client would take ")
        assert house.server.held_replies.waiting == house.server.held_replies.reserved == 0
        await other.send(query)
        await other.arrived()
        searches.held.pop()(large)
        assert len(parse(await other.reply())[0]) == 700_000


@pytest.mark.parametrize("request_", ["GET k", "MGET k k", "GETRANGE k 0 -1", "VSEARCH", "GETDEL k"])
async def test_replies_that_wait_for_all_clients_are_bounded(house: House, request_: str) -> None:
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = config.output_buffer_total_limit = 1 << 20
    client = house.connect()
    await client.call([b"SET", b"k", b"v" * 300_000])
    await fill_with_texts(client, 1, 300_000)
    request = request_.split() if request_ != "VSEARCH" else ["VSEARCH", "a", "?", "1", "WITHATTRS"]
    words = [vector(0) if word == "?" else word.encode() for word in request]
    streams = [lockstep_stream_pair() for _ in range(3)]
    for pair in streams:
        await house.connect(streams=pair, reads=False).send("GET k")
        await trio.testing.wait_all_tasks_blocked()
    assert house.server.held_replies.waiting > 900_000
    refused = await client.call(words)
    assert refused.startswith(b"-ERR the replies that wait for all clients would take ")
    assert refused.endswith(b" bytes, more than output-buffer-total-limit\r\n")
    assert await client.call("STRLEN k") == b":300000\r\n"
    assert await search(client, "a", vector(0), b"1") == bulks("m0", "0")
    for near, _ in streams:
        await near.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert house.server.held_replies.waiting == 0
    assert len(await client.call(words)) > 300_000


async def test_who_reads_nothing_is_hurried_where_others_need_the_room(house: House) -> None:
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = config.output_buffer_total_limit = 1 << 20
    client = house.connect()
    await client.call([b"SET", b"k", b"v" * 900_000])
    await house.connect(streams=lockstep_stream_pair(), reads=False).send("GET k")
    await trio.testing.wait_all_tasks_blocked()
    hurried: list[int] = []
    for session in house.server.sessions.values():
        session.hurry = partial(hurried.append, session.id)
    for _ in range(2):
        assert (await client.call("GET k")).startswith(b"-ERR the replies that wait for all clients")
    # Not each time.
    assert hurried == [1, 2]


async def test_replies_of_exec_are_bounded_together(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        config = house.server.config
        config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 20
        client = house.connect()
        await client.call("VNEW a 1")
        await add(client, "a", "x", 1)
        query = [b"VSEARCH", b"a", vector(1), b"1"]
        await client.send([b"SET", b"k", b"v" * 300_000], "MULTI", "GET k", *[query] * 3, "INCR n", "EXEC")
        for _ in range(7):
            await client.reply()
        await client.arrived()
        for answer in searches.held:
            answer([SearchResult([b"k" * 300_000], [b"0"])])
        string, first, second, third, number = parse(await client.reply())
        assert [len(string), len(first[0]), len(second[0]), number] == [300_000, 300_000, 300_000, 1]
        assert str(third).startswith("ERR the reply would take 12000")
        assert house.server.held_replies.waiting == house.server.held_replies.reserved == 0


async def test_a_reply_that_memory_has_no_room_for_ends_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is encoded in a search thread, and fails there."""
    client, other = house.connect(), house.connect()
    await fill(client)
    threads: list[threading.Thread] = []

    def fail(values: object) -> list[bytes]:
        threads.append(threading.current_thread())
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(replies, "bulk_array_parts", fail)
        refused = b"-OOM search failed: there is not enough memory for it\r\n"
        assert await search(client, "a", vector(0, 0), b"2") == refused
        assert await client.call([b"VMSEARCH", b"a", b"2", b"1", vector(0, 0)]) == refused
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert await search(client, "a", vector(0, 0), b"1") == bulks("w", "0")
    assert await other.call("PING") == b"+PONG\r\n"


@pytest.mark.parametrize("name", ["VSEARCH", "VCOUNT"])
async def test_an_answer_that_cannot_be_sent_ends_its_client_alone(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What threads have called on the loop may raise whatever it likes: Trio would end the server."""
    client, other = house.connect_by_socket(), house.connect()
    await fill(client)
    words = {
        "VSEARCH": [b"VSEARCH", b"a", vector(0, 0), b"1"],
        "VCOUNT": [b"VCOUNT", b"a", b"FILTER", b".n"],
    }

    def fail(transport: object, data: bytes) -> int:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SocketTransport, "send_now", fail)
        await client.send(words[name])
        assert await client.ended() == b""
    assert await other.call("PING") == b"+PONG\r\n"
    assert await search(other, "a", vector(0, 0), b"1") == bulks("w", "0")
