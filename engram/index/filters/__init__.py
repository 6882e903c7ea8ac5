"""Filters: expressions over attributes, in the language of Redis's vector sets (https://redis.io/docs/latest/
develop/data-types/vector-sets/filtered-search); docs/filters.md is the reference.

An expression is parsed once (`parser`) to a program in postfix order (`program`), which is run in two ways
(`evaluation`): on columns, a block of rows at a time, and on the JSON text of one row.
"""

from engram.index.filters.evaluation import Mask
from engram.index.filters.filter import Filter, compile_filter
from engram.index.filters.parser import DEEPEST_EXPRESSION, LONGEST_EXPRESSION

__all__ = ["DEEPEST_EXPRESSION", "LONGEST_EXPRESSION", "Filter", "Mask", "compile_filter"]
