"""What the values of keys are made of and what memory they take: OBJECT and MEMORY."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from engram.commands.arguments import SYNTAX_ERROR, integer
from engram.commands.session import Session
from engram.commands.table import Command, container, help_command
from engram.errors import CommandError
from engram.kinds import KINDS
from engram.kinds.string import integer_in
from engram.protocol import replies
from engram.protocol.replies import ONE, ZERO

# Integers below this Redis holds once for all keys, and gives the greatest count of references.
_SHARED_INTEGERS = 10_000
_SHARED_COUNT = (1 << 31) - 1

# What an entry takes in a dictionary of Python: 36 to 73 bytes, by how full the dictionary is.
_ENTRY_BYTES = 64
# An expiry is an entry in a dictionary, and a pair in a queue.
_EXPIRY_BYTES = _ENTRY_BYTES + sys.getsizeof(1 << 40) + sys.getsizeof((0, b"")) + 8


def _of_object(answer: Callable[[Any], bytes], session: Session, arguments: list[bytes]) -> bytes:
    value = session.read(arguments[2])
    return session.encoder.null if value is None else answer(value)


def _encoding(value: Any) -> bytes:
    return replies.bulk(KINDS.of(value).encoding(value).encode())


def _reference_count(value: Any) -> bytes:
    number = integer_in(value)
    shared = number is not None and 0 <= number < _SHARED_INTEGERS
    return replies.integer(_SHARED_COUNT) if shared else ONE


def _idle_time(value: Any) -> bytes:
    return ZERO


def _frequency(value: Any) -> bytes:
    raise CommandError(
        "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when"
        " switching between policies at runtime LRU and LFU data will take some time to adjust."
    )


def _usage(session: Session, arguments: list[bytes]) -> bytes:
    rest = iter(arguments[3:])
    for word in rest:
        samples = next(rest, None)
        if word.upper() != b"SAMPLES" or samples is None or integer(samples) < 0:
            raise CommandError(SYNTAX_ERROR)
    key = arguments[2]
    value = session.database.lookup(key)
    if value is None:
        return session.encoder.null
    size = memory_usage(key, value)
    if key in session.database.keyspace.expiries:
        size += _EXPIRY_BYTES
    return replies.integer(size)


def memory_usage(key: bytes, value: Any) -> int:
    """Bytes that a key and its value take in memory, without an expiry.

    Of a vector index it is what `maxmemory` counts. The graphs and vectors in files, which the system pages
    in as they are used, are not counted; VINFO tells their size.
    """
    return _ENTRY_BYTES + sys.getsizeof(key) + KINDS.of(value).bytes_held(value)


_OBJECT_HELP = (
    "OBJECT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "ENCODING <key>",
    "    Return the kind of internal representation used in order to store the value",
    "    associated with a <key>.",
    "FREQ <key>",
    "    Return the access frequency index of the <key>. The returned integer is",
    "    proportional to the logarithm of the recent access frequency of the key.",
    "IDLETIME <key>",
    "    Return the idle time of the <key>, that is the approximated number of",
    "    seconds elapsed since the last access to the key.",
    "REFCOUNT <key>",
    "    Return the number of references of the value associated with the specified",
    "    <key>.",
    "HELP",
    "    Print this help.",
)
_MEMORY_HELP = (
    "MEMORY <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "USAGE <key> [SAMPLES <count>]",
    "    Return memory in bytes used by <key> and its value. Nested values are",
    "    sampled up to <count> times (default: 5, 0 means sample all).",
    "HELP",
    "    Print this help.",
)

_READ = partial(Command, flags=("readonly",), keys=(2, 2, 1), key_flags=("RO",))
_object = partial(_READ, arity=3, usage="key", group="generic")

COMMANDS = (
    container(
        "object",
        (
            _object(
                "object|encoding",
                partial(_of_object, _encoding),
                summary="Returns the internal encoding of a Redis object: the one that Redis would choose.",
                since="2.2.3",
            ),
            _object(
                "object|refcount",
                partial(_of_object, _reference_count),
                summary="Returns the reference count of a value of a key.",
                since="2.2.3",
            ),
            _object(
                "object|idletime",
                partial(_of_object, _idle_time),
                summary="Returns the time since the last access to a Redis object. engram keeps none: 0.",
                since="2.2.3",
            ),
            _object(
                "object|freq",
                partial(_of_object, _frequency),
                summary="Returns the logarithmic access frequency counter of a Redis object. engram has none:"
                " always an error.",
                since="4.0.0",
            ),
            attrs.evolve(help_command("object", "generic", _OBJECT_HELP), since="6.2.0"),
        ),
        summary="A container for object introspection commands.",
        group="generic",
        since="2.2.3",
    ),
    container(
        "memory",
        (
            _READ(
                "memory|usage",
                _usage,
                -3,
                "key [SAMPLES count]",
                "Estimates the memory usage of a key, without what of a vector index is in files.",
                "server",
                since="4.0.0",
            ),
            attrs.evolve(help_command("memory", "server", _MEMORY_HELP), since="4.0.0"),
        ),
        summary="A container for memory diagnostics commands.",
        group="server",
        since="4.0.0",
    ),
)
