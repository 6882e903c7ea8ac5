"""What fails in a task of the server ends that task alone: each is made to fail, and the server goes on."""

from __future__ import annotations

import errno
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CoroutineType
from typing import Any

import attrs
import numpy as np
import pytest
import trio
from trio.lowlevel import Task
from trio.testing import MockClock

from engram import collector, heap, supervision
from engram.config import Config
from engram.database import Database
from engram.heap import Heap
from engram.index.builder import Builder
from engram.index.segment import SegmentStore
from engram.index.service import SearchService
from engram.listeners import Reception
from engram.rounds import Rounds
from engram.server import _expire
from engram.statistics import Statistics
from engram.supervision import keep_running
from engram.watches import Watches
from tests.conftest import OpenHouse, vector
from tests.test_server import OK, PONG, running

NO_THREAD = RuntimeError("can't start new thread")
GONE = FileNotFoundError(errno.ENOENT, "No such file or directory", "segments/7")
CLOSED = OSError(errno.EBADF, "Bad file descriptor")
REFUSED = OSError(errno.EPROTO, "Protocol error")


@attrs.frozen
class Fault:
    """What fails in a task, and how. It is called again and again: by itself, or when it is asked for."""

    owner: Any
    name: str
    error: Exception
    ask: tuple[str, ...] = ()


# By what `keep_running` was told that the task does.
FAULTS = {
    "serving clients": Fault(Rounds, "_serve_all", MemoryError(), ("PING",)),
    "verifying segments": Fault(SegmentStore, "verify", NO_THREAD),
    "deleting keys that lapsed": Fault(Database, "expire_due", MemoryError()),
    "freeing what was dropped": Fault(SegmentStore, "size", GONE, ("DEL v",)),
    "forgetting watches": Fault(Watches, "clear_up", MemoryError()),
    "trimming the heap": Fault(Heap, "_trim", NO_THREAD),
    "watching what the collector will look at": Fault(collector, "_count_new", MemoryError()),
    "sampling statistics": Fault(Statistics, "sample", MemoryError()),
    "a search thread": Fault(SearchService, "_search_next", MemoryError(), ("VSEARCH v aaaaaaaa 1",)),
    "refusing late searches": Fault(SearchService, "refuse_late", MemoryError()),
    "building graphs": Fault(Builder, "_work_on", MemoryError(), ("VOPTIMIZE v",)),
    "accepting clients": Fault(Reception, "_limit", CLOSED),
    "looking after clients": Fault(Reception, "_drop_departed", CLOSED),
    "the metrics endpoint": Fault(trio.SocketListener, "accept", REFUSED),
}

# Tasks that may end the server, for a reason, or that hold others; none of them does what may fail.
HOLDING = {
    "Persistence.run",
    "Space.run",
    "CurrentSnapshot.serve",
    "LogThread.run",
    "Builder.run",
    "SearchService.run",
    "Reception._attend",
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(heap, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(collector, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr("engram.server._IDLE_EXPIRY_INTERVAL", 0.001)
    monkeypatch.setattr("engram.listeners._LOOK_INTERVAL", 0.001)
    monkeypatch.setattr("engram.index.service._LONGEST_PAUSE", 0.001)
    monkeypatch.setattr("engram.index.service._SHORTEST_PAUSE", 0.001)


async def prepare(folder: Path) -> None:
    """Fills a data directory: there is a segment, and its vectors are to be verified after a start."""
    async with running(Config(dir=str(folder), seal_rows=16)) as server:
        client = await server.connect()
        await client.call("VNEW v 2")
        for number, row in enumerate(np.random.default_rng(0).normal(size=(20, 2)).tolist()):
            await client.call([b"VADD", b"v", b"%d" % number, vector(*row)])
        while b"\r\nvectors_segments:1\r\n" not in await client.call("INFO vectors"):
            await trio.lowlevel.checkpoint()
        assert await client.call([b"VADD", b"v", b"20", vector(1, 2)]) == b":1\r\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    trio.run(prepare, folder)
    return folder


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Config:
    """A server with all there is."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    config = Config(dir=str(tmp_path), seal_rows=16)
    with socket.create_server(("127.0.0.1", 0)) as other:
        config.metrics_port = other.getsockname()[1]
    return config


def supervised(task: Task) -> str | None:
    """What a task does that is begun again when it fails."""
    coroutine: Any = task.coro
    while isinstance(coroutine, CoroutineType):
        if coroutine.cr_code is keep_running.__code__:
            assert coroutine.cr_frame is not None
            return str(coroutine.cr_frame.f_locals["what"])
        coroutine = coroutine.cr_await
    return None


def tasks_of(task: Task) -> Iterator[Task]:
    """The tasks below this one, but for those that a supervised one contains."""
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            if supervised(child) is None:
                yield from tasks_of(child)


def name_of(task: Task) -> str:
    name: str = task.coro.__qualname__
    return name


async def test_every_task_of_the_server_is_contained(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(SegmentStore, "verify", lambda *_: held.wait())
    async with running(config) as server:
        client = await server.connect()
        assert await client.call("PING") == PONG
        [serving] = [
            child
            for child in tasks_of(trio.lowlevel.current_root_task() or trio.lowlevel.current_task())
            if name_of(child).endswith("running.<locals>.run")
        ]
        tasks = list(tasks_of(serving))
        kept = {what for task in tasks if (what := supervised(task)) is not None}
        others = {name_of(task) for task in tasks if supervised(task) is None}
        held.set()
    assert kept == FAULTS.keys()
    # What runs beside is within one of these, or ends with its client.
    assert others <= HOLDING


@pytest.mark.parametrize("what", FAULTS)
async def test_a_task_that_fails_is_begun_again_and_the_server_goes_on(
    what: str, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault = FAULTS[what]
    original: Callable[..., Any] = getattr(fault.owner, fault.name)
    calls: list[bool] = []

    def fail_first(*arguments: Any, **options: Any) -> Any:
        calls.append(True)
        if len(calls) == 1:
            raise fault.error
        return original(*arguments, **options)

    monkeypatch.setattr(fault.owner, fault.name, fail_first)
    async with running(config) as server:
        if what == "accepting clients":
            lost = await trio.open_tcp_stream(*server.started.addresses[0])
            async with lost:
                assert await lost.receive_some() == b""
        client = await server.connect()
        for words in fault.ask:
            await client.send(words)
        while len(calls) < 2:
            if what == "the metrics endpoint":
                await scrape(config)
            await trio.lowlevel.checkpoint()
        other = await server.connect()
        assert await other.call("PING") == PONG
        assert await other.call("SET k 1") == OK
    assert f"{what} failed" in caplog.text


async def scrape(config: Config) -> None:
    """Asks for figures, whether or not there is an answer."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", config.metrics_port)
        async with stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            await stream.receive_some()
    except (OSError, trio.BrokenResourceError):
        return


async def test_no_key_lapses_between_two_turns_of_one_who_has_the_data_alone(
    open_house: OpenHouse, autojump_clock: MockClock
) -> None:
    """Without a log, too: a VMADD that takes turns would be left half-way without its index."""
    async with open_house() as house:
        house.engine.keyspace.set(b"k", b"v", house.clock.time + 1)
        house.clock.time += 10
        house.server.exclusion.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expire, house.database, house.server.exclusion)
            await trio.sleep(5)
            assert b"k" in house.engine.keyspace.values
            house.server.exclusion.end()
            await trio.sleep(5)
            assert b"k" not in house.engine.keyspace.values
            nursery.cancel_scope.cancel()
