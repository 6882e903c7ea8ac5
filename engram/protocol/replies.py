"""Replies as bytes, in RESP2 and RESP3 (https://redis.io/docs/latest/develop/reference/protocol-spec/).

What looks the same in both versions is a constant or a function of this module. What differs is asked of an
`Encoder`: every connection holds the one of the version that HELLO chose. Functions that take encoded parts
take bytes made by this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

import attrs

OK: Final = b"+OK\r\n"
PONG: Final = b"+PONG\r\n"
QUEUED: Final = b"+QUEUED\r\n"
ZERO: Final = b":0\r\n"
ONE: Final = b":1\r\n"
EMPTY_ARRAY: Final = b"*0\r\n"
EMPTY_BULK: Final = b"$0\r\n\r\n"

_SMALL_INTEGERS: Final = tuple(b":%d\r\n" % value for value in range(1024))
KNOWN_LENGTHS: Final = 1024
# Formatting bytes takes longer than all else about a small reply.
BULK_HEADERS: Final = tuple(b"$%d\r\n" % length for length in range(KNOWN_LENGTHS))
"""What stands before a bulk string of so many bytes."""

_LINE_BREAKS: Final = str.maketrans("\r\n", "  ")


def simple(text: str) -> bytes:
    """A simple string; `text` holds no line break."""
    return b"+%b\r\n" % text.encode()


def error(text: str) -> bytes:
    """An error; `text` begins with its code word, as in ``ERR syntax error``.

    Line breaks would end the reply early: around the text they are dropped, within it they become spaces.
    Bytes that are not UTF-8 pass through unharmed when they were decoded with ``surrogateescape``.
    """
    line = text.strip("\r\n").translate(_LINE_BREAKS)
    return b"-%b\r\n" % line.encode(errors="surrogateescape")


def integer(value: int) -> bytes:
    """An integer."""
    if 0 <= value < 1024:
        return _SMALL_INTEGERS[value]
    return b":%d\r\n" % value


def bulk(value: bytes) -> bytes:
    """A bulk string."""
    length = len(value)
    if length < KNOWN_LENGTHS:
        return BULK_HEADERS[length] + value + b"\r\n"
    return b"$%d\r\n%b\r\n" % (length, value)


def array_header(count: int) -> bytes:
    """What stands before the encoded items of an array."""
    return b"*%d\r\n" % count


def array(items: Iterable[bytes]) -> bytes:
    """An array of encoded items."""
    return _aggregate(b"*", items)


def bulk_array(values: Iterable[bytes]) -> bytes:
    """An array of bulk strings."""
    return b"".join(bulk_array_parts(values))


def bulk_array_parts(values: Iterable[bytes]) -> list[bytes]:
    """What an array of bulk strings is made of when it is joined."""
    # As `bulk` of each, in half the time.
    parts = [b""]
    for value in values:
        length = len(value)
        header = BULK_HEADERS[length] if length < KNOWN_LENGTHS else b"$%d\r\n" % length
        parts += (header, value, b"\r\n")
    parts[0] = b"*%d\r\n" % (len(parts) // 3)
    return parts


def _aggregate(kind: bytes, items: Iterable[bytes]) -> bytes:
    parts = list(items)
    header = b"%b%d\r\n" % (kind, len(parts))
    parts.insert(0, header)
    return b"".join(parts)


@attrs.frozen
class Encoder:
    """The replies that differ between RESP2 and RESP3; `version` is 2 or 3."""

    version: int = attrs.field(validator=attrs.validators.in_((2, 3)))
    null: bytes = attrs.field(init=False)
    null_array: bytes = attrs.field(init=False)

    @null.default
    def _null(self) -> bytes:
        return b"$-1\r\n" if self.version == 2 else b"_\r\n"

    @null_array.default
    def _null_array(self) -> bytes:
        return b"*-1\r\n" if self.version == 2 else b"_\r\n"

    def map(self, pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
        """A map of encoded keys and values; in RESP2 a flat array of them."""
        parts = [key + value for key, value in pairs]
        parts.insert(0, self.map_header(len(parts)))
        return b"".join(parts)

    def map_header(self, count: int) -> bytes:
        """What stands before the pairs of a map, of which there are so many."""
        return b"*%d\r\n" % (2 * count) if self.version == 2 else b"%%%d\r\n" % count

    def set(self, items: Iterable[bytes]) -> bytes:
        """A set of encoded items; in RESP2 an array."""
        return _aggregate(b"*" if self.version == 2 else b"~", items)

    def double(self, value: float) -> bytes:
        """A floating-point number; in RESP2 a bulk string of the same digits."""
        text = format_double(value)
        return bulk(text) if self.version == 2 else b",%b\r\n" % text

    def boolean(self, value: bool) -> bytes:
        """True or false; in RESP2 one or zero."""
        if self.version == 2:
            return ONE if value else ZERO
        return b"#t\r\n" if value else b"#f\r\n"

    def verbatim(self, text: str) -> bytes:
        """Text for people to read; in RESP2 a bulk string."""
        encoded = text.encode(errors="surrogateescape")
        if self.version == 2:
            return bulk(encoded)
        return b"=%d\r\ntxt:%b\r\n" % (len(encoded) + 4, encoded)


RESP2: Final = Encoder(2)
RESP3: Final = Encoder(3)


def format_double(value: float) -> bytes:
    """The shortest digits that read back as `value`, laid out as Redis lays them out (its `d2string`).

    Integers up to 2**62 are written in full; `inf`, `-inf` and `nan` are words.
    """
    if not math.isfinite(value):
        return b"nan" if math.isnan(value) else b"inf" if value > 0 else b"-inf"
    if value == 0:
        return b"-0" if math.copysign(1, value) < 0 else b"0"
    if value.is_integer() and abs(value) <= 2**62:
        return b"%d" % value
    text = repr(value)
    if 1e-3 <= abs(value) < 1e4:
        return text.encode()
    sign, digits, scale = Decimal(text).normalize().as_tuple()
    return _lay_out("-" * sign, "".join(map(str, digits)), int(scale)).encode()


def _lay_out(sign: str, digits: str, scale: int) -> str:
    """Write digits x 10**scale by the rules of fpconv (https://github.com/night-shift/fpconv)."""
    exponent = scale + len(digits) - 1
    if scale >= 0 and exponent < len(digits) + 7:
        return sign + digits + "0" * scale
    if scale < 0 and (scale > -7 or abs(exponent) < 4):
        padded = digits.rjust(1 - scale, "0")
        return f"{sign}{padded[:scale]}.{padded[scale:]}"
    point = "." if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{point}{digits[1:]}e{exponent:+d}"
