"""The servers that are measured: started on free ports, pinned to cores, ended by process id."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

ENGRAM = f"{sys.executable} -P -m engram"

START_SECONDS = 120.0
STOP_SECONDS = 20.0

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """A server that is to be measured cannot be run; the text says why."""


@attrs.frozen
class Peer:
    """A running server on the loopback address."""

    name: str
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time used so far by the server and its children, those that have ended included."""
        ticks = 0
        for pid in family(self.pid):
            try:
                # proc(5): after the name in parentheses come state, ppid, ...; utime, stime, cutime and
                # cstime are fields 14 to 17 of the whole line.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(map(int, fields[11:15]))
        return ticks / _TICKS_PER_SECOND

    def resident(self) -> tuple[int, int]:
        """Anonymous and mapped memory of the server itself, in bytes (RssAnon and RssFile of proc(5))."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        anonymous, mapped = (int(sizes[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
        return anonymous, mapped


@contextmanager
def running(name: str, command: str, port: int, cores: Sequence[int] = ()) -> Iterator[Peer]:
    """Runs a server until the block ends. With `cores` it, and all it starts, stays on these.

    `command` is split as a shell would, without a shell.

    Raises:
        ServerError: there is no such program, or it ended or stayed silent instead of listening.
    """
    with started(name, command, port, cores) as server:
        server.wait_until_listening()
        yield server.peer


@attrs.frozen
class Started:
    """A server that has just been started; `output` is what it has said so far."""

    peer: Peer
    process: subprocess.Popen[bytes]
    output: Path

    def wait_until_listening(self) -> None:
        """Raises ServerError when it ends, or does not listen, in time."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.peer.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise self.failure("does not listen")

    def failure(self, missing: str) -> ServerError:
        """The error of a server that ended, or of one that runs and `missing` says what it does not do."""
        code = self.process.poll()
        state = missing if code is None else f"ended with code {code}"
        tail = "\n".join(self.output.read_text(errors="replace").splitlines()[-10:])
        return ServerError(f"{self.peer.name} {state} on port {self.peer.port}:\n{tail}")


@contextmanager
def started(name: str, command: str, port: int, cores: Sequence[int] = ()) -> Iterator[Started]:
    """As `running`, but does not wait until the server listens.

    Raises:
        ServerError: there is no such program.
    """
    arguments = shlex.split(command)
    if shutil.which(arguments[0]) is None:
        raise ServerError(f"{name}: there is no program '{arguments[0]}'")
    with tempfile.TemporaryFile() as output:
        with on_cores(cores):
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield Started(Peer(name, port, process.pid), process, Path(f"/proc/self/fd/{output.fileno()}"))
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it, itself first."""
    found = [pid]
    for member in found:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                # The thread, or the process, has ended.
                continue
    return found


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes started in the block run on these cores only; on any when none are given."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def end_servers_when_terminated() -> None:
    """Makes SIGTERM unwind the program like Ctrl-C, so that `running` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def describe_machine(folder: Path | None = None) -> str:
    """One line: cores, CPU model, kernel, Python, load, and the file system of a folder when one is given."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    words = [
        f"{len(os.sched_getaffinity(0))} cores",
        model,
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"load average {os.getloadavg()[0]:.1f}",
    ]
    if folder is not None:
        words.append(f"data on {_file_system(folder)}")
    return ", ".join(words)


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in [header, rule, *rows]
    )


def render_number(value: float) -> str:
    """As many digits as tell something."""
    if value == int(value) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"
