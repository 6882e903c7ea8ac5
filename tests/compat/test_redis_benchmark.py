"""redis-benchmark runs unchanged."""

from __future__ import annotations

import csv
import subprocess

import pytest

from tests.crash.server_process import DEADLINE_SECONDS, ServerProcess

REQUESTS = 20_000
KEYS = 1000


def run_benchmark(program: str, server: ServerProcess, *arguments: str) -> dict[str, float]:
    """Runs redis-benchmark; returns the requests a second of each of its tests."""
    command = [program, "-p", str(server.port), "-n", str(REQUESTS), "--csv", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True)
    assert "WARNING" not in done.stderr
    assert "Error" not in done.stderr
    return {row["test"]: float(row["rps"]) for row in csv.DictReader(done.stdout.splitlines())}


@pytest.mark.parametrize("protocol", [(), ("-3",)], ids=["RESP2", "RESP3"])
def test_pipelined(protocol: tuple[str, ...], redis_benchmark: str, server: ServerProcess) -> None:
    tests = ("-t", "ping,set,get,incr,mset", "-c", "50", "-P", "16", "-r", str(KEYS))
    rates = run_benchmark(redis_benchmark, server, *tests, *protocol)
    assert rates.keys() == {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"}
    assert all(rate > 0 for rate in rates.values())
    with server.client() as client:
        counters = [client.get(key) for key in client.scan_iter("counter:*")]
        assert sum(int(counter or 0) for counter in counters) >= REQUESTS


def test_request_by_request(redis_benchmark: str, server: ServerProcess) -> None:
    rates = run_benchmark(redis_benchmark, server, "-t", "ping,set,get,incr,mset", "-c", "50")
    assert len(rates) == 6
    assert all(rate > 0 for rate in rates.values())


def test_any_command(redis_benchmark: str, server: ServerProcess) -> None:
    rates = run_benchmark(redis_benchmark, server, "-c", "10", "-P", "4", "append", "key", "x")
    assert len(rates) == 1
    with server.client() as client:
        assert client.strlen("key") >= REQUESTS
