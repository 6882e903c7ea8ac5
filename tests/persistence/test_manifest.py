from __future__ import annotations

import json
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import DamagedDataError, NewerFormatError
from engram.format_level import LEVEL
from engram.persistence.manifest import (
    Manifest,
    decode_manifest,
    encode_manifest,
    read_manifest,
    write_manifest,
)
from tests.persistence.conftest import HookedFiles

SAMPLE = Manifest(
    first_log_file=4,
    snapshot="snapshot-17",
    lsn=17,
    checksum=99,
    size=1000,
    time=1_700_000_000,
    segments=("a",),
)
PATH = Path("data/MANIFEST")

numbers = st.integers(0, 2**63)


@given(
    st.builds(
        Manifest, numbers, st.text(), numbers, numbers, numbers, numbers, st.lists(st.text()).map(tuple)
    )
)
def test_a_manifest_survives(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), PATH) == manifest


def test_any_flipped_bit_and_any_cut_is_noticed() -> None:
    content = encode_manifest(SAMPLE)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedDataError, match="MANIFEST"):
            decode_manifest(bytes(flipped), PATH)
    for cut in range(len(content)):
        with pytest.raises(DamagedDataError, match="MANIFEST"):
            decode_manifest(content[:cut], PATH)


def altered(**fields: object) -> bytes:
    line = json.dumps({**json.loads(encode_manifest(SAMPLE).partition(b"\n")[0]), **fields}).encode()
    return line + b"\n%08x\n" % crc32c(line)


def test_a_newer_level_is_refused() -> None:
    with pytest.raises(NewerFormatError, match=rf"written by a newer engram \(level {LEVEL + 1}\)"):
        decode_manifest(altered(version=LEVEL + 1, strange=[]), PATH)


def test_a_field_that_is_not_known_is_of_a_newer_engram() -> None:
    with pytest.raises(NewerFormatError, match=r"written by a newer engram \(the field strange is not known"):
        decode_manifest(altered(strange=[]), PATH)


def test_the_version_of_before_there_were_levels() -> None:
    assert decode_manifest(altered(version=1), PATH) == SAMPLE


def test_it_is_replaced_atomically(tmp_path: Path, files: HookedFiles) -> None:
    path = tmp_path / "MANIFEST"
    assert read_manifest(path) is None
    write_manifest(files, path, Manifest(first_log_file=1))
    files.calls.clear()
    write_manifest(files, path, SAMPLE)
    assert read_manifest(path) == SAMPLE
    beside = tmp_path / "MANIFEST.new"
    assert files.calls == [
        ("remove", beside),
        ("write_file", beside),
        ("rename", beside, path),
        ("sync_folder", tmp_path),
    ]
