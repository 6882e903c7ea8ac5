"""The real collector, in processes of their own: what is frozen in one stays so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PRELUDE = """
import gc, weakref
import trio
from trio.testing import MockClock
from engram.collector import MOST_NEW, brief_collections, watch_new

class Circle:
    def __init__(self):
        self.itself = self

def containers(count):
    return [[number] for number in range(count)]

seen = []

def count(phase, information):
    if phase == "start":
        generations = range(information["generation"] + 1)
        seen.append(sum(len(gc.get_objects(generation)) for generation in generations))

def watched(work):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_new)
            await work()
            nursery.cancel_scope.cancel()
    trio.run(main, clock=MockClock(autojump_threshold=0))
"""


def run(program: str) -> None:
    command = [sys.executable, "-c", PRELUDE + program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_no_collection_looks_at_many_containers() -> None:
    run("""
with brief_collections():
    gc.callbacks.append(count)
    data = containers(2_000_000)
    gc.callbacks.remove(count)
assert len(seen) > 100
assert 20_000 < max(seen) < 500_000, max(seen)
assert gc.get_freeze_count() > 1_800_000
""")


def test_no_collection_looks_at_many_containers_while_as_many_go_as_come() -> None:
    run("""
data = containers(1_000_000)

async def replace():
    for start in range(0, len(data), 2000):
        for place in range(start, start + 2000):
            data[place] = [place]
        await trio.sleep(0.01)

with brief_collections():
    gc.callbacks.append(count)
    watched(replace)
    gc.collect()
    gc.callbacks.remove(count)
assert len(seen) > 10, len(seen)
assert MOST_NEW < max(seen) < 500_000, max(seen)
""")


def test_a_container_that_grows_is_frozen_while_it_is_small() -> None:
    run("""
sizes = []
data = None

async def grow():
    global data
    data = []
    for _ in range(200):
        data.extend(map(str, range(10_000)))
        if any(found is data for found in gc.get_objects()):
            sizes.append(len(data))
        await trio.sleep(0.05)

with brief_collections():
    watched(grow)
assert 100_000 <= max(sizes) < 2_000_000, sizes
""")


def test_what_is_frozen_is_freed_with_its_last_reference() -> None:
    run("""
with brief_collections():
    data = containers(500_000)
    gc.collect()
    frozen = gc.get_freeze_count()
    assert frozen > 400_000
    del data
    assert gc.get_freeze_count() < frozen - 400_000
""")


def test_circles_that_are_young_are_found() -> None:
    """Also beside much data, and by automatic collections; but for one that is in use when all is frozen."""
    run("""
with brief_collections():
    data = containers(1_000_000)
    circles = [weakref.ref(Circle()) for _ in range(1000)]
    more = containers(200_000)
    assert len([circle for circle in circles if circle() is not None]) <= 1
""")


def test_circles_are_found_whatever_their_age_while_there_are_few_containers() -> None:
    run("""
async def wait():
    circles = [Circle() for _ in range(1000)]
    await trio.sleep(100)
    references = list(map(weakref.ref, circles))
    del circles
    await trio.sleep(2)
    assert [reference for reference in references if reference() is not None] == []

with brief_collections():
    watched(wait)
""")


def test_it_ends_with_the_block() -> None:
    run("""
before = gc.get_threshold(), list(gc.callbacks)
with brief_collections(), brief_collections():
    assert len(gc.callbacks) == len(before[1]) + 2
    assert gc.get_threshold() != before[0]
assert (gc.get_threshold(), list(gc.callbacks)) == before
frozen = gc.get_freeze_count()
data = containers(500_000)
gc.collect()
assert gc.get_freeze_count() <= frozen
""")
