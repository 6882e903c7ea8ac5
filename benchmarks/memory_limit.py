"""What `maxmemory` counts beside what the process takes, step by step as data comes and goes.

python -m benchmarks.memory_limit [--keys 200000] [--rows 20000] [--dimension 384]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np

from benchmarks.dialects import INDEX
from benchmarks.load import Client, pack
from benchmarks.measures import key_of_string, wait_for_graphs
from benchmarks.peers import ENGRAM, Peer, describe_machine, free_port, markdown_table, running

_PIPELINE = 256
_QUERIES = 200


def send(client: Client, requests: Iterator[bytes]) -> None:
    """Sends requests in a pipeline, so many at a time."""
    waiting: list[bytes] = []
    for request in requests:
        waiting.append(request)
        if len(waiting) == _PIPELINE:
            client.send(b"".join(waiting))
            client.receive(len(waiting))
            waiting.clear()
    client.send(b"".join(waiting))
    client.receive(len(waiting))


class Table:
    """A line for each step: what is counted, and what the process has taken, since a server started."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []

    def steps(self, peer: Peer, client: Client) -> Callable[[str], None]:
        """Adds a line for what is there when it is called."""
        first = _sizes(peer, client)

        def step(name: str) -> None:
            sizes = zip(_sizes(peer, client), first, strict=True)
            self.lines.append([name, *(f"{(now - before) / 2**20:.1f}" for now, before in sizes)])

        return step


def _sizes(peer: Peer, client: Client) -> Sequence[int]:
    text = client.call(b"INFO", b"memory").decode()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["used_memory"]), *peer.resident()


def measure_strings(peer: Peer, table: Table, count: int) -> None:
    with closing(Client(peer.port)) as client:
        step = table.steps(peer, client)
        keys = [key_of_string(number) for number in range(count)]
        send(client, (pack(b"SET", key, bytes(100)) for key in keys))
        step(f"{count:,} strings of 100 bytes")
        send(client, (pack(b"DEL", key) for key in keys))
        step("all deleted")


def measure_expiries(peer: Peer, table: Table, count: int) -> None:
    with closing(Client(peer.port)) as client:
        step = table.steps(peer, client)
        keys = map(key_of_string, range(count))
        send(client, (pack(b"SET", key, bytes(100), b"EX", b"100000") for key in keys))
        step(f"{count:,} strings of 100 bytes with an expiry")


def measure_vectors(peer: Peer, table: Table, rows: int, dimension: int, where: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, dimension)).astype("<f4")
    with closing(Client(peer.port)) as client:
        client.call(b"VNEW", INDEX, b"%d" % dimension)
        step = table.steps(peer, client)
        pairs = enumerate(vectors)
        send(client, (pack(b"VADD", INDEX, b"member:%012d" % row, vector.tobytes()) for row, vector in pairs))
        wait_for_graphs(peer)
        step(f"{rows:,} vectors of {dimension} dimensions, {where}")
        send(client, (pack(b"VSEARCH", INDEX, vector.tobytes(), b"10") for vector in vectors[:_QUERIES]))
        step("the same, searched")


def main() -> int:
    parser = argparse.ArgumentParser(description="what maxmemory counts beside what the process takes")
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--engram", default=ENGRAM, help="command that runs engram")
    arguments = parser.parse_args()
    table = Table()

    @contextmanager
    def server(flags: str = "") -> Iterator[Peer]:
        port = free_port()
        limits = "--maxmemory 100gb --max-unindexed-rows 1000000"
        with running("engram", f"{arguments.engram} --port {port} {limits} {flags}", port) as peer:
            yield peer

    with server() as peer:
        measure_strings(peer, table, arguments.keys)
    with server() as peer:
        measure_expiries(peer, table, arguments.keys)
    with server("--seal-rows 16000000") as peer:
        measure_vectors(peer, table, arguments.rows, arguments.dimension, "no graph")
    with server() as peer:
        measure_vectors(peer, table, arguments.rows, arguments.dimension, "with their graphs")
    header = ["step", "counted MiB", "RssAnon MiB", "RssFile MiB"]
    print(f"{markdown_table(header, table.lines)}\n\n{describe_machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
