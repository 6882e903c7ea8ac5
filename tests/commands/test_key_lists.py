"""Lists of all keys, and other replies that take work in proportion to what there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram.commands.long_work import ELEMENTS_A_TURN
from engram.index.service import SearchService
from tests.commands.conftest import add, bulks, parse
from tests.conftest import Client, House, vector

KEYS = 20 * ELEMENTS_A_TURN + 1


@pytest.fixture
async def full(house: House) -> Client:
    """A client of a house with many keys, some of which lapse in 10 ms, and an index among them."""
    client = house.connect()
    for start in range(0, KEYS, ELEMENTS_A_TURN):
        pairs = [
            word for n in range(start, min(start + ELEMENTS_A_TURN, KEYS)) for word in (b"k%d" % n, b"v")
        ]
        await client.call([b"MSET", *pairs])
    for number in range(0, KEYS, 1000):
        await client.call(f"PEXPIRE k{number} 10")
    await client.call("VNEW index 1")
    return client


async def turns_during(house: House, client: Client, request: str) -> tuple[bytes, int]:
    """The reply to a request, and how many turns another task had while the server was at it."""
    turns = 0
    answered = False

    async def take_turns() -> None:
        nonlocal turns
        while not answered:
            turns += 1
            await trio.lowlevel.checkpoint()

    await client.send(request)
    session = next(iter(house.server.sessions.values()))
    while not session.awaiting():
        await trio.lowlevel.checkpoint()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        while session.awaiting():
            await trio.lowlevel.checkpoint()
        answered = True
    return await client.reply(), turns


@attrs.define
class Held:
    """Long reads that begin when they are let go."""

    service: SearchService
    begin: list[Callable[[], None]] = attrs.field(factory=list)

    def submit_read(self, *arguments: Any) -> None:
        self.begin.append(partial(SearchService.submit_read, self.service, *arguments))

    async def wait(self) -> None:
        with trio.fail_after(60):
            while not self.begin:
                await trio.lowlevel.checkpoint()

    def let_go(self) -> None:
        for begin in self.begin:
            begin()
        self.begin.clear()


@pytest.fixture
def held(house: House, monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held(house.server.searches)
    monkeypatch.setattr(held.service, "submit_read", held.submit_read)
    return held


@pytest.mark.parametrize(
    ("request_", "count"), [("KEYS *", KEYS + 1), ("KEYS k*7", KEYS // 10), ("KEYS nothing", 0)]
)
async def test_many_keys_are_listed_in_a_thread(
    house: House, full: Client, held: Held, request_: str, count: int
) -> None:
    await full.send(request_, "GET k1")
    await held.wait()
    other = house.connect()
    assert await other.call("GET k1") == b"$1\r\nv\r\n"
    held.let_go()
    assert len(parse(await full.reply())) == count
    assert await full.reply() == b"$1\r\nv\r\n"
    assert house.server.held_replies.reserved == 0


async def test_many_indices_are_listed_in_a_thread(house: House, held: Held) -> None:
    client = house.connect()
    names = [f"i{number}" for number in range(ELEMENTS_A_TURN + 10)]
    for name in names:
        await client.call(f"VNEW {name} 1")
    await client.call("SET string 1")
    await client.send("DEL i7", "PEXPIRE i8 10", "RENAME i9 nine", "MOVE i10 3", "COPY string copy", "VLIST")
    await held.wait()
    other = house.connect()
    await other.send("VNEW late 1", "DEL i1")
    assert await other.arrived() == b"+OK\r\n:1\r\n"
    house.clock.time += 10
    held.let_go()
    *_, found = [await client.reply() for _ in range(6)]
    assert sorted(parse(found)) == sorted(name.encode() for name in {*names, "nine"} - {"i7", "i9", "i10"})
    await client.send("VLIST")
    await held.wait()
    held.let_go()
    again = parse(await client.reply())
    assert set(parse(found)) - set(again) == {b"i1", b"i8"}


async def test_keys_are_those_of_one_moment(house: House, full: Client, held: Held) -> None:
    """What lapses or changes while they are looked through makes no difference."""
    other = house.connect()
    await full.send("SET first 1", "DEL k5 k6", "SET k6 1", "KEYS *")
    await held.wait()
    house.clock.time += 10
    await other.send("SET new 1", "DEL k1 k2", "SET k5 1", "RENAME k3 renamed", "SWAPDB 0 1", "FLUSHALL")
    await other.arrived()
    held.let_go()
    *_, found = [await full.reply() for _ in range(4)]
    keys = parse(found)
    assert set(keys) == {b"index", b"first", *(b"k%d" % number for number in range(KEYS))} - {b"k5"}
    assert len(keys) == KEYS + 1


async def test_keys_that_have_lapsed_are_left_out(house: House, full: Client) -> None:
    house.clock.time += 10
    lapsed = {b"k%d" % number for number in range(0, KEYS, 1000)}
    keys = parse(await full.call("KEYS *"))
    assert set(keys) == {b"index", *(b"k%d" % number for number in range(KEYS))} - lapsed
    await full.call("PEXPIRE index 10")
    house.clock.time += 10
    assert await full.call("VLIST") == b"*0\r\n"


async def test_in_a_transaction_keys_are_those_of_their_place(house: House, full: Client) -> None:
    await full.send("MULTI", "KEYS index", "SET new 1", "KEYS new", "VLIST", "DEL new index", "EXEC")
    replies = [await full.reply() for _ in range(7)]
    assert parse(replies[-1]) == [[b"index"], b"OK", [b"new"], [b"index"], 2]


async def test_views_of_all_keys_in_a_transaction_are_bounded(house: House, full: Client) -> None:
    """Each is held until all is carried out."""
    await full.call([b"DEL", *(b"k%d" % number for number in range(2000))])
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 20
    await full.send("MULTI", *["KEYS nothing"] * 30, "SET a 1", "EXEC")
    *_, last = [await full.reply() for _ in range(33)]
    *found, done = parse(last)
    made = found.count([])
    assert 4 < made < 20
    assert found[:made] == [[]] * made
    assert all(str(each).startswith("ERR the reply would take ") for each in found[made:])
    assert done == b"OK"
    assert house.server.held_replies.reserved == 0


async def test_what_is_held_for_lists_that_wait_is_bounded(house: House, full: Client, held: Held) -> None:
    """Each has the places of all keys, and of those that are deleted."""
    await full.call([b"DEL", *(b"k%d" % number for number in range(2000))])
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 20
    config.output_buffer_total_limit = 1 << 20
    requests = 100
    clients = [house.connect() for _ in range(requests)]
    for client in clients:
        await client.send("KEYS nothing", "PING")
    await wait_all_tasks_blocked()
    waiting = len(held.begin)
    assert 4 < waiting < 30
    assert house.server.held_replies.reserved <= 1 << 20
    held.let_go()
    found = [await client.reply() for client in clients]
    assert found.count(b"*0\r\n") == waiting
    refused = {each.split(b" ")[6] for each in found if each != b"*0\r\n"}
    assert refused == {b"all"}
    assert house.server.held_replies.reserved == 0


async def test_a_reply_of_keys_that_would_be_too_long_is_refused(house: House, full: Client) -> None:
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 16
    for request in ("KEYS *", "KEYS k*"):
        assert (await full.call(request)).startswith(b"-ERR the reply would take ")
    assert await full.call("KEYS k77") == bulks("k77")


# Names that are repeated


async def test_what_is_said_of_a_command_is_said_as_often_as_it_is_named(house: House) -> None:
    client = house.connect()
    for request in ("COMMAND DOCS", "COMMAND INFO"):
        once = await client.call(f"{request} get")
        many = await client.call([*request.encode().split(), *[b"get"] * 3, b"nothing", b"GET"])
        assert many.count(once.split(b"\r\n", 1)[1]) == 4


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ("COMMAND DOCS", "client"),
        ("COMMAND INFO", "client"),
        ("CLIENT LIST ID", "1"),
    ],
)
async def test_repeated_names_make_no_reply_that_no_memory_holds(
    house: House, request_: str, name: str
) -> None:
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 20
    client = house.connect()
    words = request_.encode().split()
    size = len(await client.call([*words, *[name.encode()] * 100])) // 100
    refused = await client.call([*words, *[name.encode()] * ((1 << 20) // size + 2)])
    assert refused.startswith(b"-ERR the reply would take ")
    assert not (await client.call([*words, *[name.encode()] * ((1 << 20) // size - 20)])).startswith(b"-")


@pytest.mark.parametrize(
    ("request_", "called"),
    [
        ("COMMAND DOCS client", "engram.commands.introspection.command_docs"),
        ("COMMAND INFO client", "engram.commands.introspection.command_info"),
        ("CLIENT LIST ID 1", "engram.commands.client.describe"),
        ("LATENCY HISTOGRAM ping", "engram.commands.monitoring._histogram"),
        ("CONFIG GET max*", "engram.commands.configuration._find"),
        ("INFO server", "engram.commands.information._server"),
    ],
)
async def test_the_same_is_made_once(
    house: House, monkeypatch: pytest.MonkeyPatch, request_: str, called: str
) -> None:
    """However often it is asked for in one request."""
    client = house.connect()
    await client.call("PING")
    *words, name = request_.encode().split()
    once = await counted(client, monkeypatch, called, [*words, name])
    assert await counted(client, monkeypatch, called, [*words, *[name] * 50]) <= once
    assert once or called.startswith("engram.commands.in")


async def counted(client: Client, monkeypatch: pytest.MonkeyPatch, called: str, words: list[bytes]) -> int:
    """How often a function is called to answer a request."""
    module, _, name = called.rpartition(".")
    original: Callable[..., object] = getattr(__import__(module, fromlist=[name]), name)
    calls = 0

    def count(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(called, count)
        assert not (await client.call(words)).startswith(b"-")
    return calls


async def test_many_patterns_of_settings_let_others_have_turns(house: House) -> None:
    client = house.connect()
    patterns = [f"{n}*x{n}" for n in range(200)]
    reply, turns = await turns_during(house, client, " ".join(["CONFIG GET port", *patterns]))
    assert parse(reply) == [b"port", b"6380"]
    assert turns >= 100


async def test_a_few_keys_are_looked_at_at_once(house: House) -> None:
    client = house.connect()
    await client.call("MSET a 1 b 2")
    await client.call("VNEW i 1")
    await add(client, "i", "x", 1)
    await client.send("KEYS a*", "SET aa 1", "KEYS a*", "VLIST")
    assert await client.arrived() == bulks("a") + b"+OK\r\n" + bulks("a", "aa") + bulks("i")


@pytest.mark.parametrize("scan", ["SCAN", "VSCAN index"])
async def test_a_page_of_a_scan_is_bounded(house: House, full: Client, scan: str) -> None:
    """However much is asked for, and all of it is there in the end."""
    if scan != "SCAN":
        rows = [word for n in range(KEYS) for word in (b"k%d" % n, vector(n))]
        await full.call([b"VMADD", b"index", *rows])
    cursor, found = b"0", []
    while True:
        cursor, keys = parse(await full.call(f"{scan} {cursor.decode()} COUNT 1000000000"))
        assert len(keys) <= 1 << 14
        found += keys
        if cursor == b"0":
            break
    assert set(found) | {b"index"} == {b"index", *(b"k%d" % number for number in range(KEYS))}
    house.server.config.client_output_buffer_limit = house.server.config.proto_max_bulk_len = 1000
    assert (await full.call(f"{scan} 0 COUNT 1000")).startswith(b"-ERR the reply would take ")
    assert len(parse(await full.call(f"{scan} 0 COUNT 10"))[1]) == 10
