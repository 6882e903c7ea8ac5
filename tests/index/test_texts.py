from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram.index.texts import Texts

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


@given(st.lists(items, min_size=1, max_size=5))
def test_parts_follow_each_other(parts: list[list[bytes]]) -> None:
    joined = Texts.concatenate([Texts.of(part) for part in parts])
    assert everything(joined) == [item for part in parts for item in part]
