"""What is done to a server and measured: rows added, graphs awaited, recall, searches under load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from ctypes import Array, c_int64
from functools import partial
from typing import Any

import attrs
import numpy as np

from benchmarks.dialects import INDEX, Dialect
from benchmarks.embeddings import Attributes, Floats, RowFile, Truth, key_of
from benchmarks.load import Client, LoadError, Measured, Work, exchange, pack, run_together
from benchmarks.peers import Peer, on_cores

LOADERS = 2
PIPELINE = 100
BUILD_SECONDS = 1800.0

# What EF is chosen from: each step is an eighth to a fifth.
EXPANSIONS = tuple(
    dict.fromkeys(round(base * 2**power) for power in range(8) for base in (10, 11.5, 13, 14.5, 16, 18))
)

_POLL_SECONDS = 0.1
_PROBE_SECONDS = 0.05
_RECALL_PIPELINE = 50

Newest = Array[c_int64]


@attrs.frozen
class Loading:
    """Which rows are added, and how: by so many clients, each with `depth` rows in flight.

    With `seconds` it ends then, whatever is left.
    """

    dialect: Dialect
    rows: RowFile
    attributes: Attributes | None = None
    clients: int = LOADERS
    depth: int = PIPELINE
    seconds: float | None = None

    def works(self, port: int, newest: Newest | None = None) -> list[Work]:
        """What the clients do; each notes the last row acknowledged in its place of `newest`."""
        return [partial(_add_rows, port, self, number, newest) for number in range(self.clients)]


def _add_rows(
    port: int, loading: Loading, number: int, newest: Newest | None, ready: Callable[[], object]
) -> Measured:
    rows, attributes, depth = loading.rows, loading.attributes, loading.depth
    vectors = rows.vectors()
    moments: list[float] = []
    added = 0
    with closing(Client(port)) as client:
        ready()
        began = now = time.monotonic()
        for start in range(number * depth, rows.rows, loading.clients * depth):
            if loading.seconds is not None and now - began > loading.seconds:
                break
            stop = min(start + depth, rows.rows)
            data, replies = loading.dialect.add(
                [
                    (key_of(row), vectors[row].tobytes(), attributes.json_of(row) if attributes else None)
                    for row in range(start, stop)
                ]
            )
            client.send(data)
            client.receive(replies)
            if newest is not None:
                newest[number] = stop - 1
            now = time.monotonic()
            moments.append(now)
            added += stop - start
        return Measured(began, now, added, moments=moments)


def prepare(peer: Peer, dialect: Dialect) -> None:
    """Does what comes before the first row."""
    with closing(Client(peer.port)) as client:
        for request in dialect.prepare():
            client.send(request)
            client.receive(1)


def add_rows(peer: Peer, loading: Loading, cores: Sequence[int], limit: float = BUILD_SECONDS) -> float:
    """Makes the index and adds the rows from processes on these cores; returns the rate, rows a second.

    Raises:
        LoadError: it took more than `limit` seconds, or failed.
    """
    prepare(peer, loading.dialect)
    with on_cores(cores):
        return rate(run_together(loading.works(peer.port), limit=limit))


def key_of_string(number: int) -> bytes:
    """20 bytes."""
    return b"string:%013d" % number


def value_of_string(number: int, size: int) -> bytes:
    return b"%0*d" % (size, number)


def add_strings(
    peer: Peer, count: int, size: int, cores: Sequence[int], limit: float = BUILD_SECONDS
) -> float:
    """Sets so many strings of `size` bytes from processes on these cores; returns the rate a second."""
    works = [partial(_add_strings, peer.port, number, count, size) for number in range(LOADERS)]
    with on_cores(cores):
        return rate(run_together(works, limit=limit))


def _add_strings(port: int, number: int, count: int, size: int, ready: Callable[[], object]) -> Measured:
    added = 0
    with closing(Client(port)) as client:
        ready()
        began = time.monotonic()
        for start in range(number * PIPELINE, count, LOADERS * PIPELINE):
            strings = range(start, min(start + PIPELINE, count))
            requests = [
                pack(b"SET", key_of_string(string), value_of_string(string, size)) for string in strings
            ]
            client.send(b"".join(requests))
            client.receive(len(requests))
            added += len(requests)
        return Measured(began, time.monotonic(), added)


def rate(measured: Iterable[Measured]) -> float:
    """What processes that ran side by side did a second."""
    runs = list(measured)
    seconds = max(run.ended for run in runs) - min(run.began for run in runs)
    return sum(run.replies for run in runs) / seconds


def probe_newest(
    port: int,
    dialect: Dialect,
    rows: RowFile,
    k: int,
    newest: Newest,
    ready: Callable[[], object],
    finished: Callable[[], bool],
) -> Measured:
    """A companion that searches, time and again, for the row that was acknowledged last.

    Raises:
        LoadError: a search did not find it.
    """
    vectors = rows.vectors()
    probes = 0
    with closing(Client(port)) as client:
        ready()
        began = time.monotonic()
        while not finished():
            row = max(newest)
            if row >= 0:
                client.send(dialect.search(vectors[row].tobytes(), k))
                reply = client.receive(1)[0]
                # Beyond k rows with the same vector, others may be found in its place.
                if key_of(row) not in reply[::2] and float(reply[-1]) > 1e-6:
                    raise LoadError(f"a search did not find {key_of(row)!r}, acknowledged before it was sent")
                probes += 1
            time.sleep(_PROBE_SECONDS)
        return Measured(began, time.monotonic(), probes)


def search_meanwhile(
    port: int, requests: Sequence[bytes], ready: Callable[[], object], finished: Callable[[], bool]
) -> Measured:
    """A companion: one client that searches, each request when the last is answered."""
    latencies: list[float] = []
    moments: list[float] = []
    with closing(Client(port)) as client:
        ready()
        began = now = time.monotonic()
        while not finished():
            client.send(requests[len(moments) % len(requests)])
            client.receive(1)
            sent, now = now, time.monotonic()
            latencies.append(now - sent)
            moments.append(now)
        return Measured(began, now, len(latencies), latencies, moments)


@attrs.frozen
class SearchLoad:
    """Searches under load: `rate` a second, `p50` and `p99` in milliseconds, `cpu` of the server in
    microseconds a search."""

    rate: float
    p50: float
    p99: float
    cpu: float


def search_load(
    peer: Peer, requests: Sequence[bytes], clients: int, seconds: float, cores: Sequence[int]
) -> SearchLoad:
    """Clients on these cores that each search again when they are answered, for a time."""
    cpu = peer.cpu_seconds()
    with on_cores(cores):
        measured = run_together([partial(exchange, peer.port, requests, clients, seconds)])
    used = peer.cpu_seconds() - cpu
    p50, p99 = percentiles(measured[0].latencies)
    return SearchLoad(rate(measured), p50, p99, used / measured[0].replies * 1e6)


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th, of seconds in milliseconds; not a number for none."""
    if not latencies:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(latencies, (50, 99)) * 1000
    return float(p50), float(p99)


def search_requests(
    dialect: Dialect, queries: Floats, k: int, ef: int | None = None, filter_text: str | None = None
) -> list[bytes]:
    return [dialect.search(query.tobytes(), k, ef, filter_text) for query in queries]


def measure_recall(peer: Peer, requests: Sequence[bytes], truth: Truth) -> float:
    """The recall of the searches, which are those of the truth's queries in their order."""
    found: list[list[bytes]] = []
    with closing(Client(peer.port)) as client:
        for start in range(0, len(requests), _RECALL_PIPELINE):
            batch = requests[start : start + _RECALL_PIPELINE]
            client.send(b"".join(batch))
            found += [reply[::2] for reply in client.receive(len(batch))]
    return truth.recall(found)


def least_expansion(recall_at: Callable[[int], float], goal: float) -> tuple[int, float]:
    """The least of `EXPANSIONS` at which the recall reaches the goal, and that recall.

    Raises:
        LoadError: not even the greatest is enough.
    """
    low, high = 0, len(EXPANSIONS) - 1
    reached = recall_at(EXPANSIONS[high])
    if reached < goal:
        raise LoadError(f"recall is {reached:.4f} at EF {EXPANSIONS[high]}, not {goal}")
    while low < high:
        middle = (low + high) // 2
        recall = recall_at(EXPANSIONS[middle])
        if recall >= goal:
            high, reached = middle, recall
        else:
            low = middle + 1
    return EXPANSIONS[high], reached


def vectors_section(client: Client) -> dict[str, str]:
    """INFO vectors of an engram."""
    text: Any = client.call(b"INFO", b"vectors")
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def index_fields(peer: Peer) -> dict[str, str]:
    """VINFO of an engram's index."""
    with closing(Client(peer.port)) as client:
        reply = [item.decode() for item in client.call(b"VINFO", INDEX)]
    return dict(zip(reply[::2], reply[1::2], strict=True))


def wait_for_graphs(peer: Peer, optimize: bool = False) -> float:
    """Waits until no graph is being built or waits to be; returns the seconds that took.

    With `optimize` all rows are then brought into one graph.
    """
    began = time.monotonic()
    with closing(Client(peer.port)) as client:
        _wait_until_none(client, "vectors_builds_running", "vectors_builds_waiting")
        if optimize:
            client.call(b"VOPTIMIZE", INDEX)
    return time.monotonic() - began


def wait_until_verified(peer: Peer) -> None:
    """Waits until an engram that has just started has nothing more to verify."""
    with closing(Client(peer.port)) as client:
        _wait_until_none(client, "vectors_segments_unverified")


def _wait_until_none(client: Client, *names: str) -> None:
    """Waits until these figures of INFO vectors are all 0. Raises LoadError when that takes too long."""
    began = time.monotonic()
    for section in _sections(client, _POLL_SECONDS):
        if not any(int(section[name]) for name in names):
            return
        if time.monotonic() - began > BUILD_SECONDS:
            raise LoadError(f"graphs are not ready: {section}")


def save(client: Client) -> None:
    """VSAVE; when a snapshot is being made already, once that is done."""
    while True:
        try:
            client.call(b"VSAVE")
        except LoadError as error:
            if "already in progress" not in str(error):
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return


def _sections(client: Client, interval: float) -> Iterator[dict[str, str]]:
    while True:
        yield vectors_section(client)
        time.sleep(interval)


def watch_unindexed(
    port: int, limit: int, ready: Callable[[], object], finished: Callable[[], bool]
) -> Measured:
    """A companion that notes the moments at which it saw so many rows, or more, without a graph."""
    moments = []
    looks = 0
    with closing(Client(port)) as client:
        ready()
        began = time.monotonic()
        for section in _sections(client, _POLL_SECONDS):
            if int(section["vectors_rows_unindexed"]) >= limit:
                moments.append(time.monotonic())
            looks += 1
            if finished():
                break
        return Measured(began, time.monotonic(), looks, moments=moments)
