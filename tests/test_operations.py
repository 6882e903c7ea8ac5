from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.operations import (
    AddVectors,
    AppendString,
    CopyKey,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    ExchangeDatabases,
    Flush,
    InstallSegment,
    KindOperation,
    MoveKey,
    Operation,
    RenameKey,
    SetAttributes,
    SetExpiry,
    SetRange,
    SetString,
    SetStrings,
    decode,
    decode_array,
    encode,
    join,
    known_operations,
    register,
)

key = st.binary(max_size=30)
keys = st.lists(key, max_size=4).map(tuple)
number = st.integers(-(2**63), 2**63 - 1)
time = st.none() | number
text = st.text(max_size=20)

operations = st.one_of(
    st.builds(SetString, key, st.binary(), time, number),
    st.builds(AppendString, key, st.binary()),
    st.builds(DeleteKeys, keys),
    st.builds(SetExpiry, key, time),
    st.builds(Flush, st.none() | number),
    st.builds(CreateIndex, key, number, text, number, number, text, st.floats(allow_nan=False)),
    st.builds(AddVectors, number, keys, st.binary(), st.lists(st.none() | st.binary()).map(tuple)),
    st.builds(DeleteVectors, number, keys),
    st.builds(InstallSegment, number, text, number, number, st.lists(text).map(tuple)),
    st.builds(SetAttributes, number, keys, st.lists(st.binary()).map(tuple)),
    st.builds(SetStrings, keys, keys),
    st.builds(SetRange, key, number, st.binary()),
    st.builds(RenameKey, key, key, number),
    st.builds(CopyKey, key, key, number, number),
    st.builds(MoveKey, key, number, number),
    st.builds(ExchangeDatabases, number, number),
)


@given(operations)
def test_an_operation_survives(operation: Operation) -> None:
    payload = encode(operation)
    assert decode(payload) == operation
    assert decode(memoryview(payload)) == operation
    assert type(decode(payload)) is type(operation)


@given(st.lists(operations))
def test_joined_operations_survive(several: list[Operation]) -> None:
    assert decode_array(join(list(map(encode, several)))) == several


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_an_array_of_any_length_is_messagepack(count: int) -> None:
    joined = join([encode(Flush())] * count)
    assert joined == msgspec.msgpack.encode([Flush()] * count)
    assert decode_array(joined) == [Flush()] * count


# As level 2 wrote them: of database 0.
OF_LEVEL_2: list[tuple[Operation, str]] = [
    (SetString(b"k", b"v", 5), "9401c4016bc4017605"),
    (SetString(b"k", b"v"), "9401c4016bc40176c0"),
    (AppendString(b"k", b"v"), "9302c4016bc40176"),
    (DeleteKeys((b"k", b"l")), "920392c4016bc4016c"),
    (SetExpiry(b"k", None), "9304c4016bc0"),
    (Flush(), "9105"),
    (CreateIndex(b"k", 4, "l2", 16, 200, "f32"), "9806c4016b04a26c3210ccc8a3663332cb3fefae147ae147ae"),
    (SetStrings((b"k", b"l"), (b"v", b"")), "930b92c4016bc4016c92c40176c400"),
    (SetRange(b"k", 5, b"v"), "940cc4016b05c40176"),
    (RenameKey(b"k", b"l"), "930dc4016bc4016c"),
    (CopyKey(b"k", b"l"), "930ec4016bc4016c"),
]

ENCODED: list[tuple[Operation, str]] = [
    (SetString(b"k", b"v", 5), "9501c4016bc401760500"),
    (SetString(b"k", b"v", None, 3), "9501c4016bc40176c003"),
    (AppendString(b"k", b"v", 3), "9402c4016bc4017603"),
    (DeleteKeys((b"k", b"l"), 3), "930392c4016bc4016c03"),
    (SetExpiry(b"k", None, 3), "9404c4016bc003"),
    (Flush(), "9205c0"),
    (Flush(3), "920503"),
    (
        CreateIndex(b"k", 4, "l2", 16, 200, "f32", database=3),
        "9906c4016b04a26c3210ccc8a3663332cb3fefae147ae147ae03",
    ),
    (AddVectors(7, (b"k",), b"\0\0\x80?"), "95070791c4016bc4040000803f90"),
    (DeleteVectors(7, (b"k",)), "93080791c4016b"),
    (InstallSegment(7, "ab", 9, -1, ("cd",)), "960907a2616209ff91a26364"),
    (SetAttributes(7, (b"k",), (b"{}",)), "940a0791c4016b91c4027b7d"),
    (SetStrings((b"k", b"l"), (b"v", b""), 3), "940b92c4016bc4016c92c40176c40003"),
    (SetRange(b"k", 5, b"v", 3), "950cc4016b05c4017603"),
    (RenameKey(b"k", b"l", 3), "940dc4016bc4016c03"),
    (CopyKey(b"k", b"l", 3, 4), "950ec4016bc4016c0304"),
    (MoveKey(b"k", 3, 4), "940fc4016b0304"),
    (ExchangeDatabases(3, 4), "93100304"),
]


def test_every_operation_has_an_encoding() -> None:
    assert {type(operation) for operation, _ in ENCODED} == set(known_operations().values())


@pytest.mark.parametrize(("operation", "payload"), ENCODED)
def test_the_encoding_never_changes(operation: Operation, payload: str) -> None:
    assert encode(operation).hex() == payload
    assert decode(bytes.fromhex(payload)) == operation


@pytest.mark.parametrize(("operation", "payload"), OF_LEVEL_2)
def test_records_of_level_2_are_of_database_0(operation: Operation, payload: str) -> None:
    assert decode(bytes.fromhex(payload)) == operation


def test_a_tag_belongs_to_one_operation() -> None:
    class Another(KindOperation, frozen=True, array_like=True, tag=1):
        key: bytes

    with pytest.raises(ValueError, match="tag 1 of Another is that of another operation"):
        register((Another,))
    assert decode(encode(Flush())) == Flush()


def test_a_field_added_later_has_its_default_in_old_records() -> None:
    assert decode(bytes.fromhex("9301c4016bc40176")) == SetString(b"k", b"v", None)
    created = CreateIndex(b"k", 4, "l2", 16, 200, "f32", 0.99)
    assert decode(bytes.fromhex("9706c4016b04a26c3210ccc8a3663332")) == created


@given(st.binary())
def test_what_is_no_operation_is_refused(payload: bytes) -> None:
    try:
        operation = decode(payload)
    except msgspec.DecodeError:
        return
    assert decode(encode(operation)) == operation


@given(operations, st.data())
def test_an_operation_cut_short_is_refused(operation: Operation, data: st.DataObject) -> None:
    payload = encode(operation)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(msgspec.DecodeError):
        decode(payload[:cut])


def test_operations_do_not_change() -> None:
    with pytest.raises(AttributeError):
        SetString(b"k", b"v").value = b"w"  # type: ignore[misc]


_WITHOUT_MEMORY = """
import resource, sys
from engram.operations import SetString, encode
operation = SetString(b"k", bytes(int(sys.argv[1])))
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    encode(operation)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.parametrize(("size", "room"), [(50_000_000, 20_000_000), (50_000_000, 60_000_000), (300_000, 0)])
def test_without_memory_an_error_is_raised(size: int, room: int) -> None:
    """The encoder that msgspec offers for this ends the process."""
    command = [sys.executable, "-P", "-c", _WITHOUT_MEMORY, str(size), str(room)]
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (ended.returncode, ended.stdout) == (0, "MemoryError\n")
