"""Replies that take work in proportion to what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram.commands import slices
from tests.commands.conftest import add, bulks, parse
from tests.conftest import Client, House, vector

KEYS = 10 * slices.SLICE + 1


@pytest.fixture
async def full(house: House) -> Client:
    """A client of a house with many keys, some of which lapse in 10 ms, and an index among them."""
    client = house.connect()
    for start in range(0, KEYS, slices.SLICE):
        pairs = [word for n in range(start, min(start + slices.SLICE, KEYS)) for word in (b"k%d" % n, b"v")]
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


@pytest.mark.parametrize(
    ("request_", "count"), [("KEYS *", KEYS + 1), ("KEYS k*7", KEYS // 10), ("KEYS nothing", 0), ("VLIST", 1)]
)
async def test_others_have_turns(house: House, full: Client, request_: str, count: int) -> None:
    reply, turns = await turns_during(house, full, request_)
    assert len(parse(reply)) == count
    assert turns >= 10


async def test_keys_are_those_of_one_moment(
    house: House, full: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lapses or changes while they are looked through makes no difference."""
    other = house.connect()
    looked = trio.Event()
    look = house.database.logical(0).live_keys_later

    def live_keys_later() -> Callable[[Sequence[bytes]], Sequence[bytes]]:
        looked.set()
        return look()

    monkeypatch.setattr(house.database.logical(0), "live_keys_later", live_keys_later)
    await full.send("KEYS *")
    await looked.wait()
    house.clock.time += 10
    await other.send("SET new 1", "DEL k1 k2", "RENAME k3 renamed", "FLUSHALL")
    keys = parse(await full.reply())
    assert set(keys) == {b"index", *(b"k%d" % number for number in range(KEYS))}
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
    config = house.server.config
    config.client_output_buffer_limit = config.proto_max_bulk_len = 1 << 20
    await full.send("MULTI", *["KEYS nothing"] * 10, "SET a 1", "EXEC")
    *_, last = [await full.reply() for _ in range(13)]
    *found, done = parse(last)
    assert found[:6] == [[]] * 6
    assert [str(each).startswith("ERR the reply would take ") for each in found[6:]] == [True] * 4
    assert done == b"OK"
    assert house.server.held_replies.reserved == 0


async def test_one_client_at_a_time_looks_at_all_keys(house: House, full: Client) -> None:
    """So that many together take no more memory, and no more of a turn, than one."""
    others = [house.connect() for _ in range(5)]
    async with house.server.slices_lock:
        for client in others:
            await client.send("KEYS new*")
        await wait_all_tasks_blocked()
        await full.call("SET new 1")
        assert house.server.slices_lock.statistics().tasks_waiting == 5
    # Each sees the keys as they are at its turn.
    assert {await client.reply() for client in others} == {bulks("new")}


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
