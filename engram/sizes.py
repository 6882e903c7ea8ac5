"""What objects take in CPython's memory, so that what is held can be counted without looking at it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

# Of bytes beside their length, with what the allocator rounds up on average; and of an integer.
BYTES_OBJECT = sys.getsizeof(b"") + 7
INTEGER_OBJECT = 32


def table_bytes(mapping: Mapping[Any, Any]) -> int:
    """What the table of a dictionary takes, without what its entries refer to.

    CPython keeps the table of what was deleted until something is added. That is not counted, so that a
    dictionary which has been emptied is small.
    """
    return min(sys.getsizeof(mapping), 256 + 128 * len(mapping))
