"""How engram and Redis 8 are asked to add and to search. Both answer a search with key and number in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs

from benchmarks.load import pack

INDEX = b"packages"

# Key, vector and, where there are attributes, their JSON.
Row = tuple[bytes, bytes, bytes | None]


class Dialect(Protocol):
    def prepare(self) -> list[bytes]:
        """Requests that come before the first row."""
        ...

    def add(self, rows: Sequence[Row]) -> tuple[bytes, int]:
        """Requests that add rows, joined, and how many there are."""
        ...

    def search(
        self, query: bytes, k: int, ef: int | None = None, filter_text: str | None = None
    ) -> bytes: ...


@attrs.frozen
class Engram:
    """`options` are further words of VNEW, `search_options` of each VSEARCH."""

    dimension: int
    options: tuple[str, ...] = ()
    search_options: tuple[str, ...] = ()

    def prepare(self) -> list[bytes]:
        return [pack(b"VNEW", INDEX, b"%d" % self.dimension, *(word.encode() for word in self.options))]

    def add(self, rows: Sequence[Row]) -> tuple[bytes, int]:
        if rows[0][2] is None:
            return b"".join(pack(b"VADD", INDEX, key, vector) for key, vector, _ in rows), len(rows)
        words = [word for key, vector, text in rows for word in (key, vector, text or b"")]
        return pack(b"VMADD", INDEX, *words, b"ATTRS"), 1

    def search(self, query: bytes, k: int, ef: int | None = None, filter_text: str | None = None) -> bytes:
        words = [b"VSEARCH", INDEX, query, b"%d" % k, *_options(ef, filter_text)]
        return pack(*words, *(word.encode() for word in self.search_options))


@attrs.frozen
class Redis:
    """`search_options` are further words of each VSIM."""

    search_options: tuple[str, ...] = ()

    def prepare(self) -> list[bytes]:
        return []

    def add(self, rows: Sequence[Row]) -> tuple[bytes, int]:
        requests = [
            pack(b"VADD", INDEX, b"FP32", vector, key, *(() if text is None else (b"SETATTR", text)))
            for key, vector, text in rows
        ]
        return b"".join(requests), len(requests)

    def search(self, query: bytes, k: int, ef: int | None = None, filter_text: str | None = None) -> bytes:
        words = [b"VSIM", INDEX, b"FP32", query, b"WITHSCORES", b"COUNT", b"%d" % k]
        return pack(*words, *_options(ef, filter_text), *(word.encode() for word in self.search_options))


def _options(ef: int | None, filter_text: str | None) -> list[bytes]:
    words = [] if ef is None else [b"EF", b"%d" % ef]
    return words if filter_text is None else [*words, b"FILTER", filter_text.encode()]
