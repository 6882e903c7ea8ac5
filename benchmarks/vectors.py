"""Adding and searching vectors: engram, on disk, beside Redis 8's vector sets, in memory.

    python -m benchmarks.vectors

Two clients pipeline 20,000 vectors into each server; engram runs with `--dir` and `appendfsync always`,
Redis with `--save ""`. Then recall is measured against exact answers, and searches with 1 and 32 clients,
with a client that only sends PING beside the 32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from benchmarks.command_line import K, add_redis_options, make_parser, run, running_engram, running_redis
from benchmarks.dialects import Dialect, Engram, Redis
from benchmarks.embeddings import DataSet, Truth, find_truths, make_data
from benchmarks.load import Client, exchange, ping, run_together
from benchmarks.measures import (
    Loading,
    add_rows,
    measure_recall,
    percentiles,
    rate,
    search_requests,
    vectors_section,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table, on_cores, render_number

PING_INTERVAL = 0.002

Figures = dict[str, float]


def load(peer: Peer, dialect: Dialect, data: DataSet, arguments: argparse.Namespace) -> Figures:
    cpu = peer.cpu_seconds()
    loading = Loading(dialect, data.rows, clients=arguments.loaders, depth=arguments.pipeline)
    added = add_rows(peer, loading, arguments.load_cores)
    return {"VADD/s": added, "server CPU s while loading": peer.cpu_seconds() - cpu}


def search(peer: Peer, requests: Sequence[bytes], clients: int, arguments: argparse.Namespace) -> Figures:
    """Searches a second of `clients` clients; beside more than one, the latency of PING."""
    processes = min(clients, arguments.processes)
    shares = [clients // processes + (number < clients % processes) for number in range(processes)]
    works = [
        partial(exchange, peer.port, requests[number::processes], share, arguments.seconds)
        for number, share in enumerate(shares)
    ]
    if clients > 1:
        works.append(partial(ping, peer.port, PING_INTERVAL, arguments.seconds))
    cpu = peer.cpu_seconds()
    with on_cores(arguments.load_cores):
        measured = run_together(works)
    used = peer.cpu_seconds() - cpu
    searches = measured[:processes]
    noun = "1 client" if clients == 1 else f"{clients} clients"
    figures = {
        f"searches/s, {noun}": rate(searches),
        f"server CPU ms a search, {noun}": 1000 * used / sum(one.replies for one in searches),
    }
    if clients > 1:
        p50, p99 = percentiles(measured[-1].latencies)
        figures |= {"PING p50 ms meanwhile": p50, "PING p99 ms meanwhile": p99}
    return figures


def rows_unindexed(peer: Peer) -> int:
    with closing(Client(peer.port)) as client:
        return int(vectors_section(client)["vectors_rows_unindexed"])


def measure_head(data: DataSet, truth: Truth, arguments: argparse.Namespace) -> Figures:
    """Recall while there is no graph at all: an engram that never builds one."""
    dialect = Engram(data.rows.dimension)
    with running_engram(arguments, f"--seal-rows {1 << 24}") as peer:
        load(peer, dialect, data, arguments)
        recall = measure_recall(peer, search_requests(dialect, data.queries, K), truth)
        return {"recall@10, no graph": recall}


def measure_engram(data: DataSet, truth: Truth, arguments: argparse.Namespace) -> Figures:
    dialect = Engram(data.rows.dimension)
    requests = search_requests(dialect, data.queries, K, arguments.ef)
    with (
        tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as folder,
        running_engram(arguments, "--appendfsync always", folder=Path(folder)) as peer,
    ):
        figures = load(peer, dialect, data, arguments)
        figures["rows without a graph after loading"] = rows_unindexed(peer)
        figures["recall@10, after loading"] = measure_recall(peer, requests, truth)
        cpu = peer.cpu_seconds()
        figures["further s until graphs are ready"] = wait_for_graphs(peer)
        figures["server CPU s meanwhile"] = peer.cpu_seconds() - cpu
        figures["rows without a graph then"] = rows_unindexed(peer)
        figures["recall@10, graphs ready"] = measure_recall(peer, requests, truth)
        for clients in (1, arguments.clients):
            figures |= search(peer, requests, clients, arguments)
    return figures


def measure_redis(data: DataSet, truth: Truth, arguments: argparse.Namespace) -> Figures:
    dialect = Redis(tuple(arguments.peer_words.split()))
    requests = search_requests(dialect, data.queries, K, arguments.peer_ef)
    with running_redis(arguments) as peer:
        figures = load(peer, dialect, data, arguments)
        figures["recall@10, graphs ready"] = measure_recall(peer, requests, truth)
        for clients in (1, arguments.clients):
            figures |= search(peer, requests, clients, arguments)
    return figures


def render(engram: Sequence[Figures], redis: Sequence[Figures]) -> str:
    """A row for each figure: the medians over the rounds, and engram's as a multiple of Redis's."""
    rows = []
    for name in engram[0]:
        ours = statistics.median(figures[name] for figures in engram)
        row = [name, render_number(ours), "", ""]
        if name in redis[0]:
            theirs = statistics.median(figures[name] for figures in redis)
            row[2:] = [render_number(theirs), f"{ours / theirs:.2f}" if theirs else ""]
        rows.append(row)
    return markdown_table(["", "engram", "Redis 8", "ratio"], rows)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    truth = find_truths(data.rows, data.queries, K, [None])[0]
    engram, redis = [], []
    for _ in range(arguments.rounds):
        head = measure_head(data, truth, arguments)
        engram.append(head | measure_engram(data, truth, arguments))
        redis.append(measure_redis(data, truth, arguments))
    heading = f"{data.rows.rows:,} vectors of {data.rows.dimension} dimensions, k = {K}"
    return f"{heading}\n\n{render(engram, redis)}"


def main() -> int:
    parser = make_parser("vectors: engram beside Redis 8", cores="half")
    add_redis_options(parser)
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the table shows medians")
    parser.add_argument("--loaders", type=int, default=2, help="clients that add, a process each")
    parser.add_argument("--pipeline", type=int, default=100, help="requests such a client has in flight")
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    parser.add_argument("--processes", type=int, default=2, help="processes these clients share")
    parser.add_argument("--ef", type=int, help="EF of engram's searches; its own choice when not given")
    parser.add_argument("--peer-ef", type=int, help="EF of Redis's searches; its own choice when not given")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
