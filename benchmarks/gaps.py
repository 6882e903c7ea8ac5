"""The longest time that a client's PING waits while another client attacks: engram beside Redis 8.

    python -m benchmarks.gaps

Each attack gets a server of its own, first engram, then Redis with the same settings, and is repeated. The
median of the longest PINGs counts: it may be 50 ms, or Redis's own where that is longer. The exit code is 1
when an attack broke that bound. The first line is without any attack: what the machine itself does to a PING.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shlex
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import attrs

from benchmarks import hostile
from benchmarks.attacks import DIMENSION, Case, Side, all_cases
from benchmarks.dialects import Dialect, Engram, Redis
from benchmarks.embeddings import DATA
from benchmarks.load import pack
from benchmarks.peers import (
    ENGRAM,
    ServerError,
    describe_machine,
    end_servers_when_terminated,
    free_port,
    markdown_table,
    running,
)

BOUND_MS = 50.0

_PAUSE_SECONDS = 0.001
# What an attack puts off, such as freeing, may come after its last reply.
_AFTERWARDS_SECONDS = 0.3
# An attack that has not ended by itself is ended then; a PING without an answer is given up.
_LIMIT_SECONDS = 15.0


def ping(target: hostile.Target, ready: Event, finished: Event, result: Connection[float, object]) -> None:
    """Reports the longest PING, in milliseconds, of all until `finished`."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    request, longest = pack(b"PING"), 0.0
    with target.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.settimeout(_LIMIT_SECONDS)
        client.sendall(pack(b"AUTH", hostile.PASSWORD.encode()))
        client.recv(100)
        ready.set()
        while not finished.is_set():
            began = time.perf_counter()
            client.sendall(request)
            try:
                if client.recv(100) != b"+PONG\r\n":
                    raise ConnectionError("a PING was not answered")
            except TimeoutError:
                result.send(1000 * _LIMIT_SECONDS)
                return
            longest = max(longest, time.perf_counter() - began)
            time.sleep(_PAUSE_SECONDS)
    result.send(1000 * longest)


def attack_and_report(case: Case, side: Side, result: Connection[str, object]) -> None:
    try:
        refused = case.attack(side)
    except OSError as error:
        refused = [f"{type(error).__name__}: {error}"]
    result.send(refused[0] if refused else "")


def longest_ping(case: Case, side: Side, seconds: float) -> tuple[float, str]:
    """The longest PING during the attack, in milliseconds, and the first thing that was refused.

    Raises:
        ServerError: a PING was not answered at all.
    """
    context = multiprocessing.get_context("fork")
    ready, finished = context.Event(), context.Event()
    result, ping_end = context.Pipe(duplex=False)
    refusals, attack_end = context.Pipe(duplex=False)
    pinger = context.Process(target=ping, args=(side.target, ready, finished, ping_end))
    attackers = [
        context.Process(target=attack_and_report, args=(case, side, attack_end))
        for _ in range(case.attackers)
    ]
    pinger.start()
    ping_end.close()
    try:
        ready.wait(_LIMIT_SECONDS)
        deadline = time.monotonic() + (seconds if case.endless else _LIMIT_SECONDS)
        for attacker in attackers:
            attacker.start()
        for attacker in attackers:
            attacker.join(max(0.0, deadline - time.monotonic()))
        if not attackers:
            time.sleep(seconds)
        refused = refusals.recv() if refusals.poll() else ""
        time.sleep(_AFTERWARDS_SECONDS)
        finished.set()
        try:
            longest: float = result.recv()
        except EOFError:
            raise ServerError(f"{case.name}: a PING was not answered") from None
    finally:
        for process in (pinger, *attackers):
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()
    return longest, refused


@attrs.frozen
class Outcome:
    """Of one attack on one server: the longest PING of each repetition, in milliseconds."""

    longest: list[float]
    refused: str


def repeat(case: Case, side: Side, arguments: argparse.Namespace) -> Outcome:
    outcome = Outcome([], "")
    for number in range(arguments.repeats):
        if number == 0 or case.destroys:
            case.prepare(side.connect(), side)
        longest, refused = longest_ping(case, side, arguments.seconds)
        outcome = Outcome([*outcome.longest, longest], refused)
        if longest >= 1000 * _LIMIT_SECONDS:
            break
    return outcome


@attrs.frozen
class Program:
    """How a server is run."""

    name: str
    command: str
    dialect: Dialect

    @contextmanager
    def attacked(self, certificate: str) -> Iterator[Side]:
        target = hostile.Target(free_port(), free_port(), certificate)
        ports = f"--port {target.port} --tls-port {target.tls_port}"
        with running(self.name, f"{self.command} {ports}", target.port):
            yield Side(target, self.dialect)


def programs(arguments: argparse.Namespace, folder: Path, files: tuple[str, str]) -> list[Program]:
    """Both servers with the same settings, or engram alone when there is no Redis."""
    settings = (
        f"--tls-cert-file {files[0]} --tls-key-file {files[1]} --tls-auth-clients no"
        f" --requirepass '{hostile.PASSWORD}' --maxclients 1024"
    )
    ours, theirs = f"{arguments.engram} {settings}", f'{arguments.peer} {settings} --save ""'
    if arguments.appendfsync:
        kept = f"--appendfsync {arguments.appendfsync}"
        ours += f" {kept} --dir {shlex.quote(str(folder / 'engram'))}"
        theirs += f" {kept} --appendonly yes --dir {shlex.quote(str(folder))}"
    found = [Program("engram", ours, Engram(DIMENSION)), Program("Redis 8", theirs, Redis())]
    return found if shutil.which(shlex.split(arguments.peer)[0]) else found[:1]


def render(
    name: str, outcomes: Sequence[Outcome], counted: Callable[[Sequence[float]], float]
) -> tuple[list[str], bool]:
    """A line of the table, from engram's outcome and perhaps Redis's, and whether the bound holds."""
    ours, *theirs = (outcome.longest for outcome in outcomes)
    bound = max([BOUND_MS, *map(counted, theirs)])
    holds = counted(ours) <= bound
    cells = [f"{of(ours):.1f}" for of in (counted, min, max)]
    cells += [f"{counted(theirs[0]):.1f}" if theirs else "", f"{bound:.0f}"]
    return [name, *cells, "yes" if holds else "NO"], holds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="the longest PING while another client attacks: engram beside Redis 8",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[""], help="attacks whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the attacks, and end")
    parser.add_argument("--repeats", type=int, default=3, help="of each attack")
    parser.add_argument("--counts", choices=("median", "least"), default="median", help="of the repetitions")
    parser.add_argument("--seconds", type=float, default=2.0, help="of an attack that has no end")
    parser.add_argument("--engram", default=ENGRAM, help="command that runs engram")
    parser.add_argument("--peer", default=str(DATA.parents[1] / "peers" / "redis8.6"), help="and Redis 8")
    parser.add_argument(
        "--appendfsync", choices=("always", "everysec", "no"), help="both with a log, synced so"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the logs; the temporary one when not given")
    return parser.parse_args()


def measure(
    case: Case, arguments: argparse.Namespace, folder: Path, files: tuple[str, str]
) -> list[tuple[Program, Outcome]]:
    """The outcome of an attack on each server; a server that fails has kept a PING waiting for ever."""
    outcomes = []
    for program in programs(arguments, folder, files):
        try:
            with program.attacked(files[0]) as side:
                outcome = repeat(case, side, arguments)
        except (ServerError, OSError) as error:
            print(f"the measurement of {program.name} failed: {error}", file=sys.stderr)
            outcome = Outcome([math.inf], "")
        outcomes.append((program, outcome))
    return outcomes


def main() -> int:
    arguments = parse_arguments()
    cases = [case for case in all_cases() if any(part in case.name for part in arguments.only)]
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        print("no attack has such a name: see --list", file=sys.stderr)
        return 2
    end_servers_when_terminated()
    counted = statistics.median if arguments.counts == "median" else min
    lines: list[list[str]] = []
    notes: list[str] = []
    broken = 0
    with tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as name:
        machine = describe_machine(Path(name))
        files = hostile.make_certificate(Path(name), "ec")
        for number, case in enumerate(cases):
            folder = Path(name) / str(number)
            folder.mkdir()
            outcomes = measure(case, arguments, folder, files)
            shutil.rmtree(folder)
            notes += [
                f"{case.name}: {program.name} refused: {outcome.refused[:120]}"
                for program, outcome in outcomes
                if outcome.refused
            ]
            line, holds = render(case.name, [outcome for _, outcome in outcomes], counted)
            print(" | ".join(line), file=sys.stderr, flush=True)
            lines.append(line)
            broken += not holds
    if not lines[0][4]:
        notes.append(f"There is no program {arguments.peer}: engram alone.")
    notes.append(
        f"{broken} of {len(lines)} bounds broken; {arguments.counts} of {arguments.repeats}; {machine}"
    )
    header = ["longest PING, ms", "engram", "least", "greatest", "Redis 8", "bound", "bound holds"]
    print(markdown_table(header, lines), *notes, sep="\n\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
