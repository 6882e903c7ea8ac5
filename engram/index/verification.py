"""Comparing in the background the checksums of vectors that were mapped unread when the server started."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterable
from weakref import ref

import trio

from engram.errors import DamagedDataError
from engram.index.segment import Segment, SegmentStore

logger = logging.getLogger(__name__)

# What may be refused now and granted later, and says nothing of the file.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


class Verification:
    """What was found; `damaged` holds a line for each segment whose vectors are not what was written.

    The files of a segment that is not `in_use` any more may be gone: it is left out.
    """

    def __init__(
        self,
        store: SegmentStore,
        segments: Iterable[Segment],
        in_use: Callable[[Segment], bool] = lambda segment: True,
    ) -> None:
        self._store = store
        self._in_use = in_use
        # One that nobody uses need not stay open until its turn.
        self._segments = deque(map(ref, segments))
        self.damaged: list[str] = []

    @property
    def waiting(self) -> int:
        """How many segments have not been read yet."""
        return len(self._segments)

    async def run(self) -> None:
        """Reads one segment after another. Damage is logged and counted; its rows are not merged.

        Raises what says nothing of the segment, such as OSError for too many open files. It goes on with the
        same segment when it is called again.
        """
        limiter = trio.CapacityLimiter(1)
        while self._segments:
            segment = self._segments[0]()
            if segment is not None and self._in_use(segment):
                await self._verify(segment, limiter)
            # Nobody waits for it while the next one is read.
            del segment
            self._segments.popleft()

    async def _verify(self, segment: Segment, limiter: trio.CapacityLimiter) -> None:
        try:
            await trio.to_thread.run_sync(self._store.verify, segment, limiter=limiter)
        except (DamagedDataError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _PASSING:
                raise
            # It may have been merged away, and its files removed, while it was read.
            if self._in_use(segment):
                logger.error("vectors are damaged: %s; see `engram check`", error)
                self.damaged.append(str(error))
