"""INFO: https://redis.io/docs/latest/commands/info/."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence

from engram import REDIS_VERSION, __version__
from engram.commands.session import Server

Fields = dict[str, object]

_PAGE = resource.getpagesize()


def resident_memory() -> int:
    """Bytes of this process in memory, files it maps included. Linux only."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


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
        "redis_mode": "standalone",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64 if sys.maxsize > 1 << 32 else 32,
        "multiplexing_api": "trio",
        "python_version": platform.python_version(),
        "process_id": os.getpid(),
        "run_id": server.run_id,
        "tcp_port": server.port,
        "server_time_usec": time.time_ns() // 1000,
        "uptime_in_seconds": uptime,
        "uptime_in_days": uptime // 86400,
        "executable": sys.executable,
        "config_file": "",
    }


def _clients(server: Server) -> Fields:
    return {
        "connected_clients": len(server.sessions),
        "maxclients": server.config.maxclients,
        "blocked_clients": 0,
    }


def _memory(server: Server) -> Fields:
    used = resident_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "used_memory": used,
        "used_memory_human": human(used),
        "used_memory_rss": used,
        "used_memory_rss_human": human(used),
        "used_memory_peak": peak,
        "used_memory_peak_human": human(peak),
        "maxmemory": 0,
        "maxmemory_human": "0B",
        "maxmemory_policy": "noeviction",
    }


def _persistence(server: Server) -> Fields:
    storage = server.storage
    fields: Fields = {"loading": 0, "async_loading": 0}
    if storage is None:
        return fields | {"rdb_bgsave_in_progress": 0, "aof_enabled": 0}
    status = storage.status
    return fields | {
        "rdb_changes_since_last_save": status.changes_since_save,
        "rdb_bgsave_in_progress": int(status.snapshot_running),
        "rdb_last_save_time": status.last_save_time,
        "rdb_last_bgsave_status": "ok" if status.last_save_ok else "err",
        "rdb_last_bgsave_time_sec": round(status.last_save_seconds),
        "last_save_error": status.last_save_error,
        "cleanup_error": status.cleanup_error,
        "aof_enabled": 1,
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
    statistics = server.statistics
    return {
        "total_connections_received": statistics.connections_received,
        "total_commands_processed": statistics.commands_processed,
        "total_net_input_bytes": statistics.net_input_bytes,
        "total_net_output_bytes": statistics.net_output_bytes,
        "rejected_connections": statistics.connections_rejected,
        "expired_keys": server.database.expired_keys,
        "evicted_keys": 0,
        "total_error_replies": statistics.error_replies,
    }


def _replication(server: Server) -> Fields:
    return {"role": "master", "connected_slaves": 0}


def _cpu(server: Server) -> Fields:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "used_cpu_sys": f"{own.ru_stime:.6f}",
        "used_cpu_user": f"{own.ru_utime:.6f}",
        "used_cpu_sys_children": f"{children.ru_stime:.6f}",
        "used_cpu_user_children": f"{children.ru_utime:.6f}",
    }


def _cluster(server: Server) -> Fields:
    return {"cluster_enabled": 0}


def _keyspace(server: Server) -> Fields:
    keyspace = server.database.keyspace
    if not keyspace:
        return {}
    return {"db0": f"keys={len(keyspace)},expires={len(keyspace.expiries)},avg_ttl=0"}


def _vectors(server: Server) -> Fields:
    engine = server.database.engine
    totals = engine.totals()
    searches, builder = server.searches, server.builder
    return {
        "vectors_indices": len(engine.indices),
        "vectors_rows": totals.rows,
        "vectors_rows_unindexed": totals.unindexed,
        "vectors_rows_dead": totals.dead,
        "vectors_segments": totals.segments,
        "vectors_searches": searches.searches,
        "vectors_search_batches": searches.batches,
        "vectors_searches_waiting": searches.waiting,
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
    "Cluster": _cluster,
    "Keyspace": _keyspace,
    "Vectors": _vectors,
}


def render(server: Server, sections: Sequence[str]) -> str:
    """The text of INFO for the sections named (lower case); all of them when none is."""
    everything = not sections or bool({"default", "all", "everything"} & set(sections))
    parts = []
    for title, fields in _SECTIONS.items():
        if everything or title.lower() in sections:
            lines = [f"# {title}", *(f"{name}:{value}" for name, value in fields(server).items())]
            parts.append("".join(f"{line}\r\n" for line in lines))
    return "\r\n".join(parts)
