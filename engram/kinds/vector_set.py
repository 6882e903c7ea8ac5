"""Vector sets: the indices that hold vectors with attributes, each under a key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from engram.columns import Array, pack_bytes, unpack_bytes
from engram.effects import Effect, State, Touched, touch_key
from engram.index.distances import Doubles, Floats
from engram.index.head import ALIVE, Chunk, Lsns
from engram.index.index_state import export_indices, named_segments, restore_indices
from engram.index.parameters import Parameters
from engram.index.row_columns import rows_at
from engram.index.segment import Segment
from engram.index.vector_index import Addition, Deletion, Installation, OneAddition, VectorIndex
from engram.kinds.kind import (
    Base64,
    KeyFields,
    Kind,
    Line,
    LineError,
    Packed,
    Request,
    Text,
    Word,
    as_bytes,
    as_text,
)
from engram.operations import AddVectors, CreateIndex, DeleteVectors, InstallSegment, SetAttributes

_FLOATS = np.dtype("<f4")

_DUMPED_ROWS = 256
_MOST_DIGITS, _FEWEST_DIGITS = 9, 6
# Powers of ten that float64 holds exactly.
_POWERS = 10.0 ** np.arange(23)

# Of one VMADD.
_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20


def _new_index(state: State, lsn: int, operation: CreateIndex) -> VectorIndex:
    parameters = Parameters(
        dimension=operation.dimension,
        metric=operation.metric,
        connectivity=operation.connectivity,
        expansion=operation.expansion,
        quantization=operation.quantization,
        recall=operation.recall,
    )
    return VectorIndex(lsn, parameters, seal_rows=state.seal_rows, first_serial=state.first_serial)


def _create_index(state: State, lsn: int, operation: CreateIndex, index: VectorIndex) -> None:
    state.place(operation.database, operation.key, index)
    state.indices[lsn] = index
    state.index_totals.change(index)


def _addition(state: State, lsn: int, operation: AddVectors) -> tuple[VectorIndex, Addition | OneAddition]:
    index = state.indices[operation.index]
    keys = operation.keys
    attributes: Sequence[bytes | None] = operation.attributes
    vectors = np.frombuffer(operation.vectors, _FLOATS)
    if len(keys) == 1:
        return index, index.prepare_one(keys[0], vectors, attributes[0] if attributes else None)
    vectors = vectors.reshape(len(keys), -1)
    if not attributes and not index.live.keys().isdisjoint(keys):
        attributes = (None,) * len(keys)
    if None in attributes:
        # Those of these rows stay.
        former = index.attributes_of(keys)
        attributes = [old if text is None else text for text, old in zip(attributes, former, strict=True)]
    return index, index.prepare_addition(keys, vectors, attributes)


def _described(
    state: State, lsn: int, operation: SetAttributes
) -> tuple[VectorIndex, Addition | OneAddition]:
    index = state.indices[operation.index]
    found = [index.vector(key) for key in operation.keys]
    vectors = np.frombuffer(b"".join(vector for vector in found if vector is not None), _FLOATS)
    vectors = vectors.reshape(len(found), -1)
    return index, index.prepare_addition(operation.keys, vectors, operation.attributes)


def _add_vectors(
    state: State,
    lsn: int,
    operation: AddVectors | SetAttributes,
    prepared: tuple[VectorIndex, Addition | OneAddition],
) -> None:
    index, addition = prepared
    index.add_prepared(lsn, addition)
    state.resize_index(index)


def _deletion(state: State, lsn: int, operation: DeleteVectors) -> Deletion:
    return state.indices[operation.index].prepare_deletion(operation.keys)


def _delete_vectors(state: State, lsn: int, operation: DeleteVectors, deletion: Deletion) -> None:
    index = state.indices[operation.index]
    index.delete_prepared(lsn, deletion)
    state.resize_index(index)


def _installation(state: State, lsn: int, operation: InstallSegment) -> Installation | None:
    index = state.indices.get(operation.index)
    if index is None:
        return None
    segment = state.segments.take(operation.segment, operation.checksum) if operation.segment else None
    return index.prepare_installation(lsn, segment, operation.through, operation.replaces)


def _install_segment(
    state: State, lsn: int, operation: InstallSegment, installation: Installation | None
) -> None:
    if installation is not None:
        index = state.indices[operation.index]
        state.released_segments += index.install_prepared(lsn, installation)
        state.resize_index(index)
    elif operation.segment:
        state.released_segments.append(operation.segment)


def _touch_index(operation: AddVectors | DeleteVectors | SetAttributes) -> Touched:
    return Touched(index=operation.index)


def _touch_nothing(operation: InstallSegment) -> Touched:
    """A new graph changes no answer that is exact."""
    return Touched()


def _drop(state: State, dropped: Collection[VectorIndex]) -> None:
    indices = state.indices
    for index in dropped:
        index.drop()
        del indices[index.id]
    if indices:
        state.index_totals.remove_many(dropped)
    else:
        state.dropped += state.index_totals.remove_all()


def _take_apart(state: State, index: VectorIndex) -> None:
    state.released_segments += (segment.id for segment in index.segments)
    state.dropped += index.remains()


def _pack(indices: Mapping[bytes, VectorIndex]) -> Packed:
    columns, descriptions = export_indices(indices.values())
    return Packed({**pack_bytes("keys", indices), **columns}, descriptions, named_segments(descriptions))


def _unpack(description: Any, columns: Mapping[str, Array], state: State) -> dict[bytes, VectorIndex]:
    restored = restore_indices(
        columns, description, state.segments, seal_rows=state.seal_rows, first_serial=state.first_serial
    )
    indices = dict(zip(unpack_bytes("keys", columns), restored, strict=True))
    for index in restored:
        state.indices[index.id] = index
        state.index_totals.change(index)
    return indices


class IndexLine(Line, frozen=True, tag="vectorset"):
    """A vector set; what is missing is as VNEW has it."""

    key: Text
    dimension: int
    metric: str | None = None
    m: int | None = None
    ef_construction: int | None = None
    quantization: str | None = None
    recall: float | None = None
    expires_at: int | None = None
    database: int = 0


class VectorLine(Line, frozen=True, tag="vector"):
    index: Text
    key: Text
    vector: list[float] | Base64
    attributes: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    attributes_text: Text | None = None
    database: int = 0


def _dump(state: State, fields: KeyFields, index: VectorIndex, base64: bool) -> Iterator[Line]:
    parameters = index.parameters
    yield IndexLine(
        key=as_text(fields.key),
        dimension=parameters.dimension,
        metric=parameters.metric,
        m=parameters.connectivity,
        ef_construction=parameters.expansion,
        quantization=parameters.quantization,
        recall=parameters.recall,
        expires_at=fields.expires_at,
        database=fields.database,
    )
    view = index.view(state.lsn)
    pack: Callable[[Floats], Iterable[list[float] | Base64]] = _pack_base64 if base64 else _pack_numbers
    sources: list[tuple[Segment | Chunk, Lsns]] = [
        *((installed.segment, installed.deaths) for installed in view.segments),
        *((chunk, chunk.deaths[:count]) for chunk, count in view.head),
    ]
    name = as_text(fields.key)
    for source, deaths in sources:
        alive = np.flatnonzero(deaths == ALIVE)
        for start in range(0, len(alive), _DUMPED_ROWS):
            positions = alive[start : start + _DUMPED_ROWS]
            rows = rows_at(source, positions)
            for key, text, vector in zip(
                rows["keys"], rows["attributes"], pack(rows["vectors"]), strict=True
            ):
                whole = _is_object(text)
                yield VectorLine(
                    index=name,
                    key=as_text(key),
                    vector=vector,
                    attributes=msgspec.Raw(text) if whole else msgspec.UNSET,
                    attributes_text=as_text(text) if text and not whole else None,
                    database=fields.database,
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


class _Loader:
    """A vector set becomes a VNEW, vectors a VMADD for many of them.

    A VNEW is answered before anything after it is sent, so that nothing is added to a vector set that was
    there before. The expiries come last: none lapses while it is filled.
    """

    def __init__(self, replace: bool) -> None:
        self._replace = replace
        self._dimensions: dict[tuple[int, bytes], int] = {}
        # The vectors of a VMADD to come.
        self._index = 0, b""
        self._rows: list[tuple[bytes, bytes, bytes]] = []
        self._rows_bytes = 0
        self._first = self._last = 0

    def take(self, number: int, line: IndexLine | VectorLine) -> Iterable[Request]:
        if isinstance(line, IndexLine):
            yield from self.finish()
            yield from self._take_index(number, line)
        else:
            yield from self._take_vector(number, line)

    def _take_index(self, number: int, line: IndexLine) -> Iterable[Request]:
        key = as_bytes(line.key)
        if self._replace:
            yield Request(["DEL", key], number, number)
        words: list[Word] = ["VNEW", key, str(line.dimension)]
        given = {
            "METRIC": line.metric,
            "M": line.m,
            "EF_CONSTRUCTION": line.ef_construction,
            "QUANT": line.quantization,
            "RECALL": line.recall,
        }
        for name, value in given.items():
            if value is not None:
                words += [name, str(value)]
        yield Request(words, number, number, keys=1, is_barrier=True)
        self._dimensions[line.database, key] = line.dimension
        if line.expires_at is not None:
            yield Request(["PEXPIREAT", key, str(line.expires_at)], number, number, is_last=True)

    def _take_vector(self, number: int, line: VectorLine) -> Iterable[Request]:
        index = line.database, as_bytes(line.index)
        dimension = self._dimensions.get(index)
        if dimension is None:
            raise LineError("the vector set of this vector is on no line before it")
        vector = _vector_bytes(line.vector)
        if len(vector) != 4 * dimension:
            raise LineError(f"the vector does not have {dimension} numbers")
        attributes = b"" if line.attributes_text is None else as_bytes(line.attributes_text)
        if line.attributes is not msgspec.UNSET:
            attributes = bytes(line.attributes)
        if index != self._index or len(self._rows) >= _BATCH_ROWS or self._rows_bytes >= _BATCH_BYTES:
            yield from self.finish()
        if not self._rows:
            self._index, self._first, self._rows_bytes = index, number, 0
        key = as_bytes(line.key)
        self._rows.append((key, vector, attributes))
        self._last = number
        self._rows_bytes += len(key) + len(vector) + len(attributes)

    def finish(self) -> Iterable[Request]:
        if not self._rows:
            return
        words: list[Word] = ["VMADD", self._index[1]]
        has_attributes = any(attributes for _, _, attributes in self._rows)
        for key, vector, attributes in self._rows:
            words += (key, vector, attributes) if has_attributes else (key, vector)
        if has_attributes:
            words.append("ATTRS")
        rows, self._rows = len(self._rows), []
        yield Request(words, self._first, self._last, vectors=rows)


def _vector_bytes(vector: list[float] | Base64) -> bytes:
    if isinstance(vector, Base64):
        return vector.base64
    # What is too large becomes infinite, which the server refuses.
    with np.errstate(over="ignore"):
        return np.array(vector, np.float64).astype("<f4").tobytes()


VECTOR_SET: Kind[VectorIndex] = Kind(
    name="vectorset",
    types=(VectorIndex,),
    encoding=lambda index: "raw",
    bytes_held=lambda index: index.bytes_reserved,
    pack=_pack,
    unpack=_unpack,
    lines=(IndexLine, VectorLine),
    dump=_dump,
    loader=_Loader,
    drop=_drop,
    take_apart=_take_apart,
    effects={
        CreateIndex: Effect(_create_index, touch_key, _new_index),
        AddVectors: Effect(_add_vectors, _touch_index, _addition),
        SetAttributes: Effect(_add_vectors, _touch_index, _described),
        DeleteVectors: Effect(_delete_vectors, _touch_index, _deletion),
        InstallSegment: Effect(_install_segment, _touch_nothing, _installation),
    },
)
