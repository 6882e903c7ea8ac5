"""The log, snapshots and recovery: decides which files of a data directory exist."""

from engram.persistence.check import (
    Cut,
    Examination,
    FileReport,
    cut_log,
    describe_loss,
    describe_place,
    hold_directory,
    is_unused,
)
from engram.persistence.layout import lock_directory
from engram.persistence.recovery import Recovery, recover
from engram.persistence.snapshot import SnapshotResult
from engram.persistence.task import Persistence, PersistenceSettings, PersistenceStatus

__all__ = [
    "Cut",
    "Examination",
    "FileReport",
    "Persistence",
    "PersistenceSettings",
    "PersistenceStatus",
    "Recovery",
    "SnapshotResult",
    "cut_log",
    "describe_loss",
    "describe_place",
    "hold_directory",
    "is_unused",
    "lock_directory",
    "recover",
]
