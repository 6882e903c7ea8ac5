from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index.attributes import (
    MISSING,
    MOST_FIELDS,
    NULL,
    NUMBER,
    OTHER,
    STRING,
    TUPLE,
    AttributeColumns,
    AttributeWriter,
    Field,
    GrowingAttributes,
    decode_columns,
    decode_fields,
    pack_attributes,
    to_value,
    unpack_attributes,
)
from engram.index.build_process import BuildJob, build_segment
from engram.index.filters import compile_filter
from engram.index.head import Chunk
from engram.index.parameters import default_parameters
from engram.index.segment import Segment, SegmentStore
from engram.index.texts import Positions, Texts
from tests.filter_cases import json_texts, to_json


def columns_of(*objects: object) -> AttributeColumns:
    return decode_columns(Texts.of([to_json(each) for each in objects]))


def field(columns: AttributeColumns, name: str) -> Field:
    found = columns.field(name)
    assert found is not None
    return found


def cells(of: Field) -> list[Any]:
    """The values of a column, its kind where it holds none."""
    strings = of.strings.all()
    values: list[Any] = []
    for row, kind in enumerate(of.kinds.tolist()):
        assert of.may_be(kind)
        if kind == NUMBER:
            assert of.numbers is not None
            values.append(of.numbers[row].item())
        elif kind == STRING:
            assert of.codes is not None
            values.append(strings[of.codes[row]])
        elif kind == TUPLE:
            assert of.items is not None
            assert of.bounds is not None
            values.append(tuple(strings[code] for code in of.items[of.bounds[row] : of.bounds[row + 1]]))
        else:
            values.append({MISSING: "missing", NULL: None, OTHER: "other"}[kind])
    return values


def test_cells_hold_numbers_and_strings() -> None:
    columns = columns_of({"a": 1, "b": "x"}, {"a": 2.5, "b": "y"}, {"b": "x"}, {"a": True, "b": None})
    assert cells(field(columns, "a")) == [1.0, 2.5, "missing", 1.0]
    assert cells(field(columns, "b")) == ["x", "y", "x", None]
    assert field(columns, "b").strings.all() == ["x", "y"]


def test_cells_hold_tuples_of_strings() -> None:
    columns = columns_of({}, {"a": ["x", "y", "x"]}, {"a": "y"}, {}, {"a": []}, {"a": ["z"]}, {})
    expected = ["missing", ("x", "y", "x"), "y", "missing", (), ("z",), "missing"]
    assert cells(field(columns, "a")) == expected
    assert cells(field(columns, "a").rows(1, 5)) == expected[1:5]


def test_other_arrays_are_other_and_objects_missing() -> None:
    columns = columns_of({"a": [1]}, {"a": ["x", 1]}, {"a": {}}, {"a": [1, {}]}, {"a": [[{}]]}, {"a": [[1]]})
    assert cells(field(columns, "a")) == ["other", "other", "missing", "missing", "missing", "other"]


def test_long_strings_are_other() -> None:
    columns = columns_of({"a": "x" * 64}, {"a": "x" * 65})
    assert cells(field(columns, "a")) == ["x" * 64, "other"]


def test_dictionaries_are_bounded() -> None:
    columns = columns_of(*({name: f"{name}{row}" for name in "abc"} for row in range(100)))
    held = [cells(field(columns, name)) for name in "abc"]
    assert sum(len(set(values) - {"other"}) for values in held) == 200
    assert sum(values.count("other") for values in held) == 100


def test_the_most_frequent_fields_get_columns() -> None:
    rare = [{f"rare{row}_{number}": 1 for number in range(40)} for row in range(3)]
    columns = columns_of(*rare, *({f"f{number}": 1 for number in range(60)} for _ in range(10)))
    assert len(columns.fields) == MOST_FIELDS
    assert {f"f{number}" for number in range(60)} <= columns.fields.keys()
    assert columns.rest is not None
    assert columns.rest.kinds.tolist() == [OTHER] * 3 + [MISSING] * 10


def test_fields_that_no_filter_can_name_have_no_column() -> None:
    columns = columns_of({"": 1, "é": 1, "a b": 1, "a.b": 1, "a": 1})
    assert list(columns.fields) == ["a"]
    assert columns.rest is None
    assert columns.field("é") is None


def test_a_field_with_a_long_name_is_in_the_rest() -> None:
    columns = columns_of({"a" * 129: 1})
    assert columns.field("a" * 129) is columns.rest is not None


@pytest.mark.parametrize("text", [b"", b"x", b"[1]", b"1", b"{", b'{"a":1}1', b'{"a":"\xff"}', b"[" * 10**6])
def test_what_is_no_object_has_no_fields(text: bytes) -> None:
    assert decode_fields(text) == {}


def test_the_last_of_equal_fields_counts() -> None:
    assert decode_fields(b'{"a":1,"a":2}') == {"a": 2}


def test_values() -> None:
    assert to_value(True) == 1.0
    assert to_value(10**400) == math.inf
    assert to_value(-(10**400)) == -math.inf
    assert to_value([1, "a", None, [[2]]]) == (1.0, "a", None, ())
    absent: list[Any] = [{}, [{}], [[[{}]]]]
    for missing in absent:
        with pytest.raises(ValueError):  # noqa: PT011
            to_value(missing)


def test_deeply_nested_arrays_do_not_recurse() -> None:
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    assert to_value([deep]) == ((),)
    # Freed from the outside: Python's own way down is bounded, too.
    while deep:
        deep = deep.pop()


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(json_texts, max_size=20))
def test_packing_keeps_all(texts: list[bytes]) -> None:
    columns = decode_columns(Texts.of(texts))
    arrays, metadata = pack_attributes(columns)
    unpacked = unpack_attributes(arrays, json.loads(json.dumps(metadata)), Texts.of(texts))
    assert unpacked.rows == columns.rows == len(texts)
    assert unpacked.fields.keys() == columns.fields.keys()
    for name in columns.fields:
        assert cells(unpacked.fields[name]) == cells(columns.fields[name])
        strings = unpacked.fields[name].strings
        assert [strings.find(text) for text in strings.all()] == list(range(len(strings)))
        assert strings.find("not there") == -1
    positions = np.arange(len(texts))
    assert unpacked.texts(positions) == texts


def test_nothing_is_packed_of_rows_without_attributes() -> None:
    assert pack_attributes(decode_columns(Texts.of([b"", b""]))) == ({}, [])


def test_growing_columns_decode_each_row_once() -> None:
    texts = [to_json({"a": row}) for row in range(5)]
    asked: list[int] = []

    def at(positions: Positions) -> list[bytes]:
        asked.extend(positions.tolist())
        return [texts[position] for position in positions.tolist()]

    growing = GrowingAttributes(8)
    first = growing.columns(2, at)
    second = growing.columns(5, at)
    assert cells(field(growing.columns(1, at), "a")) == [0.0]
    assert cells(field(first, "a")) == [0.0, 1.0]
    assert cells(field(second, "a")) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert asked == [0, 1, 2, 3, 4]


def test_columns_stay_as_they_are_while_more_rows_come() -> None:
    texts = [to_json({"a": "x"}), to_json({"b": 1, "a": "y"}), b"{}"]

    def at(positions: Positions) -> list[bytes]:
        return [texts[position] for position in positions.tolist()]

    growing = GrowingAttributes(3)
    before = growing.columns(1, at)
    growing.columns(3, at)
    assert cells(field(before, "a")) == ["x"]
    assert before.field("b") is None


@pytest.mark.parametrize("count", [-5, -1, 4])
def test_rows_that_there_is_no_room_for_are_refused(count: int) -> None:
    growing = GrowingAttributes(3)
    with pytest.raises(ValueError, match="there is room for 3"):
        growing.columns(count, lambda positions: [b'{"a":1}'] * len(positions))
    assert cells(field(growing.columns(3, lambda positions: [b'{"a":1}'] * len(positions)), "a")) == [1.0] * 3


def test_columns_that_could_not_be_made_are_made_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [to_json({"a": row, "b": "x"}) for row in range(5)]

    def at(positions: Positions) -> list[bytes]:
        return [texts[position] for position in positions.tolist()]

    growing = GrowingAttributes(5)
    before = growing.columns(2, at)
    write = AttributeWriter._write_string

    def fail(self: AttributeWriter, field: Any, position: int, text: str) -> None:
        if position == 3:
            raise MemoryError
        write(self, field, position, text)

    with monkeypatch.context() as patch:
        patch.setattr(AttributeWriter, "_write_string", fail)
        with pytest.raises(MemoryError):
            growing.columns(5, at)
    for columns, rows in ((before, 2), (growing.columns(4, at), 4), (growing.columns(5, at), 5)):
        assert cells(field(columns, "a")) == list(range(rows))
        assert cells(field(columns, "b")) == ["x"] * rows


def chunk_of(rows: int) -> Chunk:
    chunk = Chunk(rows, 2)
    for row in range(rows):
        chunk.append(row, b"key", np.zeros(2, np.float32))
    return chunk


def test_a_chunk_without_attributes_has_no_columns() -> None:
    columns = chunk_of(3).attribute_columns(2)
    assert (columns.rows, dict(columns.fields), columns.rest) == (2, {}, None)


def test_a_chunk_has_the_columns_of_its_first_rows() -> None:
    chunk = chunk_of(3)
    assert chunk.attribute_columns(2).field("a") is None
    chunk.attributes[1] = b'{"a":1}'
    assert cells(field(chunk.attribute_columns(2), "a")) == ["missing", 1.0]
    assert cells(field(chunk.attribute_columns(3), "a")) == ["missing", 1.0, "missing"]
    assert cells(field(chunk.copy(1, 8, 2).attribute_columns(2), "a")) == [1.0, "missing"]


def build(store: SegmentStore, attributes: dict[int, bytes]) -> Segment:
    rows = 40
    chunk = Chunk(rows, 2)
    vectors = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    chunk.extend(np.arange(rows), [b"%d" % row for row in range(rows)], vectors)
    chunk.attributes = attributes
    store.write_rows("a", [(chunk, np.arange(rows))])
    parameters: dict[str, Any] = attrs.asdict(default_parameters(2, "cosine"))
    return store.open("a", build_segment(BuildJob(str(store.folder), "a", 1, **parameters)).checksum)


def test_a_segment_has_columns(store: SegmentStore) -> None:
    segment = build(store, {row: to_json({"n": row, "kind": "ab"[row % 2]}) for row in range(30)})
    columns = segment.attribute_columns
    assert cells(field(columns, "n")) == [*map(float, range(30)), *["missing"] * 10]
    mask = compile_filter(b".n < 5 and .kind == 'b'").mask(columns)
    assert np.flatnonzero(mask).tolist() == [1, 3]


def test_a_segment_without_attributes_has_no_files_of_columns(store: SegmentStore) -> None:
    segment = build(store, {})
    assert list(segment.path.glob("attribute-*")) == []
    assert (segment.attribute_columns.rows, segment.attribute_columns.field("n")) == (40, None)


def test_long_texts_are_read_a_few_at_a_time() -> None:
    """To make columns of them, and where a filter has to look at the text."""
    texts = Texts.of([b'{"n":%d,"long":"%s"}' % (row % 3, b"x" * 20_000) for row in range(4000)])
    tracemalloc.start()
    try:
        columns = decode_columns(texts)
        mask = compile_filter(b".n == 1 and 'y' in .long or .n == 2 and .long != 'x'").mask(columns)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mask.tolist() == [row % 3 == 2 for row in range(4000)]
    assert peak < texts.joined.nbytes / 3
