from __future__ import annotations

from typing import get_args

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram import watches
from engram.operations import AppendString, DeleteKeys, Operation, SetString
from tests.conftest import START, HeldSearches, House, ManualJournal, OpenHouse, vector

OK, QUEUED = b"+OK\r\n", b"+QUEUED\r\n"
ABORTED = b"-EXECABORT Transaction discarded because of previous errors.\r\n"


async def test_commands_are_queued_and_carried_out_together(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.send("MULTI", "SET a 1", "INCR a", "GET a")
    assert await client.arrived() == OK + 3 * QUEUED
    assert await other.call("EXISTS a") == b":0\r\n"
    assert await client.call("EXEC") == b"*3\r\n+OK\r\n:2\r\n$1\r\n2\r\n"
    assert await client.call("GET a") == b"$1\r\n2\r\n"


async def test_an_empty_transaction(house: House) -> None:
    client = house.connect()
    await client.send("MULTI", "EXEC")
    assert await client.arrived() == b"+OK\r\n*0\r\n"


@pytest.mark.parametrize(
    ("requests", "replies"),
    [
        (["EXEC"], b"-ERR EXEC without MULTI\r\n"),
        (["DISCARD"], b"-ERR DISCARD without MULTI\r\n"),
        (["UNWATCH"], OK),
        (["MULTI", "MULTI", "EXEC"], b"+OK\r\n-ERR MULTI calls can not be nested\r\n*0\r\n"),
        (["MULTI", "WATCH a", "EXEC"], b"+OK\r\n-ERR WATCH inside MULTI is not allowed\r\n*0\r\n"),
        (["MULTI", "SET a 1", "DISCARD", "EXISTS a"], OK + QUEUED + OK + b":0\r\n"),
        (["MULTI", "RESET", "EXEC"], b"+OK\r\n+RESET\r\n-ERR EXEC without MULTI\r\n"),
    ],
)
async def test_words_out_of_place(house: House, requests: list[str], replies: bytes) -> None:
    client = house.connect()
    await client.send(*requests)
    assert await client.arrived() == replies


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("NOSUCH", b"-ERR unknown command 'NOSUCH'\r\n"),
        ("GET", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("CLIENT NOSUCH", b"-ERR unknown subcommand 'NOSUCH'. Try CLIENT HELP.\r\n"),
        ("WATCH", b"-ERR wrong number of arguments for 'watch' command\r\n"),
        ("VSAVE", b"-ERR Command not allowed inside a transaction\r\n"),
        ("VOPTIMIZE i", b"-ERR Command not allowed inside a transaction\r\n"),
        ("VDELBY i FILTER .a", b"-ERR Command not allowed inside a transaction\r\n"),
    ],
)
async def test_a_refused_command_discards_the_whole(house: House, wrong: str, error: bytes) -> None:
    client = house.connect()
    await client.send("MULTI", "SET a 1", wrong, "SET b 1", "EXEC", "EXEC", "EXISTS a b")
    assert await client.arrived() == (
        OK + QUEUED + error + QUEUED + ABORTED + b"-ERR EXEC without MULTI\r\n:0\r\n"
    )


async def test_exec_with_too_many_words(house: House) -> None:
    client = house.connect()
    await client.send("MULTI", "EXEC extra", "EXEC")
    assert await client.arrived() == (
        OK + b"-EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command\r\n"
        b"-ERR EXEC without MULTI\r\n"
    )


async def test_a_failing_command_does_not_undo_the_others(house: House) -> None:
    client = house.connect()
    await client.call("VNEW i 2")
    await client.send("MULTI", "SET a x", "INCR a", "GET i", "SET b 1", "EXEC")
    assert await client.arrived() == (
        OK + 4 * QUEUED + b"*4\r\n+OK\r\n-ERR value is not an integer or out of range\r\n"
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n+OK\r\n"
    )
    usage = house.server.statistics.usage
    assert (usage["incr"].calls, usage["incr"].failed, usage["incr"].rejected) == (1, 1, 0)


@pytest.mark.parametrize(
    "change",
    [
        "SET a 1",
        "MSET c 1 a 1",
        "SETRANGE a 3 x",
        "RENAME a c",
        "RENAME d a",
        "COPY d a REPLACE",
        "APPEND a x",
        "DEL a",
        "EXPIRE a 100",
        "FLUSHALL",
        "VNEW a 2",
        "GETDEL a",
    ],
)
async def test_a_watched_key_that_changes_stops_exec(house: House, change: str) -> None:
    client, other = house.connect(), house.connect()
    if change.startswith("VNEW"):
        await other.call("DEL a")
    else:
        await other.call("MSET a 1 d 1")
    await client.call("WATCH a b")
    assert not (await other.call(change)).startswith(b"-")
    await client.send("MULTI", "SET e 1", "EXEC", "EXISTS e", "MULTI", "SET e 1", "EXEC")
    assert await client.arrived() == OK + QUEUED + b"*-1\r\n:0\r\n" + OK + QUEUED + b"*1\r\n+OK\r\n"
    assert not house.database.watches.by_key


@pytest.mark.parametrize(
    "change",
    [
        [b"VADD", b"i", b"y", vector(1, 2)],
        [b"VDEL", b"i", b"x"],
        [b"VSETATTR", b"i", b"x", b"{}"],
        [b"DEL", b"i"],
    ],
)
async def test_a_watched_index_that_changes_stops_exec(house: House, change: list[bytes]) -> None:
    client, other = house.connect(), house.connect()
    for name in (b"i", b"j"):
        await client.call([b"VNEW", name, b"2"])
        await client.call([b"VADD", name, b"x", vector(1, 2)])
    await client.call("WATCH i")
    await other.call([b"VADD", b"j", b"y", vector(1, 2)])
    assert not is_broken(house)
    assert not (await other.call(change)).startswith(b"-")
    assert is_broken(house)


def is_broken(house: House) -> bool:
    [watch] = [session.watch for session in house.server.sessions.values() if session.watch.keys]
    return watch.broken


@pytest.mark.parametrize("forget", ["UNWATCH", "RESET"])
async def test_what_is_no_longer_watched(house: House, forget: str) -> None:
    client, other = house.connect(), house.connect()
    await client.send("WATCH a b", forget)
    await client.arrived()
    assert not house.database.watches.by_key
    await other.call("SET a 1")
    await client.send("MULTI", "EXEC")
    assert await client.arrived() == OK + b"*0\r\n"


async def test_discard_and_leaving_forget_watches(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.send("WATCH a", "MULTI", "DISCARD")
    await client.arrived()
    await other.send("WATCH a b", "WATCH a")
    await other.arrived()
    assert house.database.watches.by_key
    await other.call("QUIT")
    await other.ended()
    assert not house.database.watches.by_key


async def test_null_in_resp3(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.call("HELLO 3")
    await client.call("WATCH a")
    await other.call("SET a 1")
    await client.send("MULTI", "EXEC")
    assert await client.arrived() == OK + b"_\r\n"


async def test_a_watched_key_that_lapses_stops_exec(house: House) -> None:
    client = house.connect()
    await client.send(f"SET a 1 PXAT {START + 5}", "WATCH a", "MULTI", "EXEC")
    assert (await client.arrived()).endswith(b"*0\r\n")
    await client.call("WATCH a")
    house.clock.time = START + 5
    await client.send("MULTI", "EXEC")
    assert await client.arrived() == OK + b"*-1\r\n"
    # It had lapsed before it was watched.
    await client.send(f"SET a 1 PXAT {START + 6}", "GET a")
    await client.arrived()
    house.clock.time = START + 6
    await client.send("WATCH a", "MULTI", "EXEC")
    assert await client.arrived() == 2 * OK + b"*0\r\n"


async def test_what_a_transaction_changes_is_one_entry_of_the_log(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await client.send("MULTI", "SET a 1", "APPEND a 2", "GET a", "DEL a b", "EXEC")
        await wait_all_tasks_blocked()
        await other.send("SET c 1")
        await wait_all_tasks_blocked()
        assert journal.together == [
            (SetString(b"a", b"1"), AppendString(b"a", b"2"), DeleteKeys((b"a",))),
        ]
        # Nothing of it is shown before it is durable.
        assert await client.arrived() == b""
        journal.release(3)
        assert await client.arrived() == OK + 4 * QUEUED + b"*4\r\n+OK\r\n:2\r\n$2\r\n12\r\n:1\r\n"


async def test_a_transaction_waits_for_room_and_then_looks_at_its_watches(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client = house.connect()
        await client.call("WATCH a")
        journal.room = False
        await client.send("MULTI", "SET b 1", "EXEC", "PING")
        assert await client.arrived() == OK + QUEUED
        assert journal.admissions == 1
        house.database.commit(SetString(b"a", b"1"))
        journal.make_room()
        assert await client.arrived() == b"*-1\r\n+PONG\r\n"


async def test_without_room_a_transaction_is_refused_whole(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client = house.connect()
        journal.room, journal.refusal = False, "MISCONF no space"
        await client.send("MULTI", "GET a", "EXEC", "MULTI", "SET b 1", "EXEC", "EXEC")
        assert await client.arrived() == (
            OK + QUEUED + b"*1\r\n$-1\r\n" + OK + QUEUED
            + b"-EXECABORT Transaction discarded because of: MISCONF no space\r\n"
            b"-ERR EXEC without MULTI\r\n"
        )  # fmt: skip


async def test_a_search_sees_what_was_changed_before_it(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal=journal) as house:
        client = house.connect()
        await client.send(
            "MULTI",
            "VNEW i 2",
            [b"VADD", b"i", b"x", vector(1, 0)],
            [b"VSEARCH", b"i", vector(1, 0), b"2"],
            [b"VADD", b"i", b"y", vector(1, 0)],
            "EXEC",
        )
        await wait_all_tasks_blocked()
        journal.release()
        with trio.fail_after(10):
            assert [await client.reply() for _ in range(5)] == [OK, *4 * [QUEUED]]
            assert await client.reply() == b"*4\r\n+OK\r\n:1\r\n*2\r\n$1\r\nx\r\n$1\r\n0\r\n:1\r\n"


async def test_others_go_on_while_a_search_in_a_transaction_is_made(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await client.call("VNEW i 2")
        await client.call([b"VADD", b"i", b"x", vector(1, 0)])
        await client.send("MULTI", [b"VSEARCH", b"i", vector(1, 0), b"1"], "EXEC", "PING")
        assert await client.arrived() == OK + QUEUED
        assert len(searches.held) == 1
        assert await other.call("PING") == b"+PONG\r\n"


def test_every_operation_says_which_keys_it_changes() -> None:
    assert set(watches._CHANGED) == set(get_args(Operation))


@pytest.mark.parametrize("request_", ["GETEX k", "SET k x NX GET", "GETSET k x"])
async def test_writes_that_answer_values_are_bounded_too(house: House, request_: str) -> None:
    house.server.config.client_output_buffer_limit = house.server.config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    await client.call([b"SET", b"k", bytes(500_000)])
    words = ["GET k"] * 3 + [request_, "INCR n", "EXEC"]
    await client.send("MULTI", *words)
    reply = [await client.reply() for _ in range(7)][-1]
    assert reply.count(bytes(500_000)) == 3
    assert reply.count(b"-ERR the reply would take ") == 1
    assert reply.endswith(b":1\r\n")
    assert await client.call("STRLEN k") == b":500000\r\n"


async def test_nobody_searches_for_a_client_that_is_gone(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        search = [b"VSEARCH", b"i", vector(1, 2), b"1"]
        await client.send(
            "VNEW i 2", [b"VADD", b"i", b"x", vector(1, 2)], "MULTI", search, search, search, "EXEC"
        )
        await client.arrived()
        assert [wanted() for wanted in searches.wanted] == [True] * 3
        assert await other.call("CLIENT KILL ID 1") == b":1\r\n"
        await wait_all_tasks_blocked()
        assert [wanted() for wanted in searches.wanted] == [False] * 3


async def test_a_transaction_makes_no_reply_that_no_memory_holds(house: House) -> None:
    """Beyond the bound it still writes what was queued."""
    house.server.config.client_output_buffer_limit = house.server.config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    await client.call([b"SET", b"k", bytes(500_000)])
    await client.send("MULTI", *["GET k"] * 4, "SET k x", *["GET k"] * 2, "PING", "EXEC")
    replies = [await client.reply() for _ in range(10)]
    found = b"$500000\r\n" + bytes(500_000) + b"\r\n"
    refused = (
        b"-ERR the reply would take 1500033 bytes, more than client-output-buffer-limit and"
        b" proto-max-bulk-len\r\n"
    )
    assert replies[-1].startswith(b"*8\r\n" + found * 3 + refused + b"+OK\r\n-ERR the reply would take ")
    assert replies[-1].count(b"-ERR the reply would take ") == 4
    assert await client.call("GET k") == b"$1\r\nx\r\n"
