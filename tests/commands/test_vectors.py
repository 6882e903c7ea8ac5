from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from engram.config import Config
from engram.index.pace import Wait
from engram.index.vector_index import VectorIndex
from engram.operations import AddVectors, SetAttributes
from tests.commands.conftest import (
    EMPTY,
    NO_INDEX,
    NOT_AN_INTEGER,
    SYNTAX_ERROR,
    WRONG_TYPE,
    add,
    array,
    bulk,
    bulks,
    parse,
    search,
)
from tests.conftest import Client, HeldSearches, House, ManualJournal, OpenHouse, vector


async def test_vadd(client: Client) -> None:
    assert await add(client, "a", "x", 1, 2) == NO_INDEX
    await client.call("VNEW a 2")
    assert await add(client, "a", "x", 1, 2) == b":1\r\n"
    assert await add(client, "a", "x", 3, 4) == b":0\r\n"
    assert await client.call("VCOUNT a") == b":1\r\n"


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
    assert await client.call([b"VMADD", b"a", b"y", vector(1, 2, 3, 4), b"x", blob]) == error
    assert await client.call([b"VMADD", b"a", b"x", blob, b"{}", b"ATTRS"]) == error
    assert await client.call([b"VMSEARCH", b"a", b"1", b"2", vector(1, 2, 3, 4), blob]) == error
    assert await client.call("VCOUNT a") == b":0\r\n"


async def test_vdel(client: Client) -> None:
    assert await client.call("VDEL a x") == NO_INDEX
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 2)
    assert await client.call("VDEL a x") == b":1\r\n"
    assert await client.call("VDEL a x") == b":0\r\n"
    assert await search(client, "a", vector(1, 2), b"1") == EMPTY
    assert await client.call("EXISTS a") == b":1\r\n"


WRITES = (
    [b"VADD", b"key", b"x", vector(1, 2)],
    [b"VMADD", b"key", b"x", vector(1, 2)],
    [b"VDEL", b"key", b"x"],
    [b"VSETATTR", b"key", b"x", b"{}"],
    [b"VDELBY", b"key", b"FILTER", b".n > 1"],
)
READS = (
    [b"VSEARCH", b"key", vector(1, 2), b"1"],
    [b"VMSEARCH", b"key", b"1", b"1", vector(1, 2)],
    [b"VGET", b"key", b"x"],
    [b"VMGET", b"key", b"x"],
    [b"VGETATTR", b"key", b"x"],
    [b"VSCAN", b"key", b"0"],
    [b"VCOUNT", b"key"],
    [b"VINFO", b"key"],
    [b"VOPTIMIZE", b"key"],
)


@pytest.mark.parametrize("request_", [*WRITES, *READS], ids=lambda words: words[0].decode())
async def test_what_is_no_index(client: Client, request_: list[bytes]) -> None:
    missing = {b"VSETATTR": (b":0\r\n", b"#f\r\n"), b"VGETATTR": (b"$-1\r\n", b"_\r\n")}
    assert await client.call(request_) in missing.get(request_[0], (NO_INDEX,))
    assert await client.call("EXISTS key") == b":0\r\n"
    await client.call("SET key x")
    assert await client.call(request_) == WRONG_TYPE
    assert await client.call("GET key") == bulk("x")


async def test_vmadd(client: Client) -> None:
    await client.call("VNEW a 2 METRIC l2")
    await add(client, "a", "x", 1, 2)
    request = [b"VMADD", b"a", b"x", vector(5, 0), b"y", vector(6, 0), b"z", vector(7, 0)]
    assert await client.call(request) == b":2\r\n"
    assert await client.call(request) == b":0\r\n"
    assert await search(client, "a", vector(5, 0), b"9") == bulks("x", "0", "y", "1", "z", "2")


# Some turns.
MANY = 5000


def many_rows(*, attributes: bool) -> list[bytes]:
    """A VMADD of many rows: of those of the first slice, many come again in others."""
    request = [b"VMADD", b"a"]
    for number in range(MANY):
        request += [b"m%d" % (number % 4000), vector(number), *([b'{"n":%d}' % number] * attributes)]
    return [*request, *([b"ATTRS"] * attributes)]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("attributes", [False, True])
async def test_many_rows_are_added_as_one(open_house: OpenHouse, attributes: bool, queued: bool) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await client.call("VNEW a 1")
        await client.call([b"VMADD", b"a", b"m3999", vector(9), b"{}", b"m1", vector(9), b"[1]", b"ATTRS"])
        await other.call("WATCH a")
        before = len(journal.records)
        if queued:
            await client.send("MULTI", many_rows(attributes=attributes), "EXEC")
        else:
            await client.send(many_rows(attributes=attributes))
        while (count := await other.call("VCOUNT a")) == b":2\r\n":
            pass
        assert count == b":4000\r\n"
        replies = [await client.reply() for _ in range(3 if queued else 1)]
        assert replies[-1] == (b"*1\r\n" if queued else b"") + b":3998\r\n"
        assert len(journal.records) - before == 2
        for number, text in ((999, b"" if not attributes else b'{"n":4999}'), (3999, b"{}")):
            newest = number + 4000 * (number < 1000)
            assert await client.call(f"VGET a m{number}") == bulk(vector(newest))
            shown = b'{"n":%d}' % newest if attributes else text
            expected = bulk(shown) if shown else b"$-1\r\n"
            assert await client.call(f"VGETATTR a m{number}") == expected
        assert house.engine.totals().dead == 2
        await other.send("MULTI", "PING", "EXEC")
        assert await other.arrived() == b"+OK\r\n+QUEUED\r\n*-1\r\n"


async def test_of_many_rows_none_is_added_when_the_last_is_wrong(client: Client) -> None:
    await client.call("VNEW a 1")
    request = many_rows(attributes=False)
    request[-1] = vector(float("nan"))
    assert await client.call(request) == b"-ERR vector must be finite, with a norm of at most 1e+18\r\n"
    request[-1] = vector(1, 2)
    assert await client.call(request) == b"-ERR wrong vector dimension: index expects 1, got 2\r\n"
    assert await client.call("VCOUNT a") == b":0\r\n"


async def test_rows_with_long_attributes_are_added_a_few_at_a_time(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        words = [word for n in range(7) for word in (b"m%d" % n, vector(n), b"x" * (1 << 20))]
        assert await client.call([b"VMADD", b"a", *words, b"ATTRS"]) == b":7\r\n"
        sizes = [len(record.keys) for _, record in journal.records if isinstance(record, AddVectors)]
        assert sizes == [2, 2, 2, 1]


async def test_vmadd_is_one_record(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await client.call([b"VMADD", b"a", b"x", vector(1), b"y", vector(2), b"x", vector(3)])
        await client.call([b"VMADD", b"a", b"y", vector(1), b"{}", b"ATTRS"])
        assert [operation for _, operation in journal.records[1:]] == [
            AddVectors(1, (b"y", b"x"), vector(2, 3)),
            AddVectors(1, (b"y",), vector(1), (b"{}",)),
        ]


async def test_of_a_key_given_twice_the_last_counts(client: Client) -> None:
    await client.call("VNEW a 1")
    pairs = [b"x", vector(1), b"y", vector(2), b"x", vector(3)]
    assert await client.call([b"VMADD", b"a", *pairs]) == b":2\r\n"
    assert await client.call("VGET a x") == bulk(vector(3))
    triples = [b"x", vector(4), b"1", b"x", vector(5), b"2"]
    assert await client.call([b"VMADD", b"a", *triples, b"ATTRS"]) == b":0\r\n"
    assert await client.call("VGET a x") == bulk(vector(5))
    assert await client.call("VGETATTR a x") == bulk("2")
    assert await client.call("VCOUNT a") == b":2\r\n"


@pytest.mark.parametrize("bad", [vector(1, 2, 3), vector(1), b"", b"123", vector(1, float("nan"))])
async def test_vmadd_adds_all_or_nothing(client: Client, bad: bytes) -> None:
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 2)
    reply = await client.call(
        [b"VMADD", b"a", b"x", vector(5, 6), b"y", vector(5, 6), b"z", bad, b"z", vector(1, 2)]
    )
    assert reply.startswith(b"-ERR ")
    assert await client.call("VCOUNT a") == b":1\r\n"
    assert await client.call("VGET a x") == bulk(vector(1, 2))


async def test_vmadd_misused(client: Client) -> None:
    arity = b"-ERR wrong number of arguments for 'vmadd' command\r\n"
    await client.call("VNEW a 1")
    one = vector(1)
    for rest in (
        [],
        [b"x"],
        [b"x", one, b"y"],
        [b"x", one, b"ATTRS"],
        [b"x", one, b"{}", b"y", one, b"ATTRS"],
        [b"ATTRS", b"x", one],
        [b"x", one, b"{}", b"y", one, b"{}", b"z"],
    ):
        assert (rest, await client.call([b"VMADD", b"a", *rest])) == (rest, arity)
    assert await client.call("VCOUNT a") == b":0\r\n"


async def test_attributes_with_the_vectors(client: Client) -> None:
    await client.call("VNEW a 1")
    triples = [b"x", vector(1), b'{"n":1}', b"y", vector(2), b"", b"z", vector(3), b"no JSON"]
    assert await client.call([b"VMADD", b"a", *triples, b"attrs"]) == b":3\r\n"
    null = await client.call("VGET a nobody")
    for key, attributes in ((b"x", bulk('{"n":1}')), (b"y", null), (b"z", bulk("no JSON"))):
        assert await client.call([b"VGETATTR", b"a", key]) == attributes
    assert await client.call([b"VMADD", b"a", b"ATTRS", b"x", vector(1), b"", b"y", vector(2), b"2"]) == (
        b":0\r\n"
    )
    assert await client.call("VGETATTR a x") == null
    assert await client.call("VGETATTR a y") == bulk("2")


async def test_a_member_may_be_called_attrs(client: Client) -> None:
    await client.call("VNEW a 2")
    pairs = [b"ATTRS", vector(1, 2), b"y", vector(3, 4)]
    assert await client.call([b"VMADD", b"a", *pairs]) == b":2\r\n"
    assert await client.call([b"VMADD", b"a", b"ATTRS", vector(1, 2)]) == b":0\r\n"
    assert await client.call([b"VMADD", b"a", b"attrs", vector(5, 6), b"{}", b"ATTRS"]) == b":1\r\n"
    assert await client.call("VGET a ATTRS") == bulk(vector(1, 2))
    assert await client.call("VGETATTR a attrs") == bulk("{}")


async def test_overwriting_a_vector_keeps_the_attributes(client: Client) -> None:
    await client.call("VNEW a 1")
    await client.call([b"VMADD", b"a", b"x", vector(1), b"1", b"y", vector(2), b"2", b"ATTRS"])
    assert await add(client, "a", "x", 3) == b":0\r\n"
    assert await client.call([b"VMADD", b"a", b"y", vector(4), b"z", vector(5)]) == b":1\r\n"
    assert await client.call("VGETATTR a x") == bulk("1")
    assert await client.call("VGETATTR a y") == bulk("2")
    await client.call("VDEL a x")
    await add(client, "a", "x", 3)
    assert await client.call("VGETATTR a x") in (b"$-1\r\n", b"_\r\n")


async def test_vget_and_vmget(client: Client) -> None:
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1e-30, -2)
    await add(client, "a", "y", 3, 4)
    null = await client.call("GET missing")
    assert await client.call("VGET a x") == bulk(vector(1e-30, -2))
    assert await client.call("VGET a nobody") == null
    assert await client.call("VMGET a y nobody x y") == array(
        bulk(vector(3, 4)), null, bulk(vector(1e-30, -2)), bulk(vector(3, 4))
    )
    await client.call("VDEL a x")
    assert await client.call("VGET a x") == null


async def test_many_vectors_are_read_by_a_thread_as_they_were(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 2")
        rows = [word for n in range(3000) for word in (b"k%d" % n, vector(n, 1))]
        await client.call([b"VMADD", b"a", *rows])
        await client.call("VDEL a k7")
        keys = [b"k%d" % (n * 7 % 3100) for n in range(2000)]
        expected = [None if key == b"k7" or int(key[1:]) >= 3000 else vector(int(key[1:]), 1) for key in keys]
        requests = [[b"VMGET", b"a", *keys], [b"VADD", b"a", b"k14", vector(0, 0)], b"DEL a".split()]
        await client.send(*requests)
        await client.arrived()
        (work,) = searches.work
        work()
        assert parse(await client.reply()) == expected
        assert house.server.held_replies.reserved == 0
        assert [await client.reply() for _ in range(2)] == [b":0\r\n", b":1\r\n"]


async def test_a_reply_larger_than_a_client_may_have_waiting_is_refused(house: House) -> None:
    client = house.connect()
    house.server.config.client_output_buffer_limit = 1 << 16
    await client.call("VNEW a 256")
    await client.call([b"VADD", b"a", b"x", vector(*[1] * 256)])
    for request in (
        [b"VMGET", b"a", *[b"x"] * 65],
        [b"VMSEARCH", b"a", b"1", b"4000", *[vector(*[1] * 256)] * 4000],
        [b"VMSEARCH", b"a", b"1", b"63", *[vector(*[1] * 256)] * 63, b"WITHVECTORS"],
    ):
        reply = await client.call(request)
        assert reply.startswith(b"-ERR the reply would take ")
        assert reply.endswith(b" bytes, more than client-output-buffer-limit\r\n")
    assert len(parse(await client.call([b"VMGET", b"a", *[b"x"] * 64]))) == 64


async def test_attributes(client: Client) -> None:
    yes, no = (b":1\r\n", b":0\r\n") if await client.call("GET x") == b"$-1\r\n" else (b"#t\r\n", b"#f\r\n")
    null = await client.call("GET x")
    await client.call("VNEW a 2")
    assert await client.call("VSETATTR a x {}") == no
    await add(client, "a", "x", 1, 2)
    assert await client.call("VGETATTR a x") == null
    assert await client.call([b"VSETATTR", b"a", b"x", b'{"year": 1999}']) == yes
    assert await client.call("VGETATTR a x") == bulk('{"year": 1999}')
    assert await client.call("VGET a x") == bulk(vector(1, 2))
    assert await client.call("VSETATTR a x not-JSON") == yes
    assert await client.call("VGETATTR a x") == bulk("not-JSON")
    assert await client.call([b"VSETATTR", b"a", b"x", b""]) == yes
    assert await client.call("VGETATTR a x") == null
    assert await client.call("VGETATTR a nobody") == null
    assert await client.call("VCOUNT a") == b":1\r\n"


async def test_setting_attributes_logs_no_vector_and_only_what_changes(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.call("VNEW a 2")
        await add(client, "a", "x", 1, 2)
        for _ in range(2):
            await client.call("VSETATTR a x {}")
        assert [operation for _, operation in journal.records[2:]] == [SetAttributes(1, (b"x",), (b"{}",))]


async def test_vscan(client: Client) -> None:
    await client.call("VNEW a 1")
    assert await client.call("VSCAN a 0") == array(bulk("0"), EMPTY)
    await client.send(*([b"VADD", b"a", b"key:%d" % number, vector(number)] for number in range(50)))
    for _ in range(50):
        await client.reply()
    cursor, found = "0", []
    while True:
        following, keys = parse(await client.call(f"VSCAN a {cursor} COUNT 7"))
        assert len(keys) <= 7
        found += keys
        assert len(found) <= 50
        cursor = following.decode()
        if cursor == "0":
            break
        # What is not there throughout may be missing; what is overwritten does not come again.
        await client.call("VDEL a key:0")
        for number in range(1, 50, 3):
            await add(client, "a", f"key:{number}", 0)
        await add(client, "a", f"new:{len(found)}", 0)
    assert sorted(found) == sorted(b"key:%d" % number for number in range(1, 50))
    assert len(parse(await client.call("VSCAN a 0"))[1]) == 10


@pytest.mark.parametrize("change", ["VSETATTR a {0} {{}}", "VDEL a {0}", "DEL a"])
async def test_vscan_ends_whatever_others_do(client: Client, change: str) -> None:
    cursor, calls = "0", 0
    while calls == 0 or cursor != "0":
        if calls == 0 or change.startswith("DEL"):
            await client.call("VNEW a 1")
        for number in range(20):
            await add(client, "a", f"{number}", 0)
        following, _ = parse(await client.call(f"VSCAN a {cursor} COUNT 10"))
        cursor = following.decode()
        calls += 1
        assert calls <= 2
        for number in range(1 if change.startswith("DEL") else 20):
            assert not (await client.call(change.format(number))).startswith(b"-")


async def test_vscan_options(client: Client) -> None:
    await client.call("VNEW a 1")
    for key in ("apple", "banana", "cherry"):
        await add(client, "a", key, 1)
    assert await client.call("VSCAN a 0 MATCH *an* COUNT 100") == array(bulk("0"), bulks("banana"))
    assert await client.call("VSCAN a 0 count 9223372036854775807") == array(
        bulk("0"), bulks("apple", "banana", "cherry")
    )
    assert await client.call("VSCAN a 18446744073709551615") == array(bulk("0"), EMPTY)
    for cursor in ("-1", "x", "18446744073709551616"):
        assert await client.call(f"VSCAN a {cursor}") == b"-ERR invalid cursor\r\n"
    for options in ("COUNT", "COUNT 0", "COUNT -1", "MATCH", "FOO 1", "COUNT 1 COUNT 1", "TYPE string"):
        assert (options, await client.call(f"VSCAN a 0 {options}")) == (options, SYNTAX_ERROR)
    assert await client.call("VSCAN a 0 COUNT x") == NOT_AN_INTEGER


# Seven are carried out together.
@pytest.mark.parametrize("limit", [2, 7])
async def test_rows_without_a_graph_slow_their_writer_down_only(
    open_house: OpenHouse, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    asked = []

    def admit(index: VectorIndex, rows: int) -> Wait:
        asked.append((index.rows_unindexed, rows))
        return partial(trio.sleep, 1.0)

    async with open_house(ManualJournal(automatic=True), searches=HeldSearches()) as house:
        monkeypatch.setattr(house.server.builder, "admit", admit)
        house.server.config.max_unindexed_rows = limit
        writer, other = house.connect(), house.connect()
        await writer.call("VNEW a 1")
        await writer.call("VNEW b 1")
        rows = range(limit + 2)
        await writer.send(*([b"VADD", b"a", b"%d" % number, vector(1)] for number in rows), "PING")
        assert [await writer.reply() for _ in range(limit)] == [b":1\r\n"] * limit
        began = trio.current_time()
        assert await other.call([b"VADD", b"b", b"x", vector(1)]) == b":1\r\n"
        assert await other.call("PING") == b"+PONG\r\n"
        assert trio.current_time() == began
        assert [await writer.reply() for _ in range(3)] == [b":1\r\n", b":1\r\n", b"+PONG\r\n"]
        assert trio.current_time() - began == pytest.approx(2.0)
        assert asked == [(limit, 1), (limit + 1, 1)]


async def test_many_rows_at_once_wait_as_long_as_one_by_one(
    house: House, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def admit(index: VectorIndex, rows: int) -> Wait:
        asked.append(rows)
        return partial(trio.sleep, rows)

    monkeypatch.setattr(house.server.builder, "admit", admit)
    house.server.config.max_unindexed_rows = 1
    client = house.connect()
    await client.call("VNEW a 1")
    await add(client, "a", "x", 1)
    began = trio.current_time()
    await client.call([b"VMADD", b"a", b"x", vector(1), b"y", vector(1)])
    await client.call([b"VMADD", b"a", b"x", vector(1), b"", b"ATTRS"])
    await client.call([b"VSETATTR", b"a", b"x", b"{}"])
    assert asked == [2, 1, 1]
    assert trio.current_time() - began == pytest.approx(4.0)
    # What a transaction adds to an index, it waits for once.
    await client.call("MULTI")
    for _ in range(2):
        await client.call([b"VMADD", b"a", b"x", vector(1), b"y", vector(1)])
    assert (await client.call("EXEC")).startswith(b"*2\r\n")
    assert asked[3:] == [4]
    assert trio.current_time() - began == pytest.approx(8.0)


@pytest.mark.parametrize("wish", ["FLUSHALL", "DEL a", "CONFIG SET max-unindexed-rows 1000"])
async def test_who_waits_for_the_builder_goes_on_when_there_is_nothing_to_wait_for(
    open_house: OpenHouse, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    async with open_house(config=Config(max_unindexed_rows=2)) as house:
        # Rows would be sealed, had anybody the time.
        monkeypatch.setattr(VectorIndex, "seal_wanted", True)
        monkeypatch.setattr(house.server, "reconfigure", house.server.builder.reconsider)
        gone, writer, other = house.connect(), house.connect(), house.connect()
        await other.call("VNEW a 1")
        await other.call([b"VMADD", b"a", b"x", vector(1), b"y", vector(1)])
        # So far beyond the limit that one row takes a while.
        house.server.builder._pace.record(1, 1e6, waited=True)
        await gone.send([b"VADD", b"a", b"g", vector(2)])
        await writer.send([b"VADD", b"a", b"z", vector(1)])
        await wait_all_tasks_blocked()
        await gone.stream.aclose()
        began = trio.current_time()
        assert await other.call(wish) in (b"+OK\r\n", b":1\r\n")
        reply = await writer.reply()
        assert reply == (b":1\r\n" if "CONFIG" in wish else b"-ERR no such index\r\n")
        assert trio.current_time() == began
