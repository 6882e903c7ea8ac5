from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index.attributes import (
    AttributeColumns,
    GrowingAttributes,
    decode_columns,
    pack_attributes,
    unpack_attributes,
)
from engram.index.errors import FilterSyntaxError, FilterTooDeepError, FilterTooLongError
from engram.index.filters import (
    DEEPEST_EXPRESSION,
    LONGEST_EXPRESSION,
    Filter,
    compile_filter,
)
from engram.index.texts import Positions, Texts
from tests.filter_cases import expressions, json_texts, soup, to_json


def accepts(expression: str, **fields: object) -> bool:
    return compile_filter(expression.encode()).accepts(to_json(fields))


def columns_of(texts: list[bytes]) -> AttributeColumns:
    return decode_columns(Texts.of(texts))


def stored(texts: list[bytes]) -> AttributeColumns:
    """As a segment has them."""
    return unpack_attributes(*pack_attributes(columns_of(texts)), Texts.of(texts))


def growing(texts: list[bytes], steps: list[int]) -> AttributeColumns:
    """As a chunk has them that is asked at some of its rows."""

    def at(positions: Positions) -> list[bytes]:
        return [texts[position] for position in positions.tolist()]

    attributes = GrowingAttributes(len(texts) + 1)
    for step in steps:
        attributes.columns(min(step, len(texts)), at)
    return attributes.columns(len(texts), at)


@settings(max_examples=400, deadline=None)
@given(
    expression=expressions.map(str.encode),
    texts=st.lists(json_texts, max_size=20),
    steps=st.lists(st.integers(0, 20), max_size=3),
)
def test_columns_answer_as_rows_do_one_by_one(
    expression: bytes, texts: list[bytes], steps: list[int]
) -> None:
    condition = compile_filter(expression)
    expected = [condition.accepts(text) for text in texts]
    for columns in (columns_of(texts), stored(texts), growing(texts, steps)):
        assert condition.mask(columns).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(expression=st.one_of(soup, st.binary(max_size=30)))
def test_any_text_is_an_expression_or_a_syntax_error(expression: bytes) -> None:
    try:
        condition = compile_filter(expression)
    except FilterSyntaxError as error:
        assert error.expression == expression  # noqa: PT017
        assert 0 <= error.offset <= len(expression)  # noqa: PT017
    else:
        assert condition.mask(columns_of([b'{"a":1}'])).tolist() == [condition.accepts(b'{"a":1}')]


@pytest.mark.parametrize(
    "expression",
    [
        "1",
        "'a'",
        "[]",
        "not 0",
        "not ''",
        "not null",
        "!0",
        "0 or 1",
        "1 || 0",
        "1 && 1",
        "not (1 and 0)",
        "0/0",
        "2 ** 3 ** 2 == 512",
        "2 ** -1 == 0.5",
        "-2 ** 2 == 4",
        "10 - 2 - 3 == 5",
        "16 / 4 / 2 == 2",
        "2 + 3 * 4 == 14",
        "(2 + 3) * 4 == 20",
        "-7 % 4 == -3",
        "7.5 % 2 == 1.5",
        "1/0 > 1e300",
        "not (3 > 2 > 1)",
        "1 or 0 and 0",
        "!1 == 0",
        "5--3 == 8",
        "2 -3 == -1",
        "1e3 == 1000",
        "5. == 5",
        "'10' > '9'",
        "'a' == 0",
        "'0x10' == 16",
        "'' == 0",
        "' 2' == 2",
        "'2 ' == 0",
        "[1] == [2]",
        "1 in ['1']",
        "'1' in [1, 2]",
        "2 in [1, 2,]",
        "'b' in 'abc'",
        "not (1 in '1')",
        "null == null",
        "null != 0",
        "not (null in [0])",
        "null < 1",
        "'it\\'s' == \"it's\"",
        "'a\\\\b' == 'a\\\\b'",
        "1and1",
        "1in[1]",
        "5 3 +",
    ],
)
def test_constant_expressions_that_are_true(expression: str) -> None:
    assert accepts(expression)
    assert compile_filter(expression.encode()).mask(columns_of([b"", b"{}"])).all()


def test_selectors_name_fields_with_dashes_underscores_and_digits() -> None:
    assert accepts(".with-dash_1 == 1 and .0 == 2", **{"with-dash_1": 1, "0": 2})


@pytest.mark.parametrize("expression", [".a == 1 or .b == 2", "not .b", ".b == null", ".a or .b", ".a.b"])
def test_a_missing_field_makes_all_false(expression: str) -> None:
    texts = [b'{"a":1}', b'{"a":1,"b":{}}', b'{"a":1,"b":[{}]}']
    if expression == ".a.b":
        with pytest.raises(FilterSyntaxError) as raised:
            compile_filter(expression.encode())
        assert raised.value.offset == 0
        return
    condition = compile_filter(expression.encode())
    assert [condition.accepts(text) for text in texts] == [False] * 3
    assert condition.mask(columns_of(texts)).tolist() == [False] * 3


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"1", b'{"a":1', b'{"a":1} x', b'{"a":NaN}', b'{"a":"\xff"}', b'{"a":' + b"[" * 10**5],
)
def test_what_is_no_json_object_has_no_fields(text: bytes) -> None:
    condition = compile_filter(b".a or 1")
    assert not condition.accepts(text)
    assert not condition.mask(columns_of([text])).any()


def test_booleans_are_numbers() -> None:
    assert accepts(".a == 1 and .b == 0 and .a in [1]", a=True, b=False)


def test_escapes_in_json_are_decoded() -> None:
    condition = compile_filter(".a == 'é' and .b == '\"'".encode())
    assert condition.accepts(b'{"a":"\\u00e9","b":"\\""}')


def test_integers_beyond_floats_are_infinite() -> None:
    assert accepts(".a > 1e308 and .b < -1e308 and .a == 1/0", a=10**400, b=-(10**400))


def test_a_string_of_256_characters_is_no_number() -> None:
    assert accepts(".a > 1 and .b == 0", a="1" * 255, b="1" * 256)


def test_arrays_are_tuples_of_any_depth() -> None:
    assert accepts("2 in .a and 0 in .a and not (3 in .a)", a=[[1, [3]], 2])
    assert accepts("null_ in .a".replace("null_", "null"), a=[None])


@pytest.mark.parametrize(
    ("expression", "rest"),
    [
        (b"", b""),
        (b" ", b" "),
        (b"foo", b""),
        (b".x == foobar + 1", b" + 1"),
        (b".x @ 1", b"@ 1"),
        (b"1 = 1", b" 1"),
        (b"1 & 1", b" 1"),
        (b"1 andx 1", b" 1"),
        (b"nullx == 1", b" == 1"),
        (b"1e+3 == 1", b"+3 == 1"),
        (b"0x10", b"10"),
        (b"1.2.3", b""),
        (b"1" * 256 + b" > 0", b"1 > 0"),
        (b".x in [1 2]", b"2]"),
        (b".x in [1,,2]", b",2]"),
        (b".x in [- 1]", b" 1]"),
        (b".x in [.y]", b".y]"),
        (b".x in [1, 2", b""),
        (b".x == 'abc", b""),
        (b"'\\'", b""),
        (b"(1", b"(1"),
        (b"1)", b"1)"),
        (b"()", b"()"),
        (b"1 +", b"1 +"),
        (b"1 1", b"1 1"),
        (b"-(3)", b"-(3)"),
        (b"not not 1", b"not not 1"),
        (b". == 1", b". == 1"),
        (b".x == .", b"."),
        (b"1 AND 1", b" 1"),
        (b"1\x00", b"\x00"),
        (b".x == \xff", b"\xff"),
    ],
)
def test_syntax_errors_tell_from_where_the_text_cannot_be_read(expression: bytes, rest: bytes) -> None:
    with pytest.raises(FilterSyntaxError) as raised:
        compile_filter(expression)
    assert raised.value.expression == expression
    assert expression[raised.value.offset :] == rest


def test_parentheses_nest_to_any_depth() -> None:
    depth = LONGEST_EXPRESSION // 2 - 1
    assert compile_filter(b"(" * depth + b"1" + b")" * depth).accepts(b"")


def test_values_wait_to_a_depth() -> None:
    def nested(depth: int) -> bytes:
        return b"1+(" * (depth - 1) + b"1" + b")" * (depth - 1)

    assert compile_filter(nested(DEEPEST_EXPRESSION)).accepts(b"")
    with pytest.raises(FilterTooDeepError) as raised:
        compile_filter(nested(DEEPEST_EXPRESSION + 1))
    assert raised.value.limit == DEEPEST_EXPRESSION


def test_expressions_have_a_length() -> None:
    assert compile_filter(b"1" + b" " * (LONGEST_EXPRESSION - 1)).accepts(b"")
    with pytest.raises(FilterTooLongError) as raised:
        compile_filter(b"1" + b" " * LONGEST_EXPRESSION)
    assert raised.value.limit == LONGEST_EXPRESSION == 65536


def test_filters_of_one_text_are_equal() -> None:
    long = b"1" + b" " * 5000
    assert compile_filter(long) is not compile_filter(long)
    assert len({compile_filter(long), compile_filter(long), compile_filter(b"1")}) == 2


def count_rows_read(condition: Filter, texts: list[bytes]) -> int:
    """How many rows a mask reads the JSON of."""
    columns, read = columns_of(texts), []

    def at(positions: Positions) -> list[bytes]:
        read.extend(positions.tolist())
        return columns.texts(positions)

    mask = condition.mask(AttributeColumns(columns.rows, columns.fields, columns.rest, at))
    assert mask.tolist() == [condition.accepts(text) for text in texts]
    return len(read)


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        (b".n < 5", 0),
        (b".kind == 'b' or .n == 1", 0),
        (b"'red' in .tags", 10),
        (b"'red' in .names and .names and .names == 0", 0),
        (b".kind in .names", 10),
        (b".kind == 'b' and 'red' in .tags", 5),
        (b".n < 0 and 'red' in .tags", 0),
        (b".n >= 0 or 'red' in .tags", 0),
        (b"not (.n < 3 or 'red' in .tags)", 7),
        (b".none == 1", 0),
        (b".text == 'short'", 10),
    ],
)
def test_only_rows_that_columns_cannot_tell_of_are_read(expression: bytes, count: int) -> None:
    texts = [
        to_json(
            {
                "n": n,
                "kind": "ab"[n % 2],
                "tags": [n, "red"] if n < 4 else [n],
                "text": str(n) * 100,
                "names": ["red", "a"][n % 3 :],
            }
        )
        for n in range(10)
    ]
    assert count_rows_read(compile_filter(expression), texts) == count


def test_fields_without_a_column_are_read_where_there_are_some() -> None:
    common = [to_json({f"f{number}": 1 for number in range(64)}) for _ in range(20)]
    texts = [*common, to_json({"rare": 1, "other": 2}), to_json({"other": 3}), b""]
    assert count_rows_read(compile_filter(b".rare == 1"), texts) == 2
    assert count_rows_read(compile_filter(b"0 and .rare"), texts) == 0


def test_masks_of_many_blocks() -> None:
    texts = [to_json({"n": n, "kind": f"kind {n % 7}"}) for n in range(70_000)]
    condition = compile_filter(b".n % 3 == 0 and .kind in ['kind 1', 'kind 5']")
    expected = [n % 3 == 0 and n % 7 in (1, 5) for n in range(70_000)]
    assert condition.mask(columns_of(texts)).tolist() == expected


def test_two_threads_ask_a_chunk_that_grows() -> None:
    texts: dict[int, bytes] = {}
    attributes = GrowingAttributes(4000)
    condition = compile_filter(b".n % 2 == 0 and .kind != 'kind 3' and not ('x' in .tags)")
    wrong: list[int] = []
    filled = 0

    def at(positions: Positions) -> list[bytes]:
        return [texts.get(position, b"") for position in positions.tolist()]

    def ask() -> None:
        while (count := filled) < 4000:
            mask = condition.mask(attributes.columns(count, at))
            expected = np.array([n % 2 == 0 and n % 5 != 3 for n in range(count)], np.bool_)
            if not np.array_equal(mask, expected):
                wrong.append(count)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(4000):
        texts[n] = to_json(
            {"n": n, "kind": f"kind {n % 5}", "tags": ["y", n + 1] if n % 100 == 0 else ["y"] * (n % 3)}
        )
        filled = n + 1
    for thread in threads:
        thread.join()
    assert wrong == []


def fences(language: str) -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "filters.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_documentation() -> None:
    (attributes,) = fences("json")
    examples = [line.rsplit(maxsplit=1) for fence in fences("filter") for line in fence.splitlines()]
    assert len(examples) > 40
    columns = columns_of([attributes.encode()])
    for expression, expected in examples:
        condition = compile_filter(expression.rstrip().encode())
        assert str(condition.accepts(attributes.encode())).lower() == expected, expression
        assert str(condition.mask(columns)[0]).lower() == expected, expression
