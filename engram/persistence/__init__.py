"""The log, snapshots and recovery: decides which files of a data directory exist."""

from engram.persistence.layout import lock_directory
from engram.persistence.recovery import Recovery, recover
from engram.persistence.snapshot import SnapshotResult
from engram.persistence.task import Persistence, PersistenceSettings, PersistenceStatus

__all__ = [
    "Persistence",
    "PersistenceSettings",
    "PersistenceStatus",
    "Recovery",
    "SnapshotResult",
    "lock_directory",
    "recover",
]
