"""Words of a line, as in inline commands and config files: quoted, and split again."""

from __future__ import annotations

import re
from typing import Final

# Without these, blanks are all that counts in a line. (A vertical tab or a form feed is one only between two
# arguments.)
_NOT_PLAIN: Final = b"\"'\v\f"
_BLANKS: Final = b" \t\n\v\f\r"
_INLINE_ARGUMENT: Final = re.compile(
    rb"""([^ \t\n\r"']*+)                                # ends at a blank or a quote
         (?: "((?:[^"\\]|\\.)*+)" (?=[ \t\n\v\f\r]|\Z)   # a closing quote ends the argument:
           | '((?:\\'|[^'])*+)'   (?=[ \t\n\v\f\r]|\Z)   # only a blank may follow
           | (?!["']) )
         [ \t\n\v\f\r]*+""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE: Final = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_CONTROL: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}
_PRINTABLE: Final = {byte: bytes((byte,)) for byte in range(32, 127)}
_ESCAPES: Final = (
    {byte: b"\\x%02x" % byte for byte in range(256)}
    | _PRINTABLE
    | {
        ord("\\"): b"\\\\",
        ord('"'): b'\\"',
        ord("\n"): b"\\n",
        ord("\r"): b"\\r",
        ord("\t"): b"\\t",
        ord("\a"): b"\\a",
        ord("\b"): b"\\b",
    }
)
# What stands for itself between double quotes.
_UNESCAPED: Final = bytes(byte for byte, shown in _ESCAPES.items() if len(shown) == 1)
# The longest of what stands for a byte; of each byte the first character of that, the second and so on, where
# nothing is a zero.
_LONGEST: Final = 4
_NOTHING: Final = b"\0"
_CHARACTERS: Final = tuple(
    bytes(characters)
    for characters in zip(*(_ESCAPES[byte].ljust(_LONGEST, _NOTHING) for byte in range(256)), strict=True)
)
# From so many bytes on the tables are quicker than one byte after the other.
_TRANSLATED: Final = 48


def split_inline(line: bytes) -> list[bytes]:
    r"""The arguments of an inline command, quoted as in Redis (its sdssplitargs).

    In double quotes a backslash escapes: ``\n \r \t \b \a``, ``\xHH`` for any byte, and any other character
    for itself. In single quotes only ``\'`` is special.

    Raises:
        ValueError: a quote is left open, or closed with anything but a blank behind it.
    """
    if len(line.translate(None, _NOT_PLAIN)) == len(line):
        return line.split()
    arguments = []
    line = line.lstrip(_BLANKS)
    position = 0
    while position < len(line):
        match = _INLINE_ARGUMENT.match(line, position)
        if match is None:
            raise ValueError("unbalanced quotes")
        plain, double, single = match.groups(b"")
        arguments.append(plain + _ESCAPE.sub(_unescape, double) + single.replace(b"\\'", b"'"))
        position = match.end()
    return arguments


def _unescape(match: re.Match[bytes]) -> bytes:
    digits, character = match.groups()
    return bytes.fromhex(digits.decode()) if digits else _CONTROL.get(character, character)


def quoted(argument: bytes) -> bytes:
    """An argument in double quotes, as Redis shows it to people."""
    return b'"%b"' % escaped(argument)


def escaped(argument: bytes) -> bytes:
    """What `quoted` has between the quotes: that of some bytes, and then that of the next ones."""
    if not argument.translate(None, _UNESCAPED):
        return argument
    if len(argument) < _TRANSLATED:
        return b"".join(map(_ESCAPES.__getitem__, argument))
    shown = bytearray(_LONGEST * len(argument))
    for position, characters in enumerate(_CHARACTERS):
        shown[position::_LONGEST] = argument.translate(characters)
    return bytes(shown.translate(None, _NOTHING))
