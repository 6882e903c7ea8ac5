"""CPython's garbage collector, kept from holding the loop up.

A full collection looks at every container there is and at all that it refers to: half a second or more for
five million lists, or for a list of five million strings. Nearly all of it is data, which is freed as soon as
nothing refers to it. So what a full collection leaves is frozen when it has taken long: none looks at it
again. A circle of references that was frozen is never freed. So whatever lives for long must come apart by
itself when it ends, as clients and dropped indices do.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

# The youngest generation is looked at after 10,000 containers more, the next after 30,000, all after 40,000.
# More in number, that is: what is freed, however old, makes up for what comes.
_THRESHOLDS = (10_000, 1, 0)
_OLDEST = 2

# A full collection that has taken more processor time is the last that looks at what it has left.
_MOST_NANOSECONDS = 2_000_000

# How often `watch_new` counts what is new, also after it was much, and how often it makes a full collection
# whatever there is.
_LOOK_SECONDS = 0.05
_SHORT_LOOK_SECONDS = 0.01
_LOOKS_A_COLLECTION = 20

MOST_NEW = 10_000
"""With more new containers `watch_new` makes a full collection at once."""


class _Freezer:
    """Called before and after each collection, in the middle of anything and on any thread."""

    def __init__(self) -> None:
        self._began = 0

    def __call__(self, phase: str, information: Mapping[str, Any]) -> None:
        if information["generation"] != _OLDEST:
            return
        if phase == "start":
            self._began = time.thread_time_ns()
        elif time.thread_time_ns() - self._began > _MOST_NANOSECONDS:
            gc.freeze()


@contextmanager
def brief_collections() -> Iterator[None]:
    """Keeps collections brief within the block, also those of other threads; `watch_new` belongs to it.

    What there is before is frozen, too. All that stays so afterwards: a process that ends has no need to look
    at it.
    """
    before = gc.get_threshold()
    freezer = _Freezer()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    gc.callbacks.append(freezer)
    try:
        yield
    finally:
        gc.callbacks.remove(freezer)
        gc.set_threshold(*before)


async def watch_new() -> None:
    """Has the collector come before there is much for it that is new, until this is cancelled.

    While data are replaced, as many containers go as come, and the collector, which knows the difference
    alone, would come when millions are new. A container that grows is to be frozen while it is small.
    """
    pause = _LOOK_SECONDS
    for look in itertools.count(1):
        await trio.sleep(pause)
        is_much = _count_new() > MOST_NEW
        pause = _SHORT_LOOK_SECONDS if is_much else _LOOK_SECONDS
        if is_much or look % _LOOKS_A_COLLECTION == 0:
            gc.collect()


def _count_new() -> int:
    """The containers that no full collection has left."""
    return len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1))
