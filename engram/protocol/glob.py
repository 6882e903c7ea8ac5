"""Redis's glob patterns on bytes: ``*``, ``?``, ``[abc]``, ``[^a-z]`` and ``\\`` to escape.

The meaning is that of `stringmatchlen` in Redis's util.c, its oddities included: a class that never ends is
taken to end with the pattern, a range may run backwards, and ``[]`` matches nothing. One is left out: there,
two stars do not match the empty string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

MAX_PATTERN_LENGTH: Final = 4096
"""Patterns (with something to expand) longer than this match nothing.

Compiling one takes up to ten microseconds a byte. Redis has a limit of its own kind: a pattern with more than
1,000 stars matches nothing.
"""

_ALL_BYTES: Final = frozenset(range(256))
_LOWER: Final = bytes(range(256)).lower()
_UPPER: Final = bytes(range(256)).upper()
_STAR, _ANY, _OPEN, _CLOSE, _ESCAPE, _TO = b"*?[]\\-"


def compile_glob(pattern: bytes, *, nocase: bool = False) -> Callable[[bytes], bool]:
    """A function that says whether a whole string matches `pattern`.

    Matching takes time proportional to the product of the two lengths at worst. With `nocase`, ASCII letters
    match in either case.
    """
    if not nocase and not any(special in pattern for special in b"*?[\\"):
        return pattern.__eq__
    if len(pattern) > MAX_PATTERN_LENGTH:
        return lambda _: False
    match = re.compile(_translate(pattern, nocase), re.DOTALL).fullmatch
    return lambda string: match(string) is not None


def _translate(pattern: bytes, nocase: bool) -> bytes:
    """The regular expression of a glob.

    What stands between two stars has a fixed length, so the earliest place it fits is as good as any later
    one: an atomic group commits to it, and nothing is tried twice.
    """
    segments = [b""]
    position = 0
    while position < len(pattern):
        byte = pattern[position]
        position += 1
        if byte == _STAR:
            segments.append(b"")
            continue
        if byte == _ANY:
            segments[-1] += b"."
            continue
        if byte == _OPEN:
            members, position = _read_class(pattern, position, nocase)
        else:
            if byte == _ESCAPE and position < len(pattern):
                byte = pattern[position]
                position += 1
            members = _spellings(byte, nocase)
        segments[-1] += _one_of(members)
    first, *rest = segments
    if not rest:
        return first
    *middle, last = rest
    return first + b"".join(b"(?>.*?%b)" % segment for segment in middle if segment) + b".*" + last


def _read_class(pattern: bytes, position: int, nocase: bool) -> tuple[set[int], int]:
    """The bytes matched by the class whose ``[`` is before `position`, and the position after it."""
    negated = pattern[position : position + 1] == b"^"
    position += negated
    members: set[int] = set()
    while position < len(pattern) and pattern[position] != _CLOSE:
        byte = pattern[position]
        left = len(pattern) - position
        if byte == _ESCAPE and left >= 2:
            members.add(pattern[position + 1])
            position += 2
        elif left >= 3 and pattern[position + 1] == _TO:
            start, end = sorted((byte, pattern[position + 2]))
            members.update(_range(start, end, nocase))
            position += 3
        else:
            members.update(_spellings(byte, nocase))
            position += 1
    if negated:
        members = set(_ALL_BYTES - members)
    return members, position + 1


def _range(start: int, end: int, nocase: bool) -> Iterable[int]:
    if not nocase:
        return range(start, end + 1)
    lowered = range(_LOWER[start], _LOWER[end] + 1)
    return [byte for byte in _ALL_BYTES if _LOWER[byte] in lowered]


def _spellings(byte: int, nocase: bool) -> set[int]:
    return {_LOWER[byte], _UPPER[byte]} if nocase else {byte}


def _one_of(members: set[int]) -> bytes:
    """The regular expression that matches one of `members`: runs of bytes as ranges."""
    if not members:
        return b"(?!)"
    if len(members) == 1:
        return re.escape(bytes(members))
    starts = sorted(byte for byte in members if byte - 1 not in members)
    ends = sorted(byte for byte in members if byte + 1 not in members)
    return b"[%b]" % b"".join(b"\\x%02x-\\x%02x" % run for run in zip(starts, ends, strict=True))
