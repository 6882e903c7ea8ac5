from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engram.errors import DamagedDataError
from engram.index.distances import METRICS
from engram.index.index_state import export_indices, restore_indices
from engram.index.parameters import default_parameters
from engram.index.search import SearchOptions, search_batch
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex, View

Floats = npt.NDArray[np.float32]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]
Clustered = Callable[..., Floats]
Build = Callable[..., Any]

SEAL_ROWS = 16
KEYS = [b"key-%d" % number for number in range(80)]

keys = st.sampled_from(KEYS)
# Few different vectors: many ties, many duplicates, and the zero vector.
vectors = st.lists(st.sampled_from([-2.0, 0.0, 1.0, 300.0]), min_size=3, max_size=3)
rows = st.lists(
    st.tuples(keys, vectors, st.sampled_from([None, b'{"a":1}', b'{"b":"x"}'])), min_size=1, max_size=12
)


def copy_of(
    index: VectorIndex, store: SegmentStore, seal_rows: int = SEAL_ROWS, first_serial: int = 1
) -> VectorIndex:
    """What a restart makes of the index."""
    (copy,) = restore_indices(*export_indices([index]), store, seal_rows=seal_rows, first_serial=first_serial)
    return copy


@attrs.frozen
class Row:
    born: int
    vector: Floats
    attributes: bytes | None


@attrs.define
class Scan:
    """A scan under way: the keys there from its start on, and those it has returned."""

    throughout: set[bytes]
    cursor: int = 0
    returned: set[bytes] = attrs.Factory(set)


@attrs.frozen
class Moment:
    """A view, and what the index held when it was taken."""

    view: View
    rows: dict[bytes, Row]


class IndexMachine(RuleBasedStateMachine):
    """An index, whatever is done to it, is a dict that is searched by brute force; so is an earlier view."""

    moments = Bundle("moments")

    def __init__(self, metric: str, store: SegmentStore, build: Build, nearest: Nearest) -> None:
        super().__init__()
        self.metric = metric
        self.store = store
        self.build = build
        self.nearest = nearest
        self.first_serial = 1 << 50
        self.index = VectorIndex(
            1, default_parameters(3, metric), seal_rows=SEAL_ROWS, first_serial=self.first_serial
        )
        self.rows: dict[bytes, Row] = {}
        self.lsn = 1
        self.born = 0
        self.pending: Any = None
        self.scan: Scan | None = None

    @rule(given=rows)
    def add(self, given: list[tuple[bytes, list[float], bytes | None]]) -> None:
        self.lsn += 1
        names = [key for key, _, _ in given]
        new = len(set(names) - set(self.rows))
        matrix = np.array([vector for _, vector, _ in given], np.float32)
        assert self.index.add(self.lsn, names, matrix, [text for _, _, text in given]) == new
        for key, vector, text in given:
            self.born += 1
            self.rows[key] = Row(self.born, np.array(vector, np.float32), text)

    @rule(key=keys, vector=vectors)
    def add_one(self, key: bytes, vector: list[float]) -> None:
        self.lsn += 1
        matrix = np.array([vector], np.float32)
        assert self.index.add(self.lsn, (key,), matrix) == (key not in self.rows)
        self.born += 1
        self.rows[key] = Row(self.born, matrix[0], None)

    @rule(start=st.integers(0, 60), vector=vectors)
    def add_a_run(self, start: int, vector: list[float]) -> None:
        self.add([(key, vector, None) for key in KEYS[start : start + 20]])

    @rule(start=st.integers(0, 70), count=st.integers(1, 40))
    def delete_a_run(self, start: int, count: int) -> None:
        self.delete(KEYS[start : start + count])

    @rule(chosen=st.lists(keys, max_size=10))
    def delete(self, chosen: list[bytes]) -> None:
        self.lsn += 1
        assert self.index.delete(self.lsn, chosen) == len(set(chosen) & set(self.rows))
        for key in chosen:
            self.rows.pop(key, None)
        if self.scan:
            self.scan.throughout -= set(chosen)

    @precondition(lambda self: self.pending is None and self.index.needs_maintenance)
    @rule()
    def start_build(self) -> None:
        self.pending = self.build(self.index)

    @precondition(lambda self: self.pending is None and self.index.needs_maintenance)
    @rule()
    def build_all(self) -> None:
        while self.index.needs_maintenance:
            self.start_build()
            self.finish_build()

    @precondition(lambda self: self.pending is None and not self.index.optimized)
    @rule()
    def start_optimization(self) -> None:
        self.pending = self.build(self.index, self.index.plan_optimization())

    @precondition(lambda self: self.pending is None and not self.index.optimized)
    @rule()
    def optimize(self) -> None:
        self.start_optimization()
        self.finish_build()
        assert self.index.optimized

    @precondition(lambda self: self.pending is not None)
    @rule()
    def finish_build(self) -> None:
        self.lsn += 1
        assert self.pending.install(self.lsn, self.index) == list(self.pending.replaces)
        self.pending = None

    @precondition(lambda self: self.pending is None)
    @rule()
    def restart(self) -> None:
        self.first_serial -= 1 << 20
        self.index = copy_of(self.index, self.store, first_serial=self.first_serial)

    @precondition(lambda self: self.pending is not None)
    @rule()
    def restart_before_the_install_is_replayed(self) -> None:
        # The head is repacked: what the segment replaces may now end inside a chunk.
        self.restart()

    @precondition(lambda self: self.scan is None)
    @rule()
    def start_scan(self) -> None:
        self.scan = Scan(set(self.rows))

    @precondition(lambda self: self.scan is not None)
    @rule(count=st.integers(1, 30))
    def go_on_with_scan(self, count: int) -> None:
        assert self.scan is not None
        self.scan.cursor, found = self.index.scan(self.scan.cursor, count)
        assert len(found) <= count
        assert set(found) <= set(self.rows)
        self.scan.returned |= set(found)
        if self.scan.cursor == 0:
            assert self.scan.returned >= self.scan.throughout
            self.scan = None

    @rule(count=st.integers(1, 30))
    def scan_at_once(self, count: int) -> None:
        cursor, found = self.index.scan(0, count)
        while cursor:
            cursor, more = self.index.scan(cursor, count)
            found += more
        assert sorted(found) == sorted(self.rows)

    @rule(target=moments)
    def look(self) -> Moment:
        return Moment(self.index.view(self.lsn), dict(self.rows))

    @rule(moment=moments, query=vectors, k=st.integers(1, 50))
    def search_as_of(self, moment: Moment, query: list[float], k: int) -> None:
        self.compare(moment, np.array(query, np.float32), k)

    @rule(query=vectors, k=st.integers(1, 50))
    def search_now(self, query: list[float], k: int) -> None:
        self.compare(Moment(self.index.view(self.lsn), self.rows), np.array(query, np.float32), k)

    def compare(self, moment: Moment, query: Floats, k: int) -> None:
        names = sorted(moment.rows, key=lambda key: moment.rows[key].born)
        matrix = np.array([moment.rows[key].vector for key in names], np.float32).reshape(-1, 3)
        expected = [(names[row], d) for row, d in self.nearest(self.metric, matrix, query, k)]
        (result,) = search_batch([moment.view], query[None], SearchOptions(k), 0)
        distances = [float(np.float32(text)) for text in result.distances]
        assert list(zip(result.keys, distances, strict=True)) == expected

    @invariant()
    def the_index_holds_what_the_dict_does(self) -> None:
        index = self.index
        assert len(index) == len(self.rows)
        assert index.rows_total == index.rows_unindexed + sum(segment.rows for segment in index.segments)
        assert index.rows_dead == index.rows_total - len(index) >= 0
        assert index.needs_maintenance == (index.plan() is not None)
        assert index.optimized == (index.plan_optimization() is None)
        statistics = index.statistics()
        assert statistics.live_rows == len(self.rows)
        assert (statistics.dead_rows, statistics.head_rows) == (index.rows_dead, index.rows_unindexed)
        assert statistics.segments == len(statistics.curves) == len(index.segments)
        assert statistics.rows_awaiting_graph <= statistics.head_rows
        for key in KEYS:
            row = self.rows.get(key)
            assert (key in index) == (row is not None)
            assert index.attributes(key) == (row.attributes or b"" if row else b"")
            assert index.vector(key) == (row.vector.tobytes() if row else None)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_is_a_dict_searched_by_brute_force(
    metric: str, store: SegmentStore, build: Build, nearest: Nearest
) -> None:
    class Machine(IndexMachine):
        def __init__(self) -> None:
            super().__init__(metric, store, build, nearest)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def index_of(rows: Floats, seal_rows: int, **more: int) -> VectorIndex:
    index = VectorIndex(1, default_parameters(rows.shape[1], "cosine"), seal_rows=seal_rows, **more)
    index.add(2, [b"%d" % row for row in range(len(rows))], rows)
    return index


def maintained(index: VectorIndex, build: Build, lsn: int = 100) -> VectorIndex:
    while index.needs_maintenance:
        build(index).install(lsn, index)
    return index


def test_the_last_of_equal_keys_in_one_call_counts() -> None:
    index = VectorIndex(1, default_parameters(2, "l2"))
    matrix = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert index.add(2, [b"a", b"b", b"a", b"b"], matrix, [b"1", b"2", b"3", None]) == 2
    assert index.vector(b"a") == matrix[2].tobytes()
    assert index.vector(b"b") == matrix[3].tobytes()
    assert (index.attributes(b"a"), index.attributes(b"b")) == (b"3", b"")
    assert (len(index), index.rows_total) == (2, 2)


def test_all_of_the_head_is_sealed(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(70, 4), seal_rows=64)
    plan = index.plan()
    assert plan is not None
    assert plan.through == 69
    assert [count for _, count in plan.chunks] == [32, 32, 6]
    # What comes while the graph is built stays in the head.
    index.add(3, [b"later"], clustered(1, 4))
    build(index, plan).install(4, index)
    assert (index.rows_unindexed, len(index)) == (1, 71)
    assert index.vector(b"later") == clustered(1, 4).tobytes()
    assert index_of(clustered(63, 4), seal_rows=64).plan() is None


def test_a_large_backlog_is_sealed_in_parts(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(1000, 4), seal_rows=64)
    plan = index.plan()
    assert plan is not None
    assert plan.through == 4 * 64 - 1
    maintained(index, build)
    assert index.rows_unindexed < 64


def test_segments_of_one_size_are_merged_up_to_a_limit(clustered: Clustered, build: Build) -> None:
    matrix = clustered(992, 4)
    index = VectorIndex(1, default_parameters(4, "cosine"), seal_rows=16, largest_segment=256)
    for start in range(0, len(matrix), 16):
        index.add(start, [b"%d" % row for row in range(start, start + 16)], matrix[start : start + 16])
        maintained(index, build, start)
    sizes = [installed.rows for installed in index.segments]
    assert sum(sizes) == 992
    assert 0.9 * 256 <= max(sizes) <= 256
    assert len(sizes) <= 992 // 230 + 4
    starts = [int(installed.segment.row_ids[0]) for installed in index.segments]
    assert starts == sorted(starts)


def test_a_segment_with_many_dead_rows_is_rebuilt(clustered: Clustered, build: Build) -> None:
    index = maintained(index_of(clustered(64, 4), seal_rows=64), build)
    index.delete(101, [b"%d" % row for row in range(12)])
    assert not index.needs_maintenance
    index.delete(102, [b"12"])
    plan = index.plan()
    assert plan is not None
    assert [source.id for source in plan.sources] == [index.segments[0].id]
    maintained(index, build)
    assert [(installed.rows, installed.dead) for installed in index.segments] == [(51, 0)]


def test_rows_that_are_all_dead_go_without_a_segment(clustered: Clustered, build: Build) -> None:
    index = maintained(index_of(clustered(64, 4), seal_rows=64), build)
    index.delete(101, [b"%d" % row for row in range(64)])
    old = index.segments[0].id
    built = build(index)
    assert built.segment is None
    assert built.install(102, index) == [old]
    assert (index.segments, index.rows_total) == ((), 0)


def test_views_are_told_apart_when_rows_go_without_a_segment(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(70, 4), seal_rows=64)
    before = index.view(2)
    index.delete(3, [b"%d" % row for row in range(64)])
    build(index).install(4, index)
    assert index.view(4).generation != before.generation


def test_a_segment_of_another_index_is_refused(clustered: Clustered, build: Build) -> None:
    built = build(index_of(clustered(64, 4), seal_rows=64))
    other = VectorIndex(9, default_parameters(4, "cosine"), seal_rows=64)
    with pytest.raises(DamagedDataError, match="not a segment of index 9"):
        other.install(5, built.segment, built.through, ())


def test_a_segment_that_is_not_there_cannot_be_replaced(clustered: Clustered) -> None:
    index = index_of(clustered(4, 4), seal_rows=64)
    with pytest.raises(ValueError, match="0123"):
        index.install(3, None, -1, ["0123"])


def test_high_dimensions_are_sealed_before_they_fill_the_memory() -> None:
    index = VectorIndex(1, default_parameters(65536, "l2"))
    random = np.random.default_rng(0).normal(size=(512, 65536)).astype(np.float32)
    index.add(2, [b"%d" % row for row in range(511)], random[:511])
    assert not index.needs_maintenance
    index.add(3, [b"511"], random[511:])
    assert index.needs_maintenance


def test_a_segment_may_have_a_single_row(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(64, 4), seal_rows=64)
    index.delete(3, [b"%d" % row for row in range(63)])
    maintained(index, build)
    assert [installed.rows for installed in index.segments] == [1]
    (result,) = search_batch([index.view(101)], clustered(1, 4), SearchOptions(5), 0)
    assert result.keys == [b"63"]


def test_a_scan_over_dead_rows_returns_the_living(clustered: Clustered) -> None:
    index = index_of(clustered(20_000, 2), seal_rows=1 << 20)
    index.delete(3, [b"%d" % row for row in range(19_990)])
    cursor, found = index.scan(0, 4)
    assert found == [b"19996", b"19997", b"19998", b"19999"]
    found, pages = [], 0
    while cursor:
        cursor, more = index.scan(cursor, 6)
        found += more
        pages += 1
    assert found == [b"%d" % row for row in range(19_990, 19_996)]
    assert pages < 10


def test_a_scan_beside_overwrites_returns_each_key_once(clustered: Clustered, store: SegmentStore) -> None:
    index = index_of(clustered(20, 2), seal_rows=64)
    vectors = clustered(20, 2)
    found: list[bytes] = []
    cursor = 0
    for turn in range(4):
        cursor, more = index.scan(cursor, 5)
        found += more
        index.add(3 + 2 * turn, [b"%d" % row for row in range(20)], vectors)
        index.add(4 + 2 * turn, [b"new-%d" % turn], vectors[:1])
    assert cursor == 0
    assert sorted(found) == sorted(b"%d" % row for row in range(20))
    restored = copy_of(index, store)
    cursor, found = restored.scan(0, 23)
    assert sorted(found + restored.scan(cursor, 1)[1]) == sorted(index.live)


def test_a_view_tells_which_rows_come_later(clustered: Clustered) -> None:
    index = index_of(clustered(10, 2), seal_rows=64)
    view = index.view(2)
    index.add(3, [b"new"], clustered(1, 2))
    assert (view.next_row, index.next_row, index.live[b"new"]) == (10, 11, 10)


def test_statistics_tell_rows_and_bytes_apart(clustered: Clustered, build: Build) -> None:
    matrix = clustered(70, 4)
    index = maintained(index_of(matrix, seal_rows=64), build)
    index.add(101, [b"0", b"new"], matrix[:2])
    statistics = index.statistics()
    assert (statistics.live_rows, statistics.dead_rows, statistics.head_rows) == (71, 1, 2)
    assert (statistics.segments, statistics.rows_awaiting_graph) == (1, 0)
    (segment,) = index.segments
    folder = segment.segment.path
    assert statistics.bytes_mapped == sum(path.stat().st_size for path in folder.iterdir())
    assert statistics.curves == ((70, segment.segment.curve),)
    waiting = index_of(matrix, seal_rows=64).statistics()
    assert (waiting.rows_awaiting_graph, waiting.bytes_mapped, waiting.curves) == (70, 0, ())


def test_bytes_in_memory_are_about_what_is_allocated(clustered: Clustered) -> None:
    matrix = clustered(50_000, 16)
    tracemalloc.start()
    index = VectorIndex(1, default_parameters(16, "cosine"), seal_rows=1 << 20)
    index.add(2, [b"a-key-of-some-length-%d" % row for row in range(len(matrix))], matrix)
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.statistics().bytes_in_memory == pytest.approx(allocated, rel=0.2)


def test_what_was_taken_for_rows_that_do_not_come_is_given_back(clustered: Clustered) -> None:
    matrix = clustered(50_000, 16)
    index = VectorIndex(1, default_parameters(16, "cosine"))
    index.add(2, [b"first"], matrix[:1])
    tracemalloc.start()
    index.prepare_addition([b"%d" % row for row in range(len(matrix))], matrix)
    allocated, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The last chunk has grown, and stays.
    assert peak > matrix.nbytes
    assert allocated < matrix.nbytes / 8


def test_an_optimized_index_is_left_alone(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(2000, 4), seal_rows=16, largest_segment=256)
    build(index, index.plan_optimization()).install(3, index)
    assert index.optimized
    assert [installed.rows for installed in index.segments] == [2000]
    assert not index.needs_maintenance
    index.add(4, [b"new-%d" % row for row in range(300)], clustered(300, 4))
    maintained(index, build)
    assert index.segments[0].rows == 2000


def test_an_index_of_few_rows_can_be_optimized(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(3, 4), seal_rows=64)
    build(index, index.plan_optimization()).install(3, index)
    assert (index.rows_unindexed, [installed.rows for installed in index.segments]) == (0, [3])
    (result,) = search_batch([index.view(101)], clustered(1, 4), SearchOptions(5), 0)
    assert result.keys[0] == b"0"


def test_an_index_without_rows_is_optimized() -> None:
    assert VectorIndex(1, default_parameters(4, "cosine")).plan_optimization() is None


def test_overwriting_everything_leaves_few_dead_rows(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(400, 4), seal_rows=32)
    for lsn in range(3, 8):
        rows = clustered(400, 4, seed=lsn)
        for start in range(0, 400, 50):
            index.add(lsn, [b"%d" % row for row in range(start, start + 50)], rows[start : start + 50])
            if start % 100:
                maintained(index, build, lsn)
    assert all(installed.dead <= 0.2 * installed.rows for installed in index.segments)
    assert index.rows_total <= 1.25 * len(index) + 2 * 32


def test_a_view_of_the_past_shows_what_there_was(clustered: Clustered, nearest: Nearest) -> None:
    rows = clustered(60, 4)
    index = VectorIndex(1, default_parameters(4, "cosine"), seal_rows=16)
    alive: list[dict[bytes, Floats]] = [{}, {}]
    for lsn in range(2, 62):
        row = rows[lsn - 2]
        key = b"%d" % (lsn % 17)
        now = dict(alive[-1])
        if lsn % 5 == 0 and key in now:
            index.delete(lsn, [key])
            del now[key]
        else:
            index.add(lsn, [key], row[None])
            now[key] = row
        alive.append(now)
    for lsn in (1, 2, 3, 20, 40, 60, 61):
        (result,) = search_batch([index.view(lsn)], rows[:1], SearchOptions(100), 0)
        assert sorted(result.keys) == sorted(alive[lsn])


def test_the_past_before_a_segment_cannot_be_viewed(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(70, 4), seal_rows=64)
    assert index.oldest_view == index.id
    build(index).install(9, index)
    assert index.oldest_view == 9


def test_vectors_of_rows_come_in_the_order_asked_for(clustered: Callable[..., Floats], build: Build) -> None:
    """From segments and the head, as they were in the view."""
    rows = clustered(300, 4)
    index = VectorIndex(1, default_parameters(4, "l2"), seal_rows=64)
    index.add(2, [b"%d" % row for row in range(250)], rows[:250])
    build(index).install(3, index)
    assert index.segments
    index.add(4, [b"%d" % row for row in range(250, 290)], rows[250:290])
    view = index.view(4)
    index.add(5, [b"%d" % row for row in range(290, 300)], rows[290:])
    order = [289, -1, 3, 250, 3, 249, 0]
    expected = [None if row < 0 else rows[row].tobytes() for row in order]
    assert view.vectors_of(order) == expected
    assert VectorIndex(1, default_parameters(4, "l2")).view(1).vectors_of([-1]) == [None]
