"""The state machine: applying an operation is the only thing that changes the state, live and at recovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import attrs
import msgspec
import numpy as np

from engram.columns import Array, ColumnFolder, pack_bytes, unpack_bytes
from engram.index.index_state import export_indices, named_segments, restore_indices
from engram.index.parameters import Parameters
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import (
    Addition,
    Deletion,
    Installation,
    OneAddition,
    VectorIndex,
)
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

Prepare = Callable[[int, Any], Any]
CarryOut = Callable[[int, Any, Any], None]

_FLOATS = np.dtype("<f4")

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
        self.changes: dict[type[Operation], tuple[Prepare | None, CarryOut]] = {
            SetString: (None, self._set_string),
            AppendString: (self._appended, self._update_string),
            DeleteKeys: (None, self._delete_keys),
            SetExpiry: (None, self._set_expiry),
            Flush: (None, self._flush),
            CreateIndex: (self._new_index, self._create_index),
            AddVectors: (self._addition, self._add_vectors),
            DeleteVectors: (self._deletion, self._delete_vectors),
            InstallSegment: (self._installation, self._install_segment),
            SetAttributes: (self._described, self._add_vectors),
            SetStrings: (self._replaced, self._set_strings),
            SetRange: (self._overwritten, self._update_string),
            RenameKey: (None, self._rename_key),
            CopyKey: (None, self._copy_key),
        }

    def apply(self, lsn: int, operation: Operation) -> None:
        """Makes the change that is number `lsn`, the successor of the last one.

        `changes` has its two steps. What the first, if any, raises has changed nothing; it is called with LSN
        and operation, and what it returns is for the second, which is called at once, with all three. What
        that raises, but for a NothingChangedError, leaves the state between two operations. The caller of
        both steps sets `lsn` then.
        """
        prepare, carry_out = self.changes[type(operation)]
        prepared = None if prepare is None else prepare(lsn, operation)
        carry_out(lsn, operation, prepared)
        self.lsn = lsn

    # Where a table may have to grow, that comes first: it is done as a whole or not at all.

    def _set_string(self, lsn: int, operation: SetString, prepared: None) -> None:
        replaced = self.keyspace.values.get(operation.key) if self.indices else None
        self.keyspace.set(operation.key, operation.value, operation.expires_at)
        if replaced is not None:
            self._drop(replaced)

    def _appended(self, lsn: int, operation: AppendString) -> String:
        value = self.keyspace.values.get(operation.key, b"")
        assert not isinstance(value, VectorIndex)
        return with_range(value, len(value), operation.suffix)

    def _overwritten(self, lsn: int, operation: SetRange) -> String:
        value = self.keyspace.values.get(operation.key, b"")
        assert not isinstance(value, VectorIndex)
        return with_range(value, operation.offset, operation.data)

    def _update_string(self, lsn: int, operation: AppendString | SetRange, value: String) -> None:
        self.keyspace.update(operation.key, value)

    def _replaced(self, lsn: int, operation: SetStrings) -> list[VectorIndex]:
        """The indices in place of which there will be strings."""
        if not self.indices:
            return []
        values = map(self.keyspace.values.get, set(operation.keys))
        return [value for value in values if isinstance(value, VectorIndex)]

    def _set_strings(self, lsn: int, operation: SetStrings, replaced: list[VectorIndex]) -> None:
        self.keyspace.set_many(operation.keys, operation.values)
        for index in replaced:
            self._drop(index)

    def _rename_key(self, lsn: int, operation: RenameKey, prepared: None) -> None:
        if operation.source != operation.destination:
            replaced = self.keyspace.values.get(operation.destination)
            self.keyspace.rename(operation.source, operation.destination)
            self._drop(replaced)

    def _copy_key(self, lsn: int, operation: CopyKey, prepared: None) -> None:
        value = self.keyspace.values[operation.source]
        assert not isinstance(value, VectorIndex)
        replaced = self.keyspace.values.get(operation.destination)
        self.keyspace.set(operation.destination, value, self.keyspace.expiries.get(operation.source))
        self._drop(replaced)

    def _delete_keys(self, lsn: int, operation: DeleteKeys, prepared: None) -> None:
        for key in operation.keys:
            self._drop(self.keyspace.delete(key))

    def _set_expiry(self, lsn: int, operation: SetExpiry, prepared: None) -> None:
        self.keyspace.set_expiry(operation.key, operation.expires_at)

    def _flush(self, lsn: int, operation: Flush, prepared: None) -> None:
        for index in list(self.indices.values()):
            self._drop(index)
        self.dropped += self.keyspace.clear()

    def _new_index(self, lsn: int, operation: CreateIndex) -> VectorIndex:
        parameters = Parameters(
            dimension=operation.dimension,
            metric=operation.metric,
            connectivity=operation.connectivity,
            expansion=operation.expansion,
            quantization=operation.quantization,
            recall=operation.recall,
        )
        return VectorIndex(lsn, parameters, seal_rows=self._seal_rows, first_serial=self._first_serial)

    def _create_index(self, lsn: int, operation: CreateIndex, index: VectorIndex) -> None:
        replaced = self.keyspace.values.get(operation.key)
        self.keyspace.set(operation.key, index)
        self.indices[lsn] = index
        self._uncounted.add(lsn)
        self._drop(replaced)

    def _addition(self, lsn: int, operation: AddVectors) -> tuple[VectorIndex, Addition | OneAddition]:
        index = self.indices[operation.index]
        keys = operation.keys
        attributes: Sequence[bytes | None] = operation.attributes
        vectors = np.frombuffer(operation.vectors, _FLOATS)
        if len(keys) == 1:
            return index, index.prepare_one(keys[0], vectors, attributes[0] if attributes else None)
        vectors = vectors.reshape(len(keys), -1)
        if not attributes and not index.live.keys().isdisjoint(keys):
            attributes = (None,) * len(keys)
        if attributes:
            attributes = [
                text if text is not None else index.attributes(key)
                for key, text in zip(keys, attributes, strict=True)
            ]
        return index, index.prepare_addition(keys, vectors, attributes)

    def _described(self, lsn: int, operation: SetAttributes) -> tuple[VectorIndex, Addition | OneAddition]:
        index = self.indices[operation.index]
        found = [index.vector(key) for key in operation.keys]
        vectors = np.frombuffer(b"".join(vector for vector in found if vector is not None), _FLOATS)
        vectors = vectors.reshape(len(found), -1)
        return index, index.prepare_addition(operation.keys, vectors, operation.attributes)

    def _add_vectors(
        self,
        lsn: int,
        operation: AddVectors | SetAttributes,
        prepared: tuple[VectorIndex, Addition | OneAddition],
    ) -> None:
        index, addition = prepared
        index.add_prepared(lsn, addition)
        self._uncounted.add(index.id)

    def _deletion(self, lsn: int, operation: DeleteVectors) -> Deletion:
        return self.indices[operation.index].prepare_deletion(operation.keys)

    def _delete_vectors(self, lsn: int, operation: DeleteVectors, deletion: Deletion) -> None:
        self.indices[operation.index].delete_prepared(lsn, deletion)
        self._uncounted.add(operation.index)

    def _installation(self, lsn: int, operation: InstallSegment) -> Installation | None:
        index = self.indices.get(operation.index)
        if index is None:
            return None
        segment = self._segments.take(operation.segment, operation.checksum) if operation.segment else None
        return index.prepare_installation(lsn, segment, operation.through, operation.replaces)

    def _install_segment(
        self, lsn: int, operation: InstallSegment, installation: Installation | None
    ) -> None:
        if installation is not None:
            self.released_segments += self.indices[operation.index].install_prepared(lsn, installation)
            self._uncounted.add(operation.index)
        elif operation.segment:
            self.released_segments.append(operation.segment)

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
        indices = {key: value for key, value in values.items() if isinstance(value, VectorIndex)}
        index_columns, descriptions = export_indices(indices.values())
        columns = {
            **_pack_mapping("strings", strings),
            **_pack_mapping("expiries", self.keyspace.expiries),
            **pack_bytes("index-keys", indices),
            **{f"index-{name}": column for name, column in index_columns.items()},
        }
        return columns, {"lsn": self.lsn, "indices": descriptions}

    def restore(self, folder: ColumnFolder) -> None:
        """Fills an empty engine from a snapshot.

        Raises:
            DamagedDataError: a segment that the snapshot names is missing or is not what was written.
        """
        columns, descriptions = folder.columns, folder.metadata["indices"]
        with self._segments.reopening(named_segments(descriptions)):
            values: dict[bytes, String | VectorIndex] = _unpack_mapping("strings", columns, bytes)
            indices = restore_indices(
                _of_indices(columns),
                descriptions,
                self._segments,
                seal_rows=self._seal_rows,
                first_serial=self._first_serial,
            )
            for key, index in zip(unpack_bytes("index-keys", columns), indices, strict=True):
                values[key] = index
                self.indices[index.id] = index
                self._uncounted.add(index.id)
        expiries = _unpack_mapping("expiries", columns, int)
        self.keyspace.load(values, expiries)
        self.lsn = folder.metadata["lsn"]


def _of_indices(columns: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix("index-"): column for name, column in columns.items() if name.startswith("index-")
    }


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
