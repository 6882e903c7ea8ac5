"""A filter: an expression that has been compiled, and can be run on rows."""

from __future__ import annotations

from functools import lru_cache

import attrs

from engram.index.attributes import AttributeColumns
from engram.index.filters.evaluation import Mask, find_satisfying, is_satisfied
from engram.index.filters.parser import parse
from engram.index.filters.program import Program

# Longer ones are compiled each time, so that what is kept stays small.
_LONGEST_KEPT = 4 << 10
_MOST_KEPT = 256


@attrs.frozen
class Filter:
    """A compiled expression; two are equal when their texts are."""

    text: bytes
    program: Program = attrs.field(eq=False, repr=False)

    @property
    def depth(self) -> int:
        """How many values wait for their operators at once, at most."""
        return self.program.depth

    def mask(self, columns: AttributeColumns) -> Mask:
        """Which rows satisfy it; shape (rows,)."""
        return find_satisfying(self.program, columns)

    def accepts(self, json_text: bytes) -> bool:
        """Whether a row with these attributes, empty for none, satisfies it."""
        return is_satisfied(self.program, json_text)


def compile_filter(expression: bytes) -> Filter:
    """The filter of an expression.

    Raises:
        FilterError: the expression is none.
    """
    return _compile_kept(expression) if len(expression) <= _LONGEST_KEPT else _compile(expression)


def _compile(expression: bytes) -> Filter:
    return Filter(expression, parse(expression))


_compile_kept = lru_cache(_MOST_KEPT)(_compile)
