"""Damage at every place of a small data directory: a bit is flipped, or the last file of the log is cut off.

Whatever was damaged, one of three things must come of it: all that was durable is there; or records that the
log does not say were durable are cut, and that is reported; or the start is refused by an error that names a
file, and nothing has changed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import attrs
import numpy as np
import pytest

from engram.engine import Engine
from engram.errors import DamagedDataError
from engram.files import DiskFiles
from engram.index.build_process import BuildJob, build_segment
from engram.index.builder import live_rows
from engram.index.segment import VECTORS, SegmentStore
from engram.operations import (
    AddVectors,
    AppendString,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    InstallSegment,
    Operation,
    SetExpiry,
    SetString,
    encode,
    join,
)
from engram.persistence import lock_directory, recover
from engram.persistence.layout import Layout
from engram.persistence.log_format import FILE_HEADER_SIZE, RECORD_HEADER_SIZE
from engram.persistence.log_writer import LogWriter, PreparedFile, Run
from engram.persistence.recovery import remove_outdated
from engram.persistence.snapshot import install_snapshot
from engram.snapshotter import write_snapshot
from tests.crash.power_failures import Found, History, State, scratch_folder, start
from tests.crash.recorded_disk import Sent

ROWS = 64
DIMENSION = 8
INDEX = 1

# The log after the snapshot: a file that is closed, and two batches of the last one. Of these the log itself
# says that the first is durable.
CLOSED: list[Operation] = [
    SetString(b"count", b"12", 1 << 42),
    AddVectors(INDEX, (b"row-3",), np.arange(DIMENSION, dtype="<f4").tobytes(), (b'{"year": 2001}',)),
]
RECORDED: list[Operation] = [AppendString(b"greeting", b" again"), DeleteVectors(INDEX, (b"row-4",))]
UNRECORDED: list[Operation] = [SetExpiry(b"greeting", 1 << 43), DeleteKeys((b"count",))]
UNUSED_BYTES = 24
NPY_HEADER_SIZE = 128

RIGHT, CUT, REFUSED = "right", "cut", "refused"


@attrs.frozen
class Case:
    """One damage: bits of a byte are flipped, or the file ends there."""

    path: str
    offset: int
    bits: int = 0


@attrs.frozen
class Outcome:
    case: Case
    what: str
    wrong: str = ""


@attrs.frozen
class Specimen:
    """A small data directory: its files, its folders, and the state as of each LSN.

    The files of the log that are closed end at LSN `closed`; the log says that all up to `durable` is.
    `record_ends` says where in the last file the records after `closed` end.
    """

    files: dict[str, bytes]
    folders: tuple[str, ...]
    states: list[State]
    closed: int
    durable: int
    record_ends: list[int]

    @property
    def last(self) -> int:
        return len(self.states) - 1

    @property
    def last_log(self) -> str:
        return max(path for path in self.files if path.startswith("wal-"))


class Maker:
    """Makes a data directory with the parts that a server has, one call after the other."""

    def __init__(self, directory: Path) -> None:
        os.close(lock_directory(directory))
        self.directory = directory
        self.layout = Layout(directory)
        self.files = DiskFiles()
        self.history = History()
        self.store = SegmentStore(self.layout.segments, self.files, 1)
        self.engine = Engine(self.store, seal_rows=ROWS)
        recovery = recover(directory, self.files, self.engine.restore, self.engine.apply)
        self._writer = LogWriter(self.layout, self.files, recovery)
        self._prepared = 0

    def write(self, operations: Sequence[Operation], new_file: int = 0) -> None:
        """Writes a record for each operation, into a new file of that size when there is one."""
        first = Run(self.engine.lsn + 1, self._prepare(new_file) if new_file else None)
        runs = [first, *(Run(self.engine.lsn + 1 + number) for number in range(1, len(operations)))]
        for run, operation in zip(runs, operations, strict=False):
            self.engine.apply(self.engine.lsn + 1, operation)
            self.history.perform(Sent(self.engine.lsn, operation))
            run.payloads.append(encode(operation))
        self._writer.commit(runs, sync=True)

    def _prepare(self, size: int) -> PreparedFile:
        self._prepared += 1
        path = self.layout.prepared(self._prepared)
        return PreparedFile(path, size, self.files.create(path, size))

    def seal(self) -> None:
        """Makes a segment of all vectors."""
        index = self.engine.indices[INDEX]
        plan = index.plan()
        assert plan is not None
        self.store.write_rows("0123456789abcdef", live_rows(plan))
        job = BuildJob(str(self.store.folder), "0123456789abcdef", index.id, **attrs.asdict(index.parameters))
        checksum = build_segment(job).checksum
        self.write([InstallSegment(index.id, job.segment, checksum, plan.through, ())])

    def snapshot(self, new_file: int) -> None:
        """Makes a snapshot; the log goes on in a file of that size."""
        self.write([], new_file)
        closed_file = self.layout.log_numbers()[-1] - 1
        result = write_snapshot(self.directory, closed_file)
        manifest = install_snapshot(self.layout, self.files, result, self.engine.lsn, closed_file + 1)
        remove_outdated(self.layout, self.files, manifest)

    def close(self) -> None:
        self._writer.close()


def size_of(operations: Sequence[Operation]) -> int:
    return FILE_HEADER_SIZE + sum(
        RECORD_HEADER_SIZE + len(join([encode(operation)])) for operation in operations
    )


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    directory = tmp_path_factory.mktemp("specimen") / "data"
    maker = Maker(directory)
    rows = np.random.default_rng(5).standard_normal((ROWS, DIMENSION), np.float32)
    keys = tuple(b"row-%d" % number for number in range(ROWS))
    maker.write([CreateIndex(b"index", DIMENSION, "l2", 2, 16, "int8")], new_file=8192)
    maker.write([AddVectors(INDEX, keys, rows.tobytes())])
    maker.seal()
    maker.write([SetString(b"greeting", b"hello"), SetString(b"lapsing", b"soon", 1 << 42)])
    maker.write(
        [AddVectors(INDEX, (b"row-1", b"new"), rows[:2].tobytes()), DeleteVectors(INDEX, (b"row-2",))]
    )
    maker.snapshot(size_of(CLOSED) + UNUSED_BYTES)
    maker.write(CLOSED)
    closed = maker.engine.lsn
    maker.write(RECORDED, new_file=size_of(RECORDED + UNRECORDED) + UNUSED_BYTES)
    durable = maker.engine.lsn
    maker.write(UNRECORDED)
    maker.close()
    paths = sorted(directory.rglob("*"))
    last_file = RECORDED + UNRECORDED
    return Specimen(
        {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.is_file()},
        tuple(str(path.relative_to(directory)) for path in paths if path.is_dir()),
        [state for state in maker.history.states if state is not None],
        closed,
        durable,
        [size_of(last_file[:count]) for count in range(1, len(last_file) + 1)],
    )


class Patient:
    """A copy of the specimen to be damaged and mended."""

    def __init__(self, specimen: Specimen, directory: Path) -> None:
        self._specimen = specimen
        self._directory = directory
        directory.mkdir()
        for folder in specimen.folders:
            (directory / folder).mkdir()
        for path, content in specimen.files.items():
            (directory / path).write_bytes(content)
        self._untouched = self._listing()

    def _listing(self) -> dict[str, tuple[int, int, int]]:
        """What tells that a file was changed, by path."""
        found: dict[str, tuple[int, int, int]] = {}
        folders = [str(self._directory)]
        while folders:
            for entry in os.scandir(folders.pop()):
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    found[entry.path] = _status(entry.path)
        return found

    def suffer(self, case: Case) -> Outcome:
        """Damages the directory, recovers it, judges the outcome, and mends it."""
        path = self._directory / case.path
        content = bytearray(self._specimen.files[case.path])
        if case.bits:
            content[case.offset] ^= case.bits
        else:
            del content[case.offset :]
        path.write_bytes(content)
        damaged = {**self._untouched, str(path): _status(str(path))}
        try:
            found, refusal = start(self._directory), None
        except DamagedDataError as error:
            found, refusal = None, error
        except Exception as error:
            self._mend(self._listing())
            return Outcome(case, "raised", f"{type(error).__name__}: {error}")
        left = self._listing()
        self._mend(left)
        if refusal is not None:
            # Vectors are compared when all else is read, and the end of the log has been tidied up.
            unchanged = left == damaged or refusal.path.name == VECTORS
            named = refusal.path.is_relative_to(self._directory) and str(refusal.path) in str(refusal)
            return Outcome(case, REFUSED, "" if unchanged and named else f"{refusal}; unchanged: {unchanged}")
        assert found is not None
        return Outcome(case, *self._judge(case, found))

    def _judge(self, case: Case, found: Found) -> tuple[str, str]:
        specimen, recovery = self._specimen, found.recovery
        if found.state != specimen.states[recovery.lsn]:
            return CUT, f"not the state as of {recovery.lsn}"
        if recovery.lsn == specimen.last:
            return RIGHT, ""
        if case.bits:
            enough = recovery.lsn >= specimen.durable
            whole = False
        else:
            # What has been cut off cannot tell what was durable.
            enough = recovery.lsn - specimen.closed == sum(end <= case.offset for end in specimen.record_ends)
            begin = max(end for end in (FILE_HEADER_SIZE, *specimen.record_ends) if end <= case.offset)
            # A record of which nothing is there, or zeros alone, looks as what was never written.
            whole = not any(specimen.files[case.path][begin : case.offset])
        reported = recovery.torn_bytes > 0 and len(recovery.cut_files) == 1
        return CUT, "" if enough and reported != whole else f"recovered up to {recovery.lsn}: {recovery}"

    def _mend(self, left: dict[str, tuple[int, int, int]]) -> None:
        for path, status in left.items():
            if path not in self._untouched:
                os.unlink(path)
            elif status != self._untouched[path]:
                Path(path).write_bytes(self._specimen.files[os.path.relpath(path, self._directory)])
                self._untouched[path] = _status(path)
        assert self._untouched.keys() <= left.keys()


def _status(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def suffer_all(specimen: Specimen, cases: Sequence[Case]) -> list[Outcome]:
    with scratch_folder() as scratch:
        patient = Patient(specimen, scratch / "data")
        return [patient.suffer(case) for case in cases]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as executor:
        yield executor


def outcomes(pool: ProcessPoolExecutor, specimen: Specimen, cases: Sequence[Case]) -> Counter[str]:
    """What came of these cases. A process that a signal ends breaks the pool, and so fails the test."""
    step = max(1, len(cases) // (4 * (os.cpu_count() or 1)))
    parts = [cases[start : start + step] for start in range(0, len(cases), step)]
    found = list(chain.from_iterable(pool.map(suffer_all, [specimen] * len(parts), parts)))
    wrong = [outcome for outcome in found if outcome.wrong]
    assert not wrong, f"{len(wrong)} of {len(found)} went wrong: {wrong[:5]}"
    return Counter(outcome.what for outcome in found)


def every_bit(specimen: Specimen, paths: Sequence[str]) -> list[Case]:
    return [
        Case(path, offset, 1 << bit)
        for path in paths
        for offset in range(len(specimen.files[path]))
        for bit in range(8)
    ]


def one_bit_of_every_byte(specimen: Specimen, paths: Sequence[str]) -> list[Case]:
    return [
        Case(path, offset, 1 << offset % 8) for path in paths for offset in range(len(specimen.files[path]))
    ]


def paths_in(specimen: Specimen, folder: str) -> list[str]:
    return [path for path in specimen.files if path.startswith(folder)]


def test_an_undamaged_directory_is_recovered(specimen: Specimen, tmp_path: Path) -> None:
    Patient(specimen, tmp_path / "data")
    found = start(tmp_path / "data")
    assert found.state == specimen.states[specimen.last]
    assert found.recovery.recorded_durable_lsn == specimen.durable
    assert found.recovery.torn_bytes == 0


def test_the_last_log_file_cut_at_every_byte(pool: ProcessPoolExecutor, specimen: Specimen) -> None:
    size = len(specimen.files[specimen.last_log])
    found = outcomes(pool, specimen, [Case(specimen.last_log, offset) for offset in range(size)])
    records = size - FILE_HEADER_SIZE - UNUSED_BYTES
    assert found == {RIGHT: UNUSED_BYTES, CUT: records, REFUSED: FILE_HEADER_SIZE}


def test_every_bit_of_the_last_log_file(pool: ProcessPoolExecutor, specimen: Specimen) -> None:
    size = len(specimen.files[specimen.last_log])
    durable, end = specimen.record_ends[specimen.durable - specimen.closed - 1], specimen.record_ends[-1]
    cases = every_bit(specimen, [specimen.last_log])
    found = outcomes(pool, specimen, cases)
    assert found == {RIGHT: 8 * (size - end), CUT: 8 * (end - durable), REFUSED: 8 * durable}


def test_every_bit_of_the_closed_log_file(pool: ProcessPoolExecutor, specimen: Specimen) -> None:
    [path] = [path for path in paths_in(specimen, "wal-") if path != specimen.last_log]
    found = outcomes(pool, specimen, every_bit(specimen, [path]))
    assert found == {REFUSED: 8 * size_of(CLOSED), RIGHT: 8 * UNUSED_BYTES}


@pytest.mark.parametrize("place", ["MANIFEST", "snapshot-", "segments/0123456789abcdef/columns.json"])
def test_every_bit_of_what_a_snapshot_rests_on(
    pool: ProcessPoolExecutor, specimen: Specimen, place: str
) -> None:
    cases = every_bit(specimen, paths_in(specimen, place))
    assert outcomes(pool, specimen, cases) == {REFUSED: len(cases)}


def test_every_byte_of_a_segment(pool: ProcessPoolExecutor, specimen: Specimen) -> None:
    cases = one_bit_of_every_byte(specimen, paths_in(specimen, "segments/"))
    cases = [case for case in cases if not is_header_of_vectors(case)]
    assert outcomes(pool, specimen, cases) == {REFUSED: len(cases)}


def is_header_of_vectors(case: Case) -> bool:
    """The checksum of vectors is not compared before they are mapped."""
    return case.path.endswith(f"/{VECTORS}") and case.offset < NPY_HEADER_SIZE


def test_every_bit_of_the_header_of_vectors(pool: ProcessPoolExecutor, specimen: Specimen) -> None:
    cases = every_bit(specimen, paths_in(specimen, "segments/"))
    cases = [case for case in cases if is_header_of_vectors(case)]
    assert outcomes(pool, specimen, cases) == {REFUSED: 8 * NPY_HEADER_SIZE}
