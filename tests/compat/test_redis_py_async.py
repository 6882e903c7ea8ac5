"""redis-py, the asyncio client. It has a loop of its own, for it cannot share Trio's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import ResponseError, WatchError

from tests.crash.server_process import HOST, ServerProcess

Body = Callable[[Any], Awaitable[None]]


@pytest.fixture
def run(server: ServerProcess, protocol: int) -> Callable[[Body], None]:
    """Runs a coroutine function with a client, in each protocol."""

    async def with_client(body: Body) -> None:
        async with Redis(host=HOST, port=server.port, protocol=protocol) as client:
            await body(client)

    def run(body: Body) -> None:
        asyncio.run(with_client(body))

    return run


def test_default_settings(server: ServerProcess) -> None:
    async def body() -> None:
        async with Redis(port=server.port) as client:
            assert await client.set("key", "value")
            assert await client.get("key") == b"value"
            assert (await client.client_info())["resp"] == "3"

    asyncio.run(body())


def test_strings_and_expiry(run: Callable[[Body], None]) -> None:
    async def body(client: Any) -> None:
        assert await client.set("key", "value", ex=100)
        assert await client.ttl("key") in (99, 100)
        assert await client.append("key", "!") == 6
        assert await client.get("key") == b"value!"
        assert await client.incr("counter") == 1
        assert sorted([key async for key in client.scan_iter()]) == [b"counter", b"key"]
        assert await client.type("key") == b"string"
        assert await client.delete("key", "counter") == 2
        with pytest.raises(ResponseError, match="unknown command"):
            await client.execute_command("FOOBAR")
        assert await client.ping()

    run(body)


def test_introspection(run: Callable[[Body], None]) -> None:
    async def body(client: Any) -> None:
        assert await client.client_setname("tester")
        assert await client.client_getname() in ("tester", b"tester")
        assert (await client.info())["loading"] == 0
        assert await client.config_get("appendonly") == {"appendonly": "no"}
        assert (await client.command())["get"]["arity"] == 2

    run(body)


def test_pipeline(run: Callable[[Body], None]) -> None:
    count = 10_000

    async def body(client: Any) -> None:
        async with client.pipeline(transaction=False) as pipeline:
            for _ in range(count):
                pipeline.incr("counter")
            assert await pipeline.execute() == list(range(1, count + 1))

    run(body)


def test_transactions(run: Callable[[Body], None]) -> None:
    async def body(client: Any) -> None:
        async with client.pipeline(transaction=True) as pipeline:
            assert await pipeline.set("key", 1).incr("key").get("key").execute() == [True, 2, b"2"]
            pipeline.set("key", "text").incr("key")
            replies = await pipeline.execute(raise_on_error=False)
            assert replies[0] is True
            assert isinstance(replies[1], ResponseError)
            await pipeline.watch("key")
            await client.set("key", "changed")
            pipeline.multi()
            pipeline.set("key", "lost")
            with pytest.raises(WatchError):
                await pipeline.execute()
        assert await client.get("key") == b"changed"

    run(body)


def test_decode_responses(server: ServerProcess, protocol: int) -> None:
    async def body() -> None:
        async with Redis(host=HOST, port=server.port, protocol=protocol, decode_responses=True) as client:
            assert await client.mset({"a": "ä", "b": 2})
            assert await client.mget("a", "b", "c") == ["ä", "2", None]
            assert (await client.config_get("databases")) == {"databases": "16"}

    asyncio.run(body())


def test_monitor(server: ServerProcess, protocol: int) -> None:
    async def body() -> None:
        async with (
            Redis(host=HOST, port=server.port, protocol=protocol) as client,
            Redis(host=HOST, port=server.port, protocol=protocol).monitor() as monitor,
        ):
            await client.set("key", "value")
            async for command in monitor.listen():
                if command["command"] == "SET key value":
                    break

    asyncio.run(body())


def test_many_tasks_share_a_pool(server: ServerProcess, protocol: int) -> None:
    async def body() -> None:
        pool = ConnectionPool(host=HOST, port=server.port, protocol=protocol, max_connections=50)
        async with Redis(connection_pool=pool) as client:
            await asyncio.gather(*(client.incr("together") for _ in range(50)))
            assert await client.get("together") == b"50"
        await pool.disconnect()

    asyncio.run(body())


def test_vectors(run: Callable[[Body], None]) -> None:
    rows = np.random.default_rng(12).standard_normal((20, 8)).astype("<f4")

    async def body(client: Any) -> None:
        assert await client.execute_command("VNEW", "index", 8, "METRIC", "l2") in (b"OK", True)
        added = [
            client.execute_command("VADD", "index", f"row-{number}", row.tobytes())
            for number, row in enumerate(rows[:10])
        ]
        assert [await each for each in added] == [1] * 10
        for number, row in enumerate(rows[:10]):
            found = await client.execute_command("VSEARCH", "index", row.tobytes(), 1)
            assert found == [b"row-%d" % number, b"0"]
        assert await client.execute_command("VDEL", "index", "row-3") == 1
        found = await client.execute_command("VSEARCH", "index", rows[3].tobytes(), 100)
        assert sorted(found[::2]) == [b"row-%d" % number for number in range(10) if number != 3]

    run(body)
