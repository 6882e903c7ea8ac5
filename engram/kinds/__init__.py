"""The kinds of value that a key may hold, and what each operation does: one table of each.

Whatever treats values asks the table for the kind of one, so that a kind is all in one module. A kind that is
not engram's own is registered at the start of a process, by `register`: of the server, of its child that
writes snapshots, and of whatever else reads a data directory.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from engram import operations
from engram.effects import Effect
from engram.errors import UnknownKindError
from engram.key_effects import EFFECTS as KEY_EFFECTS
from engram.kinds.kind import Kind
from engram.kinds.string import STRING
from engram.kinds.vector_set import VECTOR_SET
from engram.operations import Operation


class Kinds:
    """The kinds, by name and by the type that their values have in Python; and the effects of all operations.

    Attributes:
        by_name: in the order in which they were registered.
        effects: by type of operation.
        modules: those that were registered beside engram's own, by name.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Kind[Any]] = {}
        self.effects: dict[type[Operation], Effect] = dict(KEY_EFFECTS)
        self.modules: dict[str, ModuleType] = {}
        self._by_type: dict[type, Kind[Any]] = {}
        for kind in (STRING, VECTOR_SET):
            self.add(kind)

    def add(self, kind: Kind[Any]) -> None:
        """Raises ValueError when a name or a type is another kind's."""
        if kind.name in self.by_name or not self._by_type.keys().isdisjoint(kind.types):
            raise ValueError(f"there is a kind {kind.name} already")
        operations.register(kind.operations)
        self.by_name[kind.name] = kind
        self._by_type.update(dict.fromkeys(kind.types, kind))
        self.effects.update(kind.effects)

    def of(self, value: object) -> Kind[Any]:
        """The kind of a value.

        Raises:
            UnknownKindError: there is none for its type.
        """
        kind = self._by_type.get(type(value))
        if kind is None:
            raise UnknownKindError(type(value))
        return kind


KINDS = Kinds()


def register(modules: Sequence[str]) -> None:
    """Adds the kinds of these modules, each of which has a `KIND` and `COMMANDS`.

    To be called before commands are imported, which may have some for them, and before any data is read.

    Raises:
        ImportError: there is no such module.
        ValueError: a name, a type or a tag is taken.
    """
    for name in modules:
        module = importlib.import_module(name)
        KINDS.add(module.KIND)
        KINDS.modules[name] = module
