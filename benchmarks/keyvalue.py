"""Strings and counters: engram beside redis-server, driven by redis-benchmark with 50 clients.

    python -m benchmarks.keyvalue

Both keep everything in memory; with `--appendfsync always` both sync their log before they answer, in the
same file system. Each server has a core to itself, and redis-benchmark another, where there are three. The
servers take turns, test by test.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from benchmarks.peers import (
    ENGRAM,
    Peer,
    ServerError,
    describe_machine,
    end_servers_when_terminated,
    free_port,
    markdown_table,
    on_cores,
    running,
)

TESTS = ("ping_mbulk", "set", "get", "incr")
PIPELINES = (1, 16)
CLIENTS = 50

# With a log, requests go to so many keys, drawn at random.
KEYS = 100_000

# No run of redis-benchmark lasts longer.
LIMIT_SECONDS = 300.0


@attrs.frozen
class Run:
    """One run of redis-benchmark.

    `rate` is in requests a second, `server_cpu` in microseconds a request; `load_busy` is the part of the
    time that redis-benchmark itself was busy: near 1, it is what held the rate back.
    """

    rate: float
    server_cpu: float
    load_busy: float


@attrs.frozen
class Cores:
    """Which cores each process is kept on; empty for any."""

    engram: Sequence[int] = ()
    redis: Sequence[int] = ()
    load: Sequence[int] = ()

    @classmethod
    def share_out(cls) -> Cores:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 2:
            return cls(cores[:1], cores[1:2], cores[2:3])
        if len(cores) == 2:
            return cls(cores[:1], cores[:1], cores[1:])
        return cls()


def run_benchmark(peer: Peer, test: str, depth: int, requests: int, keys: int, cores: Sequence[int]) -> Run:
    """Sends the requests to one key, or with `keys` to so many.

    Raises:
        ServerError: redis-benchmark failed.
    """
    command = ["redis-benchmark", "-p", str(peer.port), "-t", test, "-c", str(CLIENTS), "-P", str(depth)]
    command += ["-n", str(requests), "--csv", *(["-r", str(keys)] if keys else [])]
    server_before, load_before = peer.cpu_seconds(), ended_children_cpu()
    with on_cores(cores):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    rows = [row for row in csv.DictReader(done.stdout.splitlines()) if row.get("rps")]
    if done.returncode or len(rows) != 1:
        raise ServerError(f"redis-benchmark against {peer.name}: {done.stderr or done.stdout}")
    rate = float(rows[0]["rps"])
    return Run(
        rate=rate,
        server_cpu=(peer.cpu_seconds() - server_before) / requests * 1e6,
        load_busy=(ended_children_cpu() - load_before) * rate / requests,
    )


def ended_children_cpu() -> float:
    """CPU seconds of the children that have ended: of redis-benchmark, since the servers still run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(runs: Sequence[Run]) -> Run:
    """The medians of each figure."""
    return Run(*(statistics.median(figures) for figures in zip(*map(attrs.astuple, runs), strict=True)))


def measure(engram: Peer, redis: Peer, arguments: argparse.Namespace, cores: Cores) -> list[list[str]]:
    """A row of the table for each test and depth of pipelining."""
    rows = []
    keys = KEYS if arguments.appendfsync else 0
    for depth in PIPELINES:
        requests = arguments.requests * (1 if depth == 1 else depth // 2)
        runs: dict[tuple[str, Peer], list[Run]] = {}
        for _ in range(arguments.rounds):
            for test in arguments.tests:
                for peer in (engram, redis):
                    run = run_benchmark(peer, test, depth, requests, keys, cores.load)
                    runs.setdefault((test, peer), []).append(run)
        for test in arguments.tests:
            ours, theirs = median(runs[test, engram]), median(runs[test, redis])
            row = [f"{test.upper().removesuffix('_MBULK')}, -P {depth}", f"{ours.rate:,.0f}"]
            row += [f"{theirs.rate:,.0f}", f"{ours.rate / theirs.rate:.2f}"]
            row += [f"{run.server_cpu:.1f}" for run in (ours, theirs)]
            row += [f"{run.load_busy:.0%}" for run in (ours, theirs)]
            rows.append(row)
    return rows


def commands(arguments: argparse.Namespace, folder: str, ports: Sequence[int]) -> tuple[str, str]:
    """How engram and redis-server are run."""
    engram = f"{arguments.engram} --port {ports[0]}"
    redis = f'{arguments.peer} --port {ports[1]} --save ""'
    if not arguments.appendfsync:
        return engram, f"{redis} --appendonly no"
    ours, theirs = (shlex.quote(f"{folder}/{name}") for name in ("engram", "redis"))
    policy = f"--appendfsync {arguments.appendfsync}"
    # Neither makes its log shorter meanwhile.
    return (
        f"{engram} --dir {ours} {policy} --snapshot-log-size 1024gb",
        f"{redis} --dir {theirs} --appendonly yes {policy} --auto-aof-rewrite-percentage 0",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="strings: engram beside redis-server",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--engram", default=ENGRAM, help="command that runs engram")
    parser.add_argument("--peer", default="redis-server", help="command that runs Redis")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the table shows medians")
    parser.add_argument(
        "--requests",
        type=int,
        default=100_000,
        help="requests of an unpipelined run; 8 times that when pipelined",
    )
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS, help="of redis-benchmark")
    parser.add_argument(
        "--appendfsync",
        choices=("always", "everysec", "no"),
        help="both with a log, synced so; else with none",
    )
    parser.add_argument("--scratch", type=Path, help="folder for the logs; the temporary one when not given")
    parser.add_argument("--no-pinning", action="store_true", help="leave the cores to the scheduler")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if shutil.which("redis-benchmark") is None:
        print("there is no redis-benchmark: install redis-tools", file=sys.stderr)
        return 2
    end_servers_when_terminated()
    cores = Cores() if arguments.no_pinning else Cores.share_out()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch)
        )
        (Path(folder) / "redis").mkdir()
        machine = describe_machine(Path(folder))
        ports = free_port(), free_port()
        ours, theirs = commands(arguments, folder, ports)
        try:
            engram = stack.enter_context(running("engram", ours, ports[0], cores.engram))
            redis = stack.enter_context(running("redis-server", theirs, ports[1], cores.redis))
            rows = measure(engram, redis, arguments, cores)
        except (ServerError, subprocess.TimeoutExpired) as error:
            print(f"the measurement failed: {error}", file=sys.stderr)
            return 1
        kept = f"appendfsync {arguments.appendfsync}" if arguments.appendfsync else "in memory"
        print(f"{kept}, {CLIENTS} clients; {machine}\n")
    header = ["requests/s", "engram", "redis-server", "ratio", "engram us", "redis us"]
    print(markdown_table([*header, "load on engram", "load on redis"], rows))
    print("\nus: CPU time of the server, a request. load: how busy redis-benchmark was.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
