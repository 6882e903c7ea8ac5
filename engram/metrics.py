"""What Prometheus scrapes: https://prometheus.io/docs/instrumenting/exposition_formats/.

The format is the official client library's. The figures are read on the loop, which takes a millisecond or
two, and made into text in a thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

import h11
import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from engram import __version__
from engram.commands.information import resident_memory
from engram.commands.session import Server
from engram.errors import OperatorError
from engram.statistics import Usage
from engram.supervision import keep_running, run_contained

logger = logging.getLogger(__name__)

# Upper bounds of histograms, in nanoseconds: from 1 us to 17 s, a factor of four apart.
_BOUNDS = tuple(1 << exponent for exponent in range(10, 36, 2))

# What a client may send and how long it may take, in bytes and seconds, and how many may at once.
_LONGEST_REQUEST = 8 << 10
_PATIENCE = 10
_MOST_CLIENTS = 16
_READ_SIZE = 4 << 10


Scrape = Callable[[], Awaitable[bytes]]


class _Snapshot(Collector):
    """Families of figures that were read already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def read(server: Server) -> list[Metric]:
    """All figures of a server as they are now, by families."""
    return [*_commands(server), *_traffic(server), *_state(server), *_log(server), *_vectors(server)]


def render(families: list[Metric]) -> bytes:
    """The text that a scrape is answered with, those of the process included. Reads /proc."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(families))
    ProcessCollector(registry=registry)
    text: bytes = generate_latest(registry)
    return text


def _counter(name: str, summary: str, value: float) -> Metric:
    return CounterMetricFamily(f"engram_{name}", summary, value=value)


def _gauge(name: str, summary: str, value: float) -> Metric:
    return GaugeMetricFamily(f"engram_{name}", summary, value=value)


def _add(family: HistogramMetricFamily, labels: list[str], usage: Usage) -> None:
    buckets = [(str(bound / 1e9), float(calls)) for bound, calls in usage.cumulative(_BOUNDS)]
    family.add_metric(labels, [*buckets, ("+Inf", usage.calls)], usage.nanoseconds / 1e9)


def _histogram(name: str, summary: str, usage: Usage) -> Metric:
    family = HistogramMetricFamily(f"engram_{name}_seconds", summary)
    _add(family, [], usage)
    return family


def _commands(server: Server) -> Iterator[Metric]:
    statistics = server.statistics
    durations = HistogramMetricFamily(
        "engram_command_duration_seconds", "Time in the server that calls took.", labels=["command"]
    )
    failed = CounterMetricFamily("engram_command_failures", "Calls that failed.", labels=["command"])
    rejected = CounterMetricFamily(
        "engram_command_rejections", "Calls refused before they were carried out.", labels=["command"]
    )
    for name, usage in sorted(statistics.usage.items()):
        if usage.calls:
            _add(durations, [name], usage)
        if usage.failed:
            failed.add_metric([name], usage.failed)
        if usage.rejected:
            rejected.add_metric([name], usage.rejected)
    errors = CounterMetricFamily("engram_errors", "Errors answered, by their first word.", labels=["error"])
    for word, count in sorted(statistics.errors.items()):
        errors.add_metric([word], count)
    yield from (durations, failed, rejected, errors)
    yield _counter("commands_processed", "Commands processed.", statistics.commands_processed)
    yield _gauge("slowlog_entries", "Calls in SLOWLOG.", len(server.slowlog))


def _traffic(server: Server) -> Iterator[Metric]:
    statistics = server.statistics
    sessions = server.sessions.values()
    yield _gauge("clients", "Clients that are connected.", len(sessions))
    yield _gauge("clients_most", "Clients that may be connected.", server.config.maxclients)
    yield _gauge("clients_monitoring", "Clients that gave MONITOR.", len(server.monitors))
    yield _gauge(
        "client_buffer_bytes",
        "Requests and replies held for clients.",
        sum(sum(session.buffered()) for session in sessions),
    )
    yield _counter("connections", "Connections accepted.", statistics.connections_received)
    yield _counter("connections_rejected", "Connections refused.", statistics.connections_rejected)
    yield _counter("received_bytes", "Bytes received from clients.", statistics.net_input_bytes)
    yield _counter("sent_bytes", "Bytes sent to clients.", statistics.net_output_bytes)


def _state(server: Server) -> Iterator[Metric]:
    build = GaugeMetricFamily("engram_build_info", "The version, as a label.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build
    keyspaces = server.database.engine.keyspaces.values()
    hits, misses = server.statistics.lookups()
    yield _gauge("start_time_seconds", "When the server started, since the epoch.", server.started)
    yield _gauge("keys", "Keys.", sum(map(len, keyspaces)))
    yield _gauge("keys_expiring", "Keys that will lapse.", sum(len(each.expiries) for each in keyspaces))
    yield _counter("keys_expired", "Keys that have lapsed.", server.database.expired_keys)
    yield _counter("keys_evicted", "Keys that gave way to the limit of memory.", server.memory.evicted_keys)
    yield _counter("keyspace_hits", "Keys looked up and found.", hits)
    yield _counter("keyspace_misses", "Keys looked up and not found.", misses)
    yield _gauge("memory_used_bytes", "What the data takes, as maxmemory counts.", server.memory.used())
    yield _gauge("memory_resident_bytes", "Memory of the process, mapped files included.", resident_memory())
    yield _gauge("memory_limit_bytes", "The setting maxmemory; 0: no limit.", server.config.maxmemory)


def _log(server: Server) -> Iterator[Metric]:
    if server.storage is None:
        return
    status = server.storage.status
    yield _histogram("log_sync", "Time that syncs of the log took.", server.statistics.syncs)
    yield _counter("log_batches", "Batches written to the log.", status.batches)
    yield _gauge("log_bytes", "Log since the last snapshot.", status.log_bytes)
    yield _gauge("log_queued_bytes", "Writes that wait for the log.", status.queued_bytes)
    yield _gauge("log_appended_lsn", "Last change made.", status.appended_lsn)
    yield _gauge("log_durable_lsn", "Last change that is synced.", status.durable_lsn)
    yield _gauge("log_full", "Whether no space can be allocated.", bool(status.allocation_error))
    yield _gauge("snapshot_running", "Whether a snapshot is being made.", status.snapshot_running)
    yield _gauge("snapshot_ok", "Whether the last snapshot succeeded.", status.last_save_ok)
    yield _gauge("snapshot_time_seconds", "When that was, since the epoch.", status.last_save_time)
    yield _gauge("snapshot_duration_seconds", "How long it took.", max(0.0, status.last_save_seconds))


def _vectors(server: Server) -> Iterator[Metric]:
    engine, searches, builder = server.database.engine, server.searches, server.builder
    totals = engine.totals()
    yield _gauge("indices", "Vector indices.", len(engine.indices))
    yield _gauge("vectors", "Vectors in all indices.", totals.rows)
    yield _gauge("vectors_unindexed", "Vectors without a graph.", totals.unindexed)
    yield _gauge("segments", "Segments of all indices.", totals.segments)
    yield _gauge("segments_damaged", "Segments found to be damaged.", len(server.verification.damaged))
    yield _histogram("search_duration", "From a request to its results.", server.statistics.searches)
    yield _counter("searches", "Queries searched for.", searches.searches)
    yield _counter("search_batches", "Batches of queries that ran together.", searches.batches)
    yield _gauge("searches_waiting", "Queries that wait for a thread.", searches.waiting)
    yield _counter("searches_refused", "Queries that waited for too long.", searches.refused)
    yield _histogram("build_duration", "Time that graphs took to build.", server.statistics.builds)
    yield _counter("build_failures", "Graphs that could not be built.", builder.failures)
    yield _gauge("builds_running", "Graphs being built.", builder.running)
    yield _gauge("builds_waiting", "Indices that wait for a graph.", builder.waiting)


async def serve(server: Server, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    """Answers scrapes at the address that the settings say; reports the port once it listens.

    Raises:
        OperatorError: the address cannot be used.
    """
    config = server.config
    listen = partial(trio.open_tcp_listeners, config.metrics_port, host=config.metrics_bind)
    try:
        listeners = await listen()
    except OSError as error:
        where = f"{config.metrics_bind} port {config.metrics_port}"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OperatorError(f"cannot listen on {where} for metrics: {reason}") from error
    admit = partial(_admit, limiter=trio.CapacityLimiter(_MOST_CLIENTS), scrape=partial(_scrape, server))
    task_status.started(listeners[0].socket.getsockname()[1])

    async def serve_clients() -> None:
        nonlocal listeners
        # Those of before are closed when accepting from them has failed.
        listeners = listeners or await listen()
        served, listeners = listeners, []
        await trio.serve_listeners(admit, served)

    await keep_running("the metrics endpoint", serve_clients)


async def _scrape(server: Server) -> bytes:
    return await trio.to_thread.run_sync(render, read(server))


async def _admit(stream: trio.SocketStream, limiter: trio.CapacityLimiter, scrape: Scrape) -> None:
    async def attend() -> None:
        async with stream:
            if limiter.available_tokens:
                async with limiter:
                    await answer(stream, scrape)

    # An observer must not end what it observes.
    await run_contained("a request for metrics", attend)


async def answer(stream: trio.abc.Stream, scrape: Scrape) -> None:
    """Answers one request, then leaves; whoever is slow or wrong learns nothing."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_LONGEST_REQUEST)
    with (
        trio.move_on_after(_PATIENCE),
        suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError),
    ):
        request = await _receive(connection, stream)
        if request is None:
            return
        path = request.target.partition(b"?")[0]
        if request.method not in (b"GET", b"HEAD"):
            status, body = 405, b"only GET\n"
        elif path != b"/metrics":
            status, body = 404, b"see /metrics\n"
        else:
            status, body = 200, await scrape()
        content_type = CONTENT_TYPE_PLAIN_0_0_4 if status == 200 else "text/plain; charset=utf-8"
        headers = [
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        reply = connection.send(h11.Response(status_code=status, headers=headers)) or b""
        if request.method != b"HEAD":
            reply += connection.send(h11.Data(data=body)) or b""
        await stream.send_all(reply)


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> h11.Request | None:
    """The head of a request, None when the client leaves before it is whole."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(bytes(await stream.receive_some(_READ_SIZE)))
