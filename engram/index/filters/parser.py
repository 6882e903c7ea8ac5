"""The syntax of filters: from the text of an expression to its program. No step recurses."""

from __future__ import annotations

import re

from engram.index.attributes import Value
from engram.index.errors import FilterSyntaxError, FilterTooDeepError, FilterTooLongError
from engram.index.filters.program import Constant, Operator, Program, Selector, Step
from engram.index.filters.values import LONGEST_NUMBER

# The longest expression, in bytes.
LONGEST_EXPRESSION = 64 << 10

# How many values an expression may have waiting for their operators.
DEEPEST_EXPRESSION = 256

_OPERATORS = {each.symbol: each for each in Operator} | {
    b"not": Operator.NOT,
    b"&&": Operator.AND,
    b"||": Operator.OR,
}

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


def parse(expression: bytes) -> Program:
    """The program of an expression.

    Raises:
        FilterSyntaxError: the expression is not one.
        FilterTooLongError, FilterTooDeepError: it is more than may be.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise FilterTooLongError(LONGEST_EXPRESSION)
    try:
        return _to_postfix(_split(expression))
    except _UnreadableError as problem:
        raise FilterSyntaxError(expression, problem.offset) from None


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
    if end - offset > LONGEST_NUMBER:
        raise _UnreadableError(offset + LONGEST_NUMBER)
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


def _to_postfix(steps: list[Step]) -> Program:
    """Dijkstra's shunting yard; where values and operators stand is free as long as each finds its values."""
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
                raise FilterTooDeepError(DEEPEST_EXPRESSION)
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
    return Program(tuple(program), deepest)
