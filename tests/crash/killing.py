"""Starts a server that is killed when it has reached a named point so many times.

    python -m tests.crash.killing POINT NUMBER [--counter FILE] -- <engram arguments>

A point is before, after or in the midst of something that is done to the files of the data directory: by the
server, by a child of it, or by recovery. There the server is killed with SIGKILL, and the child that has
reached the point, too; at a point that begins with "child-" the child alone is. Only what happens while FILE
is there counts, and each time adds a byte to it. Without it everything counts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from unittest import mock

import attrs

from engram import cli, server
from engram.files import DiskFiles
from engram.index.builder import BuilderSettings
from engram.operations import InstallSegment, decode_array
from engram.persistence import log_format, recover

T = TypeVar("T")

MODULE = "tests.crash.killing"
SNAPSHOTTER = "engram.snapshotter"
BUILDER = "engram.index.build_process"

# What begins with it kills a child, not the server.
CHILD_ONLY = "child-"

_CHILD_OPTION = "--child"
# A torn record has at least its checksums, so that it is not taken for space never used.
_CHECKSUMS_SIZE = 8

# Reached while the server is written to. "log-write" is that of a batch of records, "segment-record" that of
# one with a segment that goes into effect, "segment-write" that of a column by the builder.
RUNNING_POINTS = (
    *("before-log-write", "half-log-write", "after-log-write", "before-log-sync", "after-log-sync"),
    *("before-log-rename", "after-log-rename", "before-log-folder-sync", "after-log-folder-sync"),
    *("before-segment-record", "after-segment-record"),
    *("before-manifest-rename", "after-manifest-rename"),
    *("before-log-delete", "after-log-delete", "half-snapshot-delete", "half-segment-delete"),
    *("before-snapshot-write", "half-snapshot-write", "after-snapshot-write"),
    *("before-segment-write", "after-segment-write", "before-segment-rename", "after-segment-rename"),
    *("child-before-snapshot-write", "child-before-segment-rename", "child-after-segment-rename"),
)

# Reached while the server starts, and at which of the others it was killed before, so that they are.
RECOVERY_POINTS = {
    **dict.fromkeys(
        (
            *("before-recovery-copy", "half-recovery-copy", "after-recovery-copy"),
            *("before-recovery-folder-sync", "after-recovery-folder-sync"),
        ),
        "half-log-write",
    ),
    **dict.fromkeys(
        ("before-recovery-write", "half-recovery-write", "after-recovery-write"), "before-log-sync"
    ),
    **dict.fromkeys(("before-recovery-truncate", "after-recovery-truncate"), "after-log-sync"),
    **dict.fromkeys(("before-recovery-remove", "after-recovery-remove"), "before-log-delete"),
    **dict.fromkeys(
        ("before-recovery-remove-tree", "half-recovery-remove-tree", "after-recovery-remove-tree"),
        "after-segment-rename",
    ),
}

# Not a kill but a fault, for tests of those who look for faults: each NUMBERth batch of the log, or all from
# that one on, are not written.
LOST_BATCH = "lost-batch"
LOST_TAIL = "lost-tail"
FAULTS = (LOST_BATCH, LOST_TAIL)

_RECOVERY_CALLS = {
    "write_at": "recovery-write",
    "truncate": "recovery-truncate",
    "sync_folder": "recovery-folder-sync",
    "remove": "recovery-remove",
    "remove_tree": "recovery-remove-tree",
}
_LOG_CALLS = {"write_at": "log-write", "sync_data": "log-sync"}
_DELETIONS = {"wal-": "log-delete", "snapshot-": "snapshot-delete"}


@attrs.frozen
class Trigger:
    """When to kill, and whom; `server` is a process id."""

    point: str
    number: int
    counter: Path
    server: int

    @property
    def moment(self) -> str:
        """The point, whoever dies there."""
        return self.point.removeprefix(CHILD_ONLY)

    def reach(self, moment: str) -> None:
        if self.is_due(moment):
            self.kill()

    def is_due(self, moment: str) -> bool:
        return moment == self.moment and self.count() == self.number

    def count(self) -> int:
        """How often any process has reached the point, this time included; 0 when it does not count."""
        try:
            descriptor = os.open(self.counter, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            os.write(descriptor, b".")
            return os.lseek(descriptor, 0, os.SEEK_CUR)
        finally:
            os.close(descriptor)

    def kill(self) -> NoReturn:
        if not self.point.startswith(CHILD_ONLY):
            os.kill(self.server, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)


class KillingFiles(DiskFiles):
    """Real files, until the point is reached."""

    def __init__(self, trigger: Trigger) -> None:
        self.recovering = False
        self._trigger = trigger
        self._paths: dict[int, Path] = {}
        self._in_thread = threading.local()

    def _do(self, event: str, whole: Callable[[], T], half: Callable[[], object]) -> T:
        self._trigger.reach(f"before-{event}")
        if self._trigger.is_due(f"half-{event}"):
            half()
            self._trigger.kill()
        result = whole()
        self._trigger.reach(f"after-{event}")
        return result

    def create(self, path: Path, size: int) -> int:
        descriptor = super().create(path, size)
        self._paths[descriptor] = path
        return descriptor

    def open(self, path: Path) -> int:
        descriptor = super().open(path)
        self._paths[descriptor] = path
        return descriptor

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        event = self._descriptor_event("write_at", descriptor)
        if event == "log-write":
            if self._is_lost():
                return
            if self._trigger.moment.endswith("segment-record") and _has_segment(data):
                event = "segment-record"
        write = super().write_at
        self._do(
            event,
            lambda: write(descriptor, data, offset),
            lambda: write(descriptor, _torn(data, event), offset),
        )

    def sync_data(self, descriptor: int) -> None:
        event = self._descriptor_event("sync_data", descriptor)
        self._do(event, partial(super().sync_data, descriptor), _nothing)

    def truncate(self, path: Path, size: int) -> None:
        self._do(self._event("truncate", path), partial(super().truncate, path, size), _nothing)

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        write = super().write_file
        self._do(
            self._event("write_file", path),
            lambda: write(path, chunks),
            lambda: write(path, [_torn(b"".join(map(bytes, chunks)), "")]),
        )

    def sync_folder(self, path: Path) -> None:
        event = self._event("sync_folder", path)
        self._do(event, partial(super().sync_folder, path), _nothing)

    def rename(self, source: Path, target: Path) -> None:
        event = self._event("rename", target)
        self._do(event, partial(super().rename, source, target), _nothing)
        # Another thread may open a file meanwhile.
        for descriptor, path in list(self._paths.items()):
            if path == source:
                self._paths[descriptor] = target
        self._in_thread.renamed = event.removesuffix("-rename")

    def remove(self, path: Path) -> None:
        event = self._event("remove", path) if path.exists() else ""
        self._do(event, partial(super().remove, path), _nothing)

    def remove_tree(self, path: Path) -> None:
        event = self._event("remove_tree", path) if path.exists() else ""
        self._do(event, partial(super().remove_tree, path), partial(_remove_half, path))

    def _is_lost(self) -> bool:
        if self._trigger.point == LOST_BATCH:
            return not self._trigger.count() % self._trigger.number
        return self._trigger.point == LOST_TAIL and self._trigger.count() >= self._trigger.number

    def _descriptor_event(self, call: str, descriptor: int) -> str:
        path = self._paths.get(descriptor)
        return "" if path is None else self._event(call, path)

    def _event(self, call: str, path: Path) -> str:
        """What a call is, as its path tells; empty for what has no points."""
        if self.recovering:
            if ".broken-" in path.name:
                return "recovery-copy" if call == "write_file" else ""
            return _RECOVERY_CALLS.get(call, "")
        if call in ("write_at", "sync_data"):
            return _LOG_CALLS[call] if path.name.startswith("wal-") else ""
        if call == "write_file":
            return self._write_event(path.parent.name)
        if call == "rename":
            return _rename_event(path)
        if call == "sync_folder":
            renamed = getattr(self._in_thread, "renamed", "")
            self._in_thread.renamed = ""
            return f"{renamed}-folder-sync" if renamed else ""
        return _deletion_event(path) if call in ("remove", "remove_tree") else ""

    def _write_event(self, folder: str) -> str:
        if folder.startswith("snapshot-"):
            return "snapshot-write"
        # The server writes the rows, the builder the columns beside them.
        in_child = os.getpid() != self._trigger.server
        return "segment-write" if in_child and folder.endswith(".building") else ""


def _rename_event(target: Path) -> str:
    if target.parent.name == "segments":
        return "segment-rename"
    return "manifest-rename" if target.name == "MANIFEST" else "log-rename"


def _deletion_event(path: Path) -> str:
    if path.parent.name == "segments":
        return "segment-delete"
    return next((event for start, event in _DELETIONS.items() if path.name.startswith(start)), "")


def _records(data: bytes | memoryview) -> Iterator[memoryview]:
    """The records of a batch, each with its header."""
    rest = memoryview(data)
    while rest:
        size = log_format.RECORD_HEADER_SIZE + int.from_bytes(rest[8:12], "little")
        yield rest[:size]
        rest = rest[size:]


def _has_segment(data: bytes | memoryview) -> bool:
    payloads = (record[log_format.RECORD_HEADER_SIZE :] for record in _records(data))
    return any(
        isinstance(operation, InstallSegment)
        for payload in payloads
        if payload
        for operation in decode_array(payload)
    )


def _torn(data: bytes | memoryview, event: str) -> bytes:
    """A part of what was to be written; of a batch of the log with a part of a record at the end."""
    if event not in ("log-write", "segment-record"):
        return bytes(data[: random.randrange(len(data))])
    records = list(_records(data))
    whole = random.randrange(len(records))
    kept = sum(map(len, records[:whole])) + random.randrange(_CHECKSUMS_SIZE, len(records[whole]))
    return bytes(data[:kept])


def _remove_half(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in random.sample(files, (len(files) + 1) // 2):
        file.unlink()


def _nothing() -> None:
    pass


def _child_command(trigger: Trigger, module: str, *arguments: str) -> list[str]:
    words = (trigger.point, str(trigger.number), str(trigger.counter), str(trigger.server))
    return [sys.executable, "-P", "-m", MODULE, _CHILD_OPTION, module, *words, *arguments]


def _run_server(trigger: Trigger, arguments: list[str]) -> int:
    files = KillingFiles(trigger)

    def recover_and_tell(*words: Any, **options: Any) -> Any:
        files.recovering = True
        recovery = recover(*words, **options)
        files.recovering = False
        return recovery

    def snapshot_command(folder: Path) -> Callable[[int], list[str]]:
        return lambda last_file: _child_command(trigger, SNAPSHOTTER, str(folder), str(last_file))

    builder_settings = partial(BuilderSettings, command=tuple(_child_command(trigger, BUILDER)))
    with (
        mock.patch.object(sys, "argv", ["engram", *arguments]),
        mock.patch.multiple(
            server,
            DiskFiles=lambda: files,
            recover=recover_and_tell,
            _snapshot_command=snapshot_command,
            BuilderSettings=builder_settings,
        ),
    ):
        return cli.main()


def _run_child(module_name: str, words: list[str]) -> int:
    point, number, counter, pid, *arguments = words
    module = importlib.import_module(module_name)
    files = KillingFiles(Trigger(point, int(number), Path(counter), int(pid)))
    with (
        mock.patch.object(sys, "argv", [module_name, *arguments]),
        mock.patch.object(module, "DiskFiles", return_value=files),
    ):
        code: int = module.main()
    return code


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == [_CHILD_OPTION]:
        return _run_child(words[1], words[2:])
    points = (*RUNNING_POINTS, *RECOVERY_POINTS, *FAULTS)
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        usage="%(prog)s POINT NUMBER [--counter FILE] -- ENGRAM-ARGUMENT ...",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument(
        "point", metavar="POINT", choices=points, help=f"where it is killed: one of {', '.join(points)}"
    )
    parser.add_argument("number", metavar="NUMBER", type=int, help="the time that kills; 1: the first")
    parser.add_argument(
        "--counter",
        metavar="FILE",
        type=Path,
        help="what happens while it is there counts; default: all",
    )
    divider = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:divider])
    with tempfile.NamedTemporaryFile(prefix="engram-killing-") as everything:
        counter = options.counter or Path(everything.name)
        trigger = Trigger(options.point, options.number, counter.absolute(), os.getpid())
        return _run_server(trigger, words[divider + 1 :])


if __name__ == "__main__":
    sys.exit(main())
