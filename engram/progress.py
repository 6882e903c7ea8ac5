"""How far a long piece of blocking work is, for those who wait for it."""

from __future__ import annotations

import attrs

from engram.errors import OperatorError


class InterruptedWorkError(OperatorError):
    """The work was asked to end before it was done."""


@attrs.define
class Progress:
    """One thread does the work and calls `begin` and `advance`; others look, and may set `interrupted`.

    Attributes:
        doing: what is being done; empty before anything is.
        done, total: bytes of it.
        interrupted: whether the work should end; it does at its next step.
    """

    doing: str = ""
    done: int = 0
    total: int = 0
    interrupted: bool = False

    def begin(self, doing: str, total: int) -> None:
        """Turns to a part of `total` bytes. Raises InterruptedWorkError."""
        self.doing, self.done, self.total = doing, 0, total
        self.advance(0)

    def advance(self, size: int) -> None:
        """So many more bytes are done. Raises InterruptedWorkError."""
        self.done += size
        if self.interrupted:
            raise InterruptedWorkError(f"ended while {self.doing}")
