from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from engram.files import DiskFiles
from engram.index.parameters import default_parameters
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex
from engram.index.verification import Verification
from tests.index.conftest import Build


async def test_damage_is_logged_and_the_rest_is_still_read(
    store: SegmentStore,
    build: Build,
    clustered: Callable[..., npt.NDArray[np.float32]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    later = SegmentStore(store.folder, DiskFiles(), 1)
    segments = []
    for number in range(3):
        index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
        index.add(2, [b"%d" % row for row in range(64)], clustered(64, 8, seed=number))
        built = build(index).segment
        assert built is not None
        segments.append(later.take(built.id, built.checksum))
    damaged = segments[1].path / "vectors.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    verification = Verification(later, segments)
    assert verification.waiting == 3
    with caplog.at_level(logging.ERROR):
        await verification.run()
    assert verification.waiting == 0
    assert verification.damaged == [f"{damaged}: checksum mismatch"]
    assert [record.getMessage() for record in caplog.records] == [
        f"vectors are damaged: {damaged}: checksum mismatch; see `engram check`"
    ]
