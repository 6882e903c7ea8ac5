from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.columns import TABLE, Array, write_columns
from engram.errors import DamagedDataError, DirectoryInUseError, OperatorError
from engram.files import DiskFiles
from engram.operations import InstallSegment, Operation, encode
from engram.persistence import log_format
from engram.persistence.check import (
    Cut,
    Examination,
    FileReport,
    cut_log,
    describe_loss,
    describe_place,
    hold_directory,
    is_unused,
)
from engram.persistence.layout import Layout
from engram.persistence.manifest import Manifest, write_manifest
from engram.persistence.recovery import recover
from tests.persistence.conftest import HookedFiles, LogMaker, operation, read_back

OLD, NEW = "00000000000000aa", "00000000000000bb"
NOW = 1_800_000_000

# The log goes on behind the snapshot in files 3 to 5, with three operations each.
SNAPSHOT_LSN = 3
LAST_LSN = 12
INSTALLED_LSN = 8


def write_segment(directory: Path, name: str, rows: int) -> int:
    folder = directory / "segments" / name
    folder.mkdir()
    (folder / "graph.usearch").write_bytes(b"a graph that nobody opens" * 10)
    columns: dict[str, Array] = {"row-ids": np.arange(rows), "vectors": np.zeros((rows, 4), np.float32)}
    return write_columns(DiskFiles(), folder, columns, {"index": 1}, ["graph.usearch"])


def history(checksum: int) -> list[tuple[int, Operation]]:
    """The operations of the log behind the snapshot."""
    installed = InstallSegment(1, NEW, checksum, 5, ())
    return [
        (lsn, installed if lsn == INSTALLED_LSN else operation(lsn))
        for lsn in range(SNAPSHOT_LSN + 1, LAST_LSN + 1)
    ]


def make_directory(path: Path) -> list[tuple[int, Operation]]:
    """A snapshot that names a segment, and a log behind it that installs another; returns its operations."""
    (path / "segments").mkdir(parents=True)
    (path / "LOCK").touch()
    log = LogMaker(path)
    old, new = write_segment(path, OLD, 7), write_segment(path, NEW, 9)
    operations = history(new)
    log.write([encode(operation(lsn)) for lsn in range(1, SNAPSHOT_LSN + 1)])
    for start in range(0, len(operations), 3):
        log.new_file()
        for _, each in operations[start : start + 3]:
            log.write([encode(each)])
    log.write([], mark=True)
    log.close()
    folder = path / f"snapshot-{SNAPSHOT_LSN}"
    folder.mkdir()
    indices = [{"segments": [{"id": OLD, "checksum": old, "dead_rows": 0}]}]
    metadata = {"lsn": SNAPSHOT_LSN, "indices": indices}
    checksum = write_columns(DiskFiles(), folder, {"numbers": np.arange(100)}, metadata)
    layout = Layout(path)
    manifest = Manifest(3, folder.name, SNAPSHOT_LSN, checksum, 1000, NOW, (OLD,))
    write_manifest(DiskFiles(), layout.manifest, manifest)
    for number in (1, 2):
        layout.log(number).unlink()
    return operations


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    make_directory(path)
    return path


def examine(directory: Path) -> tuple[Examination, list[FileReport]]:
    examination = Examination(directory)
    return examination, list(examination.reports())


def report_of(directory: Path, name: str) -> FileReport:
    return next(report for report in examine(directory)[1] if report.name == name)


def fingerprint(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (directory, *directory.rglob("*"))
    }


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(bytes(content))


def records(path: Path) -> list[log_format.Record]:
    data = path.read_bytes()
    return list(log_format.RecordScanner(data, log_format.decode_file_header(data)))


def flip_record(path: Path, number: int) -> int:
    """Damages the payload of a record; returns where the record starts."""
    record = records(path)[number]
    flip(path, record.offset + log_format.RECORD_HEADER_SIZE + 2)
    return record.offset


def end_of_records(path: Path) -> int:
    last = records(path)[-1]
    return last.offset + log_format.RECORD_HEADER_SIZE + len(last.payload)


def log_path(directory: Path, number: int) -> Path:
    return Layout(directory).log(number)


def cut_of(directory: Path) -> Cut:
    cut = examine(directory)[0].cut()
    assert cut is not None
    return cut


# What a good directory looks like


def test_every_file_is_reported(stored: Path) -> None:
    before = fingerprint(stored)
    examination, reports = examine(stored)
    size = log_path(stored, 5).stat().st_size
    used = [end_of_records(log_path(stored, number)) for number in (3, 4, 5)]
    columns = [sum(file.stat().st_size for file in (stored / "segments" / n).iterdir()) for n in (OLD, NEW)]
    snapshot = sum(file.stat().st_size for file in (stored / "snapshot-3").iterdir())
    assert [(report.name, report.state, report.details) for report in reports] == [
        ("MANIFEST", "ok", "names snapshot-3; the log starts with file 3"),
        ("snapshot-3", "ok", f"LSN 3, 1 files of {snapshot} bytes, 1 segments"),
        *(
            (
                f"wal-000000000{number}.log",
                "ok",
                f"LSN {last - 2} to {last}, 3 operations, durable up to LSN {last},"
                f" {end} of {size} bytes used",
            )
            for number, last, end in zip((3, 4, 5), (6, 9, 12), used, strict=True)
        ),
        (f"segments/{OLD}", "ok", f"7 rows, 3 files of {columns[0]} bytes, named by snapshot-3"),
        (f"segments/{NEW}", "ok", f"9 rows, 3 files of {columns[1]} bytes, installed at LSN 8"),
    ]
    assert (examination.damages, examination.torn_bytes, examination.cut()) == ([], 0, None)
    assert fingerprint(stored) == before


def test_files_that_nothing_names_are_no_damage(stored: Path) -> None:
    for name in ("snapshot-2", "segments/cc", "segments/dd.building", "segments/lost+found"):
        (stored / name).mkdir()
    for name, size in {
        "wal-0000000002.log": 5,
        "prepared-4.log": 0,
        "MANIFEST.new": 1,
        "wal-0000000001.log.broken-1795360803": 43,
        "notes.txt": 3,
    }.items():
        (stored / name).write_bytes(bytes(size))
    examination, reports = examine(stored)
    assert examination.damages == []
    assert [(report.name, report.state, report.details) for report in reports if report.state != "ok"] == [
        ("wal-0000000002.log", "unused", "older than the snapshot; removed at the next start"),
        ("segments/cc", "unused", "not named; removed at the next start"),
        ("segments/dd.building", "unused", "not finished; removed at the next start"),
        ("segments/lost+found", "other", "not a file of engram's"),
        ("MANIFEST.new", "unused", "a manifest that was not finished"),
        ("notes.txt", "other", "not a file of engram's"),
        ("prepared-4.log", "unused", "space for the log; removed at the next start"),
        ("snapshot-2", "unused", "not named by MANIFEST; removed at the next start"),
        ("wal-0000000001.log.broken-1795360803", "kept", "put aside by a start or a repair, 43 bytes"),
    ]


def test_a_torn_tail_is_no_damage(stored: Path) -> None:
    path = log_path(stored, 5)
    with path.open("r+b") as file:
        file.seek(end_of_records(path))
        file.write(b"torn")
    before = fingerprint(stored)
    examination, reports = examine(stored)
    assert (examination.damages, examination.torn_bytes, examination.cut()) == ([], 4, None)
    [torn] = [report for report in reports if report.state != "ok"]
    assert (torn.name, torn.state) == (path.name, "torn")
    assert torn.details.endswith("; 4 bytes behind them would be cut and kept at the next start")
    assert fingerprint(stored) == before


def test_a_new_directory_holds_nothing(directory: Path) -> None:
    assert is_unused(directory)
    assert [report.name for report in examine(directory)[1]] == ["MANIFEST"]
    log_path(directory, 1).write_bytes(b"half a header")
    examination, reports = examine(directory)
    assert [(report.name, report.state) for report in reports] == [
        ("MANIFEST", "ok"),
        ("wal-0000000001.log", "unused"),
    ]
    assert examination.damages == []
    log_path(directory, 1).unlink()
    read_back(directory)
    assert not is_unused(directory)
    assert [report.state for report in examine(directory)[1]] == ["ok", "ok"]


def test_a_folder_of_segments_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    read_back(tmp_path)
    (tmp_path / "segments").rmdir()
    assert examine(tmp_path)[0].damages == []


# Each kind of damage


@attrs.frozen
class Kind:
    """A way to damage a directory: where, what is said of it, and whether a cut helps."""

    damage: Callable[[Path], int | None]
    name: str
    file: str
    reason: str
    can_be_cut: bool


def unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def flipped(name: str) -> Callable[[Path], None]:
    return lambda directory: flip(directory / name, (directory / name).stat().st_size // 2)


def whole_record_swapped(directory: Path) -> int:
    """The last record but the mark becomes a good one of a kind that is not known."""
    path = log_path(directory, 5)
    data = path.read_bytes()
    header = log_format.decode_file_header(data)
    before = log_format.RecordScanner(data[: records(path)[2].offset], header)
    list(before)
    record, _ = log_format.encode_record(7, 12, b"", 11, header.tag, before.chain)
    path.write_bytes(data[: before.offset] + record)
    return before.offset


LOG_4 = "wal-0000000004.log"


def flipped_header(directory: Path) -> int:
    flip(directory / LOG_4, 20)
    return 0


def misnamed(directory: Path) -> int:
    shutil.copy(log_path(directory, 5), directory / LOG_4)
    return 0


def end_file_after(path: Path, count: int) -> int:
    offset = records(path)[count].offset
    path.write_bytes(path.read_bytes()[:offset] + bytes(1000))
    return offset


def shortened(directory: Path) -> None:
    (directory / "segments" / OLD / "vectors.npy").write_bytes(b"short")


KINDS = {
    "manifest": Kind(flipped("MANIFEST"), "MANIFEST", "MANIFEST", "checksum mismatch", False),
    "no manifest": Kind(
        unlink("MANIFEST"), "MANIFEST", "MANIFEST", "missing, but there are other files of engram's", False
    ),
    "snapshot column": Kind(
        flipped("snapshot-3/numbers.npy"), "snapshot-3", "snapshot-3/numbers.npy", "checksum mismatch", False
    ),
    "snapshot table": Kind(
        flipped(f"snapshot-3/{TABLE}"), "snapshot-3", f"snapshot-3/{TABLE}", "checksum mismatch", False
    ),
    "no snapshot": Kind(
        lambda directory: shutil.rmtree(directory / "snapshot-3"),
        "snapshot-3",
        f"snapshot-3/{TABLE}",
        "missing",
        False,
    ),
    "graph": Kind(
        flipped(f"segments/{OLD}/graph.usearch"),
        f"segments/{OLD}",
        f"segments/{OLD}/graph.usearch",
        "checksum mismatch",
        False,
    ),
    "graph of the log": Kind(
        flipped(f"segments/{NEW}/graph.usearch"),
        f"segments/{NEW}",
        f"segments/{NEW}/graph.usearch",
        "checksum mismatch",
        False,
    ),
    "no segment": Kind(
        lambda directory: shutil.rmtree(directory / "segments" / NEW),
        f"segments/{NEW}",
        f"segments/{NEW}/{TABLE}",
        "missing",
        False,
    ),
    "shortened column": Kind(
        shortened,
        f"segments/{OLD}",
        f"segments/{OLD}/vectors.npy",
        "expected 240 bytes",
        False,
    ),
    "record of a closed file": Kind(
        lambda directory: flip_record(directory / LOG_4, 1),
        LOG_4,
        LOG_4,
        "record payload checksum mismatch, but not for wal-0000000005.log, which follows",
        True,
    ),
    "record of the last file": Kind(
        lambda directory: flip_record(log_path(directory, 5), 1),
        "wal-0000000005.log",
        "wal-0000000005.log",
        "record payload checksum mismatch at LSN 11, but LSN 12 was durable",
        True,
    ),
    "type of a record": Kind(
        whole_record_swapped, "wal-0000000005.log", "wal-0000000005.log", "record type 7 is not known", True
    ),
    "header of a file": Kind(
        flipped_header,
        LOG_4,
        LOG_4,
        "file header checksum mismatch",
        True,
    ),
    "another file's name": Kind(
        misnamed,
        LOG_4,
        LOG_4,
        "holds file 5 of the log",
        True,
    ),
    "no file of the log": Kind(unlink(LOG_4), LOG_4, LOG_4, "missing", True),
    "the first file of the log": Kind(
        unlink("wal-0000000003.log"), "wal-0000000003.log", "wal-0000000003.log", "missing", True
    ),
    "end of a closed file": Kind(
        lambda directory: end_file_after(log_path(directory, 3), 1),
        "wal-0000000003.log",
        "wal-0000000003.log",
        "the records end here, but not for wal-0000000004.log, which follows",
        True,
    ),
    "another program": Kind(
        lambda directory: (directory / "engram.snap").touch(),
        "engram.snap",
        "engram.snap",
        "written by another program named engram, whose format this one does not read",
        False,
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_damage_is_reported_with_its_place(kind: Kind, stored: Path) -> None:
    offset = kind.damage(stored)
    before = fingerprint(stored)
    examination, reports = examine(stored)
    [first, *_] = examination.damages
    assert (first.path, first.reason, first.offset) == (stored / kind.file, kind.reason, offset)
    [report] = [report for report in reports if report.damage is first]
    assert (report.name, report.state) == (kind.name, "damaged")
    assert kind.reason in report.details
    assert offset is None or f"at offset {offset}: " in report.details
    assert (examination.cut() is not None) == kind.can_be_cut
    assert fingerprint(stored) == before


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_other_files_are_reported_all_the_same(kind: Kind, stored: Path) -> None:
    kind.damage(stored)
    states = {report.name: report.state for report in examine(stored)[1]}
    for number in (3, 4, 5):
        name = f"wal-000000000{number}.log"
        assert name == kind.name or states[name] == "ok"
    for name in (OLD, NEW):
        assert f"segments/{name}" in states


def test_a_cut_helps_only_when_the_rest_is_whole(stored: Path) -> None:
    flip_record(log_path(stored, 5), 0)
    assert cut_of(stored).lsn == 9
    flip(stored / "segments" / NEW / "graph.usearch", 0)
    assert examine(stored)[0].cut() is None


def test_a_damaged_segment_that_only_what_is_cut_names_does_not_matter(stored: Path) -> None:
    flip_record(log_path(stored, 4), 0)
    flip(stored / "segments" / NEW / "graph.usearch", 0)
    cut = cut_of(stored)
    assert (cut.lsn, cut.segments) == (6, (NEW,))
    cut_log(stored, DiskFiles(), cut)
    assert examine(stored)[0].damages == []


def test_what_no_manifest_names_is_checked_by_itself(stored: Path) -> None:
    (stored / "MANIFEST").unlink()
    states = {report.name: (report.state, report.details) for report in examine(stored)[1]}
    assert states["snapshot-3"][0] == "ok"
    assert states["snapshot-3"][1].endswith("; no readable MANIFEST names it")
    assert states[f"segments/{OLD}"] == (
        "unused",
        "not named by anything that can be read; removed at the next start",
    )
    flip(stored / "snapshot-3" / "numbers.npy", 0)
    (stored / "snapshot-9").mkdir()
    (stored / "snapshot-9" / TABLE).write_text("[]")
    states = {report.name: (report.state, report.details) for report in examine(stored)[1]}
    assert states["snapshot-3"] == ("damaged", "numbers.npy: checksum mismatch")
    assert states["snapshot-9"][0] == "damaged"


def test_a_segment_of_a_damaged_snapshot_is_checked_by_itself(stored: Path) -> None:
    flip(stored / "snapshot-3" / TABLE, 5)
    report = report_of(stored, f"segments/{OLD}")
    assert report.state == "ok"
    assert report.details.endswith("named by snapshot-3, which is damaged")


@pytest.mark.parametrize("name", ["MANIFEST", LOG_4, f"segments/{OLD}/{TABLE}"])
def test_a_file_that_cannot_be_read_is_damage_that_is_not_cut(name: str, stored: Path) -> None:
    (stored / name).unlink()
    (stored / name).mkdir()
    examination, _ = examine(stored)
    [first, *_] = examination.damages
    assert (first.path, first.reason) == (stored / name, "cannot be read: Is a directory")
    assert examination.cut() is None


@pytest.mark.parametrize("name", ["MANIFEST", LOG_4])
def test_nobody_waits_for_who_might_write_into_a_pipe(name: str, stored: Path) -> None:
    (stored / name).unlink()
    os.mkfifo(stored / name)
    examination, _ = examine(stored)
    [first, *_] = examination.damages
    assert (first.path, first.reason) == (stored / name, "cannot be read: Not a regular file")
    with pytest.raises(OSError, match="Not a regular file"):
        recover(stored, DiskFiles(), lambda folder: None, lambda lsn, operation: None)


def test_a_pipe_for_a_lock_holds_nobody_up(stored: Path) -> None:
    (stored / "LOCK").unlink(missing_ok=True)
    os.mkfifo(stored / "LOCK")
    with hold_directory(stored):
        pass


# Agreement with recovery

MUTATIONS = st.tuples(
    st.sampled_from(("MANIFEST", "snapshot-3/numbers.npy", *(f"wal-000000000{n}.log" for n in (3, 4, 5)))),
    st.sampled_from(("flip", "truncate", "zero", "delete")),
    # Most of a log file is zeros behind its records.
    st.floats(0, 0.2) | st.floats(0, 1),
)


def mutate(directory: Path, name: str, how: str, place: float) -> None:
    path = directory / name
    if not path.exists():
        return
    content = bytearray(path.read_bytes())
    at = min(int(place * len(content)), len(content) - 1)
    if how == "delete" or at < 0:
        path.unlink()
        return
    if how == "flip":
        content[at] ^= 0x01
    elif how == "truncate":
        del content[at:]
    else:
        content[at:] = bytes(len(content) - at)
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, Operation]]]:
    path = tmp_path_factory.mktemp("check") / "data"
    return path, make_directory(path)


@settings(max_examples=150, deadline=None)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=2))
def test_a_start_is_refused_when_and_only_when_something_is_wrong(
    original: tuple[Path, list[tuple[int, Operation]]], mutations: list[tuple[str, str, float]]
) -> None:
    source, operations = original
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        directory = Path(shutil.copytree(source, Path(name) / "data"))
        for mutation in mutations:
            mutate(directory, *mutation)
        before = fingerprint(directory)
        examination, _ = examine(directory)
        assert fingerprint(directory) == before
        try:
            recover(directory, DiskFiles(), lambda folder: None, lambda *_: None, read_only=True)
        except DamagedDataError:
            assert examination.damages
        else:
            assert examination.damages == []
        cut = examination.cut()
        if cut is not None:
            cut_log(directory, DiskFiles(), cut)
            recovered = read_back(directory)
            assert recovered.operations == operations[: cut.lsn - SNAPSHOT_LSN]
            assert recovered.recovery.cut_files == ()


# Cutting


@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_cut_keeps_all_before_it_and_what_it_cuts(number: int, stored: Path) -> None:
    bad = log_path(stored, number)
    offset = flip_record(bad, 1)
    contents = {path.name: path.read_bytes() for path in stored.glob("wal-*.log")}
    tail = contents[bad.name][offset : log_format.used_size(contents[bad.name])]
    cut = cut_of(stored)
    last = SNAPSHOT_LSN + 3 * (number - 3) + 1
    assert (cut.number, cut.size, cut.lsn, cut.lost_lsn) == (number, offset, last, LAST_LSN)
    assert describe_place(cut, stored) == f"{bad} at offset {offset}"
    assert describe_loss(cut) == f"what LSN {last + 1} and all after it did, up to LSN 12 at least"

    aside = cut_log(stored, DiskFiles(), cut, now=lambda: NOW)
    kept = {path.name: path.read_bytes() for path in stored.glob("wal-*.broken-*")}
    assert kept == {
        f"{name}.broken-{NOW}": tail if name == bad.name else content
        for name, content in contents.items()
        if name >= bad.name
    }
    segment = stored / f"segment-{NEW}.broken-{NOW}"
    assert set(aside) == {*stored.glob("wal-*.broken-*"), *([segment] if cut.segments else [])}
    assert segment.exists() == (number < 4 or (number == 4 and last < INSTALLED_LSN))

    examination, _ = examine(stored)
    assert (examination.damages, examination.torn_bytes) == ([], 0)
    recovered = read_back(stored)
    assert [lsn for lsn, _ in recovered.operations] == list(range(SNAPSHOT_LSN + 1, last + 1))
    log = LogMaker(stored)
    log.write([encode(operation(last + 1))])
    log.close()
    assert read_back(stored).recovery.lsn == last + 1


def test_a_log_without_its_first_file_is_made_anew(stored: Path) -> None:
    flip(log_path(stored, 3), 0)
    cut = cut_of(stored)
    assert (cut.number, cut.size, cut.lsn, cut.lost_lsn, cut.files) == (
        3,
        0,
        SNAPSHOT_LSN,
        LAST_LSN,
        (3, 4, 5),
    )
    assert describe_place(cut, stored) == f"{log_path(stored, 3)}, which is made anew"
    cut_log(stored, DiskFiles(), cut)
    assert len(list(stored.glob("wal-*.log.broken-*"))) == 3
    recovered = read_back(stored)
    assert (recovered.operations, recovered.recovery.lsn) == ([], SNAPSHOT_LSN)
    assert len(recovered.snapshots) == 1


def test_what_is_lost_may_not_be_known(stored: Path) -> None:
    path = log_path(stored, 5)
    path.unlink()
    log_path(stored, 4).unlink()
    shutil.copy(log_path(stored, 3), path)
    cut = cut_of(stored)
    assert describe_loss(cut) == "whatever came after LSN 6"


class CrashError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("damage", ["record", "header", "first header", "missing"])
def test_a_cut_that_was_interrupted_is_ended_by_another(damage: str, tmp_path: Path) -> None:
    finished = False
    steps = 0
    while not finished:
        directory = tmp_path / f"data-{steps}"
        operations = make_directory(directory)
        if damage == "record":
            flip_record(log_path(directory, 4), 0)
        elif damage == "header":
            flip(log_path(directory, 4), 1)
        elif damage == "first header":
            flip(log_path(directory, 3), 1)
        else:
            log_path(directory, 4).unlink()
        contents = {path.read_bytes() for path in directory.glob("wal-*.log")}
        cut = cut_of(directory)
        files = HookedFiles()

        def crash(*_: object, files: HookedFiles = files, after: int = steps) -> None:
            if len(files.calls) > after:
                raise CrashError

        files.hook = crash
        try:
            cut_log(directory, files, cut)
            finished = True
        except CrashError:
            examination, _ = examine(directory)
            again = examination.cut()
            assert (again is None) == (examination.damages == [])
            if again is not None:
                assert again.lsn == cut.lsn
                cut_log(directory, DiskFiles(), again)
        assert examine(directory)[0].damages == []
        recovered = read_back(directory)
        assert recovered.operations == operations[: cut.lsn - SNAPSHOT_LSN]
        there = [path.read_bytes() for path in directory.glob("wal-*")]
        for content in contents:
            # As it was, or the tail of one whose beginning is in use.
            used = content[: log_format.used_size(content)]
            assert any(each[: len(used)] == used or (each and used.endswith(each)) for each in there)
        # Nothing that was put aside may go.
        assert list(directory.glob(f"segment-{NEW}.broken-*"))
        steps += 1
    assert steps > 4


# Holding a directory


def test_a_directory_that_a_server_uses_is_left_alone(stored: Path) -> None:
    with (stored / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for exclusive in (False, True):
            with (
                pytest.raises(DirectoryInUseError, match=r"data: another server is using this directory$"),
                hold_directory(stored, exclusive=exclusive),
            ):
                pass


def test_readers_share_a_directory_and_keep_others_off(stored: Path) -> None:
    with hold_directory(stored), hold_directory(stored):
        with pytest.raises(DirectoryInUseError), hold_directory(stored, exclusive=True):
            pass
        with (stored / "LOCK").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (stored / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_reader_makes_no_lock(stored: Path) -> None:
    (stored / "LOCK").unlink()
    with hold_directory(stored):
        assert not (stored / "LOCK").exists()
    with hold_directory(stored, exclusive=True):
        assert (stored / "LOCK").exists()


def test_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "none", r"none: cannot be read: No such file or directory$"),
        (tmp_path / "file", r"file: cannot be read: Not a directory$"),
        (tmp_path, r": not a data directory of engram's$"),
    ):
        with pytest.raises(OperatorError, match=message), hold_directory(path, exclusive=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
