from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.dump import dump_blocks, read_state, write_dump
from engram.engine import Engine
from engram.errors import DamagedDataError, OperatorError
from engram.files import DiskFiles
from engram.index.segment import SegmentStore
from engram.kinds.vector_set import shorten
from engram.operations import (
    AddVectors,
    CreateIndex,
    DeleteVectors,
    Operation,
    SetExpiry,
    SetString,
    encode,
)
from engram.snapshotter import write_snapshot
from tests.conftest import vector
from tests.persistence.conftest import HookedFiles, LogMaker

EXPIRY = 1_900_000_000_000

HISTORY: list[Operation] = [
    SetString(b"a", "sch\u00f6n\n\x00".encode()),
    SetString(b"\xff", b"\x80", EXPIRY),
    CreateIndex(b"i", 2, "cosine", 16, 128, "int8", 0.5),
    AddVectors(3, (b"x", b"y", b"z"), vector(1, 2, 0.1, -0.0, 5, 6), (b'{"n": [1]}', b"[1]", b"")),
    DeleteVectors(3, (b"z",)),
    SetExpiry(b"i", EXPIRY + 1),
    AddVectors(3, (b"\xfe",), vector(7, 8), (b"\xfd",)),
]

DUMP = r"""{"engram-dump":1,"lsn":7,"keys":3,"vectors":3}
{"type":"string","key":"a","value":"schön\n\u0000"}
{"type":"string","key":{"base64":"/w=="},"value":{"base64":"gA=="},"expires-at":1900000000000}
{"type":"vectorset","key":"i","dimension":2,"metric":"cosine","m":16,"ef-construction":128,"quantization":"int8","recall":0.5,"expires-at":1900000000001}
{"type":"vector","index":"i","key":"x","vector":[1.0,2.0],"attributes":{"n": [1]}}
{"type":"vector","index":"i","key":"y","vector":[0.1,-0.0],"attributes-text":"[1]"}
{"type":"vector","index":"i","key":{"base64":"/g=="},"vector":[7.0,8.0],"attributes-text":{"base64":"/Q=="}}
"""


def make_engine(folder: Path, operations: list[Operation]) -> Engine:
    engine = Engine(SegmentStore(folder, DiskFiles(), 0), seal_rows=1 << 62)
    for lsn, operation in enumerate(operations, 1):
        engine.apply(lsn, operation)
    return engine


def dump(engine: Engine, *, base64: bool = False) -> bytes:
    return b"".join(dump_blocks(engine, base64=base64))


def attributes_line(folder: Path, text: bytes) -> dict[str, object]:
    operations: list[Operation] = [
        CreateIndex(b"i", 1, "l2", 16, 128, "f32"),
        AddVectors(1, (b"x",), vector(1), (text,)),
    ]
    lines = dump(make_engine(folder, operations)).splitlines()
    line: dict[str, object] = json.loads(lines[2])
    assert len(lines) == 3
    return line


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory of which a snapshot holds one half and the log the other."""
    path = tmp_path / "data"
    (path / "segments").mkdir(parents=True)
    log = LogMaker(path)
    log.write(map(encode, HISTORY[:4]))
    log.new_file()
    log.write(map(encode, HISTORY[4:]))
    log.close()
    return path


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*.*")}


def test_a_dump_is_lines_of_json(tmp_path: Path) -> None:
    assert dump(make_engine(tmp_path, HISTORY)).decode() == DUMP


def test_a_vector_may_be_base64(tmp_path: Path) -> None:
    lines = dump(make_engine(tmp_path, HISTORY), base64=True).splitlines()
    assert json.loads(lines[4])["vector"] == {"base64": base64.b64encode(vector(1, 2)).decode()}


@pytest.mark.parametrize(
    "text",
    [b"[1]", b"no json", b'{"a":}', b'{"a":1}{}', b' {"a":1}', b'{"a":\n1}', b'{"a":NaN}', b"{}\r", b'"{}"'],
)
def test_attributes_that_are_no_object_in_one_line_are_text(text: bytes, tmp_path: Path) -> None:
    line = attributes_line(tmp_path, text)
    assert "attributes" not in line
    assert line["attributes-text"] == text.decode()


@pytest.mark.parametrize("text", [b"{}", b'{"a" : [1,  2]}', b'{"base64":"x"}', b'{"a":{"b":"\\u0000"}}'])
def test_attributes_that_are_an_object_stand_as_they_are(text: bytes, tmp_path: Path) -> None:
    line = attributes_line(tmp_path, text)
    assert line["attributes"] == json.loads(text)
    assert "attributes-text" not in line


def test_attributes_nested_too_deep_are_text(tmp_path: Path) -> None:
    text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert attributes_line(tmp_path, text)["attributes-text"] == text.decode()


def test_a_large_state_comes_in_blocks(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, [SetString(b"k%d" % n, bytes(100_000)) for n in range(9)])
    blocks = list(dump_blocks(engine))
    assert len(blocks) > 3
    assert all(block.endswith(b"\n") for block in blocks if block)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_short_numbers_give_the_same_float32(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    given_back = np.array(json.loads(json.dumps(shorten(values).tolist())), np.float32)
    assert given_back.tobytes() == values.tobytes()


@given(st.integers(-(10**9), 10**9), st.integers(0, 9))
def test_numbers_are_as_short_as_they_can_be(digits: int, places: int) -> None:
    number = np.float32(digits / 10**places)
    [short] = shorten(np.array([number])).tolist()
    assert short == float(str(number))


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_directory_is_read_and_left_as_it_is(is_saved: bool, directory: Path) -> None:
    if is_saved:
        write_snapshot(directory, 2)
    before = contents(directory)
    state = read_state(directory, DiskFiles())
    assert dump(state.engine).decode() == DUMP
    assert state.torn_bytes == 0
    assert contents(directory) == before


def test_a_torn_tail_is_left_out_and_counted(directory: Path) -> None:
    path = directory / "wal-0000000003.log"
    with path.open("r+b") as file:
        file.seek(len(path.read_bytes().rstrip(b"\0")) + 8)
        file.write(b"torn")
    before = contents(directory)
    state = read_state(directory, DiskFiles())
    assert state.torn_bytes > 0
    assert contents(directory) == before


def test_a_new_directory_gives_an_empty_dump(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    assert (
        dump(read_state(tmp_path, DiskFiles()).engine) == b'{"engram-dump":1,"lsn":0,"keys":0,"vectors":0}\n'
    )


def test_damage_is_refused(directory: Path) -> None:
    path = directory / "wal-0000000002.log"
    path.unlink()
    with pytest.raises(DamagedDataError, match="missing"):
        read_state(directory, DiskFiles())
    path.mkdir()
    with pytest.raises(OperatorError, match=r"wal-0000000002\.log: cannot be read: Is a directory"):
        read_state(directory, DiskFiles())
    shutil.rmtree(directory)


def test_a_dump_gets_its_name_when_it_is_durable(tmp_path: Path) -> None:
    files = HookedFiles()
    path, other = tmp_path / "dump", tmp_path / "dump.partial"
    other.write_bytes(b"somebody's")
    write_dump(files, path, [b"a", b"b"])
    partial = files.calls[0][1]
    assert files.calls == [
        ("write_file", partial),
        ("sync_file", partial),
        ("rename", partial, path),
        ("sync_folder", tmp_path),
    ]
    assert path.read_bytes() == b"ab"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_dump_over_a_file_keeps_its_mode_and_the_link_to_it(tmp_path: Path) -> None:
    path, link = tmp_path / "dump", tmp_path / "link"
    path.write_bytes(b"older and longer")
    path.chmod(0o644)
    link.symlink_to("dump")
    write_dump(DiskFiles(), link, [b"a", b"b"])
    assert link.is_symlink()
    assert path.read_bytes() == b"ab"
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_a_dump_behind_a_link_to_nothing_is_made_there(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("dump")
    write_dump(DiskFiles(), link, [b"a"])
    assert link.is_symlink()
    assert (tmp_path / "dump").read_bytes() == b"a"


def test_a_dump_goes_through_a_pipe(tmp_path: Path) -> None:
    path, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(path)
    link.symlink_to(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in (path, link):
            write_dump(DiskFiles(), name, [b"a", b"b"])
            assert os.read(reader, 10) == b"ab"
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make devices")
def test_a_device_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.read_bytes()
    except PermissionError:
        pytest.skip("devices are not allowed here")
    write_dump(DiskFiles(), path, [b"a"])
    assert path.is_char_device()
    assert list(tmp_path.iterdir()) == [path]


def test_a_dump_goes_to_an_open_descriptor_where_that_stands(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    with path.open("wb", buffering=0) as file:
        file.write(b"before,")
        for _ in range(2):
            write_dump(DiskFiles(), Path(f"/dev/fd/{file.fileno()}"), [b"a", b"b"])
        file.write(b",behind")
    assert path.read_bytes() == b"before,abab,behind"


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_dump(DiskFiles(), tmp_path / "a", [b"a"])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_dump_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def no_space(name: str, *_: object) -> None:
        if name == "rename":
            raise OSError(28, "No space left on device")

    files = HookedFiles()
    files.hook = no_space
    (tmp_path / "dump").write_bytes(b"older")
    with pytest.raises(OSError, match="No space"):
        write_dump(files, tmp_path / "dump", [b"a"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
