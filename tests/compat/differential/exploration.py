"""Hypothesis draws sequences; each is replayed, and what differs is yielded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.compat.differential.replay import Difference, Replay
from tests.compat.differential.sequences import CommandSequence, Step

# Hypothesis holds what it has drawn; a run of many sequences is drawn in parts.
PART = 200

# Examples that Hypothesis makes for each one that is new.
VARIATIONS = 6


def explore(
    replay: Replay, count: int, start: int, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Difference]:
    """Replays `count` sequences drawn from the seed `start`; yields each difference that repeats itself.

    `progress` is told how many have been replayed.
    """
    done = 0
    while done < count:
        for sequence in drawn(replay, min(PART, count - done), start + done):
            difference = replay.run(sequence, replay.coverage)
            if difference is not None and replay.repeats(difference):
                yield difference
            done += 1
            progress(done)


def drawn(replay: Replay, count: int, start: int) -> list[CommandSequence]:
    """`count` sequences for the servers' commands, the same ones for the same seed."""
    found: list[CommandSequence] = []
    sequences = replay.grammar.sequences()
    while len(found) < count:
        found += _novel(sequences, count - len(found), start + len(found))
    return found


def _novel(sequences: SearchStrategy[CommandSequence], count: int, start: int) -> list[CommandSequence]:
    """At most `count` sequences that have little in common.

    Hypothesis has variations of an example follow it, which find little here: most of their steps are old.
    """
    found: list[CommandSequence] = []
    seen: set[Step] = set()

    @seed(start)
    @settings(
        max_examples=count * VARIATIONS,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences)
    def collect(sequence: CommandSequence) -> None:
        steps = set(sequence.steps)
        if len(steps - seen) * 2 > len(steps):
            found.append(sequence)
        seen.update(steps)

    collect()
    return found[:count]
