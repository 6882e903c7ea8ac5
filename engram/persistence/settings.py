"""What of the log and the snapshots may be set."""

from __future__ import annotations

from typing import Literal

import attrs

AppendFsync = Literal["always", "everysec", "no"]


@attrs.define(kw_only=True)
class PersistenceSettings:
    """What may change while the server runs; each change counts from the next batch or check on.

    Attributes:
        appendfsync: "always": no reply leaves before what it shows is synced; "everysec": synced about
            once a second; "no": synced only when a file of the log is closed.
        log_file_size: bytes of a file of the log; a larger record gets a file of its own.
        queue_bytes: bytes admitted but not yet written.
        snapshot_log_size, snapshot_log_percentage: a snapshot is made by itself when the log since the last
            one has more bytes than the first and than the second says of that snapshot, or when it would let
            many segments be deleted; never when either is 0.
    """

    appendfsync: AppendFsync = "always"
    log_file_size: int = 64 << 20
    queue_bytes: int = 64 << 20
    snapshot_log_size: int = 256 << 20
    snapshot_log_percentage: int = 100
