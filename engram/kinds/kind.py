"""What a kind of value is: all that the rest of engram has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import attrs
import msgspec

from engram.columns import Array
from engram.effects import Effect, State
from engram.errors import EngramError
from engram.operations import KindOperation, Operation

V = TypeVar("V")

Word = bytes | str


class Base64(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that are no text."""

    base64: bytes


Text = str | Base64
"""Bytes in a line of a dump."""


def as_text(data: bytes) -> Text:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Base64(data)


def as_bytes(text: Text) -> bytes:
    return text.base64 if isinstance(text, Base64) else text.encode()


class Line(
    msgspec.Struct,
    frozen=True,
    rename="kebab",
    tag_field="type",
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """A line of a dump: a key, or a part of the value that the key of a line before it holds.

    Its tag names the kind of value, or the part. It has a `database`, 0 unless it says so, and the first line
    of a key an `expires_at`, in milliseconds since the epoch.
    """


class NumberedLine(Protocol):
    """What any line has."""

    @property
    def database(self) -> int: ...


@attrs.frozen
class KeyFields:
    """What the first line of a key says, whatever it holds."""

    database: int
    key: bytes
    expires_at: int | None


@attrs.frozen
class Packed:
    """Values of one kind in a snapshot.

    Attributes:
        columns: by name; the names need only be those of the kind, and have no dot.
        description: what of it JSON holds.
        segments: the checksums of the segments that the values refer to, by id.
    """

    columns: dict[str, Array]
    description: Any = None
    segments: Mapping[str, int] = attrs.Factory(dict)


class LineError(EngramError):
    """A line of a dump is not what it should be; the text says why."""


@attrs.frozen
class Request:
    """A request that loads something: its words, and how many keys and vectors it brings.

    Attributes:
        first, last: the numbers of the lines that it stands for.
        is_barrier: whether nothing behind it is sent before it is answered.
        is_last: whether it is sent behind everything else.
    """

    words: list[Word]
    first: int
    last: int
    keys: int = 0
    vectors: int = 0
    is_barrier: bool = False
    is_last: bool = False


class Loader(Protocol):
    """Makes requests of the lines of one kind, in order."""

    def take(self, number: int, line: Any) -> Iterable[Request]:
        """The requests that the line of a number, or several before it, come to. Raises LineError."""
        ...

    def finish(self) -> Iterable[Request]:
        """The requests that are still missing, for a line of another kind follows, or none."""
        ...


def _nothing(state: State, dropped: Any) -> None:
    return None


@attrs.frozen(kw_only=True)
class Kind(Generic[V]):
    """A kind of value. Values that are no strings are known by their identity.

    No value may refer to itself, through whatever else: see `engram.collector`.

    Attributes:
        name: what TYPE answers.
        types: the types of Python that its values have.
        encoding: what OBJECT ENCODING answers.
        bytes_held: the bytes that a value takes in memory.
        pack, unpack: the values of a database in a snapshot, by key, and back. The engine is empty but for
            what was unpacked before.
        lines: the types of the lines of a dump that are of this kind.
        dump: the lines of a key; the last argument is whether vectors are written in base64.
        loader: what makes requests of the lines; the argument is whether keys that are there are replaced.
        copy: a value for another key; None where COPY is refused.
        drop: lets go of values that no key holds any more, in a few steps for each.
        take_apart: hands large parts of such a value to `Engine.dropped`, at once or some time later.
        may_be_evicted: whether a key that lapses may give way where memory is short.
        effects, operations: what changes values of the kind, and those of the operations that are not
            engram's own.
    """

    name: str
    types: tuple[type, ...]
    encoding: Callable[[V], str]
    bytes_held: Callable[[V], int]
    pack: Callable[[Mapping[bytes, V]], Packed]
    unpack: Callable[[Any, Mapping[str, Array], State], dict[bytes, V]]
    lines: tuple[type[Line], ...]
    dump: Callable[[State, KeyFields, V, bool], Iterator[Line]]
    loader: Callable[[bool], Loader]
    copy: Callable[[V], V] | None = None
    drop: Callable[[State, Collection[V]], None] = _nothing
    take_apart: Callable[[State, V], None] = _nothing
    may_be_evicted: bool = False
    effects: Mapping[type[Operation], Effect] = attrs.Factory(dict)
    operations: tuple[type[KindOperation], ...] = ()
