"""The state machine: applying an operation is the only thing that changes the state, live and at recovery."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import attrs

from engram.columns import Array, ColumnFolder
from engram.effects import Keyspaces
from engram.index.segment import Segment, SegmentStore
from engram.index.vector_index import VectorIndex
from engram.keyspace import Collected, Keyspace
from engram.kinds import KINDS
from engram.large_string import String
from engram.operations import Operation
from engram.snapshot_columns import SnapshotColumns
from engram.tally import Tally


@attrs.frozen
class Totals:
    """Over all indices: live rows, rows in no segment, dead rows, segments, and bytes reserved in memory."""

    rows: int
    unindexed: int
    dead: int
    segments: int
    bytes_reserved: int


class Engine:
    """The keyspaces of all databases and the values in them, as of `lsn`.

    Nothing here reads a clock, the disk's log or a random number: the same operations give the same
    state, whether a client has just sent them or the log is read back.

    `released_segments` names segments that this state no longer refers to, and `dropped` holds large
    collections, dictionaries and lists, that nobody refers to any more; whoever runs the engine takes from
    both. `flushed` holds values that went with all others of their database, and that `take_apart` is to be
    called for. Cursors of scans are numbers from `first_serial` on.

    Attributes:
        indices: the vector indices by id.
        index_totals: what is counted of them, see `totals`.
    """

    def __init__(self, segments: SegmentStore, *, seal_rows: int, first_serial: int = 1) -> None:
        self.lsn = 0
        self.keyspaces = Keyspaces(first_serial, KINDS.of)
        self.indices: dict[int, VectorIndex] = {}
        self.released_segments: list[str] = []
        self.dropped: list[Collected] = []
        self.flushed: list[dict[Any, bytes]] = []
        self.segments = segments
        self.seal_rows = seal_rows
        self.first_serial = first_serial
        # Values that are no strings, which their keyspace counts.
        self._others: Tally[Any] = Tally(lambda value: (KINDS.of(value).bytes_held(value),), 1)
        self.index_totals = Tally(_count_index, 5)

    @property
    def keyspace(self) -> Keyspace[Any]:
        """That of database 0."""
        return self.keyspaces[0]

    def apply(self, lsn: int, operation: Operation) -> None:
        """Makes the change that is number `lsn`, the successor of the last one: see `effects.Effect`."""
        effect = KINDS.effects[type(operation)]
        prepared = None if effect.prepare is None else effect.prepare(self, lsn, operation)
        effect.carry_out(self, lsn, operation, prepared)
        self.lsn = lsn

    # For effects.

    def place(self, database: int, key: bytes, value: Any, expires_at: int | None = None) -> None:
        """A key holds a value of any kind, in place of what it held.

        Raises:
            NothingChangedError: there is no memory for one more key.
            UnknownKindError: the value is of no kind; nothing has changed.
        """
        keyspace = self.keyspaces[database]
        replaced = keyspace.values.get(key)
        keyspace.set(key, value, expires_at)
        if not isinstance(value, String):
            self._others.change(value)
        if replaced is not value:
            self.drop(database, replaced)

    def resize(self, value: Any) -> None:
        """A value that is no string may take more or less memory now."""
        self._others.change(value)

    def resize_index(self, index: VectorIndex) -> None:
        """As `resize`, of a vector index."""
        self._others.change(index)
        self.index_totals.change(index)

    def drop(self, database: int, value: Any) -> None:
        """Lets go of what no key of a database holds any more, if it is something."""
        if value is None or isinstance(value, String):
            return
        self.keyspaces[database].others.pop(value, None)
        self._others.remove(value)
        kind = KINDS.of(value)
        kind.drop(self, (value,))
        kind.take_apart(self, value)

    def copy_of(self, value: Any) -> Any:
        """The same value for another key. Raises ValueError when its kind has no copies."""
        copy = KINDS.of(value).copy
        if copy is None:
            raise ValueError(f"a {KINDS.of(value).name} is not copied")
        return copy(value)

    def flush(self, databases: Iterable[int]) -> None:
        """Takes all keys of these databases away."""
        flushed: list[dict[Any, bytes]] = []
        by_type: defaultdict[type, list[Any]] = defaultdict(list)
        for number in databases:
            keyspace = self.keyspaces[number]
            flushed.append(keyspace.others)
            for value in keyspace.others:
                by_type[type(value)].append(value)
            self.dropped += keyspace.clear()
        for values in by_type.values():
            KINDS.of(values[0]).drop(self, values)
            if any(keyspace.others for keyspace in self.keyspaces.values()):
                self._others.remove_many(values)
            else:
                self.dropped += self._others.remove_all()
        self.flushed += filter(None, flushed)

    def take_apart(self, limit: int) -> None:
        """Takes up to `limit` of the values apart that were flushed: their large parts go to `dropped`."""
        while self.flushed and limit > 0:
            values = self.flushed[-1]
            for _ in range(min(limit, len(values))):
                value, _ = values.popitem()
                KINDS.of(value).take_apart(self, value)
                limit -= 1
            if not values:
                self.flushed.pop()

    def uses(self, segment: Segment) -> bool:
        """Whether an index has this segment now."""
        index = self.indices.get(segment.index_id)
        return index is not None and any(installed.segment is segment for installed in index.segments)

    def totals(self) -> Totals:
        """Counts over all indices; takes time in proportion to those changed since the last call."""
        rows, unindexed, held, segments, size = self.index_totals.sums()
        return Totals(rows, unindexed, held - rows, segments, size)

    def bytes_held(self) -> int:
        """What the data takes in memory: see `Keyspace.bytes_held` and `Kind.bytes_held`."""
        keys = sum(keyspace.bytes_held() for keyspace in self.keyspaces.values())
        return keys + self._others.sums()[0]

    def export(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """The whole state as columns and metadata, for a snapshot; `restore` is the inverse.

        Raises no error and changes nothing; the columns may share memory with the state.
        """
        made = SnapshotColumns()
        for number, keyspace in self.keyspaces.items():
            if keyspace:
                made.add(number, keyspace)
        return made.columns, {"lsn": self.lsn, **made.metadata}

    def restore(self, folder: ColumnFolder) -> None:
        """Fills an empty engine from a snapshot.

        Raises:
            DamagedDataError: a segment that the snapshot names is missing or is not what was written.
        """
        snapshot = SnapshotColumns.read(folder)
        with self.segments.reopening(snapshot.segments):
            for found in snapshot.unpack(self):
                self.keyspaces[found.number].load(found.values, found.expiries, found.others)
                for value in found.others:
                    self._others.change(value)
        self.lsn = folder.metadata["lsn"]


def _count_index(index: VectorIndex) -> tuple[int, ...]:
    """Live rows, rows in no segment, all rows, segments, and bytes."""
    return (
        len(index.live),
        index.rows_unindexed,
        index.rows_total,
        len(index.segments),
        index.bytes_reserved,
    )
