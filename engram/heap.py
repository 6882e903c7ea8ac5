"""Memory that was freed, which glibc's heap keeps unless it is told to give it back."""

from __future__ import annotations

import ctypes

import attrs
import trio

# From <malloc.h>. Blocks of _MMAP_THRESHOLD bytes are mapped one by one, and given back when they are freed.
# Of smaller ones _TRIM_THRESHOLD is kept: a batch of searches takes and frees a few hundred KiB each time.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 1 << 20
_TRIM_THRESHOLD = 8 << 20

_LOOK_SECONDS = 5.0
_MOST_KEPT = 32 << 20


class _Mallinfo2(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@attrs.define
class Heap:
    """The heap of this process; with another C library than glibc nothing is done."""

    _library: ctypes.CDLL = attrs.field(factory=lambda: ctypes.CDLL(None))
    # What was free when the heap was last trimmed, or less since.
    _free: int = 0

    def tune(self) -> None:
        """Has large blocks mapped: left alone, glibc takes ever larger ones from the heap."""
        if hasattr(self._library, "mallopt"):
            self._library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
            self._library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)

    async def run(self) -> None:
        """Gives back what has become free in the midst of the heap, now and then."""
        if not (hasattr(self._library, "mallinfo2") and hasattr(self._library, "malloc_trim")):
            return
        self._library.mallinfo2.restype = _Mallinfo2
        limiter = trio.CapacityLimiter(1)
        while True:
            await trio.sleep(_LOOK_SECONDS)
            await trio.to_thread.run_sync(self._trim, limiter=limiter)

    def _trim(self) -> None:
        free = self._library.mallinfo2().fordblks
        # Free blocks still count when their pages are gone.
        if free - self._free > _MOST_KEPT:
            self._library.malloc_trim(0)
            self._free = free
        else:
            self._free = min(self._free, free)
