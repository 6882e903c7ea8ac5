"""The thread that writes the log: one for the life of the server, for starting a call in it costs less."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue

import attrs
import trio

from engram.errors import LogFailureError
from engram.persistence.log_writer import Commit, LogWriter, Run


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
        with trio.CancelScope(shield=True):
            await call.done.wait()
        if isinstance(call.outcome, Commit):
            return call.outcome
        assert call.outcome is not None
        raise call.outcome

    def _serve(self, token: trio.lowlevel.TrioToken) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.outcome = self._writer.commit(call.runs, sync=call.sync)
            except BaseException as error:
                call.outcome = error
            token.run_sync_soon(call.done.set)
