"""One client's EXEC that takes several turns of the loop: until it is over the data are its own."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Exclusion:
    """Keeps all clients but one from seeing or changing data, from `begin` until `end`.

    Args:
        on_change: called when `active` has changed.

    Attributes:
        active: whether an EXEC is under way.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.active = False
        self._on_change = on_change
        self._waiting = trio.lowlevel.ParkingLot()

    def begin(self) -> None:
        """From now on the others have to wait. One exclusion ends before the next begins."""
        assert not self.active
        self.active = True
        self._on_change()

    def end(self) -> None:
        """Lets all others go on."""
        self.active = False
        self._waiting.unpark_all()
        self._on_change()

    async def wait(self) -> None:
        """Returns once nobody is excluded."""
        while self.active:
            await self._waiting.park()
