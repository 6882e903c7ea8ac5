from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.commands.conftest import Conversation, Converse
from tests.conftest import Client, House, ManualJournal, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "wait": (
        ("WAIT 0 0", b":0\r\n"),
        ("WAIT -1 0", b":0\r\n"),
        ("WAIT 1 10", b":0\r\n"),
        ("WAIT a 0", b"-ERR value is not an integer or out of range\r\n"),
        ("WAIT 0 a", b"-ERR timeout is not an integer or out of range\r\n"),
        ("WAIT 0 -1", b"-ERR timeout is negative\r\n"),
    ),
    "waitaof without a log": (
        ("WAITAOF 0 0 0", b"*2\r\n:0\r\n:0\r\n"),
        ("WAITAOF 0 1 10", b"*2\r\n:0\r\n:0\r\n"),
        (
            "WAITAOF 1 0 0",
            b"-ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.\r\n",
        ),
        ("WAITAOF 2 0 0", b"-ERR value is out of range, value must between 0 and 1\r\n"),
        ("WAITAOF -1 0 -1", b"-ERR value is out of range, value must between 0 and 1\r\n"),
        ("WAITAOF a 0 0", b"-ERR value is not an integer or out of range\r\n"),
        ("WAITAOF 0 a 0", b"-ERR value is out of range, must be positive\r\n"),
        ("WAITAOF 0 -1 0", b"-ERR value is out of range, must be positive\r\n"),
        ("WAITAOF 0 0 a", b"-ERR timeout is not an integer or out of range\r\n"),
        ("WAITAOF 0 0 -1", b"-ERR timeout is negative\r\n"),
        ("WAITAOF 0 0", b"-ERR wrong number of arguments for 'waitaof' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse, autojump_clock: trio.testing.MockClock) -> None:
    await converse(CONVERSATIONS[topic])


class EarlyJournal(ManualJournal):
    """A log whose replies do not wait until it is synced, as with `appendfsync everysec`."""

    def released(self, lsn: int) -> bool:
        return True

    def on_release(self, lsn: int, callback: Callable[[], None]) -> None:
        callback()


async def write(client: Client) -> None:
    assert await client.call("SET a 1") == b"+OK\r\n"


async def test_waitaof_answers_once_writes_are_synced(
    open_house: OpenHouse, autojump_clock: trio.testing.MockClock
) -> None:
    journal = EarlyJournal()
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await write(client)
        assert await client.call("WAITAOF 0 0 0") == b"*2\r\n:0\r\n:0\r\n"
        await client.send("WAITAOF 1 0 0", "PING")
        await trio.sleep(100)
        assert not client.received
        # It holds up nobody else.
        assert await other.call("PING") == b"+PONG\r\n"
        journal.release()
        assert await client.reply() == b"*2\r\n:1\r\n:0\r\n"
        assert await client.reply() == b"+PONG\r\n"
        assert await client.call("WAITAOF 1 0 0") == b"*2\r\n:1\r\n:0\r\n"


async def test_waitaof_ends_in_time(open_house: OpenHouse, autojump_clock: trio.testing.MockClock) -> None:
    async with open_house(journal=EarlyJournal()) as house:
        client = house.connect()
        await write(client)
        began = trio.current_time()
        assert await client.call("WAITAOF 1 0 1500") == b"*2\r\n:0\r\n:0\r\n"
        assert trio.current_time() - began == pytest.approx(1.5)


async def test_where_replies_wait_for_the_log_so_does_waitaof(open_house: OpenHouse) -> None:
    journal = ManualJournal()
    async with open_house(journal=journal) as house:
        client = house.connect()
        await client.send("SET a 1", "WAITAOF 1 0 0")
        assert await client.arrived() == b""
        journal.release()
        assert await client.arrived() == b"+OK\r\n*2\r\n:1\r\n:0\r\n"


@pytest.mark.parametrize(
    ("request_", "reason", "reply"),
    [
        ("WAIT 1 0", "", b":0\r\n"),
        ("WAITAOF 1 1 0", "TIMEOUT", b"*2\r\n:1\r\n:0\r\n"),
        ("WAIT 1 0", "ERROR", b"-UNBLOCKED client unblocked via CLIENT UNBLOCK\r\n"),
    ],
)
async def test_another_client_ends_it(
    open_house: OpenHouse, request_: str, reason: str, reply: bytes
) -> None:
    async with open_house(journal=ManualJournal(automatic=True)) as house:
        client, other = house.connect(), house.connect()
        await client.send(request_)
        assert await client.arrived() == b""
        assert b" flags=b " in await other.call("CLIENT LIST ID 1")
        assert await other.call(f"CLIENT UNBLOCK 1 {reason}") == b":1\r\n"
        assert await client.reply() == reply
        assert await other.call("CLIENT UNBLOCK 1") == b":0\r\n"
        assert b" flags=N " in await other.call("CLIENT LIST ID 1")


async def test_it_can_be_ended_before_the_client_s_task_runs(house: House) -> None:
    """Requests that come in the same round are carried out before any task is woken."""
    client, other = house.connect(), house.connect()
    await client.send("WAIT 1 0")
    await other.send("CLIENT UNBLOCK 1 ERROR", "CLIENT UNBLOCK 1")
    assert await client.reply() == b"-UNBLOCKED client unblocked via CLIENT UNBLOCK\r\n"
    assert await other.reply() == b":1\r\n"
    assert await other.reply() == b":0\r\n"


async def test_a_client_that_waits_can_be_killed(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.send("WAIT 1 0")
    assert await client.arrived() == b""
    assert await other.call("CLIENT KILL ID 1") == b":1\r\n"
    assert await client.ended() == b""


async def test_in_a_transaction_it_does_not_wait(house: House) -> None:
    client = house.connect()
    await client.send("MULTI", "WAIT 1 0", "WAITAOF 0 1 0", "EXEC")
    assert await client.arrived() == b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n:0\r\n*2\r\n:0\r\n:0\r\n"
