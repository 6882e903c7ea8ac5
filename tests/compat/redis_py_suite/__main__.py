"""redis-py's own tests, run against Redis 8 and against engram with the same settings.

    python -m tests.compat.redis_py_suite --tests FOLDER

FOLDER holds a copy of redis-py's repository, of the version that is installed; nothing of it is part of this
project. `--python` is an interpreter that has what its dev_requirements.txt names. Each server runs with one
database and, in a fresh folder, its log; each protocol has servers of its own.

A test counts when Redis 8 passes it and it sends only commands that engram has or that NAMED holds; which
commands a test sends is recorded while Redis 8 runs it. With `--report` the figures and the failures, with
their reasons out of reasons.toml, replace what follows the heading of that page's last section.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import attrs
from redis import Redis

from benchmarks.peers import ENGRAM, free_port, running

REDIS8 = Path(__file__).parents[4] / "shared" / "peers" / "redis8.6"
REASONS = Path(__file__).with_name("reasons.toml")
HEADING = "## The tests of redis-py\n"

FILES = tuple(
    f"tests/{folder}test_{name}.py"
    for folder in ("", "test_asyncio/")
    for name in ("commands", "pipeline", "encoding", "connection", "connection_pool")
)
PROTOCOLS = (2, 3)

# What engram promises to have, whether or not it does; a container alone stands for all its subcommands.
_PROMISED = """
acl|cat acl|deluser acl|getuser acl|list acl|setuser acl|whoami auth bitcount client|kill client|list
client|pause command|docs config|rewrite copy discard exec expiretime getbit getdel getex getrange getset
incrbyfloat info memory|usage mget monitor mset msetnx multi object|encoding persist psetex randomkey
rename renamenx scan select setbit setex setnx setrange slowlog swapdb touch type unwatch waitaof watch
"""
NAMED = frozenset(_PROMISED.split())

_PROCESS_SECONDS = 1800


@attrs.frozen
class Result:
    """What became of a test; `reason` says why when it did not pass."""

    test: str
    outcome: str
    reason: str
    commands: frozenset[str]


@attrs.frozen
class Comparison:
    """The results of one protocol, by test; `known` holds names of commands that count."""

    protocol: int
    redis: dict[str, Result]
    engram: dict[str, Result]
    known: frozenset[str]

    def counted(self) -> list[Result]:
        """Redis 8's results of the tests that count."""
        return [
            result
            for result in self.redis.values()
            if result.outcome == "passed" and all(map(self._is_known, result.commands))
        ]

    def failures(self) -> list[Result]:
        """engram's results of the tests that count, and that it does not pass."""
        results = []
        for result in self.counted():
            ours = self.engram.get(result.test)
            if ours is None:
                ours = Result(result.test, "failed", "it did not run", frozenset())
            if ours.outcome != "passed":
                results.append(ours)
        return results

    def _is_known(self, command: str) -> bool:
        return command in self.known or command.partition("|")[0] in NAMED


def run_tests(
    name: str, command: str, port: int, protocol: int, arguments: argparse.Namespace
) -> tuple[dict[str, Result], frozenset[str]]:
    """Runs redis-py's tests against a server that `command` starts; also returns the server's commands.

    Raises:
        benchmarks.peers.ServerError: the server did not start.
        subprocess.CalledProcessError: pytest itself failed.
    """
    with tempfile.TemporaryDirectory(prefix="redis-py-suite-") as folder:
        record = Path(folder) / "record.jsonl"
        started = f"{command} --port {port} --databases 1 --dir {shlex.quote(folder)}"
        with running(name, started, port):
            with Redis(port=port, protocol=2) as client:
                known = commands_of(client)
            pytest = [arguments.python, "-m", "pytest", "-q", "-p", "recorder", "--record", str(record)]
            # Of native tracebacks pytest does not parse the long source files anew, frame by frame.
            options = ["-p", "no:cacheprovider", "--tb=native", "--redis-url", f"redis://127.0.0.1:{port}/0"]
            if name == "Redis":
                options += ["--count-commands-at", str(port)]
            log = arguments.logs / f"{name}-{protocol}.txt" if arguments.logs else Path(os.devnull)
            with log.open("w") as output:
                done = subprocess.run(
                    [*pytest, *options, "--protocol", str(protocol), *arguments.files],
                    cwd=arguments.tests,
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_PROCESS_SECONDS,
                )
            # 1 is that a test failed.
            if done.returncode not in (0, 1):
                raise subprocess.CalledProcessError(done.returncode, done.args)
        lines = map(json.loads, record.read_text().splitlines())
        results = [Result(**{**line, "commands": frozenset(line["commands"])}) for line in lines]
        return {result.test: result for result in results}, known


def commands_of(client: Redis) -> frozenset[str]:
    """Names of a server's commands, subcommands as `container|subcommand`."""
    names = set()
    for name, entry in client.command().items():
        subcommands = [part[0].decode() for part in entry.get("subcommands") or ()]
        names.update(subcommands or [name])
    return frozenset(map(str.lower, names))


def compare(arguments: argparse.Namespace) -> list[Comparison]:
    """Runs the tests in each protocol; the servers run side by side."""
    ports: set[int] = set()
    while len(ports) < 2 * len(arguments.protocols):
        ports.add(free_port())
    servers = (("Redis", f'{arguments.redis} --save ""'), ("engram", arguments.engram))
    with ThreadPoolExecutor() as pool:
        runs = [
            [
                pool.submit(run_tests, name, command, ports.pop(), protocol, arguments)
                for name, command in servers
            ]
            for protocol in arguments.protocols
        ]
        comparisons = []
        for protocol, (redis, engram) in zip(arguments.protocols, runs, strict=True):
            results, known = engram.result()
            comparisons.append(Comparison(protocol, redis.result()[0], results, known | NAMED))
        return comparisons


def describe(comparisons: Sequence[Comparison], version: str) -> str:
    """The figures, then the failures with their reasons."""
    lines = [
        "`python -m tests.compat.redis_py_suite` runs redis-py's own tests against Redis 8.6 and against "
        "engram, both with one database, and writes what follows.",
        "",
        f"Of redis-py {version}'s tests for commands, pipelines, encoding, connection and connection pools, "
        "synchronous and asyncio: those that Redis 8 passes, those of them that send only commands engram "
        "has or promises, and how many of these engram passes. The last columns leave out the tests that "
        "send the server nothing.",
        "",
        "| protocol | Redis 8 passes | count | engram passes | share | sending | engram passes | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for comparison in comparisons:
        counted, failures = comparison.counted(), comparison.failures()
        sending = [result for result in counted if result.commands]
        names = {result.test for result in sending}
        failing = [result for result in failures if result.test in names]
        redis = sum(result.outcome == "passed" for result in comparison.redis.values())
        cells = [
            f"RESP{comparison.protocol}",
            str(redis),
            *_share(counted, failures),
            *_share(sending, failing),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Those that it does not pass:", "", "| test | protocol | reason |", "|---|---|---|"]
    reasons = {
        pattern: entry["text"]
        for entry in tomllib.loads(REASONS.read_text())["reason"]
        for pattern in entry["tests"]
    }
    failed: dict[str, dict[int, Result]] = {}
    for comparison in comparisons:
        for result in comparison.failures():
            failed.setdefault(result.test, {})[comparison.protocol] = result
    for test, results in sorted(failed.items()):
        protocols = " and ".join(f"RESP{protocol}" for protocol in results)
        reason = explain(next(iter(results.values())), reasons)
        lines.append(f"| `{test.removeprefix('tests/')}` | {protocols} | {reason} |")
    return "\n".join([*lines, ""])


def _share(tests: Sequence[Result], failures: Sequence[Result]) -> Iterable[str]:
    passes = len(tests) - len(failures)
    return str(len(tests)), str(passes), f"{100 * passes / len(tests):.1f} %" if tests else "-"


def explain(failure: Result, reasons: dict[str, str]) -> str:
    """The known reason of a failure, by a pattern of the test's name; what pytest says when there is none."""
    for pattern, reason in reasons.items():
        if fnmatchcase(failure.test, pattern):
            return reason
    first_line = failure.reason.partition("\n")[0][:200].replace("|", "\\|")
    return f"not explained yet: {failure.outcome}, `{first_line}`"


def main() -> None:
    parser = argparse.ArgumentParser(prog="redis_py_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=Path, required=True, help="a copy of redis-py's repository")
    parser.add_argument("--python", default=sys.executable, help="what runs the tests (default: this Python)")
    parser.add_argument("--redis", default=str(REDIS8), help="the command that starts Redis 8")
    parser.add_argument("--engram", default=ENGRAM, help="the command that starts engram")
    parser.add_argument("--protocols", type=int, nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--files", nargs="+", default=FILES, help="test files, as seen from the folder")
    parser.add_argument("--logs", type=Path, help="a folder for what pytest says")
    parser.add_argument("--report", type=Path, help="a page whose last section is replaced")
    arguments = parser.parse_args()
    version = subprocess.run(
        [arguments.python, "-c", "import redis; print(redis.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    text = describe(compare(arguments), version)
    print(text)
    if arguments.report is not None:
        page = arguments.report.read_text()
        start = page.index(HEADING) + len(HEADING)
        arguments.report.write_text(f"{page[:start]}\n{text}")


if __name__ == "__main__":
    main()
