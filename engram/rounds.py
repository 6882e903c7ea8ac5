"""Clients whose bytes are here, served one after the other, and their replies, sent together."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import trio

logger = logging.getLogger(__name__)

# Everything else on the loop waits for a part of a round no longer than this and the last client in it.
_TURN_NANOSECONDS = 5_000_000


class Rounds:
    """Serves all sockets that are readable by plain calls, round after round, in one task.

    Woken as a task of its own for each receive, a client with a small request costs the server twice as
    much: Trio arms a descriptor anew for each wait, and steps through a task for each that is ready. Here
    all descriptors stay in one epoll set, which Trio waits for as it does for a socket. Between rounds,
    and within long ones, every other task has its turn.

    Replies made in a round are best sent at its end: a send to a process that sleeps costs several times one
    to a process that is awake. Sent between requests, each reply finds its reader asleep; sent together, only
    the first does.

    Attributes:
        under_way: whether a round is, so that what is given to `at_end` will be called.
    """

    def __init__(self) -> None:
        self.under_way = False
        self._epoll = select.epoll()
        self._serve: dict[int, Callable[[], None]] = {}
        self._departing: list[Callable[[], None]] = []

    def watch(self, descriptor: int, serve: Callable[[], None]) -> None:
        """Has `serve` called when there is something to read, until `unwatch`.

        It must not raise or block: if it does raise, it is not called again. It may be called when there is
        nothing to read after all. Raises OSError for a descriptor that cannot be watched.
        """
        self._epoll.register(descriptor, select.EPOLLIN)
        self._serve[descriptor] = serve

    def unwatch(self, descriptor: int) -> None:
        """Serves a descriptor no more, if it was served; to be called before it is closed."""
        if self._serve.pop(descriptor, None) is not None:
            # One that is closed already is no longer there.
            with suppress(OSError):
                self._epoll.unregister(descriptor)

    def at_end(self, depart: Callable[[], None]) -> None:
        """Has `depart` called once, when the clients of this part of the round have been served."""
        self._departing.append(depart)

    def soon(self, function: Callable[[], None]) -> None:
        """Calls a function when those clients have been served whose requests are here, or at once."""
        if self.under_way:
            self._departing.append(function)
        else:
            function()

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            ready = self._epoll.poll(0)
            if ready:
                await self._serve_all(descriptor for descriptor, _ in ready)
            else:
                await trio.lowlevel.wait_readable(self._epoll.fileno())

    async def _serve_all(self, descriptors: Iterable[int]) -> None:
        clock = time.perf_counter_ns
        self.under_way, turn_ends = True, clock() + _TURN_NANOSECONDS
        for descriptor in descriptors:
            # During a turn of others one may have gone, and another come in its place.
            serve = self._serve.get(descriptor)
            if serve is not None:
                try:
                    serve()
                except Exception:
                    logger.exception("serving a client failed")
                    self.unwatch(descriptor)
                if clock() > turn_ends:
                    self._end_part()
                    await trio.lowlevel.checkpoint()
                    self.under_way, turn_ends = True, clock() + _TURN_NANOSECONDS
        self._end_part()
        await trio.lowlevel.checkpoint()

    def _end_part(self) -> None:
        self.under_way = False
        departing, self._departing = self._departing, []
        for depart in departing:
            try:
                depart()
            except Exception:
                logger.exception("sending replies failed")
