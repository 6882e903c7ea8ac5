"""All commands by name, those of kinds of value that were registered before this is imported included."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engram.commands import (
    access,
    administration,
    bits,
    clients,
    counters,
    generic,
    indices,
    matching,
    objects,
    searches,
    strings,
    transactions,
    vectors,
)
from engram.commands.introspection import introspection
from engram.commands.table import Command, CommandTable
from engram.kinds import KINDS


def _build() -> dict[bytes, Command]:
    table: dict[bytes, Command] = {}
    strings_and_keys = (strings, counters, bits, generic, objects)
    vector_indices = (indices, vectors, searches, matching)
    engrams = (clients, access, transactions, *strings_and_keys, *vector_indices, administration)
    for module in (*engrams, *KINDS.modules.values()):
        for command in module.COMMANDS:
            table[command.name.encode()] = command
    table[b"command"] = introspection(table)
    return table


# By lower-case name.
COMMANDS: Mapping[bytes, Command] = MappingProxyType(_build())

# The spellings that clients use, so that dispatch needs no change of case.
SPELLINGS = {spelling: command for name, command in COMMANDS.items() for spelling in (name, name.upper())}

TABLE = CommandTable(COMMANDS, SPELLINGS)
