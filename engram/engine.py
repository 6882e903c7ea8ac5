"""The state machine: applying an operation is the only thing that changes the state, live and at recovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import attrs
import msgspec
import numpy as np

from engram.columns import Array, ColumnFolder, pack_bytes, unpack_bytes
from engram.index.parameters import Parameters
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import IndexState, VectorIndex
from engram.keyspace import Collected, Keyspace
from engram.large_string import String, with_range
from engram.operations import (
    AddVectors,
    AppendString,
    CopyKey,
    CreateIndex,
    DeleteKeys,
    DeleteVectors,
    Flush,
    InstallSegment,
    Operation,
    RenameKey,
    SetAttributes,
    SetExpiry,
    SetRange,
    SetString,
    SetStrings,
)

Apply = Callable[[int, Any], None]

# Entries of a map in a snapshot. Other threads, which open segments, wait while one is decoded.
_MAP_ENTRIES = 1 << 14


@attrs.frozen
class Totals:
    """Over all indices: live rows, rows in no segment, dead rows, segments, and bytes reserved in memory."""

    rows: int
    unindexed: int
    dead: int
    segments: int
    bytes_reserved: int


_NO_COUNTS = (0, 0, 0, 0, 0)


class Engine:
    """The keyspace and the vector indices in it, as of `lsn`.

    Nothing here reads a clock, the disk's log or a random number: the same operations give the same
    state, whether a client has just sent them or the log is read back.

    `released_segments` names segments that this state no longer refers to, and `dropped` holds large
    collections, dictionaries and lists, that nobody refers to any more; whoever runs the engine takes from
    both. Cursors of scans are numbers from `first_serial` on.
    """

    def __init__(self, segments: SegmentStore, *, seal_rows: int, first_serial: int = 1) -> None:
        self.lsn = 0
        self.keyspace: Keyspace[VectorIndex] = Keyspace(first_serial)
        self.indices: dict[int, VectorIndex] = {}
        self.released_segments: list[str] = []
        self.dropped: list[Collected] = []
        self._segments = segments
        self._seal_rows = seal_rows
        self._first_serial = first_serial
        # Live rows, rows in no segment, all rows, segments, bytes: of all indices, and what of it comes from
        # each; and the indices of which that is not true any more.
        self._totals = _NO_COUNTS
        self._counted: dict[int, tuple[int, int, int, int, int]] = {}
        self._uncounted: set[int] = set()
        self._apply: dict[type[Operation], Apply] = {
            SetString: self._set_string,
            AppendString: self._append_string,
            DeleteKeys: self._delete_keys,
            SetExpiry: self._set_expiry,
            Flush: self._flush,
            CreateIndex: self._create_index,
            AddVectors: self._add_vectors,
            DeleteVectors: self._delete_vectors,
            InstallSegment: self._install_segment,
            SetAttributes: self._set_attributes,
            SetStrings: self._set_strings,
            SetRange: self._set_range,
            RenameKey: self._rename_key,
            CopyKey: self._copy_key,
        }

    def apply(self, lsn: int, operation: Operation) -> None:
        """Makes the change that is number `lsn`, the successor of the last one."""
        self._apply[type(operation)](lsn, operation)
        self.lsn = lsn

    def _set_string(self, lsn: int, operation: SetString) -> None:
        if self.indices:
            self._drop(self.keyspace.values.get(operation.key))
        self.keyspace.set(operation.key, operation.value, operation.expires_at)

    def _append_string(self, lsn: int, operation: AppendString) -> None:
        value = self.keyspace.values.get(operation.key, b"")
        assert not isinstance(value, VectorIndex)
        self.keyspace.update(operation.key, with_range(value, len(value), operation.suffix))

    def _set_strings(self, lsn: int, operation: SetStrings) -> None:
        if self.indices:
            for key in set(operation.keys):
                self._drop(self.keyspace.values.get(key))
        self.keyspace.set_many(operation.keys, operation.values)

    def _set_range(self, lsn: int, operation: SetRange) -> None:
        value = self.keyspace.values.get(operation.key, b"")
        assert not isinstance(value, VectorIndex)
        self.keyspace.update(operation.key, with_range(value, operation.offset, operation.data))

    def _rename_key(self, lsn: int, operation: RenameKey) -> None:
        if operation.source != operation.destination:
            self._drop(self.keyspace.values.get(operation.destination))
            self.keyspace.rename(operation.source, operation.destination)

    def _copy_key(self, lsn: int, operation: CopyKey) -> None:
        value = self.keyspace.values[operation.source]
        assert not isinstance(value, VectorIndex)
        self._drop(self.keyspace.values.get(operation.destination))
        self.keyspace.set(operation.destination, value, self.keyspace.expiries.get(operation.source))

    def _delete_keys(self, lsn: int, operation: DeleteKeys) -> None:
        for key in operation.keys:
            self._drop(self.keyspace.delete(key))

    def _set_expiry(self, lsn: int, operation: SetExpiry) -> None:
        self.keyspace.set_expiry(operation.key, operation.expires_at)

    def _flush(self, lsn: int, operation: Flush) -> None:
        for index in list(self.indices.values()):
            self._drop(index)
        self.dropped += self.keyspace.clear()

    def _create_index(self, lsn: int, operation: CreateIndex) -> None:
        parameters = Parameters(
            dimension=operation.dimension,
            metric=operation.metric,
            connectivity=operation.connectivity,
            expansion=operation.expansion,
            quantization=operation.quantization,
            recall=operation.recall,
        )
        self._drop(self.keyspace.values.get(operation.key))
        index = VectorIndex(lsn, parameters, seal_rows=self._seal_rows, first_serial=self._first_serial)
        self.indices[lsn] = index
        self._uncounted.add(lsn)
        self.keyspace.set(operation.key, index)

    def _add_vectors(self, lsn: int, operation: AddVectors) -> None:
        index = self.indices[operation.index]
        self._uncounted.add(index.id)
        keys = operation.keys
        attributes: Sequence[bytes | None] = operation.attributes
        vectors = np.frombuffer(operation.vectors, "<f4").reshape(len(keys), -1)
        if not attributes and not index.live.keys().isdisjoint(keys):
            attributes = (None,) * len(keys)
        if attributes:
            attributes = [
                text if text is not None else index.attributes(key)
                for key, text in zip(keys, attributes, strict=True)
            ]
        index.add(lsn, keys, vectors, attributes)

    def _set_attributes(self, lsn: int, operation: SetAttributes) -> None:
        index = self.indices[operation.index]
        self._uncounted.add(index.id)
        found = [index.vector(key) for key in operation.keys]
        vectors = np.frombuffer(b"".join(vector for vector in found if vector is not None), "<f4")
        index.add(lsn, operation.keys, vectors.reshape(len(found), -1), operation.attributes)

    def _delete_vectors(self, lsn: int, operation: DeleteVectors) -> None:
        self._uncounted.add(operation.index)
        self.indices[operation.index].delete(lsn, operation.keys)

    def _install_segment(self, lsn: int, operation: InstallSegment) -> None:
        index = self.indices.get(operation.index)
        if index is None:
            if operation.segment:
                self.released_segments.append(operation.segment)
            return
        self._uncounted.add(index.id)
        segment = self._segments.take(operation.segment, operation.checksum) if operation.segment else None
        self.released_segments += index.install(lsn, segment, operation.through, operation.replaces)

    def _drop(self, value: String | VectorIndex | None) -> None:
        if isinstance(value, VectorIndex):
            value.drop()
            del self.indices[value.id]
            self._uncounted.add(value.id)
            self.released_segments += (segment.id for segment in value.segments)
            self.dropped += value.remains()

    def uses(self, segment: Segment) -> bool:
        """Whether an index has this segment now."""
        index = self.indices.get(segment.index_id)
        return index is not None and any(installed.segment is segment for installed in index.segments)

    def totals(self) -> Totals:
        """Counts over all indices; takes time in proportion to those changed since the last call."""
        self._count()
        rows, unindexed, held, segments, size = self._totals
        return Totals(rows, unindexed, held - rows, segments, size)

    def bytes_held(self) -> int:
        """What the data takes in memory: see `Keyspace.bytes_held` and `VectorIndex.bytes_reserved`."""
        if self._uncounted:
            self._count()
        return self.keyspace.bytes_held() + self._totals[-1]

    def _count(self) -> None:
        rows, unindexed, held, segments, size = self._totals
        for index_id in self._uncounted:
            before = self._counted.pop(index_id, _NO_COUNTS)
            index = self.indices.get(index_id)
            now = _NO_COUNTS
            if index is not None:
                now = (
                    len(index.live),
                    index.rows_unindexed,
                    index.rows_total,
                    len(index.segments),
                    index.bytes_reserved,
                )
                self._counted[index_id] = now
            rows += now[0] - before[0]
            unindexed += now[1] - before[1]
            held += now[2] - before[2]
            segments += now[3] - before[3]
            size += now[4] - before[4]
        self._uncounted.clear()
        self._totals = rows, unindexed, held, segments, size

    def export(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """The whole state as columns and metadata, for a snapshot; `restore` is the inverse.

        Raises no error and changes nothing; the columns may share memory with the state.
        """
        values = self.keyspace.values
        strings = {key: value for key, value in values.items() if not isinstance(value, VectorIndex)}
        states = [(key, value.export()) for key, value in values.items() if isinstance(value, VectorIndex)]
        columns = {
            **_pack_mapping("strings", strings),
            **_pack_mapping("expiries", self.keyspace.expiries),
            **pack_bytes("index-keys", [key for key, _ in states]),
            **IndexState.pack([state for _, state in states]),
        }
        return columns, {"lsn": self.lsn, "indices": [state.describe() for _, state in states]}

    def restore(self, folder: ColumnFolder) -> None:
        """Fills an empty engine from a snapshot.

        Raises:
            DamagedDataError: a segment that the snapshot names is missing or is not what was written.
        """
        columns = folder.columns
        states = IndexState.unpack(folder.metadata["indices"], columns)
        segments = {saved.id: saved.checksum for state in states for saved in state.segments}
        with self._segments.reopening(segments):
            values: dict[bytes, String | VectorIndex] = _unpack_mapping("strings", columns, bytes)
            for key, state in zip(unpack_bytes("index-keys", columns), states, strict=True):
                index = VectorIndex.restore(
                    state, self._segments, seal_rows=self._seal_rows, first_serial=self._first_serial
                )
                values[key] = index
                self.indices[index.id] = index
                self._uncounted.add(index.id)
        expiries = _unpack_mapping("expiries", columns, int)
        self.keyspace.load(values, expiries)
        self.lsn = folder.metadata["lsn"]


def _pack_mapping(name: str, mapping: Mapping[bytes, Any]) -> dict[str, Array]:
    """Columns with maps of MessagePack, from which a dictionary is made sooner than from keys and values."""
    items = iter(mapping.items())
    parts = iter(lambda: dict(islice(items, _MAP_ENTRIES)), {})
    # Strings in blocks become bytes.
    encode = msgspec.msgpack.Encoder(enc_hook=bytes).encode
    return pack_bytes(name, map(encode, parts))


def _unpack_mapping(name: str, columns: Mapping[str, Array], values: type) -> dict[bytes, Any]:
    """The inverse of `_pack_mapping`."""
    decoder = msgspec.msgpack.Decoder(dict[bytes, values])  # type: ignore[valid-type]
    mapping: dict[bytes, Any] = {}
    for part in unpack_bytes(name, columns):
        mapping.update(decoder.decode(part))
    return mapping
