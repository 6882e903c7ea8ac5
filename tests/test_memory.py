from __future__ import annotations

import gc
import logging
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.commands.session import Server
from engram.config import Config
from engram.database import Database
from engram.engine import Engine
from engram.errors import CommandError
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.keyspace import Keyspace
from engram.memory import OUT_OF_MEMORY, MemoryLimit
from engram.operations import AddVectors, CreateIndex, DeleteKeys, SetExpiry, SetString
from tests.conftest import START, House, ManualJournal, OpenHouse, vector
from tests.test_engine import STEPS, Step, engines, live

OOM = f"-{OUT_OF_MEMORY}\r\n".encode()
OK = b"+OK\r\n"

# Room for some hundred small keys.
LIMIT = 64 << 10


class Set:
    """What is said of a command that is refused."""

    name = "set"


SET = Set()


@pytest.fixture
def database(engine: Engine) -> Database:
    return Database(engine, None, now=lambda: START)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(SegmentStore(tmp_path, DiskFiles(), 0), seal_rows=64)


def limited(database: Database, policy: str = "noeviction") -> MemoryLimit:
    return MemoryLimit(Config(maxmemory=LIMIT, maxmemory_policy=policy), database)  # type: ignore[arg-type]


def fill(database: Database, memory: MemoryLimit, name: bytes, expires_at: int | None = None) -> int:
    """Adds keys until the limit is passed; returns how many."""
    count = 0
    while memory.used() <= LIMIT:
        expiry = None if expires_at is None else expires_at + count
        database.commit(SetString(b"%b:%d" % (name, count), b"v" * 100, expiry))
        count += 1
    return count


class TestTotals:
    """The running total is what a recount gives."""

    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["set", "many", "update", "rename", "delete", "expire", "clear", "count"]),
                st.sampled_from([b"a", b"bb", b"ccc", b""]),
                st.binary(max_size=5),
                st.none() | st.integers(0, 9),
            ),
            max_size=40,
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_of_a_keyspace(self, steps: list[tuple[str, bytes, bytes, int | None]]) -> None:
        keyspace: Keyspace[float] = Keyspace()
        keyspace.counting = True
        for word, key, value, number in steps:
            if word == "set":
                keyspace.set(key, value if number != 3 else 0.5, number)
            elif word == "many":
                keyspace.set_many([key, b"bb", key], [value, b"", b"last"])
            elif word == "update" and key in keyspace.values:
                keyspace.update(key, value)
            elif word == "rename" and key in keyspace.values:
                keyspace.rename(key, b"new")
            elif word == "delete":
                keyspace.delete(key)
            elif word == "expire" and key in keyspace.values:
                keyspace.set_expiry(key, number)
            elif word == "clear":
                keyspace.clear()
            elif word == "count":
                keyspace.load(dict(keyspace.values), dict(keyspace.expiries))
        held = keyspace.bytes_held()
        keyspace.counting = False
        assert keyspace.bytes_held() == held
        keyspace.counting = True
        assert keyspace.bytes_held() == held

    @given(steps=STEPS, counting_from=st.integers(0, 40))
    @settings(max_examples=100, deadline=None)
    def test_of_all_there_is(self, steps: list[Step], counting_from: int) -> None:
        with engines(seal_rows=16) as make:
            engine: Engine = make()
            for number, step in enumerate(steps):
                if number == counting_from:
                    engine.keyspace.counting = True
                live(engine, [step])
            held = engine.bytes_held()
            engine.keyspace.counting = False
            assert held == engine.keyspace.bytes_held() + sum(
                index.bytes_reserved for index in engine.indices.values()
            )
            for index in engine.indices.values():
                assert index._key_bytes == sum(map(len, index.live))
                chunks = index._head.chunks
                assert index._head.bytes_reserved == sum(chunk.bytes_reserved for chunk in chunks)

    def test_of_many_keys_is_estimated_from_the_oldest_and_the_newest(self) -> None:
        keyspace: Keyspace[None] = Keyspace()
        for number in range(50_000):
            keyspace.set(b"%06d" % number, b"v" * (number % 100))
        estimated = keyspace.bytes_held()
        keyspace.counting = True
        assert estimated == pytest.approx(keyspace.bytes_held(), rel=0.01)

    def test_of_keys_is_about_what_is_allocated(self) -> None:
        keyspace: Keyspace[None] = Keyspace()
        gc.collect()
        tracemalloc.start()
        for number in range(50_000):
            keyspace.set(b"key:%d" % number, b"v" * (number % 300), START + number if number % 2 else None)
        allocated, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert keyspace.bytes_held() == pytest.approx(allocated, rel=0.1)

    def test_emptied_tables_do_not_count(self) -> None:
        keyspace: Keyspace[None] = Keyspace()
        for number in range(10_000):
            keyspace.set(b"%d" % number, b"")
        for number in range(10_000):
            keyspace.delete(b"%d" % number)
        assert sys.getsizeof(keyspace.values) > 200_000
        assert keyspace.bytes_held() < 1000


class TestAdmission:
    """Commands that take memory are refused beyond the limit, or keys give way."""

    def test_up_to_the_limit_all_is_admitted(self, database: Database) -> None:
        memory = limited(database)
        memory.admit(SET)
        fill(database, memory, b"k")
        with pytest.raises(CommandError, match=OUT_OF_MEMORY):
            memory.admit(SET)
        database.commit(DeleteKeys((b"k:0",)))
        memory.admit(SET)

    def test_without_eviction_keys_that_will_lapse_stay(self, database: Database) -> None:
        memory = limited(database)
        count = fill(database, memory, b"k", START + 1000)
        with pytest.raises(CommandError, match=OUT_OF_MEMORY):
            memory.admit(SET)
        assert (len(database.engine.keyspace), memory.evicted_keys) == (count, 0)

    def test_keys_with_the_nearest_expiry_go(self, database: Database) -> None:
        memory = limited(database, "volatile-ttl")
        database.commit(SetString(b"stays", b"v"))
        count = fill(database, memory, b"k", START + 1000)
        last = b"k:%d" % (count - 1)
        database.commit(SetExpiry(last, START + 1))
        memory.admit(SET)
        assert memory.used() <= LIMIT
        assert last not in database.engine.keyspace.values
        gone = [
            number for number in range(count - 1) if b"k:%d" % number not in database.engine.keyspace.values
        ]
        assert gone == list(range(memory.evicted_keys - 1))
        assert b"stays" in database.engine.keyspace.values
        evicted = memory.evicted_keys
        memory.admit(SET)
        assert memory.evicted_keys == evicted

    def test_strings_without_expiry_and_indices_stay(self, database: Database) -> None:
        memory = limited(database, "volatile-ttl")
        database.commit(CreateIndex(b"index", 2, "l2", 16, 128, "f32"))
        database.commit(SetExpiry(b"index", START + 1))
        fill(database, memory, b"k")
        database.commit(SetString(b"volatile", b"v", START + 500))
        with pytest.raises(CommandError, match=OUT_OF_MEMORY):
            memory.admit(SET)
        assert b"volatile" not in database.engine.keyspace.values
        assert isinstance(database.engine.keyspace.values[b"index"], VectorIndex)
        assert database.engine.keyspace.expiries == {b"index": START + 1}
        assert database.engine.keyspace.next_expiry() == START + 1

    def test_vectors_count(self, database: Database) -> None:
        memory = limited(database)
        database.commit(CreateIndex(b"index", 1024, "l2", 16, 128, "f32"))
        index = database.logical(0).index(b"index")
        assert index is not None
        before = memory.used()
        database.commit(AddVectors(index.id, tuple(b"%d" % row for row in range(16)), bytes(16 * 4096)))
        assert memory.used() - before > 16 * 4096
        assert memory.vectors() == index.bytes_reserved
        with pytest.raises(CommandError, match=OUT_OF_MEMORY):
            memory.admit(SET)
        database.commit(DeleteKeys((b"index",)))
        assert memory.vectors() == 0
        memory.admit(SET)

    def test_much_is_evicted_in_turns(self, database: Database) -> None:
        for number in range(3000):
            database.commit(SetString(b"k:%d" % number, b"v" * 100, START + number))
        config = Config(maxmemory=1, maxmemory_policy="volatile-ttl")
        memory = MemoryLimit(config, database)
        assert memory.evicted_keys == 1024
        memory.admit(SET)
        assert memory.evicted_keys == 2048
        with pytest.raises(CommandError, match=OUT_OF_MEMORY):
            memory.admit(SET)
        assert memory.evicted_keys == 3000

    def test_without_room_in_the_log_nothing_is_evicted(self, engine: Engine) -> None:
        journal = ManualJournal()
        database = Database(engine, journal, now=lambda: START)
        memory = limited(database, "volatile-ttl")
        count = fill(database, memory, b"k", START + 1000)
        journal.room = False
        memory.admit(SET)
        assert (len(database.engine.keyspace), memory.evicted_keys) == (count, 0)

    def test_the_log_tells_the_first_refusal(
        self, database: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        memory = limited(database)
        fill(database, memory, b"k")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                with pytest.raises(CommandError):
                    memory.admit(SET)
        assert caplog.messages == [
            f"set is refused, and what else takes memory: {memory.used()} bytes are used,"
            f" maxmemory is {LIMIT}"
        ]

    def test_counting_goes_with_the_limit(self, database: Database) -> None:
        config = Config()
        memory = MemoryLimit(config, database)
        assert not database.engine.keyspace.counting
        config.maxmemory = 1 << 30
        memory.reconfigure()
        assert database.engine.keyspace.counting
        config.maxmemory = 0
        memory.reconfigure()
        assert not database.engine.keyspace.counting


class TestServer:
    """What clients see of it; the replies are those of Redis 8."""

    @pytest.fixture
    def server(self, house: House) -> Server:
        return house.server

    async def test_a_refused_write_changes_nothing(self, house: House) -> None:
        client = house.connect()
        assert await client.call("SET a 1") == OK
        assert await client.call("VNEW index 1") == OK
        assert await client.call("CONFIG SET maxmemory 1") == OK
        house.server.reconsider()
        lsn = house.database.lsn
        for request in (
            "SET b 1",
            "APPEND a 1",
            "INCR a",
            "VNEW other 1",
            [b"VADD", b"index", b"x", vector(1)],
            [b"VMADD", b"index", b"x", vector(1)],
        ):
            assert await client.call(request) == OOM
        assert house.database.lsn == lsn
        assert await client.call("GET a") == b"$1\r\n1\r\n"
        assert await client.call("DEL a") == b":1\r\n"
        assert await client.call("CONFIG SET maxmemory 0") == OK
        house.server.reconsider()
        assert await client.call("SET b 1") == OK

    async def test_in_a_transaction(self, house: House) -> None:
        client, other = house.connect(), house.connect()
        assert await client.call("SET a 1") == OK
        assert await client.call("MULTI") == OK
        assert await client.call("SET a 5") == b"+QUEUED\r\n"
        assert await other.call("CONFIG SET maxmemory 1") == OK
        house.server.reconsider()
        assert await client.call("EXEC") == (
            b"-EXECABORT Transaction discarded because of: OOM command not allowed when used memory"
            b" > 'maxmemory'.\r\n"
        )
        assert await client.call("MULTI") == OK
        assert await client.call("SET a 2") == OOM
        assert await client.call("GET a") == b"+QUEUED\r\n"
        assert await client.call("EXEC") == (
            b"-EXECABORT Transaction discarded because of previous errors.\r\n"
        )
        assert await client.call("MULTI") == OK
        assert await client.call("GET a") == b"+QUEUED\r\n"
        assert await client.call("EXEC") == b"*1\r\n$1\r\n1\r\n"

    async def test_settings(self, house: House) -> None:
        client = house.connect()
        failed = b"-ERR CONFIG SET failed (possibly related to argument '%b') - %b\r\n"
        for name, value, reply in (
            ("maxmemory", "100mb", OK),
            ("maxmemory", "-1", failed % (b"maxmemory", b"argument must be a memory value")),
            ("maxmemory-policy", "VOLATILE-TTL", OK),
            ("maxmemory-policy", "noeviction", OK),
            (
                "maxmemory-policy",
                "allkeys-lru",
                failed
                % (
                    b"maxmemory-policy",
                    b"allkeys-lru is not supported here; use volatile-ttl or noeviction",
                ),
            ),
            (
                "maxmemory-policy",
                "nonsense",
                failed
                % (
                    b"maxmemory-policy",
                    b"argument(s) must be one of the following: volatile-ttl, noeviction",
                ),
            ),
        ):
            assert await client.call(f"CONFIG SET {name} {value}") == reply
        assert await client.call("CONFIG GET maxmemory") == b"*2\r\n$9\r\nmaxmemory\r\n$9\r\n104857600\r\n"

    async def test_an_eviction_is_logged(self, open_house: OpenHouse) -> None:
        journal = ManualJournal(automatic=True)
        config = Config(maxmemory=20_000, maxmemory_policy="volatile-ttl")
        async with open_house(journal=journal, config=config) as house:
            house.server.reconsider()
            client = house.connect()
            await client.send(
                *(
                    [b"SET", b"k:%d" % number, bytes(1000), b"EX", b"%d" % (100 + number)]
                    for number in range(40)
                )
            )
            assert await client.arrived() == 40 * OK
            evicted = [operation for _, operation in journal.records if isinstance(operation, DeleteKeys)]
            keys = [key for operation in evicted for key in operation.keys]
            assert house.server.memory.evicted_keys == len(keys) > 20
            assert keys == [b"k:%d" % number for number in range(len(keys))]


def test_what_an_index_takes(engine: Engine) -> None:
    gc.collect()
    tracemalloc.start()
    engine.apply(1, CreateIndex(b"index", 64, "l2", 16, 128, "f32"))
    random = np.random.default_rng(1)
    for lsn in range(2, 5002):
        engine.apply(lsn, AddVectors(1, (b"key:%d" % lsn,), random.bytes(256), (b'{"a":1}',)))
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    index = engine.indices[1]
    # Codes come with the first search.
    assert index.bytes_reserved - index._head.rows * (2 * 64 + 16) == pytest.approx(allocated, rel=0.1)
