from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from engram.errors import CommandError, LogFailureError, one_line
from engram.supervision import contained, keep_running, run_contained


def failing(*errors: BaseException) -> tuple[Callable[[], Awaitable[None]], list[float]]:
    """A job that raises one error after the other, then returns; and when it was begun."""
    left, begun = list(errors), []

    async def job() -> None:
        await trio.lowlevel.checkpoint()
        begun.append(trio.current_time())
        if left:
            raise left.pop(0)

    return job, begun


PASSING = (
    FileNotFoundError(2, "No such file or directory", "segments/7"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    ZeroDivisionError("division by zero"),
    ExceptionGroup("Exceptions from Trio nursery", [OSError(9, "Bad file descriptor")]),
)


async def test_a_task_that_fails_is_begun_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, begun = failing(*PASSING)
    before = trio.current_time()
    await keep_running("the heap", job)
    assert [at - before for at in begun] == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert [record.getMessage() for record in caplog.records] == [
        "the heap failed: [Errno 2] No such file or directory: 'segments/7'",
        "the heap failed: RuntimeError: can't start new thread",
        "the heap failed: out of memory",
        "the heap failed: ZeroDivisionError: division by zero",
        "the heap failed: [Errno 9] Bad file descriptor",
    ]
    # Only what nobody expects needs the place where it was raised.
    assert [bool(record.exc_info) for record in caplog.records] == [False, False, False, True, False]


async def test_the_same_failure_is_logged_once_a_minute(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, begun = failing(*(OSError(24, "Too many open files") for _ in range(100)))
    await keep_running("the heap", job)
    assert len(begun) == 101
    assert len(caplog.records) == 2


@pytest.mark.parametrize("errors", [[LogFailureError("gone")], [OSError(5, "x"), LogFailureError("gone")]])
async def test_what_the_operator_must_see_is_not_contained(
    errors: list[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    job, _ = failing(ExceptionGroup("", [ExceptionGroup("", errors)]))
    with pytest.raises(BaseExceptionGroup) as caught:
        await keep_running("the heap", job)
    assert caught.group_contains(LogFailureError, match="gone")
    assert not caught.group_contains(OSError)
    job, _ = failing(LogFailureError("gone"))
    with pytest.raises(LogFailureError):
        await run_contained("a snapshot", job)


async def test_what_fails_as_it_is_cancelled_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def job() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise OSError(5, "Input/output error")

    with trio.CancelScope() as scope:
        scope.cancel()
        await keep_running("the heap", job)
    assert scope.cancelled_caught
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_failure_without_memory_for_a_line_of_the_log(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(logging.getLogger("engram"), "error", fail)
    job, begun = failing(MemoryError())
    await keep_running("the heap", job)
    assert len(begun) == 2


async def test_once_is_once(caplog: pytest.LogCaptureFixture) -> None:
    job, begun = failing(MemoryError())
    await run_contained("a snapshot", job)
    assert len(begun) == 1
    assert [record.getMessage() for record in caplog.records] == ["a snapshot failed: out of memory"]
    assert await contained(job) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CommandError("MISCONF no space left"), "MISCONF no space left"),
        (ValueError("a\nb\n"), "ValueError: b"),
        (ValueError(), "ValueError"),
        (BaseExceptionGroup("x", [ExceptionGroup("y", [KeyError("k")])]), "KeyError: 'k'"),
    ],
)
def test_an_error_in_one_line(error: BaseException, line: str) -> None:
    assert one_line(error) == line
