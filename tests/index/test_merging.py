from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engram.index.merging import next_merge

SEAL = 32_768
LARGEST = 262_144

Sizes = list[tuple[int, int]]

sizes_strategy = st.lists(
    st.integers(1, 300_000).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows))), max_size=20
)


def merge(sizes: Sizes, *, waiting: bool) -> int | None:
    """Carries out what comes next; returns how many rows that builds, None when nothing is left."""
    merged = next_merge(sizes, SEAL, waiting=waiting)
    if merged is None:
        return None
    living = sum(rows - dead for rows, dead in sizes[merged])
    sizes[merged] = [(living, 0)] if living else []
    return living


def settle(sizes: Sizes) -> int:
    """Merges until nothing is left; returns how many rows are built."""
    built = 0
    while (rows := merge(sizes, waiting=False)) is not None:
        built += rows
    return built


@given(sizes=sizes_strategy)
def test_merging_ends_with_few_dead_rows_in_fewer_segments(sizes: Sizes) -> None:
    settled = list(sizes)
    settle(settled)
    assert sum(rows - dead for rows, dead in settled) == sum(rows - dead for rows, dead in sizes)
    assert all(dead <= 0.2 * rows for rows, dead in settled)
    assert len(settled) <= len(sizes)
    assert settle(settled) == 0


@given(sizes=sizes_strategy, more=st.data())
def test_a_merge_that_was_found_is_found_when_more_rows_have_died(sizes: Sizes, more: st.DataObject) -> None:
    if next_merge(sizes, SEAL, waiting=False) is not None:
        later = [(rows, more.draw(st.integers(dead, rows))) for rows, dead in sizes]
        assert next_merge(later, SEAL, waiting=False) is not None


@given(sizes=sizes_strategy, waiting=st.booleans())
def test_no_merge_yields_more_than_the_largest(sizes: Sizes, waiting: bool) -> None:
    merged = next_merge(sizes, SEAL, waiting=waiting)
    if merged is not None and merged.stop - merged.start > 1:
        living = sum(rows - dead for rows, dead in sizes[merged])
        assert living <= (LARGEST // 2 if waiting else LARGEST)


def test_a_million_rows_added_at_once_end_in_five_segments_built_thrice_at_most() -> None:
    sizes: Sizes = []
    most = built = 0
    for _ in range(30):
        while (rows := merge(sizes, waiting=True)) is not None:
            built += rows
        sizes.append((SEAL, 0))
        built += SEAL
        most = max(most, len(sizes))
    built += settle(sizes)
    assert len(sizes) <= 5
    assert most <= 13
    assert built <= 3 * 30 * SEAL


def test_rows_that_trickle_in_are_built_a_few_times() -> None:
    sizes: Sizes = []
    most = built = 0
    for _ in range(120):
        sizes.append((8192, 0))
        built += 8192 + settle(sizes)
        most = max(most, len(sizes))
    assert built <= 5 * 120 * 8192
    assert most <= 8


def test_a_segment_whose_rows_are_all_dead_goes_before_anything_else() -> None:
    assert next_merge([(100_000, 50_000), (1000, 1000)], SEAL, waiting=True) == slice(1, 2)


def test_a_few_small_segments_wait_while_rows_wait() -> None:
    sizes = [(SEAL, 0)] * 3
    assert next_merge(sizes, SEAL, waiting=True) is None
    assert next_merge([*sizes, (SEAL, 0)], SEAL, waiting=True) == slice(0, 4)
    assert next_merge(sizes, SEAL, waiting=False) == slice(0, 3)


def test_a_segment_beyond_the_largest_is_rebuilt_only_for_its_dead_rows() -> None:
    assert next_merge([(1_000_000, 200_000), (8192, 0)], SEAL, waiting=False) is None
    assert next_merge([(1_000_000, 200_001), (8192, 0)], SEAL, waiting=False) == slice(0, 1)
