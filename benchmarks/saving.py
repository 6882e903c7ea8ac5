"""What a snapshot costs other clients: PING under a write load, without VSAVE and during it.

    python -m benchmarks.saving

Clients write at a fixed rate, another sends PINGs at a fixed rate. Phases without snapshots and phases with
one after the other take turns. The same for Redis 8 and its BGSAVE.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path

import attrs
import numpy as np

from benchmarks.command_line import add_redis_options, make_parser, run, running_engram, running_redis
from benchmarks.dialects import Dialect, Engram, Redis
from benchmarks.embeddings import RowFile, key_of, make_data
from benchmarks.load import Client, LoadError, Measured, Work, pack, run_together
from benchmarks.measures import (
    Loading,
    add_rows,
    add_strings,
    key_of_string,
    rate,
    save,
    value_of_string,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table, on_cores, render_number

PERCENTILES = (50.0, 99.0, 99.9)

_POLL_SECONDS = 0.02

Save = Callable[[Client], None]


def save_redis(client: Client) -> None:
    """Raises LoadError when the snapshot failed."""
    client.call(b"BGSAVE")
    while True:
        section = client.call(b"INFO", b"persistence")
        if b"rdb_bgsave_in_progress:0" in section:
            break
        time.sleep(_POLL_SECONDS)
    if b"rdb_last_bgsave_status:ok" not in section:
        raise LoadError("BGSAVE failed")


@attrs.frozen
class Writing:
    """A load of writes: `rate` batches a second, in turn by so many clients, each of `sets` SETs to strings
    that are there and of one new vector."""

    dialect: Dialect
    rows: RowFile
    strings: int
    size: int
    clients: int
    sets: int
    rate: float

    def batch(self, number: int) -> tuple[bytes, int]:
        """The requests of a batch, joined, and how many they are; of other keys for another number."""
        choose = random.Random(number)
        numbers = [choose.randrange(self.strings) for _ in range(self.sets)]
        sets = [pack(b"SET", key_of_string(one), value_of_string(one, self.size)) for one in numbers]
        row = self.rows.rows + number
        vector = self.rows.vectors()[row % self.rows.rows].tobytes()
        data, replies = self.dialect.add([(key_of(row), vector, None)])
        return b"".join((*sets, data)), len(sets) + replies


def write(
    port: int, writing: Writing, first: int, seconds: float, core: int, ready: Callable[[], object]
) -> Measured:
    """Sends batches from number `first` on; late ones are made up for: all phases get the same load."""
    os.sched_setaffinity(0, [core])
    connections = [Client(port) for _ in range(writing.clients)]
    outstanding = [0] * writing.clients
    ready()
    began = planned = time.monotonic()
    written = 0
    number = first
    for turn in cycle(range(writing.clients)):
        if planned - began > seconds:
            break
        connections[turn].receive(outstanding[turn])
        written += outstanding[turn]
        data, outstanding[turn] = writing.batch(number)
        time.sleep(max(0.0, planned - time.monotonic()))
        connections[turn].send(data)
        number += 1
        planned += 1 / writing.rate
    for connection, replies in zip(connections, outstanding, strict=True):
        connection.receive(replies)
        written += replies
        connection.close()
    return Measured(began, time.monotonic(), written)


def ping(port: int, interval: float, seconds: float, core: int, ready: Callable[[], object]) -> Measured:
    """A PING every `interval` seconds. One that is sent late because the last was answered late counts from
    when it was due, so that a pause of the server shows in all the PINGs that it would have held up."""
    os.sched_setaffinity(0, [core])
    request = pack(b"PING")
    latencies = []
    with closing(Client(port)) as client:
        ready()
        began = planned = answered = time.monotonic()
        while planned - began < seconds:
            due = planned
            if answered < planned:
                time.sleep(planned - answered)
                due = time.monotonic()
            client.send(request)
            client.receive(1)
            answered = time.monotonic()
            latencies.append(answered - due)
            planned += interval
        return Measured(began, answered, len(latencies), latencies)


def save_repeatedly(
    port: int, make: Save, core: int, ready: Callable[[], object], finished: Callable[[], bool]
) -> Measured:
    """A companion that makes one snapshot after the other; `latencies` say what each took."""
    os.sched_setaffinity(0, [core])
    latencies = []
    with closing(Client(port)) as client:
        ready()
        began = now = time.monotonic()
        while not finished():
            make(client)
            now, sent = time.monotonic(), now
            latencies.append(now - sent)
        return Measured(began, now, len(latencies), latencies)


@attrs.define
class Phase:
    """Latencies of PINGs, those of a round in a list, what snapshots took, and the rates of writing in each
    round; in seconds, and a second."""

    pings: list[list[float]] = attrs.Factory(list)
    saves: list[float] = attrs.Factory(list)
    rates: list[float] = attrs.Factory(list)

    def latencies(self) -> list[float]:
        """The medians of the rounds' percentiles, and the longest of all, in milliseconds."""
        medians = np.median([np.percentile(pings, PERCENTILES) for pings in self.pings], axis=0)
        return [float(seconds) * 1000 for seconds in (*medians, max(map(max, self.pings)))]


def measure_phases(
    peer: Peer, writing: Writing, make: Save, arguments: argparse.Namespace
) -> tuple[Phase, Phase]:
    """All rounds, without snapshots and with them."""
    without, during = Phase(), Phase()
    writers_core, ping_core = arguments.load_cores[0], arguments.load_cores[-1]
    first = 0
    for _ in range(arguments.rounds):
        for phase in (without, during):
            works: list[Work] = [
                partial(ping, peer.port, arguments.interval / 1000, arguments.seconds, ping_core),
                partial(write, peer.port, writing, first, arguments.seconds, writers_core),
            ]
            saver = partial(save_repeatedly, peer.port, make, writers_core)
            companions = [saver] if phase is during else []
            with on_cores(arguments.load_cores):
                pings, writes, *savers = run_together(works, companions)
            phase.pings.append(pings.latencies)
            phase.rates.append(rate([writes]))
            phase.saves += [seconds for saves in savers for seconds in saves.latencies]
            first += round(arguments.seconds * writing.rate) + 1
    return without, during


def fill(peer: Peer, writing: Writing, arguments: argparse.Namespace) -> None:
    add_rows(peer, Loading(writing.dialect, writing.rows), arguments.load_cores)
    add_strings(peer, writing.strings, writing.size, arguments.load_cores)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    rows = make_data(arguments, folder).rows
    words = (arguments.strings, arguments.size, arguments.clients, arguments.sets, arguments.batches)
    writing = Writing(Engram(rows.dimension), rows, *words)
    # No snapshots but those that are asked for.
    flags = f"--appendfsync {arguments.appendfsync}", "--snapshot-log-size 1024gb"
    with running_engram(arguments, *flags, folder=folder) as peer:
        fill(peer, writing, arguments)
        wait_for_graphs(peer)
        ours = measure_phases(peer, writing, save, arguments)
    writing = attrs.evolve(writing, dialect=Redis())
    with running_redis(arguments, folder) as peer:
        fill(peer, writing, arguments)
        theirs = measure_phases(peer, writing, save_redis, arguments)
    return render(ours, theirs, writing, arguments.appendfsync)


def render(ours: Sequence[Phase], theirs: Sequence[Phase], writing: Writing, appendfsync: str) -> str:
    columns = [_latency_cells(phases) for phases in (ours, theirs)]
    names = [*(f"PING p{percentile:g} ms" for percentile in PERCENTILES), "PING longest ms"]
    lines = [
        [name, *our_cells, *their_cells] for name, our_cells, their_cells in zip(names, *columns, strict=True)
    ]
    for name, figures in (("PINGs", _pings), ("writes/s", _writes), ("snapshots", _saves)):
        lines.append([name, *figures(ours), "", *figures(theirs), ""])
    lines.append(["seconds a snapshot", *_save_seconds(ours), "", *_save_seconds(theirs), ""])
    header = ["", "engram", "during VSAVE", "x", "Redis 8", "during BGSAVE", "x"]
    return (
        f"{writing.rows.rows:,} vectors and {writing.strings:,} strings of {writing.size} bytes; "
        f"{writing.clients} clients write {writing.sets} strings and a vector {writing.rate:g} times "
        f"a second. engram with appendfsync {appendfsync}; Redis 8 keeps no log.\n\n"
        f"{markdown_table(header, lines)}"
    )


def _latency_cells(phases: Sequence[Phase]) -> list[list[str]]:
    without, during = (phase.latencies() for phase in phases)
    return [
        [render_number(before), render_number(after), f"{after / before:.2f}"]
        for before, after in zip(without, during, strict=True)
    ]


def _pings(phases: Sequence[Phase]) -> list[str]:
    return [f"{sum(map(len, phase.pings)):,}" for phase in phases]


def _writes(phases: Sequence[Phase]) -> list[str]:
    return [render_number(float(np.median(phase.rates))) for phase in phases]


def _saves(phases: Sequence[Phase]) -> list[str]:
    return [str(len(phase.saves)) for phase in phases]


def _save_seconds(phases: Sequence[Phase]) -> list[str]:
    return [f"{np.median(phase.saves):.2f}" if phase.saves else "" for phase in phases]


def main() -> int:
    parser = make_parser("what a snapshot costs other clients", rows=20_000, seconds=12.0, cores="half")
    add_redis_options(parser)
    parser.add_argument("--strings", type=int, default=2_000_000, help="strings to add")
    parser.add_argument("--size", type=int, default=100, help="bytes of a string")
    parser.add_argument("--clients", type=int, default=4, help="clients that write")
    parser.add_argument("--batches", type=float, default=100.0, help="of writes, a second, by all of them")
    parser.add_argument("--sets", type=int, default=50, help="SETs of a batch, beside one VADD")
    parser.add_argument(
        "--appendfsync", choices=("always", "everysec", "no"), default="always", help="of engram"
    )
    parser.add_argument("--interval", type=float, default=0.5, help="milliseconds from PING to PING")
    parser.add_argument("--rounds", type=int, default=5, help="of both phases; the table shows medians")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
