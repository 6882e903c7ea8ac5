"""Memory of an engram and its children while a million rows are added, built, saved and searched.

python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import attrs

from benchmarks.command_line import K, make_parser, run, running_engram
from benchmarks.dialects import Engram
from benchmarks.embeddings import DataSet, make_data
from benchmarks.load import Client
from benchmarks.measures import Loading, add_rows, search_load, search_requests, wait_for_graphs
from benchmarks.peers import Peer, family, markdown_table

_INTERVAL = 0.1

# What a child does, by a word of its command line.
_CHILDREN = {"engram.index.build_process": "builder", "engram.snapshotter": "snapshot"}


@attrs.frozen
class Sample:
    """Memory at one moment, in bytes. `mapped` counts a page once for each process that has mapped it."""

    seconds: float
    phase: str
    children: tuple[str, ...]
    server: int
    others: int
    mapped: int

    @property
    def anonymous(self) -> int:
        return self.server + self.others


class Watcher:
    """Samples RssAnon and RssFile of a server and all its children, ten times a second.

    `phase` names what is going on; whoever drives the server changes it.
    """

    def __init__(self, peer: Peer) -> None:
        self.phase = "loading"
        self.samples: list[Sample] = []
        self._peer = peer
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._kinds: dict[int, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        phase = self.phase
        pids = family(self._peer.pid)
        memory = [_resident(pid) for pid in pids]
        return Sample(
            time.monotonic() - self._began,
            phase,
            tuple(sorted({kind for pid in pids[1:] if (kind := self._kind(pid))})),
            server=memory[0][0],
            others=sum(anonymous for anonymous, _ in memory[1:]),
            mapped=sum(mapped for _, mapped in memory),
        )

    def _kind(self, pid: int) -> str:
        """What a child does; nothing yet between its birth and the start of its program."""
        if pid not in self._kinds:
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                return ""
            kind = next((kind for word, kind in _CHILDREN.items() if word in words), "")
            if not kind:
                return ""
            self._kinds[pid] = kind
        return self._kinds[pid]

    def peak(self) -> Sample:
        return max(self.samples, key=lambda sample: sample.anonymous)


def _resident(pid: int) -> tuple[int, int]:
    """RssAnon and RssFile of a process in bytes (proc(5)); nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    anonymous, mapped = (int(sizes.get(name, "0").split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


def render(watcher: Watcher, rows: int) -> str:
    """A row for each phase, with its peak; phases with a child at work are counted there, too."""
    groups: dict[str, list[Sample]] = {}
    for sample in watcher.samples:
        name = " + ".join([sample.phase, *sample.children])
        groups.setdefault(name, []).append(sample)
    lines = [_line(name, samples) for name, samples in groups.items()]
    lines.append(_line("all", watcher.samples))
    peak = watcher.peak()
    where = f"{peak.phase}, children: {', '.join(peak.children) or 'none'}, after {peak.seconds:.0f} s"
    header = ["phase", "seconds", "peak RssAnon MiB", "of it server", "of it children", "peak RssFile MiB"]
    return (
        f"{rows:,} rows; the peak of anonymous memory is {peak.anonymous / 2**30:.2f} GiB ({where})\n\n"
        f"{markdown_table(header, lines)}"
    )


def _line(name: str, samples: Sequence[Sample]) -> list[str]:
    peak = max(samples, key=lambda sample: sample.anonymous)
    sizes = (peak.anonymous, peak.server, peak.others, max(sample.mapped for sample in samples))
    return [name, f"{len(samples) * _INTERVAL:.0f}", *(f"{size / 2**20:,.0f}" for size in sizes)]


def load_and_save(
    peer: Peer, watcher: Watcher, data: DataSet, loading: Loading, arguments: argparse.Namespace
) -> float:
    """Adds the rows, waits for the graphs and takes a snapshot; returns the rate of adding, rows a second."""
    rate = add_rows(peer, loading, arguments.load_cores)
    watcher.phase = "building"
    wait_for_graphs(peer)
    watcher.phase = "saving"
    with closing(Client(peer.port)) as client:
        client.call(b"VSAVE")
    watcher.phase = "searching"
    return rate


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    dialect = Engram(data.rows.dimension)
    with running_engram(arguments, "--appendfsync everysec", folder=folder) as engram:
        watcher = Watcher(engram)
        with watcher.watching():
            load_and_save(engram, watcher, data, Loading(dialect, data.rows), arguments)
            requests = search_requests(dialect, data.queries, K)
            for clients in (1, 32):
                search_load(engram, requests, clients, arguments.seconds, arguments.load_cores)
        return render(watcher, data.rows.rows)


def main() -> int:
    parser = make_parser(
        "memory while rows are added, built, saved and searched", rows=1_000_000, cores="half"
    )
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
