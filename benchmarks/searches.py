"""Searches a core can answer: engram, Redis 8's vector sets and a bare loop over hnswlib, at the same recall.

    python -m benchmarks.searches

Each server has one core, the same, and the load another. For each, the least EF with which recall@10 reaches
0.99 is found by measurement. Then they take turns: 32 clients, 1 client. hnswlib searches in this process, on
the servers' core, with one thread: a query a call, and 32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from benchmarks.command_line import (
    K,
    MissingError,
    add_redis_options,
    make_parser,
    run,
    running_engram,
    running_redis,
)
from benchmarks.dialects import Dialect, Engram, Redis
from benchmarks.embeddings import DataSet, Floats, Truth, find_truths, key_of, make_data
from benchmarks.measures import (
    Loading,
    SearchLoad,
    add_rows,
    least_expansion,
    measure_recall,
    search_load,
    search_requests,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table, on_cores, render_number

CONNECTIVITY = 16
CONSTRUCTION_EXPANSION = 200


@attrs.frozen
class Contender:
    """A server and the searches it is sent, at the least EF that is good enough."""

    peer: Peer
    requests: list[bytes]
    expansion: int
    recall: float


def enter(peer: Peer, dialect: Dialect, data: DataSet, truth: Truth, goal: float) -> Contender:
    def recall_at(expansion: int) -> float:
        return measure_recall(peer, search_requests(dialect, data.queries, K, expansion), truth)

    expansion, recall = least_expansion(recall_at, goal)
    return Contender(peer, search_requests(dialect, data.queries, K, expansion), expansion, recall)


class BareLoop:
    """hnswlib in this process: searches in one thread, nothing around them."""

    def __init__(self, data: DataSet, truth: Truth, goal: float) -> None:
        hnswlib = import_hnswlib()
        self._queries = data.queries
        self._index = hnswlib.Index(space="ip", dim=data.rows.dimension)
        self._index.init_index(
            max_elements=data.rows.rows, M=CONNECTIVITY, ef_construction=CONSTRUCTION_EXPANSION
        )
        self._index.add_items(data.rows.vectors(), num_threads=1)
        self.expansion, self.recall = least_expansion(partial(self._recall_at, truth), goal)
        self._index.set_ef(self.expansion)

    def _recall_at(self, truth: Truth, expansion: int) -> float:
        self._index.set_ef(expansion)
        found = self._search(self._queries)
        return truth.recall([[key_of(row) for row in rows] for rows in found.tolist()])

    def _search(self, queries: Floats) -> Any:
        return self._index.knn_query(queries, k=K, num_threads=1)[0]

    def rate(self, batch: int, seconds: float) -> float:
        """Searches a second, so many queries a call."""
        parts = [self._queries[start : start + batch] for start in range(0, len(self._queries), batch)]
        searches = 0
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            for part in parts:
                self._search(part)
            searches += len(self._queries)
        return searches / elapsed


def import_hnswlib() -> Any:
    try:
        import hnswlib
    except ImportError:
        raise MissingError("hnswlib is not installed: pip install 'engram[benchmarks]'") from None
    return hnswlib


@attrs.define
class Results:
    """Of all rounds: of each server by the number of clients, of hnswlib by the queries a call."""

    engram: dict[int, list[SearchLoad]] = attrs.field(factory=dict)
    redis: dict[int, list[SearchLoad]] = attrs.field(factory=dict)
    bare: dict[int, list[float]] = attrs.field(factory=dict)


def measure_rounds(
    engram: Contender, redis: Contender, bare: BareLoop, arguments: argparse.Namespace
) -> Results:
    results = Results()
    for _ in range(arguments.rounds):
        for clients in (arguments.clients, 1):
            for contender, loads in ((engram, results.engram), (redis, results.redis)):
                loads.setdefault(clients, []).append(
                    search_load(
                        contender.peer, contender.requests, clients, arguments.seconds, arguments.load_cores
                    )
                )
            with on_cores(arguments.server_cores):
                results.bare.setdefault(clients, []).append(bare.rate(clients, arguments.seconds))
    return results


def render(
    results: Results, engram: Contender, redis: Contender, bare: BareLoop, arguments: argparse.Namespace
) -> str:
    rows = [
        ["EF", *(str(one.expansion) for one in (engram, redis, bare))],
        [f"recall@{K}", *(f"{one.recall:.4f}" for one in (engram, redis, bare))],
    ]
    ours = {clients: median_rate(loads) for clients, loads in results.engram.items()}
    theirs = {clients: median_rate(loads) for clients, loads in results.redis.items()}
    fastest = max(map(statistics.median, results.bare.values()))
    for clients in (arguments.clients, 1):
        noun = "1 client" if clients == 1 else f"{clients} clients"
        loads = (results.engram[clients], results.redis[clients])
        calls = render_number(statistics.median(results.bare[clients]))
        rows.append([f"searches/s, {noun}", *(render_number(median_rate(load)) for load in loads), calls])
        for name, figure in FIGURES.items():
            medians = (statistics.median(map(figure, load)) for load in loads)
            rows.append([f"{name}, {noun}", *map(render_number, medians), ""])
        ratios = (ours[clients] / theirs[clients], ours[clients] / fastest)
        rows.append([f"engram as a multiple, {noun}", "", *(f"{ratio:.2f}" for ratio in ratios)])
    text = f"{arguments.rows:,} rows, k = {K}, medians of {arguments.rounds} rounds; hnswlib: so many"
    table = markdown_table(["", "engram", "Redis 8", "hnswlib"], rows)
    return (
        f"{text} queries a call as there are clients, and the better of the two in the multiples\n\n{table}"
    )


FIGURES: dict[str, Callable[[SearchLoad], float]] = {
    "p50 ms": lambda load: load.p50,
    "p99 ms": lambda load: load.p99,
    "server CPU us a search": lambda load: load.cpu,
}


def median_rate(loads: Sequence[SearchLoad]) -> float:
    return statistics.median(load.rate for load in loads)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    import_hnswlib()
    data = make_data(arguments, folder)
    truth = find_truths(data.rows, data.queries, K, [None])[0]
    bare = BareLoop(data, truth, arguments.recall)
    ours = Engram(data.rows.dimension)
    theirs = Redis(tuple(arguments.peer_words.split()))
    with running_engram(arguments) as engram, running_redis(arguments) as redis:
        add_rows(engram, Loading(ours, data.rows), arguments.load_cores)
        add_rows(redis, Loading(theirs, data.rows), arguments.load_cores)
        wait_for_graphs(engram, arguments.optimize)
        first = enter(engram, ours, data, truth, arguments.recall)
        second = enter(redis, theirs, data, truth, arguments.recall)
        results = measure_rounds(first, second, bare, arguments)
    return render(results, first, second, bare, arguments)


def main() -> int:
    parser = make_parser("searches a core: engram, Redis 8 and hnswlib", seconds=4.0)
    add_redis_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; the table shows medians")
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    parser.add_argument("--recall", type=float, default=0.99, help="that each EF has to reach")
    parser.add_argument("--optimize", action="store_true", help="one graph for all rows, by VOPTIMIZE")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
