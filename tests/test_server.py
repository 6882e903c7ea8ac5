from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast

import attrs
import pytest
import trio
import trio.testing

from engram.commands import transactions
from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Session
from engram.config import Config
from engram.engine import Engine
from engram.errors import DirectoryInUseError, LogFailureError, OperatorError
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.operations import DeleteKeys, SetString, encode
from engram.persistence import Persistence, lock_directory
from engram.progress import Progress
from engram.scan_order import ScanOrder
from engram.server import SWITCH_INTERVAL, Started, _free, serve
from tests.conftest import PATIENCE, Client, vector
from tests.persistence.conftest import LogMaker, read_back

OK, PONG = b"+OK\r\n", b"+PONG\r\n"


@pytest.fixture(autouse=True)
def _settled_interpreter() -> Iterator[None]:
    """A server tunes the interpreter it runs in; the other tests get theirs back."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


@attrs.define
class Running:
    """A server in this process, and clients for it."""

    started: Started
    shutdown: trio.Event
    nursery: trio.Nursery

    async def connect(self, address: int = 0) -> Client:
        host, port = self.started.addresses[address]
        client = Client(await trio.open_tcp_stream(host, port))
        self.nursery.start_soon(client.read)
        return client


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Running]:
    """Runs a server on a free port, and shuts it down cleanly."""
    config.port = 0
    shutdown = trio.Event()
    with trio.fail_after(4 * PATIENCE):
        async with trio.open_nursery() as clients, trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[Started]) -> None:
                await serve(config, shutdown=shutdown, task_status=task_status)

            started = await nursery.start(run)
            yield Running(started, shutdown, clients)
            shutdown.set()


async def test_a_free_port_and_several_addresses() -> None:
    async with running(Config(bind=("127.0.0.1", "127.0.0.2"))) as server:
        hosts = [host for host, _ in server.started.addresses]
        ports = {port for _, port in server.started.addresses}
        assert hosts == ["127.0.0.1", "127.0.0.2"]
        assert len(ports) == 1
        first, second = await server.connect(0), await server.connect(1)
        assert await first.call("SET k v") == OK
        assert await second.call("GET k") == b"$1\r\nv\r\n"
        listed = (await second.call("CLIENT LIST")).decode()
        assert f"laddr=127.0.0.1:{ports.pop()}" in listed
        assert listed.count(" addr=127.0.0.") == 2
        assert server.started.keys == server.started.vectors == 0
        assert server.started.directory == ""
        assert server.started.recovery is None
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            OperatorError, match=rf"^cannot listen on 127\.0\.0\.1 port {port}: Address already in use"
        ):
            await serve(Config(port=port))


async def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(OperatorError, match=r"^cannot listen on 203\.0\.113\.1 port \d+: Cannot assign"):
        await serve(Config(bind=("127.0.0.1", "203.0.113.1"), port=0))


async def test_more_clients_than_allowed() -> None:
    async with running(Config(maxclients=2)) as server:
        clients = [await server.connect() for _ in range(2)]
        for client in clients:
            assert await client.call("PING") == PONG
        third = await server.connect()
        assert await third.ended() == b"-ERR max number of clients reached\r\n"
        assert await clients[0].call("CONFIG SET maxclients 3") == OK
        fourth = await server.connect()
        assert await fourth.call("PING") == PONG
        assert b"rejected_connections:1\r\n" in await fourth.call("INFO stats")
        assert await fourth.call("QUIT") == OK
        await fourth.ended()
        fifth = await server.connect()
        assert await fifth.call("PING") == PONG


async def test_an_error_in_a_command_ends_only_its_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(session: Session, arguments: list[bytes]) -> bytes:
        raise ZeroDivisionError("broken")

    monkeypatch.setitem(SPELLINGS, b"ECHO", attrs.evolve(COMMANDS[b"echo"], handler=broken))
    async with running(Config()) as server:
        client, other = await server.connect(), await server.connect()
        assert await other.call("SET k v") == OK
        await client.send("PING", "ECHO x", "PING")
        assert await client.reply() == PONG
        assert await client.reply() == b"-ERR internal error, see the log of the server\r\n"
        assert await client.reply() == PONG
        assert await other.call("GET k") == b"$1\r\nv\r\n"
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "a command of client" in record.getMessage()
    assert record.exc_info is not None


async def test_keys_lapse_by_themselves() -> None:
    async with running(Config()) as server:
        client = await server.connect()
        await client.call("SET a 1 PX 1")
        await client.call("SET b 1")
        while await client.call("DBSIZE") != b":1\r\n":
            await trio.lowlevel.checkpoint()
        assert b"expired_keys:1\r\n" in await client.call("INFO stats")


@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
async def test_a_long_transaction_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appendfsync: Literal["always", "everysec"]
) -> None:
    """Though the log looks meanwhile whether there is something to write."""
    monkeypatch.setattr(transactions, "TURN_NANOSECONDS", 0)
    reads = ["GET a", "STRLEN a"] * 20
    queued = ["SET a 1", *reads, "APPEND a 2", *reads]
    async with running(Config(dir=str(tmp_path), appendfsync=appendfsync)) as server:
        client = await server.connect()
        await client.send("MULTI", *queued, "EXEC", "SET b 1", "WAITAOF 1 0 0")
        replies = [await client.reply() for _ in range(len(queued) + 4)]
        assert replies[-3].endswith(b"$2\r\n12\r\n:2\r\n")
        assert replies[-2:] == [OK, b"*2\r\n:1\r\n:0\r\n"]
    async with running(Config(dir=str(tmp_path))) as server:
        client = await server.connect()
        assert await client.call("MGET a b") == b"*2\r\n$2\r\n12\r\n$1\r\n1\r\n"


async def test_shutdown_by_a_client() -> None:
    async with running(Config()) as server:
        client, other = await server.connect(), await server.connect()
        await other.call("PING")
        await client.send("PING", "SHUTDOWN")
        assert await client.ended() == PONG
        assert await other.ended() == b""


async def test_nothing_is_left_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with running(Config()) as server:
        client = await server.connect()
        await client.call("VNEW a 2")
        await client.call([b"VADD", b"a", b"x", vector(1, 2)])
        assert len(os.listdir(tmp_path)) == 1
        assert await client.call("VSAVE") == b"-ERR persistence not enabled; start with a data dir\r\n"
    assert os.listdir(tmp_path) == []


async def test_what_a_killed_server_left_without_a_directory_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with running(Config()) as server:
        [name] = os.listdir(tmp_path)
        used = tmp_path / name
        abandoned, other = tmp_path / "engram-abandoned", tmp_path / "engram-data"
        shutil.copytree(used, abandoned)
        os.close(lock_directory(other))
        async with running(Config()) as second:
            assert await (await second.connect()).call("PING") == PONG
            assert not abandoned.exists()
            assert used.exists()
        assert await (await server.connect()).call("PING") == PONG
    assert os.listdir(tmp_path) == [other.name]


async def test_graphs_are_built_after_the_folder_was_cleaned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with running(Config(seal_rows=16)) as server:
        client = await server.connect()
        await client.call("VNEW a 2")
        for number in range(60):
            if number in (20, 40):
                assert await client.call("VOPTIMIZE a") == b"+OK\r\n"
                [name] = os.listdir(tmp_path)
                # The server takes old segments away at the same time.
                while (tmp_path / name).exists():
                    shutil.rmtree(tmp_path / name, ignore_errors=True)
            await client.call([b"VADD", b"a", b"row-%d" % number, vector(number, 1)])
            nearest = await client.call([b"VSEARCH", b"a", vector(number, 1), b"1"])
            assert b"row-%d\r\n" % number in nearest
        assert await client.call("VOPTIMIZE a") == b"+OK\r\n"
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


async def test_what_was_acknowledged_is_there_again(tmp_path: Path) -> None:
    async with running(Config(dir=str(tmp_path))) as server:
        assert (server.started.keys, server.started.vectors) == (0, 0)
        client = await server.connect()
        await client.send("SET s 1", "APPEND s 23", "INCR n", "INCR n", "SET e x EX 1000", "VNEW v 2")
        await client.send([b"VADD", b"v", b"x", vector(1, 2)], [b"VADD", b"v", b"y", vector(3, 4)])
        await client.send("VDEL v y", "SET gone x", "DEL gone")
        for _ in range(11):
            assert not (await client.reply()).startswith(b"-")
    async with running(Config(dir=str(tmp_path))) as server:
        assert (server.started.keys, server.started.vectors) == (4, 1)
        assert server.started.directory == str(tmp_path)
        assert server.started.recovery is not None
        # What was added to the number together is one change.
        assert server.started.recovery.lsn == 10
        client = await server.connect()
        assert await client.call("GET s") == b"$3\r\n123\r\n"
        assert await client.call("INCR n") == b":3\r\n"
        assert int((await client.call("TTL e"))[1:]) in range(1, 1001)
        assert await client.call([b"VSEARCH", b"v", vector(1, 2), b"5"]) == b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n"
        assert await client.call("SAVE") == OK
        assert await client.call("VSAVE") == OK
        assert await client.call("INCR n") == b":4\r\n"
    async with running(Config(dir=str(tmp_path))) as server:
        client = await server.connect()
        assert await client.call("GET n") == b"$1\r\n4\r\n"
        assert await client.call([b"VSEARCH", b"v", vector(1, 2), b"5"]) == b"*2\r\n$1\r\nx\r\n$1\r\n0\r\n"


async def test_shutting_down_answers_what_was_asked(tmp_path: Path) -> None:
    async with running(Config(dir=str(tmp_path))) as server:
        clients = [await server.connect() for _ in range(8)]
        for number, client in enumerate(clients):
            await client.call("PING")
            await client.send(*(f"SET {number}.{each} x" for each in range(100)))
            while len(client.received) < len(OK):
                await trio.lowlevel.checkpoint()
        server.shutdown.set()
        replies = [await client.ended() for client in clients]
    assert set(replies) == {OK * 100}
    async with running(Config(dir=str(tmp_path))) as server:
        assert server.started.keys == 800


async def test_a_directory_serves_one_server(tmp_path: Path) -> None:
    async with running(Config(dir=str(tmp_path))):
        with pytest.raises(DirectoryInUseError, match="another server is using this directory"):
            await serve(Config(port=0, dir=str(tmp_path)))
    async with running(Config(dir=str(tmp_path))) as server:
        assert await (await server.connect()).call("PING") == PONG


async def test_a_directory_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OperatorError, match="cannot be used as data directory"):
        await serve(Config(port=0, dir=str(file)))


async def test_a_log_that_fails_ends_the_server_and_acknowledges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[Client] = []

    def fail(self: DiskFiles, descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def use() -> None:
        async with running(Config(dir=str(tmp_path))) as server:
            clients.extend([await server.connect(), await server.connect()])
            assert await clients[0].call("SET k v") == OK
            assert await clients[1].call("GET k") == b"$1\r\nv\r\n"
            monkeypatch.setattr(DiskFiles, "sync_data", fail)
            await clients[0].send("SET k w", "GET k")
            await clients[1].send("GET k")
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await use()
    assert caught.group_contains(LogFailureError, match="Input/output error")
    assert clients[0].received == b""
    assert bytes(clients[1].received) in (b"", b"$1\r\nv\r\n")


async def test_memory_that_does_not_suffice_to_recover_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, progress: Progress) -> None:
        progress.begin("reading snapshot-7", 10)
        raise MemoryError

    monkeypatch.setattr("engram.server.recover", fail)
    with pytest.raises(OperatorError, match=r"data: out of memory while reading snapshot-7"):
        await serve(Config(dir=str(tmp_path / "data"), port=0))


async def test_a_long_recovery_reports_and_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutdown = trio.Event()
    reported = threading.Event()

    class Reported(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reported.set()

    def work(*_: object, progress: Progress) -> None:
        progress.begin("reading the log", 5 << 20)
        progress.advance(2 << 20)
        assert reported.wait(PATIENCE)
        trio.from_thread.run_sync(shutdown.set)
        while True:
            progress.advance(0)

    monkeypatch.setattr("engram.server.recover", work)
    monkeypatch.setattr("engram.server._PROGRESS_INTERVAL", 0.01)
    monkeypatch.setattr(logger := logging.getLogger("engram"), "handlers", [*logger.handlers, Reported()])
    with pytest.raises(OperatorError, match=r"^ended while reading the log$"):
        await serve(Config(dir=str(tmp_path / "data"), port=0), shutdown=shutdown)
    assert caplog.records[0].getMessage() == "reading the log: 2 of 5 MiB"


async def test_a_cancelled_server_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            started = await nursery.start(lambda task_status: serve(Config(port=0), task_status=task_status))
            client = Client(await trio.open_tcp_stream(*started.addresses[0]))
            assert len(os.listdir(tmp_path)) == 1
            nursery.cancel_scope.cancel()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream(*started.addresses[0])
    await client.stream.aclose()


async def test_a_segment_that_cannot_be_removed_is_tried_again(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    removed = trio.Event()

    class Store:
        def __init__(self) -> None:
            self.tries: list[str] = []
            self.searched = iter([True, False, False, False])

        def is_open(self, segment_id: str) -> bool:
            return next(self.searched)

        def remove(self, segment_id: str) -> None:
            self.tries.append(segment_id)
            if len(self.tries) < 3:
                raise OSError(errno.EIO, "Input/output error")
            trio.from_thread.run_sync(removed.set)

    class State:
        def __init__(self) -> None:
            keys = [b"%d" % number for number in range(10_000)]
            order = ScanOrder(dict.fromkeys(keys))
            self.dropped: list[dict[bytes, Any] | list[Any]] = [dict.fromkeys(keys), *order.remains(), []]
            self.flushed: list[set[Any]] = []
            self.released_segments = ["a"]

    store, state = Store(), State()
    nursery.start_soon(_free, cast(Engine, state), cast(SegmentStore, store), None)
    await removed.wait()
    assert store.tries == ["a"] * 3
    assert (state.dropped, state.released_segments) == ([], [])


async def test_a_scan_that_a_restart_interrupts_returns_all_and_ends(tmp_path: Path) -> None:
    async def page(client: Client, command: str, cursor: bytes) -> tuple[bytes, list[bytes]]:
        words = (await client.call(f"{command} {cursor.decode()} COUNT 8")).split(b"\r\n")
        return words[2], words[5::2]

    scans: dict[str, tuple[bytes, list[bytes]]] = {}
    async with running(Config(dir=str(tmp_path))) as server:
        client = await server.connect()
        await client.call("VNEW v 1")
        for number in range(20):
            await client.call(f"SET {number} x")
            await client.send([b"VADD", b"v", b"%d" % number, vector(number)])
            await client.reply()
        # It comes in its old place, and is the last one where the log is read back.
        await client.call("DEL 0")
        await client.call("SET 0 x")
        for command in ("SCAN", "VSCAN v"):
            scans[command] = await page(client, command, b"0")
    async with running(Config(dir=str(tmp_path))) as server:
        client = await server.connect()
        for command, (cursor, found) in scans.items():
            pages = 0
            while cursor != b"0":
                cursor, more = await page(client, command, cursor)
                found += more
                pages += 1
            assert pages == 3
            assert {b"%d" % number for number in range(20)} <= set(found)


@pytest.mark.parametrize("living", [SetString(b"a", b"x", None, 9), SetString(b"a", b"x", 1 << 50, 9)])
async def test_living_keys_beyond_the_last_database_refuse_a_start(tmp_path: Path, living: SetString) -> None:
    (tmp_path / "segments").mkdir()
    log = LogMaker(tmp_path)
    log.write(map(encode, (living, SetString(b"b", b"x", 1, 9), SetString(b"c", b"x", 1, 11))))
    log.close()
    refusal = r"^database 9 holds keys, but `databases` is 2: set it to 10 or more$"
    with pytest.raises(OperatorError, match=refusal):
        await serve(Config(port=0, dir=str(tmp_path), databases=2))
    async with running(Config(dir=str(tmp_path), databases=10)):
        pass


async def test_keys_that_have_lapsed_beyond_the_last_database_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    log = LogMaker(tmp_path)
    log.write(map(encode, (SetString(b"a", b"x", 1, 9), SetString(b"b", b"x", None, 1))))
    log.close()
    async with running(Config(dir=str(tmp_path), databases=2)) as server:
        client = await server.connect()
        with trio.fail_after(PATIENCE):
            while b"expired_keys:1\r\n" not in await client.call("INFO stats"):
                await trio.lowlevel.checkpoint()
        assert b"db9" not in await client.call("INFO keyspace")
    assert read_back(tmp_path).operations[2:] == [(3, DeleteKeys((b"a",), 9))]


async def test_the_log_is_told_what_segments_out_of_use_take(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    told = trio.Event()
    releases: list[tuple[int, int]] = []

    class Store:
        def size(self, segment_id: str) -> int:
            return len(segment_id)

    class Index:
        segment_bytes = 7

    class State:
        def __init__(self) -> None:
            self.dropped: list[dict[bytes, int]] = []
            self.flushed: list[set[Any]] = []
            self.released_segments = ["a", "bcd"]
            self.indices = {1: Index(), 2: Index()}

    class Log:
        def release(self, size: int, used: int) -> None:
            releases.append((size, used))
            told.set()

    nursery.start_soon(_free, cast(Engine, State()), cast(SegmentStore, Store()), cast(Persistence, Log()))
    await told.wait()
    await trio.sleep(10.0)
    assert releases == [(4, 14)]


async def test_figures_for_prometheus_and_rates() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    async with running(Config(metrics_port=port)) as server:
        client = await server.connect()
        assert await client.call("SET a 1") == b"+OK\r\n"
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            text = b"".join([data async for data in stream])
        assert b'\nengram_command_duration_seconds_count{command="set"} 1.0\n' in text
        with trio.fail_after(PATIENCE):
            while b"instantaneous_ops_per_sec:0\r\n" in await client.call("INFO stats"):
                await trio.lowlevel.checkpoint()


async def test_a_port_for_figures_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        reason = f"cannot listen on 127.0.0.1 port {port} for metrics: Address already in use"
        with pytest.raises(OperatorError, match=reason):
            await serve(Config(port=0, metrics_port=port))
