"""An engram in a process of its own, for tests that need a real one."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import attrs
from redis import Redis

HOST = "127.0.0.1"

# How long anything may take before a test gives up on it.
DEADLINE_SECONDS = 180.0

_POLL_SECONDS = 0.01
# Where the modules of tests are found, whatever folder this one was started in.
_PROGRESS = re.compile(r'message="[^"]*: \d+ of \d+ MiB"$')
_ROOT = str(Path(__file__).parents[2])


def without_progress(errors: str) -> str:
    """What a server has said, without how far its start was: a slow machine has it say that."""
    return "".join(line for line in errors.splitlines(keepends=True) if not _PROGRESS.search(line))


class StartError(Exception):
    """The server ended instead of listening; `errors` is what it said."""

    def __init__(self, exit_code: int, errors: str) -> None:
        self.exit_code = exit_code
        self.errors = without_progress(errors)
        super().__init__(f"engram ended with exit code {exit_code}: {errors}")


@attrs.define(eq=False)
class ServerProcess:
    """A server; once it listens it has a port, and a greeting: the line it printed."""

    process: subprocess.Popen[bytes]
    _error_file: IO[bytes]
    port: int = 0
    greeting: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        """What the server has written to standard error so far."""
        # Not read(): the server writes at the offset that this descriptor shares with its own.
        descriptor = self._error_file.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    @property
    def complaints(self) -> str:
        """What the server has written to standard error, without how far its start was on a slow machine."""
        return without_progress(self.errors)

    def wait_until_listening(self) -> None:
        """Raises StartError when the server ends instead."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_SECONDS)
        assert ready, f"no greeting after {DEADLINE_SECONDS:g} s"
        self.greeting = self.process.stdout.readline().decode()
        match = re.search(r"listening on 127\.0\.0\.1:(\d+)", self.greeting)
        if match is None:
            raise StartError(self.wait(), self.errors)
        self.port = int(match[1])

    def client(self, **options: Any) -> Redis:
        """A redis-py client that never repeats a command: a test must know what was sent."""
        return Redis(HOST, self.port, **{"retry": None, "socket_timeout": DEADLINE_SECONDS, **options})

    def terminate(self) -> int:
        """Asks for a clean shutdown; returns the exit code."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """Ends the server at once, wherever it is."""
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The exit code, once the server has ended."""
        return self.process.wait(DEADLINE_SECONDS)

    def resident_bytes(self) -> int:
        """Memory of the server that is in RAM."""
        return self._status("VmRSS")

    def peak_resident_bytes(self) -> int:
        """The most memory of the server that was in RAM since it started."""
        return self._status("VmHWM")

    def address_space(self) -> int:
        """Bytes of addresses that the server has taken, which RLIMIT_AS bounds."""
        return self._status("VmSize")

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
        assert match is not None
        return int(match[1]) << 10

    def children(self) -> dict[int, str]:
        """Process ids and command lines of the server's children."""
        found = {}
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):
                for word in path.read_text().split():
                    found[int(word)] = _command_line(int(word))
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._error_file.close()


def launch_server(
    *arguments: str, prefix: Sequence[str] = (), module: Sequence[str] = ("engram",)
) -> ServerProcess:
    """Starts a server on a free port and does not wait.

    `prefix` is a command to run it under, `module` the module that runs it and that module's own arguments.
    """
    command = [*prefix, sys.executable, "-P", "-m", *module, "--port", "0", *arguments]
    search_path = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
    )
    return ServerProcess(process, errors)


def start_server(
    *arguments: str, prefix: Sequence[str] = (), module: Sequence[str] = ("engram",)
) -> ServerProcess:
    """As `launch_server`, and waits until it listens.

    Raises:
        StartError: it ended before it listened.
    """
    server = launch_server(*arguments, prefix=prefix, module=module)
    try:
        server.wait_until_listening()
    except BaseException:
        server.close()
        raise
    return server


@contextmanager
def running_server(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server that must end cleanly, and without a traceback, after the block."""
    server = start_server(*arguments, prefix=prefix)
    try:
        yield server
        exit_code = server.terminate()
        assert exit_code == 0, server.errors
        assert "Traceback" not in server.errors, server.errors
    finally:
        server.close()


def is_running(pid: int) -> bool:
    """Whether one of engram's processes has that id and has not ended."""
    # A process that has ended has an empty command line.
    return "engram" in _command_line(pid)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Polls until `condition` holds.

    Raises:
        AssertionError: it did not in time; `what` says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what} after {seconds:g} s"
        time.sleep(_POLL_SECONDS)
