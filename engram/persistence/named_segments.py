"""Which segments the files of a data directory name, and what a snapshot would let go of."""

from __future__ import annotations

from engram.persistence.manifest import Manifest
from engram.persistence.recovery import Recovery

# Segments that a snapshot would allow to be deleted start one when they have more bytes than this, and
# than half of those in use.
_RELEASED_BYTES = 64 << 20


class NamedSegments:
    """Segments that the current snapshot or the log behind it names must stay on disk."""

    def __init__(self, recovery: Recovery) -> None:
        # Those of the log, with the LSN of the operation that names each.
        self._in_log = list(recovery.segments)
        # All that were named once and are not removed.
        self._known = {*recovery.manifest.segments, *(segment for _, segment in recovery.segments)}
        # The LSNs at which segments were out of use, and their bytes; and how many are too many.
        self._released: list[tuple[int, int]] = []
        self._most_released = _RELEASED_BYTES

    def note(self, lsn: int, segment: str) -> None:
        """The operation at `lsn` has put a segment into effect."""
        self._in_log.append((lsn, segment))
        self._known.add(segment)

    def release(self, lsn: int, size: int, used: int) -> None:
        """As of `lsn`, segments of `size` bytes are out of use, and those in use have `used` bytes."""
        self._released.append((lsn, size))
        self._most_released = max(_RELEASED_BYTES, used // 2)

    @property
    def too_many_released(self) -> bool:
        """Whether a snapshot is worth while, for what it would let be deleted."""
        return sum(size for _, size in self._released) > self._most_released

    def replace(self, manifest: Manifest) -> set[str]:
        """Another snapshot is current; returns the segments that nothing names any more."""
        self._released = [released for released in self._released if released[0] > manifest.lsn]
        self._in_log = [named for named in self._in_log if named[0] > manifest.lsn]
        return self._known - {*manifest.segments, *(segment for _, segment in self._in_log)}

    def removed(self, segment: str) -> None:
        """The files of a segment that nothing names are removed."""
        self._known.discard(segment)
