from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram.commands.guard import Gate, Guard
from engram.commands.registry import TABLE
from engram.commands.session import Session
from engram.commands.table import Command
from engram.errors import CommandError
from tests.conftest import House, ManualJournal, OpenHouse

QUEUED = b"+QUEUED\r\n"


@pytest.fixture
def journal() -> ManualJournal:
    return ManualJournal(automatic=True)


@pytest.fixture
async def house(open_house: OpenHouse, journal: ManualJournal) -> AsyncIterator[House]:
    """A house with a log."""
    async with open_house(journal) as opened:
        yield opened


@pytest.fixture
async def session(house: House) -> Session:
    house.connect()
    return house.connections[0].session


@pytest.fixture
def guard(session: Session) -> Guard:
    return Guard(session)


def request(text: str) -> tuple[Command, list[bytes]]:
    words = text.encode().split()
    return TABLE.find(words), words


def stands_open(guard: Guard, text: str) -> bool:
    command, _ = request(text)
    handler = guard.begin(command)
    assert handler in (None, command.handler)
    return handler is not None


async def test_most_requests_pass(guard: Guard) -> None:
    for text in ("SET a 1", "GET a", "PING", "MULTI", "CLIENT LIST"):
        assert stands_open(guard, text)


def test_a_gate_lets_all_through() -> None:
    command, words = request("SET a 1")
    assert Gate().begin(command) is command.handler
    assert Gate().admit(command, words) is None


async def test_a_client_has_to_authenticate(house: House, session: Session, guard: Guard) -> None:
    other = house.connect()
    await other.call("ACL SETUSER default resetpass >secret")
    session.reset()
    assert not stands_open(guard, "GET a")
    with pytest.raises(CommandError, match=r"^NOAUTH "):
        guard.admit(*request("GET a"))
    assert session.last_command == "get"
    assert guard.admit(*request("AUTH secret")) is None


async def test_a_user_may_not_do_everything(house: House, session: Session, guard: Guard) -> None:
    house.server.access.put(b"default", house.server.access.changed(b"default", [b"-set"]))
    house.server.review_sessions()
    assert not stands_open(guard, "SET a 1")
    with pytest.raises(CommandError, match=r"^NOPERM "):
        guard.admit(*request("SET a 1"))
    assert guard.admit(*request("GET a")) is None


async def test_rights_to_many_keys_are_looked_at_in_turns(
    house: House, session: Session, guard: Guard
) -> None:
    def change(*rules: bytes) -> None:
        house.server.access.put(b"default", house.server.access.changed(b"default", rules))
        house.server.review_sessions()

    change(b"resetkeys", b"~a*", b"~*b*")
    mget = request("MGET " + " ".join(f"a{number}" for number in range(3000)))
    wait = guard.admit(*mget)
    assert callable(wait)
    await wait()
    assert guard.admit(*mget) is None
    change(b"resetkeys", b"~b*")
    with pytest.raises(CommandError, match=r"^NOPERM "):
        guard.admit(*mget)
    change(b"~a*")
    wait = guard.admit(*mget)
    assert callable(wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.lowlevel.checkpoint()
        change(b"resetkeys", b"~b*")
    with pytest.raises(CommandError, match=r"^NOPERM "):
        guard.admit(*mget)
    client = house.connect()
    change(b"~a*")
    assert await client.call([b"MGET", *mget[1][1:], b"x"]) == b"-NOPERM No permissions to access a key\r\n"
    assert (await client.call(mget[1])).startswith(b"*3000\r\n")
    assert await client.call("ACL LOG RESET") == b"+OK\r\n"


async def test_a_client_that_monitors_keeps_off_the_data(
    house: House, session: Session, guard: Guard
) -> None:
    assert stands_open(guard, "GET a")
    session.monitor()
    assert not stands_open(guard, "GET a")
    with pytest.raises(CommandError, match="Replica can't interact"):
        guard.admit(*request("GET a"))
    assert guard.admit(*request("PING")) is None


async def test_requests_are_shown_and_those_of_exec_by_itself(house: House, guard: Guard) -> None:
    watching = house.connect()
    await watching.call("MONITOR")
    house.connections[0].session.begin()
    # EXEC is shown after what it carries out.
    assert guard.admit(*request("EXEC")) is None
    assert await watching.arrived() == b""
    house.connections[0].session.discard()
    assert guard.admit(*request("EXEC")) is None
    assert b'"EXEC"' in await watching.arrived()


async def test_commands_are_queued(session: Session, guard: Guard) -> None:
    session.begin()
    assert session.transaction is not None
    assert not stands_open(guard, "SET a 1")
    assert guard.admit(*request("SET a 1")) == QUEUED
    assert guard.admit(*request("GET a")) == QUEUED
    assert list(session.transaction.commands) == [[b"SET", b"a", b"1"], [b"GET", b"a"]]
    assert session.transaction.writes
    for text in ("EXEC", "DISCARD", "WATCH a", "RESET", "QUIT", "MULTI"):
        assert guard.admit(*request(text)) is None
    with pytest.raises(CommandError, match="not allowed inside a transaction"):
        guard.admit(*request("SHUTDOWN"))
    # EXEC will carry out none: nothing need be kept.
    session.refuse()
    assert guard.admit(*request("SET b 1")) == QUEUED
    assert len(session.transaction.commands) == 2


async def test_a_pause_holds_requests(house: House, session: Session, guard: Guard) -> None:
    house.server.pause.start(1000, everything=False)
    assert guard.admit(*request("GET a")) is None
    wait = guard.admit(*request("SET a 1"))
    assert callable(wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert session.blocked
        house.server.pause.end()
    assert not session.blocked
    guard.admitted = None
    assert stands_open(guard, "SET a 1")


async def test_a_transaction_of_another_client_holds_requests(house: House, guard: Guard) -> None:
    house.server.exclusion.begin()
    assert guard.admit(*request("PING")) is None
    wait = guard.admit(*request("GET a"))
    assert callable(wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        house.server.exclusion.end()
    assert stands_open(guard, "GET a")


async def test_memory_is_limited(house: House, guard: Guard) -> None:
    client = house.connect()
    await client.call([b"SET", b"a", bytes(1000)])
    house.server.config.maxmemory = 1
    house.server.reconsider()
    assert not stands_open(guard, "SET a 1")
    with pytest.raises(CommandError, match=r"^OOM "):
        guard.admit(*request("SET a 1"))
    assert guard.admit(*request("DEL a")) is None


async def test_the_log_is_looked_at_once(house: House, guard: Guard, journal: ManualJournal) -> None:
    assert stands_open(guard, "GET a")
    assert house.database.covered
    journal.room = False
    assert stands_open(guard, "SET a 1")
    guard.admitted = None
    assert stands_open(guard, "GET a")
    assert not house.database.covered
    assert not stands_open(guard, "SET a 1")
    assert house.database.covered


async def test_a_command_that_logs_more_is_looked_at_by_itself(guard: Guard) -> None:
    assert not stands_open(guard, "INCRBYFLOAT a 1")
    assert guard.admit(*request("INCRBYFLOAT a 1")) is None
    assert not stands_open(guard, "SET a 1")


async def test_a_write_waits_for_room_and_is_let_through_once(guard: Guard, journal: ManualJournal) -> None:
    journal.room = False
    guard.admitted = None
    wait = guard.admit(*request("SET a 1"))
    assert callable(wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        journal.make_room()
    journal.room = False
    assert not stands_open(guard, "SET a 1")
    assert guard.admit(*request("SET a 1")) is None
    assert callable(guard.admit(*request("SET a 1")))


async def test_a_write_is_refused_that_waited(session: Session, guard: Guard, journal: ManualJournal) -> None:
    journal.room, journal.refusal = False, "MISCONF no space"
    guard.admitted = None
    wait = guard.admit(*request("SET a 1"))
    assert callable(wait)
    with pytest.raises(CommandError, match="MISCONF"):
        await wait()
    journal.room = True
    guard.admitted = None
    assert stands_open(guard, "SET a 1")


async def test_a_user_restricted_while_its_write_waits(
    house: House, guard: Guard, journal: ManualJournal
) -> None:
    journal.room = False
    guard.admitted = None
    wait = guard.admit(*request("SET a 1"))
    assert callable(wait)

    async def restrict() -> None:
        await wait_all_tasks_blocked()
        house.server.access.put(b"default", house.server.access.changed(b"default", [b"-set"]))
        house.server.review_sessions()
        journal.make_room()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(restrict)
        with pytest.raises(CommandError, match=r"^NOPERM "):
            await wait()
