"""MONITOR: clients that see the requests of all others. https://redis.io/docs/latest/commands/monitor/"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from engram.protocol.inline import quoted
from engram.slowlog import redacted

logger = logging.getLogger("engram")

# Replies and requests seen that may wait for one that watches, even where clients have no limit.
_MOST_BUFFERED = 64 << 20


class Client(Protocol):
    """What is needed of the clients that see and are seen."""

    @property
    def address(self) -> str: ...

    @property
    def database_number(self) -> int: ...

    @property
    def push(self) -> Callable[[bytes], None]:
        """Sends what is no reply, after the replies so far."""

    @property
    def close(self) -> Callable[[], None]: ...

    @property
    def buffered(self) -> Callable[[], tuple[int, int]]:
        """Bytes of requests and of replies that are held for the client."""


class Monitors:
    """The clients that gave MONITOR.

    None of them can hold up the others: what it does not read waits in its own buffer, and beyond
    `limit()` bytes of that it is dropped. `on_change` is called when there is a first one or none is left.
    """

    def __init__(
        self,
        limit: Callable[[], int],
        on_change: Callable[[], None] = lambda: None,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self._limit = limit
        self._on_change = on_change
        self._now = now
        # As an ordered set.
        self._clients: dict[int, Client] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, client: object) -> bool:
        return id(client) in self._clients

    def add(self, client: Client) -> None:
        """Shows `client` what comes from now on."""
        self._clients[id(client)] = client
        if len(self._clients) == 1:
            self._on_change()

    def remove(self, client: Client) -> None:
        """Shows `client` no more, if it was shown anything."""
        if self._clients.pop(id(client), None) is not None and not self._clients:
            self._on_change()

    def feed(self, client: Client, request: Sequence[bytes]) -> None:
        """Shows a request of `client` to all that watch."""
        seconds, nanoseconds = divmod(self._now(), 1_000_000_000)
        address = client.address.encode("utf-8", "surrogateescape")
        if address.startswith(b"/"):
            address = b"unix:" + address.removesuffix(b":0")
        words = b" ".join(map(quoted, redacted(request)))
        line = b"+%d.%06d [%d %b] %b\r\n" % (
            seconds,
            nanoseconds // 1000,
            client.database_number,
            address,
            words,
        )
        limit = min(self._limit(), _MOST_BUFFERED)
        for watching in list(self._clients.values()):
            if watching.buffered()[1] + len(line) > limit:
                self.remove(watching)
                watching.close()
                logger.warning(
                    "a client that gave MONITOR does not read and is dropped",
                    extra={"fields": {"address": watching.address}},
                )
            else:
                watching.push(line)
