"""Commands that take long: others have turns meanwhile, and see all of what is done or nothing."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import attrs
import pytest
import trio

from engram.commands import long_work, matching
from engram.commands.allowance import Allowance, HeldReplies
from engram.commands.registry import COMMANDS
from engram.commands.session import Pieces
from engram.config import Config
from engram.errors import CommandError
from engram.index.filters import Filter
from engram.index.filters import filter as filter_module
from engram.large_string import LargeString
from engram.operations import DeleteKeys, DeleteVectors, SetStrings
from tests.conftest import Client, House, ManualJournal, OpenHouse, vector

KEYS = 10 * long_work.ELEMENTS_A_TURN + 7
NAMES = [b"k%d" % number for number in range(KEYS)]
PAIRS = [word for name in NAMES for word in (name, b"v")]
OK = b"+OK\r\n"


async def begun(house: House) -> None:
    """Returns once a command has had its first turn."""
    while not house.server.exclusion.active:
        await trio.lowlevel.checkpoint()


async def fill(client: Client) -> None:
    assert await client.call([b"MSET", *PAIRS]) == OK


@pytest.mark.parametrize(
    ("words", "reply", "after"),
    [
        ([b"EXISTS", *NAMES, b"none", b"k0"], b":%d\r\n" % (KEYS + 1), KEYS),
        ([b"TOUCH", *NAMES], b":%d\r\n" % KEYS, KEYS),
        ([b"MGET", *NAMES, b"none"], b"*%d\r\n" % (KEYS + 1) + b"$1\r\nv\r\n" * KEYS + b"$-1\r\n", KEYS),
        ([b"DEL", *NAMES, b"none", *NAMES], b":%d\r\n" % KEYS, 0),
        ([b"UNLINK", *NAMES[:-1]], b":%d\r\n" % (KEYS - 1), 1),
        ([b"MSET", *PAIRS, b"k0", b"w"], OK, KEYS),
        ([b"MSETNX", *[b"x" + word for word in PAIRS]], b":1\r\n", 2 * KEYS),
        ([b"MSETNX", *[b"x" + word for word in PAIRS], b"k7", b"v"], b":0\r\n", KEYS),
    ],
)
async def test_others_have_turns_beside_many_keys(
    house: House, words: list[bytes], reply: bytes, after: int
) -> None:
    client, other = house.connect(), house.connect()
    await fill(client)
    await client.send(words)
    await begun(house)
    pings = 0
    while house.server.exclusion.active:
        assert await other.call("PING") == b"+PONG\r\n"
        pings += 1
    assert pings
    assert await client.reply() == reply
    assert len(house.engine.keyspace) == after


@pytest.mark.parametrize(("words", "kind"), [([b"DEL", *NAMES], DeleteKeys), ([b"MSET", *PAIRS], SetStrings)])
async def test_many_keys_are_changed_as_one(open_house: OpenHouse, words: list[bytes], kind: type) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await fill(client)
        journal.together.clear()
        await client.send(words)
        await begun(house)
        await other.send([b"EXISTS", *NAMES[:5], *NAMES[-5:]])
        assert await other.reply() == (b":0\r\n" if kind is DeleteKeys else b":10\r\n")
        assert (await client.reply())[:1] in b":+"
        [operations] = journal.together
        assert {type(operation) for operation in operations} == {kind}


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        ([b"DEL", *NAMES], b":%d\r\n:0\r\n" % KEYS),
        ([b"MSET", *PAIRS], b"+OK\r\n:1\r\n"),
        ([b"MSETNX", *[b"x" + word for word in PAIRS], b"k0", b"v"], b":0\r\n:1\r\n"),
        ([b"MGET", *NAMES], b"*%d\r\n" % KEYS + b"$1\r\nv\r\n" * KEYS + b":1\r\n"),
        ([b"EXISTS", *NAMES], b":%d\r\n:1\r\n" % KEYS),
    ],
)
async def test_in_a_transaction_many_keys_have_their_place_and_turns(
    house: House, words: list[bytes], reply: bytes
) -> None:
    client, other = house.connect(), house.connect()
    await fill(client)
    await client.send("MULTI", "GET k1", words, "EXISTS k0")
    await client.arrived()
    await client.send("EXEC")
    await begun(house)
    await other.send("EXISTS k0")
    pings = 0
    while house.server.exclusion.active:
        assert await house.connect().call("PING") == b"+PONG\r\n"
        pings += 1
    assert pings
    assert await client.reply() == b"*3\r\n$1\r\nv\r\n" + reply
    # What was asked for meanwhile is answered by what there is afterwards.
    assert await other.reply() == reply[-4:]
    assert (house.server.held_replies.waiting, house.server.held_replies.reserved) == (0, 0)


async def test_what_fails_in_a_turn_of_a_transaction_fails_alone_where_it_only_reads(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = house.connect()
    await fill(client)
    await client.send("MULTI", "INCR a", [b"EXISTS", *NAMES], [b"MGET", *NAMES], "INCR a")
    await client.arrived()
    house.server.config.client_output_buffer_limit = house.server.config.proto_max_bulk_len = 3 * KEYS // 4

    class Failing(dict[bytes, Any]):
        def get(self, key: bytes, default: Any = None) -> Any:
            if key == NAMES[-1]:
                raise MemoryError
            return super().get(key, default)

    with monkeypatch.context() as patched:
        patched.setattr(house.engine.keyspace, "values", Failing(house.engine.keyspace.values))
        found = await client.call("EXEC")
    first, *failed, last, _ = found.split(b"\r\n")[1:]
    assert (first, last) == (b":1", b":2")
    assert failed[0].startswith(b"-OOM")
    assert failed[1].startswith(b"-ERR the reply would take ") or failed[1].startswith(b"-OOM")
    assert house.database.failure is None


async def test_what_fails_half_way_in_a_turn_of_a_transaction_ends_the_server(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client = house.connect()
        await fill(client)
        await client.send("MULTI", "SET a 1", [b"DEL", *NAMES], "SET b 1")
        await client.arrived()
        journal.together.clear()
        lookup = house.database.logical(0).lookup

        def fail(key: bytes) -> Any:
            if key == NAMES[long_work.ELEMENTS_A_TURN * 3]:
                raise MemoryError
            return lookup(key)

        monkeypatch.setattr(house.database.logical(0), "lookup", fail)
        await client.send("EXEC")
        assert await client.ended() == b""
        assert house.database.failure is not None
        assert journal.together == []


async def test_what_fails_half_way_through_many_keys_is_no_change_that_is_half_done(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client = house.connect()
        await fill(client)
        lsn = house.database.lsn
        journal.together.clear()
        lookup = house.database.logical(0).lookup

        def fail(key: bytes) -> Any:
            if key == NAMES[long_work.ELEMENTS_A_TURN * 3]:
                raise MemoryError
            return lookup(key)

        monkeypatch.setattr(house.database.logical(0), "lookup", fail)
        await client.send([b"DEL", *NAMES])
        assert await client.ended() == b""
        assert house.database.lsn > lsn
        assert house.database.failure is not None
        assert journal.together == []


async def test_what_fails_before_the_first_of_many_keys_is_changed_fails_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = house.connect()

    def fail(key: bytes) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(house.database.logical(0), "lookup", fail)
        assert (await client.call([b"MSETNX", *PAIRS])).startswith(b"-OOM")
    assert house.database.failure is None
    assert not house.server.exclusion.active
    assert await client.call([b"MSETNX", *PAIRS]) == b":1\r\n"


LONG = b"x" * (1 << 20)


@pytest.mark.parametrize(
    "words",
    [
        "GET long",
        "GETRANGE long 0 -1",
        "GETSET long y",
        "SET long y GET",
        "GETEX long",
        "GETDEL long",
        "MGET long long long",
    ],
)
@pytest.mark.parametrize("blocks", [False, True])
async def test_a_long_string_is_not_copied_into_a_reply(house: House, words: str, blocks: bool) -> None:
    client = house.connect()
    await client.call("PING")
    [session] = house.server.sessions.values()
    house.engine.keyspace.set(b"long", LargeString(LONG) if blocks else LONG)
    request = [word.encode() for word in words.split()]
    tracemalloc.start()
    try:
        reply = COMMANDS[request[0].lower()].handler(session, request)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(LONG) // 4
    assert isinstance(reply, Pieces)
    bulk = b"$%d\r\n%b\r\n" % (len(LONG), LONG)
    assert bytes(reply) == (b"*3\r\n" + 3 * bulk if words.startswith("MGET") else bulk)


async def test_long_strings_in_a_transaction_are_not_copied_into_its_reply(house: House) -> None:
    client = house.connect()
    house.engine.keyspace.set(b"long", LONG)
    await client.send("MULTI", "GET long", "PING", "MGET long none", "EXEC")
    replies = [await client.reply() for _ in range(5)]
    bulk = b"$%d\r\n%b\r\n" % (len(LONG), LONG)
    assert replies[-1] == b"*3\r\n" + bulk + b"+PONG\r\n*2\r\n" + bulk + b"$-1\r\n"
    assert (house.server.held_replies.waiting, house.server.held_replies.reserved) == (0, 0)


async def test_many_members_are_deleted_as_one_beside_others(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_DELETED_AT_ONCE", 10)
    journal = ManualJournal(automatic=True)
    async with open_house(journal=journal) as house:
        client, other = house.connect(), house.connect()
        await client.call("VNEW index 1")
        rows = [word for name in NAMES[:500] for word in (name, vector(1), b'{"a":1}')]
        assert await client.call([b"VMADD", b"index", *rows, b"ATTRS"]) == b":500\r\n"
        await client.call([b"VADD", b"index", b"other", vector(1)])
        await client.send([b"VDELBY", b"index", b"FILTER", b".a == 1"])
        await begun(house)
        assert await other.call("PING") == b"+PONG\r\n"
        await other.send("VCOUNT index")
        assert await other.reply() == b":1\r\n"
        assert await client.reply() == b":500\r\n"
        assert {type(operation) for operation in journal.together[-1]} == {DeleteVectors}


LONG_FILTER = b" or ".join(b".a == %d" % number for number in range(1000))


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        ([b"VSEARCH", b"index", vector(1), b"9", b"FILTER", LONG_FILTER], b"*2\r\n$1\r\nm\r\n$1\r\n0\r\n"),
        ([b"VMSEARCH", b"index", b"9", b"1", vector(1), b"filter", LONG_FILTER, b"EXACT"], b"*1\r\n*2\r\n"),
        ([b"VCOUNT", b"index", b"FILTER", LONG_FILTER], b":1\r\n"),
        ([b"VSEARCH", b"index", vector(1), b"0", b"FILTER", LONG_FILTER], b"*0\r\n"),
        ([b"VSEARCH", b"none", vector(1), b"9", b"FILTER", LONG_FILTER], b"-ERR no such index\r\n"),
        ([b"VSEARCH", b"none", vector(1), b"9", b"FILTER", LONG_FILTER + b"("], b"-ERR no such index\r\n"),
        ([b"VSEARCH", b"index", vector(1), b"9", b"FILTER", LONG_FILTER + b"("], b"-ERR syntax error in"),
        ([b"VCOUNT", b"index", b"FILTER", LONG_FILTER + b"("], b"-ERR syntax error in FILTER"),
        ([b"VDELBY", b"index", b"FILTER", LONG_FILTER + b"("], b"-ERR syntax error in FILTER"),
        ([b"VDELBY", b"index", b"FILTER", LONG_FILTER], b":1\r\n"),
    ],
)
async def test_a_long_filter_is_compiled_in_a_thread(
    house: House, words: list[bytes], reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling: list[int] = []
    compile_filter = filter_module._compile

    def compile_and_tell(expression: bytes) -> Filter:
        compiling.append(threading.get_ident())
        return compile_filter(expression)

    monkeypatch.setattr(filter_module, "_compile", compile_and_tell)
    client = house.connect()
    await client.call("VNEW index 1")
    await client.call([b"VMADD", b"index", b"m", vector(1), b'{"a":5}', b"n", vector(2), b"", b"ATTRS"])
    assert (await client.call(words)).startswith(reply)
    assert threading.get_ident() not in compiling
    assert len(compiling) == 1


async def test_in_a_transaction_a_long_filter_has_its_place(house: House) -> None:
    client = house.connect()
    await client.call("VNEW index 1")
    await client.call([b"VMADD", b"index", b"m", vector(1), b'{"a":5}', b"ATTRS"])
    count: list[bytes] = [b"VCOUNT", b"index", b"FILTER", LONG_FILTER]
    await client.send("MULTI", count, "VDEL index m", count, "EXEC")
    assert [await client.reply() for _ in range(5)][-1] == b"*3\r\n:1\r\n:1\r\n:0\r\n"


def test_threads_that_make_parts_of_a_reply_take_no_more_than_they_may() -> None:
    config = Config()
    held = HeldReplies(config)
    client = attrs.make_class("Client", {"reserved": attrs.field(default=0)})()
    client.buffered = lambda: (0, 0)
    interval = sys.getswitchinterval()
    for within in (None, held.allowance(client, most=1 << 30)):
        allowance = held.allowance(client, within, most=1 << 20)

        def take(allowance: Allowance = allowance) -> int:
            taken = 0
            with suppress(CommandError):
                while True:
                    allowance.take(7)
                    taken += 7
            return taken

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                taken = sum(pool.map(lambda _, take=take: take(), range(4)))
        finally:
            sys.setswitchinterval(interval)
        assert taken == allowance.taken == (1 << 20) // 7 * 7
        for each in (allowance, within):
            if each is not None:
                each.release()
        assert held.reserved == client.reserved == 0
