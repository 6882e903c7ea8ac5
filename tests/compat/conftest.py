from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from redis import Redis

from tests.components import unavailable
from tests.crash.server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def running() -> Iterator[ServerProcess]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: ServerProcess) -> ServerProcess:
    """An engram that is empty and keeps nothing on disk."""
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture(params=[3, 2], ids=["RESP3", "RESP2"])
def protocol(request: pytest.FixtureRequest) -> int:
    version: int = request.param
    return version


@pytest.fixture
def client(server: ServerProcess, protocol: int) -> Iterator[Redis]:
    """redis-py, in each protocol."""
    with server.client(protocol=protocol) as client:
        yield client


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        unavailable(f"{program} is not installed (Debian: apt-get install redis-tools)")
    return path


@pytest.fixture
def redis_cli() -> str:
    """The path of redis-cli; without it the test is skipped, and fails in CI."""
    return _find("redis-cli")


@pytest.fixture
def redis_benchmark() -> str:
    """The path of redis-benchmark; without it the test is skipped, and fails in CI."""
    return _find("redis-benchmark")
