"""The parts of the log by themselves: without threads, and on a disk that only counts."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import attrs
import trio
import trio.testing

from engram.files import DiskFiles
from engram.persistence.admission import Admission
from engram.persistence.housekeeping import Housekeeping
from engram.persistence.layout import Layout
from engram.persistence.log_format import ARRAY_HEADER_SIZE, FILE_HEADER_SIZE, RECORD_HEADER_SIZE
from engram.persistence.log_writer import PreparedFile, Run
from engram.persistence.manifest import Manifest
from engram.persistence.queue import Batch, RunQueue
from engram.persistence.recovery import Recovery
from engram.persistence.settings import PersistenceSettings
from engram.persistence.space import Space

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DIRECTORY = Path("/nonexistent")


def recovered(
    *, lsn: int = 0, manifest: Manifest | None = None, segments: tuple[tuple[int, str], ...] = ()
) -> Recovery:
    """What recovery says of a log that ends with `lsn`, all of it recorded as durable."""
    return Recovery(
        manifest=manifest or Manifest(first_log_file=1),
        lsn=lsn,
        recorded_durable_lsn=lsn,
        records=0,
        torn_bytes=0,
        cut_files=(),
        log_file=1,
        link=0,
        log_bytes=0,
        segments=segments,
    )


class CountedFiles(DiskFiles):
    """Files of which only the sizes are kept; `capacity` is how many bytes of them there may be.

    Attributes:
        made: the size of each file so far.
        left: the files that are there.
        closed: descriptors that were closed.
    """

    def __init__(self, capacity: int = 1 << 50) -> None:
        self.capacity = capacity
        self.made: list[int] = []
        self.left: dict[Path, int] = {}
        self.closed: list[int] = []

    def create(self, path: Path, size: int) -> int:
        assert path not in self.left
        if sum(self.left.values()) + size > self.capacity:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left[path] = size
        self.made.append(size)
        return len(self.made)

    def close(self, descriptor: int) -> None:
        self.closed.append(descriptor)

    def remove(self, path: Path) -> None:
        del self.left[path]


class InTurn(Housekeeping):
    """Does at once what threads would do."""

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


@attrs.define
class Parts:
    """Space, queue and admission as `Persistence` joins them; nothing writes but `write`.

    Attributes:
        segments: what the queue has noted.
        batches: what was written, in order.
    """

    settings: PersistenceSettings = attrs.Factory(lambda: PersistenceSettings(log_file_size=4096))
    files: CountedFiles = attrs.Factory(CountedFiles)
    progress: trio.lowlevel.ParkingLot = attrs.Factory(trio.lowlevel.ParkingLot)
    segments: list[tuple[int, str]] = attrs.Factory(list)
    batches: list[Batch] = attrs.Factory(list)
    space: Space = attrs.field(init=False)
    queue: RunQueue = attrs.field(init=False)
    admission: Admission = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.space = Space(Layout(DIRECTORY), self.files, self.settings, InTurn(), self.progress)
        self.queue = RunQueue(self.space, recovered(), lambda *named: self.segments.append(named))
        self.admission = Admission(self.settings, self.space, self.queue, self.progress)

    async def start(self, nursery: trio.Nursery) -> None:
        """Has files prepared until the nursery ends."""
        await nursery.start(self.space.run, self.admission.shortage)
        await trio.testing.wait_all_tasks_blocked()

    def write(self) -> None:
        """Writes all that is queued."""
        self.batches.append(batch := self.queue.take())
        self.queue.written_end = batch.end
        self.progress.unpark_all()

    @property
    def runs(self) -> list[Run]:
        """All that were written."""
        return [run for batch in self.batches for run in batch.runs]


def files_of(runs: Sequence[Run]) -> Iterator[tuple[PreparedFile, list[Run]]]:
    """The files that runs go into, each with its own."""
    file: PreparedFile | None = None
    within: list[Run] = []
    for run in runs:
        if run.next_file is not None:
            if file is not None:
                yield file, within
            file, within = run.next_file, []
        within.append(run)
    if file is not None:
        yield file, within


def bytes_in(runs: Sequence[Run]) -> int:
    """What a file takes that holds these runs."""
    records = [run for run in runs if run.payloads]
    marks = sum(run.mark for run in runs)
    payloads = sum(len(payload) for run in records for payload in run.payloads)
    overhead = len(records) * (RECORD_HEADER_SIZE + ARRAY_HEADER_SIZE) + marks * RECORD_HEADER_SIZE
    return FILE_HEADER_SIZE + overhead + payloads
