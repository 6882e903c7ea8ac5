from __future__ import annotations

import errno
import threading

import pytest
import trio

from engram.errors import EngramError
from engram.persistence.housekeeping import Housekeeping, reason


async def test_calls_run_in_threads() -> None:
    housekeeping = Housekeeping()
    assert await housekeeping.run(lambda text: (text, threading.current_thread()), "a") != (
        "a",
        threading.current_thread(),
    )


async def test_what_must_be_done_is_done_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    housekeeping = Housekeeping()
    done: list[threading.Thread] = []
    note = lambda: done.append(threading.current_thread())  # noqa: E731

    async def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    await housekeeping.run_anyway(note)
    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    await housekeeping.run_anyway(note)
    assert [thread is threading.current_thread() for thread in done] == [False, True]
    with pytest.raises(RuntimeError):
        await housekeeping.run(note)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (EngramError("first\nlast"), "last"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "RuntimeError: can't start new thread"),
    ],
)
def test_a_reason_is_in_the_words_of_the_system(error: Exception, text: str) -> None:
    assert reason(error) == text
