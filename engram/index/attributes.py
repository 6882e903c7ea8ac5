"""Attributes of rows as columns: what their JSON objects say, field by field, as arrays.

A filter (`filters`) knows four kinds of values: numbers (JSON's booleans are 1 and 0), strings, null, and
tuples (JSON's arrays). Anything else is missing, and so is every field of a row whose attributes are not a
JSON object.

The fields that most rows have, up to `MOST_FIELDS`, get a column each. A cell says of which kind the value
is, and holds a number, or the code of a string in the field's dictionary, or those of a tuple of strings.
Other tuples, long strings, and strings beyond what dictionaries may hold are of kind OTHER: the row's JSON
text has to be read. The *rest* is one column for all fields without one: OTHER in the rows that have such
fields.
"""

from __future__ import annotations

import math
import re
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import attrs
import msgspec
import numpy as np
import numpy.typing as npt

from engram.columns import Array, pack_bytes
from engram.index.distances import Doubles
from engram.index.texts import Positions, Texts

MISSING, NUMBER, STRING, NULL, TUPLE, OTHER = range(6)

# More fields than this are answered from the JSON texts.
MOST_FIELDS = 64

# Selectors name fields made of these only; others need no column.
_SELECTABLE = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_NAME = 128

# Longer strings, in characters, are rarely compared whole, and would be stored twice.
_LONGEST_STRING = 64

# All dictionaries together hold so many strings a row: an identifier or two, different in each row, fit.
_STRINGS_PER_ROW = 2

_FIRST_ITEMS = 16

# How many rows are looked at to find the most frequent fields, and how many JSON texts are held at once.
_SAMPLE_ROWS = 4096
_TEXTS_AT_ONCE = 256

Kinds: TypeAlias = npt.NDArray[np.uint8]
Codes: TypeAlias = npt.NDArray[np.int32]

# A value as filters see it; None is null. What is in a tuple within a tuple matters to no filter.
Value: TypeAlias = "float | str | tuple[Value, ...] | None"

_decode = msgspec.json.Decoder().decode


def decode_fields(text: bytes) -> dict[str, Any]:
    """The fields of a JSON object, as msgspec decodes them; none where the text is anything else."""
    if not text:
        return {}
    try:
        decoded = _decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return decoded if type(decoded) is dict else {}


def to_value(decoded: Any) -> Value:
    """A decoded JSON value as filters see it.

    Raises:
        ValueError: it is an object or holds one, and counts as missing.
    """
    if decoded is None or isinstance(decoded, float | str):
        return decoded
    if isinstance(decoded, int):
        return _to_float(decoded)
    if isinstance(decoded, list):
        nested = [item for item in decoded if isinstance(item, list)]
        while nested:
            items = nested.pop()
            nested += [item for item in items if isinstance(item, list)]
            if any(isinstance(item, dict) for item in items):
                raise ValueError
        return tuple(() if isinstance(item, list) else to_value(item) for item in decoded)
    raise ValueError


def _to_float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


class Strings(Protocol):
    """The distinct strings of a field; codes count from 0."""

    def __len__(self) -> int: ...

    def find(self, text: str) -> int:
        """The code of a string, -1 when it is not there."""
        ...

    def all(self) -> list[str]:
        """The strings, by code."""
        ...


@attrs.frozen(eq=False)
class SortedStrings:
    """Strings `start` to `end` of `texts`, in increasing order; none is decoded before it is needed."""

    texts: Texts
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def find(self, text: str) -> int:
        """The code of a string, -1 when it is not there."""
        wanted = text.encode(errors="surrogateescape")
        position = bisect_left(range(self.start, self.end), wanted, key=self._at) + self.start
        return position - self.start if position < self.end and self._at(position) == wanted else -1

    def all(self) -> list[str]:
        """The strings, by code."""
        return [text.decode() for text in self.texts.at(np.arange(self.start, self.end))]

    def _at(self, position: int) -> bytes:
        ends = self.texts.ends
        start = ends[position - 1] if position else 0
        return self.texts.joined[start : ends[position]].tobytes()


@attrs.frozen(eq=False)
class AddedStrings:
    """Strings in the order they came; there may be more than any row in view has."""

    codes: dict[str, int]

    def __len__(self) -> int:
        return len(self.codes)

    def find(self, text: str) -> int:
        """The code of a string, -1 when it is not there."""
        return self.codes.get(text, -1)

    def all(self) -> list[str]:
        """The strings, by code."""
        return list(self.codes)


@attrs.frozen(eq=False)
class Field:
    """One field of n rows.

    kinds: (n,) uint8, which of MISSING, NUMBER, STRING, NULL, TUPLE, OTHER the value is
    numbers: (n,) float64, 0 where there is none
    codes: (n,) int32 into `strings`, -1 where there is none
    items: int32, the codes in tuples
    bounds: (n + 1,) int64; the items of row i are those from bounds[i] to bounds[i + 1]
    seen: has bit `kind` set for each kind that may occur

    Numbers, codes, and items with bounds are None when no row has any.
    """

    kinds: Kinds
    numbers: Doubles | None
    codes: Codes | None
    items: Codes | None
    bounds: Positions | None
    strings: Strings
    seen: int

    def may_be(self, kind: int) -> bool:
        """Whether a row of that kind may occur."""
        return bool(self.seen >> kind & 1)

    def rows(self, start: int, end: int) -> Field:
        """The rows from `start` to `end`."""
        return Field(
            self.kinds[start:end],
            None if self.numbers is None else self.numbers[start:end],
            None if self.codes is None else self.codes[start:end],
            self.items,
            None if self.bounds is None else self.bounds[start : end + 1],
            self.strings,
            self.seen,
        )


@attrs.frozen(eq=False)
class AttributeColumns:
    """The attributes of `rows` rows.

    `texts` gives the JSON texts of the rows at some positions, empty for those without.
    """

    rows: int
    fields: Mapping[str, Field]
    rest: Field | None
    texts: Callable[[Positions], list[bytes]]

    def field(self, name: str) -> Field | None:
        """The column a field is in, which may be the rest; None when no row has it."""
        return self.fields.get(name, self.rest)


class _FieldWriter:
    """A column that is being filled."""

    __slots__ = (
        "_bounds_set",
        "_codes_view",
        "_kinds_view",
        "_numbers_view",
        "bounds",
        "codes",
        "items",
        "kinds",
        "numbers",
        "present",
        "seen",
        "strings",
    )

    def __init__(self, rows: int) -> None:
        self.kinds: Kinds = np.zeros(rows, np.uint8)
        self.numbers: Doubles | None = None
        self.codes: Codes | None = None
        self.items: Codes = np.empty(_FIRST_ITEMS, np.int32)
        self.bounds: Positions | None = None
        # How many of the bounds are set, the first one, 0, included.
        self._bounds_set = 1
        self.strings: dict[str, int] = {}
        self.seen = 0
        self.present = 0
        # Items of a memoryview are set in a third of the time that those of an array are.
        self._kinds_view = self.kinds.data
        self._numbers_view: Any = memoryview(b"")
        self._codes_view = memoryview(b"")

    def mark(self, position: int, kind: int) -> None:
        if not self._kinds_view[position]:
            self.present += 1
        self._kinds_view[position] = kind
        self.seen |= 1 << kind

    def write_number(self, position: int, number: float) -> None:
        if self.numbers is None:
            self.numbers = np.zeros(len(self.kinds))
            self._numbers_view = self.numbers.data
        self._numbers_view[position] = number
        self.mark(position, NUMBER)

    def write_code(self, position: int, code: int) -> None:
        if self.codes is None:
            self.codes = np.full(len(self.kinds), -1, np.int32)
            self._codes_view = self.codes.data
        self._codes_view[position] = code
        self.mark(position, STRING)

    def write_tuple(self, position: int, codes: list[int]) -> None:
        bounds = self._bounds_through(position)
        start = int(bounds[position])
        end = start + len(codes)
        if end > len(self.items):
            # What was given out keeps the old array.
            self.items = np.concatenate([self.items, np.empty(end, np.int32)])
        self.items[start:end] = codes
        bounds[position + 1] = end
        self._bounds_set = position + 2
        self.mark(position, TUPLE)

    def _bounds_through(self, count: int) -> Positions:
        """The bounds, with those of the first `count` rows set."""
        if self.bounds is None:
            self.bounds = np.zeros(len(self.kinds) + 1, np.int64)
        if self._bounds_set <= count:
            self.bounds[self._bounds_set : count + 1] = self.bounds[self._bounds_set - 1]
            self._bounds_set = count + 1
        return self.bounds

    def first_rows(self, count: int, written: int) -> Field:
        """The first `count` of the `written` rows."""
        return Field(
            self.kinds,
            self.numbers,
            self.codes,
            None if self.bounds is None else self.items,
            None if self.bounds is None else self._bounds_through(written),
            AddedStrings(self.strings),
            self.seen | (self.present < written) << MISSING,
        ).rows(0, count)


class AttributeWriter:
    """Fills columns for up to `rows` rows, given one after the other.

    Fields get columns in the order they come; `names` come before all others.
    """

    def __init__(self, rows: int, names: Iterable[str] = ()) -> None:
        self.written = 0
        self._rows = rows
        self._strings_left = _STRINGS_PER_ROW * rows
        self._fields = {name: _FieldWriter(rows) for name in names}
        self._rest: _FieldWriter | None = None

    def write(self, text: bytes) -> None:
        """Adds a row with these attributes; an empty text has none."""
        position = self.written
        self.written = position + 1
        for name, decoded in decode_fields(text).items():
            field = self._fields.get(name) or self._add(name)
            if field is None:
                continue
            if field is self._rest:
                field.mark(position, OTHER)
            elif isinstance(decoded, str):
                self._write_string(field, position, decoded)
            elif isinstance(decoded, float):
                field.write_number(position, decoded)
            elif isinstance(decoded, int):
                field.write_number(position, _to_float(decoded))
            elif decoded is None:
                field.mark(position, NULL)
            elif isinstance(decoded, list):
                self._write_tuple(field, position, decoded)

    def columns(self, count: int, texts: Callable[[Positions], list[bytes]]) -> AttributeColumns:
        """The columns of the first `count` rows; what is written later does not show in them."""
        fields = {name: field.first_rows(count, self.written) for name, field in self._fields.items()}
        rest = None if self._rest is None else self._rest.first_rows(count, self.written)
        return AttributeColumns(count, fields, rest, texts)

    def _add(self, name: str) -> _FieldWriter | None:
        """The column that a field without one goes to; None when no filter can name the field."""
        if not _SELECTABLE.fullmatch(name):
            return None
        if len(name) <= _LONGEST_NAME and len(self._fields) < MOST_FIELDS:
            self._fields[name] = field = _FieldWriter(self._rows)
            return field
        if self._rest is None:
            self._rest = _FieldWriter(self._rows)
        return self._rest

    def _write_string(self, field: _FieldWriter, position: int, text: str) -> None:
        code = self._code(field, text)
        if code < 0:
            field.mark(position, OTHER)
        else:
            field.write_code(position, code)

    def _write_tuple(self, field: _FieldWriter, position: int, items: list[Any]) -> None:
        codes: list[int] = []
        for item in items:
            code = self._code(field, item) if isinstance(item, str) else -1
            if code < 0:
                with suppress(ValueError):
                    to_value(items)
                    field.mark(position, OTHER)
                return
            codes.append(code)
        field.write_tuple(position, codes)

    def _code(self, field: _FieldWriter, text: str) -> int:
        """The code of a string, a new one if need be; -1 when it does not get one."""
        code = field.strings.get(text)
        if code is None:
            if len(text) > _LONGEST_STRING or not self._strings_left:
                return -1
            self._strings_left -= 1
            field.strings[text] = code = len(field.strings)
        return code


class GrowingAttributes:
    """The columns of up to `capacity` rows that are appended one by one; threads may ask for them at once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._writer = AttributeWriter(capacity)
        self._lock = threading.Lock()

    def columns(self, count: int, texts: Callable[[Positions], list[bytes]]) -> AttributeColumns:
        """The columns of the first `count` rows.

        `texts` gives JSON texts by position. Each is decoded once: it must not change any more.

        Raises:
            ValueError: there is no room for so many rows.
        """
        if not 0 <= count <= self._capacity:
            raise ValueError(f"{count} rows, where there is room for {self._capacity}")
        with self._lock:
            writer = self._writer
            if count > writer.written:
                # What fails half-way, for lack of memory, is not used again.
                self._writer = AttributeWriter(self._capacity)
                for text in texts(np.arange(writer.written, count)):
                    writer.write(text)
                self._writer = writer
            return writer.columns(count, texts)


def decode_columns(texts: Texts) -> AttributeColumns:
    """The columns of rows with these JSON texts."""
    rows = len(texts.ends)
    if not len(texts.joined):
        return AttributeColumns(rows, {}, None, texts.at)
    sample = _some_at_a_time(texts, np.arange(0, rows, max(1, rows // _SAMPLE_ROWS)))
    frequency = Counter(
        name for text in sample for name in decode_fields(text) if _SELECTABLE.fullmatch(name)
    )
    names = (name for name, _ in frequency.most_common(MOST_FIELDS) if len(name) <= _LONGEST_NAME)
    writer = AttributeWriter(rows, names)
    for text in _some_at_a_time(texts, np.arange(rows)):
        writer.write(text)
    return writer.columns(rows, texts.at)


def _some_at_a_time(texts: Texts, positions: Positions) -> Iterator[bytes]:
    for start in range(0, len(positions), _TEXTS_AT_ONCE):
        yield from texts.at(positions[start : start + _TEXTS_AT_ONCE])


def pack_attributes(columns: AttributeColumns) -> tuple[dict[str, Array], list[Any]]:
    """Arrays, and metadata fit for JSON, that `unpack_attributes` reads; both are empty without fields.

    All arrays of one type are in one, since each that is mapped holds a descriptor: attribute-uint8,
    attribute-int32, attribute-int64 and attribute-float64. The metadata holds a dict for each field:

    name                                   None for the rest
    seen                                   that of the field
    kinds, numbers, codes, items, bounds   start and end in the array of their type; None for None
    strings                                start and end, in attribute-int64, of where the strings end in
                                           attribute-uint8, in increasing order; the first is where they begin
    """
    parts: dict[str, list[Array]] = {}
    placed: Counter[str] = Counter()

    def place(array: Array | None) -> list[int] | None:
        if array is None:
            return None
        name = f"attribute-{array.dtype.name}"
        parts.setdefault(name, []).append(array)
        placed[name] += len(array)
        return [placed[name] - len(array), placed[name]]

    fields: list[tuple[str | None, Field]] = list(columns.fields.items())
    if columns.rest is not None:
        fields.append((None, columns.rest))
    metadata: list[Any] = []
    for name, field in fields:
        strings = [text.encode() for text in field.strings.all()]
        order = sorted(range(len(strings)), key=strings.__getitem__)
        # The last place is that of code -1.
        new_codes = np.full(len(order) + 1, -1, np.int32)
        new_codes[order] = np.arange(len(order))
        packed = pack_bytes("strings", [strings[code] for code in order])
        before = placed["attribute-uint8"]
        place(packed["strings-bytes"])
        items, bounds = field.items, field.bounds
        metadata.append(
            {
                "name": name,
                "seen": field.seen,
                "kinds": place(field.kinds),
                "numbers": place(field.numbers),
                "codes": place(None if field.codes is None else new_codes[field.codes]),
                "items": place(None if items is None or bounds is None else new_codes[items[: bounds[-1]]]),
                "bounds": place(bounds),
                "strings": place(np.concatenate([[before], packed["strings-ends"] + before])),
            }
        )
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, metadata


def unpack_attributes(arrays: Mapping[str, Array], metadata: list[Any], texts: Texts) -> AttributeColumns:
    """The inverse of `pack_attributes`, over the arrays as they are."""
    fields: dict[str, Field] = {}
    rest: Field | None = None

    def placed(kind: type[np.generic], place: list[int] | None) -> Any:
        return None if place is None else arrays[f"attribute-{np.dtype(kind).name}"][place[0] : place[1]]

    for each in metadata:
        first, end = each["strings"]
        field = Field(
            placed(np.uint8, each["kinds"]),
            placed(np.float64, each["numbers"]),
            placed(np.int32, each["codes"]),
            placed(np.int32, each["items"]),
            placed(np.int64, each["bounds"]),
            SortedStrings(Texts(arrays["attribute-uint8"], arrays["attribute-int64"]), first + 1, end),
            each["seen"],
        )
        if each["name"] is None:
            rest = field
        else:
            fields[each["name"]] = field
    return AttributeColumns(len(texts.ends), fields, rest, texts.at)
