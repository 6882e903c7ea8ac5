"""The compiled form of a filter: its values and operators in postfix order."""

from __future__ import annotations

import enum
from typing import TypeAlias

import attrs

from engram.index.attributes import Value


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


@attrs.frozen
class Constant:
    """A value written in the expression."""

    value: Value


@attrs.frozen
class Selector:
    """A field of the row's attributes."""

    name: str


Step: TypeAlias = Constant | Selector | Operator


@attrs.frozen
class Program:
    """Steps that leave one value: each operator takes the values before it.

    At most `depth` values wait for their operators at once.
    """

    steps: tuple[Step, ...]
    depth: int
