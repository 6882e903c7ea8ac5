"""A disk that is full: what needs space is refused or fails, and goes on by itself when there is some."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from tests.components import unavailable
from tests.crash.server_process import StartError, running_server, start_server, wait_until

DISK_BYTES = 16 << 20
LOG_FILE_SIZE = 256 << 10
SETTINGS = ("--log-file-size", str(LOG_FILE_SIZE), "--seal-rows", "512")
DIMENSION = 64
NO_SPACE = "No space left on device"
# How often the disk fills, and how many keys each writer sets again and again meanwhile.
ROUNDS = 3
NAMES = 200
PAUSE_SECONDS = 0.005


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of DISK_BYTES."""
    if os.geteuid() != 0:
        unavailable("only root can mount a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        unavailable(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@attrs.define
class Ballast:
    """A file that takes the space of a disk."""

    path: Path

    def fill(self, leave: int = 0) -> None:
        """Takes all there is, but for about `leave` bytes."""
        with self.path.open("ab", buffering=0) as file:
            chunk = 1 << 16
            while chunk:
                try:
                    file.write(bytes(chunk))
                except OSError:
                    chunk //= 2
        self.lighten(leave)

    def lighten(self, size: int) -> None:
        """Gives some of it back."""
        os.truncate(self.path, max(0, self.path.stat().st_size - size))

    def drop(self) -> None:
        self.path.unlink()


@pytest.fixture
def ballast(disk: Path) -> Ballast:
    return Ballast(disk / "ballast")


def value(number: int) -> bytes:
    return b"%d" % number * 1000


def random_rows(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(13).standard_normal((count, DIMENSION), np.float32)


def add_row(client: Redis, number: int, row: npt.NDArray[np.float32]) -> None:
    assert client.execute_command("VADD", "index", f"row-{number}", row.tobytes()) == 1


def find_rows(client: Redis, rows: npt.NDArray[np.float32]) -> None:
    """Each row is nearest to itself."""
    for number, row in enumerate(rows):
        found = client.execute_command("VSEARCH", "index", row.tobytes(), 1)
        assert found == [b"row-%d" % number, b"0"]


def refusal(client: Redis, *request: str) -> str:
    """The error that a request is answered with, empty when it is carried out."""
    try:
        client.execute_command(*request)
    except ResponseError as error:
        return str(error)
    return ""


def accepts(client: Redis, key: str) -> bool:
    """Whether a write is accepted now, rather than refused for lack of space."""
    error = refusal(client, "SET", key, "value")
    assert not error or error.startswith("MISCONF ")
    return not error


def set_until_error(client: Redis) -> tuple[int, RedisError]:
    """Sets keys that are numbered from 0; returns the number of the one that failed, and how."""
    for number in itertools.count():
        try:
            assert client.set(f"key-{number}", value(number))
        except RedisError as error:
            return number, error
    raise AssertionError("unreachable")


def test_a_full_disk_refuses_writes_until_there_is_space(disk: Path, ballast: Ballast) -> None:
    directory = disk / "data"
    rows = random_rows(1)
    vector = rows[0].tobytes()
    server = start_server("--dir", str(directory), *SETTINGS)
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            add_row(client, 0, rows[0])
            ballast.fill()
            # Larger than the space that is allocated, which small ones still fit in.
            with pytest.raises(ResponseError, match=f"^MISCONF .*{NO_SPACE}"):
                client.set("large", bytes(2 * LOG_FILE_SIZE))
            refused, error = set_until_error(client)
            assert re.match(f"MISCONF .*{NO_SPACE}", str(error))
            assert refused > 0
            wait_until(lambda: not accepts(client, "k"), "the file to be full")
            for request in (
                ("APPEND", "key-0", "more"),
                ("VADD", "index", "other", vector),
                ("VDEL", "index", "row-0"),
            ):
                with pytest.raises(ResponseError, match=r"^MISCONF "):
                    client.execute_command(*request)

            assert client.get(f"key-{refused}") is None
            assert client.get("key-0") == value(0)
            find_rows(client, rows)

            ballast.drop()
            wait_until(lambda: accepts(client, "resumed"), "writes to be accepted again")
            assert client.incr("counter") == 1
            assert client.set("large", bytes(2 * LOG_FILE_SIZE))
        server.kill()
    finally:
        server.close()

    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        held = [client.get(f"key-{number}") for number in range(refused + 1)]
        assert held == [*map(value, range(refused)), None]
        assert client.get("counter") == b"1"
        assert client.strlen("large") == 2 * LOG_FILE_SIZE
        assert client.info("vectors")["vectors_rows"] == 1
        find_rows(client, rows)


def test_a_server_starts_on_a_full_disk(disk: Path, ballast: Ballast) -> None:
    directory = disk / "data"
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        assert client.set("key", "value")
    ballast.fill()
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        assert client.get("key") == b"value"
        assert not accepts(client, "refused")
        ballast.drop()
        wait_until(lambda: accepts(client, "accepted"), "writes to be accepted")
        assert sorted(client.keys()) == [b"accepted", b"key"]


def test_a_torn_tail_is_not_cut_while_there_is_no_space_to_keep_it(disk: Path, ballast: Ballast) -> None:
    directory = disk / "data"
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        assert client.set("key", "value")
    log = max(directory.glob("wal-*.log"))
    torn = b"torn" * (LOG_FILE_SIZE // 4)
    with log.open("ab") as file:
        file.write(torn)
    ballast.fill()
    before = log.read_bytes()
    with pytest.raises(StartError, match=f"engram: {directory}.*: {NO_SPACE}") as raised:
        start_server("--dir", str(directory), *SETTINGS).close()
    assert raised.value.exit_code == 1
    assert "Traceback" not in raised.value.errors
    assert log.read_bytes() == before
    ballast.drop()
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        assert client.get("key") == b"value"
        assert any(path.read_bytes().endswith(torn) for path in directory.glob(f"{log.name}.broken-*"))


def test_a_snapshot_without_space_fails_alone(disk: Path, ballast: Ballast) -> None:
    """It fails at whatever it has no space for, until there is enough for all of it."""
    directory = disk / "data"
    rows = random_rows(100)
    keys = 2000
    failures = 0
    server = start_server("--dir", str(directory), *SETTINGS)
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            for number, row in enumerate(rows):
                add_row(client, number, row)
            pipeline = client.pipeline(transaction=False)
            for number in range(keys):
                pipeline.set(f"key-{number}", b"%d" % number * 200)
            assert all(pipeline.execute())
            ballast.fill()
            while not saves(client):
                failures += 1
                assert not list(directory.glob("snapshot-*"))
                assert client.incr("failures") == failures
                assert client.get("key-1") == b"1" * 200
                find_rows(client, rows[:3])
                ballast.lighten(2 * LOG_FILE_SIZE)
            assert failures > 2
            assert len(list(directory.glob("snapshot-*"))) == 1
            info = client.info("persistence")
            assert info["rdb_last_bgsave_status"] == "ok"
            assert info["last_save_error"] == ""
        assert server.complaints == ""
        server.kill()
    finally:
        server.close()

    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        held = [client.get(f"key-{number}") for number in range(keys)]
        assert held == [b"%d" % number * 200 for number in range(keys)]
        assert client.get("failures") == b"%d" % failures
        find_rows(client, rows)


def saves(client: Redis) -> bool:
    """Whether a snapshot could be made, rather than failed for lack of space."""
    error = refusal(client, "VSAVE")
    if not error:
        return True
    assert re.match(f"save failed: .*{NO_SPACE}", error)
    info = client.info("persistence")
    assert info["rdb_last_bgsave_status"] == "err"
    assert NO_SPACE in info["last_save_error"]
    return False


def test_a_build_without_space_fails_alone_and_is_done_when_there_is_some(
    disk: Path, ballast: Ballast
) -> None:
    directory = disk / "data"
    rows = random_rows(512)
    server = start_server("--dir", str(directory), *SETTINGS)
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            for number in range(500):
                add_row(client, number, rows[number])
            ballast.fill()
            for number in range(500, 512):
                add_row(client, number, rows[number])
            wait_until(lambda: client.info("vectors")["vectors_builds_failed"] > 0, "a failed build")
            assert NO_SPACE in client.info("vectors")["vectors_last_build_error"]
            wait_until(lambda: not list((directory / "segments").iterdir()), "what was built to be removed")
            refused, _ = set_until_error(client)
            find_rows(client, rows)

            ballast.drop()
            wait_until(lambda: client.info("vectors")["vectors_segments"] == 1, "a segment")
            wait_until(lambda: accepts(client, "resumed"), "writes to be accepted")
            find_rows(client, rows)
        assert "Traceback" not in server.errors
        server.kill()
    finally:
        server.close()

    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        find_rows(client, rows)
        info = client.info("vectors")
        assert (info["vectors_rows"], info["vectors_segments"]) == (len(rows), 1)
        held = [client.get(f"key-{number}") for number in range(refused + 1)]
        assert held == [*map(value, range(refused)), None]


def test_a_build_fails_at_whatever_it_has_no_space_for(disk: Path, ballast: Ballast) -> None:
    """At the rows, at the graph, at the columns: until there is enough for all of it."""
    directory = disk / "data"
    rows = random_rows(510)
    errors: list[str] = []
    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
        for number, row in enumerate(rows):
            add_row(client, number, row)
        ballast.fill()
        while error := refusal(client, "VOPTIMIZE", "index"):
            assert error.startswith("optimization failed: ")
            errors.append(error)
            assert not list((directory / "segments").iterdir())
            find_rows(client, rows[:3])
            ballast.lighten(40 << 10)
        assert any("graph.usearch" in error for error in errors)
        assert any(NO_SPACE in error for error in errors)
        assert client.info("vectors")["vectors_builds_failed"] == len(errors)
        assert client.info("vectors")["vectors_segments"] == 1
        find_rows(client, rows)
        ballast.drop()


@attrs.define
class Writer:
    """Writes over a connection of its own, and knows what must be there.

    It pauses when `accepted` requests have reached `limit`; those that are refused do not count.
    """

    seed: int
    limit: float = 0
    accepted: int = 0
    refusals: int = 0

    def run(self, client: Redis, done: threading.Event) -> None:
        for number in itertools.count():
            while self.accepted >= self.limit and not done.is_set():
                done.wait(PAUSE_SECONDS)
            if done.is_set():
                return
            self.write(client, number)

    def write(self, client: Redis, number: int) -> None:
        raise NotImplementedError

    def check(self, client: Redis) -> None:
        raise NotImplementedError

    def accepts(self, answer: object) -> bool:
        """Counts an answer; whether it is none that refuses."""
        if isinstance(answer, Exception):
            assert str(answer).startswith("MISCONF "), answer
            self.refusals += 1
            return False
        self.accepted += 1
        return True

    def try_one(self, client: Redis, *request: str | bytes) -> bool:
        try:
            return self.accepts(client.execute_command(*request))
        except ResponseError as error:
            return self.accepts(error)


@attrs.define
class StringWriter(Writer):
    """Sets strings in bursts and alone, and increments and appends."""

    strings: dict[str, bytes] = attrs.Factory(dict)
    counter: int = 0
    grown: bytes = b""

    def name(self, number: int) -> str:
        return f"{self.seed}-{number % NAMES}"

    def write(self, client: Redis, number: int) -> None:
        if number % 4 == 0:
            self.counter += self.try_one(client, "INCR", f"{self.seed}-counter")
        elif number % 4 == 1:
            part = b"%d," % number
            if self.try_one(client, "APPEND", f"{self.seed}-grown", part):
                self.grown += part
        else:
            count = 20 if number % 3 else 1
            burst = {self.name(number + item): b"%d " % number * (1 + 7 * item) for item in range(count)}
            pipeline = client.pipeline(transaction=False)
            for key, content in burst.items():
                pipeline.set(key, content)
            answers = pipeline.execute(raise_on_error=False)
            for (key, content), answer in zip(burst.items(), answers, strict=True):
                if self.accepts(answer):
                    self.strings[key] = content

    def check(self, client: Redis) -> None:
        names = list(map(self.name, range(NAMES)))
        assert list(map(client.get, names)) == list(map(self.strings.get, names))
        assert int(client.get(f"{self.seed}-counter") or 0) == self.counter
        assert (client.get(f"{self.seed}-grown") or b"") == self.grown


@attrs.define
class RowWriter(Writer):
    """Adds rows to the index and deletes some."""

    rows: dict[int, npt.NDArray[np.float32]] = attrs.Factory(dict)
    vectors: np.random.Generator = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.vectors = np.random.default_rng(self.seed)

    def write(self, client: Redis, number: int) -> None:
        if number % 5 == 4 and self.rows:
            oldest = next(iter(self.rows))
            if self.try_one(client, "VDEL", "index", f"row-{oldest}"):
                del self.rows[oldest]
            return
        row = self.vectors.standard_normal(DIMENSION).astype(np.float32)
        if self.try_one(client, "VADD", "index", f"row-{number}", row.tobytes()):
            self.rows[number] = row

    def check(self, client: Redis) -> None:
        for number, row in self.rows.items():
            found = client.execute_command("VSEARCH", "index", row.tobytes(), 1, "EXACT")
            assert found == [b"row-%d" % number, b"0"]
        information = client.execute_command("VINFO", "index")
        assert information[information.index(b"live-rows") + 1] == b"%d" % len(self.rows)


def test_a_disk_that_fills_and_empties_again_loses_nothing(disk: Path, ballast: Ballast) -> None:
    directory = disk / "data"
    writers: list[Writer] = [StringWriter(1), StringWriter(2), RowWriter(3)]
    done = threading.Event()
    errors: list[BaseException] = []
    server = start_server("--dir", str(directory), *SETTINGS)

    def write(writer: Writer) -> None:
        try:
            with server.client() as client:
                writer.run(client, done)
        except BaseException as error:
            errors.append(error)

    def all_accepted() -> bool:
        assert not errors
        return all(writer.accepted >= writer.limit for writer in writers)

    def write_some() -> None:
        for writer in writers:
            writer.limit = writer.accepted + 200
        wait_until(all_accepted, "writes to be accepted")

    def write_until_refused() -> None:
        before = [writer.refusals for writer in writers]

        def all_refused() -> bool:
            assert not errors
            return all(writer.refusals > count for writer, count in zip(writers, before, strict=True))

        for writer in writers:
            writer.limit = math.inf
        wait_until(all_refused, "writes to be refused")

    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
            for thread in threads:
                thread.start()
            try:
                for leave in (0, *random.Random(2026).sample(range(LOG_FILE_SIZE), ROUNDS - 1)):
                    write_some()
                    ballast.fill(leave)
                    write_until_refused()
                    saves(client)
                    for writer in writers:
                        writer.limit = 0
                    ballast.drop()
                    write_some()
                    wait_until(lambda: saves(client), "a snapshot")
            finally:
                done.set()
                for thread in threads:
                    thread.join()
            assert not errors
            for writer in writers:
                writer.check(client)
        assert "Traceback" not in server.errors
        server.kill()
    finally:
        server.close()

    with running_server("--dir", str(directory), *SETTINGS) as server, server.client() as client:
        for writer in writers:
            writer.check(client)
