"""The format of the log.

A file holds a header, records without gaps between them, and zeros up to its end (its space is allocated
ahead). Integers are little-endian and unsigned.

    file header, 64 bytes
    offset  size  field
         0     8  magic "ENGRAMWL"
         8     4  format level, 3
        12     4  link: the chain value at the end of the previous file, 0 in file 1
        16     8  number of the file; files are numbered from 1 without gaps
        24     8  LSN of the first operation this file can hold; all before it are durable
        32     8  salt, random
        40    20  zero
        60     4  CRC-32C of the bytes before

    record, 32 bytes and its payload
    offset  size  field
         0     4  chain: CRC-32C of the 28 bytes that follow, seeded with the chain value before it
                  (that of the previous record, or the file header's CRC-32C for the first record)
         4     4  CRC-32C of the payload
         8     4  length of the payload
        12     1  type: 1 operations, 2 mark
        13     3  tag: the low 24 bits of the salt
        16     8  LSN of its first operation
        24     8  highest LSN known durable when the record was written
        32     n  payload: a MessagePack array of operations, with successive LSNs; empty in a mark

What is written together is one record: after a crash it is there whole, or it was never acknowledged. The
LSNs of operations follow each other. A mark repeats the LSN before it and only carries the durable one: an
idle log gets a mark, so that what was acknowledged last is known to be durable, too.

Magic, level and checksum of the header have their places for ever, and its size is fixed: an engram of any
level can tell what is of a newer one.

The chain makes any record vouch for all before it, across files through the link. The tag makes records
behind a damaged place findable (no client can know it, so none can plant one): what they say was durable
tells damage from a torn tail.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from typing import NamedTuple

import attrs
from crc32c import crc32c

from engram.format_level import LEVEL

MAGIC = b"ENGRAMWL"
OLDEST_LEVEL = 2
FILE_HEADER_SIZE = 64
RECORD_HEADER_SIZE = 32
# Of the array of operations.
ARRAY_HEADER_SIZE = 5
OPERATIONS = 1
MARK = 2

_FILE_HEADER = struct.Struct("<8sIIQQQ20x")
_FILE_START = struct.Struct("<8sI")
_RECORD_BODY = struct.Struct("<IIIQQ")
_RECORD_HEADER = struct.Struct("<IIIIQQ")
_CHECKSUM = struct.Struct("<I")
_KIND = struct.Struct("<I")
_KIND_OFFSET = 12


class FormatError(Exception):
    """The bytes are not a file of the log."""


@attrs.frozen
class FileHeader:
    number: int
    first_lsn: int
    link: int
    salt: int
    level: int = LEVEL

    def encode(self) -> bytes:
        fields = _FILE_HEADER.pack(MAGIC, self.level, self.link, self.number, self.first_lsn, self.salt)
        return fields + _CHECKSUM.pack(crc32c(fields))

    @property
    def chain(self) -> int:
        """The chain value before the file's first record."""
        return crc32c(self.encode()[: _FILE_HEADER.size])

    @property
    def tag(self) -> int:
        return self.salt & 0xFFFFFF


def new_file_header(number: int, first_lsn: int, link: int) -> FileHeader:
    return FileHeader(number, first_lsn, link, secrets.randbits(64))


def level_of_file(data: bytes) -> int:
    """The format level of the file that begins with `data`.

    Raises:
        FormatError: there is no file header, or it is damaged.
    """
    if len(data) < FILE_HEADER_SIZE:
        raise FormatError("too short to hold a file header")
    if _CHECKSUM.unpack_from(data, _FILE_HEADER.size)[0] != crc32c(data[: _FILE_HEADER.size]):
        raise FormatError("file header checksum mismatch")
    magic, level = _FILE_START.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"format {magic!r} is not known")
    found: int = level
    return found


def decode_file_header(data: bytes) -> FileHeader:
    """The header at the start of `data`.

    Raises:
        FormatError: there is none, or it is damaged, or of a level not known.
    """
    level = level_of_file(data)
    if not OLDEST_LEVEL <= level <= LEVEL:
        raise FormatError(f"format level {level} is not known")
    _, _, link, number, first_lsn, salt = _FILE_HEADER.unpack_from(data)
    return FileHeader(number, first_lsn, link, salt, level)


def encode_record(
    kind: int, lsn: int, payload: bytes, durable_lsn: int, tag: int, chain: int
) -> tuple[bytes, int]:
    """A record; returns also the chain value at its end."""
    body = _RECORD_BODY.pack(crc32c(payload), len(payload), kind | tag << 8, lsn, durable_lsn)
    chain = crc32c(body, chain)
    return b"".join((_CHECKSUM.pack(chain), body, payload)), chain


class Record(NamedTuple):
    kind: int
    lsn: int
    durable_lsn: int
    payload: memoryview
    offset: int


class RecordScanner:
    """Reads the records of a file whole in memory, up to the end or the first defect.

    Once iteration is over, `offset` is where the last good record ends, `chain` the chain value there,
    and `defect` says what was found behind it: "" when there are only zeros.
    """

    def __init__(self, data: bytes, header: FileHeader) -> None:
        self.offset = FILE_HEADER_SIZE
        self.chain = header.chain
        self.defect = ""
        self._data = data
        self._tag = header.tag

    def __iter__(self) -> Iterator[Record]:
        data = self._data
        view = memoryview(data)
        size = len(data)
        while self.offset + RECORD_HEADER_SIZE <= size:
            offset = self.offset
            chain, checksum, length, kind_and_tag, lsn, durable_lsn = _RECORD_HEADER.unpack_from(data, offset)
            start = offset + RECORD_HEADER_SIZE
            if crc32c(view[offset + 4 : start], self.chain) != chain:
                break
            end = start + length
            if end > size:
                self.defect = "the file ends within a record"
                return
            payload = view[start:end]
            if crc32c(payload) != checksum:
                self.defect = "record payload checksum mismatch"
                return
            yield Record(kind_and_tag & 0xFF, lsn, durable_lsn, payload, offset)
            self.chain = chain
            self.offset = end
        if used_size(data) > self.offset:
            self.defect = "record header checksum mismatch"


def used_size(data: bytes) -> int:
    """The size of `data` without the zeros at its end."""
    return len(data.rstrip(b"\0"))


def claimed_durable_lsn(data: bytes, offset: int, header: FileHeader) -> int:
    """The highest LSN that any record found from `offset` on, behind a defect, says was durable; 0 if none.

    Records are looked for by their tag; one counts when its payload is intact and its fields agree.
    """
    view = memoryview(data)
    claimed = 0
    for kind in (OPERATIONS, MARK):
        pattern = _KIND.pack(kind | header.tag << 8)
        at = data.find(pattern, offset + _KIND_OFFSET)
        while at >= 0:
            start = at - _KIND_OFFSET + RECORD_HEADER_SIZE
            if start <= len(data):
                _, checksum, length, _, lsn, durable_lsn = _RECORD_HEADER.unpack_from(data, at - _KIND_OFFSET)
                whole = start + length <= len(data)
                if whole and durable_lsn <= lsn and crc32c(view[start : start + length]) == checksum:
                    claimed = max(claimed, durable_lsn)
            at = data.find(pattern, at + 1)
    return claimed
