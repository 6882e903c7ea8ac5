from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from engram.files import DiskFiles
from engram.index.parameters import default_parameters
from engram.index.segment import Segment, SegmentStore
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


@pytest.fixture
def reopened(
    store: SegmentStore, build: Build, clustered: Callable[..., npt.NDArray[np.float32]]
) -> tuple[SegmentStore, list[Segment]]:
    """A store as after a start, and two segments whose vectors have not been read."""
    later = SegmentStore(store.folder, DiskFiles(), 1)
    segments = []
    for number in range(2):
        index = VectorIndex(1, default_parameters(8, "cosine"), seal_rows=64)
        index.add(2, [b"%d" % row for row in range(64)], clustered(64, 8, seed=number))
        built = build(index).segment
        assert built is not None
        segments.append(later.take(built.id, built.checksum))
    return later, segments


async def test_a_segment_that_is_merged_away_before_its_turn_is_not_damaged(
    reopened: tuple[SegmentStore, list[Segment]], caplog: pytest.LogCaptureFixture
) -> None:
    store, segments = reopened
    in_use = set(segments)
    verification = Verification(store, segments, in_use.__contains__)
    in_use.discard(segments[0])
    store.remove(segments[0].id)
    await verification.run()
    assert (verification.damaged, verification.waiting, caplog.records) == ([], 0, [])


async def test_a_segment_that_is_merged_away_while_it_is_read_is_not_damaged(
    reopened: tuple[SegmentStore, list[Segment]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, segments = reopened
    in_use = set(segments)
    verify = store.verify

    def merge_away(segment: Segment) -> None:
        in_use.discard(segment)
        store.remove(segment.id)
        verify(segment)

    monkeypatch.setattr(store, "verify", merge_away)
    verification = Verification(store, segments, in_use.__contains__)
    await verification.run()
    assert (verification.damaged, verification.waiting, caplog.records) == ([], 0, [])


async def test_a_segment_that_nobody_has_is_let_go_of(
    reopened: tuple[SegmentStore, list[Segment]], caplog: pytest.LogCaptureFixture
) -> None:
    store, segments = reopened
    names = [segment.id for segment in segments]
    verification = Verification(store, segments)
    del segments[0]
    assert [store.is_open(name) for name in names] == [False, True]
    store.remove(names[0])
    await verification.run()
    assert (verification.damaged, caplog.records) == ([], [])


@pytest.mark.parametrize(
    "refusal", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start"), MemoryError()]
)
async def test_what_the_system_refuses_is_no_damage(
    reopened: tuple[SegmentStore, list[Segment]], refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, segments = reopened
    verify, tries = store.verify, list[Segment]()

    def refuse(segment: Segment) -> None:
        tries.append(segment)
        if len(tries) == 1:
            raise refusal
        verify(segment)

    monkeypatch.setattr(store, "verify", refuse)
    verification = Verification(store, segments)
    with pytest.raises(type(refusal)):
        await verification.run()
    await verification.run()
    assert tries == [segments[0], *segments]
    assert (verification.damaged, verification.waiting) == ([], 0)
