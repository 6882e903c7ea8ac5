from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from engram import __version__
from engram.cli import command_line, report, usage
from engram.config import SETTINGS
from engram.files import DiskFiles
from engram.persistence import recover
from engram.server import Started
from tests.conftest import PATIENCE, encode_request

SCRIPTS = Path(sys.executable).parent
ENTRIES = {
    "engram": [str(SCRIPTS / "engram")],
    "trio-run": [str(SCRIPTS / "trio-run"), "engram"],
    "python -m": [sys.executable, "-m", "engram"],
}
MODULE = ENTRIES["python -m"]


@attrs.define
class Process:
    """A server in a process of its own that has said that it listens."""

    process: subprocess.Popen[str]
    greeting: str

    @property
    def ports(self) -> list[int]:
        return [int(port) for port in re.findall(r"127\.0\.0\.\d:(\d+)", self.greeting)]

    def call(self, *requests: str) -> bytes:
        """Sends requests and a QUIT; returns all replies but the last."""
        words = [request.encode().split() for request in (*requests, "QUIT")]
        with socket.create_connection(("127.0.0.1", self.ports[0]), PATIENCE) as client:
            client.sendall(b"".join(map(encode_request, words)))
            received = bytearray()
            while data := client.recv(65536):
                received += data
        return bytes(received).removesuffix(b"+OK\r\n")

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        """Sends signals; returns the exit code and what was written to standard error."""
        for each in signals:
            self.process.send_signal(each)
        _, errors = self.process.communicate(timeout=4 * PATIENCE)
        return self.process.returncode, errors


@contextmanager
def server(
    *arguments: str, entry: Sequence[str] = MODULE, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    process = subprocess.Popen(
        [*entry, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    try:
        yield Process(process, process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def run(*arguments: str, entry: Sequence[str] = MODULE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*entry, *arguments], capture_output=True, text=True, timeout=4 * PATIENCE)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_starts_a_server_that_sigterm_ends(entry: str, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    with server(
        "--port", "0", entry=ENTRIES[entry], environment={"TMPDIR": str(folder), "PWD": str(tmp_path)}
    ) as running:
        assert re.fullmatch(
            rf"engram {re.escape(__version__)} listening on 127\.0\.0\.1:\d+,"
            r" keeping nothing \(no --dir\): 0 keys and 0 vectors\n",
            running.greeting,
        )
        assert running.call("SET k v", "GET k") == b"+OK\r\n$1\r\nv\r\n"
        assert len(list(folder.iterdir())) == 1
        assert running.end(signal.SIGTERM) == (0, "")
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def test_a_directory_from_start_to_start(tmp_path: Path) -> None:
    config = tmp_path / "engram.conf"
    config.write_text("# where\nbind 127.0.0.1 127.0.0.2\nport 1\ndir data # not here\n")
    data = tmp_path / "data"
    arguments = (str(config), "--port", "0", "--dir", str(data))
    with server(*arguments) as running:
        assert re.fullmatch(
            rf"engram \S+ listening on 127\.0\.0\.1:(\d+), 127\.0\.0\.2:\1,"
            rf" persisting to {re.escape(str(data))}: recovered 0 keys and 0 vectors in \d+\.\d{{3}} s\n",
            running.greeting,
        )
        assert running.call("SET k v", "VNEW a 2", "VADD a x 12345678") == b"+OK\r\n+OK\r\n:1\r\n"

        second = run("--port", "0", "--dir", str(data))
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr == f"engram: {data}: another server is using this directory\n"

        assert running.end(signal.SIGINT) == (0, "")
    with server(*arguments) as running:
        assert "recovered 2 keys and 1 vectors in " in running.greeting
        assert running.call("GET k") == b"$1\r\nv\r\n"
        assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with server(*arguments) as running:
        assert "recovered 2 keys and 1 vectors in " in running.greeting
        assert running.call("SHUTDOWN") == b""
        assert running.end() == (0, "")


def test_a_second_signal_ends_it_while_a_client_holds_it_up(tmp_path: Path) -> None:
    with server(
        "--port", "0", "--shutdown-timeout", "86400", environment={"TMPDIR": str(tmp_path)}
    ) as running:
        with socket.create_connection(("127.0.0.1", running.ports[0]), PATIENCE) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(encode_request([b"SET", b"k", b"x" * 20_000_000]))
            assert client.recv(5) == b"+OK\r\n"
            client.sendall(encode_request([b"GET", b"k"]))
            assert client.recv(1) == b"$"
            code, errors = running.end(signal.SIGTERM, signal.SIGINT)
        assert (code, errors) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run("--port", str(port))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(
        rf"engram: cannot listen on 127\.0\.0\.1 port {port}: Address already in use\n", ended.stderr
    )


def test_a_damaged_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "engram.snap").touch()
    ended = run("--port", "0", "--dir", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(rf"engram: {re.escape(str(tmp_path))}.*engram\.snap.*\n", ended.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nosuch", "1"],
        ["--port"],
        ["--port", "x"],
        ["--port", "65536"],
        ["--appendfsync", "sometimes"],
        ["--maxclients", "0"],
        ["nosuch.conf"],
        ["--port", "1", "2"],
    ],
)
async def test_bad_settings_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await command_line(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"engram: .+\n", errors)


def test_bad_settings_end_the_process_with_code_2() -> None:
    ended = run("--nosuch", "1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "engram: --nosuch: unknown setting 'nosuch'\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: trio-run PACKAGE [ARGUMENT ...]\n"),
        (["--help"], "usage: trio-run PACKAGE [ARGUMENT ...]\n"),
        (["nosuchpackage"], "trio-run: 'nosuchpackage' has no cli.command_line to run\n"),
        (["json"], "trio-run: 'json' has no cli.command_line to run\n"),
    ],
)
def test_trio_run_misused(arguments: list[str], line: str) -> None:
    ended = run(*arguments, entry=ENTRIES["trio-run"][:1])
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


async def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert await command_line(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == usage() + "\n"
    for name in SETTINGS:
        assert f"  --{name} " in text
    assert await command_line(["--version"]) == 0
    assert capsys.readouterr().out == f"engram {__version__}\n"


def test_a_tail_that_was_cut_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "segments").mkdir()
    recovery = recover(tmp_path, DiskFiles(), lambda folder: None, lambda lsn, operation: None)
    cut = attrs.evolve(recovery, torn_bytes=7, cut_files=(Path("/data/wal-1.log.broken-5"),))
    report(Started((("127.0.0.1", 6380),), "/data", 3, 4, 0.5, cut))
    output, errors = capsys.readouterr()
    assert output == (
        f"engram {__version__} listening on 127.0.0.1:6380, persisting to /data:"
        " recovered 3 keys and 4 vectors in 0.500 s\n"
    )
    assert errors == (
        "engram: the last 7 bytes of the log are not whole records, and are not known to have been durable;"
        " they were cut and are kept in /data/wal-1.log.broken-5\n"
    )


def limited(descriptors: int) -> list[str]:
    return ["sh", "-c", f'ulimit -n {descriptors} && exec "$0" -m engram "$@"', sys.executable]


def test_clients_cannot_use_up_the_descriptors_of_the_log(tmp_path: Path) -> None:
    arguments = ("--port", "0", "--dir", str(tmp_path / "data"), "--log-file-size", "64kb")
    with server(*arguments, entry=limited(200)) as running:
        clients = [socket.create_connection(("127.0.0.1", running.ports[0]), PATIENCE) for _ in range(100)]
        try:
            refused = clients[99].recv(100)
            for _ in range(20):
                clients[0].sendall(encode_request([b"SET", b"k", b"x" * 10_000]))
                assert clients[0].recv(100) == b"+OK\r\n"
        finally:
            for client in clients:
                client.close()
        assert refused == b"-ERR max number of clients reached\r\n"
        code, errors = running.end(signal.SIGTERM)
    assert code == 0
    assert "the limit of open files leaves room for 72 clients only" in errors


def test_too_few_descriptors_are_one_line() -> None:
    ended = run("--port", "0", entry=limited(100))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "engram: the limit of open files is too low: 128 are needed beside the clients; see ulimit -n\n"
    )
