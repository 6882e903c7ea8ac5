"""Power failing at any moment, in short; `python -m tests.crash.power_failures` is the long form.

That the states made there are worth something is shown by planted faults: a sync that is left out, or files
that are removed too early, must be found out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest

from engram.errors import DamagedDataError
from engram.index.segment import GRAPH
from engram.operations import decode
from engram.persistence.layout import Layout
from engram.persistence.queue import RunQueue
from tests.crash.power_failures import (
    FailedStateError,
    Tally,
    check,
    explore_life,
    replayed,
    run_server,
    start,
)
from tests.crash.recorded_disk import (
    MANIFEST,
    RECOVERY,
    ROOT,
    ROTATION,
    SEGMENT_FOLDER,
    SEGMENT_RECORD,
    SNAPSHOT_FOLDER,
    STEPS,
    SYNC,
    WRITE,
    Acknowledged,
    Disk,
    Event,
    Mark,
    Names,
    NewFolder,
    RecordingFiles,
    Resize,
    SyncFile,
    SyncFolder,
    Tree,
    Write,
    write_tree,
)

PAGE = 4096


def test_power_fails_at_any_moment() -> None:
    tally = Tally()
    for seed in (1, 2):
        tally.add(explore_life(seed, 260))
    assert tally.total >= 450
    assert all(tally.states[step] for step in STEPS), tally.table()


@pytest.mark.parametrize("seed", range(2))
def test_power_fails_again_during_recovery(scratch: Path, seed: int) -> None:
    random = Random(seed)
    directory = scratch / "life"
    directory.mkdir()
    files = RecordingFiles(directory)
    run_server(files, 40, random)
    writes = [
        point
        for point, entry in enumerate(files.entries, 1)
        if entry.step in (WRITE, SEGMENT_RECORD) and isinstance(entry.what, Write)
    ]
    for number in range(4):
        before = files.entries[: random.choice(writes)]
        first = scratch / f"first-{number}"
        write_tree(replayed(before)[0].after_power_failure(random), first)
        again = RecordingFiles(first)
        for entry in before:
            if isinstance(entry.what, Mark):
                again.mark(entry.what)
        base = len(again.entries)
        lsn = start(first, again).recovery.lsn
        # A client may have been shown it by now.
        again.mark(Acknowledged(lsn))
        for point in range(base, len(again.entries) + 1):
            disk, history = replayed(again.entries[:point])
            check(disk.after_power_failure(random), history, scratch / f"second-{number}-{point}")


def start_again_after_kill(files: RecordingFiles, entries: int, step: str, scratch: Path) -> None:
    """Kills a server after so many entries of a step, starts another, and has the power fail in its life."""
    random = Random(entries)
    files.kill_after(entries, step)
    run_server(files, 90, random)
    killed_at = len(files.entries)
    run_server(files, 3, random)
    for point in range(killed_at, len(files.entries) + 1, 2):
        disk, history = replayed(files.entries[:point])
        check(disk.after_power_failure(random), history, scratch / f"{entries}-{point}")


@pytest.mark.parametrize("step", [WRITE, SEGMENT_FOLDER, MANIFEST, ROTATION])
@pytest.mark.parametrize("entries", [1, 5])
def test_power_fails_after_a_killed_server_was_started_again(
    directory: Path, scratch: Path, entries: int, step: str
) -> None:
    start_again_after_kill(RecordingFiles(directory), entries, step, scratch)


# Planted faults: whether a sync is left out, by the call, the path, and the step it is part of.
Skips = Callable[[str, Path, str], bool]
FAULTS: dict[str, Skips] = {
    "records": lambda call, path, step: call == "sync_data" and step == SYNC,
    "records that name segments": lambda call, path, step: call == "sync_data" and step == SEGMENT_RECORD,
    "headers of log files": lambda call, path, step: call == "sync_data" and step == ROTATION,
    "names of log files": lambda call, path, step: call == "sync_folder" and step == ROTATION,
    "the manifest's content": lambda call, path, step: call == "write_file" and step == MANIFEST,
    "the manifest's name": lambda call, path, step: call == "sync_folder" and step == MANIFEST,
    "columns of snapshots": lambda call, path, step: call == "write_file" and step == SNAPSHOT_FOLDER,
    "names of columns": lambda call, path, step: call == "sync_folder" and path.name.startswith("snapshot-"),
    "names of snapshots": lambda call, path, step: call == "sync_folder" and step == SNAPSHOT_FOLDER,
    "columns of segments": lambda call, path, step: call == "write_file" and step == SEGMENT_FOLDER,
    "graphs": lambda call, path, step: path.name == GRAPH,
    "names of columns of segments": lambda call, path, step: path.name.endswith(".building"),
    "names of segments": lambda call, path, step: path.name == "segments",
}
FAULTS_IN_RECOVERY: dict[str, tuple[str, Skips]] = {
    "what was read": (WRITE, lambda call, path, step: call == "truncate"),
    "names that were seen": (MANIFEST, lambda call, path, step: call == "sync_folder" and step == RECOVERY),
}


class SkippingFiles(RecordingFiles):
    def __init__(self, directory: Path, fault: Skips) -> None:
        self._fault = fault
        super().__init__(directory)

    def skips(self, call: str, path: Path, step: str) -> bool:
        return self._fault(call, path, step)


class HastyFiles(RecordingFiles):
    """Removes what a new manifest will not name before it is there."""

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        if path.name == "MANIFEST.new" and not self.recovering:
            layout = Layout(self.directory)
            for number in layout.log_numbers()[:-2]:
                self.remove(layout.log(number))
        super().write_file(path, chunks)


def found_out(make_files: Callable[[Path], RecordingFiles]) -> str:
    """What is wrong with the first state that is not recovered as it must be."""
    for seed in range(1, 5):
        try:
            explore_life(seed, 100, make_files)
        except FailedStateError as error:
            shutil.rmtree(error.directory.parent)
            return str(error)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_sync_is_found_out(fault: str) -> None:
    assert found_out(partial(SkippingFiles, fault=FAULTS[fault]))


@pytest.mark.parametrize("fault", FAULTS_IN_RECOVERY)
def test_a_missing_sync_in_recovery_is_found_out(fault: str, scratch: Path) -> None:
    step, skips = FAULTS_IN_RECOVERY[fault]

    def try_all() -> None:
        for entries in range(1, 40):
            directory = scratch / f"life-{entries}"
            directory.mkdir()
            start_again_after_kill(SkippingFiles(directory, skips), entries, step, scratch)

    with pytest.raises((AssertionError, DamagedDataError)):
        try_all()


def test_removing_files_too_early_is_found_out() -> None:
    assert found_out(HastyFiles)


def test_a_transaction_in_several_records_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def append_together(queue: RunQueue, first_lsn: int, payloads: Sequence[bytes]) -> None:
        for lsn, payload in enumerate(payloads, first_lsn):
            operation = decode(payload)
            queue.append(lsn, operation, queue.reserve(lsn, operation))
            queue._plan_run()

    monkeypatch.setattr(RunQueue, "append_together", append_together)
    assert "inside a transaction" in found_out(RecordingFiles)


# What the model of the disk allows.


def trees(*events: Event, tries: int = 300) -> list[Tree]:
    """The different states after these events on an empty disk."""
    disk = Disk()
    for event in (NewFolder(ROOT), *events):
        disk.perform(event)
    found: list[Tree] = []
    for seed in range(tries):
        tree = disk.after_power_failure(Random(seed))
        if tree not in found:
            found.append(tree)
    return found


NEW = Names(ROOT, (("new", 1),))
MOVED = Names(ROOT, (("new", None), ("name", 1)))


def test_what_was_synced_stays() -> None:
    events: list[Event] = [NEW, Write(1, 0, b"a" * PAGE), SyncFile(1), MOVED, SyncFolder(ROOT)]
    assert trees(*events) == [{"name": b"a" * PAGE}]


def test_a_name_that_is_not_synced_may_go_and_content_not() -> None:
    found = trees(NEW, Write(1, 0, b"a"), SyncFile(1))
    assert len(found) == 2
    assert {} in found
    assert {"new": b"a"} in found


def test_a_durable_name_may_be_of_a_file_without_content() -> None:
    found = trees(NEW, SyncFolder(ROOT), Write(1, 0, b"a" * 1024))
    assert {"new": b""} in found
    assert {"new": b"a" * 1024} in found
    assert {"new": b"a" * 512 + bytes(512)} in found
    assert {"new": bytes(512) + b"a" * 512} in found
    assert all(len(tree["new"] or b"") in (0, 1024) for tree in found)


def test_writes_into_allocated_space_are_there_or_zero() -> None:
    allocated: list[Event] = [NEW, Resize(1, 2 * PAGE), SyncFile(1), SyncFolder(ROOT)]
    found = trees(*allocated, Write(1, PAGE - 512, b"a" * 1024))
    contents = {tree["new"] for tree in found}
    assert contents == {
        bytes(PAGE - 512) + first + second + bytes(PAGE - 512)
        for first in (bytes(512), b"a" * 512)
        for second in (bytes(512), b"a" * 512)
    }


def test_a_page_is_as_it_was_after_any_of_its_writes() -> None:
    found = trees(NEW, Resize(1, 2), SyncFile(1), SyncFolder(ROOT), Write(1, 0, b"a"), Write(1, 1, b"b"))
    assert sorted(tree["new"] or b"" for tree in found) == [b"\0\0", b"a\0", b"ab"]


def test_a_rename_is_one_change() -> None:
    found = trees(NEW, Write(1, 0, b"a"), SyncFile(1), SyncFolder(ROOT), MOVED)
    assert len(found) == 2
    assert {"new": b"a"} in found
    assert {"name": b"a"} in found


def test_a_folder_takes_its_content_along() -> None:
    folder: list[Event] = [NewFolder(1), NEW, NewFolder(2), Names(1, (("inner", 2),)), SyncFolder(1)]
    found = trees(*folder, MOVED)
    assert all(list(tree) in ([], ["name", "name/inner"], ["new", "new/inner"]) for tree in found)
    assert len(found) == 3
