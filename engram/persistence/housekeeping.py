"""Housekeeping: what is done to files beside the log, in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

from engram.errors import one_line

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# What the system may refuse, and grant when it is asked again: RuntimeError is for a thread.
PASSING = (OSError, RuntimeError, MemoryError)

# One prepares files, one serves a snapshot.
_THREADS = 2


def reason(error: Exception) -> str:
    """What went wrong, in the system's words where it said so."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


class Housekeeping:
    """Carries out blocking calls off the loop, a few at a time."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Calls `function` in a thread. Raises RuntimeError when no thread can be started."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def run_anyway(self, function: Callable[[], None]) -> None:
        """As `run`, of what must be done: where no thread can be started, everybody waits for it."""
        try:
            await self.run(function)
        except RuntimeError:
            function()
