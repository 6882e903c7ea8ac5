"""Numbers as INCRBYFLOAT has them: C's long double, which is the 80-bit floating point of x86 there.

They are whole numbers times powers of two, rounded as the processor rounds: to 64 significant bits, ties to
even. An infinite number is None.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

# Redis reads a number into a buffer of that many bytes, its end included.
LONGEST_TEXT = 5 * 1024 - 1

_PRECISION = 64
# The exponents of two of the least bit of all, and of what is too large.
_LOWEST_BIT = -16445
_HIGHEST = 16384
# The digits before the point of the greatest number, and zeros behind it that are more than the least has.
_MOST_DIGITS = 5000
# Far out of range, whatever number of digits an exponent goes with.
_BOUND = Decimal(10**7)
# Digits behind the point, of which zeros at the end are left out.
_PLACES = 17

_DECIMAL = re.compile(r"([+-]?)(?:(\d+)\.?(\d*)|\.(\d+))(?:[eE]([+-]?\d+))?", re.ASCII)
_HEXADECIMAL = re.compile(
    r"([+-]?)0[xX](?:([\da-fA-F]+)\.?([\da-fA-F]*)|\.([\da-fA-F]+))(?:[pP]([+-]?\d+))?", re.ASCII
)
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)


class LongDouble(NamedTuple):
    """mantissa x 2**exponent; the mantissa has up to 64 bits beside its sign."""

    mantissa: int
    exponent: int


def parse(text: bytes) -> LongDouble | None:
    """The number that is nearest to what a text says, in any form that C's `strtold` takes.

    Raises:
        ValueError: it is no number, or one too large, or too close to zero.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError("too long")
    word = text.decode("ascii")
    if _INFINITE.fullmatch(word):
        return None
    if match := _DECIMAL.fullmatch(word):
        return _scaled(match, 10)
    if match := _HEXADECIMAL.fullmatch(word):
        return _scaled(match, 16)
    raise ValueError("not a number")


def _scaled(match: re.Match[str], base: int) -> LongDouble:
    sign, whole, behind, alone, exponent = match.groups()
    fraction = behind or alone or ""
    digits = ((whole or "") + fraction).lstrip("0")
    if not digits:
        return LongDouble(0, 0)
    # (Decimal reads and writes any number of digits; int does not.)
    power = int(max(-_BOUND, min(_BOUND, Decimal(exponent or 0))))
    if base == 10:
        magnitude = len(digits) - len(fraction) + power
        whole_digits = int(Decimal(digits))
        step, shift = 10, power - len(fraction)
    else:
        magnitude = (4 * (len(digits) - len(fraction)) + power) // 4
        whole_digits = int(digits, 16)
        step, shift = 2, power - 4 * len(fraction)
    if abs(magnitude) > _MOST_DIGITS:
        raise ValueError("out of range")
    if sign == "-":
        whole_digits = -whole_digits
    number = _nearest(whole_digits * step ** max(shift, 0), step ** max(-shift, 0), 0)
    if number is None or not number.mantissa:
        raise ValueError("out of range")
    return number


def add(first: LongDouble | None, second: LongDouble | None) -> LongDouble | None:
    """The sum, rounded; None when it is infinite, or would be no number at all."""
    if first is None or second is None:
        return None
    exponent = min(first.exponent, second.exponent)
    exact = sum(number.mantissa << number.exponent - exponent for number in (first, second))
    return _nearest(exact, 1, exponent)


def _nearest(numerator: int, denominator: int, exponent: int) -> LongDouble | None:
    """The long double nearest to a fraction x 2**exponent."""
    if not numerator:
        return LongDouble(0, 0)
    length = numerator.bit_length() - denominator.bit_length()
    shift = max(length - _PRECISION, _LOWEST_BIT - exponent)
    mantissa = _divide(numerator << max(-shift, 0), denominator << max(shift, 0))
    while mantissa.bit_length() > _PRECISION:
        shift += 1
        mantissa = _divide(numerator << max(-shift, 0), denominator << max(shift, 0))
    if mantissa.bit_length() + shift + exponent > _HIGHEST:
        return None
    return LongDouble(mantissa, shift + exponent)


def _divide(numerator: int, denominator: int) -> int:
    """The quotient, rounded, ties to even."""
    quotient, rest = divmod(numerator, denominator)
    return quotient + (2 * rest > denominator or (2 * rest == denominator and quotient & 1))


def render(number: LongDouble) -> bytes:
    """The digits as Redis writes them for people: up to 17 behind the point, and no exponent."""
    mantissa, exponent = number
    scaled = _divide(abs(mantissa) * 10**_PLACES << max(exponent, 0), 1 << max(-exponent, 0))
    digits = f"{Decimal(scaled):f}".rjust(_PLACES + 1, "0")
    text = f"{digits[:-_PLACES]}.{digits[-_PLACES:]}".rstrip("0").rstrip(".")
    return f"-{text}".encode() if mantissa < 0 and scaled else text.encode()
