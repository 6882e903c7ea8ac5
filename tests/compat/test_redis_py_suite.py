"""The tool that runs redis-py's tests: which tests count, and what it says of them."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.peers import ENGRAM, free_port
from tests.compat.redis_py_suite.__main__ import Comparison, Result, explain, run_tests

CONFTEST = """
import pytest, redis

def pytest_addoption(parser):
    parser.addoption("--redis-url")
    parser.addoption("--protocol")

@pytest.fixture
def client(request):
    url, protocol = request.config.getoption("--redis-url"), request.config.getoption("--protocol")
    with redis.from_url(url, protocol=protocol) as client:
        yield client
"""
TESTS = """
import pytest

def test_passes(client):
    assert client.set("key", "value")
    with pytest.raises(Exception, match="wrong number"):
        client.execute_command("GET")

def test_asks_for_information(client):
    assert client.info()

def test_in_a_transaction(client):
    assert client.pipeline().incr("counter").execute() == [1]

def test_fails(client):
    assert client.client_id() == "unexpected"

@pytest.mark.skip("not today")
def test_is_skipped(client):
    client.ping()

def test_sends_nothing():
    pass
"""
HANDSHAKE = {"client|setinfo"}


def result(test: str, outcome: str, *commands: str) -> Result:
    return Result(test, outcome, "", frozenset(commands))


def test_outcomes_and_commands_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_all.py").write_text(TESTS)
    arguments = Namespace(python=sys.executable, tests=tmp_path, files=["test_all.py"], logs=None)
    results, known = run_tests("Redis", ENGRAM, free_port(), 2, arguments)
    assert {"get", "client|list"} <= known
    outcomes = {test.rpartition("::")[2]: each.outcome for test, each in results.items()}
    assert outcomes == {
        "test_passes": "passed",
        "test_asks_for_information": "passed",
        "test_in_a_transaction": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_sends_nothing": "passed",
    }
    commands = {test.rpartition("::")[2]: each.commands - HANDSHAKE for test, each in results.items()}
    assert commands["test_passes"] == {"set", "get"}
    assert commands["test_asks_for_information"] == {"info"}
    assert commands["test_in_a_transaction"] == {"multi", "incrby", "exec"}
    assert commands["test_is_skipped"] == commands["test_sends_nothing"] == set()
    assert "unexpected" in results["test_all.py::test_fails"].reason


def test_what_counts() -> None:
    redis = [
        result("a", "passed", "get"),
        result("unknown to engram", "passed", "get", "hset"),
        result("failed by Redis", "failed", "get"),
        result("a promised subcommand", "passed", "slowlog|get"),
        result("a subcommand nobody promised", "passed", "client|evade"),
        result("not run by engram", "passed"),
    ]
    engram = [result("a", "passed"), result("a promised subcommand", "skipped")]
    comparison = Comparison(
        3, {each.test: each for each in redis}, {each.test: each for each in engram}, frozenset({"get"})
    )
    assert [each.test for each in comparison.counted()] == ["a", "a promised subcommand", "not run by engram"]
    assert [each.test for each in comparison.failures()] == ["a promised subcommand", "not run by engram"]


def test_reasons() -> None:
    failure = Result("tests/test_commands.py::test_get[pool]", "failed", "expected | got\nmore", frozenset())
    assert explain(failure, {"*::test_get*": "because"}) == "because"
    assert explain(failure, {"*::test_set*": "because"}) == "not explained yet: failed, `expected \\| got`"
