"""A disk that fails: system calls that return an error, at every place where data is written."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from engram.operations import SetString, encode, join
from engram.persistence import log_format
from tests.components import unavailable
from tests.crash.server_process import (
    DEADLINE_SECONDS,
    HOST,
    ServerProcess,
    StartError,
    running_server,
    start_server,
    wait_until,
)

# The smallest there are: with values of a kilobyte one is full after 60 writes.
SMALL_FILES = ("--log-file-size", "64kb")
DIMENSION = 8
WRITERS = 3
MOST_WRITES = 20_000
INJECTED = "(INJECTED)"


def value(key: str) -> bytes:
    return key.encode() * 100


@pytest.fixture(scope="module")
def strace() -> str:
    """The path of strace, where it may trace processes that run."""
    path = shutil.which("strace")
    if path is None:
        unavailable("strace is not installed (Debian: apt-get install strace)")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        attempt = subprocess.Popen(
            [path, "-e", "trace=none", "-p", str(process.pid)], stderr=subprocess.PIPE, text=True
        )
        assert attempt.stderr is not None
        answer = attempt.stderr.readline()
        attempt.kill()
        attempt.communicate()
    if "attached" not in answer:
        unavailable(f"strace may not trace here: {answer.strip()}")
    return path


@attrs.frozen
class Faults:
    """Makes system calls of servers fail, and keeps a record of those it was told of.

    A fault is what strace's `inject=` takes: "fsync:error=EIO:when=3" fails the third fsync of each thread
    that calls it; without `when` all fail. With `paths`, only calls that name one of these, or a descriptor
    of one, count. Of the two paths of a rename that is the first.
    """

    strace: str
    trace: Path

    def command(self, fault: str, paths: Sequence[Path]) -> list[str]:
        """A command line for the server to run under."""
        # Without a filter in the kernel every call is stopped at, which takes a start twice as long.
        return [*self._command(fault, paths), "--seccomp-bpf"]

    def _command(self, fault: str, paths: Sequence[Path]) -> list[str]:
        call = fault.partition(":")[0]
        options = ["-f", "-y", "-o", str(self.trace), "-e", f"trace={call}", "-e", f"inject={fault}"]
        return [self.strace, *options, *(word for path in paths for word in ("-P", str(path)))]

    @contextmanager
    def injected(self, server: ServerProcess, fault: str, *paths: Path) -> Iterator[None]:
        """Calls of a running server, and of its children, fail during the block; at least one must have."""
        command = [*self._command(fault, paths), "-p", str(server.pid)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            assert "attached" in process.stderr.readline()
            yield
        finally:
            process.terminate()
            process.communicate()
        assert self.happened, f"nothing called {fault}"

    @property
    def lines(self) -> list[str]:
        """The calls since a fault was last injected."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    @property
    def happened(self) -> bool:
        return any(INJECTED in line for line in self.lines)


@pytest.fixture
def faults(strace: str, tmp_path: Path) -> Faults:
    return Faults(strace, tmp_path / "trace")


@attrs.define
class Writer:
    """Sets keys of its own, one after another, and counts those that were acknowledged."""

    name: str
    acknowledged: int = 0
    error: RedisError | None = None

    def key(self, number: int) -> str:
        return f"{self.name}-{number}"

    def write(self, client: Redis) -> None:
        key = self.key(self.acknowledged)
        assert client.set(key, value(key))
        self.acknowledged += 1

    def write_until_error(self, server: ServerProcess) -> None:
        """Writes until that fails; `error` says how, and stays None when it does not."""
        try:
            with server.client() as client:
                for _ in range(MOST_WRITES):
                    self.write(client)
        except RedisError as error:
            self.error = error

    def check(self, client: Redis, *, unanswered: int = 0) -> None:
        """All that was acknowledged is there, and of what was not answered at most what was sent."""
        keys = [self.key(number) for number in range(self.acknowledged)]
        assert [client.get(key) for key in keys] == [value(key) for key in keys]
        beyond = [client.get(self.key(self.acknowledged + number)) for number in range(unanswered + 1)]
        assert beyond[unanswered] is None


def read_until_error(server: ServerProcess, seen: list[int]) -> None:
    """Reads a counter that others increment; the last element of `seen` is what it showed last."""
    with suppress(RedisError), server.client() as client:
        while True:
            seen.append(int(client.get("counter") or 0))


def increment_until_error(server: ServerProcess, seen: list[int]) -> None:
    with suppress(RedisError), server.client() as client:
        while True:
            seen.append(client.incr("counter"))


# What the server does to its log: the call, and the file or folder that it is about. The first file of a new
# directory is followed by prepared-1.log, the second of the log, and that by prepared-2.log.
FINAL_FAULTS = {
    "a write": ("pwrite64:error=EIO:when=2", "wal-0000000002.log"),
    "all writes": ("pwrite64:error=ENOSPC", "wal-0000000002.log"),
    "a sync": ("fdatasync:error=EIO:when=3", "wal-0000000002.log"),
    "all syncs": ("fdatasync:error=ENOSPC", "wal-0000000002.log"),
    "the header of the next file": ("pwrite64:error=EIO:when=1", "prepared-2.log"),
    "the sync of that header": ("fdatasync:error=EIO:when=1", "prepared-2.log"),
    "the name of the next file": ("/^rename:error=EIO:when=1", "prepared-2.log"),
    "the sync of that name": ("fsync:error=EIO:when=1", ""),
}


@pytest.mark.parametrize("place", FINAL_FAULTS)
def test_a_log_that_cannot_be_written_ends_the_server(place: str, faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    fault, name = FINAL_FAULTS[place]
    writers = [Writer(f"writer-{number}") for number in range(WRITERS)]
    incremented: list[int] = [0]
    read: list[int] = [0]
    server = start_server("--dir", str(directory), *SMALL_FILES)
    try:
        with server.client() as client:
            for writer in writers:
                writer.write(client)
        threads = [threading.Thread(target=writer.write_until_error, args=(server,)) for writer in writers]
        threads.append(threading.Thread(target=increment_until_error, args=(server, incremented)))
        threads.append(threading.Thread(target=read_until_error, args=(server, read)))
        with faults.injected(server, fault, directory / name):
            for thread in threads:
                thread.start()
            assert server.wait() == 1
            for thread in threads:
                thread.join()
        assert all(isinstance(writer.error, RedisConnectionError) for writer in writers)
        assert "the log cannot be written" in server.errors
        assert "Traceback" not in server.errors
    finally:
        server.close()
    # Nothing is tried on the file after it has failed: what Linux says then may not be true.
    failed = next(number for number, line in enumerate(faults.lines) if INJECTED in line)
    assert faults.lines[failed + 1 :] == [line for line in faults.lines[failed + 1 :] if "+++" in line]

    with running_server("--dir", str(directory)) as server, server.client() as client:
        for writer in writers:
            # The write that failed was not answered: it may be there.
            writer.check(client, unanswered=1)
        assert int(client.get("counter") or 0) >= max(*incremented, *read)
        assert client.incr("another") == 1


ALLOCATION_FAULTS = {
    "no space": ("fallocate:error=ENOSPC", ()),
    "no file": ("openat:error=EMFILE", [f"prepared-{number}.log" for number in range(1, 200)]),
}


def accepts(client: Redis, key: str) -> bool:
    """Whether a write is accepted now, rather than refused for lack of space."""
    try:
        return bool(client.set(key, value(key)))
    except ResponseError as error:
        if str(error).startswith("MISCONF "):
            return False
        raise


def test_a_failing_allocation_refuses_writes_until_it_succeeds(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    writer = Writer("key")
    server = start_server("--dir", str(directory), *SMALL_FILES)
    try:
        with server.client() as client:
            for case, (fault, names) in ALLOCATION_FAULTS.items():
                writer.write(client)
                with faults.injected(server, fault, *(directory / name for name in names)):
                    writer.write_until_error(server)
                    assert re.match("MISCONF ", str(writer.error))
                    info = client.info("persistence")
                    assert info["log_allocation_error"]
                    assert info["aof_last_write_status"] == "err"
                    assert client.get(writer.key(0)) == value(writer.key(0))
                    assert client.get(writer.key(writer.acknowledged)) is None
                wait_until(lambda case=case: accepts(client, case), "writes to be accepted")  # type: ignore[misc]
                assert client.info("persistence")["aof_last_write_status"] == "ok"
        assert "Traceback" not in server.errors
        server.kill()
    finally:
        server.close()
    with running_server("--dir", str(directory)) as server, server.client() as client:
        writer.check(client)
        assert all(client.get(case) == value(case) for case in ALLOCATION_FAULTS)


# What fails alone: the call, and the file, where {} is the folder of the snapshot.
SNAPSHOT_FAULTS = (
    ("pwrite64:error=ENOSPC", "{}/0.string.maps-bytes.npy"),
    ("fsync:error=EIO:when=1", "{}"),
    ("fsync:error=EIO:when=1", "MANIFEST.new"),
    ("/^rename:error=EIO", "MANIFEST.new"),
)


def test_a_failing_snapshot_is_reported_and_changes_nothing(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    writer = Writer("key")
    server = start_server("--dir", str(directory))
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION)
            client.execute_command("VADD", "index", "row", np.ones(DIMENSION, "<f4").tobytes())
            writer.write(client)
            assert client.execute_command("VSAVE") == b"OK"
            manifest = (directory / "MANIFEST").read_bytes()
            [snapshot] = directory.glob("snapshot-*")
            for fault, name in SNAPSHOT_FAULTS:
                writer.write(client)
                lsn = client.info("persistence")["log_appended_lsn"]
                path = directory / name.format(f"snapshot-{lsn}")
                with (
                    faults.injected(server, fault, path),
                    pytest.raises(ResponseError, match=r"^save failed: .*(Input/output error|No space left)"),
                ):
                    client.execute_command("VSAVE")
                info = client.info("persistence")
                assert info["rdb_last_bgsave_status"] == "err"
                assert re.search("Input/output error|No space left", info["last_save_error"])
                assert (directory / "MANIFEST").read_bytes() == manifest
                assert list(directory.glob("snapshot-*")) == [snapshot]
            writer.write(client)
            assert client.execute_command("VSAVE") == b"OK"
            assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
            assert (directory / "MANIFEST").read_bytes() != manifest
        assert server.complaints == ""
        server.kill()
    finally:
        server.close()
    with running_server("--dir", str(directory)) as server, server.client() as client:
        writer.check(client)
        assert client.info("vectors")["vectors_rows"] == 1


def test_a_manifest_that_may_not_last_ends_the_server(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    writer = Writer("key")
    server = start_server("--dir", str(directory))
    try:
        with server.client() as client:
            writer.write(client)
            # The log goes on in a new file. The next snapshot needs no other one, so that the syncs of the
            # folder are two: of the snapshot's name, and of the manifest's.
            with (
                faults.injected(server, "/^rename:error=EIO", directory / "MANIFEST.new"),
                pytest.raises(ResponseError, match=r"^save failed: "),
            ):
                client.execute_command("VSAVE")
            with faults.injected(server, "fsync:error=EIO:when=2", directory):
                with pytest.raises(RedisError, match=r"MANIFEST: cannot be synced|Connection closed"):
                    client.execute_command("VSAVE")
                assert server.wait() == 1
        assert "MANIFEST: cannot be synced" in server.errors
        assert "Traceback" not in server.errors
    finally:
        server.close()
    with running_server("--dir", str(directory)) as server, server.client() as client:
        writer.check(client)
        assert client.execute_command("VSAVE") == b"OK"


def test_files_that_cannot_be_removed_do_not_matter(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    writer = Writer("key")
    server = start_server("--dir", str(directory), *SMALL_FILES)
    try:
        with server.client() as client:
            with faults.injected(server, "/^unlink:error=EIO", directory / "wal-0000000002.log"):
                writer.write(client)
                assert client.execute_command("VSAVE") == b"OK"
            assert client.info("persistence")["cleanup_error"] == "Input/output error"
            writer.write(client)
            assert client.execute_command("VSAVE") == b"OK"
            assert client.info("persistence")["cleanup_error"] == ""
            assert not (directory / "wal-0000000002.log").exists()
        with faults.injected(server, "/^unlink:error=EIO"):
            assert server.terminate() == 0
        assert server.complaints == ""
        assert list(directory.glob("prepared-*.log"))
    finally:
        server.close()
    with running_server("--dir", str(directory)) as server, server.client() as client:
        writer.check(client)
        assert len(list(directory.glob("prepared-*.log"))) == 1


# One build makes six syncs of rows in the server; and then, in a process of its own, those of columns, of all
# that is there, of the table, of the segment's folder and of the folder it is in.
BUILD_FAULTS = (
    ("fsync:error=EIO:when=1", None),
    ("fsync:error=EIO:when=7", None),
    ("/^rename:error=EIO", None),
    ("fsync:error=EIO", "segments"),
)


def test_a_failing_build_is_reported_and_done_again(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    rows = np.random.default_rng(11).standard_normal((64, DIMENSION), np.float32)

    def add(client: Redis, numbers: range) -> None:
        for number in numbers:
            client.execute_command("VADD", "index", f"row-{number}", rows[number].tobytes())

    def check(client: Redis, count: int) -> None:
        for number in range(count):
            found = client.execute_command("VSEARCH", "index", rows[number].tobytes(), 1)
            assert found == [b"row-%d" % number, b"0"]

    server = start_server("--dir", str(directory), "--seal-rows", "64")
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            add(client, range(63))
            for failures, (fault, name) in enumerate(BUILD_FAULTS, 1):
                paths = () if name is None else (directory / name,)
                with (
                    faults.injected(server, fault, *paths),
                    pytest.raises(ResponseError, match=r"^optimization failed: .*(Input/output|No space)"),
                ):
                    client.execute_command("VOPTIMIZE", "index")
                info = client.info("vectors")
                assert info["vectors_builds_failed"] == failures
                assert re.search("Input/output error|No space left", info["vectors_last_build_error"])
                assert list((directory / "segments").iterdir()) == []
                check(client, 63)
            assert client.execute_command("VOPTIMIZE", "index") == b"OK"
            # Without a client that waits for it, it is tried again and again.
            client.execute_command("VNEW", "other", DIMENSION)
            with faults.injected(server, "/^mkdir:error=ENOSPC"):
                for number, row in enumerate(rows):
                    client.execute_command("VADD", "other", f"row-{number}", row.tobytes())
                wait_until(
                    lambda: client.info("vectors")["vectors_builds_failed"] >= len(BUILD_FAULTS) + 2,
                    "a build that failed again",
                )
            wait_until(lambda: client.info("vectors")["vectors_segments"] == 2, "a segment")
            check(client, 63)
        assert "Traceback" not in server.errors
        server.kill()
    finally:
        server.close()
    with running_server("--dir", str(directory)) as server, server.client() as client:
        check(client, 63)
        assert client.info("vectors")["vectors_rows"] == 63 + len(rows)


def last_log(directory: Path) -> Path:
    return max(directory.glob("wal-*.log"))


def append_unacknowledged(path: Path) -> None:
    """Adds to a file of the log a whole record, and a part of another."""
    data = path.read_bytes()
    header = log_format.decode_file_header(data)
    scanner = log_format.RecordScanner(data, header)
    lsn = [record.lsn for record in scanner][-1]
    whole, chain = log_format.encode_record(
        log_format.OPERATIONS,
        lsn + 1,
        join([encode(SetString(b"whole", b"value"))]),
        lsn,
        header.tag,
        scanner.chain,
    )
    torn, _ = log_format.encode_record(
        log_format.OPERATIONS, lsn + 2, b"not acknowledged", lsn, header.tag, chain
    )
    with path.open("r+b") as file:
        file.seek(scanner.offset)
        file.write(whole + torn[:-1])


RECOVERY_FAULTS = {
    "syncing names": ("fsync:error=EIO:when=1", ""),
    "reading the log": ("openat:error=EIO", "{}"),
    "keeping the tail": ("pwrite64:error=ENOSPC:when=1", None),
    "writing it again": ("pwrite64:error=EIO", "{}"),
    "cutting it": ("ftruncate:error=EIO", "{}"),
    "syncing it": ("fsync:error=EIO:when=1", "{}"),
}


def test_a_recovery_that_fails_is_refused_and_can_be_repeated(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    writer = Writer("key")
    server = start_server("--dir", str(directory))
    try:
        with server.client() as client:
            for _ in range(5):
                writer.write(client)
        server.kill()
    finally:
        server.close()
    log = last_log(directory)
    append_unacknowledged(log)
    for fault, name in RECOVERY_FAULTS.values():
        refuse_to_start(faults, directory, fault, None if name is None else name.format(log.name))

    with running_server("--dir", str(directory)) as server, server.client() as client:
        writer.check(client)
        assert client.get("whole") == b"value"


INITIAL_FAULTS = {
    "making the folder": ("/^mkdir:error=EACCES", ""),
    "writing the log's header": ("pwrite64:error=ENOSPC", "wal-0000000001.log"),
    "syncing it": ("fsync:error=EIO:when=1", "wal-0000000001.log"),
    "syncing its name": ("fsync:error=EIO:when=1", ""),
    "giving it its name": ("/^rename:error=EIO", "MANIFEST.new"),
    "syncing that": ("fsync:error=EIO:when=2", ""),
}


def test_a_directory_that_cannot_be_made_is_refused_and_made_later(faults: Faults, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    for fault, name in INITIAL_FAULTS.values():
        refuse_to_start(faults, directory, fault, name)
    with running_server("--dir", str(directory)) as server, server.client() as client:
        assert client.incr("counter") == 1


def refuse_to_start(faults: Faults, directory: Path, fault: str, name: str | None) -> None:
    """A server that meets this fault must say so in a line, and end."""
    prefix = faults.command(fault, () if name is None else (directory / name,))
    with pytest.raises(StartError) as raised:
        start_server("--dir", str(directory), prefix=prefix).close()
    assert faults.happened
    assert raised.value.exit_code == 1
    [line] = raised.value.errors.splitlines()
    assert line.startswith(f"engram: {directory}")
    assert re.search("Input/output error|No space left on device|Permission denied", line)


def modes(folder: Path) -> dict[str, int]:
    """The permissions of a folder and of all in it that is neither a file of 0600 nor a folder of 0700."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        mode = path.lstat().st_mode
        if stat.S_IMODE(mode) != (0o700 if stat.S_ISDIR(mode) else 0o600):
            found[str(path.relative_to(folder))] = stat.S_IMODE(mode)
    return found


def test_what_is_written_is_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    everyone = ("sh", "-c", 'umask 0; exec "$@"', "sh")
    settings = ("--dir", str(directory), "--seal-rows", "16", *SMALL_FILES)
    writer = Writer("key")
    rows = np.random.default_rng(5).standard_normal((16, DIMENSION), np.float32)
    with running_server(*settings, prefix=everyone) as server, server.client() as client:
        client.execute_command("VNEW", "index", DIMENSION)
        for number, row in enumerate(rows):
            client.execute_command(
                "VMADD", "index", f"row-{number}", row.tobytes(), '{"colour": "red", "year": 1999}', "ATTRS"
            )
        wait_until(lambda: client.info("vectors")["vectors_segments"] == 1, "a segment")
        assert client.execute_command("VSAVE") == b"OK"
        first_file = last_log(directory)
        while last_log(directory) == first_file:
            writer.write(client)
        assert modes(directory) == {}
    log = last_log(directory)
    with log.open("ab") as file:
        file.write(b"torn")
    with running_server(*settings, prefix=everyone):
        assert list(directory.glob("*.broken-*"))
        assert modes(directory) == {}


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process, and what they stand for."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[int(path.name)] = os.readlink(path)
    return found


def listening_port(pid: int) -> int:
    """The TCP port that a process listens on, 0 for none."""
    sockets = set(descriptors(pid).values())
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
            return int(words[1].partition(":")[2], 16)
    return 0


def test_no_file_gets_the_number_of_a_standard_stream(tmp_path: Path) -> None:
    """What is printed by mistake would be in it."""
    directory = tmp_path / "data"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    command = [sys.executable, "-P", "-m", "engram", "--port", "0", "--dir", str(directory)]
    process = subprocess.Popen([*closed, *command])
    try:
        wait_until(lambda: process.poll() is not None or listening_port(process.pid) > 0, "the server")
        with Redis(HOST, listening_port(process.pid), socket_timeout=DEADLINE_SECONDS) as client:
            client.execute_command("VNEW", "index", DIMENSION)
            client.execute_command("VADD", "index", "row", np.ones(DIMENSION, "<f4").tobytes())
            assert client.execute_command("VOPTIMIZE", "index") == b"OK"
            assert client.execute_command("VSAVE") == b"OK"
        assert [descriptors(process.pid)[number] for number in range(3)] == [os.devnull] * 3
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


LARGE_VALUE = 128 << 20
SPARE_MEMORY = 64 << 20
# What libraries take for themselves must not depend on the number of cores.
FEW_THREADS = ("env", "OPENBLAS_NUM_THREADS=1", "MALLOC_ARENA_MAX=1")


def most_memory(server: ServerProcess) -> int:
    """The most address space, in bytes, that a server has taken so far."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    match = re.search(r"^VmPeak:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


def test_a_server_without_memory_for_its_data_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with running_server("--dir", str(tmp_path / "empty"), prefix=FEW_THREADS) as server:
        limit = most_memory(server) + SPARE_MEMORY
    with running_server("--dir", str(directory)) as server, server.client() as client:
        assert client.set("key", bytes(LARGE_VALUE))
    limited = (*FEW_THREADS, "sh", "-c", f'ulimit -v {limit >> 10}; exec "$@"', "sh")
    with pytest.raises(StartError) as raised:
        start_server("--dir", str(directory), prefix=limited).close()
    assert raised.value.exit_code == 1
    [line] = raised.value.errors.splitlines()
    assert line.startswith(f"engram: {directory}")
    assert "memory" in line
    with running_server("--dir", str(directory)) as server, server.client() as client:
        assert client.strlen("key") == LARGE_VALUE
