"""A dump: the state of a data directory as lines of JSON, to be read by people, programs and `engram load`.

    {"engram-dump":1,"lsn":7,"keys":2,"vectors":1}
    {"type":"string","key":"greeting","value":"hello","expires-at":1900000000000}
    {"type":"vectorset","key":"colours","dimension":3,"metric":"l2","m":32,"ef-construction":128,
     "quantization":"f32","recall":0.99}
    {"type":"vector","index":"colours","key":"red","vector":[1.0,0.0,0.0],"attributes":{"warm":true}}

(each on one line). The first line names the format and counts what follows; a vector set comes before its
vectors. "expires-at" is in milliseconds since the epoch. A line has the number of its "database" when that is
not 0.

Nothing is lost. Bytes that are not UTF-8 are {"base64": "..."} in place of a string. Numbers have as many
digits as it takes to give the same float32; a vector may also be {"base64": "..."} of little-endian float32.
"attributes" is the text as it was stored, byte for byte, when that is one line of JSON and an object; any
other text is a string in "attributes-text".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import attrs
import msgspec

from engram.engine import Engine
from engram.errors import OperatorError
from engram.files import Files, rewrite_file
from engram.index.segment import SegmentStore
from engram.kinds import KINDS
from engram.kinds.kind import KeyFields
from engram.persistence import recover
from engram.persistence.check import is_unused

FORMAT = 1

_MODE = 0o600
_BLOCK_BYTES = 1 << 18


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first line. The counts are for a progress bar, and may be missing."""

    format: int = msgspec.field(name="engram-dump")
    lsn: int | None = None
    keys: int | None = None
    vectors: int | None = None


_encode = msgspec.json.Encoder().encode


@attrs.frozen(eq=False)
class State:
    """What a data directory holds. `torn_bytes` are those at the end of its log that are left out."""

    engine: Engine
    store: SegmentStore
    torn_bytes: int


def read_state(directory: Path, files: Files) -> State:
    """Reads a data directory that no server uses, and changes nothing (blocking).

    Raises:
        DamagedDataError: something that was durable is missing or is not what was written.
        OperatorError: it cannot be read, or does not fit in memory.
    """
    store = SegmentStore(directory / "segments", files, 0)
    engine = Engine(store, seal_rows=1 << 62)
    if is_unused(directory):
        return State(engine, store, 0)
    try:
        recovery = recover(directory, files, engine.restore, engine.apply, read_only=True)
        # Not a line of a dump is to be written when there is damage.
        for index in engine.indices.values():
            for installed in index.segments:
                store.verify(installed.segment)
    except OSError as error:
        raise OperatorError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise OperatorError(f"{directory}: it does not fit in memory") from error
    return State(engine, store, recovery.torn_bytes)


def dump_blocks(engine: Engine, *, base64: bool = False) -> Iterator[bytes]:
    """The lines of the dump of a state, many at once; `base64` makes vectors shorter and faster to write."""
    block: list[bytes] = []
    size = 0
    for line in _lines(engine, base64):
        block += (line, b"\n")
        size += len(line)
        if size >= _BLOCK_BYTES:
            yield b"".join(block)
            block, size = [], 0
    yield b"".join(block)


def write_dump(files: Files, path: Path, blocks: Iterable[bytes]) -> None:
    """Writes a dump to a file, which is replaced once the dump is whole and durable, or into a device.

    A file keeps its mode and its owner; a new one has mode 0600, for it holds all data. Behind a link, what
    it names is replaced. A device, a pipe or a descriptor of this process (/dev/stdout) is written into.

    Raises OSError; a file is as before then.
    """
    stream = _open_stream(path)
    if stream is None:
        rewrite_file(files, path, blocks, _MODE)
        return
    with stream:
        for block in blocks:
            stream.write(block)


def _open_stream(path: Path) -> BinaryIO | None:
    """Opens what is to be written into; None for a file. Raises OSError."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if (descriptor := _own_descriptor(path)) is not None:
        return open(descriptor, "wb", closefd=False)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    # Nothing is made in its place should it go away.
    return open(os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), "wb")


def _own_descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path, which leads somewhere, names as /dev/stdout does."""
    own = f"/proc/{os.getpid()}/fd"
    while path.is_symlink():
        if os.path.realpath(path.parent) == own:
            return int(path.name)
        path = path.parent / path.readlink()
    return None


def _lines(engine: Engine, base64: bool) -> Iterator[bytes]:
    keys = sum(map(len, engine.keyspaces.values()))
    vectors = sum(map(len, engine.indices.values()))
    yield _encode(Header(format=FORMAT, lsn=engine.lsn, keys=keys, vectors=vectors))
    for number, keyspace in sorted(engine.keyspaces.items()):
        for key, value in keyspace.values.items():
            fields = KeyFields(number, key, keyspace.expiries.get(key))
            yield from map(_encode, KINDS.of(value).dump(engine, fields, value, base64))
