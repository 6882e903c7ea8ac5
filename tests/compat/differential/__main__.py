"""`python -m tests.compat.differential`: compares engram with a Redis and prints every difference."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter

from tests.compat.differential.exploration import explore
from tests.compat.differential.peers import redis8_command, running_pair
from tests.compat.differential.replay import Replay
from tests.compat.differential.sequences import Grammar


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat.differential", description=__doc__)
    parser.add_argument("--sequences", type=int, default=3000, help="how many are replayed (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="what the sequences are drawn from (default: 0)")
    parser.add_argument("--redis", help="the command that runs the Redis (default: Redis 8)")
    parser.add_argument("--without", nargs="*", default=(), help="commands that are left out")
    options = parser.parse_args()
    command = shlex.split(options.redis) if options.redis else redis8_command()
    if command is None:
        parser.error("there is no Redis 8; name a Redis with --redis")
    started = time.monotonic()
    with running_pair(command) as pair:
        replay = Replay(pair, Grammar(pair, options.without))
        version = ".".join(map(str, pair.redis.version))
        print(f"engram and Redis {version}: {len(replay.grammar.arguments)} commands, seed {options.seed}")
        seen: Counter[tuple[str, bytes, bytes]] = Counter()
        for difference in explore(replay, options.sequences, options.seed, progress=_progress):
            if not seen[difference.signature]:
                print(f"\n{replay.minimised(difference)}", flush=True)
            seen[difference.signature] += 1
        coverage = replay.coverage
        print(
            f"\n{coverage.sequences} sequences, {coverage.steps} calls of {len(coverage.commands)} commands, "
            f"{len(coverage.replies)} pairs of command and kind of reply, {time.monotonic() - started:.0f} s"
        )
        print("not reached:", *sorted(set(replay.grammar.arguments) - coverage.commands))
        for title, count in coverage.departures.most_common():
            print(f"{count:6} {title}")
        print(f"{len(seen)} differences, in {sum(seen.values())} sequences")
        for (name, theirs, ours), count in seen.most_common():
            print(f"{count:6} {name}: Redis {theirs!r}, engram {ours!r}")
    return 1 if seen else 0


def _progress(done: int) -> None:
    if done % 100 == 0:
        print(".", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
