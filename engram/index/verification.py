"""Comparing in the background the checksums of vectors that were mapped unread when the server started."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import trio

from engram.errors import DamagedDataError
from engram.index.segment import Segment, SegmentStore

logger = logging.getLogger(__name__)


class Verification:
    """What was found; `damaged` holds a line for each segment whose vectors are not what was written."""

    def __init__(self, store: SegmentStore, segments: Iterable[Segment]) -> None:
        self._store = store
        self._segments = deque(segments)
        self.damaged: list[str] = []

    @property
    def waiting(self) -> int:
        """How many segments have not been read yet."""
        return len(self._segments)

    async def run(self) -> None:
        """Reads one segment after another. Damage is logged and counted; its rows are not merged."""
        limiter = trio.CapacityLimiter(1)
        while self._segments:
            try:
                await trio.to_thread.run_sync(self._store.verify, self._segments[0], limiter=limiter)
            except MemoryError:
                logger.warning("no memory to verify segment %s", self._segments[0].id)
            except (DamagedDataError, OSError) as error:
                logger.error("vectors are damaged: %s; see `engram check`", error)
                self.damaged.append(str(error))
            self._segments.popleft()
