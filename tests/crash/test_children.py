"""A child of the server that is killed: what it was to do fails alone, and is done by another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.crash.server_process import ServerProcess, is_running, running_server, start_server, wait_until

SEAL_ROWS = 64
DIMENSION = 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with running_server("--dir", str(tmp_path / "data"), "--seal-rows", str(SEAL_ROWS)) as server:
        yield server


def kill_child(server: ServerProcess, module: str) -> None:
    """Kills the child that runs a module, as soon as there is one."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [pid for pid, command in server.children().items() if module in command]
        return bool(found)

    wait_until(is_there, f"a child that runs {module}")
    os.kill(found[0], signal.SIGKILL)


def add_rows(client: Redis) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Enough for a graph to be built."""
    rows = np.random.default_rng(3).standard_normal((4 * SEAL_ROWS, DIMENSION), np.float32)
    pipeline = client.pipeline(transaction=False)
    pipeline.execute_command("VNEW", "index", DIMENSION, "METRIC", "l2")
    for number, row in enumerate(rows):
        pipeline.execute_command("VADD", "index", f"row-{number}", row.tobytes())
    pipeline.execute()
    return rows


def test_a_killed_build_is_done_again(server: ServerProcess) -> None:
    with server.client() as client:
        rows = add_rows(client)
        kill_child(server, "engram.index.build_process")
        wait_until(lambda: client.info("vectors")["vectors_builds_failed"] > 0, "the failure to be noticed")
        wait_until(lambda: client.info("vectors")["vectors_segments"] > 0, "a segment")
        for number, row in enumerate(rows):
            assert client.execute_command("VSEARCH", "index", row.tobytes(), 1) == [b"row-%d" % number, b"0"]


def test_a_killed_snapshot_fails_and_the_next_one_does_not(server: ServerProcess) -> None:
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.set("key", "value")
        saving = pool.submit(client.execute_command, "VSAVE")
        kill_child(server, "engram.snapshotter")
        with pytest.raises(ResponseError, match=r"^save failed: "):
            saving.result()
        assert client.incr("counter") == 1
        assert client.execute_command("VSAVE") == b"OK"


def test_no_child_outlives_a_killed_server(tmp_path: Path) -> None:
    server = start_server("--dir", str(tmp_path / "data"), "--seal-rows", str(SEAL_ROWS))
    try:
        with server.client() as client:
            add_rows(client)
            children: dict[int, str] = {}
            wait_until(lambda: children.update(server.children()) or bool(children), "a child")
        server.kill()
        wait_until(lambda: not any(map(is_running, children)), "the children to end")
    finally:
        server.close()
