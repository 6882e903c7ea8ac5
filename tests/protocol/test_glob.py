from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engram.protocol.glob import MAX_PATTERN_LENGTH, compile_glob


def matches(pattern: bytes, string: bytes, nocase: bool = False) -> bool:
    """Redis's rules, one character of the pattern at a time, with plain backtracking."""

    def lower(byte: int) -> int:
        return byte | 32 if nocase and 65 <= byte <= 90 else byte

    if not pattern:
        return not string
    head, rest = pattern[0], pattern[1:]
    if head == ord("*"):
        return any(matches(rest, string[start:], nocase) for start in range(len(string) + 1))
    if not string:
        return False
    byte = string[0]
    if head == ord("?"):
        return matches(rest, string[1:], nocase)
    if head == ord("["):
        negated = rest.startswith(b"^")
        rest = rest.removeprefix(b"^")
        found = False
        while rest and rest[0] != ord("]"):
            if rest[0] == ord("\\") and len(rest) >= 2:
                found |= rest[1] == byte
                rest = rest[2:]
            elif len(rest) >= 3 and rest[1] == ord("-"):
                low, high = sorted((rest[0], rest[2]))
                found |= lower(low) <= lower(byte) <= lower(high)
                rest = rest[3:]
            else:
                found |= lower(rest[0]) == lower(byte)
                rest = rest[1:]
        return found != negated and matches(rest[1:], string[1:], nocase)
    if head == ord("\\") and rest:
        head, rest = rest[0], rest[1:]
    return lower(head) == lower(byte) and matches(rest, string[1:], nocase)


patterns = st.text("aAbzZ-]^[\\*?\n", max_size=9).map(str.encode)
strings = st.text("aAbzZ-]^[\\*\n", max_size=7).map(str.encode) | st.binary(max_size=4)


@given(patterns, strings, st.booleans())
@example(b"*a*b*", b"aab", False)
@example(b"[Z-a]", b"b", True)
@example(b"[\\A]", b"a", True)
def test_agrees_with_plain_backtracking(pattern: bytes, string: bytes, nocase: bool) -> None:
    assert compile_glob(pattern, nocase=nocase)(string) == matches(pattern, string, nocase)


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_escaped_bytes_match_themselves(string: bytes, other: bytes) -> None:
    match = compile_glob(b"".join(b"\\" + bytes([byte]) for byte in string))
    assert match(string)
    assert match(other) == (other == string)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        # As KEYS of Redis 8.6.3 answers.
        (b"h?llo", [b"hello", b"hallo", b"h\nllo"], [b"hllo", b"heello"]),
        (b"h*llo", [b"hllo", b"heeeello"], [b"hlo"]),
        (b"h[ae]llo", [b"hello", b"hallo"], [b"hillo"]),
        (b"h[^e]llo", [b"hallo"], [b"hello", b"hllo"]),
        (b"h[a-b]llo", [b"hallo", b"hbllo"], [b"hcllo"]),
        (b"h[b-a]llo", [b"hallo", b"hbllo"], [b"hcllo"]),
        (b"\\*", [b"*"], [b"a", b"\\*"]),
        (b"a\\", [b"a\\"], [b"a"]),
        (b"[abc", [b"a", b"b", b"c"], [b"[", b"[abc"]),
        (b"[a-", [b"a", b"-"], [b"b"]),
        (b"[a-]b]", [b"b", b"]", b"a", b"^"], [b"-"]),
        (b"[^", [b"a", b"^"], [b"", b"ab"]),
        (b"[]", [], [b"", b"]", b"[]"]),
        (b"[^]", [b"a", b"]"], [b"", b"ab"]),
        (b"[\\]]", [b"]"], [b"\\"]),
        (b"[\\", [b"\\"], [b"["]),
        (b"a*", [b"a", b"ab"], [b"", b"ba"]),
        (b"", [b""], [b"a"]),
        (b"*", [b"", b"a\nb", b"\xff"], []),
    ],
)
def test_patterns_of_redis(pattern: bytes, matching: list[bytes], other: list[bytes]) -> None:
    match = compile_glob(pattern)
    assert [match(string) for string in matching + other] == [True] * len(matching) + [False] * len(other)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        (b"GeT*", [b"get", b"GETEX"], [b"set"]),
        (b"[a-c]", [b"B"], [b"D"]),
        (b"[A-C]x", [b"bX"], [b"dx"]),
        (b"[^a]", [b"b"], [b"A"]),
        (b"\\GET", [b"get"], [b"\\get"]),
    ],
)
def test_letters_of_either_case(pattern: bytes, matching: list[bytes], other: list[bytes]) -> None:
    match = compile_glob(pattern, nocase=True)
    assert [match(string) for string in matching + other] == [True] * len(matching) + [False] * len(other)


def test_many_stars_are_not_tried_in_all_combinations() -> None:
    match = compile_glob(b"*a" * 50 + b"b")
    assert not match(b"a" * 2000)
    assert match(b"a" * 2000 + b"b")


def test_long_patterns_match_nothing_unless_literal() -> None:
    name = b"k" * MAX_PATTERN_LENGTH
    assert compile_glob(name + b"k")(name + b"k")
    assert not compile_glob(name + b"*")(name + b"k")
    assert compile_glob(name[1:] + b"*")(name)
