"""The server: its nurseries, listeners, start-up and drain."""

from __future__ import annotations

import errno
import gc
import importlib
import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from engram.access import Access, open_access
from engram.child_process import module_command
from engram.collector import brief_collections, watch_new
from engram.commands.client import describe
from engram.commands.registry import COMMANDS
from engram.commands.session import Server, Session
from engram.commands.storage_errors import refusals_in_words
from engram.config import Config
from engram.database import RECORD_OVERHEAD, Database, clock
from engram.descriptors import RESERVED, DescriptorLimits, in_use, raise_limits
from engram.engine import Engine
from engram.errors import ChangeFailureError, OperatorError
from engram.exclusion import Exclusion
from engram.files import DiskFiles, Files
from engram.heap import Heap
from engram.index.builder import Builder, BuilderSettings
from engram.index.segment import SegmentStore
from engram.index.service import SearchService
from engram.index.vector_index import VectorIndex
from engram.index.verification import Verification
from engram.keyspace import Keyspace
from engram.kinds import KINDS
from engram.listeners import Listener, Reception, listening, tcp_port
from engram.log_lines import set_level
from engram.operations import InstallSegment
from engram.persistence import Persistence, PersistenceSettings, Recovery, lock_directory, recover
from engram.progress import Progress
from engram.scan_order import BLOCK_KEYS, first_serial
from engram.standard_streams import end_at_once
from engram.statistics import SAMPLE_INTERVAL
from engram.supervision import Job, keep_running, run_contained
from engram.temporary_folder import TemporaryFolder, remove_abandoned_folders

logger = logging.getLogger("engram")

# A thread waits this long for the interpreter lock before its holder is asked for it. A batch of
# searches takes the lock once a query, so the default of 5 ms would make it wait most of the time.
SWITCH_INTERVAL = 0.0005

# There are no threads that only help where there are as many that search as this.
_MOST_HELPED = 4
_IDLE_EXPIRY_INTERVAL = 0.1
# How long clients wait when serving them has failed as a whole.
_ROUNDS_PAUSE = 0.01
_PROGRESS_INTERVAL = 1.0
_FREE_SLICE = 4096
_TAKEN_APART_AT_ONCE = 64
# One sample in so many takes the memory, too.
_MEMORY_SAMPLES = 10
# What saying that there is no memory takes of it: at the end of a recovery, and of a server that was running.
_MEMORY_RESERVE = 16 << 20
_END_RESERVE = 1 << 20
_TOO_MANY_SEGMENTS = "the limit of open files is too low for what the data directory holds; see ulimit -n"


@attrs.frozen
class Started:
    """What `serve` reports once it listens.

    `addresses` are (host, port), for TLS in `tls_addresses`; `seconds` is what recovery took.
    """

    addresses: tuple[tuple[str, int], ...]
    directory: str
    keys: int
    vectors: int
    seconds: float
    recovery: Recovery | None
    tls_addresses: tuple[tuple[str, int], ...] = ()
    unixsocket: str = ""


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
        OperatorError: the address or the data directory cannot be used, the log has failed, or a change
            failed half-way.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    shutdown = trio.Event() if shutdown is None else shutdown
    began = time.monotonic()
    descriptors = raise_limits(config.maxclients)
    if in_use() >= descriptors.numbers:
        raise OperatorError(
            f"the limit of open files is too low: {RESERVED} are needed beside the clients; see ulimit -n"
        )
    if descriptors.numbers < config.maxclients:
        logger.warning("the limit of open files leaves room for %d clients only", descriptors.numbers)
    try:
        with listening(config) as listeners, _data_folder(config) as (directory, segments):
            await _serve(config, directory, segments, listeners, descriptors, shutdown, began, task_status)
    except BaseExceptionGroup as group:
        # The operator is told the reason, not the shape of the nurseries.
        matched, rest = group.split(OperatorError)
        if matched is None or rest is not None:
            raise
        raise first_error(matched) from group


def first_error(group: BaseExceptionGroup[OperatorError]) -> OperatorError:
    """The first error in a group of any depth: what the operator is told."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OperatorError)
    return error


@contextmanager
def _data_folder(config: Config) -> Iterator[tuple[Path | None, Path | Callable[[], Path]]]:
    """The data directory, locked, or None; and where segments are, which without a directory may change."""
    if config.dir:
        directory = Path(config.dir)
        lock = lock_directory(directory)
        try:
            yield directory, directory / "segments"
        finally:
            os.close(lock)
        return
    remove_abandoned_folders()
    try:
        temporary = TemporaryFolder()
    except OSError as error:
        raise OperatorError(f"no temporary folder can be made: {error.strerror}") from error
    try:
        yield None, temporary.segments
    finally:
        temporary.close()


def search_threads(config: Config) -> tuple[int, int, int]:
    """How many threads search, help them to walk several graphs at once, and make reads that take long."""
    cores = len(os.sched_getaffinity(0))
    # More that search would wait for each other, since a small search is mostly Python; a walk is not.
    threads = config.search_threads or max(1, cores // 2)
    return threads, max(0, min(cores, _MOST_HELPED) - threads), config.long_read_threads or threads


@attrs.define(eq=False)
class _Parts:
    """What a server is made of, beside clients. `server` is there once there may be some."""

    config: Config
    store: SegmentStore
    access: Access
    recovery: Recovery | None
    persistence: Persistence | None
    database: Database
    searches: SearchService
    verification: Verification
    builder: Builder = attrs.field(init=False)
    server: Server = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        config = self.config
        self.builder = Builder(
            self.store,
            self._install,
            settings=BuilderSettings(builds_at_once=config.builds_at_once),
            limit=lambda: config.max_unindexed_rows,
        )
        self.database.observe_indices(self.builder.consider)

    async def _install(self, index: VectorIndex, operation: InstallSegment) -> None:
        """Puts a segment into effect, when the log has room and nobody has the data alone."""
        persistence, exclusion = self.persistence, self.server.exclusion
        while True:
            if persistence is not None:
                # VINFO shows it to clients.
                with refusals_in_words():
                    await persistence.admit(RECORD_OVERHEAD + 64 * len(operation.replaces))
            if not exclusion.active:
                break
            await exclusion.wait()
        if not index.dropped:
            self.database.commit(operation)

    def reconfigure(self, reception: Reception) -> None:
        """Has everything follow the settings as they are now."""
        config, server, persistence = self.config, self.server, self.persistence
        # The only one that may refuse.
        reception.reload_certificates()
        if persistence is not None:
            _configure_log(persistence.settings, config)
            persistence.reconsider()
        self.searches.timeout = config.search_queue_timeout / 1000
        server.memory.reconfigure()
        self.builder.reconsider()
        set_level(config.loglevel)
        self.access.require(config.requirepass.encode("utf-8", "surrogateescape"))
        server.review_sessions()
        server.reconsider()

    def admit_clients(
        self, listeners: Sequence[Listener], shutdown: trio.Event, nursery: trio.Nursery, descriptors: int
    ) -> Reception:
        """Makes the server that clients meet, and what lets them in."""
        self.server = Server(
            config=self.config,
            database=self.database,
            storage=self.persistence,
            searches=self.searches,
            builder=self.builder,
            verification=self.verification,
            run_id=secrets.token_hex(20),
            started=time.time(),
            port=tcp_port(listeners),
            start_soon=lambda job: nursery.start_soon(run_contained, "what a command began", job),
            shut_down=shutdown.set,
            reconfigure=lambda: self.reconfigure(reception),
            access=self.access,
        )
        statistics = self.server.statistics
        self.database.on_failure = partial(
            _end, self.server.sessions, nursery.cancel_scope, [bytes(_END_RESERVE)]
        )
        self.builder.on_built = lambda seconds: statistics.builds.record(1, int(seconds * 1e9))
        if self.persistence is not None:
            self.persistence.on_sync = lambda seconds: statistics.syncs.record(1, int(seconds * 1e9))
        reception = Reception(self.server, listeners, descriptors)
        return reception

    def start_jobs(self, nursery: trio.Nursery) -> None:
        """Starts what goes on beside the clients."""
        server, database, heap = self.server, self.database, Heap()
        heap.tune()
        nursery.start_soon(partial(keep_running, "serving clients", server.rounds.run, pause=_ROUNDS_PAUSE))
        jobs: dict[str, Job] = {
            "verifying segments": self.verification.run,
            "deleting keys that lapsed": partial(_expire, database, server.exclusion),
            "freeing what was dropped": partial(_free, database.engine, self.store, self.persistence),
            "forgetting watches": partial(_forget_watches, database),
            "trimming the heap": heap.run,
            "sampling statistics": partial(_sample, server),
        }
        for what, job in jobs.items():
            nursery.start_soon(keep_running, what, job)

    def started(self, listeners: Sequence[Listener], seconds: float) -> Started:
        """What is reported once there may be clients."""
        engine = self.database.engine
        return Started(
            addresses=tuple(each.address for each in listeners if not (each.encrypted or each.path)),
            directory=self.config.dir,
            keys=sum(map(len, engine.keyspaces.values())),
            vectors=sum(map(len, engine.indices.values())),
            seconds=seconds,
            recovery=self.recovery,
            tls_addresses=tuple(each.address for each in listeners if each.encrypted),
            unixsocket=self.config.unixsocket,
        )


async def _prepare(
    config: Config,
    directory: Path | None,
    segments: Path | Callable[[], Path],
    descriptors: DescriptorLimits,
    shutdown: trio.Event,
) -> _Parts:
    """Reads users and data back. Raises OperatorError when that cannot be done."""
    files, progress = DiskFiles(), Progress()
    searches = SearchService(*search_threads(config), max_batch=config.search_batch)
    searches.timeout = config.search_queue_timeout / 1000
    store = SegmentStore(segments, files, searches.workers, progress, descriptors)
    engine = Engine(store, seal_rows=config.seal_rows, first_serial=first_serial(time.time_ns() // 1000))
    open_users = partial(open_access, COMMANDS, config, directory, describe=describe, warn=logger.warning)
    access = await trio.to_thread.run_sync(open_users)
    recovery: Recovery | None = None
    persistence: Persistence | None = None
    if directory is not None:
        recovery = await _recover(directory, files, engine, progress, shutdown)
        _require_databases(engine, config, clock())
        if in_use() >= descriptors.numbers:
            raise OperatorError(_TOO_MANY_SEGMENTS)
        command = _snapshot_command(directory)
        persistence = Persistence(directory, files, _log_settings(config), recovery, command)
    recovered = [installed.segment for index in engine.indices.values() for installed in index.segments]
    return _Parts(
        config=config,
        store=store,
        access=access,
        recovery=recovery,
        persistence=persistence,
        database=Database(engine, persistence),
        searches=searches,
        verification=Verification(store, recovered, engine.uses),
    )


async def _serve(
    config: Config,
    directory: Path | None,
    segments: Path | Callable[[], Path],
    listeners: list[Listener],
    descriptors: DescriptorLimits,
    shutdown: trio.Event,
    began: float,
    task_status: trio.TaskStatus[Started],
) -> None:
    parts = await _prepare(config, directory, segments, descriptors, shutdown)
    database, persistence, builder = parts.database, parts.persistence, parts.builder
    async with trio.open_nursery() as storage_nursery:
        if persistence is not None:
            await storage_nursery.start(persistence.run)
        async with _working(database) as work_nursery:
            await work_nursery.start(parts.searches.run)
            reception = parts.admit_clients(listeners, shutdown, work_nursery, descriptors.numbers)
            await work_nursery.start(builder.run)
            for index in database.engine.indices.values():
                builder.consider(index)
            parts.start_jobs(work_nursery)
            started = parts.started(listeners, time.monotonic() - began)
            if config.metrics_port:
                # Not imported above: a server starts the sooner without.
                metrics = importlib.import_module("engram.metrics")
                await work_nursery.start(metrics.serve, parts.server)
            with brief_collections():
                work_nursery.start_soon(keep_running, "watching what the collector will look at", watch_new)
                await reception.run(shutdown, partial(task_status.started, started))
            work_nursery.cancel_scope.cancel()
        # Nothing writes any more: the log is drained and synced, and its task ends.
        if persistence is not None:
            persistence.close()
    if database.failure is not None:
        raise database.failure


@asynccontextmanager
async def _working(database: Database) -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when a change fails half-way, which is then no error yet: what was changed
    before is still to be made durable."""
    try:
        async with trio.open_nursery() as nursery:
            database.on_failure = nursery.cancel_scope.cancel
            yield nursery
    except* ChangeFailureError:
        logger.debug("a task has met the failure of a change")


def _end(sessions: Mapping[int, Session], everything: trio.CancelScope, reserve: list[bytes]) -> None:
    """Ends the server: no client is sent anything more. `reserve` is memory for what that takes."""
    reserve.clear()
    try:
        everything.cancel()
        for session in list(sessions.values()):
            session.close()
    except BaseException:
        # Not even that can be done. What was acknowledged is as durable as it was promised to be.
        end_at_once(b"a change failed half-way, and the server ends at once")


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
            # Or all of it would be looked at next.
            gc.freeze()
            gc.enable()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt)
        nursery.start_soon(_report_progress, progress)
        try:
            recovery = await trio.to_thread.run_sync(read_back)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise OperatorError(_TOO_MANY_SEGMENTS) from error
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


def _require_databases(engine: Engine, config: Config, now: int) -> None:
    """Raises OperatorError when a database has keys that no client could select.

    Those that have lapsed by `now` do not count: they are deleted like all others.
    """
    beyond = [
        number
        for number, keyspace in engine.keyspaces.items()
        if number >= config.databases and _has_living_keys(keyspace, now)
    ]
    if beyond:
        most = max(beyond)
        raise OperatorError(
            f"database {most} holds keys, but `databases` is {config.databases}: set it to {most + 1} or more"
        )


def _has_living_keys(keyspace: Keyspace[Any], now: int) -> bool:
    """Whether a key lapses later than `now`, or never; takes time in proportion to those that lapse."""
    expiries = keyspace.expiries
    return len(keyspace) > len(expiries) or max(expiries.values(), default=now) > now


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
        return module_command("engram.snapshotter", str(folder), str(last_file), *KINDS.modules)

    return command


async def _sample(server: Server) -> None:
    """Notes how the counters grow, and now and then, for it takes longer, how much memory is taken."""
    statistics = server.statistics
    for number in itertools.count():
        statistics.sample(trio.current_time())
        if number % _MEMORY_SAMPLES == 0:
            statistics.peak_memory = max(statistics.peak_memory, server.memory.used())
        await trio.sleep(SAMPLE_INTERVAL)


async def _expire(database: Database, exclusion: Exclusion) -> None:
    """Deletes keys soon after they lapse, but none between two turns of a client that has the data alone."""
    while True:
        next_expiry = database.next_expiry()
        pause = _IDLE_EXPIRY_INTERVAL
        # What lapsed before and is still there waits for room in the log.
        if next_expiry is not None and next_expiry > database.now():
            pause = min(pause, max(0.001, (next_expiry - database.now()) / 1000))
        await trio.sleep(pause)
        await exclusion.wait()
        while database.expire_due():
            await trio.lowlevel.checkpoint()
            await exclusion.wait()


async def _forget_watches(database: Database) -> None:
    """Forgets in slices what was watched by clients that no longer do."""
    while True:
        await trio.sleep(_IDLE_EXPIRY_INTERVAL)
        while database.watches.clear_up():
            await trio.lowlevel.checkpoint()


async def _free(engine: Engine, store: SegmentStore, persistence: Persistence | None) -> None:
    """Frees what was dropped, in slices: freeing a million keys at once would hold every client up.

    In a temporary folder the files of segments go once nothing refers to them; otherwise the persistence task
    knows when they are no longer needed, and is told how much there is to gain.
    """
    while True:
        await trio.sleep(_IDLE_EXPIRY_INTERVAL)
        while _free_some(engine):
            await trio.lowlevel.checkpoint()
        released, engine.released_segments = engine.released_segments, []
        try:
            if persistence is not None and released:
                size = await trio.to_thread.run_sync(_sizes, store, released)
                persistence.release(size, sum(index.segment_bytes for index in engine.indices.values()))
                released = []
            while released:
                await _remove_released(engine, store, released.pop())
        finally:
            # What has not been done is for the next time.
            engine.released_segments += released


def _free_some(engine: Engine) -> bool:
    """Frees a slice of what was dropped; returns False when there is nothing."""
    if not engine.dropped:
        if not engine.flushed:
            return False
        # No table holds these any more: each is freed here, unless somebody still works on it.
        engine.take_apart(_TAKEN_APART_AT_ONCE)
        return True
    room = _FREE_SLICE
    while engine.dropped and room > 0:
        collection = engine.dropped[-1]
        if isinstance(collection, list):
            # Blocks of keys.
            blocks = min(max(1, room // BLOCK_KEYS), len(collection))
            del collection[len(collection) - blocks :]
            room -= blocks * BLOCK_KEYS
        else:
            take = collection.popitem if isinstance(collection, dict) else collection.pop
            freed = min(room, len(collection))
            for _ in range(freed):
                take()
            room -= freed + 1
        if not collection:
            engine.dropped.pop()
    return True


def _sizes(store: SegmentStore, segment_ids: Sequence[str]) -> int:
    return sum(map(store.size, segment_ids))


async def _remove_released(engine: Engine, store: SegmentStore, segment_id: str) -> None:
    """Removes the files of a segment, or leaves it for the next time."""
    if store.is_open(segment_id):
        engine.released_segments.append(segment_id)
        return
    try:
        await trio.to_thread.run_sync(store.remove, segment_id)
    except (OSError, RuntimeError) as error:
        logger.warning("cannot remove segment %s, will try again: %s", segment_id, error)
        engine.released_segments.append(segment_id)
