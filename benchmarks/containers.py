"""engram with a kind of value that is nothing but containers, and with figures of the garbage collector.

    python -m benchmarks.containers          in place of engram

CONTAINERS.ADD key count     makes so many items more at a key: a tuple of a list and a dictionary with a list
CONTAINERS.COLLECT           has the collector look at all that it has in sight
CONTAINERS.PAUSES            JSON, of what came since the last call: a list for each generation, of the number
                             of collections, the milliseconds of the longest and of all, in processor time
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from engram.columns import Array
from engram.commands.session import Session
from engram.commands.table import Command
from engram.database import WRONG_TYPE
from engram.effects import Effect, State, touch_key
from engram.errors import CommandError
from engram.kinds import register
from engram.kinds.kind import KeyFields, Kind, Line, Packed
from engram.operations import KindOperation
from engram.protocol import replies

CONTAINERS_OF_AN_ITEM = 4


@attrs.define(eq=False)
class Containers:
    items: list[tuple[list[int], dict[bytes, list[int]]]] = attrs.field(factory=list)


class AddContainers(KindOperation, frozen=True, array_like=True, gc=False, tag=1001):
    key: bytes
    count: int
    database: int = 0


def _add(state: State, lsn: int, operation: AddContainers, prepared: None) -> None:
    value = state.keyspaces[operation.database].values.get(operation.key)
    if not isinstance(value, Containers):
        value = Containers()
        state.place(operation.database, operation.key, value)
    value.items += (([number], {b"item": [number]}) for number in range(operation.count))
    state.resize(value)


def _pack(values: Mapping[bytes, Containers]) -> Packed:
    raise NotImplementedError


def _unpack(description: Any, columns: Mapping[str, Array], state: State) -> dict[bytes, Containers]:
    raise NotImplementedError


def _dump(state: State, fields: KeyFields, value: Containers, base64: bool) -> Iterator[Line]:
    raise NotImplementedError


def _loader(replace: bool) -> Any:
    raise NotImplementedError


KIND: Kind[Containers] = Kind(
    name="containers",
    types=(Containers,),
    encoding=lambda value: "raw",
    bytes_held=lambda value: 400 * len(value.items),
    pack=_pack,
    unpack=_unpack,
    lines=(),
    dump=_dump,
    loader=_loader,
    take_apart=lambda state, value: state.dropped.append(value.items),
    effects={AddContainers: Effect(_add, touch_key)},
    operations=(AddContainers,),
)


class Pauses:
    """How long the collector took, of each generation: in processor time, for others may be using it."""

    def __init__(self) -> None:
        self._began = 0
        self._taken: list[list[float]] = [[], [], []]
        gc.callbacks.append(self._begin)
        gc.callbacks.append(self._end)

    def take(self) -> list[tuple[int, float, float]]:
        # Behind what the server itself does at the end of a collection.
        gc.callbacks.remove(self._end)
        gc.callbacks.append(self._end)
        taken, self._taken = self._taken, [[], [], []]
        return [(len(times), max(times, default=0.0), sum(times)) for times in taken]

    def _begin(self, phase: str, information: Mapping[str, Any]) -> None:
        if phase == "start":
            self._began = time.thread_time_ns()

    def _end(self, phase: str, information: Mapping[str, Any]) -> None:
        if phase == "stop":
            self._taken[information["generation"]].append((time.thread_time_ns() - self._began) / 1e6)


_pauses = Pauses()


def _add_to_key(session: Session, arguments: list[bytes]) -> bytes:
    database = session.database
    if not isinstance(database.lookup(arguments[1]), Containers | None):
        raise CommandError(WRONG_TYPE)
    database.commit(AddContainers(arguments[1], int(arguments[2]), database.number))
    return replies.OK


def _collect(session: Session, arguments: list[bytes]) -> bytes:
    gc.collect()
    return replies.OK


def _report(session: Session, arguments: list[bytes]) -> bytes:
    return replies.bulk(json.dumps(_pauses.take()).encode())


COMMANDS = (
    Command("containers.add", _add_to_key, 3, "key count", "Adds.", "generic", ("write",), (1, 1, 1)),
    Command("containers.collect", _collect, 1, "", "Collects.", "generic", ()),
    Command("containers.pauses", _report, 1, "", "Reports.", "generic", ()),
)

if __name__ == "__main__":
    register(["benchmarks.containers"])
    # After the kinds: the table of commands has those of theirs.
    from engram.cli import main

    sys.exit(main())
