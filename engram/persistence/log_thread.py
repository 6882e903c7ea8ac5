"""The thread that writes the log: one for the life of the server, for starting a call in it costs less."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import attrs
import trio

from engram.errors import LogFailureError
from engram.persistence.log_writer import Commit, LogWriter, Run

# How often a call is looked at of which nothing is heard.
_LOOK_SECONDS = 1.0


@attrs.define(eq=False)
class _Call:
    runs: Sequence[Run]
    sync: bool
    done: trio.Event = attrs.Factory(trio.Event)
    outcome: Commit | BaseException | None = None


class LogThread:
    """Carries out calls of `LogWriter.commit` one after the other, off the loop."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()

    async def run(self) -> None:
        """Serves until `stop`, whatever is cancelled: what has been called is carried out.

        Raises:
            LogFailureError: there is no thread.
        """
        serve = partial(self._serve, trio.lowlevel.current_trio_token())
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(serve, limiter=trio.CapacityLimiter(1))
            except RuntimeError as error:
                raise LogFailureError(f"the thread of the log cannot be started: {error}") from error

    def stop(self) -> None:
        """Lets `run` end; nothing is to be called any more."""
        self._calls.put(None)

    async def commit(self, runs: Sequence[Run], *, sync: bool) -> Commit:
        """As `LogWriter.commit`; not to be cancelled.

        Raises:
            LogFailureError: anything failed.
        """
        call = _Call(runs, sync)
        self._calls.put(call)
        outcome: Commit | BaseException | None = None
        with trio.CancelScope(shield=True):
            # Without memory the word that it is done may be lost.
            while outcome is None:
                with trio.move_on_after(_LOOK_SECONDS):
                    await call.done.wait()
                outcome = call.outcome
        if isinstance(outcome, Commit):
            return outcome
        assert outcome is not None
        raise outcome

    def _serve(self, token: trio.lowlevel.TrioToken) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.outcome = self._writer.commit(call.runs, sync=call.sync)
            except BaseException as error:
                call.outcome = error
            with suppress(MemoryError):
                token.run_sync_soon(_tell, call)


def _tell(call: _Call) -> None:
    # An error here would end the server while `commit` waits, whatever is cancelled.
    with suppress(MemoryError):
        call.done.set()
