from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import attrs
import pytest
from redis import Redis

import engram
from engram import __version__
from engram.cli import command_line, report, usage
from engram.config import SETTINGS
from engram.files import DiskFiles
from engram.persistence import recover
from engram.server import Started
from tests.conftest import PATIENCE, encode_request
from tests.crash.server_process import wait_until

SCRIPTS = Path(sys.executable).parent
ENTRIES = {
    "engram": [str(SCRIPTS / "engram")],
    "trio-run": [str(SCRIPTS / "trio-run"), "engram"],
    "python -m": [sys.executable, "-P", "-m", "engram"],
}
MODULE = ENTRIES["python -m"]

# On a busy machine a client that has sent QUIT waits for long until a child has saved.
PATIENT = ("--shutdown-timeout", "86400")


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
    *arguments: str,
    entry: Sequence[str] = MODULE,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[Process]:
    process = subprocess.Popen(
        [*entry, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=folder,
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
    config.write_text("# where\nbind 127.0.0.1 127.0.0.2\nport 1\n # not here\ndir data\n")
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


# Modules that the server or one of its children imports; none may be taken from the working directory.
SHADOWS = (
    *(
        "queue",
        "json",
        "struct",
        "typing",
        "threading",
        "re",
        "subprocess",
        "encodings",
        "linecache",
        "random",
    ),
    *("numpy", "usearch", "numkong", "trio", "attrs", "attr", "msgspec", "crc32c", "threadpoolctl", "tqdm"),
    *("engram", "sitecustomize", "usercustomize"),
)


def make_shadows(folder: Path) -> Path:
    """Fills a folder with modules that leave a mark when they are imported; returns where."""
    mark = folder / "imported"
    code = f"with open({str(mark)!r}, 'a') as file: file.write(__name__ + '\\n')\nraise SystemExit(9)\n"
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(code)
    return mark


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_of_the_working_directory_is_run(entry: str, keeps: bool, tmp_path: Path) -> None:
    folder = tmp_path / "anybody's"
    folder.mkdir()
    mark = make_shadows(folder)
    arguments = ["--dir", str(tmp_path / "data")] if keeps else []
    adds = [f"VADD vectors row-{number} {number:08d}" for number in range(40)]
    with server(
        "--port", "0", "--seal-rows", "16", *PATIENT, *arguments, entry=ENTRIES[entry], folder=folder
    ) as running:
        replies = running.call("VNEW vectors 2", *adds, "VOPTIMIZE vectors", *["SAVE"][: len(arguments)])
        assert running.end(signal.SIGTERM) == (0, "")
    assert b"-" not in replies
    assert not mark.exists()


def test_the_children_run_the_engram_that_the_server_runs(tmp_path: Path) -> None:
    copy = tmp_path / "source" / "engram"
    shutil.copytree(Path(engram.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    marks = []
    for module in (copy / "index" / "build_process.py", copy / "snapshotter.py"):
        marks.append(module.with_suffix(".mark"))
        start = "def main() -> int:\n"
        text = module.read_text()
        assert start in text
        module.write_text(text.replace(start, f"open({str(marks[-1])!r}, 'w').close()\n\n\n{start}"))
    entry = [sys.executable, "-m", "engram"]
    adds = [f"VADD vectors row-{number} {number:08d}" for number in range(40)]
    data = ("--dir", str(tmp_path / "data"))
    with server("--port", "0", *PATIENT, *data, entry=entry, folder=copy.parent) as running:
        assert b"-" not in running.call("VNEW vectors 2", *adds, "VOPTIMIZE vectors", "SAVE")
        assert running.end(signal.SIGTERM) == (0, "")
    assert [mark.exists() for mark in marks] == [True, True]


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
    return ["sh", "-c", f'ulimit -n {descriptors} && exec "$0" -P -m engram "$@"', sys.executable]


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


def test_segments_cannot_use_up_the_descriptors_of_clients_and_the_log(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    arguments = ("--port", "0", *PATIENT, "--dir", data, "--log-file-size", "64kb")
    with server(*arguments, entry=limited(200)) as running:
        replies, built = b"", -1
        while b"-" not in replies:
            name = f"vectors-{(built := built + 1)}"
            replies = running.call(f"VNEW {name} 2", f"VADD {name} row 12345678", f"VOPTIMIZE {name}")
        assert 0 < built < 36
        assert b"Too many open files" in replies
        connections = [socket.create_connection(("127.0.0.1", running.ports[0]), PATIENCE) for _ in range(20)]
        try:
            for client in connections:
                client.sendall(encode_request([b"SET", b"k", b"x" * 10_000]))
                assert client.recv(100) == b"+OK\r\n"
        finally:
            for client in connections:
                client.close()
        assert running.call("VSEARCH vectors-0 12345678 1", "VSAVE").endswith(b"+OK\r\n")
        code, errors = running.end(signal.SIGTERM)
    assert code == 0
    assert "failed: [Errno 24] Too many open files" in errors
    ended = run("--port", "0", "--dir", data, entry=limited(150))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "engram: the limit of open files is too low for what the data directory holds" in ended.stderr


def test_too_few_descriptors_are_one_line() -> None:
    ended = run("--port", "0", entry=limited(100))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "engram: the limit of open files is too low: 128 are needed beside the clients; see ulimit -n\n"
    )


# Where nothing can be printed


@contextmanager
def unread() -> Iterator[int]:
    """The end to write into of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        yield write
    finally:
        os.close(write)


@contextmanager
def full_device() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ended_by_terminate(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.terminate()
    _, errors = process.communicate(timeout=4 * PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("where", [unread, full_device])
def test_a_server_goes_on_where_it_cannot_say_that_it_is_up(
    where: Callable[[], AbstractContextManager[int]],
) -> None:
    command = [*MODULE, "--port", "0"]
    with where() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "level=warning" in line
        assert "which could not be printed: " in line
        running = Process(process, line)
        assert running.call("SET k v", "GET k") == b"+OK\r\n$1\r\nv\r\n"
        assert ended_by_terminate(process) == (0, "")
    finally:
        process.kill()
        process.communicate()


def test_a_server_goes_on_where_nothing_at_all_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / "engram.socket"
    command = [*MODULE, "--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path / "data")]
    with full_device() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(path.exists, "the server")
        with Redis(unix_socket_path=str(path)) as client:
            assert client.set("k", "v")
        process.terminate()
        assert process.wait(4 * PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["données", os.fsdecode(b"\xff"), "\u4e2d\u6587"])
def test_any_path_is_printed_in_any_encoding(name: str, tmp_path: Path) -> None:
    data = tmp_path / name
    encoding = {"PYTHONIOENCODING": "ascii"}
    with server("--port", "0", "--dir", str(data), environment=encoding) as running:
        assert "listening on" in running.greeting
        assert running.call("SET k v") == b"+OK\r\n"
        assert running.end(signal.SIGTERM) == (0, "")
    (data / name).write_bytes(b"")
    ended = subprocess.run(
        [*MODULE, "check", str(data)],
        capture_output=True,
        env={**os.environ, **encoding},
        timeout=4 * PATIENCE,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"not a file of engram's" in ended.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["check"], ["dump"]])
def test_what_cannot_be_printed_is_one_line(words: list[str], data: Path) -> None:
    arguments = [*words, str(data)] if not words[0].startswith("-") else words
    with full_device() as output:
        ended = subprocess.run(
            [*MODULE, *arguments], stdout=output, stderr=subprocess.PIPE, text=True, timeout=4 * PATIENCE
        )
    assert ended.returncode == 1
    assert ended.stderr == "engram: standard output: cannot be written: No space left on device\n"


# Subcommands


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a snapshot, a segment, and a log behind them."""
    data = tmp_path_factory.mktemp("written") / "data"
    with server("--port", "0", *PATIENT, "--dir", str(data)) as running:
        adds = [f"VADD vectors row-{number} {number:08d}" for number in range(40)]
        replies = running.call("SET before 1", "VNEW vectors 2", *adds, "VOPTIMIZE vectors", "VSAVE")
        assert b"-" not in replies
        assert running.call("SET k v") == b"+OK\r\n"
        assert running.end(signal.SIGTERM) == (0, "")
    return data


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy of `written`."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()
    }


def matching(directory: Path, pattern: str) -> list[Path]:
    return list(directory.glob(pattern))


def damage_log(data: Path) -> Path:
    path = max(matching(data, "wal-*.log"))
    content = bytearray(path.read_bytes())
    content[64 + 32 + 3] ^= 1
    path.write_bytes(content)
    return path


async def test_check_reports_and_changes_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(data)
    assert await command_line(["check", str(data)]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = output.splitlines()
    assert lines[-1] == f"{data}: nothing that was durable is damaged"
    assert all(" ok " in line for line in lines[:-1])
    assert sum(line.startswith("segments/") and " 40 rows, " in line for line in lines) == 1
    assert await command_line(["check", str(data), "--repair"]) == 0
    assert capsys.readouterr().out.endswith("is damaged; there is nothing to repair\n")
    assert contents(data) == before


async def test_check_says_what_is_wrong_and_repairs_it_when_told(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damage_log(data)
    before = contents(data)
    assert await command_line(["check", str(data)]) == 1
    output, errors = capsys.readouterr()
    assert f"{path.name}        damaged  at offset 64: record payload checksum mismatch" in output
    assert re.fullmatch(
        rf"engram: {path} at offset 64: record payload checksum mismatch at LSN (\d+), but LSN \1 was"
        rf" durable\nengram: `engram check {data} --repair` would cut the log at {path} at offset 64; lost"
        r" would be what LSN \1 and all after it did, up to LSN \1 at least\n",
        errors,
    )
    assert contents(data) == before

    assert await command_line(["check", str(data), "--repair"]) == 0
    output, errors = capsys.readouterr()
    assert errors.count("\n") == 1
    [kept] = matching(data, "*.broken-*")
    assert re.search(
        rf"\ncut {path} at offset 64\nlost what LSN \d+ and .*\nkept {kept}\n{data}: nothing that .*\n$",
        output,
    )
    with server("--port", "0", "--dir", str(data)) as running:
        assert running.call("GET before", "GET k") == b"$1\r\n1\r\n$-1\r\n"
        assert running.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("pattern", ["MANIFEST", "snapshot-*/columns.json", "segments/*/graph.usearch"])
async def test_repair_changes_nothing_that_a_cut_does_not_repair(
    pattern: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_log(data)
    [path] = matching(data, pattern)
    path.write_bytes(b"damaged")
    before = contents(data)
    assert await command_line(["check", str(data)]) == 1
    assert "cutting the log would not repair that: restore a copy" in capsys.readouterr().err
    assert await command_line(["check", str(data), "--repair"]) == 1
    errors = capsys.readouterr().err
    assert f"engram: {path}: " in errors
    assert errors.endswith("would not repair that; nothing was changed: restore a copy of the directory\n")
    assert contents(data) == before


async def test_a_directory_in_use_is_neither_checked_nor_dumped(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (["check"], ["check", "--repair"], ["dump"]):
            assert await command_line([*arguments, str(data)]) == 1
            assert capsys.readouterr() == ("", f"engram: {data}: another server is using this directory\n")


@pytest.mark.parametrize("name", ["check", "dump"])
async def test_what_is_no_data_directory_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await command_line([name, str(tmp_path)]) == 1
    assert capsys.readouterr() == ("", f"engram: {tmp_path}: not a data directory of engram's\n")
    assert matching(tmp_path, "*") == []


@pytest.mark.parametrize(
    "arguments",
    [["check"], ["check", "a", "b"], ["check", "--nosuch"], ["dump"], ["load"], ["load", "f", "--port", "x"]],
)
async def test_a_subcommand_misused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await command_line(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"usage: engram {arguments[0]} ")


@pytest.mark.parametrize("name", ["check", "dump", "load"])
async def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await command_line([name, "--help"]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith(f"usage: engram {name} ")
    assert errors == ""
    assert f"       engram {name} " in usage()


def test_a_config_file_may_have_the_name_of_a_subcommand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "check").write_text("nosuch 1\n")
    monkeypatch.chdir(tmp_path)
    assert run("./check").stderr == "engram: check, line 1: unknown setting 'nosuch'\n"


def test_a_start_that_is_refused_for_damage_names_check(data: Path) -> None:
    path = damage_log(data)
    ended = run("--port", "0", "--dir", str(data))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(
        rf"engram: {path} at offset 64: .*; run `engram check {data}` to see what can be done\n", ended.stderr
    )
    for entry in ENTRIES.values():
        assert run("check", str(data), entry=entry).returncode == 1


def test_a_dump_is_loaded_into_another_server(data: Path, tmp_path: Path) -> None:
    before = contents(data)
    dumped = run("dump", str(data))
    assert (dumped.returncode, dumped.stderr) == (0, "")
    assert contents(data) == before
    lines = [json.loads(line) for line in dumped.stdout.splitlines()]
    assert len(lines) == 1 + 3 + 40
    path, other = tmp_path / "dump.jsonl", tmp_path / "other"
    assert run("dump", str(data), "--compact", "--output", str(path)).stdout == ""

    with server("--port", "0", "--dir", str(other)) as running:
        to_server = ("--port", str(running.ports[0]))
        loaded = run("load", str(path), *to_server)
        assert (loaded.returncode, loaded.stderr) == (0, "")
        assert re.fullmatch(r"loaded 3 keys and 40 vectors in \d+\.\d s\n", loaded.stdout)
        again = run("load", str(path), *to_server)
        assert (again.returncode, again.stdout) == (1, "")
        assert again.stderr == "engram: line 2: the key is there already; --replace overwrites it\n"
        with path.open() as file:
            piped = subprocess.run(
                [*MODULE, "load", "-", "--replace", *to_server], stdin=file, capture_output=True, check=True
            )
        assert piped.stderr == b""
        assert running.end(signal.SIGTERM) == (0, "")
    dumped_again = [json.loads(line) for line in run("dump", str(other)).stdout.splitlines()]

    def in_order(found: list[dict[str, object]]) -> list[str]:
        return sorted(json.dumps(line) for line in found[1:])

    assert in_order(dumped_again) == in_order(lines)


def test_a_terminal_shows_how_far_loading_is(data: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    assert run("dump", str(data), "--output", str(dump)).returncode == 0
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 80))
    try:
        with server("--port", "0") as running:
            subprocess.run(
                [*MODULE, "load", str(dump), "--port", str(running.ports[0])],
                stdout=subprocess.DEVNULL,
                stderr=far,
                check=True,
                timeout=4 * PATIENCE,
            )
        shown = b""
        while b"43.0/43.0" not in shown:
            assert select.select([near], [], [], PATIENCE)[0], shown
            shown += os.read(near, 65536)
    finally:
        os.close(near)
        os.close(far)
    assert b"100%" in shown


def test_a_dump_of_damaged_vectors_writes_nothing(data: Path, tmp_path: Path) -> None:
    [path] = data.glob("segments/*/vectors.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ended = run("dump", str(data), "--output", str(tmp_path / "dump"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"engram: {path}: checksum mismatch\n"
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    "name", ["MANIFEST", "LOCK", "users.acl", "wal-0000000009.log", "segments/x", "link"]
)
async def test_a_dump_replaces_no_file_of_the_directory(
    name: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "link").symlink_to("MANIFEST")
    before = contents(data)
    path = data / name
    assert await command_line(["dump", str(data), "--output", str(path)]) == 1
    refused = f"engram: {path}: a file of the data directory, which is not to be replaced\n"
    assert capsys.readouterr() == ("", refused)
    assert contents(data) == before
    assert await command_line(["dump", str(data), "--output", str(data / "dump.jsonl")]) == 0


def test_a_reader_that_leaves_ends_a_dump_quietly(data: Path) -> None:
    for name in ("dump", "check"):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as output:
            ended = subprocess.run(
                [*MODULE, name, str(data)], stdout=output, stderr=subprocess.PIPE, timeout=4 * PATIENCE
            )
        assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_dump_to_standard_output_by_its_name(data: Path, tmp_path: Path) -> None:
    plain = run("dump", str(data)).stdout
    assert run("dump", str(data), "--output", "/dev/stdout").stdout == plain
    path = tmp_path / "dump"
    with path.open("wb", buffering=0) as output:
        output.write(b"before\n")
        subprocess.run(
            [*MODULE, "dump", str(data), "--output", "/proc/self/fd/1"],
            stdout=output,
            check=True,
            timeout=4 * PATIENCE,
        )
        output.write(b"behind\n")
    assert path.read_text() == f"before\n{plain}behind\n"


def test_a_dump_that_cannot_be_written_is_one_line(data: Path, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "none" / "dump"):
        ended = run("dump", str(data), "--output", str(output))
        assert ended.returncode == 1
        assert re.fullmatch(rf"engram: {output}: cannot be written: .*\n", ended.stderr)
    assert list(tmp_path.iterdir()) == [data]


async def test_load_without_a_file_or_a_server_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dump"
    assert await command_line(["load", str(path)]) == 1
    assert capsys.readouterr().err == f"engram: {path}: cannot be read: No such file or directory\n"
    path.touch()
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for argument in (str(port), "65536"):
        assert await command_line(["load", str(path), "--port", argument]) == 1
        error = capsys.readouterr().err
        assert error == f"engram: cannot connect to 127.0.0.1 port {argument}: Connection refused\n"


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_load_ends_quietly_while_it_waits_for_input(is_interrupted: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [*MODULE, "load", "-", "--port", str(listener.getsockname()[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            listener.settimeout(4 * PATIENCE)
            client = listener.accept()[0]
            assert process.stdin is not None
            process.stdin.write(b'{"engram-dump":1}\n')
            process.stdin.flush()
            with client:
                if is_interrupted:
                    process.send_signal(signal.SIGINT)
                    process.wait(4 * PATIENCE)
            assert process.wait(4 * PATIENCE) == (130 if is_interrupted else 1)
            assert process.stderr is not None
            errors = process.stderr.read()
    assert errors == b"" if is_interrupted else errors.startswith(b"engram: ")
    assert errors.count(b"\n") == (not is_interrupted)
