from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from engram.columns import write_columns
from engram.errors import DamagedDataError
from engram.files import DiskFiles
from engram.operations import InstallSegment, Operation, encode, join
from engram.persistence import log_format
from engram.persistence.layout import Layout
from engram.persistence.manifest import Manifest, encode_manifest, read_manifest, write_manifest
from engram.persistence.recovery import recover
from engram.progress import InterruptedWorkError, Progress
from tests.persistence.conftest import HookedFiles, LogMaker, numbered, operation, read_back


def payloads(first: int, last: int) -> list[bytes]:
    return [encode(each) for _, each in numbered(first, last)]


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(bytes(content))


def snapshot(directory: Path, lsn: int) -> int:
    folder = directory / f"snapshot-{lsn}"
    folder.mkdir()
    return write_columns(DiskFiles(), folder, {"numbers": np.arange(lsn)}, {"lsn": lsn})


@pytest.fixture
def two_files(directory: Path) -> Path:
    """Files 2 and 3 with three operations each; file 1 is the empty one of a new directory."""
    log = LogMaker(directory)
    log.write(payloads(1, 3))
    log.new_file()
    log.write(payloads(4, 6))
    log.close()
    return directory


def test_a_new_directory_gets_a_log_and_then_a_manifest(directory: Path, files: HookedFiles) -> None:
    recovered = read_back(directory, files=files)
    assert (recovered.recovery.lsn, recovered.recovery.log_file, recovered.operations) == (0, 1, [])
    layout = Layout(directory)
    assert read_manifest(layout.manifest) == Manifest(first_log_file=1)
    written = [call[1] for call in files.calls if call[0] == "write_file"]
    assert written == [layout.log(1), layout.manifest.with_name("MANIFEST.new")]
    again = read_back(directory)
    assert again.recovery == recovered.recovery


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_crash_in_making_a_directory_is_no_trouble(directory: Path, files: HookedFiles, steps: int) -> None:
    def crash(*_: object) -> None:
        if len(files.calls) > steps:
            raise KeyboardInterrupt

    files.hook = crash
    with pytest.raises(KeyboardInterrupt):
        read_back(directory, files=files)
    assert read_back(directory).recovery.lsn == 0


def test_operations_come_back_in_order_across_files(two_files: Path) -> None:
    recovered = read_back(two_files)
    assert recovered.operations == numbered(1, 6)
    recovery = recovered.recovery
    assert (recovery.lsn, recovery.records, recovery.log_file) == (6, 6, 3)
    assert (recovery.torn_bytes, recovery.cut_files) == (0, ())


def test_recovering_twice_gives_the_same(two_files: Path) -> None:
    assert read_back(two_files) == read_back(two_files)


def test_each_file_can_be_the_last_one_of_a_reader_that_changes_nothing(
    two_files: Path, files: HookedFiles
) -> None:
    recovered = read_back(two_files, last_file=2, files=files)
    assert recovered.operations == numbered(1, 3)
    assert recovered.recovery.log_file == 2
    assert files.calls == []


def test_a_reader_wants_the_closed_file_whole(two_files: Path) -> None:
    path = Layout(two_files).log(2)
    path.write_bytes(path.read_bytes()[: 4096 - 64].rstrip(b"\0")[:-3])
    with pytest.raises(DamagedDataError, match=r"wal-0000000002\.log"):
        read_back(two_files, last_file=2)


def test_a_reader_makes_no_directory(directory: Path) -> None:
    with pytest.raises(DamagedDataError, match="MANIFEST"):
        read_back(directory, last_file=1)


def test_the_log_goes_on_in_a_new_file_after_a_restart(two_files: Path) -> None:
    log = LogMaker(two_files)
    log.write(payloads(7, 8))
    log.close()
    recovered = read_back(two_files)
    assert recovered.operations == numbered(1, 8)
    assert recovered.recovery.log_file == 4


def test_the_last_file_is_cut_to_its_records_and_synced(two_files: Path, files: HookedFiles) -> None:
    read_back(two_files, files=files)
    path = Layout(two_files).log(3)
    data = path.read_bytes()
    scanner = log_format.RecordScanner(data, log_format.decode_file_header(data))
    assert list(scanner)
    size = scanner.offset
    assert path.stat().st_size == size
    assert ("truncate", path, size) in files.calls


def test_what_the_log_does_not_call_durable_is_written_once_more(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 3))
    log.close()
    read_back(directory, files=files)
    names = [call[0] for call in files.calls]
    assert names.index("open") < names.index("write_at") < names.index("truncate")
    content = Layout(directory).log(2).read_bytes()
    assert [call[2] for call in files.calls if call[0] == "write_at"] == [content]


def test_what_the_log_calls_durable_is_not_written_again(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 3))
    log.write([], mark=True)
    log.close()
    recovery = read_back(directory, files=files).recovery
    assert recovery.recorded_durable_lsn == recovery.lsn == 3
    assert files.count("write_at") == 0


def test_the_last_file_cut_at_every_byte(two_files: Path, scratch: Path) -> None:
    path = Layout(two_files).log(3)
    whole = path.read_bytes()
    whole = whole[: log_format.used_size(whole)]
    for cut in range(len(whole) + 1):
        copy = scratch / "copy"
        shutil.copytree(two_files, copy)
        (copy / path.name).write_bytes(whole[:cut] + bytes(100 if cut > log_format.FILE_HEADER_SIZE else 0))
        if cut < log_format.FILE_HEADER_SIZE:
            with pytest.raises(DamagedDataError, match=r"wal-0000000003\.log at offset 0"):
                read_back(copy)
        else:
            first = read_back(copy)
            count = len(first.operations)
            assert first.operations == numbered(1, count)
            assert 3 <= count <= 6
            log = LogMaker(copy)
            log.write(payloads(count + 1, count + 2))
            log.close()
            assert read_back(copy).operations == numbered(1, count + 2)
        shutil.rmtree(copy)


def test_a_torn_tail_is_cut_kept_aside_and_counted(directory: Path) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 2))
    log.write(payloads(3, 4))
    log.close()
    path = Layout(directory).log(2)
    content = path.read_bytes()
    used = log_format.used_size(content)
    path.write_bytes(content[: used - 3] + bytes(50))
    recovered = read_back(directory)
    assert recovered.operations == numbered(1, 2)
    recovery = recovered.recovery
    (aside,) = recovery.cut_files
    assert aside.name.startswith("wal-0000000002.log.broken-")
    assert aside.read_bytes() == content[path.stat().st_size : used - 3]
    assert recovery.torn_bytes == aside.stat().st_size > 0
    again = read_back(directory)
    assert again.operations == recovered.operations
    assert again.recovery.cut_files == ()


def test_the_copy_is_durable_before_the_tail_is_cut(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 2))
    log.close()
    path = Layout(directory).log(2)
    path.write_bytes(path.read_bytes()[:-2000].rstrip(b"\0")[:-1])
    recovery = read_back(directory, files=files).recovery
    steps = [call[:2] for call in files.calls if call[0] != "sync_file"]
    (aside,) = recovery.cut_files
    start = steps.index(("write_file", aside))
    assert steps[start + 1] == ("sync_folder", directory)
    assert steps.index(("truncate", path)) > start + 1


def test_a_second_cut_in_the_same_second_has_a_name_of_its_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram.persistence.recovery.time.time", lambda: 1_700_000_000.5)
    LogMaker(directory).close()
    path = Layout(directory).log(1)
    names = []
    for garbage in (b"one", b"two"):
        path.write_bytes(path.read_bytes() + garbage)
        (aside,) = read_back(directory).recovery.cut_files
        assert aside.read_bytes() == garbage
        names.append(aside.name.rpartition("-")[2])
    assert names == ["1700000000", "1700000001"]


def test_every_flipped_bit_is_refused_cut_or_harmless(directory: Path, scratch: Path) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 2))
    log.new_file()
    log.write(payloads(3, 4))
    log.write(payloads(5, 6))
    log.write([], mark=True)
    log.write(payloads(7, 8))
    log.close()
    layout = Layout(directory)
    durable_lsn = 6
    for name in (layout.log(1).name, layout.log(2).name, layout.log(3).name, "MANIFEST"):
        content = (directory / name).read_bytes()
        for bit in range(8 * min(log_format.used_size(content) + 8, len(content))):
            copy = scratch / "copy"
            shutil.copytree(directory, copy)
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (copy / name).write_bytes(bytes(flipped))
            refused: Path | None = None
            try:
                recovered = read_back(copy)
            except DamagedDataError as error:
                refused = error.path
            if refused is None:
                count = len(recovered.operations)
                assert recovered.operations == numbered(1, count)
                assert durable_lsn <= count <= 8
                assert recovered.recovery.torn_bytes or count == 8
            else:
                assert refused == copy / name
            shutil.rmtree(copy)


def test_damage_to_what_was_durable_names_file_and_offset(directory: Path) -> None:
    log = LogMaker(directory)
    log.write(payloads(1, 2))
    log.write(payloads(3, 3))
    log.close()
    path = Layout(directory).log(2)
    offset = log_format.FILE_HEADER_SIZE
    damage(path, offset + log_format.RECORD_HEADER_SIZE + 3)
    before = path.read_bytes()
    reason = "payload checksum mismatch at LSN 1, but LSN 2 was durable"
    with pytest.raises(DamagedDataError, match=reason) as caught:
        read_back(directory)
    assert (caught.value.path, caught.value.offset) == (path, offset)
    assert path.read_bytes() == before


def test_damage_in_a_closed_file_is_refused_where_it_is(two_files: Path) -> None:
    path = Layout(two_files).log(2)
    damage(path, log_format.FILE_HEADER_SIZE + log_format.RECORD_HEADER_SIZE)
    with pytest.raises(DamagedDataError, match=r"wal-0000000002\.log at offset 64: record payload"):
        read_back(two_files)


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_file_is_refused(two_files: Path, number: int) -> None:
    Layout(two_files).log(number).unlink()
    with pytest.raises(DamagedDataError, match=rf"wal-000000000{number}\.log: missing"):
        read_back(two_files)


def test_a_missing_manifest_is_refused(two_files: Path) -> None:
    Layout(two_files).manifest.unlink()
    with pytest.raises(DamagedDataError, match="MANIFEST: missing"):
        read_back(two_files)


@pytest.mark.parametrize("name", ["snapshot-3", "segments/abc"])
def test_a_manifest_missing_beside_a_folder_is_refused(directory: Path, name: str) -> None:
    (directory / name).mkdir()
    with pytest.raises(DamagedDataError, match="MANIFEST: missing"):
        read_back(directory)


def test_files_that_do_not_belong_together_are_refused(two_files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "segments").mkdir(parents=True)
    log = LogMaker(other)
    log.write([encode(operation(lsn, 6)) for lsn in (1, 2, 3)])
    log.close()
    shutil.copy(Layout(other).log(2), Layout(two_files).log(2))
    with pytest.raises(DamagedDataError, match=r"the records end here, but not for wal-0000000002\.log"):
        read_back(two_files)
    shutil.copy(Layout(two_files).log(3), Layout(two_files).log(1))
    with pytest.raises(DamagedDataError, match=r"wal-0000000001\.log at offset 0: holds file 3"):
        read_back(two_files)


def test_a_log_that_starts_behind_its_snapshot_is_refused(two_files: Path) -> None:
    checksum = snapshot(two_files, 2)
    manifest = Manifest(first_log_file=3, snapshot="snapshot-2", lsn=2, checksum=checksum)
    write_manifest(DiskFiles(), Layout(two_files).manifest, manifest)
    with pytest.raises(DamagedDataError, match="starts at LSN 4 instead of 3"):
        read_back(two_files)


def one_record(directory: Path, kind: int, lsn: int, payload: bytes) -> None:
    """Writes file 1 of a log with a record whose checksums are right."""
    header = log_format.new_file_header(1, 1, 0)
    record, _ = log_format.encode_record(kind, lsn, payload, 0, header.tag, header.chain)
    layout = Layout(directory)
    layout.log(1).write_bytes(header.encode() + record)
    layout.manifest.write_bytes(encode_manifest(Manifest(first_log_file=1)))


@pytest.mark.parametrize(
    ("kind", "lsn", "payload", "reason"),
    [
        (log_format.OPERATIONS, 2, join([encode(operation(2))]), "LSN 2 instead of 1"),
        (log_format.OPERATIONS, 1, b"\x91\x93\x01", "operation not known"),
        (log_format.OPERATIONS, 1, b"\x91\x91\x01", "operation not known"),
        (log_format.OPERATIONS, 1, encode(operation(1)), "operation not known"),
        (7, 1, b"", "record type 7 is not known"),
        (log_format.MARK, 5, b"", "LSN 5 instead of 0"),
    ],
)
def test_intact_records_that_make_no_sense_are_refused(
    directory: Path, kind: int, lsn: int, payload: bytes, reason: str
) -> None:
    one_record(directory, kind, lsn, payload)
    with pytest.raises(DamagedDataError, match=rf"wal-0000000001\.log at offset 64: {reason}"):
        read_back(directory)


def test_the_snapshot_is_restored_before_the_log_behind_it(two_files: Path) -> None:
    checksum = snapshot(two_files, 3)
    manifest = Manifest(first_log_file=3, snapshot="snapshot-3", lsn=3, checksum=checksum)
    write_manifest(DiskFiles(), Layout(two_files).manifest, manifest)
    recovered = read_back(two_files)
    assert [folder.metadata for folder in recovered.snapshots] == [{"lsn": 3}]
    assert recovered.operations == numbered(4, 6)
    assert recovered.recovery.manifest == manifest
    assert Layout(two_files).log_numbers() == [3]


def test_a_damaged_snapshot_is_refused(two_files: Path) -> None:
    checksum = snapshot(two_files, 3)
    manifest = Manifest(first_log_file=3, snapshot="snapshot-3", lsn=3, checksum=checksum)
    write_manifest(DiskFiles(), Layout(two_files).manifest, manifest)
    damage(two_files / "snapshot-3" / "numbers.npy", 130)
    with pytest.raises(DamagedDataError, match=r"numbers\.npy"):
        read_back(two_files)
    shutil.rmtree(two_files / "snapshot-3")
    with pytest.raises(DamagedDataError, match="missing"):
        read_back(two_files)


def test_what_nothing_names_is_removed_at_start(directory: Path) -> None:
    log = LogMaker(directory)
    log.write([encode(InstallSegment(1, "named", 0, 9, ())), encode(InstallSegment(1, "", 0, 9, ("named",)))])
    log.close()
    segments = Layout(directory).segments
    for name in ("named", "unnamed", "next.building"):
        (segments / name).mkdir()
        (segments / name / "graph").write_bytes(b"graph")
    (directory / "prepared-9.log").write_bytes(bytes(100))
    snapshot(directory, 1)
    recovery = read_back(directory).recovery
    assert recovery.segments == ((1, "named"),)
    assert [path.name for path in segments.iterdir()] == ["named"]
    assert not (directory / "prepared-9.log").exists()
    assert not (directory / "snapshot-1").exists()


def test_what_is_not_its_own_stays(two_files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    segments = Layout(two_files).segments
    (segments / "link").symlink_to(other)
    for name in ("lost+found", ".snapshot"):
        (segments / name).mkdir()
    for path in (segments / "notes.txt", two_files / "prepared-notes.log", two_files / "snapshot-notes"):
        path.write_bytes(b"mine")
    before = set(two_files.rglob("*"))
    read_back(two_files)
    assert set(two_files.rglob("*")) == before
    assert other.exists()


def test_a_new_directory_may_hold_what_is_not_its_own(directory: Path) -> None:
    (Layout(directory).segments / "lost+found").mkdir()
    assert read_back(directory).recovery.lsn == 0
    assert (Layout(directory).segments / "lost+found").exists()


def test_a_reader_removes_nothing(two_files: Path) -> None:
    (Layout(two_files).segments / "fresh").mkdir()
    (two_files / "prepared-9.log").write_bytes(bytes(100))
    read_back(two_files, last_file=2)
    assert (Layout(two_files).segments / "fresh").exists()
    assert (two_files / "prepared-9.log").exists()


def test_progress_counts_the_bytes_of_the_log(two_files: Path) -> None:
    progress = Progress()
    recover(two_files, DiskFiles(), lambda _: None, lambda *_: None, progress=progress)
    layout = Layout(two_files)
    # Files 1 and 2 are as they were; of the third the rest has been cut.
    sizes = [layout.log(number).stat().st_size for number in (1, 2)]
    assert (progress.doing, progress.done) == ("reading the log", sum(sizes) + 4096)
    assert progress.total == progress.done


def test_an_interrupted_recovery_changes_nothing(two_files: Path, files: HookedFiles) -> None:
    progress = Progress()
    applied: list[int] = []

    def apply(lsn: int, operation: Operation) -> None:
        applied.append(lsn)
        progress.interrupted |= lsn == 2

    files.calls.clear()
    with pytest.raises(InterruptedWorkError, match=r"^ended while reading the log$"):
        recover(two_files, files, lambda _: None, apply, progress=progress)
    assert applied == [1, 2, 3]
    assert [call[0] for call in files.calls] == ["sync_folder"]


def test_names_are_durable_before_anything_is_removed(two_files: Path, files: HookedFiles) -> None:
    # A manifest renamed but not synced by a server that was killed could still be undone.
    (two_files / "prepared-9.log").write_bytes(bytes(100))
    read_back(two_files, files=files)
    calls = [call[:2] for call in files.calls]
    removed = [number for number, call in enumerate(calls) if call[0].startswith("remove")]
    assert removed
    assert calls.index(("sync_folder", two_files)) < min(removed)
