from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram import large_string
from engram.large_string import BLOCK_SIZE, LONGEST_PLAIN, LargeString, pieces, with_range

# Blocks of few bytes, so that changes begin, end and lie anywhere in them.
changes = st.lists(st.tuples(st.none() | st.integers(0, 30), st.binary(max_size=14)), max_size=12)


def plainly_changed(value: bytes, offset: int, data: bytes) -> bytes:
    padded = value.ljust(offset, b"\0")
    return padded[:offset] + data + padded[offset + len(data) :]


@given(st.binary(max_size=20), changes, st.integers(1, 6), st.integers(0, 12), st.data())
def test_it_changes_as_bytes_do(
    value: bytes,
    steps: list[tuple[int | None, bytes]],
    block_size: int,
    longest_plain: int,
    data: st.DataObject,
) -> None:
    with (
        mock.patch.object(large_string, "BLOCK_SIZE", block_size),
        mock.patch.object(large_string, "LONGEST_PLAIN", longest_plain),
    ):
        made: large_string.String = value
        before: list[tuple[large_string.String, bytes]] = []
        for place, written in steps:
            before.append((made, value))
            offset = len(value) if place is None else place
            made, value = with_range(made, offset, written), plainly_changed(value, offset, written)
            assert made == value
            assert len(made) == len(value)
            assert isinstance(made, LargeString) or len(value) <= longest_plain
        start, stop = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
        assert made[start:stop] == value[start:stop]
        assert b"".join(pieces(made, start, stop)) == value[start:stop]
        assert all(len(piece) <= block_size for piece in pieces(made, start, stop))
        assert [made[place] for place in range(len(made))] == list(value)
        # Those that it was made from are what they were.
        for old, expected in before:
            assert bytes(old) == expected


def test_a_change_copies_a_block_or_two() -> None:
    value = LargeString(bytes(range(256)) * (BLOCK_SIZE // 16))
    for changed in (value.with_range(5 * BLOCK_SIZE + 7, b"x"), value.with_range(len(value), b"x")):
        shared = {id(block) for block in value._blocks} & {id(block) for block in changed._blocks}
        assert len(shared) >= len(value._blocks) - 1


def test_zeros_take_no_memory() -> None:
    value = with_range(b"a", 1 << 32, b"z")
    assert isinstance(value, LargeString)
    assert len({id(block) for block in value._blocks}) <= 3
    assert (len(value), value[1 << 31], value[1 << 32], value[0]) == ((1 << 32) + 1, 0, ord("z"), ord("a"))


def test_it_equals_what_has_the_same_bytes() -> None:
    value = bytes(LONGEST_PLAIN + 1)
    assert LargeString(value) == value
    assert value == LargeString(value)
    assert LargeString(value) != LargeString(value[1:])
    assert LargeString(value) != value[:-1] + b"x"
    assert LargeString(value) != 1
    with pytest.raises(TypeError):
        hash(LargeString(value))
