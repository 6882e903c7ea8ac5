from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram.commands import transactions
from engram.commands.long_work import ELEMENTS_A_TURN
from engram.commands.session import Transaction
from engram.index.pace import Wait
from engram.index.vector_index import VectorIndex
from engram.operations import AppendString, DeleteKeys, SetString
from tests.conftest import START, Client, HeldSearches, House, ManualJournal, OpenHouse, vector

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
    [watch] = [session.watch for session in house.server.sessions.values() if session.watch]
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
        queued = await client.arrived()
        assert queued in (b"", OK + 4 * QUEUED)
        journal.release(3)
        replies = queued + await client.arrived()
        assert replies == OK + 4 * QUEUED + b"*4\r\n+OK\r\n:2\r\n$2\r\n12\r\n:1\r\n"


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
        journal.room, journal.refusal = False, "no space"
        await client.send("MULTI", "GET a", "EXEC", "MULTI", "SET b 1", "EXEC", "EXEC")
        assert await client.arrived() == (
            OK + QUEUED + b"*1\r\n$-1\r\n" + OK + QUEUED
            + b"-EXECABORT Transaction discarded because of: MISCONF Errors writing to the log: no space\r\n"
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


class Counted(deque[Any]):
    """Counts how many of its items are looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.looked_at += 1
            yield item

    def __getitem__(self, position: Any) -> Any:
        self.looked_at += 1
        return super().__getitem__(position)

    def popleft(self) -> Any:
        self.looked_at += 1
        return super().popleft()


@pytest.mark.parametrize(
    "words",
    [
        ["INCR n", "GET n"],
        ["SET a 1", "SET a 2", "GET n", "GET n"],
        # Those that can be carried out together as far as one can see, and cannot.
        ["INCR text"],
        ["INCR n"] * 300 + ["INCR text"] * 300,
    ],
)
async def test_each_command_of_a_transaction_is_looked_at_a_few_times(house: House, words: list[str]) -> None:
    client = house.connect()
    await client.call("SET text hello")
    count = 3000 // len(words) * len(words)
    await client.send("MULTI", *words * (3000 // len(words)))
    assert await client.arrived() == OK + count * QUEUED
    [session] = house.server.sessions.values()
    assert session.transaction is not None
    counted = session.transaction.commands = Counted(session.transaction.commands)
    await client.send("EXEC")
    assert (await client.arrived()).startswith(b"*%d\r\n" % count)
    assert counted.looked_at <= 4 * count


async def begun(house: House) -> None:
    """Returns once a transaction has had its first turn."""
    while not house.server.exclusion.active:
        await trio.lowlevel.checkpoint()


async def test_others_are_answered_beside_a_long_transaction(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But they see none of it, and change nothing, before it is over."""
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other, writer = house.connect(), house.connect(), house.connect()
        await client.send("MULTI", *["INCR a"] * 2, *["APPEND b x", "INCR a"] * 100, "EXEC")
        await begun(house)
        assert await other.call("PING") == b"+PONG\r\n"
        await other.send("GET a")
        await writer.send("SET a 1000", "CLIENT ID")
        assert house.server.exclusion.active
        assert house.database.logical(0).string(b"a") != b"102"
        assert await other.reply() in (b"$3\r\n102\r\n", b"$4\r\n1000\r\n")
        assert await writer.arrived() == OK + b":3\r\n"
        assert (await client.arrived()).endswith(b":100\r\n:102\r\n")
        assert [len(operations) for operations in journal.together] == [201]
        assert await client.call("GET a") == b"$4\r\n1000\r\n"


async def test_a_long_transaction_is_finished_though_its_client_is_gone(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await client.send("MULTI", *["APPEND b x", "INCR a"] * 100, "EXEC")
        await begun(house)
        assert await other.call("CLIENT KILL ID 1") == b":1\r\n"
        assert house.server.exclusion.active
        assert await other.call("GET a") == b"$3\r\n100\r\n"
        assert [len(operations) for operations in journal.together] == [200]
        assert not house.server.exclusion.active


async def test_a_write_that_waited_for_room_waits_for_a_long_transaction(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other, third = house.connect(), house.connect(), house.connect()
        journal.room = False
        await other.send("SET a 1")
        await wait_all_tasks_blocked()
        await client.send("MULTI", *["GET a", "EXISTS a"] * 50, "EXEC")
        await begun(house)
        assert await third.call("PING") == b"+PONG\r\n"
        assert house.server.exclusion.active
        journal.make_room()
        assert (await client.arrived()).endswith(b"*100\r\n" + b"$-1\r\n:0\r\n" * 50)
        assert await other.arrived() == OK


async def test_a_long_transaction_that_fails_ends_its_client_alone(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    client, other = house.connect(), house.connect()
    await client.send("MULTI", *["GET a", "STRLEN a"] * 50)
    await client.arrived()
    take_turn = transactions._Execution._take_turn

    def fail(*arguments: Any) -> None:
        if house.server.exclusion.active:
            raise RuntimeError("no")
        take_turn(*arguments)

    monkeypatch.setattr(transactions._Execution, "_take_turn", fail)
    await client.send("EXEC")
    assert await client.ended() == b""
    assert "ended by an error" in caplog.text
    assert not house.server.exclusion.active
    assert await other.call("EXISTS a") == b":0\r\n"


async def test_commands_of_a_long_transaction_that_fail_are_answered_in_their_places(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    client = house.connect()
    await client.send("MULTI", *["SET b 1", "STRLEN a"] * 20)
    await client.arrived()

    def fail(key: bytes) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(house.database.logical(0), "string", fail)
        refused = b"-OOM Insufficient memory, failed allocating what the command needs\r\n"
        assert await client.call("EXEC") == b"*40\r\n" + (OK + refused) * 20
    assert not house.server.exclusion.active
    assert await client.call("GET b") == b"$1\r\n1\r\n"


@pytest.mark.parametrize("listing", ["KEYS *", "VLIST"])
async def test_long_lists_show_no_half_of_a_transaction(
    house: House, monkeypatch: pytest.MonkeyPatch, listing: str
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    client, other = house.connect(), house.connect()
    await client.call([b"MSET", *(b"%d" % number for number in range(2 * (ELEMENTS_A_TURN + 1)))])
    await client.call("VNEW index 2")
    others = ["GET a", "STRLEN a"] * 10
    await client.send("MULTI", *others, "RENAME index first", *others, "RENAME first index", "EXEC")
    await begun(house)
    while b"index" in house.engine.keyspace.values:
        await trio.lowlevel.checkpoint()
    assert house.server.exclusion.active
    await other.send(listing)
    assert b"$5\r\nindex\r\n" in await other.reply()


async def test_a_transaction_that_no_task_can_go_on_with_is_finished(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await client.send("MULTI", *["APPEND b x", "INCR a"] * 10)
        await client.arrived()

        def fail(job: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(house.server, "start_soon", fail)
        await client.send("EXEC")
        assert await client.ended() == b""
        assert [len(operations) for operations in journal.together] == [20]
        assert await other.call("GET a") == b"$2\r\n10\r\n"


async def test_how_much_may_be_queued(house: House) -> None:
    house.server.config.transaction_max_commands = 2
    client = house.connect()
    await client.send("MULTI", "SET a 1", "SET b 1", "SET c 1", "EXEC", "MULTI", "PING", "PING", "EXEC")
    assert await client.arrived() == (
        OK + 2 * QUEUED + b"-ERR the transaction has more commands than transaction-max-commands\r\n"
        + ABORTED + OK + 2 * QUEUED + b"*2\r\n+PONG\r\n+PONG\r\n"
    )  # fmt: skip
    assert not house.engine.keyspace.values


async def queued_by_a_client(house: House, requests: Sequence[str]) -> tuple[Client, Transaction]:
    """The only client, and what it has queued."""
    client = house.connect()
    await client.send("MULTI", *requests)
    await client.arrived()
    [session] = house.server.sessions.values()
    assert session.transaction is not None
    return client, session.transaction


@pytest.mark.parametrize("end", ["DISCARD", "RESET", "QUIT"])
async def test_what_was_queued_is_freed_later(house: House, end: str) -> None:
    """Freeing a million requests at once would hold every client up."""
    client, transaction = await queued_by_a_client(house, ["PING"] * 1000)
    queued = transaction.commands
    await client.send(end)
    await client.arrived()
    assert any(collection is queued for collection in house.engine.dropped)


async def test_what_exec_has_looked_at_beforehand_is_freed_later(house: House) -> None:
    client, transaction = await queued_by_a_client(house, ["SELECT 0"] * 1000)
    foreseen = transaction.foreseen
    await client.call("EXEC")
    assert len(foreseen) == 1000
    assert any(collection is foreseen for collection in house.engine.dropped)


@pytest.mark.parametrize("a_turn", [512, 1])
async def test_a_transaction_waits_for_indices_of_the_databases_that_it_selects(
    house: House, monkeypatch: pytest.MonkeyPatch, a_turn: int
) -> None:
    asked = []

    def admit(index: VectorIndex, rows: int) -> Wait:
        asked.append((index.id, rows))
        return trio.lowlevel.checkpoint

    monkeypatch.setattr(transactions, "_FORESEEN_A_TURN", a_turn)
    monkeypatch.setattr(house.server.builder, "admit", admit)
    house.server.config.max_unindexed_rows = 1
    client = house.connect()
    for database in (1, 2):
        await client.call(f"SELECT {database}")
        await client.call("VNEW a 1")
        await client.call([b"VADD", b"a", b"x", vector(1)])
    first, second = house.engine.indices
    add = [b"VADD", b"a", b"y", vector(2)]
    await client.call("SELECT 0")
    await client.send("MULTI", add, "SELECT 1", "SELECT 16", "SELECT x", add, add, "SELECT 2", add, "EXEC")
    for _ in range(9):
        await client.reply()
    assert (await client.reply()).endswith(b":1\r\n:0\r\n+OK\r\n:1\r\n")
    assert asked == [(first, 2), (second, 1)]
    # And then the client is where they have led.
    assert b" db=2 " in await client.call("CLIENT INFO")


async def test_a_client_is_in_its_database_while_its_transaction_waits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = trio.Event()
    monkeypatch.setattr(house.server.builder, "admit", lambda index, rows: go_on.wait)
    house.server.config.max_unindexed_rows = 1
    client, other = house.connect(), house.connect()
    await client.call("SELECT 1")
    await client.call("VNEW a 1")
    await client.call([b"VADD", b"a", b"x", vector(1)])
    await client.call("SELECT 0")
    await client.send("MULTI", "SELECT 1", [b"VADD", b"a", b"y", vector(2)], "EXEC")
    await wait_all_tasks_blocked()
    assert b" db=0 " in await other.call("CLIENT LIST ID 1")
    go_on.set()
    assert (await client.arrived()).endswith(b"*2\r\n+OK\r\n:1\r\n")


async def test_a_request_of_a_transaction_with_too_few_words_fails_in_its_place(house: House) -> None:
    """Whether or not rows have to wait for a graph."""
    house.server.config.max_unindexed_rows = 1
    client = house.connect()
    await client.call("VNEW a 1")
    await client.call([b"VADD", b"a", b"x", vector(1)])
    await client.send("MULTI", [b"VMADD", b"a", b"x", vector(1), b"y"], "PING", "EXEC", "PING")
    assert (await client.arrived()).endswith(
        b"*2\r\n-ERR wrong number of arguments for 'vmadd' command\r\n+PONG\r\n+PONG\r\n"
    )


class CountedKeys(dict[bytes, Any]):
    """Counts how many of its keys are looked at."""

    looked_at = 0

    def get(self, key: bytes, default: Any = None) -> Any:
        self.looked_at += 1
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.looked_at += 1
        return super().__contains__(key)


@pytest.mark.parametrize(
    "change",
    [
        [b"VADD", b"i", b"x", vector(1, 2)],
        [b"VSETATTR", b"i", b"member", b"{}"],
        [b"VDEL", b"i", b"member"],
        [b"SET", b"key", b"1"],
        [b"FLUSHALL"],
    ],
)
async def test_keys_that_others_watch_cost_a_change_nothing(house: House, change: list[bytes]) -> None:
    client, other = house.connect(), house.connect()
    await client.call("VNEW i 2")
    await client.call([b"VADD", b"i", b"member", vector(1, 2)])
    await other.call([b"WATCH", *(b"w%d" % number for number in range(2000))])
    counted = house.engine.keyspace.values = CountedKeys(house.engine.keyspace.values)
    await client.call(change)
    assert counted.looked_at < 20
    await other.send("MULTI", "EXEC")
    assert await other.arrived() == OK + b"*0\r\n"


async def test_a_change_tells_who_watches_once(house: House) -> None:
    clients = [house.connect() for _ in range(3)]
    writer = house.connect()
    for client in clients:
        await client.call("WATCH a b")
    await writer.call("SET a 1")
    assert house.database.watches.by_key.keys() == {b"b"}
    await clients[0].send("WATCH a c", "MULTI", "EXEC")
    assert await clients[0].arrived() == OK + OK + b"*-1\r\n"
    await clients[0].call("WATCH a")
    await writer.call("SET b 1")
    for client in clients:
        await client.send("MULTI", "EXEC")
    assert [await client.arrived() for client in clients] == [OK + b"*0\r\n"] + [OK + b"*-1\r\n"] * 2
    assert not house.database.watches.by_key


async def test_others_go_on_while_many_keys_are_watched(house: House) -> None:
    client, other = house.connect(), house.connect()
    count = 20_000
    await client.send([b"WATCH", *(b"%d" % number for number in range(count))], "MULTI", "EXEC")
    session = house.server.sessions[1]
    while not session.watch:
        await trio.lowlevel.checkpoint()
    assert await other.call("PING") == b"+PONG\r\n"
    assert 0 < len(session.watch) < count
    # One that it has come to already.
    await other.call("SET 0 x")
    assert await client.arrived() == OK + OK + b"*-1\r\n"


async def test_many_watched_keys_are_forgotten_bit_by_bit(house: House) -> None:
    client = house.connect()
    await client.send([b"WATCH", *(b"%d" % number for number in range(20_000))], "UNWATCH")
    assert await client.arrived() == OK + OK
    forgotten = house.database.watches
    assert 0 < len(forgotten.by_key) < 20_000
    steps = 1
    while forgotten.clear_up():
        steps += 1
    assert steps > 20
    assert not forgotten.by_key


async def test_an_index_that_is_watched_under_two_names_in_turn(house: House) -> None:
    client, other = house.connect(), house.connect()
    await other.call("VNEW i 2")
    await client.call("WATCH i j")
    await other.call("RENAME i j")
    await client.send("MULTI", "EXEC", "WATCH j", "MULTI")
    assert await client.arrived() == OK + b"*-1\r\n" + OK + OK
    await other.call([b"VADD", b"j", b"x", vector(1, 2)])
    await client.send("EXEC", "WATCH j", "MULTI", "EXEC")
    assert await client.arrived() == b"*-1\r\n" + OK + OK + b"*0\r\n"
    assert not house.database.watches._by_index


async def test_a_transaction_that_is_looked_at_beforehand_waits_for_another_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that only reads: it sees the other whole, or nothing of it."""
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    monkeypatch.setattr(transactions, "_FORESEEN_A_TURN", 8)
    reader, writer = house.connect(), house.connect()
    writes = [f"SET k{number} v" for number in range(200)]
    await writer.send("MULTI", *[word for write in writes for word in (write, "GET a")])
    await reader.send("MULTI", *["SELECT 0"] * 400, *["DBSIZE", "GET k199"] * 20)
    await writer.arrived()
    await reader.arrived()
    await reader.send("EXEC")
    await writer.send("EXEC")
    found = await reader.reply()
    assert found.endswith((b":200\r\n$1\r\nv\r\n" * 20, b":0\r\n$-1\r\n" * 20))
    assert not (await writer.reply()).startswith(b"-")


async def test_rights_are_checked_again_only_where_they_have_changed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin, client = house.connect(), house.connect()
    checked: list[bytes] = []
    denial = house.server.access.denial

    def check(session: Any, command: Any, request: list[bytes]) -> Any:
        checked.append(request[0])
        return denial(session, command, request)

    await admin.call("ACL SETUSER some on nopass +@all ~a*")
    monkeypatch.setattr(house.server.access, "denial", check)
    for changed in (False, True):
        await client.send("AUTH some x", "MULTI", "SET a 1", "GET a", "EXEC")
        replies = [await client.reply() for _ in range(5)]
        assert replies[-1] == b"*2\r\n+OK\r\n$1\r\n1\r\n"
        assert checked == []
        if changed:
            await client.send("MULTI", "SET a 2", "GET a")
            await client.arrived()
            await admin.call("ACL SETUSER some -get")
            assert (await client.call("EXEC")).startswith(b"*2\r\n+OK\r\n-NOPERM ACLs rules changed")
            assert checked == [b"SET", b"GET"]
