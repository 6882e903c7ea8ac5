"""A dump: the state of a data directory as lines of JSON, to be read by people, programs and `engram load`.

    {"engram-dump":1,"lsn":7,"keys":2,"vectors":1}
    {"type":"string","key":"greeting","value":"hello","expires-at":1900000000000}
    {"type":"vectorset","key":"colours","dimension":3,"metric":"l2","m":32,"ef-construction":128,
     "quantization":"f32","recall":0.99}
    {"type":"vector","index":"colours","key":"red","vector":[1.0,0.0,0.0],"attributes":{"warm":true}}

(each on one line). The first line names the format and counts what follows; a vector set comes before its
vectors. "expires-at" is in milliseconds since the epoch.

Nothing is lost. Bytes that are not UTF-8 are {"base64": "..."} in place of a string. Numbers have as many
digits as it takes to give the same float32; a vector may also be {"base64": "..."} of little-endian float32.
"attributes" is the text as it was stored, byte for byte, when that is one line of JSON and an object; any
other text is a string in "attributes-text".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import attrs
import msgspec
import numpy as np

from engram.engine import Engine
from engram.errors import OperatorError
from engram.files import Files, rewrite_file
from engram.index.distances import Doubles, Floats
from engram.index.head import ALIVE, Chunk, Lsns
from engram.index.row_columns import rows_at
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import VectorIndex
from engram.persistence import recover
from engram.persistence.check import is_unused

FORMAT = 1

_MODE = 0o600
_BLOCK_ROWS = 256
_BLOCK_BYTES = 1 << 18
_MOST_DIGITS, _FEWEST_DIGITS = 9, 6
# Powers of ten that float64 holds exactly.
_POWERS = 10.0 ** np.arange(23)


class Base64(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that are no text."""

    base64: bytes


Text = str | Base64


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first line. The counts are for a progress bar, and may be missing."""

    format: int = msgspec.field(name="engram-dump")
    lsn: int | None = None
    keys: int | None = None
    vectors: int | None = None


class _Line(
    msgspec.Struct,
    frozen=True,
    rename="kebab",
    tag_field="type",
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    pass


class StringLine(_Line, frozen=True, tag="string"):
    key: Text
    value: Text
    expires_at: int | None = None


class IndexLine(_Line, frozen=True, tag="vectorset"):
    """A vector set; what is missing is as VNEW has it."""

    key: Text
    dimension: int
    metric: str | None = None
    m: int | None = None
    ef_construction: int | None = None
    quantization: str | None = None
    recall: float | None = None
    expires_at: int | None = None


class VectorLine(_Line, frozen=True, tag="vector"):
    index: Text
    key: Text
    vector: list[float] | Base64
    attributes: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    attributes_text: Text | None = None


Line = StringLine | IndexLine | VectorLine

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
    values, expiries = engine.keyspace.values, engine.keyspace.expiries
    vectors = sum(map(len, engine.indices.values()))
    yield _encode(Header(format=FORMAT, lsn=engine.lsn, keys=len(values), vectors=vectors))
    pack = _pack_base64 if base64 else _pack_numbers
    for key, value in values.items():
        expires_at = expiries.get(key)
        if not isinstance(value, VectorIndex):
            yield _encode(StringLine(key=_text(key), value=_text(bytes(value)), expires_at=expires_at))
            continue
        yield _encode(_describe(key, value, expires_at))
        yield from _vector_lines(_text(key), value, engine.lsn, pack)


def _text(data: bytes) -> Text:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Base64(data)


def _describe(key: bytes, index: VectorIndex, expires_at: int | None) -> IndexLine:
    parameters = index.parameters
    return IndexLine(
        key=_text(key),
        dimension=parameters.dimension,
        metric=parameters.metric,
        m=parameters.connectivity,
        ef_construction=parameters.expansion,
        quantization=parameters.quantization,
        recall=parameters.recall,
        expires_at=expires_at,
    )


def _vector_lines(
    name: Text, index: VectorIndex, lsn: int, pack: Callable[[Floats], Iterable[list[float] | Base64]]
) -> Iterator[bytes]:
    view = index.view(lsn)
    sources: list[tuple[Segment | Chunk, Lsns]] = [
        *((installed.segment, installed.deaths) for installed in view.segments),
        *((chunk, chunk.deaths[:count]) for chunk, count in view.head),
    ]
    for source, deaths in sources:
        alive = np.flatnonzero(deaths == ALIVE)
        for start in range(0, len(alive), _BLOCK_ROWS):
            positions = alive[start : start + _BLOCK_ROWS]
            rows = rows_at(source, positions)
            for key, text, vector in zip(
                rows["keys"], rows["attributes"], pack(rows["vectors"]), strict=True
            ):
                whole = _is_object(text)
                yield _encode(
                    VectorLine(
                        index=name,
                        key=_text(key),
                        vector=vector,
                        attributes=msgspec.Raw(text) if whole else msgspec.UNSET,
                        attributes_text=_text(text) if text and not whole else None,
                    )
                )


def _is_object(text: bytes) -> bool:
    """Whether a text can stand in a line of JSON as it is."""
    if not (text.startswith(b"{") and text.endswith(b"}")) or b"\n" in text or b"\r" in text:
        return False
    try:
        text.decode()
        msgspec.json.decode(text)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return False
    return True


def _pack_base64(rows: Floats) -> list[Base64]:
    return [Base64(row.astype("<f4").tobytes()) for row in rows]


def _pack_numbers(rows: Floats) -> list[list[float]]:
    short: list[list[float]] = shorten(rows).tolist()
    return short


def shorten(values: Floats) -> Doubles:
    """For each float32 a float64 that gives it back and has few digits, written in full: 0.1 for 0.1.

    Very large and very small numbers are returned as they are, with up to 17 digits.
    """
    wide = values.astype(np.float64)
    short = wide.copy()
    with np.errstate(all="ignore"):
        magnitude = np.floor(np.log10(np.abs(wide)))
        power = _MOST_DIGITS - 1 - magnitude
        within = (power >= 0) & (power < len(_POWERS))
        scale = _POWERS[np.where(within, power, 0).astype(np.intp)]
        for _ in range(_MOST_DIGITS, _FEWEST_DIGITS - 1, -1):
            # A quotient of two numbers that are exact is the float64 nearest to the decimal number.
            candidate = np.rint(wide * scale) / scale
            np.copyto(short, candidate, where=within & (candidate.astype(np.float32) == values))
            scale /= 10
    # A zero has no magnitude, and keeps its sign.
    return short
