"""Requests for one command that come one after the other are carried out together, and nobody can tell."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import attrs
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from engram.commands import transactions
from engram.commands.registry import COMMANDS
from engram.commands.table import TURN_NANOSECONDS
from engram.engine import Engine
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.operations import SetString, SetStrings
from tests.conftest import START, House, ManualJournal, OpenHouse, opened_house, reply_length, vector

keys = st.sampled_from([b"a", b"b", b"lapsing", b"lapsed", b"text", b"index"])
words = st.sampled_from(
    [
        b"1",
        b"-7",
        b"007",
        b"x",
        b"",
        b"9223372036854775807",
        b"-9223372036854775808",
        b"GET",
        b"EX",
        b"100",
        b"NX",
    ]
)
requests = st.one_of(
    st.tuples(st.sampled_from([b"GET", b"INCR", b"DECR", b"incr"]), keys),
    st.tuples(st.sampled_from([b"SET", b"INCRBY", b"DECRBY"]), keys, words),
    st.tuples(st.sampled_from([b"SET", b"GET", b"INCR", b"INCRBY"]), keys, words, words),
    st.tuples(st.sampled_from([b"GET", b"SET", b"EXPIRE"]), keys, words),
)
bursts = st.lists(
    st.tuples(requests, st.integers(1, 4)).map(lambda repeated: [repeated[0]] * repeated[1])
    | st.lists(st.tuples(st.sampled_from([b"SET", b"INCRBY"]), keys, st.integers(-9, 9).map(b"%d".__mod__))),
    max_size=20,
).map(lambda parts: [list(request) for part in parts for request in part])


@asynccontextmanager
async def prepared_house(folder: Path, *, runs: bool) -> AsyncIterator[House]:
    async with opened_house(folder, journal=ManualJournal(automatic=True)) as house:
        client = house.connect()
        for request in ("SET text hello", "SET lapsing 5 EX 1000", "SET lapsed 5 PX 1", "VNEW index 2"):
            await client.call(request)
        for request in (
            "VNEW other 2",
            "VNEW fleeting 2",
            "PEXPIRE fleeting 1",
            "CONFIG SET max-key-length 9",
        ):
            await client.call(request)
        await client.call([b"VMADD", b"other", b"a", vector(1, 2), b'{"n":1}', b"ATTRS"])
        house.clock.time = START + 2
        if not runs:
            # Who watches is shown each request by itself.
            await house.connect().call("MONITOR")
        yield house


async def answered(house: House, burst: Sequence[list[bytes]]) -> list[bytes]:
    """The replies to requests that come together."""
    client = house.connect()
    await client.send(*burst)
    data = await client.arrived()
    found, start = [], 0
    while (end := reply_length(data, start)) is not None and start < len(data):
        found.append(data[start:end])
        start = end
    assert start == len(data)
    return found


@given(bursts, st.booleans(), st.sampled_from([TURN_NANOSECONDS, 0]))
@example([[b"GET", b"text"], [b"GET", b"index"], [b"GET", b"none"], [b"GET", b"text"]], False, 0)
@example([[b"GET", b"text"], [b"GET", b"index"], [b"GET", b"none"], [b"GET", b"text"]], True, 0)
@example([[b"INCRBY", b"a", b"9223372036854775807"]] * 2 + [[b"INCRBY", b"a", b"-1"]] * 2, False, 0)
@example([[b"INCRBY", b"a", b"9223372036854775807"]] * 2 + [[b"INCRBY", b"a", b"-1"]] * 2, True, 0)
@example([[b"DECRBY", b"a", b"-9223372036854775808"]] * 2 + [[b"DECR", b"a"]], False, 0)
@example([[b"DECRBY", b"a", b"-9223372036854775808"]] * 2 + [[b"DECR", b"a"]], True, 0)
@example([[b"INCR", b"a"], [b"INCR", b"index"], [b"INCR", b"text"], [b"INCR", b"a"]], False, 0)
@example([[b"INCR", b"a"], [b"INCR", b"index"], [b"INCR", b"text"], [b"INCR", b"a"]], True, 0)
def test_together_as_one_by_one(burst: list[list[bytes]], transaction: bool, turn: int) -> None:
    """Also where a transaction takes many turns."""
    compare(burst, transaction, turn)


members = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"far too long"])
vectors = st.tuples(st.integers(-3, 3), st.integers(-3, 3)).map(lambda numbers: vector(*numbers))
wrong_vectors = st.sampled_from([b"", b"x", vector(1), vector(1, 2, 3), vector(1, float("nan"))])
indices = st.sampled_from([b"index", b"other", b"text", b"fleeting", b"none"])
additions = st.lists(
    st.tuples(
        st.just(b"VADD") | st.just(b"vadd"),
        st.sampled_from([b"index", b"other"]) | indices,
        members,
        vectors | vectors | vectors | wrong_vectors,
    ),
    max_size=12,
) | st.tuples(indices, st.lists(st.tuples(members, vectors), max_size=12)).map(
    lambda rows: [(b"VADD", rows[0], member, of) for member, of in rows[1]]
)
burst_of_additions = st.lists(additions, max_size=4).map(
    lambda parts: [list(request) for part in parts for request in part]
)


@given(burst_of_additions, st.booleans())
@example([[b"VADD", b"other", member, vector(3, 4)] for member in (b"b", b"a", b"c", b"d", b"e")], False)
@example([[b"VADD", b"other", member, vector(3, 4)] for member in (b"b", b"a", b"c", b"d", b"e")], True)
def test_vectors_together_as_one_by_one(burst: list[list[bytes]], transaction: bool) -> None:
    compare(burst, transaction, TURN_NANOSECONDS)


def rows_of(house: House) -> dict[bytes, list[tuple[bytes, bytes | None, bytes]]]:
    """Key, vector and attributes of the rows of each index, by its key, in their order."""
    indices = house.engine.keyspace.others
    return {
        name: [
            (key, index.vector(key), index.attributes(key)) for key in sorted(index.live, key=index.live.get)
        ]
        for index, name in indices.items()
    }


def compare(burst: list[list[bytes]], transaction: bool, turn: int) -> None:
    """Requests that come together, and each by itself, have the same replies and lead to the same state."""
    if transaction:
        burst = [[b"MULTI"], *burst, [b"EXEC"]]

    async def main() -> None:
        with mock.patch.object(transactions, "TURN_NANOSECONDS", turn), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "a").mkdir()
            (folder / "b").mkdir()
            async with (
                prepared_house(folder / "a", runs=True) as together,
                prepared_house(folder / "b", runs=False) as apart,
            ):
                replies = await answered(together, burst)
                assert replies == await answered(apart, burst)
                assert len(replies) == len(burst)
                state, expected = (house.engine.keyspace for house in (together, apart))
                assert state.expiries == expected.expiries
                strings, others = (
                    {key: value for key, value in keyspace.values.items() if type(value) is bytes}
                    for keyspace in (state, expected)
                )
                assert strings == others
                assert state.values.keys() == expected.values.keys()
                assert rows_of(together) == rows_of(apart)
                for command in ("get", "set", "incr", "decr", "incrby", "decrby", "expire", "vadd"):
                    usage, other = (house.server.statistics.usage[command] for house in (together, apart))
                    assert (usage.calls, usage.failed) == (other.calls, other.failed)
                assert together.server.statistics.lookups() == apart.server.statistics.lookups()
                replayed = Engine(SegmentStore(folder / "a", DiskFiles(), 1), seal_rows=1 << 20)
                journal = together.database.journal
                assert isinstance(journal, ManualJournal)
                for lsn, operation in journal.records:
                    replayed.apply(lsn, operation)
                assert replayed.keyspace.expiries == state.expiries
                assert replayed.keyspace.values.keys() == state.values.keys()
                assert rows_of(attrs.evolve(together, engine=replayed)) == rows_of(together)
            shutil.rmtree(folder / "a")

    trio.run(main)


@pytest.mark.parametrize(
    ("burst", "changes"),
    [
        (["SET a 1", "SET b 2", "SET a 3"], 1),
        (["INCR a", "INCR a", "INCR b", "DECR b"], 2),
        (["INCRBY a 5", "INCRBY b 6", "SET a x", "INCRBY a 7", "INCRBY b 7"], 3),
        (["SET a 1", "SET a 2 EX 9", "SET a 3"], 3),
        (["VNEW i 1", *(f"VADD i {member} 0000" for member in "abcde")], 2),
        # From the second a on is another run, too short to be one.
        (["VNEW i 1", *(f"VADD i {member} 0000" for member in "abcdefab")], 4),
    ],
)
async def test_what_comes_together_is_one_change(
    open_house: OpenHouse, burst: list[str], changes: int
) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.send(*burst)
        await client.arrived()
        assert len(journal.records) == changes


async def test_a_transaction_carries_out_together_what_it_can(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client = house.connect()
        await client.send("MULTI", "SET a 1", "SET b 2", "GET a", "INCR a", "INCR a", "SET c 3", "EXEC")
        assert (await client.arrived()).endswith(b"*6\r\n+OK\r\n+OK\r\n$1\r\n1\r\n:2\r\n:3\r\n+OK\r\n")
        assert journal.together == [
            (
                SetStrings((b"a", b"b"), (b"1", b"2")),
                SetStrings((b"a",), (b"3",)),
                SetString(b"c", b"3"),
            )
        ]


async def test_a_run_stops_where_replies_are_large(house: House) -> None:
    """However many ask for it, a large value is copied a few times at once."""
    client = house.connect()
    value = b"x" * 100_000
    await client.call([b"SET", b"a", value])
    run = COMMANDS[b"get"].run
    assert run is not None
    session = house.connections[0].session
    assert run(session, [[b"GET", b"a"]] * 50)[0] == 2
    await client.send(*[[b"GET", b"a"]] * 50)
    assert await client.arrived() == (b"$100000\r\n" + value + b"\r\n") * 50


async def test_watches_are_broken_by_a_run(house: House) -> None:
    watching, other = house.connect(), house.connect()
    for key in ("a", "b"):
        await watching.call(f"WATCH {key}")
        await other.send(f"SET {key} 1", f"SET {key} 2")
        assert await other.arrived() == b"+OK\r\n+OK\r\n"
        await watching.call("MULTI")
        assert await watching.call("EXEC") == b"*-1\r\n"
    await watching.call("WATCH a")
    await other.send("INCR a", "INCR a")
    await other.arrived()
    await watching.call("MULTI")
    assert await watching.call("EXEC") == b"*-1\r\n"
