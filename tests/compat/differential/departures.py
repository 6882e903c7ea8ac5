"""Where engram knowingly answers differently from Redis: docs/differences.md says why, entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tests.compat.differential.wire import Reply

Words = tuple[bytes, ...]


@attrs.frozen
class Departure:
    """One entry of the list.

    `covers` is told the command, the request, Redis's reply and engram's. `ends_sequence` says that what
    follows cannot be compared.
    """

    title: str
    covers: Callable[[str, Words, Reply, Reply], bool]
    ends_sequence: bool = False


# What Redis lets CONFIG SET change and engram does not.
_FIXED_SETTINGS = frozenset({b"client-query-buffer-limit", b"proto-max-bulk-len"})


def _zero_byte(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    naming = command in ("client|setname", "client|setinfo", "hello")
    return ours.is_error and (theirs.is_error or naming) and any(b"\0" in word for word in words)


def _encoding_by_history(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    if command == "object|refcount":
        return theirs.kind == ours.kind == ":"
    return command == "object|encoding" and {theirs.text, ours.text} <= {b"int", b"embstr", b"raw"}


def _fixed_setting(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    return (
        command == "config|set"
        and ours.text.endswith(b"can't set immutable config")
        and not _FIXED_SETTINGS.isdisjoint(word.lower() for word in words)
    )


def _range_of_a_setting(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    both = theirs.text, ours.text
    return command == "config|set" and all(b"argument must be between " in text for text in both)


def _policies(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    both = theirs.text, ours.text
    return command == "config|set" and all(
        b"'maxmemory-policy') - argument(s) must be one of the following" in text for text in both
    )


def _save_points(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    return command == "config|set" and ours.text.endswith(b"only an empty value is known")


def _memory_that_counts(command: str, words: Words, theirs: Reply, ours: Reply) -> bool:
    return theirs.text.startswith(b"OOM ") and not ours.text.startswith(b"OOM ")


DEPARTURES = (
    Departure("Zero bytes in error messages and names", _zero_byte),
    Departure("OBJECT ENCODING and REFCOUNT follow the value", _encoding_by_history),
    Departure("Settings that are fixed at the start", _fixed_setting, ends_sequence=True),
    Departure("Ranges of settings", _range_of_a_setting),
    Departure("Eviction policies", _policies),
    Departure("Save points", _save_points, ends_sequence=True),
    Departure("Memory that counts", _memory_that_counts, ends_sequence=True),
)


def departure_of(command: str, words: Words, theirs: Reply, ours: Reply) -> Departure | None:
    """The entry that explains a difference; None when it is none that is known."""
    for departure in DEPARTURES:
        if departure.covers(command, words, theirs, ours):
            return departure
    return None
