from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from engram.files import DiskFiles
from engram.index.build_process import BuildJob, build_segment
from engram.index.builder import live_rows
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import Plan, VectorIndex

Floats = npt.NDArray[np.float32]
Nearest = Callable[[str, Floats, Floats, int], list[tuple[int, float]]]
Clustered = Callable[..., Floats]


@pytest.fixture
def store(tmp_path: Path) -> SegmentStore:
    return SegmentStore(tmp_path, DiskFiles(), 1)


@pytest.fixture(scope="session")
def clustered() -> Clustered:
    """Rows around a few hundred directions, as embeddings are; `spread` lets norms vary by that factor."""

    def make(rows: int, dimension: int, *, seed: int = 0, spread: float = 1.0) -> Floats:
        # The directions are the same for every seed, so that rows and queries are of one kind.
        centers = np.random.default_rng(99).normal(size=(200, dimension))
        random = np.random.default_rng(seed)
        made = centers[random.integers(0, len(centers), rows)] + random.normal(size=(rows, dimension))
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        if spread > 1.0:
            made *= np.exp(random.uniform(0.0, np.log(spread), (rows, 1)))
        return made.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def nearest() -> Nearest:
    """Brute force in float64: row and float32 distance of the k nearest, of equal ones the older first.

    It sums in another order: rows that differ by less than float64 tells may change places. `exact.py` has an
    oracle for such.
    """

    def search(metric: str, rows: Floats, query: Floats, k: int) -> list[tuple[int, float]]:
        wide, asked = rows.astype(np.float64), query.astype(np.float64)
        if metric == "l2":
            distances = np.sqrt(((wide - asked) ** 2).sum(axis=1))
            shown = distances.astype(np.float32)
        else:
            products = (wide * asked).sum(axis=1)
            distances = -products
            shown = distances.astype(np.float32)
            if metric == "cosine":
                lengths = np.sqrt((wide**2).sum(axis=1)) * np.sqrt((asked**2).sum())
                cosines = np.divide(products, lengths, out=np.zeros(len(rows)), where=lengths > 0)
                distances = np.rint((1.0 - cosines) * 2.0**50)
                shown = np.float32(1.0) - cosines.astype(np.float32)
        order = np.lexsort((np.arange(len(rows)), distances))[:k]
        return [(int(row), float(shown[row])) for row in order]

    return search


@attrs.frozen
class Built:
    """A segment that is ready to be installed."""

    segment: Segment | None
    through: int
    replaces: Sequence[str]

    def install(self, lsn: int, index: VectorIndex) -> list[str]:
        return index.install(lsn, self.segment, self.through, self.replaces)


Build = Callable[..., Built]


@pytest.fixture
def build(store: SegmentStore) -> Build:
    """Builds what an index plans, or the plan that is given, in this process."""

    def build_planned(index: VectorIndex, plan: Plan | None = None) -> Built:
        plan = plan or index.plan()
        assert plan is not None
        name = secrets.token_hex(8)
        segment: Segment | None = None
        if store.write_rows(name, live_rows(plan)):
            parameters: dict[str, Any] = attrs.asdict(index.parameters)
            result = build_segment(BuildJob(str(store.folder), name, index.id, **parameters))
            segment = store.open(name, result.checksum)
        return Built(segment, plan.through, tuple(source.id for source in plan.sources))

    return build_planned
