"""A disk of which it is known what was synced: files that record what is done to them, and what may be left.

When the power fails,

- what was synced is there: the content of a file after it was synced, the names in a folder after that was;
- of what was written to a file since, each block of 512 bytes or of 4 KiB is there or is not, in any order,
  and where a block was written several times, as it was after any of them; so is the file's size. A block
  beyond the size that was synced may hold anything, unless its space was allocated before;
- of the names that were made, changed or removed in a folder since, each change is there or is not, in any
  order but for changes of the same name. A rename within a folder is one change.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import attrs

from engram.files import DiskFiles
from engram.operations import Operation

# What the disk was doing when the power failed.
WRITE = "write"
SYNC = "sync"
PREPARATION = "log space"
ROTATION = "rotation"
SEGMENT_FOLDER = "segment folder"
SEGMENT_RECORD = "segment record"
TRANSACTION = "EXEC"
SNAPSHOT_FOLDER = "snapshot folder"
MANIFEST = "manifest"
DELETION = "deletion"
RECOVERY = "recovery"
TAIL_CUT = "cut of a torn tail"
NEW_DIRECTORY = "new directory"
STEPS = (
    *(NEW_DIRECTORY, PREPARATION, WRITE, TRANSACTION, SYNC, ROTATION, SEGMENT_FOLDER, SEGMENT_RECORD),
    *(SNAPSHOT_FOLDER, MANIFEST, DELETION, RECOVERY, TAIL_CUT),
)
# What was there before, or is no event of the disk.
BEFORE = ""
ANY = "any"

BLOCK_SIZES = (512, 4096)
ROOT = 0


# What is recorded. A file or folder is known by a number; ROOT is the data directory.


@attrs.frozen
class Write:
    file: int
    offset: int
    data: bytes


@attrs.frozen
class Resize:
    """The file's size; what is beyond the old one is zero, and allocated."""

    file: int
    size: int


@attrs.frozen
class SyncFile:
    file: int


@attrs.frozen
class NewFolder:
    folder: int


@attrs.frozen
class Names:
    """Changes of names in a folder that are made together: each is of a file or folder now, or of nothing."""

    folder: int
    changes: tuple[tuple[str, int | None], ...]


@attrs.frozen
class SyncFolder:
    folder: int


@attrs.frozen
class Sent:
    """An operation; `inside` when another follows that must be recovered with it."""

    lsn: int
    operation: Operation
    inside: bool = False


@attrs.frozen
class Acknowledged:
    """Clients have seen, or may be shown from now on, the state as of `lsn`."""

    lsn: int


@attrs.frozen
class Recovered:
    """A server has started; what was sent after `lsn` is gone."""

    lsn: int


Event = Write | Resize | SyncFile | NewFolder | Names | SyncFolder
Mark = Sent | Acknowledged | Recovered


@attrs.frozen
class Entry:
    step: str
    what: Event | Mark


class Killed(BaseException):
    """The process ends here."""


class RecordingFiles(DiskFiles):
    """Real files in one directory; what was done to them is in `entries`.

    All that is there at the start is durable. `recovering` is to be set while recovery runs, and `killed` is
    once the process has been killed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: list[Entry] = []
        self._doom: tuple[int, str] | None = None
        self.recovering = False
        self.segment_records: set[bytes] = set()
        # The operations of each, joined.
        self.transactions: set[bytes] = set()
        self._target = self.entries
        self.killed = False
        self._count = ROOT
        self._numbers: dict[Path, int] = {directory: ROOT}
        self._descriptors: dict[int, int] = {}
        self._cutting = False
        self._names_step = BEFORE
        self._log_step = SYNC
        self._add(BEFORE, NewFolder(ROOT))
        for path in sorted(directory.rglob("*")):
            if path.is_dir():
                self._link(BEFORE, path, folder=True)
            else:
                file = self._link(BEFORE, path)
                self._add(BEFORE, Write(file, 0, path.read_bytes()))
                self._add(BEFORE, SyncFile(file))
        for path in (directory, *sorted(directory.rglob("*"))):
            if path.is_dir():
                self._add(BEFORE, SyncFolder(self._numbers[path]))

    def skips(self, call: str, path: Path, step: str) -> bool:
        """Whether a sync is left out; for those who plant faults."""
        return False

    def kill_after(self, entries: int, step: str = ANY) -> None:
        """Kills the process when there are so many entries more, or so many more of one step."""
        self._doom = entries, step

    def mark(self, mark: Mark) -> None:
        if not self.killed:
            self.entries.append(Entry(BEFORE, mark))

    def revive(self) -> None:
        """Another process goes on with the files as the killed one left them."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._cutting = False
        self.killed = False
        self._doom = None

    @contextmanager
    def child(self) -> Iterator[deque[Entry]]:
        """What is done meanwhile is done by another process; its entries are for the caller to record."""
        self._check_alive()
        entries: list[Entry] = []
        waiting: deque[Entry] = deque()
        self._target = entries
        try:
            yield waiting
        finally:
            self._target = self.entries
            waiting += entries

    def _add(self, step: str, event: Event) -> None:
        self._target.append(Entry(step, event))
        if self._doom is not None and self._target is self.entries and self._doom[1] in (step, ANY):
            self._doom = self._doom[0] - 1, self._doom[1]

    def _is_due(self, coming: int = 0) -> bool:
        return self._doom is not None and self._target is self.entries and self._doom[0] <= coming

    def _check_alive(self) -> None:
        self.killed = self.killed or self._is_due()
        if self.killed:
            raise Killed

    def _path(self, file: int) -> Path:
        return next(path for path, number in self._numbers.items() if number == file)

    def _step(self, call: str, path: Path) -> str:
        """What a call is part of, as its path tells."""
        parts = path.relative_to(self.directory).parts
        name = parts[0] if parts else ""
        if name.startswith("MANIFEST"):
            return NEW_DIRECTORY if self.recovering else MANIFEST
        if call == "remove":
            return DELETION
        if name == "segments":
            return SEGMENT_FOLDER if parts[1:] or call != "make_folder" else NEW_DIRECTORY
        if name.startswith("snapshot-"):
            return SNAPSHOT_FOLDER
        if name.startswith("prepared-"):
            return PREPARATION if call == "create" else ROTATION
        if not self.recovering:
            return self._log_step
        if name == "wal-0000000001.log" and call in ("create", "write_file"):
            return NEW_DIRECTORY
        if ".broken-" in name:
            self._cutting = True
        return TAIL_CUT if self._cutting else RECOVERY

    def _link(self, step: str, path: Path, *, folder: bool = False) -> int:
        self._count += 1
        self._numbers[path] = self._count
        if folder:
            self._add(step, NewFolder(self._count))
        self._rename(step, path.parent, ((path.name, self._count),))
        return self._count

    def _rename(self, step: str, folder: Path, changes: tuple[tuple[str, int | None], ...]) -> None:
        self._add(step, Names(self._numbers[folder], changes))
        if folder == self.directory:
            self._names_step = step

    def _sync(self, call: str, path: Path) -> None:
        step = self._step(call, path)
        if not self.skips(call, path, step):
            self._add(step, SyncFile(self._numbers[path]))

    # File operations

    def create(self, path: Path, size: int) -> int:
        self._check_alive()
        descriptor = super().create(path, size)
        step = self._step("create", path)
        self._descriptors[descriptor] = self._link(step, path)
        if size:
            self._add(step, Resize(self._numbers[path], size))
        return descriptor

    def open(self, path: Path) -> int:
        self._check_alive()
        descriptor = super().open(path)
        self._descriptors[descriptor] = self._numbers[path]
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._descriptors[descriptor]
        super().close(descriptor)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._check_alive()
        file = self._descriptors[descriptor]
        path = self._path(file)
        content = bytes(data)
        if path.name.startswith("wal-") and not self.recovering:
            self._log_step = WRITE
            for step, marks in ((SEGMENT_RECORD, self.segment_records), (TRANSACTION, self.transactions)):
                if any(map(content.__contains__, marks)):
                    self._log_step = step
        step = self._step("write_at", path)
        self.killed = self._doom is not None and self._doom[1] in (step, ANY) and self._is_due(1)
        if self.killed:
            # In the midst of it.
            content = content[: len(content) // 2]
        self._add(step, Write(file, offset, content))
        super().write_at(descriptor, content, offset)
        self._check_alive()

    def sync_data(self, descriptor: int) -> None:
        self._check_alive()
        super().sync_data(descriptor)
        if self._log_step == WRITE:
            self._log_step = SYNC
        self._sync("sync_data", self._path(self._descriptors[descriptor]))

    def truncate(self, path: Path, size: int) -> None:
        self._check_alive()
        self._add(self._step("truncate", path), Resize(self._numbers[path], size))
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        self._check_alive()
        self._sync("truncate", path)
        self._cutting = False

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        descriptor = self.create(path, 0)
        try:
            offset = 0
            for chunk in chunks:
                self.write_at(descriptor, chunk, offset)
                offset += memoryview(chunk).nbytes
            self._check_alive()
            self._sync("write_file", path)
        finally:
            self.close(descriptor)

    def sync_file(self, path: Path) -> None:
        self._check_alive()
        if path not in self._numbers:
            # The graph, which usearch writes by itself.
            step = self._step("create", path)
            self._add(step, Write(self._link(step, path), 0, path.read_bytes()))
        self._sync("sync_file", path)

    def sync_folder(self, path: Path) -> None:
        self._check_alive()
        if path != self.directory:
            step = self._step("sync_folder", path)
        elif self.recovering and self._names_step not in (NEW_DIRECTORY, TAIL_CUT):
            step = RECOVERY
        else:
            step = self._names_step
        if path == self.directory:
            self._names_step = MANIFEST
        if not self.skips("sync_folder", path, step):
            self._add(step, SyncFolder(self._numbers[path]))

    def make_folder(self, path: Path) -> None:
        self._check_alive()
        super().make_folder(path)
        self._link(self._step("make_folder", path), path, folder=True)

    def rename(self, source: Path, target: Path) -> None:
        self._check_alive()
        super().rename(source, target)
        assert source.parent == target.parent
        number = self._numbers[source]
        moved = {path: each for path, each in self._numbers.items() if path.is_relative_to(source)}
        for path, each in moved.items():
            del self._numbers[path]
            self._numbers[target / path.relative_to(source)] = each
        step = ROTATION if target.name.startswith("wal-") else self._step("rename", target)
        self._rename(step, source.parent, ((source.name, None), (target.name, number)))

    def remove(self, path: Path) -> None:
        self._check_alive()
        super().remove(path)
        if self._numbers.pop(path, None) is not None:
            self._rename(self._step("remove", path), path.parent, ((path.name, None),))

    def remove_tree(self, path: Path) -> None:
        self._check_alive()
        if not path.exists():
            return
        for each in sorted(path.iterdir()):
            (self.remove_tree if each.is_dir() else self.remove)(each)
        self._check_alive()
        path.rmdir()
        del self._numbers[path]
        self._rename(DELETION, path.parent, ((path.name, None),))


# What the disk may hold. A tree has the content of each file by its path, and None for a folder.

Tree = dict[str, bytes | None]

# Whether a part of a change that is not synced has reached the disk; a change is known by its number in the
# order of all.
Fate = Callable[[int], bool]


@attrs.define
class File:
    """`content` is certain; the rest was done since: writes and sizes, each with its number.

    A write is fresh when it is beyond the size, and no space was allocated there before.
    """

    content: bytes = b""
    size: int = 0
    writes: list[tuple[int, Write, bool]] = attrs.Factory(list)
    sizes: list[tuple[int, int]] = attrs.Factory(list)

    def resolve(self, fate: Fate, block_size: int, random: Random | None) -> bytes:
        """The content when so much of what was done is there; with `random` fresh blocks hold anything."""
        size = next((size for number, size in reversed(self.sizes) if fate(number)), len(self.content))
        blocks: dict[int, list[tuple[int, int, bytes, bool]]] = {}
        for number, write, fresh in self.writes:
            end = write.offset + len(write.data)
            for block in range(write.offset // block_size, -(-end // block_size)):
                first, last = max(write.offset, block * block_size), min(end, (block + 1) * block_size)
                piece = write.data[first - write.offset : last - write.offset]
                blocks.setdefault(block, []).append((number, first, piece, fresh))
        content = bytearray(self.content)
        for versions in blocks.values():
            there = next((n for n in range(len(versions), 0, -1) if fate(versions[n - 1][0])), 0)
            for _, first, piece, fresh in versions[: max(there, 1)]:
                if not there:
                    if not fresh or random is None:
                        break
                    piece = random.randbytes(len(piece))
                content.extend(bytes(max(0, first + len(piece) - len(content))))
                content[first : first + len(piece)] = piece
        content.extend(bytes(max(0, size - len(content))))
        return bytes(content[:size])


@attrs.define
class Folder:
    """`names` are certain; `changes` were made since, each with its number."""

    names: dict[str, int] = attrs.Factory(dict)
    changes: list[tuple[int, Names]] = attrs.Factory(list)

    def resolve(self, fate: Fate) -> dict[str, int]:
        there: list[Names] = []
        needed: set[str] = set()
        for number, change in reversed(self.changes):
            touched = {name for name, _ in change.changes}
            # What was done to the same name before must be there, too.
            if fate(number) or touched & needed:
                there.append(change)
                needed |= touched
        names = dict(self.names)
        for change in reversed(there):
            for name, file in change.changes:
                if file is None:
                    names.pop(name, None)
                else:
                    names[name] = file
        return names


class Disk:
    """What events leave on a disk: what is certain, and what is open."""

    def __init__(self) -> None:
        self._files: dict[int, File] = {}
        self._folders: dict[int, Folder] = {}
        self._number = 0

    def perform(self, event: Event) -> None:
        self._number += 1
        match event:
            case Write(number, offset, data):
                file = self._files.setdefault(number, File())
                file.writes.append((self._number, event, offset >= file.size))
                if offset + len(data) > file.size:
                    file.size = offset + len(data)
                    file.sizes.append((self._number, file.size))
            case Resize(number, size):
                file = self._files.setdefault(number, File())
                file.size = size
                file.sizes.append((self._number, size))
            case SyncFile(number):
                file = self._files.setdefault(number, File())
                self._files[number] = File(file.resolve(lambda _: True, 4096, None), file.size)
            case NewFolder(number):
                self._folders[number] = Folder()
            case Names(number):
                self._folders[number].changes.append((self._number, event))
            case SyncFolder(number):
                self._folders[number] = Folder(self._folders[number].resolve(lambda _: True))

    def after_power_failure(self, random: Random) -> Tree:
        """A state that the disk may be in when the power fails now."""
        contents = {
            number
            for file in self._files.values()
            for number in (
                *(written for written, _, _ in file.writes),
                *(resized for resized, _ in file.sizes),
            )
        }
        names = {number for folder in self._folders.values() for number, _ in folder.changes}
        fate = choose_fate(sorted(contents), sorted(names), random)
        block_size = random.choice(BLOCK_SIZES)
        garbage = random if random.random() < 0.3 else None
        tree: Tree = {}
        self._add(tree, "", ROOT, lambda file: file.resolve(fate, block_size, garbage), fate)
        return tree

    def _add(
        self, tree: Tree, prefix: str, number: int, content: Callable[[File], bytes], fate: Fate
    ) -> None:
        for name, each in sorted(self._folders[number].resolve(fate).items()):
            if each in self._folders:
                tree[prefix + name] = None
                self._add(tree, f"{prefix}{name}/", each, content, fate)
            else:
                tree[prefix + name] = content(self._files.get(each, File()))


def choose_fate(contents: list[int], names: list[int], random: Random) -> Fate:
    """What becomes of the changes that are not synced: in one of many ways."""
    changes = sorted({*contents, *names})
    if not changes:
        return lambda _: True
    one = random.choice(changes)
    part = random.choice([0.2, 0.5, 0.8])
    some = frozenset(contents)
    ways: list[Fate] = [
        lambda _: False,
        lambda _: True,
        # The names without what they name, and the reverse.
        lambda number: number not in some,
        lambda number: number in some,
        # In order, torn at the last.
        lambda number: number < one or (number == one and random.random() < 0.5),
        lambda number: number != one or random.random() < 0.5,
        lambda number: number == one and random.random() < 0.8,
        lambda _: random.random() < part,
        lambda _: random.random() < part,
    ]
    return random.choice(ways)


def write_tree(tree: Tree, directory: Path) -> None:
    directory.mkdir()
    for path, content in tree.items():
        if content is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(content)
