"""A server killed while it is written to; `python -m tests.crash.torture` is the long form."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import attrs
import numpy as np
import pytest

from tests.crash import torture
from tests.crash.killing import FAULTS, LOST_TAIL, RECOVERY_POINTS, RUNNING_POINTS
from tests.crash.server_process import StartError
from tests.crash.torture import (
    DIMENSION,
    RANDOM,
    SHARED_INDEX,
    Held,
    Index,
    Model,
    Round,
    Row,
    String,
    Torture,
    difference,
    schedule,
)

SEED = 2026
ROUNDS = (
    Round("half-log-write", ("after-recovery-copy",)),
    Round(),
    Round("after-log-sync"),
    Round("before-segment-rename"),
    Round(),
    Round("after-manifest-rename"),
    Round("after-snapshot-write"),
    Round(),
    Round("child-before-segment-rename"),
)


# One file of the log takes all, and no snapshot looks at it.
LARGE_LOG = ("--log-file-size", "32mb", "--snapshot-log-size", "1gb")


@contextmanager
def running(run: Torture) -> Iterator[Torture]:
    try:
        run.begin()
        yield run
    finally:
        run.close()


def test_what_was_acknowledged_survives_kills(tmp_path: Path) -> None:
    with running(Torture(tmp_path / "data", SEED, deque(ROUNDS))) as run:
        while run.rounds:
            run.kill_once()
        run.finish()
        assert not run.missed
        assert run.torn_tails > 0
        # A server whose child was killed is killed itself later.
        expected = Counter(point for each in ROUNDS for point in (each.point, *each.starts))
        expected[RANDOM] += 1
        assert {point: run.kills[point] for point in expected} == expected


@pytest.mark.parametrize("fault", FAULTS)
def test_writes_that_are_acknowledged_and_lost_are_found(tmp_path: Path, fault: str) -> None:
    rounds = deque([Round(fault)])
    with running(Torture(tmp_path / "data", SEED, rounds, LARGE_LOG, saves=False)) as run:
        # A hole in the log is found by recovery, an end that is missing only by those who wrote it.
        found = "no prefix of what was sent" + ("" if fault == LOST_TAIL else "|was durable")
        with pytest.raises((AssertionError, StartError), match=found):
            run.kill_once()


def test_a_point_that_is_not_reached_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture, "POINT_SECONDS", 0.1)
    monkeypatch.setitem(torture.LATEST_TIME, "manifest-rename", 1 << 30)
    with running(Torture(tmp_path / "data", SEED, deque([Round("after-manifest-rename")]))) as run:
        run.kill_once()
        assert run.kills == {RANDOM: 1}
        assert run.missed == {"after-manifest-rename": 1}
        assert "| after-manifest-rename | 0 | 1 |" in torture.report(run)


def test_three_hundred_kills_reach_each_point_ten_times() -> None:
    rounds = schedule(300, (), Random(SEED))
    reached = Counter(point for each in rounds for point in (each.point, *each.starts))
    assert len(rounds) == 300
    assert all(reached[point] >= 10 for point in (*RUNNING_POINTS, *RECOVERY_POINTS, RANDOM))


MODEL = Model(
    {b"key": String(b"value", 5000)},
    {SHARED_INDEX: Index("l2", {b"row": Row(np.ones(DIMENSION, np.float32), b"{}")})},
)
PROBE = np.zeros(DIMENSION, np.float32)
HELD = Held(1000, 2000, {b"key": String(b"value", 5000)}, {SHARED_INDEX: {b"row": (8.0, b"{}")}})


def test_what_is_as_sent_is_no_difference() -> None:
    assert difference(MODEL, HELD, PROBE) == ""


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (attrs.evolve(HELD, strings={}), "holds nothing instead of 5 bytes"),
        (attrs.evolve(HELD, strings={b"key": String(b"other", 5000)}), "holds 5 bytes b'other'"),
        (attrs.evolve(HELD, strings={b"key": String(b"value")}), "lapse at None instead of"),
        (attrs.evolve(HELD, strings=HELD.strings | {b"more": String(b"")}), "b'more' holds 0 bytes"),
        (attrs.evolve(HELD, began=5000, ended=6000), "is there, but lapsed"),
        (attrs.evolve(HELD, indices={}), "there are the indices"),
        (attrs.evolve(HELD, indices={SHARED_INDEX: {}}), "b'row' is gone"),
        (attrs.evolve(HELD, indices={SHARED_INDEX: {b"row": (8.5, b"{}")}}), "8.5 away instead of 8.0"),
        (attrs.evolve(HELD, indices={SHARED_INDEX: {b"row": (8.0, b"")}}), "attributes b'' instead of b'{}'"),
    ],
)
def test_what_is_not_as_sent_is_a_difference(held: Held, found: str) -> None:
    assert found in difference(MODEL, held, PROBE)
