"""What the operators of filters make of single values, as Redis has it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engram.index.attributes import Value
from engram.index.filters.program import Operator

# Longer texts, in characters, are no numbers.
LONGEST_NUMBER = 255

# What C's strtod takes, less the characters in parentheses that may follow a nan.
_BLANKS = r"[ \t\n\v\f\r]*"
_FLAGS = re.IGNORECASE | re.ASCII
_DECIMAL = re.compile(_BLANKS + r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", _FLAGS)
_HEXADECIMAL = re.compile(
    _BLANKS + r"([+-]?0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(?:p[+-]?[0-9]+)?)", _FLAGS
)
_SPECIAL = re.compile(_BLANKS + r"([+-]?(?:inf|infinity|nan))", _FLAGS)


def to_number(value: Value) -> float:
    """The value as an operand of arithmetic and of comparisons by size; 0 where it is no number."""
    if isinstance(value, float):
        return value
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER:
        return 0.0
    if match := _DECIMAL.fullmatch(value) or _SPECIAL.fullmatch(value):
        return float(match[1])
    if match := _HEXADECIMAL.fullmatch(value):
        try:
            return float.fromhex(match[1])
        except OverflowError:
            return -math.inf if match[1][0] == "-" else math.inf
    return 0.0


def is_true(value: Value) -> bool:
    """Whether a value is true: all are but null, 0 and the empty string."""
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
    return to_number(left) == to_number(right)


def _contains(item: Value, container: Value) -> bool:
    if isinstance(container, tuple):
        return any(_equal(item, each) for each in container)
    return isinstance(container, str) and isinstance(item, str) and item in container


ARITHMETIC: Mapping[Operator, Callable[[Any, Any], Any]] = {
    # Not np.power, which may be off C's pow by the last bit.
    Operator.POWER: np.float_power,
    Operator.MULTIPLY: np.multiply,
    Operator.DIVIDE: np.divide,
    Operator.MODULO: np.fmod,
    Operator.ADD: np.add,
    Operator.SUBTRACT: np.subtract,
}
ORDER: Mapping[Operator, Callable[[Any, Any], Any]] = {
    Operator.GREATER: operator.gt,
    Operator.GREATER_EQUAL: operator.ge,
    Operator.LESS: operator.lt,
    Operator.LESS_EQUAL: operator.le,
}


def apply(each: Operator, left: Value, right: Value) -> float:
    """The result of an operator of two values."""
    if each in ORDER:
        return float(ORDER[each](to_number(left), to_number(right)))
    if each in ARITHMETIC:
        with np.errstate(all="ignore"):
            return float(ARITHMETIC[each](to_number(left), to_number(right)))
    if each is Operator.EQUAL:
        return float(_equal(left, right))
    if each is Operator.UNEQUAL:
        return float(not _equal(left, right))
    if each is Operator.IN:
        return float(_contains(left, right))
    if each is Operator.AND:
        return float(is_true(left) and is_true(right))
    return float(is_true(left) or is_true(right))
