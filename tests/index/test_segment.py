from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from engram.errors import DamagedDataError
from engram.files import DiskFiles
from engram.index.builder import live_rows
from engram.index.graph import Graph
from engram.index.parameters import default_parameters
from engram.index.row_columns import StringColumn
from engram.index.search import SearchOptions, search_batch
from engram.index.segment import GRAPH, Segment, SegmentStore
from engram.index.texts import Positions, Selection, Texts
from engram.index.vector_index import VectorIndex
from engram.progress import InterruptedWorkError, Progress
from tests.index.conftest import Build

Floats = npt.NDArray[np.float32]


@pytest.fixture
def index(clustered: Callable[..., Floats]) -> VectorIndex:
    rows = clustered(128, 8)
    index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=128)
    index.add(
        2, [b"k%d" % row for row in range(128)], rows, [b"{}" if row % 2 else None for row in range(128)]
    )
    return index


@pytest.fixture
def segment(index: VectorIndex, build: Callable[[VectorIndex], Any]) -> Segment:
    built: Segment = build(index).segment
    return built


def test_a_segment_holds_the_rows_it_was_made_of(
    segment: Segment, index: VectorIndex, clustered: Callable[..., Floats]
) -> None:
    positions = np.array([0, 127, 5, 5])
    assert segment.row_ids.tolist() == list(range(128))
    assert np.array_equal(segment.vectors, clustered(128, 8))
    assert segment.keys_at(positions) == [b"k0", b"k127", b"k5", b"k5"]
    assert segment.attributes_at(positions) == [b"", b"{}", b"{}", b"{}"]
    assert segment.position(77) == 77
    assert segment.norms_at(positions) == pytest.approx(1.0)
    assert segment.index_id == index.id
    assert len(segment.graphs) == 1
    assert not segment.vectors.flags.writeable


@pytest.mark.parametrize(
    "name",
    [
        "columns.json",
        "graph.usearch",
        "vectors.npy",
        "norms.npy",
        "row-ids.npy",
        "keys-bytes.npy",
        "keys-ends.npy",
        "attributes-bytes.npy",
        "attributes-ends.npy",
        "center.npy",
    ],
)
class TestDamage:
    @pytest.fixture
    def unopened(self, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing of a segment that has been damaged may reach usearch."""

        def refuse(*_: object) -> Graph:
            raise AssertionError("the graph was opened")

        monkeypatch.setattr(Graph, "open", refuse)

    @pytest.mark.usefixtures("unopened")
    def test_a_flipped_bit_is_refused(self, segment: Segment, store: SegmentStore, name: str) -> None:
        path = segment.path / name
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(DamagedDataError, match=name):
                store.open(segment.id, segment.checksum)

    @pytest.mark.usefixtures("unopened")
    def test_a_file_cut_short_is_refused(self, segment: Segment, store: SegmentStore, name: str) -> None:
        path = segment.path / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DamagedDataError, match=name):
            store.open(segment.id, segment.checksum)

    @pytest.mark.usefixtures("unopened")
    def test_a_missing_file_is_refused(self, segment: Segment, store: SegmentStore, name: str) -> None:
        (segment.path / name).unlink()
        with pytest.raises(DamagedDataError, match=name):
            store.open(segment.id, segment.checksum)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


class TestReopening:
    """A segment that was on disk when the process began: its vectors are verified later, the rest at once."""

    @pytest.fixture
    def later(self, store: SegmentStore) -> SegmentStore:
        return SegmentStore(store.folder, DiskFiles(), 1)

    def test_vectors_are_verified_when_asked(self, segment: Segment, later: SegmentStore) -> None:
        reopened = later.take(segment.id, segment.checksum)
        flip(segment.path / "vectors.npy", -1)
        for _ in range(2):
            with pytest.raises(DamagedDataError, match=r"vectors\.npy: checksum mismatch"):
                later.verify(reopened)
        flip(segment.path / "vectors.npy", -1)
        later.verify(reopened)
        flip(segment.path / "vectors.npy", -1)
        later.verify(reopened)

    def test_what_was_built_here_is_not_read_again(self, segment: Segment, store: SegmentStore) -> None:
        flip(segment.path / "vectors.npy", -1)
        store.verify(segment)

    @pytest.mark.parametrize(
        ("old", "new"), [(b"<f4", b"<i4"), (b"128, 8", b"64, 16"), (b"128, 8", b"8, 128")]
    )
    def test_vectors_of_another_shape_are_refused_at_once(
        self, segment: Segment, later: SegmentStore, old: bytes, new: bytes
    ) -> None:
        path = segment.path / "vectors.npy"
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(DamagedDataError, match=r"vectors\.npy: does not hold 128 rows of 8 float32"):
            later.take(segment.id, segment.checksum)

    @pytest.mark.parametrize("name", ["graph.usearch", "norms.npy", "keys-bytes.npy"])
    def test_other_damage_is_found_by_the_thread_and_told_by_take(
        self, segment: Segment, later: SegmentStore, name: str
    ) -> None:
        flip(segment.path / name, -1)
        with (
            later.reopening({segment.id: segment.checksum}),
            pytest.raises(DamagedDataError, match=rf"{name}: checksum mismatch"),
        ):
            later.take(segment.id, segment.checksum)

    def test_many_are_opened_together_and_counted(self, segment: Segment) -> None:
        progress = Progress()
        later = SegmentStore(segment.path.parent, DiskFiles(), 1, progress)
        with later.reopening({segment.id: segment.checksum}):
            assert later.take(segment.id, segment.checksum).row_ids.tolist() == segment.row_ids.tolist()
        assert (progress.doing, progress.done, progress.total) == ("opening segments", *[segment.size] * 2)

    def test_an_interruption_ends_the_opening(self, segment: Segment) -> None:
        progress = Progress()
        later = SegmentStore(segment.path.parent, DiskFiles(), 1, progress)
        with later.reopening({segment.id: segment.checksum}):
            progress.interrupted = True
            with pytest.raises(InterruptedWorkError, match=r"^ended while opening segments$"):
                later.take(segment.id, segment.checksum)


def test_each_worker_has_a_view_of_its_own(segment: Segment, store: SegmentStore) -> None:
    opened = SegmentStore(store.folder, DiskFiles(), 3).open(segment.id, segment.checksum)
    assert len(set(opened.graphs)) == 3


def test_without_workers_no_graph_is_opened(
    segment: Segment, store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "open", None)
    opened = SegmentStore(store.folder, DiskFiles(), 0).open(segment.id, segment.checksum)
    assert opened.graphs == ()
    assert opened.keys_at(np.array([3])) == [b"k3"]


def test_a_removed_segment_can_be_searched_while_it_is_used(
    index: VectorIndex,
    build: Callable[[VectorIndex], Any],
    store: SegmentStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engram.index.planner.SCAN_ROWS_PER_EXPANSION", 0)
    build(index).install(3, index)
    (installed,) = index.segments
    store.remove(installed.id)
    assert not any(store.folder.iterdir())
    query = installed.segment.vectors[9:10]
    (result,) = search_batch([index.view(3)], query, SearchOptions(1, ef=16), 0)
    assert result.keys == [b"k9"]


def test_an_adopted_segment_is_taken_once(segment: Segment, store: SegmentStore) -> None:
    store.adopt(segment)
    assert store.take(segment.id, segment.checksum) is segment
    assert store.take(segment.id, segment.checksum) is not segment
    store.adopt(segment)
    store.discard(segment.id)
    assert store.take(segment.id, segment.checksum) is not segment


def test_removing_takes_what_is_finished_and_what_is_not(segment: Segment, store: SegmentStore) -> None:
    shutil.copytree(segment.path, store.building(segment.id))
    store.remove(segment.id)
    assert list(store.folder.iterdir()) == []
    store.remove(segment.id)


def test_a_segment_is_open_as_long_as_anything_refers_to_it(segment: Segment, store: SegmentStore) -> None:
    other: Segment | None = store.open(segment.id, segment.checksum)
    assert other is not None
    assert store.is_open(segment.id)
    other = None
    assert not store.is_open(segment.id)
    assert not store.is_open("unknown")


def test_the_size_of_a_segment_is_that_of_its_files(segment: Segment, store: SegmentStore) -> None:
    assert store.size(segment.id) == segment.size > 128 * 8 * 4
    store.remove(segment.id)
    assert store.size(segment.id) == 0


def test_no_rows_leave_no_folder(store: SegmentStore, tmp_path: Path) -> None:
    assert store.write_rows("0123", []) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sealed", [False, True])
def test_writing_rows_takes_little_memory_however_much_they_are(
    store: SegmentStore, build: Build, sealed: bool
) -> None:
    rows, dimension, text = 800, 4096, b"x" * 12_000
    index = VectorIndex(1, attrs.evolve(default_parameters(dimension, "l2"), quantization="f32"))
    texts = [b'{"%d":"%s"}' % (row, text) for row in range(rows)]
    vectors = np.arange(rows * dimension, dtype=np.float32).reshape(rows, dimension)
    index.add(2, [b"%d" % row for row in range(rows)], vectors, texts)
    plan = index.plan_optimization()
    assert plan is not None
    parts = live_rows(plan)
    if sealed:
        assert store.write_rows("first", parts) == rows
        folder = store.building("first")
        source = Rows(
            np.load(folder / "row-ids.npy"),
            np.load(folder / "vectors.npy", mmap_mode="r").view(np.ndarray),
            read_texts(folder, "keys"),
            read_texts(folder, "attributes"),
        )
        # Nothing follows what was next to it.
        parts = [(source, np.flatnonzero(np.arange(rows) % 7 < 6))]
    tracemalloc.start()
    try:
        store.write_rows("second", parts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    written = read_texts(store.building("second"), "attributes")
    kept = [row for row in range(rows) if not sealed or row % 7 < 6]
    assert written.all() == [texts[row] for row in kept]
    assert np.array_equal(np.load(store.building("second") / "vectors.npy"), vectors[kept])
    assert peak < 8 << 20


@attrs.frozen
class Rows:
    """Rows as a segment has them."""

    row_ids: npt.NDArray[np.int64]
    vectors: Floats
    keys: Texts
    attributes: Texts

    def strings_at(self, column: StringColumn, positions: Positions) -> list[bytes]:
        return self.strings_of(column, positions).texts.at(positions)

    def strings_of(self, column: StringColumn, positions: Positions) -> Selection:
        return Selection(getattr(self, column.name), positions)


def read_texts(folder: Path, name: str) -> Texts:
    return Texts(np.load(folder / f"{name}-bytes.npy"), np.load(folder / f"{name}-ends.npy"))


def test_the_size_of_what_is_being_removed(
    segment: Segment, store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.size(segment.id) == segment.size
    scan = os.scandir

    def vanish(path: Path) -> Iterator[Any]:
        entries = list(scan(path))
        for name in (GRAPH, "vectors.npy"):
            (segment.path / name).unlink()
        return nullcontext(entries)  # type: ignore[return-value]

    gone = sum((segment.path / name).stat().st_size for name in (GRAPH, "vectors.npy"))
    monkeypatch.setattr(os, "scandir", vanish)
    assert store.size(segment.id) == segment.size - gone
    monkeypatch.undo()
    store.remove(segment.id)
    assert store.size(segment.id) == 0
