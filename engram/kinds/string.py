"""Strings: bytes, or blocks of them where they are large and were changed in part."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engram.columns import Array
from engram.effects import Effect, State, touch_key, touch_keys
from engram.kinds.kind import KeyFields, Kind, Line, Packed, Request, Text, Word, as_bytes, as_text
from engram.large_string import LargeString, String, with_range
from engram.mappings import pack_mapping, unpack_mapping
from engram.operations import AppendString, SetRange, SetString, SetStrings

# Strings of up to so many bytes Redis holds together with the record about them.
_EMBEDDED = 44

_COLUMN = "maps"

INTEGER_LOW, INTEGER_HIGH = -(1 << 63), (1 << 63) - 1
_LONGEST_INTEGER = len(str(INTEGER_LOW))


def integer_in(value: object) -> int | None:
    """The integer of 64 bits that a value is the one decimal form of, None when it is no such string."""
    if type(value) is not bytes or len(value) > _LONGEST_INTEGER:
        return None
    try:
        number = int(value)
    except ValueError:
        return None
    # Writing the number again tells its one form from all others that Python reads.
    return number if b"%d" % number == value and INTEGER_LOW <= number <= INTEGER_HIGH else None


def _set_string(state: State, lsn: int, operation: SetString, prepared: None) -> None:
    keyspace = state.keyspaces[operation.database]
    replaced = keyspace.values.get(operation.key) if keyspace.others else None
    keyspace.set(operation.key, operation.value, operation.expires_at)
    if replaced is not None:
        state.drop(operation.database, replaced)


def _string_at(state: State, database: int, key: bytes) -> String:
    value = state.keyspaces[database].values.get(key, b"")
    assert isinstance(value, String)
    return value


def _appended(state: State, lsn: int, operation: AppendString) -> String:
    value = _string_at(state, operation.database, operation.key)
    return with_range(value, len(value), operation.suffix)


def _overwritten(state: State, lsn: int, operation: SetRange) -> String:
    value = _string_at(state, operation.database, operation.key)
    return with_range(value, operation.offset, operation.data)


def _update_string(state: State, lsn: int, operation: AppendString | SetRange, value: String) -> None:
    state.keyspaces[operation.database].update(operation.key, value)


def _replaced(state: State, lsn: int, operation: SetStrings) -> list[Any]:
    """The values, no strings, in place of which there will be strings."""
    keyspace = state.keyspaces[operation.database]
    if not keyspace.others:
        return []
    values = map(keyspace.values.get, set(operation.keys))
    return [value for value in values if value is not None and not isinstance(value, String)]


def _set_strings(state: State, lsn: int, operation: SetStrings, replaced: list[Any]) -> None:
    state.keyspaces[operation.database].set_many(operation.keys, operation.values)
    for value in replaced:
        state.drop(operation.database, value)


def _encoding(value: String) -> str:
    """How Redis would hold a string that was set as a whole."""
    if integer_in(value) is not None:
        return "int"
    return "embstr" if len(value) <= _EMBEDDED else "raw"


def _pack(strings: Mapping[bytes, String]) -> Packed:
    # Strings in blocks become bytes.
    return Packed(pack_mapping(_COLUMN, strings))


def _unpack(description: Any, columns: Mapping[str, Array], state: State) -> dict[bytes, String]:
    return unpack_mapping(_COLUMN, columns, bytes)


class StringLine(Line, frozen=True, tag="string"):
    key: Text
    value: Text
    expires_at: int | None = None
    database: int = 0


def _dump(state: State, fields: KeyFields, value: String, base64: bool) -> Iterator[StringLine]:
    yield StringLine(
        key=as_text(fields.key),
        value=as_text(bytes(value)),
        expires_at=fields.expires_at,
        database=fields.database,
    )


class _Loader:
    def __init__(self, replace: bool) -> None:
        self._options: tuple[Word, ...] = () if replace else ("NX",)

    def take(self, number: int, line: StringLine) -> Iterable[Request]:
        words: list[Word] = ["SET", as_bytes(line.key), as_bytes(line.value), *self._options]
        if line.expires_at is not None:
            words += ["PXAT", str(line.expires_at)]
        yield Request(words, number, number, keys=1)

    def finish(self) -> Iterable[Request]:
        return ()


STRING: Kind[String] = Kind(
    name="string",
    types=(bytes, LargeString),
    encoding=_encoding,
    bytes_held=lambda value: sys.getsizeof(b"") + len(value),
    pack=_pack,
    unpack=_unpack,
    lines=(StringLine,),
    dump=_dump,
    loader=_Loader,
    # Strings never change: two keys may share one.
    copy=lambda value: value,
    may_be_evicted=True,
    effects={
        SetString: Effect(_set_string, touch_key),
        AppendString: Effect(_update_string, touch_key, _appended),
        SetStrings: Effect(_set_strings, touch_keys, _replaced),
        SetRange: Effect(_update_string, touch_key, _overwritten),
    },
)
