"""Whether this checkout of engram is as fast as another one: paired turns, A B B A.

    python -m benchmarks.versions --other ../old

Each checkout's engram runs from its own environment (`.venv/bin/engram`), one in memory and one that syncs
each write, on one core, while the load takes turns on another. One start of a version may differ by more from
the next than from the other version: where things lie in memory is chance, and so are graphs. So both start
anew for each pair, and for searches open copies of a directory that the old one has made. The table has the
median of the ratios, new to old, and its 95 % confidence interval by order statistics. The exit code is 1
unless all these intervals lie above the goal.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import attrs
import numpy as np

from benchmarks.dialects import Engram
from benchmarks.embeddings import DATA, RowFile, key_of, unit
from benchmarks.keyvalue import run_benchmark
from benchmarks.load import Client, LoadError, Measured, Work, exchange, pack, pipeline, run_together
from benchmarks.measures import (
    Loading,
    add_rows,
    rate,
    search_requests,
    wait_for_graphs,
    wait_until_verified,
)
from benchmarks.peers import (
    Peer,
    ServerError,
    describe_machine,
    end_servers_when_terminated,
    free_port,
    markdown_table,
    on_cores,
    running,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIDENCE = 0.95

K = 10
QUERIES = 1000
LOADERS = 2
# Rows that a turn adds to each of its indices: below `seal-rows`, so that no graph is built meanwhile.
ROWS_A_LOADER = 8000
PIPELINE = 100
TRANSACTION = 100
# redis-benchmark draws keys from so many: nearly each one is new.
NEW_KEYS = 1_000_000_000

_CALIBRATION_REQUESTS = 10_000
_DIMENSION = 384


NAMES = "old", "new"


@attrs.frozen
class Version:
    """The servers of one checkout: `memory` keeps nothing, `disk` syncs each write, `graphs` is searched."""

    name: str
    memory: Peer
    disk: Peer
    graphs: Peer | None = None


@attrs.frozen
class Turn:
    """`rate` is a second, `cpu` the seconds of the server's time that each of them took."""

    rate: float
    cpu: float


Measure = Callable[[Version], Turn]


@attrs.frozen
class Strings:
    """What redis-benchmark does: a test of it, so many requests in flight for each client, and among how many
    keys; 0 is one key."""

    test: str
    depth: int = 1
    keys: int = 0
    durable: bool = False


@attrs.frozen
class Loads:
    """What makes the load: the cores it runs on, the seconds of a turn, the rows and the queries."""

    cores: Sequence[int]
    seconds: float
    rows: RowFile
    requests: list[bytes]

    def strings(self, kind: Strings, requests: int, version: Version) -> Turn:
        peer = version.disk if kind.durable else version.memory
        run = run_benchmark(peer, kind.test, kind.depth, requests, kind.keys, self.cores)
        return Turn(run.rate, run.server_cpu / 1e6)

    def calibrated(self, kind: Strings, version: Version) -> Measure:
        """With as many requests as take a turn's seconds."""
        first = self.strings(kind, _CALIBRATION_REQUESTS * kind.depth, version)
        return partial(self.strings, kind, max(1000, round(first.rate * self.seconds)))

    def together(self, peer: Peer, works: Sequence[Work]) -> Turn:
        before = peer.cpu_seconds()
        with on_cores(self.cores):
            measured = run_together(works)
        return Turn(rate(measured), (peer.cpu_seconds() - before) / sum(one.replies for one in measured))

    def search(self, clients: int, version: Version) -> Turn:
        peer = version.graphs
        assert peer is not None
        return self.together(peer, [partial(exchange, peer.port, self.requests, clients, self.seconds)])

    def add(self, durable: bool, version: Version) -> Turn:
        peer = version.disk if durable else version.memory
        indices = [b"turn:%d" % number for number in range(LOADERS)]
        with closing(Client(peer.port)) as client:
            for index in indices:
                client.call(b"DEL", index)
                client.call(b"VNEW", index, b"%d" % self.rows.dimension)
        return self.together(peer, [partial(add_to_index, peer.port, self.rows, index) for index in indices])

    def transactions(self, version: Version) -> Turn:
        return self.together(version.memory, [partial(transact, version.memory.port, self.seconds)])


def add_to_index(port: int, rows: RowFile, index: bytes, ready: Callable[[], object]) -> Measured:
    vectors = rows.vectors()
    requests = [
        pack(b"VADD", index, key_of(row), vectors[row % rows.rows].tobytes()) for row in range(ROWS_A_LOADER)
    ]
    return pipeline(port, requests, PIPELINE, ready)


def transact(port: int, seconds: float, ready: Callable[[], object]) -> Measured:
    """Transactions of so many writes each, one after the other."""
    requests = [pack(b"SET", b"key:%d" % number, b"value") for number in range(TRANSACTION)]
    data = b"".join([pack(b"MULTI"), *requests, pack(b"EXEC")])
    done = 0
    with closing(Client(port)) as client:
        ready()
        began = now = time.monotonic()
        while now - began < seconds:
            client.send(data)
            client.receive(2 + TRANSACTION)
            done += 1
            now = time.monotonic()
        return Measured(began, now, done)


def make_measures(loads: Loads, version: Version, parts: Sequence[str]) -> dict[str, Measure]:
    """Those whose names contain one of the parts."""
    strings = {"SET, durable, unpipelined": Strings("set", durable=True)}
    for depth, how in ((1, "unpipelined"), (16, "pipelined by 16")):
        for test in ("set", "get", "incr"):
            strings[f"{test.upper()}, {how}"] = Strings(test, depth)
        strings[f"SET of new keys, {how}"] = Strings("set", depth, NEW_KEYS)
    others: dict[str, Measure] = {
        f"EXEC of {TRANSACTION} SET": loads.transactions,
        "VADD, in memory": partial(loads.add, False),
        "VADD, durable": partial(loads.add, True),
        **{f"VSEARCH, {clients} clients": partial(loads.search, clients) for clients in (1, 8, 32)},
    }

    def named(name: str) -> bool:
        return any(part in name for part in parts)

    measures: dict[str, Measure] = {
        name: loads.calibrated(kind, version) for name, kind in strings.items() if named(name)
    }
    return measures | {name: measure for name, measure in others.items() if named(name)}


def take_turns(
    measures: dict[str, Measure],
    versions: Callable[[int], AbstractContextManager[Sequence[Version]]],
    pairs: int,
) -> dict[str, Ratios]:
    """Each pair has a turn of both for each measure; who goes first alternates. A pair that does not count is
    first. `versions` gives old and new for the pair of a number."""
    ratios = {name: Ratios([], []) for name in measures}
    for pair in range(-1, pairs) if measures else ():
        with versions(pair) as (old, new):
            for name, measure in measures.items():
                first, second = (old, new) if pair % 2 == 0 else (new, old)
                turns = {first.name: measure(first), second.name: measure(second)}
                if pair >= 0:
                    ratios[name].rates.append(turns[new.name].rate / turns[old.name].rate)
                    ratios[name].cpus.append(turns[new.name].cpu / turns[old.name].cpu)
        print(f"pair {pair + 1} of {pairs}", file=sys.stderr, flush=True)
    return ratios


@attrs.frozen
class Ratios:
    """New to old, of each pair: of what was done a second, and of the CPU time that each took."""

    rates: list[float]
    cpus: list[float]


@attrs.frozen
class Interval:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def median_interval(values: Sequence[float]) -> Interval:
    """The median, and a confidence interval of it by order statistics, whatever the distribution.

    The k-th least and the k-th greatest of n values, k as great as the confidence allows: the median lies
    below the k-th least when fewer than k values are below it, which has a binomial distribution. With fewer
    than six values there is no such k, and the interval is all numbers.
    """
    ordered, count = sorted(values), len(values)
    ranks = [
        rank
        for rank in range(1, count // 2 + 1)
        if 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count <= 1 - CONFIDENCE
    ]
    if not ranks:
        return Interval(statistics.median(ordered), 0.0, math.inf)
    return Interval(statistics.median(ordered), ordered[ranks[-1] - 1], ordered[-ranks[-1]])


def running_engram(
    name: str, checkout: Path, folder: Path, flags: str, arguments: argparse.Namespace
) -> AbstractContextManager[Peer]:
    # In another folder than this one, from which an old version's children would import the new one.
    program = f"env -C {shlex.quote(str(folder))} {shlex.quote(str(checkout.resolve() / '.venv/bin/engram'))}"
    port = free_port()
    command = f"{program} --port {port} {flags} {arguments.engram_flags}"
    return running(name, command, port, arguments.server_cores)


def build_graphs(checkout: Path, folder: Path, rows: RowFile, arguments: argparse.Namespace) -> Path:
    """A data directory with all rows in one graph."""
    built = folder / "built"
    with running_engram("old", checkout, folder, f"--dir {built}", arguments) as peer:
        add_rows(peer, Loading(Engram(rows.dimension), rows), arguments.load_cores)
        wait_for_graphs(peer, optimize=True)
        with closing(Client(peer.port)) as client:
            client.call(b"VSAVE")
    return built


@contextmanager
def started(
    checkouts: Sequence[Path],
    folder: Path,
    arguments: argparse.Namespace,
    pair: int,
    built: Path | None = None,
) -> Iterator[Sequence[Version]]:
    """The old version and the new, just started for the pair of a number.

    With `built`, a data directory, each also has a server that has opened a copy of that.
    """
    # Nor is it always the same one that starts first.
    turn = 1 if pair % 4 < 2 else -1
    versions: dict[str, Version] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ExitStack() as stack:
        for name, checkout in list(zip(NAMES, checkouts, strict=True))[::turn]:
            own = Path(scratch) / name
            start = partial(running_engram, name, checkout, Path(scratch), arguments=arguments)
            # No snapshot comes between.
            durable = f"--dir {own / 'log'} --appendfsync always --snapshot-log-size 1024gb"
            own.mkdir()
            memory, disk = (stack.enter_context(start(flags=flags)) for flags in ("", durable))
            graphs = None
            if built is not None:
                shutil.copytree(built, own / "graphs")
                graphs = stack.enter_context(start(flags=f"--dir {own / 'graphs'}"))
                wait_until_verified(graphs)
            versions[name] = Version(name, memory, disk, graphs)
        yield [versions[name] for name in NAMES]


def make_rows(arguments: argparse.Namespace, folder: Path) -> tuple[RowFile, np.ndarray]:
    """Rows and queries: the real embeddings where they are, else rows in clusters of clusters."""
    if arguments.data.exists():
        with np.load(arguments.data) as arrays:
            vectors, queries = arrays["vectors"][: arguments.rows], arrays["query_vectors"][:QUERIES]
    else:
        print(f"there are no embeddings at {arguments.data}: made ones instead", file=sys.stderr)
        random = np.random.default_rng(1)
        made = np.zeros((arguments.rows + QUERIES, _DIMENSION))
        for clusters, spread in ((20, 1.0), (400, 0.7), (len(made), 0.5)):
            centres = spread * random.standard_normal((clusters, _DIMENSION))
            made += centres[random.permutation(np.arange(len(made)) % clusters)]
        vectors, queries = made[: arguments.rows], made[arguments.rows :]
    file = RowFile(folder / "rows.f32", len(vectors), vectors.shape[1])
    file.path.write_bytes(unit(vectors).astype("<f4").tobytes())
    return file, unit(queries).astype("<f4")


def render(ratios: dict[str, Ratios], goal: float) -> tuple[str, bool]:
    """The table, and whether all intervals lie above the goal."""
    rows, hold = [], True
    for name, ratio in ratios.items():
        rates, cpus = median_interval(ratio.rates), median_interval(ratio.cpus)
        above = rates.low > goal
        rows.append([name, str(rates), "yes" if above else "NO", str(cpus)])
        hold &= above
    header = ["median of the ratios new / old", "requests/s", f"above {goal}", "CPU time a request"]
    return markdown_table(header, rows), hold


def parse_arguments() -> argparse.Namespace:
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description="paired turns of two checkouts of engram",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--other", type=Path, required=True, help="the old checkout, with its .venv")
    parser.add_argument("--this", type=Path, default=ROOT, help="the new checkout, with its .venv")
    parser.add_argument("--pairs", type=int, default=20, help="of turns, for each measure")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
    parser.add_argument("--goal", type=float, default=0.97, help="the intervals are to lie above it")
    parser.add_argument("--only", nargs="+", default=[""], help="measures whose names contain one of these")
    parser.add_argument("--data", type=Path, default=DATA, help="the embeddings; made ones when not there")
    parser.add_argument("--rows", type=int, default=20_000, help="vectors to search among")
    parser.add_argument("--engram-flags", default="", help="settings of both, as on the command line")
    parser.add_argument("--server-cores", type=int, nargs="+", default=cores[:1], help="of the servers")
    parser.add_argument("--load-cores", type=int, nargs="+", default=cores[1:2] or cores, help="of the load")
    parser.add_argument("--scratch", type=Path, help="folder for data; the temporary one when not given")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    end_servers_when_terminated()
    with tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as name:
        folder = Path(name)
        machine = describe_machine(folder)
        rows, queries = make_rows(arguments, folder)
        requests = search_requests(Engram(rows.dimension), queries, K)
        loads = Loads(arguments.load_cores, arguments.seconds, rows, requests)
        try:
            checkouts = (arguments.other, arguments.this)
            with started(checkouts, folder, arguments, 0) as (old, _):
                measures = make_measures(loads, old, arguments.only)
            searches = {name: measures.pop(name) for name in list(measures) if name.startswith("VSEARCH")}
            start = partial(started, checkouts, folder, arguments)
            ratios = take_turns(measures, start, arguments.pairs)
            if searches:
                # Not before: that the system writes so much would be felt by the others.
                built = build_graphs(arguments.other, folder, rows, arguments)
                ratios |= take_turns(searches, partial(start, built=built), arguments.pairs)
        except (LoadError, ServerError, OSError, subprocess.TimeoutExpired) as error:
            print(f"the measurement failed: {error}", file=sys.stderr)
            return 2
    text, hold = render(ratios, arguments.goal)
    print(f"{text}\n\n{arguments.pairs} pairs; {arguments.other} (old), {arguments.this} (new); {machine}")
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
