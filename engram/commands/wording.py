"""The words in which a client is told that an index refuses what is asked of it."""

from __future__ import annotations

from engram.errors import CommandError
from engram.index.errors import (
    FilterSyntaxError,
    FilterTooDeepError,
    FilterTooLongError,
    RefusalError,
    SearchBusyError,
    VectorEncodingError,
    VectorNormError,
    WrongDimensionError,
)

BUSY = "BUSY The search waited for its turn longer than search-queue-timeout, and was not begun."


def in_words(refusal: RefusalError) -> CommandError:
    """The error for a client, whose text is the reply; those about filters are Redis's."""
    return CommandError(_text(refusal))


def _text(refusal: RefusalError) -> str:
    match refusal:
        case FilterSyntaxError(expression=expression, offset=offset):
            # Where nothing is left to show, all is shown.
            near = (expression[offset:] or expression).decode(errors="surrogateescape")
            return f"ERR syntax error in FILTER expression near: {near}"
        case FilterTooLongError(limit=limit):
            return f"ERR FILTER expression is longer than {limit} bytes"
        case FilterTooDeepError():
            return "ERR FILTER expression is nested too deeply"
        case VectorEncodingError():
            return "ERR invalid vector encoding"
        case WrongDimensionError(expected=expected, got=got):
            return f"ERR wrong vector dimension: index expects {expected}, got {got}"
        case VectorNormError(limit=limit):
            return f"ERR vector must be finite, with a norm of at most {limit:g}"
        case SearchBusyError():
            return BUSY
    return f"ERR {refusal}"
