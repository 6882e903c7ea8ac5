"""SLOWLOG: the slowest requests, and what of a request may be shown to others.

https://redis.io/docs/latest/commands/slowlog/
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs

# From Redis's slowlog.h.
_MOST_ARGUMENTS = 32
_LONGEST_ARGUMENT = 128

_REDACTED = b"(redacted)"

# Settings whose values are secrets.
_SECRET_SETTINGS = frozenset({b"requirepass", b"masterauth", b"masteruser", b"tls-key-file-pass"})


class Client(Protocol):
    """What an entry says of the client."""

    @property
    def address(self) -> str: ...
    @property
    def name(self) -> str: ...


@attrs.frozen
class SlowCall:
    """One entry. `time` is in seconds since the epoch."""

    id: int
    time: int
    microseconds: int
    arguments: list[bytes]
    address: str
    name: str


def redacted(request: Sequence[bytes]) -> list[bytes]:
    """A request without the passwords in it: what Redis shows of AUTH, HELLO, ACL SETUSER and CONFIG SET."""
    shown = list(request)
    name = shown[0].lower()
    second = shown[1].lower() if len(shown) > 1 else b""
    if name == b"auth":
        shown[1:] = [_REDACTED] * (len(shown) - 1)
    elif name == b"hello":
        for position in range(2, len(shown) - 2):
            if request[position].lower() == b"auth":
                shown[position + 1] = shown[position + 2] = _REDACTED
    elif name == b"acl" and second in (b"setuser", b"deluser", b"getuser"):
        shown[2:] = [_REDACTED] * (len(shown) - 2)
    elif name == b"config" and second == b"set":
        for position in range(3, len(shown), 2):
            if shown[position - 1].lower() in _SECRET_SETTINGS:
                shown[position] = _REDACTED
    return shown


def _shortened(request: Sequence[bytes]) -> list[bytes]:
    shown = list(request[:_MOST_ARGUMENTS])
    if len(request) > _MOST_ARGUMENTS:
        shown[-1] = b"... (%d more arguments)" % (len(request) - _MOST_ARGUMENTS + 1)
    for position, argument in enumerate(shown):
        if len(argument) > _LONGEST_ARGUMENT:
            more = len(argument) - _LONGEST_ARGUMENT
            shown[position] = argument[:_LONGEST_ARGUMENT] + b"... (%d more bytes)" % more
    return shown


class SlowLog:
    """The last calls that took long, newest first.

    Args:
        limit: gives how many are kept.
    """

    def __init__(self, limit: Callable[[], int], now: Callable[[], float] = time.time) -> None:
        self._limit = limit
        self._now = now
        self._entries: deque[SlowCall] = deque()
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SlowCall]:
        return iter(self._entries)

    def add(self, client: Client, request: Sequence[bytes], nanoseconds: int) -> None:
        """Keeps a call, with the passwords in it hidden and what is long cut short."""
        self._entries.appendleft(
            SlowCall(
                id=self._next_id,
                time=int(self._now()),
                microseconds=nanoseconds // 1000,
                arguments=_shortened(redacted(request)),
                address=client.address,
                name=client.name,
            )
        )
        self._next_id += 1
        limit = self._limit()
        while len(self._entries) > limit:
            self._entries.pop()

    def clear(self) -> None:
        """Forgets all calls; their numbers go on."""
        self._entries.clear()
