from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from engram.format_level import LEVEL
from engram.persistence import log_format
from engram.persistence.log_format import (
    FILE_HEADER_SIZE,
    MARK,
    OPERATIONS,
    RECORD_HEADER_SIZE,
    FileHeader,
    FormatError,
    RecordScanner,
)

HEADER = FileHeader(number=3, first_lsn=11, link=0xDEADBEEF, salt=0x0123456789ABCDEF)
PAYLOADS = [b"first", b"", b"x" * 300, b"last"]

unsigned_64 = st.integers(0, 2**64 - 1)


def encode_records(
    payloads: Sequence[bytes], durable_lsn: int = 0, lsn: int = HEADER.first_lsn, chain: int = HEADER.chain
) -> tuple[bytes, int]:
    """A record for each payload, with successive LSNs."""
    records = []
    for number, payload in enumerate(payloads, lsn):
        record, chain = log_format.encode_record(OPERATIONS, number, payload, durable_lsn, HEADER.tag, chain)
        records.append(record)
    return b"".join(records), chain


def log_file(payloads: list[bytes], *, durable_lsn: int = 0, mark: bool = False, room: int = 100) -> bytes:
    records, chain = encode_records(payloads, durable_lsn)
    if mark:
        last_lsn = HEADER.first_lsn + len(payloads) - 1
        records += log_format.encode_record(MARK, last_lsn, b"", last_lsn, HEADER.tag, chain)[0]
    return HEADER.encode() + records + bytes(room)


def test_the_format_is_the_documented_one() -> None:
    data = log_file([b"ab"], durable_lsn=9)
    assert data[:56].hex() == (
        "454e4752414d574c"
        "03000000"
        "efbeadde"
        "0300000000000000"
        "0b00000000000000"
        "efcdab8967452301"
        "00000000000000000000000000000000"
    )
    record = data[FILE_HEADER_SIZE:]
    assert record[8:34].hex() == "0200000001efcdab0b0000000000000009000000000000006162"


@given(st.builds(FileHeader, unsigned_64, unsigned_64, st.integers(0, 2**32 - 1), unsigned_64))
def test_a_file_header_survives(header: FileHeader) -> None:
    encoded = header.encode()
    assert len(encoded) == FILE_HEADER_SIZE
    assert log_format.decode_file_header(encoded + b"records") == header


def test_any_flipped_bit_of_a_file_header_is_noticed() -> None:
    encoded = HEADER.encode()
    for bit in range(8 * FILE_HEADER_SIZE):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            log_format.decode_file_header(bytes(flipped))


def test_a_header_cut_short_or_of_another_level_is_refused() -> None:
    with pytest.raises(FormatError, match="too short"):
        log_format.decode_file_header(HEADER.encode()[:-1])
    for level in (1, LEVEL + 1):
        other = attrs.evolve(HEADER, level=level).encode()
        assert log_format.level_of_file(other) == level
        with pytest.raises(FormatError, match=f"level {level} is not known"):
            log_format.decode_file_header(other)


def test_the_places_that_are_fixed_for_ever() -> None:
    encoded = attrs.evolve(HEADER, level=7).encode()
    assert len(encoded) == 64
    assert encoded[:12] == b"ENGRAMWL\x07\0\0\0"
    assert encoded[60:] == struct.pack("<I", crc32c(encoded[:60]))


@given(st.lists(st.binary(max_size=200), max_size=20), unsigned_64, st.integers(0, 100))
def test_records_survive(payloads: list[bytes], durable_lsn: int, room: int) -> None:
    data = log_file(payloads, durable_lsn=durable_lsn, room=room)
    scanner = RecordScanner(data, HEADER)
    records = list(scanner)
    assert [bytes(record.payload) for record in records] == payloads
    assert [record.lsn for record in records] == list(range(11, 11 + len(payloads)))
    assert {(record.kind, record.durable_lsn) for record in records} <= {(OPERATIONS, durable_lsn)}
    assert scanner.defect == ""
    assert scanner.offset == len(data) - room


def test_the_chain_goes_on_from_batch_to_batch() -> None:
    whole, end = encode_records(PAYLOADS)
    first, chain = encode_records(PAYLOADS[:2])
    second, chain = encode_records(PAYLOADS[2:], lsn=13, chain=chain)
    assert (first + second, chain) == (whole, end)
    scanner = RecordScanner(HEADER.encode() + whole, HEADER)
    assert len(list(scanner)) == len(PAYLOADS)
    assert scanner.chain == end


def test_cut_anywhere_gives_the_records_before_the_cut() -> None:
    data = log_file(PAYLOADS, room=0)
    ends = [*(record.offset for record in RecordScanner(data, HEADER)), len(data)][1:]
    for cut in range(FILE_HEADER_SIZE, len(data) + 1):
        scanner = RecordScanner(data[:cut], HEADER)
        whole = [bytes(record.payload) for record in scanner]
        assert whole == PAYLOADS[: sum(end <= cut for end in ends)]
        assert bool(scanner.defect) == (cut not in (FILE_HEADER_SIZE, *ends))


def test_any_flipped_bit_ends_the_scan_at_its_record() -> None:
    data = log_file(PAYLOADS, room=0)
    offsets = [record.offset for record in RecordScanner(data, HEADER)]
    for bit in range(8 * FILE_HEADER_SIZE, 8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        scanner = RecordScanner(bytes(flipped), HEADER)
        intact = sum(1 for _ in scanner)
        assert scanner.offset == max(offset for offset in offsets if offset <= bit // 8)
        assert offsets[intact] == scanner.offset
        assert scanner.defect


def test_records_of_another_file_are_not_taken_for_its_own() -> None:
    data = log_file(PAYLOADS)
    other = FileHeader(HEADER.number, HEADER.first_lsn, HEADER.link, HEADER.salt + (1 << 40))
    scanner = RecordScanner(other.encode() + data[FILE_HEADER_SIZE:], other)
    assert list(scanner) == []
    assert scanner.defect == "record header checksum mismatch"


def test_what_is_behind_a_damaged_record_says_what_was_durable() -> None:
    data = log_file([b"first", b"second", b"third"], mark=True)
    second = FILE_HEADER_SIZE + RECORD_HEADER_SIZE + len(b"first")
    for bit in range(8 * second, 8 * (second + RECORD_HEADER_SIZE + len(b"second"))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert log_format.claimed_durable_lsn(bytes(flipped), second, HEADER) == 13
    wiped = data[:second] + bytes(70) + data[second + 70 :]
    assert log_format.claimed_durable_lsn(wiped, second, HEADER) == 13


def test_a_torn_batch_claims_nothing_about_itself() -> None:
    data = log_file([b"first", b"second", b"third"], durable_lsn=10)
    torn = data[:FILE_HEADER_SIZE] + bytes(20) + data[FILE_HEADER_SIZE + 20 :]
    assert log_format.claimed_durable_lsn(torn, FILE_HEADER_SIZE, HEADER) == 10


@given(st.binary(max_size=500))
def test_a_stored_value_cannot_pose_as_a_record(value: bytes) -> None:
    foreign = FileHeader(3, 11, 0, HEADER.salt ^ 1)
    planted, _ = log_format.encode_record(MARK, 1 << 40, b"", 1 << 40, foreign.tag, foreign.chain)
    data = HEADER.encode() + bytes(40) + value + planted
    assert log_format.claimed_durable_lsn(data, FILE_HEADER_SIZE, HEADER) == 0
