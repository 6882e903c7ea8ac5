"""Hypothesis strategies for filters: JSON texts with all kinds of values, expressions with all operators."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# Strings that are numbers to C's strtod, or nearly so, and some that meet as substrings.
STRINGS = (
    *("", "a", "ab", "abc", "b", "é", "zzz", "1", "-1", "2.5", " 2", "2 ", "+2", "2.", ".5", "1e1", "1_0"),
    *("0x10", "0x1p1", "inf", "-Infinity", "nan", "١", "0", "1" * 255, "1" * 256),
)
NUMBERS = (0, 1, 2, 3, -1, -2, 0.5, 2.5, -0.0, 10, 1e300, 1e-300, 2**53 + 1, 2**70)

SYMBOLS = ("**", "*", "/", "%", "+", "-", ">", ">=", "<", "<=", "==", "!=", "and", "&&", "or", "||")

_numbers = st.one_of(
    st.sampled_from(NUMBERS), st.integers(-(10**6), 10**6), st.floats(allow_nan=False, allow_infinity=False)
)
_strings = st.sampled_from(STRINGS)
_scalars: st.SearchStrategy[Any] = st.one_of(
    _numbers, st.sampled_from(NUMBERS), st.booleans(), st.none(), _strings, _strings
)
_arrays: st.SearchStrategy[Any] = st.one_of(
    st.lists(_strings, max_size=4),
    st.lists(st.one_of(_scalars, st.lists(_scalars, max_size=2), st.just([[]])), max_size=4),
)
_spoilt_arrays: st.SearchStrategy[Any] = st.sampled_from([[{}], [1, {"a": 1}], [[1, {}]], ["a", [[{}]]]])
_values: st.SearchStrategy[Any] = st.one_of(
    _scalars, _scalars, _scalars, _arrays, _spoilt_arrays, st.just({}), st.just({"a": 1})
)
_containers: st.SearchStrategy[Any] = st.one_of(_arrays, _arrays, st.none(), st.integers(0, 2))

_objects = st.fixed_dictionaries(
    {"a": _values, "b": _scalars},
    optional={"c": _values, "list": _containers, "with-dash_1": _scalars, "é": _scalars},
)

# Attributes that are not a JSON object.
OTHER_TEXTS = (b"", b"[1]", b'"a"', b"1", b"null", b"{", b"nonsense", b'{"a"}', b"{1:2}", b"{a:1}")


def to_json(value: object) -> bytes:
    """JSON in UTF-8, without escapes where none is needed."""
    return json.dumps(value, ensure_ascii=False).encode()


json_texts: st.SearchStrategy[bytes] = st.one_of(
    *[st.builds(to_json, _objects)] * 6, st.sampled_from(OTHER_TEXTS)
)


def _quote(text: str, quote: str) -> str:
    return f"{quote}{text}{quote}"


_number_literals = st.one_of(
    st.sampled_from(["0", "1", "2", "3", "10", "2.5", "-1", "-2", "1e1", "1E2", "007", "5.", "1e400"]),
    st.integers(-1000, 1000).map(str),
)
_string_literals = st.builds(_quote, _strings, st.sampled_from(["'", '"']))
_tuples = st.lists(st.one_of(_number_literals, _string_literals), max_size=4).map(
    lambda items: "[" + ",".join(items) + "]"
)
_selectors = st.sampled_from([".a", ".a", ".a", ".b", ".b", ".c", ".list", ".with-dash_1", ".none"])
_operands = st.one_of(_number_literals, _string_literals, _tuples, _selectors, _selectors, _selectors)

_containers_in = st.one_of(_tuples, _tuples, st.just(".list"), _number_literals)


def _expressions(
    operands: st.SearchStrategy[str], containers: st.SearchStrategy[str]
) -> st.SearchStrategy[str]:
    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("{} {} {}".format, inner, st.sampled_from(SYMBOLS), inner),
            st.builds("({}) {} ({})".format, inner, st.sampled_from(SYMBOLS), inner),
            st.builds("({}){}({})".format, inner, st.sampled_from(SYMBOLS), inner),
            st.builds("{} in {}".format, inner, containers),
            st.builds("{}({})".format, st.sampled_from(["!", "not ", "not"]), inner),
        )

    return st.recursive(operands, extend, max_leaves=6)


expressions = _expressions(st.one_of(_operands, st.just("null")), st.one_of(_operands, _containers_in))

# Pieces that rarely make an expression.
soup: st.SearchStrategy[bytes] = st.lists(
    st.one_of(
        st.sampled_from(SYMBOLS),
        _operands,
        st.sampled_from(
            [
                "(",
                ")",
                "(",
                ")",
                "!",
                "not",
                "in",
                "[",
                "]",
                ",",
                "'",
                '"',
                "-",
                ".",
                "..",
                "=",
                "&",
                "|",
                "@",
            ]
        ),
        st.sampled_from(
            ["foo", "andx", "True", "true", "é", "1e", "1.2.3", "0x1", "[1 2]", "[1,", "[- 1]", "[.a]"]
        ),
        st.sampled_from([" ", "\t", "\n", "  "]),
    ),
    max_size=8,
).flatmap(lambda pieces: st.sampled_from(["", " "]).map(lambda space: space.join(pieces).encode()))
