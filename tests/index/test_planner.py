from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engram.index.planner import PICKED_ROWS_PER_EXPANSION, Walk, plan_walk, scans_all
from engram.index.recall import SCAN_ROWS_PER_EXPANSION

rows = st.integers(1, 1 << 20)


@given(rows=rows, data=st.data(), k=st.integers(1, 1000), expansion=st.integers(1, 5000))
def test_a_walk_is_wide_enough_for_what_qualifies_and_cheaper_than_a_scan(
    rows: int, data: st.DataObject, k: int, expansion: int
) -> None:
    qualifying = data.draw(st.integers(1, rows))
    walk = plan_walk(rows, qualifying, k, expansion)
    if walk is None:
        return
    share = qualifying / rows
    assert walk.count * share >= k
    assert walk.expansion * share >= expansion
    assert walk.expansion >= walk.count
    assert walk.expansion * SCAN_ROWS_PER_EXPANSION < rows or not scans_all(rows, qualifying)
    assert walk.expansion * PICKED_ROWS_PER_EXPANSION < qualifying or scans_all(rows, qualifying)


def test_without_a_good_width_or_without_rows_there_is_no_walk() -> None:
    assert plan_walk(100_000, 100_000, 10, 0) is None
    assert plan_walk(100_000, 0, 10, 64) is None


def test_few_rows_are_scanned_and_many_are_walked() -> None:
    assert plan_walk(1000, 1000, 10, 64) is None
    assert plan_walk(100_000, 100_000, 10, 64) == Walk(64, 20)
    assert plan_walk(100_000, 50_000, 10, 64) == Walk(128, 40)
    assert plan_walk(100_000, 100, 10, 64) is None


def test_an_ef_below_what_is_fetched_is_raised_to_it() -> None:
    assert plan_walk(100_000, 100_000, 100, 1) == Walk(200, 200)


def test_a_wider_walk_is_tried_until_a_scan_is_cheaper() -> None:
    walk: Walk | None = Walk(64, 20)
    widths = []
    while walk is not None:
        widths.append(walk.expansion)
        walk = walk.wider(100_000, 50_000)
    assert widths == [64, 256, 1024]


@given(rows=rows, data=st.data())
def test_more_that_qualify_never_turn_a_scan_of_all_into_one_of_some(rows: int, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(1, rows))
    more = data.draw(st.integers(fewer, rows))
    assert scans_all(rows, more) or not scans_all(rows, fewer)
