"""Adding and searching vectors: engram, on disk, beside Redis 8's vector sets, in memory.

    python -m benchmarks.vectors

Two clients pipeline 20,000 vectors into each server; engram runs with `--dir` and `appendfsync always`,
Redis with `--save ""`. Then recall is measured against exact answers, and searches with 1 and 32 clients,
with a client that only sends PING beside the 32.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from benchmarks.load import Client, LoadError, Measured, exchange, pack, ping, pipeline, run_together
from benchmarks.peers import (
    ENGRAM,
    Peer,
    ServerError,
    describe_machine,
    end_servers_when_terminated,
    free_port,
    markdown_table,
    running,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
KEY = b"packages"
K = 10
PING_INTERVAL = 0.002
BUILD_SECONDS = 600.0

# A row as near as the k-th, but for the rounding of float32, is a right answer, too: some texts occur twice.
TOLERANCE = 1e-6

Figures = dict[str, float]


@attrs.frozen(eq=False)
class Data:
    """Rows and queries: `vectors` (n, dimension) and `queries` (m, dimension) as <f4.

    `similarities` (m, n) are cosines, exact to float64, and `thresholds` (m,) those of each k-th nearest.
    """

    names: list[bytes]
    vectors: npt.NDArray[np.float32]
    queries: npt.NDArray[np.float32]
    similarities: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]

    @classmethod
    def read(cls, path: Path, rows: int, queries: int) -> Data:
        with np.load(path) as arrays:
            names = [name.encode() for name in arrays["names"][:rows].tolist()]
            vectors = arrays["vectors"][:rows].astype("<f4")
            wanted = arrays["query_vectors"][:queries].astype("<f4")
        similarities = _unit(wanted) @ _unit(vectors).T
        thresholds = np.partition(similarities, -K, axis=1)[:, -K] - TOLERANCE
        return cls(names, vectors, wanted, similarities, thresholds)

    def recall(self, found: Sequence[Sequence[bytes]]) -> float:
        """The part of the true k nearest that is among the keys found, over all queries."""
        row_of = {name: row for row, name in enumerate(self.names)}
        right = sum(
            int(np.count_nonzero(self.similarities[query, [row_of[key] for key in set(keys)]] >= threshold))
            for query, (keys, threshold) in enumerate(zip(found, self.thresholds, strict=True))
        )
        return right / (K * len(found))


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    unit: npt.NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


@attrs.frozen
class Dialect:
    """How a server is asked to add and to search; both answer with key and score in turn."""

    prepare: Sequence[Sequence[bytes]]
    add: Callable[[bytes, bytes], bytes]
    search: Callable[[bytes], bytes]


def engram_dialect(dimension: int, ef: int | None) -> Dialect:
    option = [] if ef is None else [b"EF", str(ef).encode()]
    return Dialect(
        prepare=[[b"VNEW", KEY, str(dimension).encode()]],
        add=lambda name, vector: pack(b"VADD", KEY, name, vector),
        search=lambda query: pack(b"VSEARCH", KEY, query, str(K).encode(), *option),
    )


def redis_dialect(ef: int | None) -> Dialect:
    option = [] if ef is None else [b"EF", str(ef).encode()]
    return Dialect(
        prepare=[],
        add=lambda name, vector: pack(b"VADD", KEY, b"FP32", vector, name),
        search=lambda query: pack(
            b"VSIM", KEY, b"FP32", query, b"WITHSCORES", b"COUNT", str(K).encode(), *option
        ),
    )


def load(peer: Peer, dialect: Dialect, data: Data, arguments: argparse.Namespace) -> Figures:
    requests = [
        dialect.add(name, vector.tobytes()) for name, vector in zip(data.names, data.vectors, strict=True)
    ]
    with closing(Client(peer.port)) as client:
        for command in dialect.prepare:
            client.call(*command)
    cpu = peer.cpu_seconds()
    measured = run_together(
        [
            partial(pipeline, peer.port, requests[number :: arguments.loaders], arguments.pipeline)
            for number in range(arguments.loaders)
        ]
    )
    return {"VADD/s": rate(measured), "server CPU s while loading": peer.cpu_seconds() - cpu}


def rate(measured: Sequence[Measured]) -> float:
    """Replies a second of processes that ran side by side."""
    seconds = max(one.ended for one in measured) - min(one.began for one in measured)
    return sum(one.replies for one in measured) / seconds


def measure_recall(peer: Peer, dialect: Dialect, data: Data) -> float:
    found: list[list[bytes]] = []
    requests = [dialect.search(query.tobytes()) for query in data.queries]
    with closing(Client(peer.port)) as client:
        for start in range(0, len(requests), 50):
            batch = requests[start : start + 50]
            client.send(b"".join(batch))
            found += [reply[::2] for reply in client.receive(len(batch))]
    return data.recall(found)


def search(peer: Peer, dialect: Dialect, data: Data, clients: int, arguments: argparse.Namespace) -> Figures:
    """Searches a second of `clients` clients; beside more than one, the latency of PING."""
    requests = [dialect.search(query.tobytes()) for query in data.queries]
    processes = min(clients, arguments.processes)
    shares = [clients // processes + (number < clients % processes) for number in range(processes)]
    works = [
        partial(exchange, peer.port, requests[number::processes], share, arguments.seconds)
        for number, share in enumerate(shares)
    ]
    if clients > 1:
        works.append(partial(ping, peer.port, PING_INTERVAL, arguments.seconds))
    cpu = peer.cpu_seconds()
    measured = run_together(works)
    used = peer.cpu_seconds() - cpu
    searches = measured[:processes]
    noun = "1 client" if clients == 1 else f"{clients} clients"
    figures = {
        f"searches/s, {noun}": rate(searches),
        f"server CPU ms a search, {noun}": 1000 * used / sum(one.replies for one in searches),
    }
    if clients > 1:
        latencies = np.array(measured[-1].latencies) * 1000
        for percentile in (50, 99):
            figures[f"PING p{percentile} ms meanwhile"] = float(np.percentile(latencies, percentile))
    return figures


def vectors_section(client: Client) -> dict[str, str]:
    text: Any = client.call(b"INFO", b"vectors")
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def rows_unindexed(peer: Peer) -> int:
    with closing(Client(peer.port)) as client:
        return int(vectors_section(client)["vectors_rows_unindexed"])


def wait_for_graphs(peer: Peer) -> float:
    """Waits until no graph is being built or waits to be; returns the seconds that took."""
    began = time.monotonic()
    with closing(Client(peer.port)) as client:
        while True:
            section = vectors_section(client)
            if int(section["vectors_builds_running"]) + int(section["vectors_builds_waiting"]) == 0:
                return time.monotonic() - began
            if time.monotonic() - began > BUILD_SECONDS:
                raise LoadError(f"graphs are not ready: {section}")
            time.sleep(0.05)


def measure_head(data: Data, arguments: argparse.Namespace) -> Figures:
    """Recall while there is no graph at all: an engram that never builds one."""
    port = free_port()
    command = f"{arguments.engram} --port {port} --seal-rows {1 << 24}"
    dialect = engram_dialect(data.vectors.shape[1], None)
    with running("engram", command, port, arguments.server_cores) as peer:
        load(peer, dialect, data, arguments)
        return {"recall@10, no graph": measure_recall(peer, dialect, data)}


def measure_engram(data: Data, arguments: argparse.Namespace) -> Figures:
    port = free_port()
    dialect = engram_dialect(data.vectors.shape[1], arguments.ef)
    with tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as folder:
        command = f"{arguments.engram} --port {port} --dir {shlex.quote(folder)}/data --appendfsync always"
        with running("engram", command, port, arguments.server_cores) as peer:
            figures = load(peer, dialect, data, arguments)
            figures["rows without a graph after loading"] = rows_unindexed(peer)
            figures["recall@10, after loading"] = measure_recall(peer, dialect, data)
            cpu = peer.cpu_seconds()
            figures["further s until graphs are ready"] = wait_for_graphs(peer)
            figures["server CPU s meanwhile"] = peer.cpu_seconds() - cpu
            figures["rows without a graph then"] = rows_unindexed(peer)
            figures["recall@10, graphs ready"] = measure_recall(peer, dialect, data)
            for clients in (1, arguments.clients):
                figures |= search(peer, dialect, data, clients, arguments)
    return figures


def measure_redis(data: Data, arguments: argparse.Namespace) -> Figures:
    port = free_port()
    dialect = redis_dialect(arguments.peer_ef)
    command = f'{arguments.peer} --port {port} --save "" --appendonly no'
    with running("Redis 8", command, port, arguments.server_cores) as peer:
        figures = load(peer, dialect, data, arguments)
        figures["recall@10, graphs ready"] = measure_recall(peer, dialect, data)
        for clients in (1, arguments.clients):
            figures |= search(peer, dialect, data, clients, arguments)
    return figures


def render(engram: Sequence[Figures], redis: Sequence[Figures]) -> str:
    """A row for each figure: the medians over the rounds, and engram's as a multiple of Redis's."""
    rows = []
    for name in engram[0]:
        ours = statistics.median(figures[name] for figures in engram)
        row = [name, number(ours), "", ""]
        if name in redis[0]:
            theirs = statistics.median(figures[name] for figures in redis)
            row[2:] = [number(theirs), f"{ours / theirs:.2f}" if theirs else ""]
        rows.append(row)
    return markdown_table(["", "engram", "Redis 8", "ratio"], rows)


def number(value: float) -> str:
    if value == int(value) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="vectors: engram beside Redis 8", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=SHARED / "data" / "packages-20k.npz", help="the embeddings"
    )
    parser.add_argument("--engram", default=ENGRAM, help="command that runs engram")
    parser.add_argument("--peer", default=str(SHARED / "peers" / "redis8"), help="command that runs Redis 8")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; the table shows medians")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each search load runs")
    parser.add_argument("--rows", type=int, default=20_000, help="vectors to add")
    parser.add_argument("--queries", type=int, default=1_000, help="distinct queries")
    parser.add_argument("--loaders", type=int, default=2, help="clients that add, a process each")
    parser.add_argument("--pipeline", type=int, default=100, help="requests such a client has in flight")
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    parser.add_argument("--processes", type=int, default=2, help="processes these clients share")
    parser.add_argument("--ef", type=int, help="EF of engram's searches; its own choice when not given")
    parser.add_argument("--peer-ef", type=int, help="EF of Redis's searches; its own choice when not given")
    parser.add_argument(
        "--scratch", type=Path, help="folder for engram's data; the temporary one when not given"
    )
    parser.add_argument(
        "--server-cores", type=int, nargs="*", default=[], help="cores the servers are kept on"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not arguments.data.exists():
        print(f"there are no embeddings at {arguments.data}: name the file with --data", file=sys.stderr)
        return 2
    data = Data.read(arguments.data, arguments.rows, arguments.queries)
    machine = describe_machine(arguments.scratch or Path(tempfile.gettempdir()))
    end_servers_when_terminated()
    engram, redis = [], []
    try:
        for _ in range(arguments.rounds):
            head = measure_head(data, arguments)
            engram.append(head | measure_engram(data, arguments))
            redis.append(measure_redis(data, arguments))
    except (LoadError, ServerError) as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    print(f"{len(data.names):,} vectors of {data.vectors.shape[1]} dimensions, k = {K}; {machine}\n")
    print(render(engram, redis))
    return 0


if __name__ == "__main__":
    sys.exit(main())
