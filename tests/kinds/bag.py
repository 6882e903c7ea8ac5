"""A kind of value that engram has not: a bag, which counts how often each member was put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engram.columns import Array
from engram.commands.session import Session
from engram.commands.table import Command
from engram.database import WRONG_TYPE
from engram.effects import Effect, State, touch_key
from engram.errors import CommandError
from engram.kinds.kind import KeyFields, Kind, Line, Packed, Request, Text, Word, as_bytes, as_text
from engram.mappings import pack_mapping, unpack_mapping
from engram.operations import KindOperation
from engram.protocol import replies


class Bag:
    """Counts by member."""

    def __init__(self, members: Mapping[bytes, int]) -> None:
        self.members = dict(members)


class PutIntoBag(KindOperation, frozen=True, array_like=True, gc=False, tag=1000):
    """A member is in the bag at a key, which is made when there is none, so many times more."""

    key: bytes
    member: bytes
    count: int
    database: int = 0


def _put(state: State, lsn: int, operation: PutIntoBag, prepared: None) -> None:
    bag = state.keyspaces[operation.database].values.get(operation.key)
    if not isinstance(bag, Bag):
        bag = Bag({})
        state.place(operation.database, operation.key, bag)
    bag.members[operation.member] = bag.members.get(operation.member, 0) + operation.count
    state.resize(bag)


def _pack(bags: Mapping[bytes, Bag]) -> Packed:
    columns: dict[str, Array] = {}
    for number, bag in enumerate(bags.values()):
        columns.update(pack_mapping(f"bag-{number}", bag.members))
    return Packed(columns, [key.hex() for key in bags])


def _unpack(description: Any, columns: Mapping[str, Array], state: State) -> dict[bytes, Bag]:
    return {
        bytes.fromhex(key): Bag(unpack_mapping(f"bag-{number}", columns, int))
        for number, key in enumerate(description)
    }


class BagLine(Line, frozen=True, tag="bag"):
    key: Text
    members: list[tuple[Text, int]]
    expires_at: int | None = None
    database: int = 0


def _dump(state: State, fields: KeyFields, bag: Bag, base64: bool) -> Iterator[BagLine]:
    members = [(as_text(member), count) for member, count in bag.members.items()]
    yield BagLine(as_text(fields.key), members, fields.expires_at, fields.database)


class _Loader:
    def __init__(self, replace: bool) -> None:
        self._replace = replace

    def take(self, number: int, line: BagLine) -> Iterable[Request]:
        key = as_bytes(line.key)
        if self._replace:
            yield Request(["DEL", key], number, number)
        for place, (member, count) in enumerate(line.members):
            words: list[Word] = ["BAG.PUT", key, as_bytes(member), str(count)]
            yield Request(words, number, number, keys=int(place == 0))
        if line.expires_at is not None:
            yield Request(["PEXPIREAT", key, str(line.expires_at)], number, number, is_last=True)

    def finish(self) -> Iterable[Request]:
        return ()


KIND: Kind[Bag] = Kind(
    name="bag",
    types=(Bag,),
    encoding=lambda bag: "hashtable",
    bytes_held=lambda bag: 100 + sum(100 + len(member) for member in bag.members),
    pack=_pack,
    unpack=_unpack,
    lines=(BagLine,),
    dump=_dump,
    loader=_Loader,
    copy=lambda bag: Bag(bag.members),
    take_apart=lambda state, bag: state.dropped.append(bag.members),
    may_be_evicted=True,
    effects={PutIntoBag: Effect(_put, touch_key)},
    operations=(PutIntoBag,),
)


def _bag(value: object) -> Bag | None:
    if value is None or isinstance(value, Bag):
        return value
    raise CommandError(WRONG_TYPE)


def _put_many(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    key, member, count = arguments[1], arguments[2], int(arguments[3])
    bag = _bag(database.lookup(key))
    database.commit(PutIntoBag(key, member, count, database.number))
    before = 0 if bag is None else bag.members[member] - count
    return replies.integer(before + count)


def _count(session: Session, arguments: list[bytes]) -> bytes:
    bag = _bag(session.read(arguments[1]))
    return replies.integer(0 if bag is None else bag.members.get(arguments[2], 0))


COMMANDS = (
    Command(
        "bag.put",
        _put_many,
        4,
        "key member count",
        "Puts a member into a bag so many times.",
        "generic",
        ("write", "denyoom"),
        (1, 1, 1),
    ),
    Command(
        "bag.count",
        _count,
        3,
        "key member",
        "Returns how often a member is in a bag.",
        "generic",
        ("readonly",),
        (1, 1, 1),
    ),
)
