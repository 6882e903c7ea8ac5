from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from engram.commands import matching
from engram.index.filters import Filter
from engram.index.matching import Matching, find_matching_since
from engram.index.vector_index import VectorIndex
from engram.operations import DeleteVectors
from tests.commands.conftest import SYNTAX_ERROR, add, bulk, bulks, search
from tests.conftest import Client, HeldSearches, House, ManualJournal, OpenHouse, vector

ARITY = b"-ERR wrong number of arguments for '%b' command\r\n"


async def test_nobody_looks_for_a_client_that_is_gone(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await client.send("VNEW i 2", [b"VADD", b"i", b"x", vector(1, 2)])
        await client.send([b"VDELBY", b"i", b"FILTER", b".a == 1"])
        await client.arrived()
        assert [wanted() for wanted in searches.wanted] == [True]
        assert await other.call("CLIENT KILL ID 1") == b":1\r\n"
        await trio.testing.wait_all_tasks_blocked()
        assert [wanted() for wanted in searches.wanted] == [False]


async def fill(client: Client, count: int = 10) -> None:
    """An index "a" whose members have their number as the attribute n."""
    await client.call("VNEW a 1 METRIC l2")
    words = [word for n in range(count) for word in (b"%d" % n, vector(n), b'{"n":%d}' % n)]
    assert await client.call([b"VMADD", b"a", *words, b"ATTRS"]) == b":%d\r\n" % count


def delete(expression: str) -> list[bytes]:
    return [b"VDELBY", b"a", b"FILTER", expression.encode()]


async def test_vcount(client: Client) -> None:
    await fill(client)
    await add(client, "a", "plain", 1)
    assert await client.call("VCOUNT a") == b":11\r\n"
    assert await client.call([b"VCOUNT", b"a", b"FILTER", b".n >= 3"]) == b":7\r\n"
    await client.call("VDEL a 3")
    assert await client.call([b"VCOUNT", b"a", b"filter", b".n >= 3"]) == b":6\r\n"
    assert await client.call([b"VCOUNT", b"a", b"FILTER", b".other"]) == b":0\r\n"


async def test_vcount_misused(client: Client) -> None:
    await fill(client)
    assert await client.call("VCOUNT") == ARITY % b"vcount"
    for rest in ("FILTER", "FILTER .n x", "WHERE .n", ".n"):
        assert (rest, await client.call(f"VCOUNT a {rest}")) == (rest, SYNTAX_ERROR)


async def test_vdelby(client: Client) -> None:
    await fill(client)
    await add(client, "a", "plain", 1)
    assert await client.call(delete(".n >= 3 and .n != 5")) == b":6\r\n"
    assert await client.call(delete(".n >= 3 and .n != 5")) == b":0\r\n"
    assert await search(client, "a", vector(0), b"9") == bulks(
        "0", "0", "1", "1", "plain", "1", "2", "2", "5", "5"
    )


async def test_an_empty_index(client: Client) -> None:
    await client.call("VNEW a 1")
    assert await client.call([b"VCOUNT", b"a", b"FILTER", b".n"]) == b":0\r\n"
    assert await client.call(delete(".n")) == b":0\r\n"


async def test_vdelby_misused(client: Client) -> None:
    await fill(client)
    assert await client.call("VDELBY a FILTER") == ARITY % b"vdelby"
    assert await client.call("VDELBY a FILTER .n x") == ARITY % b"vdelby"
    assert await client.call("VDELBY a WHERE .n") == SYNTAX_ERROR
    assert await client.call("VCOUNT a") == b":10\r\n"


async def test_the_commands_after_vdelby_see_what_it_did(client: Client) -> None:
    await fill(client)
    await client.send(
        "VGET a 7",
        delete(".n > 4"),
        "VGET a 7",
        "VCOUNT a",
        [b"VSEARCH", b"a", vector(9), b"1"],
        [b"VADD", b"a", b"7", vector(7)],
        "VGETATTR a 7",
        delete(".n > 4"),
        "VCOUNT a",
    )
    replies = [await client.reply() for _ in range(9)]
    null = replies[2]
    assert null in (b"$-1\r\n", b"_\r\n")
    assert replies == [
        bulk(vector(7)),
        b":5\r\n",
        null,
        b":5\r\n",
        bulks("4", "5"),
        b":1\r\n",
        null,
        b":0\r\n",
        b":6\r\n",
    ]


async def test_vdelby_is_carried_out_without_a_reply(client: Client) -> None:
    await fill(client)
    await client.send("CLIENT REPLY SKIP", delete(".n > 4"), "VCOUNT a")
    assert await client.reply() == b":5\r\n"
    await client.send("CLIENT REPLY OFF", delete(".n > 2"), "CLIENT REPLY ON", "VCOUNT a")
    assert [await client.reply() for _ in range(2)] == [b"+OK\r\n", b":3\r\n"]


async def test_other_clients_go_on_while_rows_are_looked_for(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(ManualJournal(automatic=True), searches=searches) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        await client.send("PING 1", delete(".n > 4"), "PING 2")
        assert await client.arrived() == b"$1\r\n1\r\n"
        assert await other.call("PING") == b"+PONG\r\n"
        searches.work.pop()()
        assert await client.arrived() == b":5\r\n$1\r\n2\r\n"


async def test_what_changes_while_rows_are_looked_for(open_house: OpenHouse) -> None:
    """All that matches when the rows are deleted is deleted, in one record, and nothing else."""
    searches, journal = HeldSearches(), ManualJournal(automatic=True)
    async with open_house(journal, searches=searches) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        await client.send(delete(".n > 4"))
        await client.arrived()
        await other.call("VDEL a 9")
        await other.call([b"VSETATTR", b"a", b"8", b'{"n":0}'])
        await other.call([b"VADD", b"a", b"7", vector(70)])
        await other.call([b"VSETATTR", b"a", b"1", b'{"n":10}'])
        await other.call([b"VMADD", b"a", b"new", vector(1), b'{"n":11}', b"ATTRS"])
        searches.work.pop()()
        assert await client.arrived() == b":5\r\n"
        last = journal.records[-1][1]
        assert isinstance(last, DeleteVectors)
        assert sorted(last.keys) == [b"1", b"5", b"6", b"7", b"new"]
        assert set(house.engine.indices[1].live) == {b"0", b"2", b"3", b"4", b"8"}


async def test_many_rows_that_come_meanwhile_are_looked_at_by_a_thread(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = HeldSearches()
    looked_at: list[int] = []

    def look(index: VectorIndex, row_id: int, condition: Filter) -> Matching:
        looked_at.append(index.next_row - row_id)
        return find_matching_since(index, row_id, condition)

    monkeypatch.setattr(matching, "find_matching_since", look)
    monkeypatch.setattr(matching, "_LOOKED_AT_ONCE", 4, raising=False)
    async with open_house(ManualJournal(automatic=True), searches=searches) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        await client.send(delete(".n > 4"))
        await client.arrived()
        for come in (5, 7, 3):
            for number in range(come):
                member = b"%d of %d" % (number, come)
                await other.call([b"VMADD", b"a", member, vector(1), b'{"n":%d}' % (4 + number), b"ATTRS"])
            await other.call([b"VSETATTR", b"a", b"9", b'{"n":%d}' % come])
            searches.work.pop()()
            await client.arrived()
        # Before there is room in the log, and after.
        assert looked_at == [4, 4]
        left = {b"0", b"1", b"2", b"3", b"4", b"9", b"0 of 5", b"0 of 7", b"0 of 3"}
        assert set(house.engine.indices[1].live) == left


async def test_many_are_deleted_in_turns_that_nobody_sees(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(matching, "_DELETED_AT_ONCE", 2, raising=False)
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        (index,) = house.engine.indices.values()
        left: set[int] = set()
        counted: list[bytes] = []

        async def watch() -> None:
            while True:
                left.add(len(index))
                await trio.lowlevel.checkpoint()

        async def count() -> None:
            while b":1\r\n" not in counted:
                counted.append(await other.call("VCOUNT a"))

        nursery.start_soon(watch)
        nursery.start_soon(count)
        await client.send(delete(".n > 0"), "VCOUNT a")
        assert [await client.reply(), await client.reply()] == [b":9\r\n", b":1\r\n"]
        # Others have their turns, and see all of it or nothing.
        assert len(left) > 3
        while b":1\r\n" not in counted:
            await trio.lowlevel.checkpoint()
        assert set(counted) <= {b":10\r\n", b":1\r\n"}
        (together,) = journal.together
        deleted = [key for each in together if isinstance(each, DeleteVectors) for key in each.keys]
        assert sorted(deleted) == [b"%d" % number for number in range(1, 10)]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("drop", ["DEL a", "FLUSHALL", "SET a x"])
async def test_an_index_dropped_meanwhile_has_nothing_to_delete(open_house: OpenHouse, drop: str) -> None:
    searches = HeldSearches()
    async with open_house(ManualJournal(automatic=True), searches=searches) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        await client.send(delete(".n > 4"))
        await client.arrived()
        await other.call(drop)
        await other.call("VNEW a 1")
        searches.work.pop()()
        assert await client.arrived() == b":0\r\n"


async def test_vdelby_waits_for_room_in_the_log(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        assert await client.call(delete(".n > 4")) == b":5\r\n"
        journal.room = False
        journal.refusal = "No space left on device"
        assert await client.call(delete(".n > 2")) == (
            b"-MISCONF Errors writing to the log: No space left on device\r\n"
        )
        assert await other.call("VCOUNT a") == b":5\r\n"


async def test_more_than_a_record_holds_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_LARGEST_RECORD", 300)
    client = house.connect()
    await fill(client)
    assert await client.call(delete(".n >= 0")) == (
        b"-ERR the keys to delete do not fit in one record; use a narrower filter\r\n"
    )
    assert await client.call("VCOUNT a") == b":10\r\n"
    assert await client.call(delete(".n >= 8")) == b":2\r\n"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (delete(".n > 4"), b"-ERR searching failed: out of order\r\n"),
        ([b"VCOUNT", b"a", b"FILTER", b".n"], b"-ERR counting failed: out of order\r\n"),
    ],
)
async def test_a_search_that_fails(open_house: OpenHouse, request_: list[bytes], error: bytes) -> None:
    def fail(
        function: object,
        done: Callable[[Exception], None],
        wanted: Callable[[], bool] = lambda: True,
        client: int = 0,
    ) -> None:
        done(ValueError("out of order"))

    searches = HeldSearches()
    searches.submit_read = fail  # type: ignore[method-assign]
    async with open_house(searches=searches) as house:
        client = house.connect()
        await fill(client)
        assert await client.call(request_) == error
        assert house.server.statistics.error_replies == 1
        assert await client.call("VCOUNT a") == b":10\r\n"


async def test_a_client_that_is_killed_deletes_nothing(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        await client.send(delete(".n > 4"))
        await trio.testing.wait_all_tasks_blocked()
        assert await other.call("CLIENT KILL ID 1") == b":1\r\n"
        assert await client.ended() == b""
        searches.work.pop()()
        assert await other.call("VCOUNT a") == b":10\r\n"
