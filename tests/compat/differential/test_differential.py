"""engram answers generated sequences of commands as Redis does, but for what docs/differences.md lists.

`python -m tests.compat.differential` replays more of them, and shows every difference.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.compat.differential.departures import DEPARTURES, Departure
from tests.compat.differential.exploration import explore
from tests.compat.differential.peers import redis8_command, running_pair
from tests.compat.differential.replay import Replay
from tests.compat.differential.sequences import Grammar
from tests.components import unavailable

SAMPLE = 200
PAGE = Path(__file__).parents[3] / "docs" / "differences.md"


def assert_same(command: list[str]) -> None:
    with running_pair(command) as pair:
        replay = Replay(pair, Grammar(pair))
        found = next(explore(replay, SAMPLE, start=0), None)
        assert found is None, f"a difference to Redis:\n{replay.minimised(found)}"
    assert replay.coverage.sequences == SAMPLE


def test_same_replies_as_redis_8() -> None:
    command = redis8_command()
    if command is None:
        pytest.skip("no Redis 8 to compare with (set REDIS8 to the command that runs one)")
    assert_same(command)


def test_same_replies_as_the_redis_of_the_system() -> None:
    path = shutil.which("redis-server")
    if path is None:
        unavailable("redis-server is not installed (Debian: apt-get install redis-server)")
    assert_same([path])


def test_the_page_lists_the_departures() -> None:
    titles = re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE)
    assert titles == [departure.title for departure in DEPARTURES]
    assert len(titles) <= 20


@pytest.mark.parametrize("departure", DEPARTURES, ids=lambda departure: departure.title)
def test_each_departure_says_why(departure: Departure) -> None:
    section = PAGE.read_text().split(f"### {departure.title}\n", 1)[1].split("\n#", 1)[0]
    assert section.strip()
