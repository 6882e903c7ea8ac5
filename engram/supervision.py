"""Tasks that fail alone: what goes wrong in one is logged, and ends nothing else.

A passing failure is expected anywhere: a file that has just been removed, a thread that cannot be started, a
socket that has just gone, no memory. Only an `OperatorError` ends the server: with it a task says that
nothing can go on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from engram.errors import OperatorError, one_line

logger = logging.getLogger("engram")

PAUSE_SECONDS = 1.0
"""How long a task that has failed waits before it begins again."""

# The same failure is logged once in so many seconds.
_SILENCE_SECONDS = 60.0
# What the system refuses says all; whatever else goes wrong is logged with the place where it did.
_REFUSALS = (OSError, MemoryError, RuntimeError)

Job = Callable[[], Awaitable[object]]


async def contained(job: Job) -> Exception | None:
    """Runs `job`; returns what went wrong, None when nothing did.

    Raises:
        OperatorError: the job did, alone or in a group. So is whatever is no `Exception`, such as Cancelled.
    """
    try:
        await job()
    except BaseException as error:
        failures, rest = BaseExceptionGroup("", [error]).split(_is_contained)
        if failures is None:
            raise
        failure = _first(failures)
        if rest is not None:
            _log("a task that ended", failure)
            raise rest from error
        return failure
    return None


async def run_contained(what: str, job: Job) -> None:
    """Runs `job` once; a failure is logged as one of `what`. Raises as `contained`."""
    failure = await contained(job)
    if failure is not None:
        _log(what, failure)


async def keep_running(what: str, job: Job, *, pause: float | None = None) -> None:
    """Runs `job` until it returns, and again `pause` seconds after each failure. Raises as `contained`.

    Without a `pause` it is PAUSE_SECONDS.
    """
    logged: dict[str, float] = {}
    while (failure := await contained(job)) is not None:
        text, now = one_line(failure), trio.current_time()
        logged = {each: at for each, at in logged.items() if now < at + _SILENCE_SECONDS}
        if text not in logged:
            logged[text] = now
            _log(what, failure)
        # It must not be held for as long as the job runs the next time.
        del failure
        await trio.sleep(PAUSE_SECONDS if pause is None else pause)


def _is_contained(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, OperatorError | BaseExceptionGroup)


def _first(group: BaseExceptionGroup[BaseException]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _log(what: str, failure: Exception) -> None:
    # There may be no memory for that, either.
    with suppress(MemoryError):
        logger.error(
            "%s failed: %s",
            what,
            one_line(failure),
            exc_info=None if isinstance(failure, _REFUSALS) else failure,
        )
