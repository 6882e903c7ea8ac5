"""CLIENT PAUSE: commands that wait for a while. https://redis.io/docs/latest/commands/client-pause/"""

from __future__ import annotations

from collections.abc import Callable

import trio


class Pause:
    """Holds the commands of clients, all or those that write, until a time or until `end`.

    Args:
        on_change: called when `active` has changed.

    Attributes:
        active: whether anything may have to wait.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.active = False
        # Whether somebody sees to it that the pause ends in time.
        self._timed = False
        self._on_change = on_change
        self._everything = False
        self._deadline = 0.0
        self._waiting = trio.lowlevel.ParkingLot()
        self._changed = trio.Event()

    def start(self, seconds: float, *, everything: bool) -> bool:
        """Holds commands for `seconds`; a pause that is on keeps the later end and the stricter kind.

        Returns whether `run` must be started, as it does not run yet.
        """
        deadline = trio.current_time() + seconds
        was_active = self.active
        self._everything = everything or (was_active and self._everything)
        self._deadline = max(deadline, self._deadline) if was_active else deadline
        self.active = True
        self._changed.set()
        self._changed = trio.Event()
        if not was_active:
            self._on_change()
        was_timed, self._timed = self._timed, True
        return not was_timed

    def end(self) -> None:
        """Lets all commands go on."""
        if self.active:
            self.active = False
            self._changed.set()
            self._waiting.unpark_all()
            self._on_change()

    async def run(self) -> None:
        """Ends the pause in time; returns when it has ended."""
        while self.active:
            with trio.move_on_at(self._deadline):
                await self._changed.wait()
            # It may have been extended in the moment in which it would have ended.
            if trio.current_time() >= self._deadline:
                self.end()
        self._timed = False

    def holds(self, writes: bool) -> bool:
        """Whether a command has to wait that changes data, or does not."""
        return self.active and (self._everything or writes)

    async def wait(self, writes: bool) -> None:
        """Returns once such a command may be carried out."""
        while self.holds(writes):
            await self._waiting.park()
