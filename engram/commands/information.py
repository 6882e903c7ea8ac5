"""INFO: https://redis.io/docs/latest/commands/info/."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from operator import attrgetter, methodcaller

from engram import REDIS_VERSION, __version__
from engram.commands.session import Server
from engram.commands.states import Course

Fields = dict[str, object]

_PAGE = resource.getpagesize()
_TOTAL_MEMORY = os.sysconf("SC_PHYS_PAGES") * _PAGE
_PERCENTILES = (50, 99, 99.9)
# Keys whose time to live is averaged for `avg_ttl`.
_SAMPLED_EXPIRIES = 256

# What is asked of each client is asked without a loop in Python, which would take several times as long.
_COURSE = attrgetter("state.course")
_WATCHED_KEYS = attrgetter("watch.keys")
_BUFFERED = methodcaller("buffered")


def resident_memory() -> int:
    """Bytes of this process in memory, files it maps included; 0 when nothing can be opened. Linux only."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


def human(size: float) -> str:
    """A size as Redis writes it for people: 1.50M."""
    for unit in ("B", "K", "M", "G"):
        if size < 1024:
            return f"{size:.0f}B" if unit == "B" else f"{size:.2f}{unit}"
        size /= 1024
    return f"{size:.2f}T"


def _server(server: Server) -> Fields:
    uptime = int(time.time() - server.started)
    return {
        "redis_version": REDIS_VERSION,
        "engram_version": __version__,
        "redis_git_sha1": "00000000",
        "redis_git_dirty": 0,
        "redis_build_id": "0",
        "redis_mode": "standalone",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64 if sys.maxsize > 1 << 32 else 32,
        "monotonic_clock": "POSIX clock_gettime",
        "multiplexing_api": "trio",
        "python_version": platform.python_version(),
        "process_id": os.getpid(),
        "run_id": server.run_id,
        "tcp_port": server.port,
        "server_time_usec": time.time_ns() // 1000,
        "uptime_in_seconds": uptime,
        "uptime_in_days": uptime // 86400,
        "executable": sys.executable,
        "config_file": server.config.file,
    }


def _buffered(server: Server) -> list[tuple[int, int]]:
    """For each client the bytes of requests and of replies that are held for it."""
    return list(map(_BUFFERED, server.sessions.values()))


def _clients(server: Server) -> Fields:
    sessions = server.sessions.values()
    received, sent = zip(*_buffered(server), strict=True) if sessions else ((0,), (0,))
    courses = list(map(_COURSE, sessions))
    watched = list(map(dict.values, map(_WATCHED_KEYS, sessions)))
    return {
        "connected_clients": len(server.sessions),
        "maxclients": server.config.maxclients,
        "client_recent_max_input_buffer": max(received),
        "client_recent_max_output_buffer": max(sent),
        "blocked_clients": courses.count(Course.BLOCKED) + courses.count(Course.PAUSED),
        "tracking_clients": 0,
        "pubsub_clients": 0,
        "watching_clients": sum(map(any, watched)),
        "monitoring_clients": len(server.monitors),
        "total_watched_keys": sum(map(len, chain.from_iterable(watched))),
    }


def _memory(server: Server) -> Fields:
    # What `maxmemory` counts; what the process takes, the interpreter included, is used_memory_rss.
    used = server.memory.used()
    resident = resident_memory()
    peak = max(used, server.statistics.peak_memory)
    buffers = sum(map(sum, _buffered(server)))
    log_buffer = 0 if server.storage is None else server.storage.status.queued_bytes
    maxmemory = server.config.maxmemory
    return {
        "used_memory": used,
        "used_memory_human": human(used),
        "used_memory_rss": resident,
        "used_memory_rss_human": human(resident),
        "used_memory_peak": peak,
        "used_memory_peak_human": human(peak),
        "used_memory_peak_perc": f"{100 * used / max(1, peak):.2f}%",
        "used_memory_dataset": used,
        "used_memory_vectors": server.memory.vectors(),
        "used_memory_rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "total_system_memory": _TOTAL_MEMORY,
        "total_system_memory_human": human(_TOTAL_MEMORY),
        "maxmemory": maxmemory,
        "maxmemory_human": human(maxmemory),
        "maxmemory_policy": server.config.maxmemory_policy,
        "mem_fragmentation_ratio": f"{resident / max(1, used):.2f}",
        "mem_clients_normal": buffers,
        "mem_aof_buffer": log_buffer,
        "mem_allocator": "libc",
        "lazyfree_pending_objects": sum(
            map(len, (*server.database.engine.dropped, *server.database.engine.flushed))
        ),
    }


def _persistence(server: Server) -> Fields:
    storage = server.storage
    fields: Fields = {"loading": 0, "async_loading": 0}
    if storage is None:
        return fields | {
            "rdb_changes_since_last_save": server.database.lsn,
            "rdb_bgsave_in_progress": 0,
            "rdb_last_save_time": int(server.started),
            "rdb_last_bgsave_status": "ok",
            "rdb_last_bgsave_time_sec": -1,
            "rdb_current_bgsave_time_sec": -1,
            "aof_enabled": 0,
            "aof_rewrite_in_progress": 0,
            "aof_rewrite_scheduled": 0,
            "aof_last_write_status": "ok",
        }
    status = storage.status
    running = int(status.snapshot_running)
    return fields | {
        "rdb_changes_since_last_save": status.changes_since_save,
        "rdb_bgsave_in_progress": running,
        "rdb_last_save_time": status.last_save_time or int(server.started),
        "rdb_last_bgsave_status": "ok" if status.last_save_ok else "err",
        "rdb_last_bgsave_time_sec": round(status.last_save_seconds),
        "last_save_error": status.last_save_error,
        "cleanup_error": status.cleanup_error,
        "aof_enabled": 1,
        # A snapshot is what lets the log begin anew: here the one is the other.
        "aof_rewrite_in_progress": running,
        "aof_rewrite_scheduled": 0,
        "aof_last_bgrewrite_status": "ok" if status.last_save_ok else "err",
        "aof_last_write_status": "err" if status.allocation_error else "ok",
        "aof_current_size": status.log_bytes,
        "aof_buffer_length": status.queued_bytes,
        "log_allocation_error": status.allocation_error,
        "log_file": status.log_file,
        "log_appended_lsn": status.appended_lsn,
        "log_durable_lsn": status.durable_lsn,
        "log_batches": status.batches,
        "log_last_fsync_usec": round(status.last_fsync_seconds * 1e6),
    }


def _stats(server: Server) -> Fields:
    statistics, denied = server.statistics, server.access.denied
    hits, misses = statistics.lookups()
    return {
        "total_connections_received": statistics.connections_received,
        "total_commands_processed": statistics.commands_processed,
        "instantaneous_ops_per_sec": round(statistics.commands_rate.per_second),
        "total_net_input_bytes": statistics.net_input_bytes,
        "total_net_output_bytes": statistics.net_output_bytes,
        "instantaneous_input_kbps": f"{statistics.input_rate.per_second / 1024:.2f}",
        "instantaneous_output_kbps": f"{statistics.output_rate.per_second / 1024:.2f}",
        "rejected_connections": statistics.connections_rejected,
        "sync_full": 0,
        "sync_partial_ok": 0,
        "sync_partial_err": 0,
        "expired_keys": server.database.expired_keys,
        "evicted_keys": server.memory.evicted_keys,
        "evicted_clients": 0,
        "keyspace_hits": hits,
        "keyspace_misses": misses,
        "pubsub_channels": 0,
        "pubsub_patterns": 0,
        "latest_fork_usec": 0,
        "tracking_total_keys": 0,
        "unexpected_error_replies": 0,
        "total_error_replies": statistics.error_replies,
        "acl_access_denied_auth": denied["auth"],
        "acl_access_denied_cmd": denied["command"],
        "acl_access_denied_key": denied["key"],
        "acl_access_denied_channel": denied["channel"],
    }


def _replication(server: Server) -> Fields:
    return {
        "role": "master",
        "connected_slaves": 0,
        "master_failover_state": "no-failover",
        "master_replid": server.run_id,
        "master_replid2": "0" * 40,
        "master_repl_offset": 0,
        "second_repl_offset": -1,
        "repl_backlog_active": 0,
    }


def _cpu(server: Server) -> Fields:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    thread = resource.getrusage(resource.RUSAGE_THREAD)
    return {
        "used_cpu_sys": f"{own.ru_stime:.6f}",
        "used_cpu_user": f"{own.ru_utime:.6f}",
        "used_cpu_sys_children": f"{children.ru_stime:.6f}",
        "used_cpu_user_children": f"{children.ru_utime:.6f}",
        "used_cpu_sys_main_thread": f"{thread.ru_stime:.6f}",
        "used_cpu_user_main_thread": f"{thread.ru_utime:.6f}",
    }


def _command_statistics(server: Server) -> Fields:
    fields: Fields = {}
    for name, usage in sorted(server.statistics.usage.items()):
        if usage.calls or usage.rejected or usage.failed:
            microseconds = usage.nanoseconds / 1000
            each = microseconds / usage.calls if usage.calls else 0
            fields[f"cmdstat_{name}"] = (
                f"calls={usage.calls},usec={microseconds:.0f},usec_per_call={each:.2f},"
                f"rejected_calls={usage.rejected},failed_calls={usage.failed}"
            )
    return fields


def _error_statistics(server: Server) -> Fields:
    errors = sorted(server.statistics.errors.items())
    return {f"errorstat_{word}": f"count={count}" for word, count in errors}


def _latency_statistics(server: Server) -> Fields:
    fields: Fields = {}
    for name, usage in sorted(server.statistics.usage.items()):
        if usage.calls:
            percentiles = zip(_PERCENTILES, usage.percentiles(_PERCENTILES), strict=True)
            fields[f"latency_percentiles_usec_{name}"] = ",".join(
                f"p{percent}={nanoseconds / 1000:.3f}" for percent, nanoseconds in percentiles
            )
    return fields


def _cluster(server: Server) -> Fields:
    return {"cluster_enabled": 0}


def _keyspace(server: Server) -> Fields:
    database = server.database
    now = database.now()
    fields: dict[str, object] = {}
    for number, keyspace in sorted(database.engine.keyspaces.items()):
        if keyspace:
            expiries = keyspace.expiries
            left = [max(0, at - now) for at in islice(expiries.values(), _SAMPLED_EXPIRIES)]
            average = sum(left) // len(left) if left else 0
            fields[f"db{number}"] = (
                f"keys={len(keyspace)},expires={len(expiries)},avg_ttl={average},subexpiry=0"
            )
    return fields


def _vectors(server: Server) -> Fields:
    engine = server.database.engine
    totals = engine.totals()
    searches, builder = server.searches, server.builder
    half, most = server.statistics.searches.percentiles((50, 99))
    return {
        "vectors_indices": len(engine.indices),
        "vectors_rows": totals.rows,
        "vectors_rows_unindexed": totals.unindexed,
        "vectors_rows_dead": totals.dead,
        "vectors_segments": totals.segments,
        "vectors_searches": searches.searches,
        "vectors_search_batches": searches.batches,
        "vectors_searches_waiting": searches.waiting,
        "vectors_searches_refused": searches.refused,
        "vectors_search_usec_p50": half // 1000,
        "vectors_search_usec_p99": most // 1000,
        "vectors_builds_running": builder.running,
        "vectors_builds_waiting": builder.waiting,
        "vectors_builds": builder.builds,
        "vectors_builds_failed": builder.failures,
        "vectors_build_rows_per_second": round(builder.rate),
        "vectors_last_build_error": builder.last_error or "",
        "vectors_segments_unverified": server.verification.waiting,
        "vectors_damaged": "; ".join(server.verification.damaged),
    }


_SECTIONS: dict[str, Callable[[Server], Fields]] = {
    "Server": _server,
    "Clients": _clients,
    "Memory": _memory,
    "Persistence": _persistence,
    "Stats": _stats,
    "Replication": _replication,
    "CPU": _cpu,
    "Commandstats": _command_statistics,
    "Errorstats": _error_statistics,
    "Latencystats": _latency_statistics,
    "Cluster": _cluster,
    "Keyspace": _keyspace,
    "Vectors": _vectors,
}

# Those that only come when they are asked for, or everything is.
_LONG = frozenset({"Commandstats", "Latencystats"})


def render(server: Server, sections: Sequence[str]) -> str:
    """The text of INFO for the sections named (lower case); without any, for the usual ones."""
    asked = set(sections)
    everything = bool(asked & {"all", "everything"})
    usual = not asked or "default" in asked
    parts = []
    for title, fields in _SECTIONS.items():
        if everything or (usual and title not in _LONG) or title.lower() in asked:
            lines = [f"# {title}", *(f"{name}:{value}" for name, value in fields(server).items())]
            parts.append("".join(f"{line}\r\n" for line in lines))
    return "\r\n".join(parts)
