from __future__ import annotations

import pytest
import trio

from engram.index.builder import BuildError
from engram.index.vector_index import VectorIndex
from tests.commands.conftest import (
    EMPTY,
    NO_INDEX,
    SYNTAX_ERROR,
    WRONG_TYPE,
    add,
    bulks,
    info,
    parse,
    search,
)
from tests.conftest import Client, House, vector


async def test_vnew(client: Client) -> None:
    assert await client.call("VNEW a 3") == b"+OK\r\n"
    assert await client.call("VNEW a 3") == b"-ERR index already exists\r\n"
    assert await client.call("TYPE a") == b"+vectorset\r\n"


@pytest.mark.parametrize("dimension", ["0", "-1", "x", "1.5", "+3", ""])
async def test_vnew_wants_a_positive_dimension(client: Client, dimension: str) -> None:
    reply = await client.call([b"VNEW", b"a", dimension.encode()])
    assert reply == b"-ERR dimension must be a positive integer\r\n"


async def test_a_dimension_beyond_the_limit_is_refused(client: Client) -> None:
    assert await client.call("VNEW a 65537") == b"-ERR dimension must be at most 65536\r\n"
    assert await client.call("VNEW a 65536") == b"+OK\r\n"


@pytest.mark.parametrize(
    ("metric", "canonical"),
    [
        ("cosine", "cosine"),
        ("COSINE", "cosine"),
        ("l2", "l2"),
        ("L2", "l2"),
        ("Euclidean", "l2"),
        ("dot", "dot"),
        ("IP", "dot"),
    ],
)
async def test_metrics_and_vinfo(client: Client, metric: str, canonical: str) -> None:
    assert await client.call(f"VNEW a 3 metric {metric}") == b"+OK\r\n"
    assert (await info(client, "a"))["metric"] == canonical


async def test_cosine_is_the_default(client: Client) -> None:
    await client.call("VNEW a 3")
    await add(client, "a", "x", 1, 2, 3)
    assert (await info(client, "a"))["metric"] == "cosine"


async def test_vnew_misused(client: Client) -> None:
    assert await client.call("VNEW a 3 METRIC hamming") == b"-ERR unknown metric\r\n"
    assert await client.call("VNEW a 3 METRIC") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 FOO l2") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 METRIC l2 x") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 METRIC l2 METRIC l2") == SYNTAX_ERROR
    assert await client.call("VNEW a 3 QUANT f64") == b"-ERR unknown quantization\r\n"
    assert await client.call("VNEW a") == b"-ERR wrong number of arguments for 'vnew' command\r\n"
    assert await client.call("EXISTS a") == b":0\r\n"


async def test_options_in_any_order(client: Client) -> None:
    assert (
        await client.call("VNEW a 3 recall 0.925 QUANT BF16 ef_construction 77 Metric L2 m 12") == b"+OK\r\n"
    )
    found = await info(client, "a")
    assert {name: found[name] for name in ("metric", "m", "ef-construction", "quant", "recall")} == {
        "metric": "l2",
        "m": "12",
        "ef-construction": "77",
        "quant": "bf16",
        "recall": "0.925",
    }


@pytest.mark.parametrize("quantization", ["f32", "int8", "bf16"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
async def test_every_metric_takes_every_quantization(client: Client, metric: str, quantization: str) -> None:
    assert await client.call(f"VNEW a 3 METRIC {metric} QUANT {quantization}") == b"+OK\r\n"
    assert (await info(client, "a"))["quant"] == quantization


@pytest.mark.parametrize(
    ("option", "values", "error"),
    [
        ("M", ("3", "513", "x", "-4", "4.5", ""), b"-ERR M must be an integer from 4 to 512\r\n"),
        (
            "EF_CONSTRUCTION",
            ("0", "4097", "x", ""),
            b"-ERR EF_CONSTRUCTION must be an integer from 1 to 4096\r\n",
        ),
        (
            "RECALL",
            ("0", "-0.5", "1.01", "nan", "inf", "x", "", "1e-400"),
            b"-ERR RECALL must be a number above 0 and at most 1\r\n",
        ),
    ],
)
async def test_options_out_of_bounds(
    client: Client, option: str, values: tuple[str, ...], error: bytes
) -> None:
    for value in values:
        request = [b"VNEW", b"a", b"3", option.encode(), value.encode()]
        assert (value, await client.call(request)) == (value, error)
    assert await client.call("EXISTS a") == b":0\r\n"


async def test_options_at_their_bounds(client: Client) -> None:
    for number, options in enumerate(
        ("M 4", "M 512", "EF_CONSTRUCTION 1", "EF_CONSTRUCTION 4096", "RECALL 1", "RECALL 1e-9", "RECALL .5")
    ):
        assert (options, await client.call(f"VNEW {number} 3 {options}")) == (options, b"+OK\r\n")


async def test_vinfo_of_a_new_index(client: Client) -> None:
    await client.call("VNEW a 3")
    reply = await client.call("VINFO a")
    names = parse(reply)[::2]
    assert names == [
        b"dim",
        b"metric",
        b"count",
        b"m",
        b"ef-construction",
        b"quant",
        b"recall",
        b"live-rows",
        b"dead-rows",
        b"head-rows",
        b"segments",
        b"rows-awaiting-graph",
        b"bytes-in-memory",
        b"bytes-mapped",
        b"recall-curve",
        b"last-build-error",
    ]
    found = await info(client, "a")
    assert (found["dim"], found["count"], found["recall"], found["recall-curve"]) == ("3", "0", "0.99", "")


async def test_vinfo_counts_rows(client: Client) -> None:
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 2)
    await add(client, "a", "y", 1, 2)
    await add(client, "a", "x", 3, 4)
    found = await info(client, "a")
    assert [found[name] for name in ("count", "live-rows", "dead-rows", "head-rows", "segments")] == [
        "2",
        "2",
        "1",
        "3",
        "0",
    ]
    assert int(found["bytes-in-memory"]) > 0


async def test_vlist(client: Client, house: House) -> None:
    assert await client.call("VLIST") == EMPTY
    await client.call("SET s x")
    assert await client.call("VLIST") == EMPTY
    await client.call("VNEW a 2")
    await client.call("VNEW b 3")
    assert await client.call("VLIST") == bulks("a", "b")
    await client.call("PEXPIRE a 100")
    house.clock.time += 100
    assert await client.call("VLIST") == bulks("b")
    assert await client.call("VLIST b") == b"-ERR wrong number of arguments for 'vlist' command\r\n"


async def test_voptimize_of_what_is_in_order(client: Client) -> None:
    assert await client.call("VOPTIMIZE a") == NO_INDEX
    await client.call("SET s x")
    assert await client.call("VOPTIMIZE s") == WRONG_TYPE
    await client.call("VNEW a 2")
    assert await client.call("VOPTIMIZE a") == b"+OK\r\n"


async def test_voptimize_answers_when_it_is_done(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trio.Event()

    async def optimize(index: VectorIndex) -> None:
        await done.wait()

    monkeypatch.setattr(house.server.builder, "optimize", optimize)
    first, second, other = (house.connect() for _ in range(3))
    await first.call("VNEW a 2")
    await first.send("PING 1", "VOPTIMIZE a", "PING 2")
    await second.send("VOPTIMIZE a")
    assert await first.arrived() == b"$1\r\n1\r\n"
    assert await second.arrived() == b""
    assert await other.call("PING") == b"+PONG\r\n"
    done.set()
    assert await first.arrived() == b"+OK\r\n$1\r\n2\r\n"
    assert await second.arrived() == b"+OK\r\n"


async def test_voptimize_that_fails(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def optimize(index: VectorIndex) -> None:
        raise BuildError("no space left")

    monkeypatch.setattr(house.server.builder, "optimize", optimize)
    client = house.connect()
    await client.call("VNEW a 2")
    assert await client.call("VOPTIMIZE a") == b"-ERR optimization failed: no space left\r\n"
    assert house.server.statistics.error_replies == 1


async def test_voptimize_builds_one_graph(house: House) -> None:
    await house.nursery.start(house.server.builder.run)
    client = house.connect()
    await client.call("VNEW a 2 METRIC l2")
    await client.send(*([b"VADD", b"a", b"%d" % n, vector(n, 1)] for n in range(40)), "VDEL a 3")
    assert [await client.reply() for _ in range(41)] == [b":1\r\n"] * 41
    assert await client.call("VOPTIMIZE a") == b"+OK\r\n"
    found = await info(client, "a")
    assert [found[name] for name in ("segments", "live-rows", "dead-rows", "head-rows")] == [
        "1",
        "39",
        "0",
        "0",
    ]
    assert found["recall-curve"].startswith("39")
    assert int(found["bytes-mapped"]) > 0
    assert await search(client, "a", vector(3, 1), b"2") == bulks("2", "1", "4", "1")


async def test_an_index_is_a_key_like_any_other(house: House) -> None:
    client = house.connect()
    await client.call("VNEW a 2")
    await add(client, "a", "x", 1, 0)
    assert await client.call("EXPIRE a 10") == b":1\r\n"
    assert await client.call("TTL a") == b":10\r\n"
    assert await client.call("SCAN 0 TYPE vectorset") == b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\na\r\n"
    assert await client.call("SCAN 0 TYPE string") == b"*2\r\n$1\r\n0\r\n*0\r\n"
    house.clock.time += 10_000
    assert await client.call("VINFO a") == NO_INDEX
    assert house.engine.indices == {}
    assert await client.call("VNEW a 5") == b"+OK\r\n"
    assert await client.call("TTL a") == b":-1\r\n"
    assert await client.call("SET a x") == b"+OK\r\n"
    assert await client.call("GET a") == b"$1\r\nx\r\n"
    assert house.engine.indices == {}


# What Redis answers for a vector set.
async def test_string_commands_on_an_index(client: Client) -> None:
    await client.call("VNEW a 2")
    for request in (
        "GET a",
        "SET a x GET",
        "SET a x NX GET",
        "SET a x XX GET",
        "APPEND a x",
        "STRLEN a",
        "INCR a",
        "DECRBY a 1",
    ):
        assert (request, await client.call(request)) == (request, WRONG_TYPE)
    assert await client.call("SET a x NX") in (b"$-1\r\n", b"_\r\n")
    assert await client.call("TYPE a") == b"+vectorset\r\n"
    assert await client.call("DEL a") == b":1\r\n"
    assert await client.call("EXISTS a") == b":0\r\n"


async def test_vinfo_says_why_a_graph_could_not_be_built(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.call("VNEW a 3")
    assert (await info(client, "a"))["last-build-error"] == ""
    index = house.database.logical(0).index(b"a")
    assert index is not None
    house.server.builder._fail(index, BuildError("the building process ended with code 70:\nKeyError: 'x'"))
    assert (await info(client, "a"))["last-build-error"] == "KeyError: 'x'"
    assert b"\r\nvectors_last_build_error:KeyError: 'x'\r\n" in await client.call("INFO vectors")
    await client.call("DEL a")
    await client.call("VNEW a 3")
    assert (await info(client, "a"))["last-build-error"] == ""
