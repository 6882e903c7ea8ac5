"""A server killed while it is written to; `python -m tests.crash.torture` is the long form."""

from __future__ import annotations

from pathlib import Path

from tests.crash.torture import Torture

KILLS = 4
SEED = 2026


def test_what_was_acknowledged_survives_kills(tmp_path: Path) -> None:
    torture = Torture(tmp_path / "data", SEED)
    try:
        torture.begin()
        for _ in range(KILLS):
            torture.kill_once()
        torture.finish()
        assert torture.acknowledgements > 0
    finally:
        torture.close()
