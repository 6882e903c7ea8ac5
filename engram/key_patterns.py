"""Patterns of keys that a user may read or write, and which of many keys match none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs

from engram.protocol.glob import MAX_PATTERN_LENGTH, compile_glob

# What looking at keys costs at most until others have a turn, in comparisons.
_COMPARISONS_A_TURN: Final = 4096
# What a key costs beside the patterns that it is compared with.
_OF_A_KEY: Final = 4


@attrs.frozen
class KeyPattern:
    """Keys that may be read, written or both."""

    pattern: bytes
    reads: bool = True
    writes: bool = True

    def describe(self) -> bytes:
        """The rule that makes this pattern."""
        # "~*" would be `allkeys`, behind which no pattern may follow; this one may be among others.
        if self.reads and self.writes and self.pattern != b"*":
            return b"~" + self.pattern
        return b"%" + b"R" * self.reads + b"W" * self.writes + b"~" + self.pattern


class KeyMatcher:
    """Tells keys that match one of some patterns from others.

    Patterns without anything special, and those with a star at the end alone, are looked up, however many
    there are. A key is compared with the others one by one.

    Attributes:
        keys_a_turn: how many keys are looked at until others have a turn.
    """

    __slots__ = ("_exact", "_lengths", "_others", "_prefixes", "keys_a_turn")

    def __init__(self, patterns: Iterable[bytes]) -> None:
        self._exact: set[bytes] = set()
        self._prefixes: set[bytes] = set()
        self._others: list[Callable[[bytes], bool]] = []
        for pattern in patterns:
            self._add(pattern)
        self._lengths = sorted(set(map(len, self._prefixes)))
        cost = _OF_A_KEY + len(self._lengths) + len(self._others)
        self.keys_a_turn = max(1, _COMPARISONS_A_TURN // cost)

    def _add(self, pattern: bytes) -> None:
        literal = pattern.removesuffix(b"*")
        if b"*" in literal or b"?" in literal or b"[" in literal or b"\\" in literal:
            self._others.append(compile_glob(pattern))
        elif literal == pattern:
            self._exact.add(pattern)
        elif len(pattern) <= MAX_PATTERN_LENGTH:
            self._prefixes.add(literal)

    def first_unmatched(self, request: Sequence[bytes], positions: Iterable[int]) -> int | None:
        """The first of the positions in a request where a key matches no pattern; None when each does."""
        exact, prefixes, lengths, others = self._exact, self._prefixes, self._lengths, self._others
        for position in positions:
            key = request[position]
            if key in exact:
                continue
            for length in lengths:
                # A shorter key is looked up whole.
                if key[:length] in prefixes:
                    break
            else:
                if not any(matches(key) for matches in others):
                    return position
        return None
