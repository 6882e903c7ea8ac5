"""The mutations of the state: what the log holds and what recovery replays.

Operations are effects, not commands: a string carries its resulting value and absolute expiry, an expiry
is the deletion it caused. Replaying them therefore never reads a clock or a random number, and nothing
in them is local to one machine (no paths).

They are msgspec structs: frozen, made in 0.06 us and encoded in 0.15 us (a frozen attrs record takes
0.41 us to make), so that a write can afford one. Each is encoded as a MessagePack array headed by its
tag. A tag is part of the log's format: never reuse one. New fields are added last, with a default. A new
tag or field raises the format level (format_level.py). An operation on keys names the database that they are
in, 0 where an old log does not; a vector index is known by its id wherever its key is.

Kinds of value that are registered at the start (kinds) bring operations of their own: `register`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union, get_args

import msgspec

Attributes = bytes | None


class SetString(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """The key holds this string; `expires_at` is in milliseconds since the epoch, None for never."""

    key: bytes
    value: bytes
    expires_at: int | None = None
    database: int = 0


class AppendString(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """The string at key (empty when missing) grows by `suffix`; its expiry stays."""

    key: bytes
    suffix: bytes
    database: int = 0


class DeleteKeys(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """The keys are gone, whatever they held: by DEL, by expiry or by eviction."""

    keys: tuple[bytes, ...]
    database: int = 0


class SetExpiry(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """An existing key lapses at `expires_at` (milliseconds since the epoch), or never when None."""

    key: bytes
    expires_at: int | None
    database: int = 0


class Flush(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """Every key is gone: of one database, or of all when None."""

    database: int | None = None


class CreateIndex(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """The key holds a new, empty vector index, whose id is this operation's LSN.

    `metric` is "cosine", "l2" or "dot"; `quantization` the scalar kind of the graphs, "int8", "bf16" or
    "f32"; `recall` what searches aim at, in (0, 1].
    """

    key: bytes
    dimension: int
    metric: str
    connectivity: int
    expansion: int
    quantization: str
    recall: float = 0.99
    database: int = 0


class AddVectors(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Rows are appended to an index, in order; a key that was there has its old row killed.

    `vectors` holds len(keys) x dimension little-endian float32. `attributes` holds for each key a JSON
    text, empty for none, or None for the one that the key has; it is empty when all of them would be None.
    """

    index: int
    keys: tuple[bytes, ...]
    vectors: bytes
    attributes: tuple[Attributes, ...] = ()


class DeleteVectors(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """The rows of these keys are dead."""

    index: int
    keys: tuple[bytes, ...]


class InstallSegment(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """A segment folder, durable by now, takes the place of older rows of an index.

    It replaces the head's rows up to and including row id `through` (-1: none of the head) and the
    segments named in `replaces`. `segment` is empty when all of these rows were dead and nothing
    takes their place. `checksum` is that of the folder's table of columns (`columns.json`).
    """

    index: int
    segment: str
    checksum: int
    through: int
    replaces: tuple[str, ...]


class SetAttributes(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """These keys, which are in the index, get JSON texts, empty for none; their vectors stay.

    As an overwrite does, it kills the old rows and appends new ones.
    """

    index: int
    keys: tuple[bytes, ...]
    attributes: tuple[bytes, ...]


class SetStrings(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=11):
    """Each key holds the string at its place in `values`, for ever; of a key given twice the last counts."""

    keys: tuple[bytes, ...]
    values: tuple[bytes, ...]
    database: int = 0


class SetRange(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """The string at key (empty when missing) has these bytes at `offset`, with zeros up to it where it was
    shorter; its expiry stays.
    """

    key: bytes
    offset: int
    data: bytes
    database: int = 0


class RenameKey(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=13):
    """What an existing key holds, and when it lapses, moves to another key, in place of what was there."""

    source: bytes
    destination: bytes
    database: int = 0


class CopyKey(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=14):
    """What an existing key holds, and when it lapses, is at another key as well, perhaps of another database,
    in place of what that one held.
    """

    source: bytes
    destination: bytes
    database: int = 0
    destination_database: int = 0


class MoveKey(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=15):
    """What an existing key holds, and when it lapses, moves to the same key of another database, which holds
    nothing.
    """

    key: bytes
    database: int
    destination_database: int


class ExchangeDatabases(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """All keys of one database are those of the other, and the other way round."""

    first: int
    second: int


class KindOperation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The base of the operations of kinds of value that are registered at the start: see `register`."""


Operation = (
    SetString
    | AppendString
    | DeleteKeys
    | SetExpiry
    | Flush
    | CreateIndex
    | AddVectors
    | DeleteVectors
    | InstallSegment
    | SetAttributes
    | SetStrings
    | SetRange
    | RenameKey
    | CopyKey
    | MoveKey
    | ExchangeDatabases
    | KindOperation
)

# Bytes that operations which are recovered together may take, encoded: the log holds the length of what is
# written together, with the header of an array around it, as a number of 32 bits.
LARGEST_TOGETHER = (1 << 32) - 1 - 5

_encode_into = msgspec.msgpack.Encoder().encode_into


class _Vocabulary:
    """The operations that a log may hold, by tag."""

    def __init__(self, types: Iterable[type[Operation]]) -> None:
        self.types = {_tag_of(operation): operation for operation in types}
        union: Any = Union[tuple(self.types.values())]  # noqa: UP007 - made at run time
        one: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(union)
        several: msgspec.msgpack.Decoder[list[Operation]] = msgspec.msgpack.Decoder(list[union])
        self.decode, self.decode_array = one.decode, several.decode


def _tag_of(operation: type[Operation]) -> int:
    tag = operation.__struct_config__.tag
    assert isinstance(tag, int)
    return tag


_vocabulary = _Vocabulary(operation for operation in get_args(Operation) if operation is not KindOperation)


def known_operations() -> Mapping[int, type[Operation]]:
    """The operations that a log may hold, by tag."""
    return _vocabulary.types


def register(operations: Iterable[type[KindOperation]]) -> None:
    """Lets a log hold these as well. To be called at the start of a process, before any log is read.

    Raises:
        ValueError: a tag is another operation's.
    """
    global _vocabulary
    types = list(_vocabulary.types.values())
    for operation in operations:
        tag = _tag_of(operation)
        if _vocabulary.types.get(tag, operation) is not operation:
            raise ValueError(f"tag {tag} of {operation.__name__} is that of another operation")
        types.append(operation)
    _vocabulary = _Vocabulary(types)


def encode(operation: Operation) -> bytes:
    """The MessagePack form of an operation: an array of its tag and fields.

    Raises:
        msgspec.MsgspecError: a field has 4 GiB or more.
        MemoryError: there is none for it.
    """
    # Not Encoder.encode, which ends the process where its buffer cannot grow (msgspec 0.23: it lets go of
    # a buffer that realloc has freed). This one raises.
    payload = bytearray()
    _encode_into(operation, payload)
    return bytes(payload)


def decode(payload: bytes | memoryview) -> Operation:
    """The inverse of `encode`.

    Raises:
        msgspec.DecodeError: the payload is not an operation (ValidationError is a subclass).
    """
    return _vocabulary.decode(payload)


def join(encoded: Sequence[bytes]) -> bytes:
    """The MessagePack array of encoded operations."""
    count = len(encoded)
    if count < 1 << 4:
        header = bytes((0x90 | count,))
    elif count < 1 << 16:
        header = b"\xdc" + count.to_bytes(2, "big")
    else:
        header = b"\xdd" + count.to_bytes(4, "big")
    return b"".join((header, *encoded))


def decode_array(payload: bytes | memoryview) -> list[Operation]:
    """The operations that were encoded and joined.

    Raises:
        msgspec.DecodeError: the payload is not an array of operations (ValidationError is a subclass).
    """
    return _vocabulary.decode_array(payload)
