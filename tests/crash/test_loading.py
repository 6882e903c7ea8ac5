"""An index loaded beside readers; `python -m tests.crash.loading` is the long form."""

from __future__ import annotations

from pathlib import Path

from tests.crash.loading import LEAST_SEARCHES, READERS, Loading


def test_readers_see_whole_bursts_in_order(tmp_path: Path) -> None:
    run = Loading(tmp_path / "data", 2026)
    try:
        run.begin()
        for _ in range(2):
            run.kill_once()
    finally:
        run.close()
    assert run.searches >= 2 * READERS * LEAST_SEARCHES
