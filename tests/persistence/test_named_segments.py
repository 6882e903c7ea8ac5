from __future__ import annotations

from engram.persistence.manifest import Manifest
from engram.persistence.named_segments import NamedSegments
from tests.persistence.parts import recovered

MIB = 1 << 20


def manifest(lsn: int, *segments: str) -> Manifest:
    return Manifest(first_log_file=2, lsn=lsn, segments=segments)


def test_segments_that_nothing_names_go() -> None:
    named = NamedSegments(recovered(manifest=manifest(5, "a", "b"), segments=((7, "c"),)))
    named.note(8, "d")
    assert named.replace(manifest(7, "b", "c")) == {"a"}
    # It could not be removed, and is named as outdated again.
    assert named.replace(manifest(8, "c", "d")) == {"a", "b"}
    named.removed("a")
    named.removed("b")
    assert named.replace(manifest(8, "c", "d")) == set()


def test_what_the_log_names_behind_a_snapshot_stays() -> None:
    named = NamedSegments(recovered())
    named.note(1, "a")
    named.note(3, "b")
    assert named.replace(manifest(2)) == {"a"}
    assert named.replace(manifest(3)) == {"a", "b"}


def test_too_much_is_more_than_64_mib_and_half_of_what_is_used() -> None:
    named = NamedSegments(recovered())
    named.release(1, 64 * MIB, 0)
    assert not named.too_many_released
    named.release(2, 1, 0)
    assert named.too_many_released
    named.release(3, 1, 200 * MIB)
    assert not named.too_many_released
    named.release(4, 40 * MIB, 200 * MIB)
    assert named.too_many_released


def test_what_a_snapshot_has_let_go_of_counts_no_longer() -> None:
    named = NamedSegments(recovered())
    named.release(1, 60 * MIB, 0)
    named.release(2, 60 * MIB, 0)
    assert named.too_many_released
    named.replace(manifest(1))
    assert not named.too_many_released
