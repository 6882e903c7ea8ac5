from __future__ import annotations

import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.index.texts import Selection, Strings, Texts

items = st.lists(st.binary(max_size=6), max_size=20)


def everything(texts: Texts) -> list[bytes]:
    return texts.at(np.arange(len(texts.ends)))


@given(items)
def test_strings_are_what_was_packed(given_items: list[bytes]) -> None:
    assert everything(Texts.of(given_items)) == given_items


@given(items, st.data())
def test_any_of_them_are_selected_in_any_order(given_items: list[bytes], data: st.DataObject) -> None:
    position = st.integers(0, max(0, len(given_items) - 1))
    chosen = data.draw(st.lists(position, max_size=30 if given_items else 0))
    positions = np.array(chosen, np.int64)
    expected = [given_items[number] for number in chosen]
    texts = Texts.of(given_items)
    assert texts.at(positions) == expected
    assert everything(texts.select(positions)) == expected


@given(items, st.integers(1, 9), st.data())
def test_blocks_of_any_size_are_what_is_selected(
    given_items: list[bytes], block_bytes: int, data: st.DataObject
) -> None:
    position = st.integers(0, max(0, len(given_items) - 1))
    runs = st.lists(st.tuples(position, st.integers(1, 5)), max_size=8 if given_items else 0)
    chosen = [
        number
        for start, size in data.draw(runs)
        for number in range(start, min(start + size, len(given_items)))
    ]
    expected = [given_items[number] for number in chosen]
    selection = Selection(Texts.of(given_items), np.array(chosen, np.int64))
    with mock.patch("engram.index.texts._BLOCK_BYTES", block_bytes):
        blocks = [block.tobytes() for block in selection.blocks()]
        selected = selection.texts.select(selection.positions)
    assert max(map(len, blocks), default=0) <= block_bytes
    assert b"".join(blocks) == b"".join(expected)
    assert selection.lengths.tolist() == [len(item) for item in expected]
    assert everything(selected) == expected


@given(items, st.integers(1, 9))
def test_strings_are_copied_in_blocks(given_items: list[bytes], block_bytes: int) -> None:
    strings = Strings(given_items)
    with mock.patch("engram.index.texts._BLOCK_BYTES", block_bytes):
        blocks = [block.tobytes() for block in strings.blocks()]
    assert b"".join(blocks) == b"".join(given_items)
    assert b"" not in blocks
    # A block is full with the string that makes it so.
    assert max(map(len, blocks), default=0) < block_bytes + max(map(len, given_items), default=0)
    assert strings.lengths.tolist() == [len(item) for item in given_items]


@pytest.mark.parametrize("length", [16, 1000, 100_000, 8_000_000])
@pytest.mark.parametrize("left_out", [1, 2])
def test_selecting_takes_little_more_memory_than_what_is_selected(length: int, left_out: int) -> None:
    rows = 8_000_000 // length
    texts = Texts(np.zeros(rows * length, np.uint8), np.arange(1, rows + 1) * length)
    # With gaps nothing is a slice of what is there.
    positions = np.flatnonzero(np.arange(rows) % 10 >= left_out) if rows > 1 else np.zeros(1, np.int64)
    tracemalloc.start()
    try:
        selected = texts.select(positions)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The lengths of so many strings, and the numbers of one block.
    assert peak < selected.joined.nbytes + 96 * len(positions) + 24 * (1 << 18)
