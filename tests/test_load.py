from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from engram.dump import dump_blocks
from engram.engine import Engine
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.load import Loaded, LoadError, load
from engram.operations import AddVectors, CreateIndex, Operation, SetExpiry, SetString
from tests.conftest import PATIENCE, START, House, OpenHouse, vector

HEADER = b'{"engram-dump":1}\n'
Lines = list[dict[str, Any]]

STRING = {"type": "string", "key": "k", "value": "v"}
INDEX = {"type": "vectorset", "key": "i", "dimension": 2}
VECTOR = {"type": "vector", "index": "i", "key": "x", "vector": [1, 2.5]}


def dump_of(*lines: Mapping[str, Any]) -> bytes:
    return HEADER + b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def load_into(house: House, dump: bytes, **options: Any) -> Loaded:
    near, far = trio.testing.memory_stream_pair()
    house.connect(streams=(near, far), reads=False)
    with trio.fail_after(4 * PATIENCE):
        async with near:
            return await load(io.BytesIO(dump), near, **options)


def index_contents(index: VectorIndex) -> dict[bytes, tuple[bytes | None, bytes]]:
    return {key: (index.vector(key), index.attributes(key)) for key in index.live}


def contents(engine: Engine) -> tuple[dict[bytes, object], dict[bytes, int]]:
    """Strings, parameters and members by key, and when keys lapse."""
    values: dict[bytes, object] = {
        key: (value.parameters, index_contents(value)) if isinstance(value, VectorIndex) else value
        for key, value in engine.keyspace.values.items()
    }
    return values, dict(engine.keyspace.expiries)


EXPIRIES = st.none() | st.integers(START + 1, (1 << 63) - 1)
TEXTS = st.binary(max_size=20) | st.text(max_size=20).map(str.encode)
NUMBERS = st.floats(-(2**40), 2**40, width=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
ATTRIBUTES = (
    st.just(b"")
    | TEXTS
    | st.dictionaries(st.text(), JSON, max_size=3).map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(), JSON, max_size=3).map(lambda value: json.dumps(value, indent=1).encode())
)
RECALLS = st.floats(0, 1, exclude_min=True)


@st.composite
def indices(draw: st.DrawFn) -> tuple[Callable[[bytes], CreateIndex], list[tuple[bytes, bytes, bytes]]]:
    dimension = draw(st.integers(1, 5))
    parameters = (
        dimension,
        draw(st.sampled_from(["cosine", "l2", "dot"])),
        draw(st.integers(4, 512)),
        draw(st.integers(1, 4096)),
        draw(st.sampled_from(["int8", "bf16", "f32"])),
        draw(RECALLS),
    )
    vectors = st.lists(NUMBERS, min_size=dimension, max_size=dimension)
    rows = draw(st.lists(st.tuples(TEXTS, vectors.map(lambda row: vector(*row)), ATTRIBUTES), max_size=6))
    return lambda key: CreateIndex(key, *parameters), rows


@hypothesis.settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strings=st.dictionaries(TEXTS, st.tuples(TEXTS, EXPIRIES), max_size=5),
    made=st.dictionaries(TEXTS, st.tuples(indices(), EXPIRIES), max_size=3),
    base64=st.booleans(),
    replace=st.booleans(),
)
async def test_what_was_dumped_is_loaded_again(
    strings: dict[bytes, tuple[bytes, int | None]],
    made: dict[
        bytes, tuple[tuple[Callable[[bytes], CreateIndex], list[tuple[bytes, bytes, bytes]]], int | None]
    ],
    base64: bool,
    replace: bool,
    open_house: OpenHouse,
) -> None:
    operations: list[Operation] = [SetString(key, *rest) for key, rest in strings.items()]
    for key, ((create, rows), expires_at) in made.items():
        operations.append(create(key))
        index = len(operations)
        operations += [AddVectors(index, (member,), row, (text,)) for member, row, text in rows]
        operations.append(SetExpiry(key, expires_at))
    async with open_house() as house:
        engine = Engine(SegmentStore(house.engine.segments.folder, DiskFiles(), 0), seal_rows=1 << 62)
        for lsn, operation in enumerate(operations, 1):
            engine.apply(lsn, operation)
        dump = b"".join(dump_blocks(engine, base64=base64))
        loaded = await load_into(house, dump, replace=replace)
        assert contents(house.engine) == contents(engine)
        assert loaded == Loaded(len(engine.keyspace), engine.totals().rows)
        assert (
            b"".join(dump_blocks(house.engine, base64=base64)).partition(b"\n")[2] == dump.partition(b"\n")[2]
        )


async def test_a_line_says_no_more_than_it_must(house: House) -> None:
    attributed = {**VECTOR, "key": "y", "attributes": {"a": 1}}
    assert await load_into(house, dump_of(STRING, INDEX, VECTOR, attributed)) == Loaded(2, 2)
    index = house.engine.keyspace.values[b"i"]
    assert isinstance(index, VectorIndex)
    assert index_contents(index) == {b"x": (vector(1, 2.5), b""), b"y": (vector(1, 2.5), b'{"a": 1}')}
    assert (index.parameters.metric, index.parameters.recall) == ("cosine", 0.99)


async def test_empty_lines_and_a_missing_last_newline_do_not_matter(house: House) -> None:
    dump = dump_of(STRING, INDEX, VECTOR).replace(b"\n", b"\n\n \r\n")
    assert await load_into(house, dump.rstrip()) == Loaded(2, 1)


async def test_lines_may_be_long(house: House) -> None:
    value = "x" * (5 << 20)
    await load_into(house, dump_of({**STRING, "value": value}, {**STRING, "key": "l"}))
    assert house.engine.keyspace.values == {b"k": value.encode(), b"l": b"v"}


async def test_many_lines_are_counted_as_they_are_acknowledged(house: House) -> None:
    strings: Lines = [{**STRING, "key": str(number)} for number in range(3000)]
    vectors: Lines = [{**VECTOR, "key": str(number)} for number in range(3000)]
    header = b'{"engram-dump":1,"keys":3001,"vectors":3000}\n'
    dump = header + dump_of(*strings, INDEX, *vectors).removeprefix(HEADER)
    begun: list[int | None] = []
    advanced: list[int] = []
    loaded = await load_into(house, dump, begin=begun.append, advance=advanced.append)
    assert loaded == Loaded(3001, 3000)
    assert begun == [6001]
    assert sum(advanced) == 6001
    assert len(advanced) > 3001


async def test_a_set_with_an_expiry_lapses_only_when_it_is_full(house: House) -> None:
    lapsed = {**INDEX, "expires-at": START - 1}
    assert await load_into(house, dump_of(lapsed, VECTOR, STRING)) == Loaded(2, 1)
    assert house.database.logical(0).lookup(b"i") is None
    assert house.database.logical(0).lookup(b"k") == b"v"


# What is there already


async def refused(house: House, dump: bytes, **options: Any) -> str:
    with pytest.raises(LoadError) as raised:
        await load_into(house, dump, **options)
    return str(raised.value)


async def test_a_key_that_is_there_is_left_alone(house: House) -> None:
    house.database.commit(SetString(b"k", b"before"))
    message = await refused(house, dump_of({**STRING, "key": "a"}, STRING))
    assert message == "line 3: the key is there already; --replace overwrites it"
    assert house.engine.keyspace.values == {b"a": b"v", b"k": b"before"}


async def test_an_index_that_is_there_gets_no_vectors(house: House) -> None:
    house.database.commit(CreateIndex(b"i", 2, "l2", 16, 128, "f32"))
    assert await refused(house, dump_of(INDEX, VECTOR)) == "line 2: ERR index already exists"
    assert house.engine.totals().rows == 0
    house.database.commit(SetString(b"i", b"before"))
    assert (await refused(house, dump_of(INDEX, VECTOR))).startswith("line 2: WRONGTYPE ")


@pytest.mark.parametrize("before", [SetString(b"i", b""), CreateIndex(b"i", 9, "l2", 16, 128, "f32")])
async def test_replacing(before: Operation, house: House) -> None:
    house.database.commit(before)
    house.database.commit(SetString(b"k", b"before", START + 1))
    assert await load_into(house, dump_of(STRING, INDEX, VECTOR), replace=True) == Loaded(2, 1)
    values, expiries = contents(house.engine)
    assert values[b"k"] == b"v"
    assert expiries == {}
    index = house.engine.keyspace.values[b"i"]
    assert isinstance(index, VectorIndex)
    assert (len(index), index.parameters.dimension) == (1, 2)


# What is wrong with a dump


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: Input data was truncated"),
        (b"\xff", "line 3: JSON is malformed: invalid character (byte 0)"),
        (b'{"type":"string","key":"k"}', "line 3: Object missing required field `value`"),
        (b'{"type":"list","key":"k"}', "line 3: Invalid value 'list' - at `$.type`"),
        (
            b'{"type":"string","key":"k","value":1}',
            "line 3: Expected `str | object`, got `int` - at `$.value`",
        ),
        (b'{"type":"string","key":"k","value":"","ttl":1}', "line 3: Object contains unknown field `ttl`"),
        (b'{"type":"string","key":{"base64":"?"},"value":""}', "line 3: Invalid base64 encoded string"),
        (b'{"type":"vector","index":"j","key":"k","vector":[1]}', "line 3: the vector set of this vector is"),
        (
            b'{"type":"vector","index":"i","key":"k","vector":[1]}',
            "line 3: the vector does not have 2 numbers",
        ),
        (b'{"type":"vector","index":"i","key":"k","vector":[1e300,0]}', "line 3: ERR vector must be finite"),
        (b'{"type":"vectorset","key":"j","dimension":0}', "line 3: ERR dimension must be a positive integer"),
        (b'{"type":"vectorset","key":"j","dimension":1,"metric":"x"}', "line 3: ERR unknown metric"),
        (
            b'{"type":"string","key":"k","value":"","expires-at":-1}',
            "line 3: ERR invalid expire time in 'set'",
        ),
    ],
)
async def test_the_first_error_ends_it_with_the_line(line: bytes, message: str, house: House) -> None:
    found = await refused(house, dump_of(INDEX) + line + b"\n" + dump_of(STRING).removeprefix(HEADER))
    assert found.startswith(message)
    assert b"i" in house.engine.keyspace.values


async def test_what_comes_before_a_wrong_line_is_loaded(house: House) -> None:
    found = await refused(house, dump_of(STRING, INDEX, VECTOR) + b"wrong\n")
    assert found.startswith("line 5: ")
    assert house.engine.totals().rows == 1


async def test_vectors_that_are_refused_together_are_named_by_their_lines(house: House) -> None:
    wrong = {**VECTOR, "vector": [1e30, 0]}
    assert (await refused(house, dump_of(INDEX, VECTOR, wrong, VECTOR))).startswith(
        "lines 3 to 5: ERR vector "
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "line 1: not the first line of a dump: "),
        (b"REDIS0011", "line 1: not the first line of a dump: "),
        (b'{"type":"string"}', "line 1: not the first line of a dump: "),
        (b'{"engram-dump":2}', "line 1: format 2 is not known"),
    ],
)
async def test_what_is_no_dump_is_refused(header: bytes, message: str, house: House) -> None:
    assert (await refused(house, header)).startswith(message)


# Servers that are in trouble


@asynccontextmanager
async def a_server(
    answer: Callable[[trio.abc.Stream], Any],
) -> AsyncIterator[trio.abc.Stream]:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, far)
        yield near
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "the server has closed the connection"),
        (b"-ERR max number of clients reached\r\n", "ERR max number of clients reached"),
        (b"+OK\r\n", "the server has closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n", "the server does not speak RESP: "),
        (b"-MISCONF No space left on device\r\n", "MISCONF No space left on device"),
    ],
)
async def test_a_server_that_goes_away(said: bytes, message: str) -> None:
    async def answer(stream: trio.abc.Stream) -> None:
        if said.startswith((b"+", b"-MISCONF")):
            await stream.receive_some(100)
        await stream.send_all(said)
        await stream.aclose()

    dump = dump_of(*({**STRING, "key": str(number)} for number in range(5000)))
    async with a_server(answer) as stream:
        with trio.fail_after(PATIENCE), pytest.raises(LoadError) as raised:
            await load(io.BytesIO(dump), stream)
    assert message in str(raised.value)


async def test_a_bounded_part_is_on_its_way_to_a_server_that_is_slow() -> None:
    received = 0

    async def answer(stream: trio.abc.Stream) -> None:
        nonlocal received
        async for data in stream:
            received += len(data)

    value = "x" * 100_000
    dump = dump_of(*({**STRING, "key": str(number), "value": value} for number in range(200)))
    async with a_server(answer) as stream:
        with trio.move_on_after(0.5):
            await load(io.BytesIO(dump), stream)
    assert 1 << 20 < received < 9 << 20


async def test_what_is_of_a_database_that_is_not_there_comes_into_no_other(house: House) -> None:
    house.server.config.databases = 4
    client = house.connect()
    await client.call("SET k mine")
    dump = dump_of(
        {"type": "string", "key": "first", "value": "x"},
        *({"type": "string", "key": "k", "value": "theirs", "database": 20} for _ in range(100)),
    )
    assert await refused(house, dump, replace=True) == "line 3: ERR DB index is out of range"
    assert await client.call("GET k") == b"$4\r\nmine\r\n"
    assert await client.call("GET first") == b"$1\r\nx\r\n"
