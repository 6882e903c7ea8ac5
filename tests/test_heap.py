from __future__ import annotations

import ctypes

import pytest
import trio
from trio.testing import MockClock

from engram.commands.information import resident_memory
from engram.heap import Heap

BLOCK = 8 << 10
COUNT = 16 << 10


async def run_for(heap: Heap, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await heap.run()


async def test_what_is_free_in_the_midst_of_the_heap_is_given_back(autojump_clock: MockClock) -> None:
    heap = Heap()
    heap.tune()
    await run_for(heap, 6)
    blocks = [bytes([number % 255 + 1]) * BLOCK for number in range(COUNT)]
    full = resident_memory()
    # A look while they are there: they may have taken what was free before.
    await run_for(heap, 6)
    # One of a thousand stays, up to the last.
    kept = blocks[COUNT - 1 :: -1000]
    blocks.clear()
    before = resident_memory()
    assert before > full - BLOCK * COUNT // 2
    await run_for(heap, 6)
    assert resident_memory() < before - BLOCK * COUNT // 2
    assert len(kept) > 10


class OtherLibrary:
    """One that has none of glibc's functions."""


async def test_with_another_library_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: OtherLibrary())
    heap = Heap()
    heap.tune()
    with trio.fail_after(1):
        await heap.run()
