from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engram.temporary_folder import PREFIX, TemporaryFolder, remove_abandoned_folders

NOBODY = 65534

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give folders away")


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, meanwhile."""
    path = tmp_path / "temporary"
    path.mkdir()
    path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def folder() -> Iterator[TemporaryFolder]:
    made = TemporaryFolder()
    yield made
    made.close()


def state(path: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Everything in a folder, without following a link."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for each in sorted(path.rglob("*")):
        status = each.lstat()
        content: bytes | str = os.readlink(each) if each.is_symlink() else b""
        if each.is_file() and not each.is_symlink():
            content = each.read_bytes()
        found[str(each.relative_to(path))] = (status.st_mode, status.st_ino, content)
    return found


def test_it_is_private_and_goes_with_its_server(parent: Path) -> None:
    folder = TemporaryFolder()
    segments = folder.segments()
    assert [path.stat().st_mode & 0o777 for path in (segments, segments.parent)] == [0o700, 0o700]
    assert segments.parent.parent == parent
    assert folder.segments() == segments
    (segments / "segment").mkdir()
    (segments / "segment" / "file").write_bytes(b"x")
    folder.close()
    assert list(parent.iterdir()) == []


def test_it_is_locked_for_those_who_clean_up(folder: TemporaryFolder) -> None:
    descriptor = os.open(folder.segments().parent, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def test_what_was_cleaned_away_is_made_anew(parent: Path, folder: TemporaryFolder) -> None:
    first = folder.segments()
    first.rmdir()
    assert folder.segments() == first
    assert first.is_dir()
    shutil.rmtree(first.parent)
    second = folder.segments()
    assert second.is_dir()
    assert second.parent.stat().st_mode & 0o777 == 0o700
    assert list(parent.iterdir()) == [second.parent]


def test_a_folder_that_took_its_name_is_not_used(
    parent: Path, folder: TemporaryFolder, tmp_path: Path
) -> None:
    first = folder.segments().parent
    shutil.rmtree(first)
    (first / "segments").mkdir(parents=True)
    (first / "segments" / "trap").write_bytes(b"x")
    before = state(first)
    second = folder.segments().parent
    assert second != first
    shutil.rmtree(second)
    second.symlink_to(tmp_path)
    third = folder.segments().parent
    assert third not in (first, second)
    shutil.rmtree(third)
    third.symlink_to(first)
    folder.close()
    assert state(first) == before
    assert set(parent.iterdir()) == {first, second, third}


def test_without_room_for_another_it_is_tried_again(parent: Path, folder: TemporaryFolder) -> None:
    folder.segments()
    shutil.rmtree(parent)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            folder.segments()
    parent.mkdir()
    assert folder.segments().parent.parent == parent


def test_a_folder_that_cannot_be_removed_is_left(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    folder = TemporaryFolder()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", fail)
        folder.close()
    assert len(list(parent.iterdir())) == 1


# What others have left


def leave(parent: Path) -> Path:
    """A folder as a server leaves it that is killed."""
    path = parent / f"{PREFIX}left"
    (path / "segments" / "segment").mkdir(parents=True)
    path.chmod(0o700)
    for name in ("LOCK", "TEMPORARY", "segments/segment/vectors.npy"):
        (path / name).write_bytes(b"")
    return path


def test_what_a_killed_server_left_is_removed_and_no_link_in_it_followed(
    parent: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"x")
    left = leave(parent)
    (left / "segments" / "link").symlink_to(other)
    (left / "link").symlink_to(other)
    remove_abandoned_folders()
    assert list(parent.iterdir()) == []
    assert [path.name for path in other.iterdir()] == ["file"]


def test_what_cannot_be_removed_whole_can_be_later(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    left = leave(parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        remove_abandoned_folders()
    assert left.exists()
    remove_abandoned_folders()
    assert not left.exists()


def is_a_link(left: Path) -> None:
    target = left.parent.parent / "target"
    left.rename(target)
    left.symlink_to(target)


def has_a_link_for_a_lock(left: Path) -> None:
    (left / "LOCK").unlink()
    (left / "LOCK").symlink_to(left.parent.parent / "nologin")


def has_a_link_for_a_mark(left: Path) -> None:
    (left / "TEMPORARY").unlink()
    (left / "TEMPORARY").symlink_to(left / "LOCK")


def has_no_lock(left: Path) -> None:
    (left / "LOCK").unlink()


def has_no_mark(left: Path) -> None:
    (left / "TEMPORARY").unlink()


def has_a_pipe_for_a_lock(left: Path) -> None:
    (left / "LOCK").unlink()
    os.mkfifo(left / "LOCK")


def is_open_to_others(left: Path) -> None:
    left.chmod(0o777)


def is_anothers(left: Path) -> None:
    os.chown(left, NOBODY, NOBODY)


def has_anothers_lock(left: Path) -> None:
    is_anothers(left)
    has_a_link_for_a_lock(left)


@pytest.mark.parametrize(
    "make",
    [
        is_a_link,
        has_a_link_for_a_lock,
        has_a_link_for_a_mark,
        has_no_lock,
        has_no_mark,
        has_a_pipe_for_a_lock,
        is_open_to_others,
        pytest.param(is_anothers, marks=only_root),
        pytest.param(has_anothers_lock, marks=only_root),
    ],
)
def test_nothing_else_is_touched(make: Callable[[Path], None], parent: Path, tmp_path: Path) -> None:
    make(leave(parent))
    before = state(tmp_path)
    remove_abandoned_folders()
    assert state(tmp_path) == before


def test_a_file_of_such_a_name_is_no_trouble(parent: Path) -> None:
    (parent / f"{PREFIX}file").write_bytes(b"x")
    left = leave(parent)
    remove_abandoned_folders()
    assert not left.exists()


def test_a_folder_in_use_stays(parent: Path, folder: TemporaryFolder) -> None:
    segments = folder.segments()
    remove_abandoned_folders()
    assert segments.is_dir()
