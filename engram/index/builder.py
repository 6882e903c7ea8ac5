"""Building segments in the background, each in a process of its own."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from subprocess import PIPE
from typing import TypeVar

import attrs
import msgspec
import numpy as np
import trio

from engram.child_process import module_command, module_environment
from engram.errors import DamagedDataError, EngramError, LogFailureError, one_line
from engram.index.build_process import CERTAIN_FAILURE, BuildJob, BuildResult
from engram.index.head import ALIVE
from engram.index.pace import Pace, Wait
from engram.index.row_columns import RowSource
from engram.index.segment import SegmentStore
from engram.index.texts import Positions
from engram.index.vector_index import Plan, VectorIndex
from engram.operations import InstallSegment
from engram.supervision import keep_running, run_contained

logger = logging.getLogger(__name__)

_ERROR_BYTES = 4096
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)

T = TypeVar("T")

Install = Callable[[VectorIndex, InstallSegment], Awaitable[None]]


# The quantization that has the least to go wrong.
_PLAIN = "f32"


class BuildError(EngramError):
    """The process that builds a segment failed; `certain` says that it would again with the same rows."""

    def __init__(self, reason: str, *, certain: bool = False) -> None:
        super().__init__(reason)
        self.certain = certain


@attrs.frozen
class BuilderSettings:
    """`command` is the process that builds; times are in seconds.

    The time to a retry doubles up to the longest. An index that cannot be built at all is tried again after
    `hopeless_retry`.
    """

    builds_at_once: int = 1
    first_retry: float = 1.0
    longest_retry: float = 60.0
    hopeless_retry: float = 3600.0
    command: tuple[str, ...] = tuple(module_command("engram.index.build_process"))


@attrs.define(eq=False)
class _Optimization:
    """That an index should be one segment; `error` is empty once it is, or is dropped."""

    done: trio.Event = attrs.Factory(trio.Event)
    error: str = "the server is shutting down"


@attrs.define(eq=False)
class _Failures:
    """Those of an index since its last build that was done.

    `certain` is how many of the last ones would come again and were the same; with two in both ways of
    building it is `hopeless`.
    """

    count: int = 0
    error: str = ""
    certain: int = 0
    hopeless: bool = False


class Builder:
    """Builds what indices need, the one that has waited longest first.

    `install` logs and applies the operation that puts a finished, durable segment in its place; it may
    find that the index has been dropped, and then does nothing. A build that fails is tried again later. One
    that has failed twice in the same way, by nothing but its rows, is tried with float32 in the graph; when
    that fails so, too, the rows stay without a graph, and nobody waits for it. Segments that are damaged, or
    cannot be merged, stay as they are, and what else there is to build is built.

    `limit` tells how many rows of an index may be without a graph before more of them have to wait.

    Counters: `running` and `waiting` builds, `builds` done, `failures`, and the `last_error`, in one line.
    `on_built` is called after each that is done, with the seconds that it took.
    """

    def __init__(
        self,
        store: SegmentStore,
        install: Install,
        *,
        settings: BuilderSettings | None = None,
        limit: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self._store = store
        self._install = install
        self._settings = settings or BuilderSettings()
        self._waiting: deque[VectorIndex] = deque()
        # Ids of the indices that wait, are built for, or failed and will wait again.
        self._known: set[int] = set()
        self._failed: dict[int, _Failures] = {}
        # Those whose graphs hold float32 whatever was asked for.
        self._plain: set[int] = set()
        self._building: dict[int, trio.CancelScope] = {}
        self._retrying: dict[int, trio.CancelScope] = {}
        # Asked for and not begun.
        self._optimizations: dict[int, _Optimization] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self._limiter = trio.CapacityLimiter(self._settings.builds_at_once)
        self._pace = Pace(limit)
        self.running = 0
        self.builds = 0
        self.failures = 0
        self.last_error: str | None = None
        self.on_built: Callable[[float], None] = lambda seconds: None

    @property
    def waiting(self) -> int:
        """How many indices wait for a build."""
        return len(self._waiting)

    @property
    def rate(self) -> float:
        """Rows a second that get a graph while rows wait for one."""
        return self._pace.rate

    def consider(self, index: VectorIndex) -> None:
        """Queues an index if it needs a build; to be called after each of its changes."""
        needed = index.needs_maintenance and not index.dropped
        # Those who wait for an index that has been dropped are let go of when its turn comes.
        if (needed or index.id in self._optimizations) and index.id not in self._known:
            self._known.add(index.id)
            index.on_drop = partial(self._forget, index.id)
            self._waiting.append(index)
            self._idle.unpark()

    async def optimize(self, index: VectorIndex) -> None:
        """Makes one segment of all rows there are now, ahead of other builds of the index.

        Rows that come meanwhile stay beside it. It waits for a build of the index that is under way; those
        who wait for one that has not begun share it. Without anything to do, or once the index is
        dropped, it returns.

        Raises:
            BuildError: it failed; it is not tried again.
        """
        if index.optimized or index.dropped:
            await trio.lowlevel.checkpoint()
            return
        optimization = self._optimizations.setdefault(index.id, _Optimization())
        if index.id in self._retrying:
            self._retrying[index.id].cancel()
        self.consider(index)
        await optimization.done.wait()
        if optimization.error:
            raise BuildError(optimization.error)

    def admit(self, index: VectorIndex, rows: int = 1) -> Wait | None:
        """What waits until so many rows may be added to an index; None when they may be now.

        Rows wait when too many have no graph, and waiting helps: see `pace`.
        """
        if index.dropped or self._is_hopeless(index.id):
            return None
        index.on_drop = partial(self._forget, index.id)
        return self._pace.admit(index, rows)

    def reconsider(self) -> None:
        """Lets those go on who need not wait any more; to be called when the limit has changed."""
        self._pace.review_all()

    def last_error_of(self, index: VectorIndex) -> str:
        """Why the last build of an index failed, in one line; empty when it did not."""
        failed = self._failed.get(index.id)
        return "" if failed is None else failed.error

    def _is_hopeless(self, index_id: int) -> bool:
        failed = self._failed.get(index_id)
        return failed is not None and failed.hopeless

    def _forget(self, index_id: int) -> None:
        """Of an index that has been dropped nothing is kept, and nobody waits for it."""
        self._pace.give_up(index_id)
        self._failed.pop(index_id, None)
        self._plain.discard(index_id)
        for scopes in (self._building, self._retrying):
            if index_id in scopes:
                scopes[index_id].cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Builds until cancelled; a process under way is then killed, and its folder removed."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._settings.builds_at_once):
                    nursery.start_soon(keep_running, "building graphs", partial(self._work, nursery))
                task_status.started()
        finally:
            for optimization in self._optimizations.values():
                optimization.done.set()

    async def _work(self, nursery: trio.Nursery) -> None:
        while True:
            if not self._waiting:
                await self._idle.park()
                continue
            # Only the callee holds the index: one that is dropped is let go of before a worker idles.
            await self._take_on(self._waiting.popleft(), nursery)

    async def _take_on(self, index: VectorIndex, nursery: trio.Nursery) -> None:
        try:
            await self._work_on(index, nursery)
        except Exception:
            # Something beside the build has failed; the index still wants it.
            self._known.discard(index.id)
            self.consider(index)
            raise

    async def _work_on(self, index: VectorIndex, nursery: trio.Nursery) -> None:
        self.running += 1
        try:
            await self._build_next(index)
        except LogFailureError:
            raise
        except Exception as error:
            # Whatever it was: rows without a graph are still found, only slower.
            if not index.dropped:
                pause = self._fail(index, error)
                nursery.start_soon(
                    run_contained, "a pause of the builder", partial(self._retry, index, pause)
                )
                return
        finally:
            self.running -= 1
        self._failed.pop(index.id, None)
        self._known.discard(index.id)
        self.consider(index)

    def _fail(self, index: VectorIndex, error: Exception) -> float:
        """Notes that a build has failed; returns in how many seconds it is tried again."""
        settings, text = self._settings, one_line(error)
        logger.warning("building a segment of index %d failed: %s", index.id, text)
        self.failures += 1
        self.last_error = text
        failed = self._failed.setdefault(index.id, _Failures())
        certain = isinstance(error, BuildError) and error.certain
        failed.certain = (failed.certain if failed.error == text else 0) + 1 if certain else 0
        failed.count += 1
        failed.error = text
        if failed.certain > 1:
            if self._is_certain(index, error):
                failed.hopeless = True
                self._pace.give_up(index.id)
                return settings.hopeless_retry
            self._plain.add(index.id)
            failed.certain = 0
        return min(settings.longest_retry, settings.first_retry * 2.0 ** (failed.count - 1))

    def _is_certain(self, index: VectorIndex, error: Exception) -> bool:
        """Whether a build would fail again, however it is tried."""
        plain = index.id in self._plain or index.parameters.quantization == _PLAIN
        return plain and isinstance(error, BuildError) and error.certain

    async def _retry(self, index: VectorIndex, pause: float) -> None:
        try:
            with trio.CancelScope() as self._retrying[index.id]:
                # It may have been dropped before this task had its first turn.
                if not index.dropped:
                    await trio.sleep(pause)
        finally:
            del self._retrying[index.id]
            self._known.discard(index.id)
            self.consider(index)

    async def _build_next(self, index: VectorIndex) -> None:
        optimization = self._optimizations.pop(index.id, None)
        plan = None
        asked_for = optimization is not None
        if not index.dropped:
            plan = index.plan_optimization() if asked_for else index.plan()
        optimization = optimization or _Optimization()
        try:
            if plan is not None:
                with trio.CancelScope() as self._building[index.id]:
                    await self._build(index, plan)
            optimization.error = ""
        except Exception as error:
            optimization.error = one_line(error)
            if isinstance(error, DamagedDataError):
                index.leave_unmerged((error.path.parent.name,))
            elif plan is not None and not asked_for and self._is_certain(index, error):
                index.leave_unmerged([source.id for source in plan.sources])
            raise
        finally:
            self._building.pop(index.id, None)
            optimization.done.set()

    async def _build(self, index: VectorIndex, plan: Plan) -> None:
        began = trio.current_time()
        name = secrets.token_hex(8)
        try:
            rows = await self._in_thread(lambda: self._write_rows(name, plan))
            checksum = 0
            if rows:
                checksum = await self._run_process(index, name)
                self._store.adopt(await self._in_thread(lambda: self._store.open(name, checksum)))
                head_rows = 0 if plan.sources else sum(count for _, count in plan.chunks)
                self._pace.record(head_rows, trio.current_time() - began, waited=index.seal_wanted)
            if not index.dropped:
                replaced = tuple(source.id for source in plan.sources)
                await self._install(
                    index,
                    InstallSegment(index.id, name if rows else "", checksum, plan.through, replaced),
                )
                self._pace.review(index.id)
                self.builds += 1
                self.on_built(trio.current_time() - began)
        finally:
            self._store.discard(name)
            if all(installed.id != name for installed in index.segments):
                with trio.CancelScope(shield=True):
                    await self._in_thread(lambda: self._store.remove(name))

    def _write_rows(self, name: str, plan: Plan) -> int:
        rows = live_rows(plan)
        for source, (_, wanted) in zip(plan.sources, rows, strict=False):
            # New checksums must not vouch for damage.
            if len(wanted):
                self._store.verify(source.segment)
        # Merging leaves less open than before.
        if not plan.sources:
            self._store.check_descriptors()
        return self._store.write_rows(name, rows)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(function, limiter=self._limiter)

    async def _run_process(self, index: VectorIndex, name: str) -> int:
        """Has the graph built; returns the checksum of the finished folder."""
        parameters = index.parameters
        if index.id in self._plain:
            parameters = attrs.evolve(parameters, quantization=_PLAIN)
        job = BuildJob(str(self._store.folder), name, index.id, **attrs.asdict(parameters))
        output, errors = bytearray(), bytearray()
        process = await trio.lowlevel.open_process(
            list(self._settings.command),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            # usearch makes its file for all to read.
            umask=0o077,
            env={**module_environment(), "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_collect, process.stdout, output)
                nursery.start_soon(_collect, process.stderr, errors)
                nursery.start_soon(_send, process.stdin, msgspec.json.encode(job) + b"\n")
                await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    await stream.aclose()
        if code := process.returncode:
            text = errors[-_ERROR_BYTES:].decode(errors="replace").strip()
            logger.debug("the process that builds segment %s of index %d: %s", name, index.id, text)
            reason = (text.splitlines() or ["it has not said why"])[-1]
            # Whoever kills it, such as the system without memory, has reasons of his own.
            certain = code == CERTAIN_FAILURE or -code in _CRASHES
            raise BuildError(f"the building process ended with code {code}: {reason}", certain=certain)
        return msgspec.json.decode(output, type=BuildResult).checksum


async def _collect(stream: trio.abc.ReceiveStream, collected: bytearray) -> None:
    async for data in stream:
        collected += data


async def _send(stream: trio.abc.SendStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        # Its exit code tells. If it has not ended, it does once nothing more can come.
        await stream.aclose()


def live_rows(plan: Plan) -> list[tuple[RowSource, Positions]]:
    """The rows that live by now; those that die later, installing the segment finds."""
    rows: list[tuple[RowSource, Positions]] = [
        (source.segment, np.flatnonzero(source.deaths == ALIVE)) for source in plan.sources
    ]
    rows += [(chunk, np.flatnonzero(chunk.deaths[:count] == ALIVE)) for chunk, count in plan.chunks]
    return rows
