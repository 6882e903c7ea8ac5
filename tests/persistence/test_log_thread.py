"""The thread that writes the log, where there is no memory to say that it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio

from engram.persistence import log_thread
from engram.persistence.log_thread import LogThread
from engram.persistence.log_writer import Commit, LogWriter, Run

COMMIT = Commit(durable_lsn=7, recorded_lsn=5, sync_seconds=None)


class PretendWriter:
    def commit(self, runs: Sequence[Run], *, sync: bool) -> Commit:
        return COMMIT


async def test_what_is_done_is_noticed_though_its_word_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_thread, "_LOOK_SECONDS", 0.01)
    lost: list[object] = []

    def lose(event: trio.Event) -> None:
        lost.append(event)
        raise MemoryError

    thread = LogThread(cast("LogWriter", cast("Any", PretendWriter())))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run)
        with monkeypatch.context() as patched:
            patched.setattr(trio.Event, "set", lose)
            with trio.fail_after(30):
                assert await thread.commit([], sync=True) == COMMIT
        assert lost
        with trio.fail_after(30):
            assert await thread.commit([], sync=True) == COMMIT
        thread.stop()
