from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engram import files as files_module
from engram.files import DiskFiles, read_file, replace_file, rewrite_file


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_created_file_is_allocated_and_private(tmp_path: Path) -> None:
    files = DiskFiles()
    path = tmp_path / "file"
    files.close(files.create(path, 100_000))
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 100_000
    assert status.st_blocks * 512 >= 100_000
    assert path.read_bytes() == bytes(100_000)
    with pytest.raises(FileExistsError):
        files.create(path, 10)


def test_a_file_that_cannot_be_allocated_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        DiskFiles().create(tmp_path / "file", 10)
    assert list(tmp_path.iterdir()) == []


def test_all_is_written_even_when_the_system_takes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[[int, memoryview, int], int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:3], offset))
    files = DiskFiles()
    descriptor = files.create(tmp_path / "file", 20)
    files.write_at(descriptor, b"0123456789", 5)
    files.sync_data(descriptor)
    files.close(descriptor)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789" + bytes(5)


def test_an_existing_file_is_opened_for_reading_and_writing(tmp_path: Path) -> None:
    files = DiskFiles()
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"before")
    descriptor = files.open(tmp_path / "file")
    files.write_at(descriptor, b"af", 0)
    assert os.pread(descriptor, 10, 0) == b"affore"
    files.close(descriptor)


def test_a_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    DiskFiles().truncate(tmp_path / "file", 4)
    assert (tmp_path / "file").read_bytes() == b"0123"


def test_a_whole_file_is_written_from_chunks(tmp_path: Path) -> None:
    files = DiskFiles()
    path = tmp_path / "file"
    files.write_file(path, [b"ab", memoryview(b"cd"), b""])
    assert path.read_bytes() == b"abcd"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        files.write_file(path, [b"other"])
    assert path.read_bytes() == b"abcd"


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync: Callable[[int], None] = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    files = DiskFiles()
    path = tmp_path / "file"
    files.write_file(path, [b"content"])
    files.truncate(path, 3)
    files.sync_file(path)
    files.sync_folder(tmp_path)
    assert synced == [str(path), str(path), str(path), str(tmp_path)]
    with pytest.raises(NotADirectoryError):
        files.sync_folder(path)


def test_folders_are_made_and_removed(tmp_path: Path) -> None:
    files = DiskFiles()
    folder = tmp_path / "folder"
    files.make_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        files.make_folder(folder)
    (folder / "file").write_bytes(b"content")
    files.remove_tree(folder)
    files.remove_tree(folder)
    assert list(tmp_path.iterdir()) == []


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    files = DiskFiles()
    (tmp_path / "file").write_bytes(b"content")
    files.remove(tmp_path / "file")
    files.remove(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_renaming_replaces(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "target").write_bytes(b"old")
    DiskFiles().rename(tmp_path / "source", tmp_path / "target")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_a_file_is_replaced_whole_over_the_leftover_of_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.new").write_bytes(b"half")
    replace_file(DiskFiles(), path, b"first")
    replace_file(DiskFiles(), path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["pwrite", "fsync", "rename"])
def test_a_replacement_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "file"
    replace_file(DiskFiles(), path, b"old")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(DiskFiles(), path, b"new")
    assert path.read_bytes() == b"old"


# Files of others


def rewrite(path: Path, content: bytes) -> None:
    rewrite_file(DiskFiles(), path, [content], 0o640)


def test_a_file_is_rewritten_behind_its_link_with_the_mode_it_has(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    rewrite(link, b"first")
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    rewrite(link, b"second")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o604)
    assert link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")
    os.chown(path, 1234, 5678)
    rewrite(path, b"second")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_another_group_gets_no_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "file"
    path.write_bytes(b"first")
    path.chmod(0o664)
    before = path.stat()
    other = os.stat_result((*before[:4], before.st_uid + 1, before.st_gid + 1, *before[6:]))
    monkeypatch.setattr(files_module, "status_of_file", lambda path: other)
    monkeypatch.setattr(os, "chown", refuse)
    rewrite(path, b"second")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o604)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OSError, match="Not a regular file"):
            rewrite(path, b"x")
    with pytest.raises(IsADirectoryError):
        rewrite(tmp_path, b"x")
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_only_a_file_is_read(tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_bytes(b"x")
    assert read_file(file) == b"x"
    with pytest.raises(OSError, match="Not a regular file"):
        read_file(pipe)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")


@pytest.mark.parametrize("name", ["pwrite", "fsync", "rename", "chmod"])
def test_a_file_that_cannot_be_rewritten_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, other = tmp_path / "file", tmp_path / "file.new"
    path.write_bytes(b"old")
    other.write_bytes(b"somebody's")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            rewrite(path, b"new")
    assert [each.read_bytes() for each in sorted(tmp_path.iterdir())] == [b"old", b"somebody's"]


def test_writers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        for _ in range(5):
            list(pool.map(lambda content: rewrite(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
