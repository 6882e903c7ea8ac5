"""Fuzzes the parser and the commands for as long as you like, with Hypothesis.

    python -m tests.fuzz --minutes 60 --jobs 2

Each job runs the properties of the parser, of commands that are carried out together, of conversations, and
of all commands against a server process of its own, again and again, with other examples each time. What
fails is printed by Hypothesis as small as it can make it, and belongs into `tests/fuzz/corpus`, which the
test suite replays.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

TESTS = (
    "tests/protocol/test_requests.py",
    "tests/commands/test_runs.py",
    "tests/fuzz/test_conversations.py",
    "tests/fuzz/test_commands.py",
)
EXAMPLES = 3000
# Examples of the properties of a run, which has as many seconds at most.
LONGEST_RUN_SECONDS = 900


def fuzz(deadline: float, examples: int, seeds: random.Random) -> tuple[int, str]:
    """Runs until the deadline; returns how many runs passed, and what a run that failed printed."""
    runs = 0
    while time.monotonic() < deadline:
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"),
            *("--hypothesis-profile=fuzz", f"--hypothesis-seed={seeds.getrandbits(32)}", *TESTS),
        ]
        environment = {**os.environ, "FUZZ_EXAMPLES": str(examples)}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LONGEST_RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return runs, f"a run hangs: {error}"
        if done.returncode:
            return runs, " ".join(command) + "\n" + done.stdout + done.stderr
        runs += 1
        [passed] = re.findall(r"(\d+) passed", done.stdout)
        print(f"run of {passed} tests with {examples} examples a property passed", flush=True)
    return runs, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for how long new runs are begun")
    parser.add_argument("--jobs", type=int, default=1, help="processes that fuzz side by side")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each property in a run")
    parser.add_argument("--seed", type=int, default=None, help="of the runs; default: random")
    arguments = parser.parse_args()
    seed = random.getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(fuzz, deadline, arguments.examples, random.Random(f"{seed} {number}"))
            for number in range(arguments.jobs)
        ]
        results = [job.result() for job in jobs]
    failures = [output for _, output in results if output]
    print("\n".join(failures) or f"passed: {sum(runs for runs, _ in results)} runs")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
