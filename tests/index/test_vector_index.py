from __future__ import annotations

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
from engram.index.parameters import default_parameters
from engram.index.search import search_batch
from engram.index.segment import SegmentStore
from engram.index.vector_index import IndexState, MergePlan, SealPlan, VectorIndex, View

Floats = npt.NDArray[np.float32]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]
Clustered = Callable[..., Floats]
Build = Callable[[VectorIndex], Any]

SEAL_ROWS = 16
KEYS = [b"key-%d" % number for number in range(80)]

keys = st.sampled_from(KEYS)
# Few different vectors: many ties, many duplicates, and the zero vector.
vectors = st.lists(st.sampled_from([-2.0, 0.0, 1.0, 300.0]), min_size=3, max_size=3)
rows = st.lists(
    st.tuples(keys, vectors, st.sampled_from([None, b'{"a":1}', b'{"b":"x"}'])), min_size=1, max_size=12
)


def copy_of(index: VectorIndex, store: SegmentStore, seal_rows: int = SEAL_ROWS) -> VectorIndex:
    """What a restart makes of the index."""
    state = index.export()
    (restored,) = IndexState.unpack([state.describe()], IndexState.pack([state]))
    return VectorIndex.restore(restored, store, seal_rows=seal_rows)


@attrs.frozen
class Row:
    born: int
    vector: Floats
    attributes: bytes | None


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
        self.index = VectorIndex(1, default_parameters(3, metric), seal_rows=SEAL_ROWS)
        self.rows: dict[bytes, Row] = {}
        self.lsn = 1
        self.born = 0
        self.pending: Any = None

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

    @precondition(lambda self: self.pending is not None)
    @rule()
    def finish_build(self) -> None:
        self.lsn += 1
        assert self.pending.install(self.lsn, self.index) == list(self.pending.replaces)
        self.pending = None

    @precondition(lambda self: self.pending is None)
    @rule()
    def restart(self) -> None:
        self.index = copy_of(self.index, self.store)

    @precondition(lambda self: self.pending is not None)
    @rule()
    def restart_before_the_install_is_replayed(self) -> None:
        # The head is repacked: what the segment replaces may now end inside a chunk.
        self.index = copy_of(self.index, self.store)

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
        (result,) = search_batch([moment.view], query[None], k, None, 0)
        distances = [float(np.float32(text)) for text in result.distances]
        assert list(zip(result.keys, distances, strict=True)) == expected

    @invariant()
    def the_index_holds_what_the_dict_does(self) -> None:
        index = self.index
        assert len(index) == len(self.rows) == index.view(self.lsn).live
        assert index.rows_total == index.rows_unindexed + sum(segment.rows for segment in index.segments)
        assert index.rows_dead == index.rows_total - len(index) >= 0
        assert index.needs_maintenance == (index.plan() is not None)
        for key in KEYS:
            row = self.rows.get(key)
            assert (key in index) == (row is not None)
            vector = index.vector(key)
            assert index.attributes(key) == (row.attributes if row else None)
            assert (None if vector is None else vector.tolist()) == (row.vector.tolist() if row else None)


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
    assert index.vector(b"a").tolist() == [4.0, 5.0]  # type: ignore[union-attr]
    assert index.vector(b"b").tolist() == [6.0, 7.0]  # type: ignore[union-attr]
    assert (index.attributes(b"a"), index.attributes(b"b")) == (b"3", None)
    assert (len(index), index.rows_total) == (2, 2)


def test_only_whole_chunks_are_sealed(clustered: Clustered) -> None:
    index = index_of(clustered(70, 4), seal_rows=64)
    plan = index.plan()
    assert isinstance(plan, SealPlan)
    assert plan.through == 63
    assert [chunk.count for chunk in plan.chunks] == [16, 16, 16, 16]
    assert index_of(clustered(63, 4), seal_rows=64).plan() is None


def test_a_large_backlog_is_sealed_in_parts(clustered: Clustered, build: Build) -> None:
    index = index_of(clustered(1000, 4), seal_rows=64)
    plan = index.plan()
    assert isinstance(plan, SealPlan)
    assert plan.through == 4 * 64 - 1
    maintained(index, build)
    assert index.rows_unindexed < 64


def test_segments_of_one_size_are_merged_up_to_a_limit(clustered: Clustered, build: Build) -> None:
    matrix = clustered(2000, 4)
    index = VectorIndex(1, default_parameters(4, "cosine"), seal_rows=16, largest_segment=256)
    for start in range(0, len(matrix), 16):
        index.add(start, [b"%d" % row for row in range(start, start + 16)], matrix[start : start + 16])
        maintained(index, build, start)
    sizes = [installed.rows for installed in index.segments]
    assert sum(sizes) == 2000
    # Of four adjacent segments the last may be a small one.
    assert 3 * 64 < max(sizes) <= 256
    assert len(sizes) <= 2000 // 208 + 5
    starts = [int(installed.segment.row_ids[0]) for installed in index.segments]
    assert starts == sorted(starts)


def test_a_segment_with_many_dead_rows_is_rebuilt(clustered: Clustered, build: Build) -> None:
    index = maintained(index_of(clustered(64, 4), seal_rows=64), build)
    index.delete(101, [b"%d" % row for row in range(12)])
    assert not index.needs_maintenance
    index.delete(102, [b"12"])
    plan = index.plan()
    assert isinstance(plan, MergePlan)
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
    (result,) = search_batch([index.view(101)], clustered(1, 4), 5, None, 0)
    assert result.keys == [b"63"]
