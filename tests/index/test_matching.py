from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index.filters import compile_filter
from engram.index.matching import count_matching, find_matching, find_matching_since
from engram.index.parameters import default_parameters
from engram.index.vector_index import VectorIndex

Build = Callable[[VectorIndex], Any]

EVEN = compile_filter(b".even == 1")


def add(index: VectorIndex, lsn: int, *numbers: int) -> None:
    keys = [b"%d" % number for number in numbers]
    texts = [b'{"even": %d}' % (number % 2 == 0) for number in numbers]
    index.add(lsn, keys, np.ones((len(keys), 3), np.float32), texts)


@pytest.fixture
def index() -> VectorIndex:
    return VectorIndex(1, default_parameters(3, "l2"), seal_rows=64)


class TestMatching:
    def test_rows_of_segments_and_of_the_head_are_found(self, index: VectorIndex, build: Build) -> None:
        add(index, 2, *range(100))
        build(index).install(3, index)
        add(index, 4, *range(100, 130))
        assert len(index.segments) == 1
        view = index.view(4)
        assert count_matching(view, EVEN) == 65
        found = find_matching(view, EVEN)
        assert found.keys == [b"%d" % number for number in range(0, 130, 2)]
        assert found.row_ids == [index.live[key] for key in found.keys]

    def test_a_view_shows_what_lived_when_it_was_taken(self, index: VectorIndex, build: Build) -> None:
        add(index, 2, *range(100))
        build(index).install(3, index)
        add(index, 4, 200, 202)
        before = index.view(4)
        index.delete(5, [b"0", b"200"])
        add(index, 6, 2, 300)
        assert count_matching(before, EVEN) == 52
        assert count_matching(index.view(6), EVEN) == 51
        assert b"300" not in find_matching(before, EVEN).keys
        assert find_matching(index.view(6), EVEN).keys[-3:] == [b"202", b"2", b"300"]

    def test_views_behind_a_chunk_change_nothing_for_later_ones(self) -> None:
        index = VectorIndex(1, default_parameters(3, "l2"))
        add(index, 2, *range(4000))
        add(index, 3, *range(4000, 6000))
        for lsn in (3, 2, 1):
            assert count_matching(index.view(lsn), EVEN) == {3: 3000, 2: 2000, 1: 0}[lsn]
        add(index, 4, *range(6000, 7000))
        assert count_matching(index.view(4), EVEN) == 3500
        assert find_matching(index.view(4), EVEN).keys == [b"%d" % number for number in range(0, 7000, 2)]
        assert find_matching_since(index, 5000, EVEN).keys == [
            b"%d" % number for number in range(5000, 7000, 2)
        ]

    def test_rows_since_an_id_are_those_added_later(self, index: VectorIndex, build: Build) -> None:
        add(index, 2, *range(90))
        view = index.view(2)
        add(index, 3, 100, 101, 102, 4)
        index.delete(4, [b"102"])
        assert find_matching_since(index, view.next_row, EVEN).keys == [b"100", b"4"]
        build(index).install(5, index)
        # Wherever they are by then.
        assert find_matching_since(index, view.next_row, EVEN).keys == [b"100", b"4"]
        assert find_matching_since(index, index.next_row, EVEN).keys == []

    def test_an_index_without_attributes_matches_nothing(self, index: VectorIndex) -> None:
        index.add(2, [b"a", b"b"], np.ones((2, 3), np.float32))
        assert count_matching(index.view(2), EVEN) == 0

    @settings(max_examples=60, deadline=None)
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 8), st.sampled_from([b"", b'{"x": 1}', b'{"x": 5}', b'{"y": 1}', b"{"])),
            max_size=40,
        )
    )
    def test_it_agrees_with_a_dictionary(self, changes: list[tuple[int, bytes]]) -> None:
        index = VectorIndex(1, default_parameters(2, "l2"))
        condition = compile_filter(b".x > 2")
        truth: dict[bytes, bytes] = {}
        for lsn, (number, text) in enumerate(changes, 2):
            key = b"%d" % number
            if text == b"{" and key in truth:
                index.delete(lsn, [key])
                del truth[key]
            else:
                index.add(lsn, [key], np.ones((1, 2), np.float32), [text or None])
                truth[key] = text
            view = index.view(lsn)
            expected = {key for key, text in truth.items() if condition.accepts(text)}
            assert set(find_matching(view, condition).keys) == expected
            assert count_matching(view, condition) == len(expected)
