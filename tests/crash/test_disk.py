"""A disk that fails, and one that is full."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from tests.components import unavailable
from tests.crash.server_process import running_server, start_server, wait_until

DISK_BYTES = 8 << 20
FULL_DISK_SETTINGS = ("--log-file-size", "256kb")
DIMENSION = 4


def value(number: int) -> bytes:
    return b"%d" % number * 1000


def set_until_error(client: Redis) -> tuple[int, RedisError]:
    """Sets keys that are numbered from 0; returns the number of the one that failed, and how."""
    for number in itertools.count():
        try:
            assert client.set(f"key-{number}", value(number))
        except RedisError as error:
            return number, error
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def strace() -> str:
    """The path of strace, where it may trace."""
    path = shutil.which("strace")
    if path is None:
        unavailable("strace is not installed (Debian: apt-get install strace)")
    attempt = subprocess.run([path, "-qq", "-e", "trace=none", "true"], capture_output=True, check=False)
    if attempt.returncode:
        unavailable(f"strace may not trace here: {attempt.stderr.decode().strip()}")
    return path


@pytest.mark.parametrize("failure", ["fdatasync:error=EIO", "pwrite64:error=EIO", "pwrite64:error=ENOSPC"])
@pytest.mark.parametrize("count", [4, 9])
def test_a_failing_write_or_sync_ends_the_server(
    failure: str, count: int, strace: str, tmp_path: Path
) -> None:
    """`count` is which call of each thread fails, and all that follow."""
    directory = tmp_path / "data"
    system_call = failure.partition(":")[0]
    inject = f"inject={failure}:when={count}+"
    tracing = (strace, "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"trace={system_call}", "-e", inject)
    server = start_server("--dir", str(directory), prefix=tracing)
    try:
        with server.client() as client:
            acknowledged, error = set_until_error(client)
        assert isinstance(error, RedisConnectionError)
        assert server.wait() == 1
        assert "the log cannot be written" in server.errors
        assert "Traceback" not in server.errors
    finally:
        server.close()

    with running_server("--dir", str(directory)) as server, server.client() as client:
        values = [client.get(f"key-{number}") for number in range(acknowledged)]
        assert values == list(map(value, range(acknowledged)))
        # The write that failed was not answered: it may be there.
        assert client.dbsize() - acknowledged in (0, 1)
        assert client.incr("counter") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
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


def fill(disk: Path) -> Path:
    """Takes all the space that is left on a disk; returns the file that holds it."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        chunk = 1 << 16
        while chunk:
            try:
                file.write(bytes(chunk))
            except OSError:
                chunk //= 2
    return ballast


def test_a_full_disk_refuses_writes_until_there_is_space(small_disk: Path) -> None:
    directory = small_disk / "data"
    vector = np.arange(DIMENSION, dtype=np.float32).tobytes()
    server = start_server("--dir", str(directory), *FULL_DISK_SETTINGS)
    try:
        with server.client() as client:
            client.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
            client.execute_command("VADD", "index", "row", vector)
            ballast = fill(small_disk)
            refused, error = set_until_error(client)
            assert re.match("MISCONF .*No space left on device", str(error))
            # Small ones fit into what is left of the file in use.
            wait_until(lambda: not accepts(client, "k"), "the file to be full")
            for request in (
                ("APPEND", "key-0", "more"),
                ("VADD", "index", "other", vector),
                ("VDEL", "index", "row"),
            ):
                with pytest.raises(ResponseError, match=r"^MISCONF "):
                    client.execute_command(*request)

            assert client.get(f"key-{refused}") is None
            assert client.get("key-0") == value(0)
            assert client.execute_command("VSEARCH", "index", vector, 5) == [b"row", b"0"]

            ballast.unlink()
            wait_until(lambda: accepts(client, "resumed"), "writes to be accepted again")
            assert client.incr("counter") == 1
        server.kill()
    finally:
        server.close()

    with running_server("--dir", str(directory), *FULL_DISK_SETTINGS) as server, server.client() as client:
        held = [client.get(f"key-{number}") for number in range(refused + 1)]
        assert held == [*map(value, range(refused)), None]
        assert client.get("counter") == b"1"
        assert client.execute_command("VSEARCH", "index", vector, 5) == [b"row", b"0"]


def test_a_server_starts_on_a_full_disk(small_disk: Path) -> None:
    directory = small_disk / "data"
    with running_server("--dir", str(directory), *FULL_DISK_SETTINGS) as server, server.client() as client:
        assert client.set("key", "value")
    ballast = fill(small_disk)
    with running_server("--dir", str(directory), *FULL_DISK_SETTINGS) as server, server.client() as client:
        assert client.get("key") == b"value"
        assert not accepts(client, "refused")
        ballast.unlink()
        wait_until(lambda: accepts(client, "accepted"), "writes to be accepted")
        assert sorted(client.keys()) == [b"accepted", b"key"]


def accepts(client: Redis, key: str) -> bool:
    """Whether a write is accepted now, rather than refused for lack of space."""
    try:
        return bool(client.set(key, "value"))
    except ResponseError as error:
        if str(error).startswith("MISCONF "):
            return False
        raise
