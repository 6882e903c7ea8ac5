"""What an index refuses, as facts; the words that a client reads are those of whoever speaks to it.

EngramError
└── RefusalError            what is asked of an index cannot be done, and nothing has changed
    ├── FilterError         an expression is no filter
    │   ├── FilterSyntaxError
    │   ├── FilterTooLongError
    │   └── FilterTooDeepError
    ├── VectorError         bytes are no vector of an index
    │   ├── VectorEncodingError
    │   ├── WrongDimensionError
    │   └── VectorNormError
    └── SearchBusyError     a search was not begun in time
"""

from __future__ import annotations

from engram.errors import EngramError


class RefusalError(EngramError):
    """What is asked of an index cannot be done, and nothing has changed."""


class FilterError(RefusalError):
    """An expression is no filter."""


class FilterSyntaxError(FilterError):
    """What cannot be read of `expression` begins at `offset`, which may be its end."""

    def __init__(self, expression: bytes, offset: int) -> None:
        super().__init__(f"a filter cannot be read from byte {offset} on")
        self.expression = expression
        self.offset = offset


class FilterTooLongError(FilterError):
    """An expression has more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a filter is longer than {limit} bytes")
        self.limit = limit


class FilterTooDeepError(FilterError):
    """More than `limit` values of an expression wait for their operators."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a filter has more than {limit} values that wait for their operators")
        self.limit = limit


class VectorError(RefusalError):
    """Bytes are no vector of an index."""


class VectorEncodingError(VectorError):
    """So many bytes, `size`, are no float32 numbers."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes are no float32 numbers")
        self.size = size


class WrongDimensionError(VectorError):
    """A vector has `got` numbers, where the index has `expected`."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"a vector has {got} numbers instead of {expected}")
        self.expected = expected
        self.got = got


class VectorNormError(VectorError):
    """A vector is not finite, or its norm is more than `limit`: distances would overflow."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"a vector is not finite, or its norm is more than {limit:g}")
        self.limit = limit


class SearchBusyError(RefusalError):
    """A search waited for its turn longer than `timeout` seconds, and was not begun."""

    def __init__(self, timeout: float) -> None:
        super().__init__(f"a search waited for its turn longer than {timeout:g} seconds")
        self.timeout = timeout
