"""The server: its nurseries, listeners, start-up and drain."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import resource
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from engram.commands.session import Server
from engram.config import Config
from engram.connection import Connection
from engram.database import RECORD_OVERHEAD, Database
from engram.engine import Engine
from engram.errors import OperatorError
from engram.files import DiskFiles, Files
from engram.index.builder import Builder, BuilderSettings
from engram.index.segment import SegmentStore
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex
from engram.index.verification import Verification
from engram.operations import InstallSegment
from engram.persistence import Persistence, PersistenceSettings, Recovery, lock_directory, recover
from engram.progress import Progress
from engram.protocol import replies
from engram.transport import SocketTransport

logger = logging.getLogger("engram")

MAXCLIENTS_REACHED = replies.error("ERR max number of clients reached")

# A thread waits this long for the interpreter lock before its holder is asked for it. A batch of
# searches takes the lock once a query, so the default of 5 ms would make it wait most of the time.
SWITCH_INTERVAL = 0.0005

# From <malloc.h>. Blocks of MMAP_THRESHOLD bytes are mapped one by one, and given back when they are freed;
# of smaller ones, TRIM_THRESHOLD is kept, as a batch of searches takes and frees a few hundred KiB each time.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD = 1 << 20
TRIM_THRESHOLD = 8 << 20

# Descriptors kept for the log, segments and child processes, whatever number of clients comes.
_RESERVED_DESCRIPTORS = 128

# There are no threads that only help where there are as many that search as this.
_MOST_HELPED = 4
_IDLE_EXPIRY_INTERVAL = 0.1
_PROGRESS_INTERVAL = 1.0
_TEMPORARY_PREFIX = "engram-"
# A file in a folder that no server needs once it has ended.
_TEMPORARY_MARK = "TEMPORARY"
_FREE_SLICE = 4096
_MEMORY_RESERVE = 16 << 20


@attrs.frozen
class Started:
    """What `serve` reports once it listens. `addresses` are (host, port); `seconds` is what recovery took."""

    addresses: tuple[tuple[str, int], ...]
    directory: str
    keys: int
    vectors: int
    seconds: float
    recovery: Recovery | None


async def serve(
    config: Config,
    *,
    shutdown: trio.Event | None = None,
    task_status: trio.TaskStatus[Started] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Runs a server until `shutdown` is set or a client asks for it.

    Reports a `Started` once it accepts connections. Cancelling it ends it at once: clients get no last
    replies, and what was not yet acknowledged may be lost.

    Raises:
        OperatorError: the address or the data directory cannot be used, or the log has failed.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    shutdown = trio.Event() if shutdown is None else shutdown
    began = time.monotonic()
    most_clients = _raise_descriptor_limit() - _RESERVED_DESCRIPTORS
    if most_clients < 1:
        raise OperatorError(
            f"the limit of open files is too low: {_RESERVED_DESCRIPTORS} are needed beside the clients;"
            " see ulimit -n"
        )
    if most_clients < config.maxclients:
        logger.warning("the limit of open files leaves room for %d clients only", most_clients)
    listeners = _listen(config)
    try:
        with _data_folder(config) as folder:
            await _serve(config, folder, listeners, most_clients, shutdown, began, task_status)
    except BaseExceptionGroup as group:
        # The operator is told the reason, not the shape of the nurseries.
        matched, rest = group.split(OperatorError)
        if matched is None or rest is not None:
            raise
        raise first_error(matched) from group
    finally:
        for listener in listeners:
            listener.close()


def first_error(group: BaseExceptionGroup[OperatorError]) -> OperatorError:
    """The first error in a group of any depth: what the operator is told."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OperatorError)
    return error


@contextmanager
def _data_folder(config: Config) -> Iterator[Path]:
    """The data directory, locked; without one a temporary folder that goes with the process."""
    if not config.dir:
        _remove_abandoned_folders()
        with (
            tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, ignore_cleanup_errors=True) as temporary,
            _locked(Path(temporary)),
        ):
            # Whoever sees the mark without a lock may remove the folder.
            (Path(temporary) / _TEMPORARY_MARK).touch()
            yield Path(temporary)
        return
    with _locked(Path(config.dir)):
        yield Path(config.dir)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = lock_directory(folder)
    try:
        yield
    finally:
        os.close(lock)


def _remove_abandoned_folders() -> None:
    """Removes temporary folders of servers that were killed: those with the mark that nobody has locked."""
    for mark in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}*/{_TEMPORARY_MARK}"):
        try:
            with _locked(mark.parent):
                shutil.rmtree(mark.parent)
        except (OperatorError, OSError) as error:
            logger.debug("%s stays: %s", mark.parent, error)


def _listen(config: Config) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    port = config.port
    for host in config.bind:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.create_server(address, family=family, backlog=config.tcp_backlog)
        except OSError as error:
            for other in listeners:
                other.close()
            unresolved = isinstance(error, socket.gaierror)
            reason = error.strerror if unresolved else os.strerror(error.errno or 0)
            raise OperatorError(f"cannot listen on {host} port {port}: {reason}") from error
        listener.setblocking(False)
        listeners.append(listener)
        # All addresses share the port that the first one was given.
        port = listener.getsockname()[1]
    return listeners


def _raise_descriptor_limit() -> int:
    """Raises the limit of open files as far as this process may; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def search_threads(config: Config) -> tuple[int, int]:
    """How many threads search, and how many help them to walk several graphs at once."""
    cores = len(os.sched_getaffinity(0))
    # More that search would wait for each other, since a small search is mostly Python; a walk is not.
    threads = config.search_threads or max(1, cores // 2)
    return threads, max(0, min(cores, _MOST_HELPED) - threads)


async def _serve(
    config: Config,
    folder: Path,
    listeners: list[socket.socket],
    most_clients: int,
    shutdown: trio.Event,
    began: float,
    task_status: trio.TaskStatus[Started],
) -> None:
    files = DiskFiles()
    progress = Progress()
    threads, helpers = search_threads(config)
    store = SegmentStore(folder / "segments", files, threads + helpers, progress)
    engine = Engine(store, seal_rows=config.seal_rows)
    recovery: Recovery | None = None
    persistence: Persistence | None = None
    if config.dir:
        recovery = await _recover(folder, files, engine, progress, shutdown)
        persistence = Persistence(folder, files, _log_settings(config), recovery, _snapshot_command(folder))
    database = Database(engine, persistence)
    verification = Verification(
        store, [installed.segment for index in engine.indices.values() for installed in index.segments]
    )

    async def install(index: VectorIndex, operation: InstallSegment) -> None:
        if persistence is not None:
            await persistence.admit(RECORD_OVERHEAD + 64 * len(operation.replaces))
        if not index.dropped:
            database.commit(operation)
            database.changed(index)

    searches = SearchService(threads, config.search_batch, helpers)
    builder = Builder(store, install, settings=BuilderSettings(builds_at_once=config.builds_at_once))
    database.changed = builder.consider

    def reconfigure() -> None:
        if persistence is not None:
            _configure_log(persistence.settings, config)

    async with trio.open_nursery() as storage_nursery:
        if persistence is not None:
            await storage_nursery.start(persistence.run)
        async with trio.open_nursery() as work_nursery:
            await work_nursery.start(searches.run)
            await work_nursery.start(builder.run)
            for index in engine.indices.values():
                builder.consider(index)
            work_nursery.start_soon(verification.run)
            work_nursery.start_soon(_expire, database)
            work_nursery.start_soon(_free, engine, store, persistence)
            server = Server(
                config=config,
                database=database,
                storage=persistence,
                searches=searches,
                builder=builder,
                verification=verification,
                run_id=secrets.token_hex(20),
                started=time.time(),
                port=listeners[0].getsockname()[1],
                start_soon=work_nursery.start_soon,
                shut_down=shutdown.set,
                reconfigure=reconfigure,
            )
            _tune_process()
            started = Started(
                addresses=tuple(listener.getsockname()[:2] for listener in listeners),
                directory=config.dir,
                keys=len(engine.keyspace),
                vectors=sum(map(len, engine.indices.values())),
                seconds=time.monotonic() - began,
                recovery=recovery,
            )
            work_nursery.start_soon(server.departures.run)
            ready = partial(task_status.started, started)
            await _serve_clients(server, listeners, most_clients, shutdown, ready)
            work_nursery.cancel_scope.cancel()
        # Nothing writes any more: the log is drained and synced, and its task ends.
        if persistence is not None:
            persistence.close()


async def _recover(
    folder: Path, files: Files, engine: Engine, progress: Progress, shutdown: trio.Event
) -> Recovery:
    async def interrupt() -> None:
        await shutdown.wait()
        progress.interrupted = True

    def read_back() -> Recovery:
        # To say that there is no memory takes some.
        reserve = bytes(_MEMORY_RESERVE)
        # Nothing of what is made now is garbage, and there is much of it.
        gc.disable()
        try:
            return recover(folder, files, engine.restore, engine.apply, progress=progress)
        except MemoryError:
            del reserve
            raise
        finally:
            gc.enable()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt)
        nursery.start_soon(_report_progress, progress)
        try:
            recovery = await trio.to_thread.run_sync(read_back)
        except OSError as error:
            raise OperatorError(
                f"{error.filename or folder}: cannot be read back: {error.strerror}"
            ) from error
        except MemoryError as error:
            raise OperatorError(
                f"{folder}: out of memory while {progress.doing}: it needs more than this machine, or the"
                " limit on this process, allows"
            ) from error
        nursery.cancel_scope.cancel()
    return recovery


async def _report_progress(progress: Progress) -> None:
    while True:
        await trio.sleep(_PROGRESS_INTERVAL)
        if progress.doing:
            logger.warning("%s: %d of %d MiB", progress.doing, progress.done >> 20, progress.total >> 20)


async def _serve_clients(
    server: Server,
    listeners: list[socket.socket],
    most_clients: int,
    shutdown: trio.Event,
    ready: Callable[[], None],
) -> None:
    """Accepts clients until `shutdown`, then lets each have its last replies."""
    connections: set[Connection] = set()
    async with trio.open_nursery() as client_nursery:
        async with trio.open_nursery() as front_nursery:
            for listener in listeners:
                front_nursery.start_soon(_accept, listener, server, most_clients, connections, client_nursery)
            ready()
            await shutdown.wait()
            front_nursery.cancel_scope.cancel()
        for connection in connections:
            connection.finish()


def _tune_process() -> None:
    # Left alone, glibc takes ever larger blocks from its heap, which seldom gives them back.
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    # What was recovered lives for long: it need not be looked at again and again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _log_settings(config: Config) -> PersistenceSettings:
    settings = PersistenceSettings(log_file_size=config.log_file_size)
    _configure_log(settings, config)
    return settings


def _configure_log(settings: PersistenceSettings, config: Config) -> None:
    settings.appendfsync = config.appendfsync
    settings.queue_bytes = config.log_queue_size
    settings.snapshot_log_size = config.snapshot_log_size
    settings.snapshot_log_percentage = config.snapshot_log_percentage


def _snapshot_command(folder: Path) -> Callable[[int], list[str]]:
    def command(last_file: int) -> list[str]:
        return [sys.executable, "-m", "engram.snapshotter", str(folder), str(last_file)]

    return command


async def _accept(
    listener: socket.socket,
    server: Server,
    most_clients: int,
    connections: set[Connection],
    nursery: trio.Nursery,
) -> None:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            client, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            # Out of descriptors or memory, or, as accept(2) has it, a network error of the new connection.
            if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            logger.warning("cannot accept a connection: %s", error.strerror)
            await trio.sleep(0.1)
            continue
        server.statistics.connections_received += 1
        if len(connections) >= min(server.config.maxclients, most_clients):
            server.statistics.connections_rejected += 1
            with client:
                client.setblocking(False)
                _send_and_forget(client, MAXCLIENTS_REACHED)
            continue
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(
            SocketTransport(client),
            server,
            address=_address(peer),
            local_address=_address(client.getsockname()),
            descriptor=client.fileno(),
        )
        connections.add(connection)
        nursery.start_soon(_attend, connection, connections)


def _send_and_forget(client: socket.socket, data: bytes) -> None:
    try:
        client.send(data)
    except OSError as error:
        logger.debug("a rejected client left at once: %s", error)


def _address(name: tuple[str, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _attend(connection: Connection, connections: set[Connection]) -> None:
    """Serves one client; what goes wrong there ends that client alone."""
    try:
        await connection.serve()
    except Exception:
        logger.exception("client %s ended by an error", connection.session.address)
    finally:
        connections.discard(connection)


async def _expire(database: Database) -> None:
    """Deletes keys soon after they lapse."""
    while True:
        next_expiry = database.engine.keyspace.next_expiry()
        pause = _IDLE_EXPIRY_INTERVAL
        if next_expiry is not None:
            pause = min(pause, max(0.001, (next_expiry - database.now()) / 1000))
        await trio.sleep(pause)
        while database.expire_due():
            await trio.lowlevel.checkpoint()


async def _free(engine: Engine, store: SegmentStore, persistence: Persistence | None) -> None:
    """Frees what was dropped, in slices: freeing a million keys at once would hold every client up.

    In a temporary folder the files of segments go once nothing refers to them; otherwise the persistence task
    knows when they are no longer needed, and is told how much there is to gain.
    """
    while True:
        await trio.sleep(_IDLE_EXPIRY_INTERVAL)
        while engine.dropped:
            mapping = engine.dropped[-1]
            for _ in range(min(_FREE_SLICE, len(mapping))):
                mapping.popitem()
            if not mapping:
                engine.dropped.pop()
            await trio.lowlevel.checkpoint()
        released, engine.released_segments = engine.released_segments, []
        if persistence is not None and released:
            size = await trio.to_thread.run_sync(_sizes, store, released)
            persistence.release(size, sum(index.segment_bytes for index in engine.indices.values()))
        elif persistence is None:
            for segment_id in released:
                await _remove_released(engine, store, segment_id)


def _sizes(store: SegmentStore, segment_ids: Sequence[str]) -> int:
    return sum(map(store.size, segment_ids))


async def _remove_released(engine: Engine, store: SegmentStore, segment_id: str) -> None:
    """Removes the files of a segment, or leaves it for the next time."""
    if store.is_open(segment_id):
        engine.released_segments.append(segment_id)
        return
    try:
        await trio.to_thread.run_sync(store.remove, segment_id)
    except OSError as error:
        logger.warning("cannot remove segment %s, will try again: %s", segment_id, error)
        engine.released_segments.append(segment_id)
