"""Dictionaries as columns: maps of MessagePack, which are read sooner than keys and values are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import msgspec

from engram.columns import Array, pack_bytes, unpack_bytes

# Entries of a map. Other threads, which open segments, wait while one is decoded.
_ENTRIES = 1 << 14


def pack_mapping(name: str, mapping: Mapping[bytes, Any]) -> dict[str, Array]:
    """The columns `name`-bytes and `name`-ends; values are integers, bytes or what `bytes` makes bytes of."""
    items = iter(mapping.items())
    parts = iter(lambda: dict(islice(items, _ENTRIES)), {})
    encode = msgspec.msgpack.Encoder(enc_hook=bytes).encode
    return pack_bytes(name, map(encode, parts))


def unpack_mapping(name: str, columns: Mapping[str, Array], values: type) -> dict[bytes, Any]:
    """The inverse of `pack_mapping`, for values of that type."""
    decoder = msgspec.msgpack.Decoder(dict[bytes, values])  # type: ignore[valid-type]
    mapping: dict[bytes, Any] = {}
    for part in unpack_bytes(name, columns):
        mapping.update(decoder.decode(part))
    return mapping
