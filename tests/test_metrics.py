from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engram import __version__
from engram.commands.session import Server
from engram.config import Config
from engram.errors import OperatorError
from engram.metrics import answer, read, render, serve
from tests.commands.steps import count_steps
from tests.commands.test_administration import Snapshots
from tests.conftest import House, OpenHouse, vector


def samples(text: bytes) -> dict[str, float]:
    """Values by name and labels, as `name{label=value}`."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_what_is_counted(open_house: OpenHouse) -> None:
    async with open_house(storage=Snapshots()) as house:
        client = house.connect()
        await client.call("SET a 1")
        await client.call("GET a")
        await client.call("GET a")
        await client.call("GET b")
        await client.call("GET")
        await client.call("INCR v x")
        await client.call("VNEW v 1")
        await client.call([b"VADD", b"v", b"x", vector(1)])
        await client.call([b"VSEARCH", b"v", vector(1), b"1"])
        house.server.statistics.syncs.record(1, 2_000_000)
        found = samples(render(read(house.server)))
    assert found["engram_command_duration_seconds_count{command=get}"] == 3
    assert found["engram_command_duration_seconds_bucket{command=get,le=+Inf}"] == 3
    assert found["engram_command_duration_seconds_bucket{command=get,le=17.179869184}"] == 3
    assert 0 < found["engram_command_duration_seconds_sum{command=get}"] < 1
    assert found["engram_command_rejections_total{command=get}"] == 1
    assert found["engram_errors_total{error=ERR}"] == 2
    assert found["engram_commands_processed_total"] == 7
    assert found["engram_keyspace_hits_total"] == 3
    assert found["engram_keyspace_misses_total"] == 1
    assert found["engram_keys"] == 2
    assert found["engram_clients"] == 1
    assert found["engram_vectors"] == found["engram_searches_total"] == 1
    assert found["engram_search_duration_seconds_count"] == 1
    assert found["engram_log_sync_seconds_count"] == 1
    assert found["engram_log_sync_seconds_bucket{le=0.001048576}"] == 0
    assert found["engram_log_sync_seconds_bucket{le=0.004194304}"] == 1
    assert found["engram_log_batches_total"] == 3
    assert found["engram_build_duration_seconds_count"] == 0
    assert found["engram_memory_used_bytes"] > 0
    assert found["engram_memory_resident_bytes"] > 1 << 20
    assert found[f"engram_build_info{{version={__version__}}}"] == 1
    assert found["process_cpu_seconds_total"] > 0


async def test_without_a_log_there_is_nothing_to_say_of_it(house: House) -> None:
    assert not any("engram_log" in name for name in samples(render(read(house.server))))


async def test_reading_the_figures_of_many_commands_takes_few_steps(house: House) -> None:
    for number in range(150):
        usage = house.server.statistics.usage[f"command{number}"]
        for step in range(200):
            usage.record(1, step * 150)
    assert count_steps(lambda: read(house.server)) < 60_000


@asynccontextmanager
async def conversation() -> AsyncIterator[trio.abc.Stream]:
    """A client's end of a connection whose scrapes say `figures`."""

    async def scrape() -> bytes:
        return b"figures\n"

    near, far = trio.testing.memory_stream_pair()

    async def attend() -> None:
        async with far:
            await answer(far, scrape)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attend)
        yield near


async def everything(stream: trio.abc.Stream) -> bytes:
    async with stream:
        return b"".join([data async for data in stream])


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"figures\n"),
        (b"GET /metrics?name[]=x HTTP/1.0\r\n\r\n", 200, b"figures\n"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 200, b""),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"see /metrics\n"),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 405, b"only GET\n"),
    ],
)
async def test_requests(request_: bytes, status: int, body: bytes) -> None:
    async with conversation() as stream:
        await stream.send_all(request_)
        head, _, rest = (await everything(stream)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close" in head
    assert rest == body
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    assert length is not None
    assert int(length[1]) == len(body or b"figures\n")


async def test_a_request_may_come_bit_by_bit() -> None:
    async with conversation() as stream:
        for byte in b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n":
            await stream.send_all(bytes((byte,)))
        assert (await everything(stream)).endswith(b"\r\n\r\nfigures\n")


@pytest.mark.parametrize(
    "request_", [b"PING\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n", b"a" * 10_000, b"\x16\x03\x01\x02", b""]
)
async def test_who_speaks_otherwise_is_left(request_: bytes) -> None:
    async with conversation() as stream:
        await stream.send_all(request_)
        assert isinstance(stream, trio.StapledStream)
        await stream.send_eof()
        assert await everything(stream) == b""


async def test_who_is_slow_is_left(autojump_clock: trio.testing.MockClock) -> None:
    async with conversation() as stream:
        await stream.send_all(b"GET /metr")
        began = trio.current_time()
        assert await everything(stream) == b""
        assert trio.current_time() - began == pytest.approx(10)


async def test_over_a_socket(open_house: OpenHouse) -> None:
    async with open_house(config=Config(metrics_port=0)) as house:
        port: int = await house.nursery.start(serve, house.server)
        for _ in range(2):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            reply = await everything(stream)
            assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in reply
            assert b"\nengram_clients 0.0\n" in reply
        # Those that say nothing do not keep others from being answered for ever, nor may they be many.
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(16)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        refused = await trio.open_tcp_stream("127.0.0.1", port)
        assert await everything(refused) == b""
        for stream in idle:
            await stream.aclose()


async def test_an_error_in_an_answer_ends_nothing_else(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(server: Server) -> list[Metric]:
        raise OSError(24, "Too many open files")

    async with open_house(storage=Snapshots(), config=Config(metrics_port=0)) as house:
        port: int = await house.nursery.start(serve, house.server)
        with monkeypatch.context() as patched:
            patched.setattr("engram.metrics.read", broken)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                assert await stream.receive_some() == b""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
    assert "a request for metrics failed" in caplog.text


async def test_an_address_in_use(open_house: OpenHouse) -> None:
    async with open_house() as house:
        port: int = await house.nursery.start(serve, house.server)
        house.server.config.metrics_port = port
        with pytest.raises(OperatorError, match=f"cannot listen on 127.0.0.1 port {port} for metrics"):
            await serve(house.server)
