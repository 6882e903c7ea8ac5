from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.statistics import ErrorCounts, Rate, Statistics, Usage


def test_calls_and_their_time_add_up() -> None:
    usage = Usage()
    usage.record(3, 900)
    usage.record(1, 50_000)
    assert (usage.calls, usage.nanoseconds) == (4, 50_900)
    assert [calls for _, calls in usage.latencies()] == [3, 1]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1 << 50)), min_size=1))
def test_a_latency_is_known_to_a_sixteenth(runs: list[tuple[int, int]]) -> None:
    usage = Usage()
    for count, nanoseconds in runs:
        usage.record(count, count * nanoseconds)
    latencies = list(usage.latencies())
    assert latencies == sorted(latencies)
    assert sum(calls for _, calls in latencies) == usage.calls
    shortest = min(nanoseconds for _, nanoseconds in runs)
    if shortest < 1 << 43:
        assert shortest <= latencies[0][0] <= max(shortest * 17 / 16, shortest + 64)


def test_percentiles() -> None:
    usage = Usage()
    assert usage.percentiles((50,))[0] == 0
    usage.record(990, 990 * 1000)
    usage.record(9, 9 * 1_000_000)
    usage.record(1, 1_000_000_000)
    assert usage.percentiles((50,))[0] == pytest.approx(1000, rel=1 / 16)
    assert usage.percentiles((99,))[0] == pytest.approx(1000, rel=1 / 16)
    assert usage.percentiles((99.9,))[0] == pytest.approx(1_000_000, rel=1 / 16)
    assert usage.percentiles((100,))[0] == pytest.approx(1_000_000_000, rel=1 / 16)


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1 << 50)), min_size=1),
    st.lists(st.floats(0, 100), max_size=5),
)
def test_figures_are_those_of_latencies_looked_at_one_by_one(
    runs: list[tuple[int, int]], percents: list[float]
) -> None:
    usage = Usage()
    for count, nanoseconds in runs:
        usage.record(count, count * nanoseconds)
    each = [nanoseconds for nanoseconds, calls in usage.latencies() for _ in range(calls)]
    wanted = [each[max(1, int(percent / 100 * len(each) + 0.5)) - 1] for percent in percents]
    assert usage.percentiles(percents) == wanted
    bounds = [1 << max(10, (nanoseconds - 1).bit_length()) for nanoseconds in each]
    assert usage.histogram() == [
        (bound, bounds.index(bound) + bounds.count(bound)) for bound in sorted(set(bounds))
    ]


def test_histograms_are_cumulative() -> None:
    usage = Usage()
    assert usage.histogram() == []
    for nanoseconds in (10, 900, 3000, 3500, 40_000):
        usage.record(1, nanoseconds)
    assert usage.histogram() == [(1024, 2), (4096, 4), (65_536, 5)]
    assert usage.cumulative((1 << 11, 1 << 12, 1 << 20)) == [(1 << 11, 2), (1 << 12, 4), (1 << 20, 5)]


def test_errors_of_made_up_words_are_bounded() -> None:
    errors = ErrorCounts()
    for number in range(1000):
        errors.count(f"WORD{number} and so on")
    errors.count("WORD0 again")
    assert len(errors) == 128
    assert errors["WORD0"] == 2


def test_a_rate_is_that_of_the_last_samples() -> None:
    rate = Rate()
    assert rate.per_second == 0
    rate.sample(0.0, 1_000_000)
    assert rate.per_second == 0
    for step in range(20):
        rate.sample(1 + step / 10, 1_000_000 + 50 * step)
    assert rate.per_second == pytest.approx(500)
    # CONFIG RESETSTAT has set the counter back.
    rate.sample(10.0, 5)
    assert rate.per_second == 0


def test_a_reset_leaves_what_others_hold() -> None:
    statistics = Statistics()
    usage = statistics.usage["get"]
    usage.record(2, 100)
    usage.failed += 1
    statistics.errors.count("ERR what")
    assert statistics.commands_processed == 2
    statistics.reset()
    assert statistics.usage["get"] is usage
    assert (usage.calls, usage.nanoseconds, usage.failed, list(usage.latencies())) == (0, 0, 0, [])
    assert statistics.commands_processed == 0
    assert not statistics.errors
    usage.record(1, 5)
    assert usage.calls == 1
