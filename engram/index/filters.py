"""Filters: expressions over attributes, in the language of Redis's vector sets (https://redis.io/docs/latest/
develop/data-types/vector-sets/filtered-search); docs/filters.md is the reference.

An expression is compiled once to a program in postfix order, which is run in two ways: on columns, a block
of rows at a time, and on the JSON text of one row. Where a column cannot tell (`attributes.OTHER`), the
outcome of an operation is *unknown*; rows that are still unknown at the end are run one by one. No step
recurses.
"""

from __future__ import annotations

import enum
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from engram.errors import CommandError
from engram.index.attributes import (
    MISSING,
    NULL,
    NUMBER,
    OTHER,
    STRING,
    TUPLE,
    AttributeColumns,
    Field,
    Strings,
    Value,
    decode_fields,
    to_value,
)
from engram.index.distances import Doubles
from engram.index.texts import Positions

Mask: TypeAlias = npt.NDArray[np.bool_]

# The longest expression, in bytes.
LONGEST_EXPRESSION = 64 << 10

# How many values an expression may have waiting for their operators.
DEEPEST_EXPRESSION = 256

# Longer ones are compiled each time, so that what is kept stays small.
_LONGEST_KEPT = 4 << 10
_MOST_KEPT = 256

# With all values of the deepest expression waiting, a block takes 64 MiB.
_BLOCK_ROWS = 1 << 15
_TEXTS_AT_ONCE = 256

_LONGEST_NUMBER = 255


class Operator(enum.Enum):
    """An operator, how tightly it binds, and how many values it takes."""

    OPEN = "(", 7, 0
    CLOSE = ")", 7, 0
    NOT = "!", 6, 1
    POWER = "**", 5, 2
    MULTIPLY = "*", 4, 2
    DIVIDE = "/", 4, 2
    MODULO = "%", 4, 2
    ADD = "+", 3, 2
    SUBTRACT = "-", 3, 2
    GREATER = ">", 2, 2
    GREATER_EQUAL = ">=", 2, 2
    LESS = "<", 2, 2
    LESS_EQUAL = "<=", 2, 2
    EQUAL = "==", 2, 2
    UNEQUAL = "!=", 2, 2
    IN = "in", 2, 2
    AND = "and", 1, 2
    OR = "or", 0, 2

    # That of Enum is written in Python.
    __hash__ = object.__hash__

    def __init__(self, symbol: str, precedence: int, arity: int) -> None:
        self.symbol = symbol.encode()
        self.precedence = precedence
        self.arity = arity


_OPERATORS = {each.symbol: each for each in Operator} | {
    b"not": Operator.NOT,
    b"&&": Operator.AND,
    b"||": Operator.OR,
}


@attrs.frozen
class Constant:
    """A value written in the expression."""

    value: Value


@attrs.frozen
class Selector:
    """A field of the row's attributes."""

    name: str


Step: TypeAlias = "Constant | Selector | Operator"


# Syntax

_SPACES = re.compile(rb"[ \t\n\v\f\r]*")
_NUMBER = re.compile(rb"-?[0-9.eE]*")
_VALID_NUMBER = re.compile(rb"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][0-9]+)?")
_SELECTOR = re.compile(rb"\.([A-Za-z0-9_-]+)")
_STRING = re.compile(rb"'((?:[^'\\]|\\.)*+)'|\"((?:[^\"\\]|\\.)*+)\"", re.DOTALL)
_ESCAPE = re.compile(rb"\\(['\"\\])")
_NULL = re.compile(rb"null(?![A-Za-z])")
_OPERATOR = re.compile(b"|".join(re.escape(symbol) for symbol in sorted(_OPERATORS, key=len, reverse=True)))
_WORD = re.compile(rb"[A-Za-z+\-*%/!()<>=|&]+")


class _UnreadableError(Exception):
    """What cannot be read begins at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def _split(text: bytes) -> list[Step]:
    steps: list[Step] = []
    offset = _skip_spaces(text, 0)
    while offset < len(text):
        step, offset = _read_step(text, offset, steps[-1] if steps else None)
        steps.append(step)
        offset = _skip_spaces(text, offset)
    return steps


def _read_step(text: bytes, offset: int, last: Step | None) -> tuple[Step, int]:
    first = text[offset : offset + 1]
    follows_operator = last is None or (isinstance(last, Operator) and last is not Operator.CLOSE)
    if first.isdigit() or (first == b"-" and follows_operator and text[offset + 1 : offset + 2].isdigit()):
        number, offset = _read_number(text, offset)
        return Constant(number), offset
    if first in b"'\"":
        string, offset = _read_string(text, offset)
        return Constant(string), offset
    if first == b"[":
        values, offset = _read_tuple(text, offset)
        return Constant(values), offset
    if match := _SELECTOR.match(text, offset):
        return Selector(match[1].decode()), match.end()
    if match := _NULL.match(text, offset):
        return Constant(None), match.end()
    if match := _OPERATOR.match(text, offset):
        return _OPERATORS[match[0]], match.end()
    word = _WORD.match(text, offset)
    raise _UnreadableError(word.end() if word else offset)


def _skip_spaces(text: bytes, offset: int) -> int:
    match = _SPACES.match(text, offset)
    return match.end() if match else offset


def _read_number(text: bytes, offset: int) -> tuple[float, int]:
    match = _NUMBER.match(text, offset)
    end = match.end() if match else offset
    if end - offset > _LONGEST_NUMBER:
        raise _UnreadableError(offset + _LONGEST_NUMBER)
    if not _VALID_NUMBER.fullmatch(text, offset, end):
        raise _UnreadableError(end)
    return float(text[offset:end]), end


def _read_string(text: bytes, offset: int) -> tuple[str, int]:
    match = _STRING.match(text, offset)
    if match is None:
        raise _UnreadableError(len(text))
    content = match[1] if match[2] is None else match[2]
    # Bytes that are not UTF-8 are kept; no JSON string equals them.
    return _ESCAPE.sub(rb"\1", content).decode(errors="surrogateescape"), match.end()


def _read_tuple(text: bytes, offset: int) -> tuple[tuple[Value, ...], int]:
    values: list[Value] = []
    offset = _skip_spaces(text, offset + 1)
    while text[offset : offset + 1] != b"]":
        first = text[offset : offset + 1]
        value: Value
        if first and first in b"'\"":
            value, offset = _read_string(text, offset)
        elif first.isdigit() or first == b"-":
            value, offset = _read_number(text, offset)
        else:
            raise _UnreadableError(offset)
        values.append(value)
        offset = _skip_spaces(text, offset)
        if text[offset : offset + 1] == b",":
            offset = _skip_spaces(text, offset + 1)
        elif text[offset : offset + 1] != b"]":
            raise _UnreadableError(offset)
    return tuple(values), offset + 1


def _to_postfix(steps: list[Step]) -> tuple[tuple[Step, ...], int]:
    """Dijkstra's shunting yard; where values and operators stand is free as long as each finds its values.

    Returns the program, and how many values wait at once at most.
    """
    program: list[Step] = []
    waiting: list[Operator] = []
    depth = deepest = 0

    def emit(each: Operator) -> None:
        nonlocal depth
        if depth < each.arity:
            raise _UnreadableError(0)
        depth += 1 - each.arity
        program.append(each)

    for step in steps:
        if not isinstance(step, Operator):
            program.append(step)
            depth += 1
            deepest = max(deepest, depth)
            if depth > DEEPEST_EXPRESSION:
                raise CommandError("ERR FILTER expression is nested too deeply")
            continue
        if step is Operator.CLOSE:
            while waiting and waiting[-1] is not Operator.OPEN:
                emit(waiting.pop())
            if not waiting:
                raise _UnreadableError(0)
            waiting.pop()
            continue
        if step is not Operator.OPEN:
            # Of two equal ones the left comes first, but for powers.
            least = step.precedence + (step is Operator.POWER)
            while waiting and waiting[-1] is not Operator.OPEN and waiting[-1].precedence >= least:
                emit(waiting.pop())
        waiting.append(step)
    while waiting:
        if waiting[-1] is Operator.OPEN:
            raise _UnreadableError(0)
        emit(waiting.pop())
    if depth != 1:
        raise _UnreadableError(0)
    return tuple(program), deepest


# Values one by one

# What C's strtod takes, less the characters in parentheses that may follow a nan.
_BLANKS = r"[ \t\n\v\f\r]*"
_FLAGS = re.IGNORECASE | re.ASCII
_DECIMAL = re.compile(_BLANKS + r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", _FLAGS)
_HEXADECIMAL = re.compile(
    _BLANKS + r"([+-]?0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(?:p[+-]?[0-9]+)?)", _FLAGS
)
_SPECIAL = re.compile(_BLANKS + r"([+-]?(?:inf|infinity|nan))", _FLAGS)


def _to_number(value: Value) -> float:
    if isinstance(value, float):
        return value
    if not isinstance(value, str) or len(value) > _LONGEST_NUMBER:
        return 0.0
    if match := _DECIMAL.fullmatch(value) or _SPECIAL.fullmatch(value):
        return float(match[1])
    if match := _HEXADECIMAL.fullmatch(value):
        try:
            return float.fromhex(match[1])
        except OverflowError:
            return -math.inf if match[1][0] == "-" else math.inf
    return 0.0


def _is_true(value: Value) -> bool:
    if value is None:
        return False
    if isinstance(value, float):
        return value != 0
    return value != ""


def _equal(left: Value, right: Value) -> bool:
    if left is None or right is None:
        return left is right
    if isinstance(left, str) and isinstance(right, str):
        return left == right
    return _to_number(left) == _to_number(right)


def _contains(item: Value, container: Value) -> bool:
    if isinstance(container, tuple):
        return any(_equal(item, each) for each in container)
    return isinstance(container, str) and isinstance(item, str) and item in container


_ARITHMETIC: Mapping[Operator, Callable[[Any, Any], Any]] = {
    # Not np.power, which may be off C's pow by the last bit.
    Operator.POWER: np.float_power,
    Operator.MULTIPLY: np.multiply,
    Operator.DIVIDE: np.divide,
    Operator.MODULO: np.fmod,
    Operator.ADD: np.add,
    Operator.SUBTRACT: np.subtract,
}
_ORDER: Mapping[Operator, Callable[[Any, Any], Any]] = {
    Operator.GREATER: operator.gt,
    Operator.GREATER_EQUAL: operator.ge,
    Operator.LESS: operator.lt,
    Operator.LESS_EQUAL: operator.le,
}


def _apply(each: Operator, left: Value, right: Value) -> float:
    """The result of an operator of two values."""
    if each in _ORDER:
        return float(_ORDER[each](_to_number(left), _to_number(right)))
    if each in _ARITHMETIC:
        with np.errstate(all="ignore"):
            return float(_ARITHMETIC[each](_to_number(left), _to_number(right)))
    if each is Operator.EQUAL:
        return float(_equal(left, right))
    if each is Operator.UNEQUAL:
        return float(not _equal(left, right))
    if each is Operator.IN:
        return float(_contains(left, right))
    if each is Operator.AND:
        return float(_is_true(left) and _is_true(right))
    return float(_is_true(left) or _is_true(right))


# Values as columns

# One value for all rows of a block, or an array of booleans or numbers, or a column.
_Rows: TypeAlias = "Value | Mask | Doubles | Field"


@attrs.frozen(eq=False)
class _Operand:
    """Values of the rows of a block, and of which of them nothing is known; None for none."""

    rows: _Rows
    unknown: Mask | None


def _either(left: Mask | None, right: Mask | None) -> Mask | None:
    if left is None:
        return right
    return left if right is None else left | right


class _Evaluation:
    """Runs a program on columns, block by block."""

    def __init__(self, program: tuple[Step, ...], columns: AttributeColumns) -> None:
        self._program = program
        self._columns = columns
        names = {step.name for step in program if isinstance(step, Selector)}
        self._fields = {name: columns.field(name) for name in names}
        # What was found out about the strings of a dictionary, for the blocks to come.
        self._tables: dict[object, npt.NDArray[Any]] = {}
        # How many rows the block has.
        self._block = 0

    def run(self) -> tuple[Mask, Mask]:
        """Which rows satisfy the program, and which have to be run one by one."""
        satisfied = np.zeros(self._columns.rows, np.bool_)
        undecided = np.zeros(self._columns.rows, np.bool_)
        if None in self._fields.values():
            return satisfied, undecided
        with np.errstate(all="ignore"):
            for start in range(0, self._columns.rows, _BLOCK_ROWS):
                rows = slice(start, min(start + _BLOCK_ROWS, self._columns.rows))
                self._run_block(rows, satisfied[rows], undecided[rows])
        return satisfied, undecided

    def _run_block(self, rows: slice, satisfied: Mask, undecided: Mask) -> None:
        fields = {
            name: field.rows(rows.start, rows.stop)
            for name, field in self._fields.items()
            if field is not None
        }
        candidates: Mask | None = None
        for field in fields.values():
            if field.may_be(MISSING):
                there = field.kinds != MISSING
                candidates = there if candidates is None else candidates & there
        if candidates is not None and not candidates.any():
            return
        self._block = len(satisfied)
        result = self._execute(fields)
        truth, unknown = self._truth(result.rows), result.unknown
        if any(field is self._columns.rest for field in self._fields.values()):
            # The rest does not say which of its fields is there.
            unknown = _either(unknown, truth)
        satisfied[:] = truth
        if candidates is not None:
            satisfied &= candidates
        if unknown is not None:
            undecided[:] = unknown if candidates is None else unknown & candidates
            satisfied &= ~undecided

    def _execute(self, fields: Mapping[str, Field]) -> _Operand:
        stack: list[_Operand] = []
        for step in self._program:
            if isinstance(step, Constant):
                stack.append(_Operand(step.value, None))
            elif isinstance(step, Selector):
                field = fields[step.name]
                stack.append(_Operand(field, field.kinds == OTHER if field.may_be(OTHER) else None))
            elif step is Operator.NOT:
                operand = stack.pop()
                stack.append(_Operand(~self._truth(operand.rows), operand.unknown))
            else:
                right = stack.pop()
                stack.append(self._combine(step, stack.pop(), right))
        return stack.pop()

    def _combine(self, each: Operator, left: _Operand, right: _Operand) -> _Operand:
        if not _varies(left.rows) and not _varies(right.rows):
            return _Operand(_apply(each, _constant(left.rows), _constant(right.rows)), None)
        if each is Operator.AND or each is Operator.OR:
            return self._connect(each, left, right)
        unknown = _either(left.unknown, right.unknown)
        if each in _ORDER:
            return _Operand(_ORDER[each](self._number(left.rows), self._number(right.rows)), unknown)
        if each in _ARITHMETIC:
            return _Operand(_ARITHMETIC[each](self._number(left.rows), self._number(right.rows)), unknown)
        if each is Operator.IN:
            if _varies(left.rows) and isinstance(right.rows, Field):
                # Each row has another value to look for.
                kinds = right.rows.kinds
                unknown = _either(unknown, (kinds == STRING) | (kinds == TUPLE))
            return _Operand(self._contains(left.rows, right.rows), unknown)
        equal = self._equal(left.rows, right.rows)
        return _Operand(equal if each is Operator.EQUAL else ~equal, unknown)

    def _connect(self, each: Operator, left: _Operand, right: _Operand) -> _Operand:
        """And, or: known where both sides are, and where one alone decides."""
        left_truth, right_truth = self._truth(left.rows), self._truth(right.rows)
        if each is Operator.AND:
            truth = np.logical_and(left_truth, right_truth)
            left_decides, right_decides = np.logical_not(left_truth), np.logical_not(right_truth)
        else:
            truth = np.logical_or(left_truth, right_truth)
            left_decides, right_decides = left_truth, right_truth
        unknown = _either(left.unknown, right.unknown)
        if unknown is not None:
            unknown = unknown & ~(left_decides if left.unknown is None else left_decides & ~left.unknown)
            unknown &= ~(right_decides if right.unknown is None else right_decides & ~right.unknown)
        return _Operand(truth, unknown)

    def _truth(self, rows: _Rows) -> Mask:
        if not isinstance(rows, Field):
            if not isinstance(rows, np.ndarray):
                return np.full(self._block, _is_true(rows))
            return rows.astype(np.bool_, copy=False)
        truth = np.zeros(len(rows.kinds), np.bool_) if rows.numbers is None else rows.numbers != 0
        if rows.codes is not None:
            truth |= (rows.codes >= 0) & (rows.codes != rows.strings.find(""))
        if rows.may_be(TUPLE):
            truth |= rows.kinds == TUPLE
        return truth

    def _number(self, rows: _Rows) -> Doubles | float:
        if not isinstance(rows, Field):
            return rows.astype(np.float64) if isinstance(rows, np.ndarray) else _to_number(rows)
        numbers = np.zeros(len(rows.kinds)) if rows.numbers is None else rows.numbers
        if rows.codes is None:
            return numbers
        of_strings = self._table(rows.strings, _to_number, np.float64)
        return np.where(rows.codes >= 0, of_strings[rows.codes], numbers) if of_strings.any() else numbers

    def _equal(self, left: _Rows, right: _Rows) -> Mask:
        if not _varies(left):
            left, right = right, left
        if not _varies(right):
            value = _constant(right)
            if value is None:
                return left.kinds == NULL if isinstance(left, Field) else np.zeros(self._block, np.bool_)
            return self._is_any(left, (value,))
        equal: Mask = np.asarray(self._number(left) == self._number(right))
        if isinstance(left, Field) and isinstance(right, Field):
            if left.codes is not None and right.codes is not None:
                # The codes that strings of the left have on the right; -2, which is no code, without one.
                right_codes = self._table(left.strings, right.strings.find, np.int32, id(right.strings))
                right_codes = np.where(right_codes < 0, -2, right_codes)
                strings = (left.codes >= 0) & (right.codes >= 0)
                equal = np.where(strings, right_codes[left.codes] == right.codes, equal)
            nulls = left.kinds == NULL
            return np.where(nulls | (right.kinds == NULL), nulls & (right.kinds == NULL), equal)
        for rows in (left, right):
            if isinstance(rows, Field) and rows.may_be(NULL):
                equal &= rows.kinds != NULL
        return equal

    def _is_any(self, rows: _Rows, values: tuple[Value, ...]) -> Mask:
        """Where rows equal one of some values, none of which is null."""
        numbers = [_to_number(value) for value in values]
        if not isinstance(rows, Field):
            return _is_in(np.asarray(self._number(rows)), numbers)
        found = np.zeros(len(rows.kinds), np.bool_)
        if rows.numbers is not None:
            found = _is_in(rows.numbers, numbers)
            if rows.may_be(STRING) or rows.may_be(NULL) or rows.may_be(TUPLE):
                found &= rows.kinds == NUMBER
        if rows.may_be(TUPLE) and 0.0 in numbers:
            found |= rows.kinds == TUPLE
        if rows.codes is not None:
            if len(values) == 1 and isinstance(values[0], str):
                code = rows.strings.find(values[0])
                if code >= 0:
                    found |= rows.codes == code
            else:
                found |= self._codes_of(rows.strings, values)[rows.codes]
        return found

    def _codes_of(self, strings: Strings, values: tuple[Value, ...]) -> Mask:
        """By code which strings of a dictionary equal one of some values, and False for code -1."""
        key = (id(strings), values)
        codes = self._tables.get(key)
        if codes is None:
            others = [_to_number(value) for value in values if not isinstance(value, str)]
            if others:
                codes = np.isin(self._table(strings, _to_number, np.float64), others)
                codes[-1] = False
            else:
                codes = np.zeros(len(strings) + 1, np.bool_)
            for value in values:
                code = strings.find(value) if isinstance(value, str) else -1
                # A dictionary may have grown since it was counted.
                if 0 <= code < len(codes) - 1:
                    codes[code] = True
            self._tables[key] = codes
        return codes

    def _contains(self, item: _Rows, container: _Rows) -> Mask:
        found = np.zeros(self._block, np.bool_)
        if isinstance(container, tuple):
            found = self._is_any(item, container)
        elif isinstance(container, Field):
            if isinstance(item, str) and container.codes is not None:
                within = self._table(container.strings, lambda text: item in text, np.bool_, (item, "in"))
                found |= within[container.codes]
            if not _varies(item) and item is not None:
                found |= self._has_item(container, _constant(item))
        elif isinstance(container, str) and isinstance(item, Field) and item.codes is not None:
            within = self._table(item.strings, lambda text: text in container, np.bool_, ("in", container))
            found |= within[item.codes]
        return found

    def _has_item(self, container: Field, value: Value) -> Mask:
        """Which tuples have an item that equals a value other than null."""
        items, bounds = container.items, container.bounds
        if items is None or bounds is None:
            return np.zeros(self._block, np.bool_)
        hits = self._codes_of(container.strings, (value,))[items[bounds[0] : bounds[-1]]]
        before = np.concatenate([[0], np.cumsum(hits)])[bounds - bounds[0]]
        return np.asarray(before[1:] > before[:-1])

    def _table(
        self, strings: Strings, function: Callable[[str], Any], dtype: type[np.generic], key: object = None
    ) -> npt.NDArray[Any]:
        """What a function gives for each string of a dictionary, and 0 in the last place, that of code -1."""
        key = (id(strings), dtype, key)
        table = self._tables.get(key)
        if table is None:
            texts = strings.all()
            table = self._tables[key] = np.zeros(len(texts) + 1, dtype)
            table[:-1] = np.fromiter(map(function, texts), dtype, len(texts))
        return table


def _varies(rows: _Rows) -> bool:
    return isinstance(rows, Field | np.ndarray)


def _constant(rows: _Rows) -> Value:
    assert not isinstance(rows, Field | np.ndarray)
    return rows


def _is_in(numbers: Doubles, values: list[float]) -> Mask:
    return numbers == values[0] if len(values) == 1 else np.isin(numbers, values)


@attrs.frozen
class Filter:
    """A compiled expression; two are equal when their texts are. `depth` values at most wait at once."""

    text: bytes
    program: tuple[Step, ...] = attrs.field(eq=False, repr=False)
    depth: int = attrs.field(eq=False, repr=False)

    def mask(self, columns: AttributeColumns) -> Mask:
        """Which rows satisfy it; shape (rows,)."""
        mask, undecided = _Evaluation(self.program, columns).run()
        positions: Positions = np.flatnonzero(undecided)
        for start in range(0, len(positions), _TEXTS_AT_ONCE):
            part = positions[start : start + _TEXTS_AT_ONCE]
            mask[part] = [self.accepts(text) for text in columns.texts(part)]
        return mask

    def accepts(self, json_text: bytes) -> bool:
        """Whether a row with these attributes, empty for none, satisfies it."""
        fields = decode_fields(json_text)
        stack: list[Value] = []
        for step in self.program:
            if isinstance(step, Constant):
                stack.append(step.value)
            elif isinstance(step, Selector):
                if step.name not in fields:
                    return False
                try:
                    stack.append(to_value(fields[step.name]))
                except ValueError:
                    return False
            elif step is Operator.NOT:
                stack.append(float(not _is_true(stack.pop())))
            else:
                right = stack.pop()
                stack.append(_apply(step, stack.pop(), right))
        return _is_true(stack.pop())


def compile_filter(expression: bytes) -> Filter:
    """The filter of an expression.

    Raises:
        CommandError: the expression is not one; the text is Redis's.
    """
    return _compile_kept(expression) if len(expression) <= _LONGEST_KEPT else _compile(expression)


def _compile(expression: bytes) -> Filter:
    if len(expression) > LONGEST_EXPRESSION:
        raise CommandError(f"ERR FILTER expression is longer than {LONGEST_EXPRESSION} bytes")
    try:
        return Filter(expression, *_to_postfix(_split(expression)))
    except _UnreadableError as problem:
        # Where nothing is left to show, all is shown.
        near = (expression[problem.offset :] or expression).decode(errors="surrogateescape")
        raise CommandError(f"ERR syntax error in FILTER expression near: {near}") from None


_compile_kept = lru_cache(_MOST_KEPT)(_compile)
