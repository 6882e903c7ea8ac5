"""Adding rows to an engram that syncs each, searches meanwhile, and Redis 8's rate in memory beside it.

    python -m benchmarks.loading

Two pipelining clients add 300,000 rows. Another searches all the time, and again at rest when all graphs are
ready. A fourth searches for the row acknowledged last, and stops the measurement if it is not found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import closing
from ctypes import c_int64
from functools import partial
from pathlib import Path

import attrs

from benchmarks.command_line import K, add_redis_options, make_parser, run, running_engram, running_redis
from benchmarks.dialects import INDEX, Engram, Redis
from benchmarks.embeddings import DataSet, make_data
from benchmarks.load import Client, Measured, rest, run_together
from benchmarks.measures import (
    BUILD_SECONDS,
    LOADERS,
    Loading,
    add_rows,
    percentiles,
    prepare,
    probe_newest,
    search_meanwhile,
    search_requests,
    wait_for_graphs,
    watch_unindexed,
)
from benchmarks.peers import Peer, markdown_table, on_cores, render_number


@attrs.frozen
class Phase:
    """A part of the time: rows added a second, and the latencies of the searches that ended in it."""

    name: str
    rows: int
    seconds: float
    latencies: Sequence[float]


@attrs.frozen
class Timeline:
    """What happened while rows were added: see `measures` for what each of them notes."""

    loaders: list[Measured]
    searcher: Measured
    prober: Measured
    watcher: Measured

    def phases(self, depth: int) -> list[Phase]:
        """Before and after `max-unindexed-rows` was reached first, and both together."""
        began = min(loader.began for loader in self.loaders)
        ended = max(loader.ended for loader in self.loaders)
        limited = min(self.watcher.moments[0] if self.watcher.moments else ended, ended)
        rows = min(
            sum(bisect_left(loader.moments, limited) for loader in self.loaders) * depth,
            sum(loader.replies for loader in self.loaders),
        )
        total = sum(loader.replies for loader in self.loaders)
        first, last = (bisect_left(self.searcher.moments, moment) for moment in (limited, ended))
        latencies = self.searcher.latencies
        return [
            Phase("until max-unindexed-rows", rows, limited - began, latencies[:first]),
            Phase("afterwards", total - rows, ended - limited, latencies[first:last]),
            Phase("all loading", total, ended - began, latencies[:last]),
        ]


def load_engram(peer: Peer, data: DataSet, requests: list[bytes], arguments: argparse.Namespace) -> Timeline:
    dialect = Engram(data.rows.dimension)
    loading = Loading(dialect, data.rows, depth=arguments.pipeline)
    prepare(peer, dialect)
    newest = multiprocessing.get_context("spawn").RawArray(c_int64, [-1] * loading.clients)
    with on_cores(arguments.load_cores):
        *loaders, searcher, prober, watcher = run_together(
            loading.works(peer.port, newest),
            [
                partial(search_meanwhile, peer.port, requests),
                partial(probe_newest, peer.port, dialect, data.rows, K, newest),
                partial(watch_unindexed, peer.port, max_unindexed_rows(peer)),
            ],
            limit=BUILD_SECONDS,
        )
    return Timeline(loaders, searcher, prober, watcher)


def max_unindexed_rows(peer: Peer) -> int:
    with closing(Client(peer.port)) as client:
        return int(client.call(b"CONFIG", b"GET", b"max-unindexed-rows")[1])


def search_at_rest(peer: Peer, requests: list[bytes], arguments: argparse.Namespace) -> Phase:
    with on_cores(arguments.load_cores):
        _, searcher = run_together(
            [partial(rest, arguments.seconds)], [partial(search_meanwhile, peer.port, requests)]
        )
    return Phase("at rest", 0, arguments.seconds, searcher.latencies)


def measure_redis(data: DataSet, arguments: argparse.Namespace) -> tuple[int, float]:
    """The rows that Redis took in the time it was given, and its rate, rows a second."""
    loading = Loading(
        Redis(),
        data.rows,
        depth=arguments.pipeline,
        seconds=None if arguments.redis_all else arguments.redis_seconds,
    )
    with running_redis(arguments) as peer:
        rate = add_rows(peer, loading, arguments.load_cores)
        with closing(Client(peer.port)) as client:
            return client.call(b"VCARD", INDEX), rate


def render(
    timeline: Timeline, resting: Phase, redis: tuple[int, float], arguments: argparse.Namespace
) -> str:
    rows = []
    redis_rows, redis_rate = redis
    rest_p99 = percentiles(resting.latencies)[1]
    for phase in (*timeline.phases(arguments.pipeline), resting):
        p50, p99 = percentiles(phase.latencies)
        rate = phase.rows / phase.seconds if phase.rows else 0.0
        rows.append(
            [
                phase.name,
                f"{phase.rows:,}",
                f"{phase.seconds:.1f}",
                render_number(rate) if rate else "",
                f"{rate / redis_rate:.2f}" if rate else "",
                f"{len(phase.latencies):,}",
                f"{p50:.2f}",
                f"{p99:.2f}",
                f"{p99 / rest_p99:.2f}",
            ]
        )
    header = [
        "engram, appendfsync always",
        "rows",
        "seconds",
        "rows/s",
        "x Redis",
        "searches",
        "p50 ms",
        "p99 ms",
    ]
    lines = [
        f"{arguments.rows:,} rows by {LOADERS} clients, {arguments.pipeline} in flight each; one searches.",
        f"Redis 8, in memory: {redis_rate:,.0f} rows/s over its first {redis_rows:,} rows"
        + ("." if redis_rows == arguments.rows else "; it slows as rows come, so this favours it."),
        f"{timeline.prober.replies:,} searches for the row acknowledged last, sampled, all found it.",
    ]
    return "\n".join(lines) + "\n\n" + markdown_table([*header, "x p99 at rest"], rows)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    requests = search_requests(Engram(data.rows.dimension), data.queries, K)
    with running_engram(arguments, "--appendfsync always", folder=folder) as engram:
        timeline = load_engram(engram, data, requests, arguments)
        wait_for_graphs(engram)
        resting = search_at_rest(engram, requests, arguments)
    return render(timeline, resting, measure_redis(data, arguments), arguments)


def main() -> int:
    parser = make_parser(
        "adding rows, and searching meanwhile: engram, on disk, beside Redis 8, in memory",
        rows=300_000,
        seconds=20.0,
        cores="half",
    )
    add_redis_options(parser)
    parser.add_argument(
        "--pipeline", type=int, default=100, help="rows that each adding client has in flight"
    )
    parser.add_argument(
        "--redis-seconds", type=float, default=60.0, help="how long rows are added to Redis 8"
    )
    parser.add_argument("--redis-all", action="store_true", help="add them all: takes several minutes")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
