"""Power failing at any moment: from a recorded run, states that a disk may be left in, each recovered.

What is recorded is writes to files and changes of names. Of what was not synced when the power fails, any
write is on disk whole, in part (by sectors of 512 bytes), or not at all, and so is any change of a name.
Recovery must find all that was acknowledged, nothing that was not sent, in order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random

import attrs
import pytest

from engram.columns import pack_bytes, unpack_bytes, write_columns
from engram.files import DiskFiles
from engram.operations import Operation, decode, encode
from engram.persistence.layout import Layout
from engram.persistence.recovery import remove_outdated
from engram.persistence.snapshot import SnapshotResult, install_snapshot
from tests.persistence.conftest import LogMaker, numbered, read_back

SECTOR = 512


@attrs.frozen
class Write:
    file: int
    offset: int
    data: bytes


@attrs.frozen
class Cut:
    file: int
    size: int


@attrs.frozen
class SyncFile:
    file: int


@attrs.frozen
class Name:
    """The path names this file from now on: a number, 0 for a folder, None for nothing.

    In a rename, the file is no longer at `source`.
    """

    path: Path
    file: int | None
    source: Path | None = None


@attrs.frozen
class SyncFolder:
    path: Path


@attrs.frozen
class Sent:
    lsn: int


@attrs.frozen
class Acknowledged:
    lsn: int


Event = Write | Cut | SyncFile | Name | SyncFolder | Sent | Acknowledged
FOLDER = 0


class Killed(BaseException):
    """The process ends here."""


class RecordingFiles(DiskFiles):
    """Real files; what was done to them is in `events`. All that is there at the start is durable.

    With `limit` set, the process is killed when there are as many events.
    """

    def __init__(self, directory: Path) -> None:
        self.limit: int | None = None
        self.events: list[Event] = []
        self._names: dict[Path, int] = {}
        self._descriptors: dict[int, int] = {}
        self._count = FOLDER
        for path in sorted(directory.rglob("*")):
            if path.is_dir():
                self.events.append(Name(path, FOLDER))
            else:
                file = self._new(path)
                self.events += [Write(file, 0, path.read_bytes()), SyncFile(file)]
        for path in (directory, *directory.rglob("*")):
            if path.is_dir():
                self.events.append(SyncFolder(path))

    def _new(self, path: Path) -> int:
        self._count += 1
        self._names[path] = self._count
        self.events.append(Name(path, self._count))
        return self._count

    def _check_limit(self) -> None:
        if self.limit is not None and len(self.events) >= self.limit:
            raise Killed

    def create(self, path: Path, size: int) -> int:
        self._check_limit()
        descriptor = super().create(path, size)
        self._descriptors[descriptor] = self._new(path)
        self.events.append(Write(self._names[path], 0, bytes(size)))
        return descriptor

    def open(self, path: Path) -> int:
        self._check_limit()
        descriptor = super().open(path)
        self._descriptors[descriptor] = self._names[path]
        return descriptor

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._check_limit()
        self.events.append(Write(self._descriptors[descriptor], offset, bytes(data)))
        super().write_at(descriptor, data, offset)

    def sync_data(self, descriptor: int) -> None:
        self._check_limit()
        super().sync_data(descriptor)
        self.events.append(SyncFile(self._descriptors[descriptor]))

    def truncate(self, path: Path, size: int) -> None:
        self._check_limit()
        self.events.append(Cut(self._names[path], size))
        super().truncate(path, size)
        self.events.append(SyncFile(self._names[path]))

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        super().write_file(path, chunks)
        self.events.append(SyncFile(self._names[path]))

    def sync_file(self, path: Path) -> None:
        self._check_limit()
        super().sync_file(path)
        self.events.append(SyncFile(self._names[path]))

    def sync_folder(self, path: Path) -> None:
        self._check_limit()
        super().sync_folder(path)
        self.events.append(SyncFolder(path))

    def make_folder(self, path: Path) -> None:
        self._check_limit()
        super().make_folder(path)
        self.events.append(Name(path, FOLDER))

    def rename(self, source: Path, target: Path) -> None:
        self._check_limit()
        super().rename(source, target)
        self._names[target] = self._names.pop(source)
        self.events.append(Name(target, self._names[target], source))

    def remove(self, path: Path) -> None:
        self._check_limit()
        super().remove(path)
        if self._names.pop(path, None) is not None:
            self.events.append(Name(path, None))

    def remove_tree(self, path: Path) -> None:
        self._check_limit()
        super().remove_tree(path)
        for name in [name for name in self._names if path in name.parents]:
            del self._names[name]
            self.events.append(Name(name, None))
        self.events.append(Name(path, None))


def after_power_failure(events: list[Event], random: Random, target: Path) -> None:
    """Makes, in the folder `target`, a state that the disk may be in after these events."""
    contents: dict[int, bytearray] = {}
    unsynced: dict[int, list[Write | Cut]] = {}
    names: dict[Path, int] = {}
    changes: dict[Path, list[Name]] = {}
    for event in events:
        match event:
            case Write(file) | Cut(file):
                unsynced.setdefault(file, []).append(event)
            case SyncFile(file):
                content = contents.setdefault(file, bytearray())
                for change in unsynced.pop(file, []):
                    perform(change, content)
            case Name(path):
                changes.setdefault(path.parent, []).append(event)
            case SyncFolder(path):
                for change_of_name in changes.pop(path, []):
                    rename(change_of_name, names)
    mode = random.choice(["all", "none", "some", "some"])
    for file, pending in unsynced.items():
        content = contents.setdefault(file, bytearray())
        for change in pending:
            for piece in pieces(change):
                if mode == "all" or (mode == "some" and random.random() < 0.7):
                    perform(piece, content)
    for listed in changes.values():
        for change_of_name in listed:
            if mode == "all" or (mode == "some" and random.random() < 0.7):
                rename(change_of_name, names)
    origin = min(path.parent for path in names) if names else target
    target.mkdir()
    for path, file in sorted(names.items()):
        copy = target / path.relative_to(origin)
        if file == FOLDER:
            copy.mkdir()
        elif copy.parent.is_dir():
            copy.write_bytes(contents.get(file, b""))


def perform(change: Write | Cut, content: bytearray) -> None:
    if isinstance(change, Cut):
        del content[change.size :]
    else:
        end = change.offset + len(change.data)
        content.extend(bytes(max(0, end - len(content))))
        content[change.offset : end] = change.data


def rename(change: Name, names: dict[Path, int]) -> None:
    if change.file is None:
        names.pop(change.path, None)
    else:
        names[change.path] = change.file
    if change.source is not None:
        names.pop(change.source, None)


def pieces(change: Write | Cut) -> list[Write | Cut]:
    if isinstance(change, Cut):
        return [change]
    first = change.offset - change.offset % SECTOR
    edges = range(first, change.offset + len(change.data), SECTOR)
    cuts = [max(edge - change.offset, 0) for edge in edges] + [len(change.data)]
    return [
        Write(change.file, change.offset + start, change.data[start:end]) for start, end in pairwise(cuts)
    ]


def restored(directory: Path, files: DiskFiles | None = None) -> list[Operation]:
    recovered = read_back(directory, files=files)
    held = [
        decode(each) for folder in recovered.snapshots for each in unpack_bytes("operations", folder.columns)
    ]
    return held + [each for _, each in recovered.operations]


class Life:
    """A server's life in the calls that its persistence task makes."""

    def __init__(self, directory: Path, files: RecordingFiles) -> None:
        self._files = files
        self._directory = directory
        self._log = LogMaker(directory, files)
        self._acknowledge()

    def _acknowledge(self) -> None:
        self._files.events.append(Acknowledged(self._log.lsn))

    def write(self, count: int, *, sync: bool = True, new_file: bool = False) -> None:
        first, last = self._log.lsn + 1, self._log.lsn + count
        if new_file:
            self._log.new_file()
        self._files.events.append(Sent(last))
        self._log.write([encode(each) for _, each in numbered(first, last)], sync=sync)
        if sync:
            self._acknowledge()

    def mark(self) -> None:
        self._log.write([], mark=True)

    def snapshot(self) -> None:
        self._log.new_file()
        self._log.write([])
        closed_file = Layout(self._directory).log_numbers()[-1] - 1
        recovered = read_back(self._directory, last_file=closed_file)
        held = [each for folder in recovered.snapshots for each in unpack_bytes("operations", folder.columns)]
        held += [encode(each) for _, each in recovered.operations]
        lsn = recovered.recovery.lsn
        layout = Layout(self._directory)
        self._files.make_folder(layout.snapshot(lsn))
        columns = pack_bytes("operations", held)
        checksum = write_columns(self._files, layout.snapshot(lsn), columns, {})
        result = SnapshotResult(layout.snapshot(lsn).name, lsn, checksum, (), 0)
        manifest = install_snapshot(layout, self._files, result, lsn, closed_file + 1)
        remove_outdated(layout, self._files, manifest)

    def end(self) -> None:
        self._log.close()


def check(events: list[Event], random: Random, copy: Path) -> int:
    """Recovers a state that these events may leave; returns how many operations are there."""
    after_power_failure(events, random, copy)
    sent = max((event.lsn for event in events if isinstance(event, Sent)), default=0)
    acknowledged = max((event.lsn for event in events if isinstance(event, Acknowledged)), default=0)
    (copy / "segments").mkdir(exist_ok=True)
    found = restored(copy)
    assert found == [each for _, each in numbered(1, len(found))]
    assert acknowledged <= len(found) <= sent
    assert restored(copy) == found
    shutil.rmtree(copy)
    return len(found)


def live(directory: Path, files: RecordingFiles) -> None:
    life = Life(directory, files)
    life.write(2)
    life.write(30, sync=False)
    life.write(3)
    life.mark()
    life.write(2, sync=False)
    life.write(2, sync=False, new_file=True)
    life.write(3)
    life.snapshot()
    life.write(2)
    life.write(2, sync=False)
    life.end()
    life = Life(directory, files)
    life.write(4, new_file=True)
    life.snapshot()
    life.write(20)
    life.write(20, sync=False)
    life.end()


def recorded_life(directory: Path) -> list[Event]:
    files = RecordingFiles(directory)
    live(directory, files)
    return files.events


@pytest.mark.parametrize("seed", range(7))
def test_power_fails_at_any_moment(directory: Path, scratch: Path, seed: int) -> None:
    events = recorded_life(directory)
    assert len(events) > 100
    for point in range(2, len(events) + 1):
        check(events[:point], Random(f"{seed} {point}"), scratch / f"copy-{point}")


@pytest.mark.parametrize("seed", range(4))
def test_power_fails_again_during_recovery(directory: Path, scratch: Path, seed: int) -> None:
    events = recorded_life(directory)
    random = Random(seed)
    for number in range(40):
        first = scratch / f"first-{number}"
        before = events[: random.randint(2, len(events))]
        after_power_failure(before, random, first)
        (first / "segments").mkdir(exist_ok=True)
        files = RecordingFiles(first)
        start = len(files.events)
        found = len(restored(first, files))
        marks = [event for event in before if isinstance(event, Sent | Acknowledged)]
        for point in range(start, len(files.events) + 1):
            check([*marks, *files.events[:point]], random, scratch / f"second-{number}-{point}")
        # What a client may have been shown since is durable.
        assert check([*marks, *files.events], random, scratch / f"second-{number}") == found


def test_power_fails_after_a_killed_server_was_started_again(scratch: Path) -> None:
    random = Random(1)
    whole = scratch / "whole"
    (whole / "segments").mkdir(parents=True)
    for limit in range(2, len(recorded_life(whole))):
        directory = scratch / f"life-{limit}"
        (directory / "segments").mkdir(parents=True)
        files = RecordingFiles(directory)
        files.limit = limit
        with pytest.raises(Killed):
            live(directory, files)
        files.limit = None
        life = Life(directory, files)
        for number in range(5):
            check(files.events, random, scratch / f"shown-{limit}-{number}")
        life.write(2)
        life.end()
        check(files.events, random, scratch / f"written-{limit}")
