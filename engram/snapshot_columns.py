"""How the state is laid out in a snapshot: columns for each kind of value in each database.

<database>.<kind>.<column>   what the kind packs, see `Kind.pack`
<database>.expiries-*        when keys lapse: maps of MessagePack
metadata                     `lsn`; `databases`, by number and kind what the kind says of its columns;
                             `segments`, the checksum of each that is referred to
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from engram.columns import Array, ColumnFolder
from engram.effects import State
from engram.errors import NewerFormatError
from engram.keyspace import Keyspace
from engram.kinds import KINDS
from engram.kinds.string import STRING
from engram.kinds.vector_set import VECTOR_SET
from engram.mappings import pack_mapping, unpack_mapping
from engram.persistence.snapshot import segments_of

_EXPIRIES = "expiries"


@attrs.frozen
class Restored:
    """A database in a snapshot: all its values, those that are no strings, and the expiries."""

    number: int
    values: dict[bytes, Any]
    others: dict[Any, bytes]
    expiries: dict[bytes, int]


@attrs.define
class SnapshotColumns:
    """The columns of a snapshot, and what describes them. `path` is that of its folder."""

    path: Path = Path()
    columns: dict[str, Array] = attrs.Factory(dict)
    databases: dict[str, dict[str, Any]] = attrs.Factory(dict)
    segments: dict[str, int] = attrs.Factory(dict)

    @property
    def metadata(self) -> dict[str, Any]:
        return {"databases": self.databases, "segments": self.segments}

    def add(self, number: int, keyspace: Keyspace[Any]) -> None:
        """Adds a database."""
        by_kind: dict[str, dict[bytes, Any]] = {name: {} for name in KINDS.by_name}
        if not keyspace.others:
            by_kind[STRING.name] = keyspace.values
        else:
            for key, value in keyspace.values.items():
                by_kind[KINDS.of(value).name][key] = value
        described = self.databases[str(number)] = {}
        for name, values in by_kind.items():
            if values:
                packed = KINDS.by_name[name].pack(values)
                described[name] = packed.description
                self.segments.update(packed.segments)
                self.columns.update(
                    (f"{number}.{name}.{column}", array) for column, array in packed.columns.items()
                )
        self.columns.update(
            (f"{number}.{column}", array)
            for column, array in pack_mapping(_EXPIRIES, keyspace.expiries).items()
        )

    @classmethod
    def read(cls, folder: ColumnFolder) -> SnapshotColumns:
        """The columns of an opened snapshot of any level."""
        metadata = folder.metadata
        if "databases" not in metadata:
            return _read_level_2(folder)
        return cls(folder.path, folder.columns, metadata["databases"], metadata["segments"])

    def unpack(self, state: State) -> Iterator[Restored]:
        """All databases, one after the other.

        Raises:
            NewerFormatError: a kind of value is not known.
            DamagedDataError: a segment is missing, or is not what was written.
        """
        grouped: dict[str, dict[str, Array]] = {}
        for name, column in self.columns.items():
            place, _, short = name.rpartition(".")
            grouped.setdefault(place, {})[short] = column
        for number, described in self.databases.items():
            values: dict[bytes, Any] = {}
            others: dict[Any, bytes] = {}
            for name, description in described.items():
                kind = KINDS.by_name.get(name)
                if kind is None:
                    raise NewerFormatError(self.path, f"kind of value {name} is not known")
                found = kind.unpack(description, grouped[f"{number}.{name}"], state)
                if kind is not STRING:
                    others.update((value, key) for key, value in found.items())
                if values:
                    values.update(found)
                else:
                    values = found
            expiries = unpack_mapping(_EXPIRIES, grouped[number], int)
            yield Restored(int(number), values, others, expiries)


def _read_level_2(folder: ColumnFolder) -> SnapshotColumns:
    """What a level knew one database of, with strings and vector sets in it."""
    indices = folder.metadata["indices"]
    columns = {}
    for name, column in folder.columns.items():
        if name.startswith("strings-"):
            name = f"{STRING.name}.maps-{name.removeprefix('strings-')}"
        elif name.startswith("index-"):
            name = f"{VECTOR_SET.name}.{name.removeprefix('index-')}"
        columns[f"0.{name}"] = column
    databases = {"0": {STRING.name: None, VECTOR_SET.name: indices}}
    return SnapshotColumns(folder.path, columns, databases, segments_of(folder.metadata))
