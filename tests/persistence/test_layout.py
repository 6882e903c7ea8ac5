from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engram.errors import DirectoryInUseError, OperatorError
from engram.files import DiskFiles
from engram.persistence.check import hold_directory
from engram.persistence.layout import Layout, lock_directory


def test_a_new_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    descriptor = lock_directory(tmp_path / "a" / "b")
    try:
        layout = Layout(tmp_path / "a" / "b")
        assert stat.S_IMODE(layout.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(layout.lock.stat().st_mode) == 0o600
        assert layout.segments.is_dir()
    finally:
        os.close(descriptor)


def test_the_lock_is_held_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    descriptor = lock_directory(tmp_path)
    with pytest.raises(DirectoryInUseError, match="another server"):
        lock_directory(tmp_path)
    os.close(descriptor)
    os.close(lock_directory(tmp_path))


def test_a_link_for_a_lock_is_not_followed(tmp_path: Path) -> None:
    target, data = tmp_path / "target", tmp_path / "data"
    data.mkdir()
    (data / "LOCK").symlink_to(target)
    (data / "MANIFEST").touch()
    with pytest.raises(OperatorError, match="cannot be used as data directory"):
        lock_directory(data)
    with pytest.raises(OperatorError, match="cannot be read"), hold_directory(data, exclusive=True):
        pass
    assert not target.exists()


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from engram.persistence.layout import lock_directory;"
        "lock_directory(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(DirectoryInUseError):
            lock_directory(tmp_path)
        process.kill()
    os.close(lock_directory(tmp_path))


@pytest.mark.parametrize("name", ["engram.snap", "engram.wal"])
def test_files_of_another_format_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OperatorError, match=name):
        lock_directory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_the_names_of_a_new_directory_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, bool]] = []
    path = tmp_path / "new" / "data"

    def note(self: DiskFiles, folder: Path) -> None:
        synced.append((folder, path.exists()))

    monkeypatch.setattr(DiskFiles, "sync_folder", note)
    for _ in range(2):
        os.close(lock_directory(path))
    assert synced == [(tmp_path, False), (tmp_path / "new", True)]
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OperatorError, match="Not a directory"):
        lock_directory(tmp_path / "file" / "data")


def test_only_well_formed_names_count(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.segments.mkdir()
    for name in ("wal-0000000012.log", "wal-0000000003.log", "wal-3.log", "wal-0000000003.log.broken-17"):
        (tmp_path / name).write_bytes(b"")
    for name in ("snapshot-7", "snapshot-x"):
        (tmp_path / name).mkdir()
    (layout.segments / "notes.txt").write_bytes(b"")
    (layout.segments / "ab.building").mkdir()
    assert layout.log_numbers() == [3, 12]
    assert [path.name for path in layout.snapshots()] == ["snapshot-7"]
    assert [path.name for path in layout.segment_folders()] == ["ab.building"]
    assert layout.log(3).name == "wal-0000000003.log"
