"""The log, snapshots and recovery: decides which files of a data directory exist."""

from engram.persistence.layout import lock_directory
from engram.persistence.log import Persistence, PersistenceStatus
from engram.persistence.recovery import Recovery, recover
from engram.persistence.settings import PersistenceSettings
from engram.persistence.snapshot import SnapshotResult

__all__ = [
    "Persistence",
    "PersistenceSettings",
    "PersistenceStatus",
    "Recovery",
    "SnapshotResult",
    "lock_directory",
    "recover",
]
