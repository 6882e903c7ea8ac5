"""The masks of filters over rows that do not change: a filter that is used once is used again."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from engram.index.attributes import AttributeColumns
from engram.index.filters import Filter, Mask

_KEPT_MASKS = 16


class MaskCache:
    """The masks of the filters used last; search threads share it."""

    __slots__ = ("_lock", "_masks")

    def __init__(self) -> None:
        self._masks: dict[Filter, Mask] = {}
        self._lock = Lock()

    def mask(self, condition: Filter, columns: Callable[[], AttributeColumns]) -> Mask:
        """On which rows the filter is true: shape (rows,), not to be written to."""
        with self._lock:
            mask = self._masks.pop(condition, None)
        if mask is None:
            mask = condition.mask(columns())
        with self._lock:
            self._masks[condition] = mask
            if len(self._masks) > _KEPT_MASKS:
                del self._masks[next(iter(self._masks))]
        return mask
