"""Running the program of a filter: on columns, a block of rows at a time, and on the JSON text of one row.

Where a column cannot tell (`attributes.OTHER`), the outcome of an operation is *unknown*; rows that are still
unknown at the end are run one by one. No step recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

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
from engram.index.filters.program import Constant, Operator, Program, Selector
from engram.index.filters.values import ARITHMETIC, ORDER, apply, is_true, to_number
from engram.index.texts import Positions

Mask: TypeAlias = npt.NDArray[np.bool_]

# With all values of the deepest expression waiting, a block takes 64 MiB.
_BLOCK_ROWS = 1 << 15
_TEXTS_AT_ONCE = 256

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

    def __init__(self, program: Program, columns: AttributeColumns) -> None:
        self._steps = program.steps
        self._columns = columns
        names = {step.name for step in program.steps if isinstance(step, Selector)}
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
        for step in self._steps:
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
            return _Operand(apply(each, _constant(left.rows), _constant(right.rows)), None)
        if each is Operator.AND or each is Operator.OR:
            return self._connect(each, left, right)
        unknown = _either(left.unknown, right.unknown)
        if each in ORDER:
            return _Operand(ORDER[each](self._number(left.rows), self._number(right.rows)), unknown)
        if each in ARITHMETIC:
            return _Operand(ARITHMETIC[each](self._number(left.rows), self._number(right.rows)), unknown)
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
                return np.full(self._block, is_true(rows))
            return rows.astype(np.bool_, copy=False)
        truth = np.zeros(len(rows.kinds), np.bool_) if rows.numbers is None else rows.numbers != 0
        if rows.codes is not None:
            truth |= (rows.codes >= 0) & (rows.codes != rows.strings.find(""))
        if rows.may_be(TUPLE):
            truth |= rows.kinds == TUPLE
        return truth

    def _number(self, rows: _Rows) -> Doubles | float:
        if not isinstance(rows, Field):
            return rows.astype(np.float64) if isinstance(rows, np.ndarray) else to_number(rows)
        numbers = np.zeros(len(rows.kinds)) if rows.numbers is None else rows.numbers
        if rows.codes is None:
            return numbers
        of_strings = self._table(rows.strings, to_number, np.float64)
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
        numbers = [to_number(value) for value in values]
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
            others = [to_number(value) for value in values if not isinstance(value, str)]
            if others:
                codes = np.isin(self._table(strings, to_number, np.float64), others)
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


def find_satisfying(program: Program, columns: AttributeColumns) -> Mask:
    """Which rows satisfy a program; shape (rows,)."""
    mask, undecided = _Evaluation(program, columns).run()
    positions: Positions = np.flatnonzero(undecided)
    for start in range(0, len(positions), _TEXTS_AT_ONCE):
        part = positions[start : start + _TEXTS_AT_ONCE]
        mask[part] = [is_satisfied(program, text) for text in columns.texts(part)]
    return mask


def is_satisfied(program: Program, json_text: bytes) -> bool:
    """Whether a row with these attributes, empty for none, satisfies a program."""
    fields = decode_fields(json_text)
    stack: list[Value] = []
    for step in program.steps:
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
            stack.append(float(not is_true(stack.pop())))
        else:
            right = stack.pop()
            stack.append(apply(step, stack.pop(), right))
    return is_true(stack.pop())
