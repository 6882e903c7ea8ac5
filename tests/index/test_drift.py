"""An index whose rows are all overwritten, again and again, stays as good and as small as a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from engram.index import planner, recall
from engram.index.merging import DEAD_FRACTION
from engram.index.parameters import Parameters
from engram.index.search import SearchOptions, search_batch
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex

Floats = npt.NDArray[np.float32]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]
Clustered = Callable[..., Floats]
Build = Callable[..., Any]

ROWS = 2000
DIMENSION = 32
SEAL_ROWS = 512
# Rows that are overwritten between two looks at what is to be built.
BATCH = 600
ROUNDS = 10

QUERIES = 1000
WIDTH = 64
TARGET = 0.99
MOST_DRIFT = 0.005


@attrs.define
class Library:
    """An index and its folder, as the builder and the server look after them."""

    store: SegmentStore
    build: Build
    index: VectorIndex = attrs.field(
        factory=lambda: VectorIndex(
            1, Parameters(DIMENSION, "cosine", 8, 40, "int8", TARGET), seal_rows=SEAL_ROWS
        )
    )
    lsn: int = 1

    def overwrite(self, order: npt.NDArray[np.int64], rows: Floats) -> None:
        """Gives key `n` row n, in this order, with builds in between."""
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            self.lsn += 1
            self.index.add(self.lsn, [b"%d" % number for number in part.tolist()], rows[part])
            while self.index.needs_maintenance:
                self.install(self.build(self.index))

    def optimize(self) -> None:
        if not self.index.optimized:
            self.install(self.build(self.index, self.index.plan_optimization()))

    def install(self, built: Any) -> None:
        self.lsn += 1
        for name in built.install(self.lsn, self.index):
            self.store.remove(name)

    def recall(self, queries: Floats, truths: list[set[bytes]], options: SearchOptions) -> float:
        views = [self.index.view(self.lsn)] * len(queries)
        results = search_batch(views, queries, options, 0)
        found = sum(len(truth & set(result.keys)) for truth, result in zip(truths, results, strict=True))
        return found / sum(map(len, truths))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are searched as if they were many times larger: none of some hundred rows is scanned."""
    monkeypatch.setattr(recall, "SCAN_ROWS_PER_EXPANSION", 2)
    monkeypatch.setattr(planner, "SCAN_ROWS_PER_EXPANSION", 2)


@pytest.mark.usefixtures("walked")
def test_ten_rounds_of_overwriting_leave_an_index_as_a_fresh_one(
    store: SegmentStore, build: Build, clustered: Clustered, nearest: Nearest
) -> None:
    random = np.random.default_rng(7)
    changed = Library(store, build)
    for number in range(1 + ROUNDS):
        rows = clustered(ROWS, DIMENSION, seed=number)
        changed.overwrite(random.permutation(ROWS), rows)
        index = changed.index
        segments = index.segments
        assert all(installed.dead <= DEAD_FRACTION * installed.rows for installed in segments)
        assert {path.name for path in store.folder.iterdir()} == {installed.id for installed in segments}
        assert index.rows_dead <= DEAD_FRACTION * sum(installed.rows for installed in segments) + SEAL_ROWS
    fresh = Library(store, build)
    fresh.overwrite(np.arange(ROWS), rows)

    queries = clustered(QUERIES, DIMENSION, seed=100)
    truths = [{b"%d" % row for row, _ in nearest("cosine", rows, query, 10)} for query in queries]
    assert changed.recall(queries, truths, SearchOptions(10)) >= TARGET - MOST_DRIFT
    # Walks of one width can be compared where both have all rows in one graph.
    changed.optimize()
    fresh.optimize()
    wide = SearchOptions(10, ef=WIDTH)
    drift = fresh.recall(queries, truths, wide) - changed.recall(queries, truths, wide)
    assert abs(drift) <= MOST_DRIFT
