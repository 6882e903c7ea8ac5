from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Barrier, Session
from engram.commands.table import Reply, log_room
from engram.config import Config
from engram.database import RECORD_OVERHEAD
from engram.errors import LogFullError
from engram.index.search import SearchResult
from engram.operations import AppendString, DeleteKeys, Operation, SetString
from tests.conftest import (
    PATIENCE,
    Client,
    HeldSearches,
    House,
    ManualJournal,
    OpenHouse,
    encode_request,
    vector,
)

OK, PONG, ONE, ZERO = b"+OK\r\n", b"+PONG\r\n", b":1\r\n", b":0\r\n"


def pings(count: int, size: int = 0) -> list[list[bytes]]:
    return [[b"PING", b"%d" % number + b"." * size] for number in range(count)]


def pongs(count: int, size: int = 0) -> bytes:
    bodies = [b"%d" % number + b"." * size for number in range(count)]
    return b"".join(b"$%d\r\n%b\r\n" % (len(body), body) for body in bodies)


# Order


async def test_a_burst_is_answered_in_order(house: House) -> None:
    client = house.connect()
    await client.send("SET k v", "GET k", "NOSUCH", "GET", "INCR n", "GET n")
    assert await client.arrived() == (
        b"+OK\r\n$1\r\nv\r\n"
        b"-ERR unknown command 'NOSUCH'\r\n"
        b"-ERR wrong number of arguments for 'get' command\r\n"
        b":1\r\n$1\r\n1\r\n"
    )


async def test_one_send_for_a_burst(house: House) -> None:
    near, far = trio.testing.memory_stream_pair()
    sends: list[bytes] = []
    send_all = far.send_all

    async def counted(data: bytes) -> None:
        sends.append(bytes(data))
        await send_all(data)

    far.send_all = counted  # type: ignore[method-assign, assignment]
    client = house.connect(streams=(near, far))
    await client.send(*pings(100))
    await client.arrived()
    assert sends == [pongs(100)]


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_requests_cut_anywhere(house: House, size: int) -> None:
    client = house.connect()
    data = encode_request([b"SET", b"k", b"a\r\nb"]) + b"GET k\r\n" + encode_request([b"INCR", b"n"])
    for start in range(0, len(data), size):
        await client.stream.send_all(data[start : start + size])
        await wait_all_tasks_blocked()
    assert await client.arrived() == b"+OK\r\n$4\r\na\r\nb\r\n:1\r\n"


async def test_replies_wait_for_a_search_before_them(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await client.call("VNEW a 1")
        await client.call([b"VADD", b"a", b"x", vector(1)])
        query = [b"VSEARCH", b"a", vector(1), b"1"]
        await client.send("PING 1", query, "PING 2", query, "PING 3")
        assert await client.arrived() == b"$1\r\n1\r\n"
        assert await other.call("PING") == PONG
        first, second = searches.held
        second([SearchResult([b"y"], [b"1"])])
        assert await client.arrived() == b""
        first([SearchResult([b"x"], [b"0"])])
        assert await client.arrived() == (
            b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n$1\r\n2\r\n*2\r\n$1\r\ny\r\n$1\r\n1\r\n$1\r\n3\r\n"
        )


async def test_a_barrier_holds_up_the_client_until_the_server_shuts_down(open_house: OpenHouse) -> None:
    async with open_house(searches=HeldSearches()) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await client.send("PING 1", [b"VDELBY", b"a", b"FILTER", b".n"], "SET k v")
        assert await client.arrived() == b"$1\r\n1\r\n"
        house.connections[0].finish()
        assert await client.ended() == b""
        assert house.engine.keyspace.values.get(b"k") is None


async def test_a_search_ends_after_its_client_has_gone(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client, other = house.connect(), house.connect()
        await client.call("VNEW a 1")
        await client.call([b"VADD", b"a", b"x", vector(1)])
        await client.send([b"VSEARCH", b"a", vector(1), b"1"])
        await wait_all_tasks_blocked()
        assert await other.call("CLIENT KILL ID 1") == ONE
        assert await client.ended() == b""
        assert not searches.wanted.pop()()
        searches.held.pop()([SearchResult([b"x"], [b"0"])])
        assert await other.call("PING") == PONG


async def test_others_are_served_between_requests_that_are_refused(house: House) -> None:
    """Refusals take longer than most commands do, however short the requests are."""
    client, other = house.connect(), house.connect()
    turns: list[int] = []
    count = 20_000

    async def watch() -> None:
        while True:
            turns.append(client.received.count(b"-ERR"))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await client.stream.send_all(b"a\n" * count)
        with trio.fail_after(PATIENCE):
            while client.received.count(b"-ERR") < count:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(set(turns)) > 8
    assert await other.call("PING") == PONG


async def test_many_clients_are_each_answered_in_order(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        clients = [house.connect() for _ in range(8)]
        await clients[0].call("VNEW a 1")
        await clients[0].call([b"VADD", b"a", b"x", vector(1)])
        for client in clients:
            await client.send("PING 1")
            await client.send("PING 2", [b"VSEARCH", b"a", vector(1), b"1"], "PING 3")
            await client.send("PING 4", "NOSUCH")
            await client.stream.send_all(b"*x\r\n")
        await wait_all_tasks_blocked()
        for done in searches.held:
            done([SearchResult([b"x"], [b"0"])])
        for client in clients:
            assert await client.ended() == (
                b"$1\r\n1\r\n$1\r\n2\r\n*2\r\n$1\r\nx\r\n$1\r\n0\r\n$1\r\n3\r\n$1\r\n4\r\n"
                b"-ERR unknown command 'NOSUCH'\r\n"
                b"-ERR Protocol error: invalid multibulk length\r\n"
            )


# CLIENT REPLY, QUIT and errors that end a connection; what Redis 8 sends for the same bytes


@pytest.mark.parametrize(
    ("requests", "replies"),
    [
        (["CLIENT REPLY OFF", "PING", "FOO", "CLIENT REPLY ON", "PING 1"], b"+OK\r\n$1\r\n1\r\n"),
        (["CLIENT REPLY SKIP", "PING 0", "PING 1"], b"$1\r\n1\r\n"),
        (["CLIENT REPLY SKIP", "CLIENT REPLY SKIP", "PING 0", "PING 1"], b"$1\r\n1\r\n"),
        (["CLIENT REPLY SKIP", "CLIENT REPLY ON", "PING 1"], b"+OK\r\n$1\r\n1\r\n"),
        (["CLIENT REPLY SKIP", "CLIENT REPLY FOO", "PING 1"], b"$1\r\n1\r\n"),
        (["CLIENT REPLY SKIP", "NOSUCH", "PING 1"], b"$1\r\n1\r\n"),
        (["CLIENT REPLY OFF", "CLIENT REPLY SKIP", "PING 0", "PING 1", "CLIENT REPLY ON"], b"+OK\r\n"),
        (["CLIENT REPLY OFF", "RESET", "PING 1"], b"+RESET\r\n$1\r\n1\r\n"),
    ],
)
async def test_client_reply(house: House, requests: list[str], replies: bytes) -> None:
    client = house.connect()
    await client.send(*requests)
    assert await client.arrived() == replies
    slow = house.connect()
    arrived = b""
    for request in requests:
        await slow.send(request)
        arrived += await slow.arrived()
    assert arrived == replies


async def test_a_search_is_not_answered_when_replies_are_off(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.call("VNEW a 1")
        await client.call([b"VADD", b"a", b"x", vector(1)])
        await client.send("CLIENT REPLY SKIP", [b"VSEARCH", b"a", vector(1), b"1"], "PING")
        assert await client.arrived() == PONG
        assert not searches.wanted.pop()()
        searches.held.pop()([SearchResult([b"x"], [b"0"])])
        assert await client.arrived() == b""


async def test_quit_answers_what_came_before_it_and_closes(house: House) -> None:
    client = house.connect()
    await client.send("PING 1", "QUIT", "SET k v")
    assert await client.ended() == b"$1\r\n1\r\n+OK\r\n"
    assert b"k" not in house.engine.keyspace.values
    await trio.testing.wait_all_tasks_blocked()
    assert house.server.sessions == {}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"*1\r\n+PING\r\n", b"expected '$', got '+'"),
        (b"*x\r\n", b"invalid multibulk length"),
        (b"*2000000000\r\n", b"invalid multibulk length"),
        (b"*1\r\n$x\r\n", b"invalid bulk length"),
        (b"*1\r\n$999999999999\r\n", b"invalid bulk length"),
        (b'PING "a\r\n', b"unbalanced quotes in request"),
    ],
)
async def test_a_protocol_error_ends_the_connection_after_the_replies_before_it(
    house: House, data: bytes, error: bytes
) -> None:
    client, other = house.connect(), house.connect()
    await client.stream.send_all(encode_request([b"PING", b"1"]) + data + encode_request([b"PING", b"2"]))
    assert await client.ended() == b"$1\r\n1\r\n-ERR Protocol error: %b\r\n" % error
    assert await other.call("PING") == PONG


async def test_empty_requests_are_skipped(house: House) -> None:
    client = house.connect()
    await client.stream.send_all(b"\r\n*0\r\n*-1\r\n  \r\nping 'a b'\r\nECHO \"\\x41\\n\"\n")
    assert await client.arrived() == b"$3\r\na b\r\n$2\r\nA\n\r\n"


async def test_a_client_that_leaves_is_forgotten(house: House) -> None:
    client = house.connect()
    await client.call("PING")
    assert list(house.server.sessions) == [1]
    await client.stream.send_eof()  # type: ignore[attr-defined]
    await wait_all_tasks_blocked()
    assert house.server.sessions == {}


async def test_a_client_that_stops_sending_still_gets_its_replies(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        near, far = trio.testing.memory_stream_pair()
        client = house.connect(streams=(near, far))
        await client.call("VNEW a 1")
        await client.call([b"VADD", b"a", b"x", vector(1)])
        await client.send([b"VSEARCH", b"a", vector(1), b"1"], "PING")
        await near.send_eof()
        assert await client.arrived() == b""
        searches.held.pop()([SearchResult([b"x"], [b"0"])])
        assert await client.ended() == b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n" + PONG


async def test_client_kill(house: House) -> None:
    client, victim, third = house.connect(), house.connect(), house.connect()
    assert await client.call("CLIENT KILL ID 2") == ONE
    assert await victim.ended() == b""
    assert await client.call("CLIENT KILL 127.0.0.1:1002") == OK
    assert await third.ended() == b""
    assert await client.call("CLIENT KILL ID 1") == b":0\r\n"
    await client.send("CLIENT KILL ID 1 SKIPME no", "PING")
    assert await client.ended() == ONE


async def test_a_client_that_waits_for_room_in_the_log_can_be_killed(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        journal.room = False
        await client.send("PING", "SET k v")
        assert await client.arrived() == PONG
        assert await other.call("CLIENT KILL ID 1") == ONE
        assert await client.ended() == b""
        journal.make_room()
        await wait_all_tasks_blocked()
        assert journal.records == []


async def test_a_client_who_came_as_its_user_was_restricted_is_restricted(house: House) -> None:
    """Its task has not begun when the rules change."""
    new = house.connect()
    house.server.access.put(b"default", house.server.access.changed(b"default", [b"-@all", b"+ping"]))
    house.server.review_sessions()
    assert (await new.call("SET k v")).startswith(b"-NOPERM ")


@pytest.mark.parametrize("waits", [False, True])
async def test_who_is_ended_by_an_error_learns_what_was_done_before(
    waits: bool, open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A write that may have been made, which an error reply would deny."""

    async def break_later() -> bytes:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("broken")

    def broken(session: Session, arguments: list[bytes]) -> Reply:
        if waits:
            return Barrier(break_later)
        session.database.commit(AppendString(arguments[1], arguments[2]))
        raise ZeroDivisionError("broken")

    monkeypatch.setitem(SPELLINGS, b"APPEND", attrs.evolve(COMMANDS[b"append"], handler=broken))
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect()
        await client.send("SET k v", "APPEND k x", "PING")
        assert await client.arrived() == b""
        journal.release()
        assert await client.ended() == OK
    assert "ended by an error" in caplog.text


async def test_a_command_that_fails_again_and_again_is_logged_now_and_then(
    open_house: OpenHouse,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(session: Session, arguments: list[bytes]) -> Reply:
        raise ZeroDivisionError(arguments[1])

    monkeypatch.setitem(SPELLINGS, b"GET", attrs.evolve(COMMANDS[b"get"], handler=broken, run=None))
    async with open_house() as house:
        client = house.connect()
        refused = b"-ERR internal error, see the log of the server\r\n"
        for logged in (1, 2):
            await client.send("GET a", "GET b", "MULTI", "GET c", "EXEC", "GET d")
            assert await client.arrived() == 2 * refused + OK + b"+QUEUED\r\n" + b"*1\r\n" + refused * 2
            assert caplog.text.count("a command of client") == logged
            mock_clock.jump(61)


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (MemoryError(), b"-OOM Insufficient memory, failed allocating what the command needs\r\n"),
        (ZeroDivisionError("broken"), b"-ERR internal error, see the log of the server\r\n"),
    ],
)
@pytest.mark.parametrize("name", ["get", "append"])
@pytest.mark.parametrize("waits", [False, True])
async def test_what_fails_before_it_changes_anything_ends_only_its_request(
    waits: bool,
    name: str,
    error: Exception,
    reply: bytes,
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def break_later() -> bytes:
        await trio.lowlevel.checkpoint()
        raise error

    def broken(session: Session, arguments: list[bytes]) -> Reply:
        if waits and name == "get":
            return Barrier(break_later)
        raise error

    broken_command = attrs.evolve(COMMANDS[name.encode()], handler=broken, run=None)
    monkeypatch.setitem(SPELLINGS, name.upper().encode(), broken_command)
    request = f"{name.upper()} k" + (" x" if name == "append" else "")
    client = house.connect()
    await client.send("SET k v", request, "STRLEN k")
    assert [await client.reply() for _ in range(3)] == [OK, reply, b":1\r\n"]
    # In a transaction it takes its place among the replies.
    if not waits:
        await client.send("MULTI", "STRLEN k", request, "SET k w", "EXEC")
        assert [await client.reply() for _ in range(4)] == [OK, *[b"+QUEUED\r\n"] * 3]
        assert await client.reply() == b"*3\r\n:1\r\n" + reply + OK
    [*_, record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_a_transaction_is_queued_as_far_as_there_is_memory_for_requests(house: House) -> None:
    house.server.config.client_query_buffer_limit = 1 << 20
    client = house.connect()
    await client.call("MULTI")
    for _ in range(10):
        assert await client.call([b"SET", b"k", bytes(100_000)]) == b"+QUEUED\r\n"
    refused = b"-ERR the transaction takes more than client-query-buffer-limit\r\n"
    for _ in range(10):
        assert await client.call([b"SET", b"k", bytes(100_000)]) == refused
    transaction = house.server.sessions[1].transaction
    assert transaction is not None
    assert transaction.size < 1.2 * (1 << 20)
    assert (await client.call("EXEC")).startswith(b"-EXECABORT ")
    assert await client.call("EXISTS k") == b":0\r\n"


# Durability: no reply leaves before the state it shows is durable


async def test_a_write_is_answered_once_it_is_durable(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect()
        await client.send("SET k v")
        assert await client.arrived() == b""
        assert journal.records == [(1, SetString(b"k", b"v"))]
        journal.release()
        assert await client.arrived() == OK


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("GET k", b"$1\r\nv\r\n"),
        ("EXISTS k", ONE),
        ("DBSIZE", ONE),
        ("KEYS *", b"*1\r\n$1\r\nk\r\n"),
        ("SET k w NX", b"$-1\r\n"),
        ("INCR k", b"-ERR value is not an integer or out of range\r\n"),
        ("NOSUCH", b"-ERR unknown command 'NOSUCH'\r\n"),
    ],
)
async def test_no_client_is_shown_what_is_not_durable(
    open_house: OpenHouse, request_: str, reply: bytes
) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        writer, reader = house.connect(), house.connect()
        await writer.send("SET k v")
        await wait_all_tasks_blocked()
        await reader.send(request_)
        assert await reader.arrived() == b""
        journal.release()
        assert await reader.arrived() == reply
        assert await writer.arrived() == OK
        assert await reader.call("GET k") == b"$1\r\nv\r\n"


async def test_a_reply_that_shows_no_data_waits_for_the_clients_own_only(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        writer, other = house.connect(), house.connect()
        await writer.send("SET k v")
        await wait_all_tasks_blocked()
        assert await other.call("PING") == PONG
        assert await other.call("ECHO x") == b"$1\r\nx\r\n"
        await writer.send("PING")
        assert await writer.arrived() == b""
        await other.send("PING", "GET k")
        assert await other.arrived() == b""
        journal.release()
        assert await writer.arrived() == OK + PONG
        assert await other.arrived() == PONG + b"$1\r\nv\r\n"


async def test_the_deletion_of_a_lapsed_key_is_durable_before_it_is_seen(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect()
        await client.send("SET k v PX 5")
        await wait_all_tasks_blocked()
        journal.release()
        assert await client.arrived() == OK
        house.clock.time += 5
        await client.send("GET k")
        assert await client.arrived() == b""
        assert journal.records[1:] == [(2, DeleteKeys((b"k",)))]
        journal.release()
        assert await client.arrived() == b"$-1\r\n"
        assert house.database.expired_keys == 1


async def test_replies_leave_as_far_as_the_log_has_come(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect()
        for number in range(1, 4):
            await client.send(f"SET k {number}")
            await wait_all_tasks_blocked()
        journal.release(2)
        assert await client.arrived() == OK + OK
        journal.release(3)
        assert await client.arrived() == OK


async def test_a_search_shows_nothing_that_is_not_durable(open_house: OpenHouse) -> None:
    journal, searches = ManualJournal(), HeldSearches()
    async with open_house(journal, searches=searches) as house:
        client = house.connect()
        await client.send(
            "VNEW a 1", [b"VADD", b"a", b"x", vector(1)], [b"VSEARCH", b"a", vector(1), b"1"], "PING"
        )
        await wait_all_tasks_blocked()
        searches.held.pop()([SearchResult([b"x"], [b"0"])])
        assert await client.arrived() == b""
        journal.release()
        assert await client.arrived() == OK + ONE + b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n" + PONG


async def test_a_search_done_after_its_state_became_durable(open_house: OpenHouse) -> None:
    journal, searches = ManualJournal(), HeldSearches()
    async with open_house(journal, searches=searches) as house:
        client = house.connect()
        await client.send(
            "VNEW a 1", [b"VADD", b"a", b"x", vector(1)], [b"VSEARCH", b"a", vector(1), b"1"], "SET k v"
        )
        await wait_all_tasks_blocked()
        journal.release(2)
        assert await client.arrived() == OK + ONE
        searches.held.pop()([SearchResult([b"x"], [b"0"])])
        assert await client.arrived() == b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n"
        journal.release()
        assert await client.arrived() == OK


async def test_a_search_need_not_wait_for_what_others_write(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        writer, reader = house.connect(), house.connect()
        await writer.send("VNEW a 1 METRIC l2", [b"VADD", b"a", b"x", vector(1)])
        await wait_all_tasks_blocked()
        journal.release()
        assert await writer.arrived() == OK + ONE
        await writer.send([b"VADD", b"a", b"y", vector(2)], [b"VADD", b"a", b"x", vector(5)])
        assert await writer.arrived() == b""
        # Nothing of it has been acknowledged: it may come after the search.
        search = [b"VSEARCH", b"a", vector(1), b"5"]
        assert await reader.call(search) == b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n"
        journal.release()
        assert await writer.arrived() == ONE + ZERO
        assert await reader.call(search) == b"*4\r\n$1\r\ny\r\n$1\r\n1\r\n$1\r\nx\r\n$1\r\n4\r\n"


@pytest.mark.parametrize(
    ("before", "replies"),
    [
        (([b"VADD", b"a", b"y", vector(2)],), 1),
        (("CLIENT REPLY SKIP", [b"VADD", b"a", b"y", vector(2)]), 0),
        # What another client wrote, but this one has asked for.
        (("GET k",), 1),
    ],
)
async def test_a_search_shows_what_its_client_has_seen_before(
    open_house: OpenHouse, before: tuple[Any, ...], replies: int
) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await client.send("VNEW a 1 METRIC l2")
        await wait_all_tasks_blocked()
        journal.release()
        assert await client.arrived() == OK
        if before == ("GET k",):
            await other.send([b"VADD", b"a", b"y", vector(2)], "SET k v")
            await wait_all_tasks_blocked()
        await client.send(*before, [b"VSEARCH", b"a", vector(2), b"5"])
        assert await client.arrived() == b""
        journal.release()
        for _ in range(replies):
            await client.reply()
        assert await client.reply() == b"*2\r\n$1\r\ny\r\n$1\r\n0\r\n"


@pytest.mark.parametrize("ticks", range(6))
async def test_a_reply_released_while_its_client_is_ending(open_house: OpenHouse, ticks: int) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect()
        await client.send("SET k v")
        await wait_all_tasks_blocked()
        house.server.sessions[1].close()
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        journal.release()
        await wait_all_tasks_blocked()
        assert client.gone.is_set()
        assert house.server.sessions == {}


# Admission


NO_SPACE = "No space left on device"


async def test_a_write_without_room_is_refused_and_changes_nothing(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.call("SET k v")
        await client.call("VNEW a 1")
        journal.room, journal.refusal = False, NO_SPACE
        refused = f"-MISCONF Errors writing to the log: {NO_SPACE}\r\n".encode()
        before = journal.records.copy()
        for request in ("SET k w", "DEL k", "INCR n", "EXPIRE k 5", "FLUSHALL", "VNEW b 1", "SET k x GET"):
            assert (request, await client.call(request)) == (request, refused)
        assert await client.call([b"VADD", b"a", b"x", vector(1)]) == refused
        assert await client.call("SET k") == b"-ERR wrong number of arguments for 'set' command\r\n"
        await client.send("GET k", "SET k w", "GET k", "DBSIZE")
        assert await client.arrived() == b"$1\r\nv\r\n" + refused + b"$1\r\nv\r\n:2\r\n"
        assert journal.records == before
        journal.make_room()
        assert await client.call("SET k w") == OK
        assert await client.call("GET k") == b"$1\r\nw\r\n"


async def test_a_lapsed_key_reads_as_gone_without_room_to_delete_it(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.call("SET k v PX 5")
        house.clock.time += 5
        journal.room, journal.refusal = False, NO_SPACE
        assert await client.call("GET k") == b"$-1\r\n"
        assert await client.call("KEYS *") == b"*0\r\n"
        assert len(journal.records) == 1
        journal.make_room()
        assert await client.call("GET k") == b"$-1\r\n"
        assert journal.records[1:] == [(2, DeleteKeys((b"k",)))]


class ScarceJournal(ManualJournal):
    """A log with `space` bytes left, which never grow."""

    def __init__(self) -> None:
        super().__init__(automatic=True)
        self.space = 1 << 30
        self.refusal = NO_SPACE

    def has_room(self, size: int) -> bool:
        return size <= self.space

    async def admit(self, size: int) -> None:
        if not self.has_room(size):
            raise LogFullError(self.refusal)

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        super().append(lsn, operation, payload)
        self.space -= len(payload)
        assert self.space >= 0, operation


@pytest.mark.parametrize("within", [False, True])
async def test_what_a_write_was_given_room_for_is_not_spent_on_lapsed_keys(
    open_house: OpenHouse, within: bool
) -> None:
    keys = [b"key:%d" % number for number in range(500)]
    journal = ScarceJournal()
    async with open_house(journal) as house:
        client = house.connect()
        for key in keys:
            await client.send([b"SET", key, b"", b"PX", b"100"])
        await client.arrived()
        request = [b"MSETNX", *(word for key in keys for word in (key, b"x"))]
        if within:
            await client.call("MULTI")
            assert await client.call(request) == b"+QUEUED\r\n"
        house.clock.time += 1000
        journal.space = log_room(COMMANDS[b"msetnx"], request) + 3 * RECORD_OVERHEAD
        done = await client.call("EXEC" if within else request)
        assert done.endswith(b":1\r\n")
        assert await client.call("GET key:7") == b"$1\r\nx\r\n"


async def test_random_keys_take_no_room_of_the_log(open_house: OpenHouse) -> None:
    journal = ScarceJournal()
    async with open_house(journal) as house:
        client = house.connect()
        for number in range(200):
            await client.send([b"SET", b"%d" % number + bytes(2000), b"", b"PX", b"100"])
        await client.arrived()
        house.clock.time += 1000
        journal.space = 8000
        assert await client.call("RANDOMKEY") == b"$-1\r\n"
        await client.send("MULTI", "SET a b", "RANDOMKEY")
        await client.arrived()
        assert await client.call("EXEC") == b"*2\r\n+OK\r\n$1\r\na\r\n"


async def test_nothing_has_room_in_the_log_beyond_what_it_was_made_for(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await client.send("SET a 1", "POST /")
        await wait_all_tasks_blocked()
        assert not house.database.covered
        client = house.connect()
        await client.send("WATCH w", "MULTI", "SET a 1")
        await client.arrived()
        await other.call("SET w 1")
        journal.room = False
        await client.send("EXEC")
        await wait_all_tasks_blocked()
        journal.make_room()
        assert await client.reply() == b"*-1\r\n"
        assert not house.database.covered


async def test_a_write_waits_for_room_and_the_replies_before_it_do_not(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        journal.room = False
        await client.send("PING 1", "SET k v", "GET k")
        assert await client.arrived() == b"$1\r\n1\r\n"
        assert await other.call("GET k") == b"$-1\r\n"
        journal.make_room()
        assert await client.arrived() == b"+OK\r\n$1\r\nv\r\n"


async def test_the_log_is_asked_once_for_a_burst_with_room(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = ManualJournal(automatic=True)
    asked: list[int] = []

    def has_room(size: int) -> bool:
        asked.append(size)
        return True

    monkeypatch.setattr(journal, "has_room", has_room)
    async with open_house(journal) as house:
        client = house.connect()
        await client.send(*([b"SET", b"k", b"v" * 100] for _ in range(50)))
        assert await client.arrived() == OK * 50
        assert len(asked) == 1
        assert asked[0] > 50 * 100
        assert journal.admissions == 0


# What a client may make the server hold


async def test_a_client_that_pipelines_and_reads_late_gets_everything(open_house: OpenHouse) -> None:
    config = Config(client_output_buffer_limit=1 << 16)
    async with open_house(config=config) as house:
        client = house.connect(streams=lockstep_stream_pair(), reads=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, b"".join(map(encode_request, pings(5000, 100))))
            await wait_all_tasks_blocked()
            assert client.received == b""
            nursery.start_soon(client.read)
            expected = pongs(5000, 100)
            with trio.fail_after(PATIENCE):
                while len(client.received) < len(expected):
                    await wait_all_tasks_blocked()
            assert client.received == expected
            nursery.cancel_scope.cancel()


async def test_a_client_that_never_reads_is_dropped(open_house: OpenHouse, autojump_clock: MockClock) -> None:
    config = Config(client_output_buffer_limit=1 << 16, client_write_timeout=7)
    async with open_house(config=config) as house:
        client, other = house.connect(streams=lockstep_stream_pair(), reads=False), house.connect()
        held: list[int] = []
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                data = b"".join(map(encode_request, pings(20_000, 1000)))
                with pytest.raises(trio.BrokenResourceError):
                    await client.stream.send_all(data)

            nursery.start_soon(flood)
            await wait_all_tasks_blocked()
            session = house.server.sessions[1]
            held.append(sum(session.buffered()))
            assert await other.call("PING") == PONG
        assert held[0] < 1_000_000
        assert 7 <= trio.current_time() - began < 8
        assert list(house.server.sessions) == [2]


async def test_a_client_below_the_limit_may_read_whenever_it_likes(
    open_house: OpenHouse, autojump_clock: MockClock
) -> None:
    async with open_house() as house:
        client = house.connect(streams=lockstep_stream_pair(), reads=False)
        await client.send("PING 1", "PING 2")
        await trio.sleep(10_000)
        house.nursery.start_soon(client.read)
        assert await client.reply() == b"$1\r\n1\r\n"
        assert await client.reply() == b"$1\r\n2\r\n"


async def test_requests_are_left_unread_while_many_replies_wait_for_the_log(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client = house.connect(streams=lockstep_stream_pair())
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                for _ in range(3000):
                    await client.send("SET k v")

            nursery.start_soon(flood)
            await wait_all_tasks_blocked()
            stopped_at = len(journal.records)
            assert 0 < stopped_at < 1500
            with trio.fail_after(PATIENCE):
                while len(client.received) < 3000 * len(OK):
                    journal.release()
                    await wait_all_tasks_blocked()
        assert client.received == OK * 3000


# Shutting down


async def test_finish_lets_the_replies_out_and_takes_no_more_requests(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal) as house:
        client, idle = house.connect(), house.connect()
        await client.send("SET k v")
        await wait_all_tasks_blocked()
        for connection in house.connections:
            connection.finish()
        assert await idle.ended() == b""
        await client.send("SET k w")
        assert await client.arrived() == b""
        journal.release()
        assert await client.ended() == OK
        assert house.engine.keyspace.values == {b"k": b"v"}


async def test_finish_waits_no_longer_than_it_may(open_house: OpenHouse, autojump_clock: MockClock) -> None:
    async with open_house(ManualJournal(), config=Config(shutdown_timeout=3)) as house:
        client = house.connect()
        await client.send("SET k v")
        await wait_all_tasks_blocked()
        began = trio.current_time()
        house.connections[0].finish()
        assert await client.ended() == b""
        assert trio.current_time() - began == pytest.approx(3)


async def test_finish_frees_a_client_that_waits_for_room(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        journal.room = False
        await client.send("PING", "SET k v")
        await wait_all_tasks_blocked()
        house.connections[0].finish()
        assert await client.ended() == PONG
        assert journal.records == []


# What is counted


async def test_calls_are_counted_by_command(house: House) -> None:
    client = house.connect()
    await client.send("SET a 1", "SET b 1", "GET a", "SET c 1", "INCR x y", "LLEN", "CLIENT ID", "GETEX")
    await client.send("SET a x", "INCR a")
    await client.arrived()
    usage = house.server.statistics.usage
    counts = {name: (each.calls, each.rejected, each.failed) for name, each in usage.items()}
    assert counts == {
        "set": (4, 0, 0),
        "get": (1, 0, 0),
        "incr": (1, 1, 1),
        "client|id": (1, 0, 0),
        "getex": (0, 1, 0),
    }
    assert house.server.statistics.errors == {"ERR": 4}
    assert all(each.nanoseconds > 0 for each in usage.values() if each.calls)


async def test_a_search_is_counted_when_it_is_answered(open_house: OpenHouse) -> None:
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        client = house.connect()
        await client.send("VNEW i 1", [b"VADD", b"i", b"x", vector(1)], [b"VSEARCH", b"i", vector(1), b"1"])
        await client.arrived()
        usage = house.server.statistics.usage
        assert usage["vsearch"].calls == 0
        searches.held[0]([SearchResult([b"x"], [b"0"])])
        await client.arrived()
        assert usage["vsearch"].calls == 1


async def test_slow_calls_are_kept(open_house: OpenHouse) -> None:
    async with open_house(config=Config(slowlog_log_slower_than=0)) as house:
        client = house.connect()
        await client.send("SET a 1", "GET a", "MULTI", "EXEC")
        await client.arrived()
        assert [call.arguments for call in house.server.slowlog] == [
            [b"MULTI"],
            [b"GET", b"a"],
            [b"SET", b"a", b"1"],
        ]
        house.server.config.slowlog_log_slower_than = -1
        await client.call("PING")
        assert len(house.server.slowlog) == 3


# Who has yet to authenticate


async def test_nothing_is_answered_before_authentication(open_house: OpenHouse) -> None:
    async with open_house() as house:
        await house.connect().call("ACL SETUSER default resetpass >secret")
        client = house.connect()
        refused = b"-NOAUTH Authentication required.\r\n"
        await client.send("GET a", "PING", "AUTH wrong", "NOSUCH", "AUTH secret", "PING", "RESET", "PING")
        assert await client.arrived() == (
            2 * refused
            + b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
            + b"-ERR unknown command 'NOSUCH'\r\n"
            + OK
            + PONG
            + b"+RESET\r\n"
            + refused
        )


async def test_large_requests_wait_for_authentication(open_house: OpenHouse) -> None:
    async with open_house() as house:
        await house.connect().call("ACL SETUSER default resetpass >secret")
        large = [b"SET", b"a", b"x" * 20_000]
        client, other, third = house.connect(), house.connect(), house.connect()
        await client.send("AUTH secret", large, "PING", "STRLEN a")
        assert await client.arrived() == 2 * OK + PONG + b":20000\r\n"
        await other.send("PING", large)
        assert await other.ended() == (
            b"-NOAUTH Authentication required.\r\n-ERR Protocol error: unauthenticated bulk length\r\n"
        )
        await third.send([b"DEL"] + 10 * [b"a"])
        assert await third.ended() == b"-ERR Protocol error: unauthenticated multibulk length\r\n"


@pytest.mark.parametrize("line", [b"POST / HTTP/1.1\r\n", b"Host: localhost\r\n"])
async def test_http_gets_no_answer(house: House, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    client = house.connect()
    await client.stream.send_all(line + b"SET a 1\r\n")
    assert await client.ended() == b""
    assert "as in HTTP" in caplog.text
    assert await house.connect().call("EXISTS a") == b":0\r\n"


class Counted(list[list[bytes]]):
    """Counts how many of its items are looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[list[bytes]]:
        for item in super().__iter__():
            self.looked_at += 1
            yield item

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.looked_at += len(found) if isinstance(place, slice) else 1
        return found


@pytest.mark.parametrize(
    "words",
    [
        ["GET a", "SET a 1"],
        ["SET a 1", "SET a 2", "GET a", "GET a"],
        ["INCR text"],
        ["INCR n"],
        ["INCR n"] * 300 + ["INCR text"] * 300,
    ],
)
async def test_each_request_of_a_burst_is_looked_at_a_few_times(
    house: House, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = house.connect()
    await client.call("SET text hello")
    [connection] = house.connections
    feed = connection._parser.feed
    bursts: list[Counted] = []

    def counted(data: bytes) -> list[list[bytes]]:
        bursts.append(Counted(feed(data)))
        return bursts[-1]

    monkeypatch.setattr(connection._parser, "feed", counted)
    await client.send(*words * (1800 // len(words)))
    await client.arrived()
    assert sum(map(len, bursts)) == 1800
    assert sum(burst.looked_at for burst in bursts) <= 6 * 1800


# What a client leaves behind


@contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


Remains = list[weakref.ref[Any]]
"""What there was for clients."""


async def see_off(house: House, *clients: Client) -> Remains:
    """Has all clients leave."""
    remains: Remains = []
    for connection in house.connections:
        parts = (connection, connection.session, connection._outbox, connection._transport)
        remains += map(weakref.ref, parts)
    house.connections.clear()
    for client in clients:
        await client.stream.aclose()
    with trio.fail_after(PATIENCE):
        while house.server.sessions:
            await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    return remains


def alive(remains: Remains) -> list[str]:
    return [type(found).__name__ for reference in remains if (found := reference()) is not None]


SEARCH = [b"VSEARCH", b"a", vector(1), b"1"]


@pytest.mark.parametrize("by_socket", [True, False])
@pytest.mark.parametrize(
    "requests",
    [
        [],
        ["PING", "SET k v", "GET k"],
        ["NOSUCH", "GET", "VDELBY k FILTER .n"],
        [SEARCH, SEARCH],
        ["MULTI", "SET k v", "GET k", SEARCH, "EXEC"],
        ["MULTI", "SET k v", "NOSUCH"],
        ["MULTI", *10_000 * ["INCR n"], "EXEC"],
        ["WATCH k a", "MULTI", "GET k"],
        [[b"VDELBY", b"a", b"FILTER", b".n > 5"], "KEYS *"],
        ["DEL " + " ".join(map(str, range(5000)))],
        ["HELLO 3", "CLIENT SETNAME x", "SELECT 3", "MONITOR", "RESET"],
        ["CLIENT REPLY SKIP", "PING", "MONITOR"],
        ["QUIT"],
    ],
    ids=lambda requests: str(requests)[:40],
)
async def test_a_client_that_has_left_is_freed_without_the_collector(
    house: House, requests: Sequence[str | list[bytes]], by_socket: bool
) -> None:
    connect = house.connect_by_socket if by_socket else house.connect
    first = connect()
    await first.call("VNEW a 1")
    await first.call([b"VADD", b"a", b"x", vector(1)])
    with without_collector():
        clients = [connect() for _ in range(3)]
        for client in clients:
            await client.send(*requests)
            await client.arrived()
        del client
        assert alive(await see_off(house, first, *clients)) == []


@pytest.mark.parametrize("by_socket", [True, False])
async def test_a_client_that_violates_the_protocol_is_freed_without_the_collector(
    house: House, by_socket: bool
) -> None:
    with without_collector():
        client = (house.connect_by_socket if by_socket else house.connect)()
        await client.stream.send_all(b"GET 'x\r\n")
        assert b"unbalanced quotes" in await client.arrived()
        assert alive(await see_off(house, client)) == []


async def test_a_client_that_has_not_waited_is_freed_without_the_collector(open_house: OpenHouse) -> None:
    """It leaves while a reply waits for a search, requests behind a barrier, or a request for a pause."""
    searches = HeldSearches()
    async with open_house(searches=searches) as house:
        first = house.connect()
        await first.call("VNEW a 1")
        await first.call([b"VADD", b"a", b"x", vector(1)])
        with without_collector():
            client, paused = house.connect(), house.connect()
            await client.send(SEARCH, "PING", [b"VDELBY", b"a", b"FILTER", b".n"], *pings(3000))
            await first.call("CLIENT PAUSE 100000")
            await paused.send("SET k v")
            await wait_all_tasks_blocked()
            for connection in house.connections:
                connection.finish()
            del connection
            remains = await see_off(house, first, client, paused)
            # A search that nobody waits for still knows for whom it was.
            for held in (searches.held, searches.work, searches.wanted):
                held.clear()
            assert alive(remains) == []


async def test_a_client_that_reads_nothing_is_freed_without_the_collector(house: House) -> None:
    with without_collector():
        near, far = lockstep_stream_pair()
        client = house.connect(streams=(near, far), reads=False)
        await client.send([b"ECHO", bytes(1 << 20)], *pings(100))
        await wait_all_tasks_blocked()
        assert alive(await see_off(house, client)) == []
