"""Files that record and fail, and a data directory's life in short form."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from engram.columns import ColumnFolder
from engram.files import DiskFiles
from engram.operations import Operation, SetString
from engram.persistence.layout import Layout
from engram.persistence.log_writer import LogWriter, PreparedFile, Run
from engram.persistence.recovery import Recovery, recover


class HookedFiles(DiskFiles):
    """Real files; each call is listed, and `hook` may raise in its place or wait before it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hook: Callable[..., None] = lambda name, *arguments: None

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        self.hook(name, *arguments)

    def create(self, path: Path, size: int) -> int:
        self._note("create", path, size)
        return super().create(path, size)

    def open(self, path: Path) -> int:
        self._note("open", path)
        return super().open(path)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._note("write_at", descriptor, bytes(data), offset)
        super().write_at(descriptor, data, offset)

    def sync_data(self, descriptor: int) -> None:
        self._note("sync_data", descriptor)
        super().sync_data(descriptor)

    def truncate(self, path: Path, size: int) -> None:
        self._note("truncate", path, size)
        DiskFiles().truncate(path, size)

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        # One call to those who watch: it makes and writes the file through its own methods otherwise.
        self._note("write_file", path)
        DiskFiles().write_file(path, chunks)

    def sync_file(self, path: Path) -> None:
        self._note("sync_file", path)
        super().sync_file(path)

    def sync_folder(self, path: Path) -> None:
        self._note("sync_folder", path)
        super().sync_folder(path)

    def make_folder(self, path: Path) -> None:
        self._note("make_folder", path)
        super().make_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename", source, target)
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._note("remove", path)
        super().remove(path)

    def remove_tree(self, path: Path) -> None:
        self._note("remove_tree", path)
        super().remove_tree(path)


@attrs.frozen
class Recovered:
    """What `recover` gave to the engine, and returned."""

    recovery: Recovery
    snapshots: list[ColumnFolder]
    operations: list[tuple[int, Operation]]


def read_back(directory: Path, *, last_file: int | None = None, files: DiskFiles | None = None) -> Recovered:
    snapshots: list[ColumnFolder] = []
    operations: list[tuple[int, Operation]] = []

    def apply(lsn: int, operation: Operation) -> None:
        operations.append((lsn, operation))

    recovery = recover(directory, files or DiskFiles(), snapshots.append, apply, last_file=last_file)
    return Recovered(recovery, snapshots, operations)


def operation(lsn: int, size: int = 5) -> SetString:
    return SetString(b"key-%d" % lsn, bytes([lsn % 256]) * size)


def numbered(first: int, last: int) -> list[tuple[int, Operation]]:
    return [(lsn, operation(lsn)) for lsn in range(first, last + 1)]


class LogMaker:
    """Writes a log batch by batch, as the persistence task has the writer do it."""

    def __init__(self, directory: Path, files: DiskFiles | None = None) -> None:
        self.files = files or DiskFiles()
        self.directory = directory
        self.layout = Layout(directory)
        self._count = 0
        self.reopen()

    def reopen(self) -> None:
        """As after a restart: recovers, and goes on in a new file."""
        self.recovery = read_back(self.directory, files=self.files).recovery
        self.writer = LogWriter(self.layout, self.files, self.recovery)
        self.lsn = self.recovery.lsn
        self._new_file: int | None = 4096

    def new_file(self, size: int = 4096) -> None:
        self._new_file = size

    def write(self, payloads: Iterable[bytes], *, sync: bool = True, mark: bool = False) -> None:
        prepared = None
        if self._new_file is not None:
            self._count += 1
            path = self.layout.prepared(self._count)
            prepared = PreparedFile(path, self._new_file, self.files.create(path, self._new_file))
            self._new_file = None
        run = Run(self.lsn + 1, prepared, list(payloads), mark)
        self.lsn += len(run.payloads)
        self.writer.commit([run], sync=sync)

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
def files() -> HookedFiles:
    return HookedFiles()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory as `lock_directory` leaves it."""
    path = tmp_path / "data"
    (path / "segments").mkdir(parents=True)
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for thousands of recoveries: in memory where there is such, for syncs cost nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)
