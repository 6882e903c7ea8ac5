"""How often a client calls which command, and how long that takes."""

from __future__ import annotations

import time

from engram.commands.session import Session, Slot
from engram.commands.table import Command

_clock = time.perf_counter_ns

_NONE: list[bytes] = []


class Meter:
    """Counts and times the calls of one client, in nanoseconds.

    Calls of one command that come one after the other are counted together, with the time that they take on
    average; or each is counted by itself, as EXEC has it. What is slow goes into the slow log.

    Args:
        each: whether each call is counted by itself.

    Attributes:
        command: what is being called, None when nothing is.
        timed: whether `lap` is to be called after each call.
        calls: calls that are not counted yet.
        latest: the request of the last of them.
    """

    __slots__ = (
        "_began",
        "_config",
        "_each",
        "_session",
        "_since",
        "_slow",
        "_usage",
        "calls",
        "command",
        "latest",
        "timed",
    )

    def __init__(self, session: Session, *, each: bool = False) -> None:
        self.command: Command | None = None
        self.timed = each
        self.calls = 0
        self.latest: list[bytes] = []
        self._session = session
        self._config = session.server.config
        self._usage = session.server.statistics.usage
        self._each = each
        # When the first of the calls that are not counted began, and when the latest did.
        self._since = self._began = 0
        # Beyond so much a call is slow; negative where none is.
        self._slow = -1

    def turn_to(self, command: Command | None) -> None:
        """Counts the calls so far. From now on `command` is called."""
        former, self.command = self.command, command
        if former is None:
            self._slow = self._config.slowlog_log_slower_than * 1000
        elif self._each:
            # `lap` has counted its calls, and looked at the clock.
            return
        now = _clock()
        if former is not None and (calls := self.calls):
            self.calls = 0
            nanoseconds = now - self._since
            self._usage[former.name].record(calls, nanoseconds)
            # `lap` has looked at those that vary.
            if not former.varies and 0 <= self._slow * calls < nanoseconds:
                self._keep(former, self.latest, nanoseconds // calls)
        if command is None:
            self.latest = _NONE
        else:
            self._since = self._began = now
            if not self._each:
                self.timed = command.varies

    def lap(self) -> int:
        """Looks at the clock after a call, or after several that were made together; returns the time."""
        now = _clock()
        nanoseconds, self._began = now - self._began, now
        command, calls = self.command, 1
        assert command is not None
        if self._each:
            calls, self.calls = self.calls, 0
            self._usage[command.name].record(calls, nanoseconds)
        if 0 <= self._slow * calls < nanoseconds:
            self._keep(command, self.latest, nanoseconds // calls)
        return now

    def put_off(self, slot: Slot) -> None:
        """Counts the latest call only when its reply is there."""
        command, request, began = self.command, self.latest, _clock()
        assert command is not None
        self.calls -= 1

        def measure() -> None:
            nanoseconds = _clock() - began
            self.record(command, nanoseconds)
            if 0 <= self._slow < nanoseconds:
                self._keep(command, request, nanoseconds)

        slot.measure = measure

    def record(self, command: Command, nanoseconds: int) -> None:
        """Counts one call that took so long."""
        self._usage[command.name].record(1, nanoseconds)

    def _keep(self, command: Command, request: list[bytes], nanoseconds: int) -> None:
        """Puts a call into the slow log."""
        if "skip_slowlog" not in command.flags:
            self._session.server.slowlog.add(self._session, request, nanoseconds)
