"""What the benchmarks of vectors share: their options, the servers they start, how they report and fail."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.embeddings import DATA
from benchmarks.load import LoadError
from benchmarks.peers import (
    ENGRAM,
    Peer,
    ServerError,
    describe_machine,
    end_servers_when_terminated,
    free_port,
    running,
)

K = 10


class MissingError(Exception):
    """Something that a measurement needs is not there; the text says what and how to get it."""


def make_parser(
    description: str,
    *,
    rows: int = 20_000,
    seconds: float = 8.0,
    cores: Literal["one", "half", "most"] = "one",
) -> argparse.ArgumentParser:
    """A parser with the options that all have.

    By default the servers get one core, half of them or all but one, and the load as many of the others.
    """
    available = sorted(os.sched_getaffinity(0))
    middle = {"one": 1, "half": len(available) // 2, "most": len(available) - 1}[cores]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the embeddings")
    parser.add_argument("--rows", type=int, default=rows, help="vectors to add; made ones after the real")
    parser.add_argument("--noise", type=float, default=1.0, help="of made rows: see embeddings.make_data")
    parser.add_argument("--queries", type=int, default=1_000, help="distinct queries")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long each search load runs")
    parser.add_argument("--engram", default=ENGRAM, help="command that runs engram")
    parser.add_argument("--engram-flags", default="", help="settings of engram, as on its command line")
    parser.add_argument(
        "--server-cores", type=int, nargs="+", default=available[:middle] or available, help="of servers"
    )
    parser.add_argument(
        "--load-cores",
        type=int,
        nargs="+",
        default=available[middle : 2 * middle] or available,
        help="of the load",
    )
    parser.add_argument("--scratch", type=Path, help="folder for data; the temporary one when not given")
    return parser


def add_redis_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer", default=str(DATA.parents[1] / "peers" / "redis8.6"), help="command that runs Redis 8"
    )
    parser.add_argument("--peer-words", default="", help="further words of each VSIM, such as NOTHREAD")


@contextmanager
def running_engram(
    arguments: argparse.Namespace, *flags: str, folder: Path | None = None, command: str | None = None
) -> Iterator[Peer]:
    """Runs engram on the server's cores; with `folder` it keeps its data there, in place of nowhere.

    `command` replaces the command that runs it.
    """
    port = free_port()
    words = [command or arguments.engram, f"--port {port}", arguments.engram_flags, *flags]
    if folder is not None:
        words.append(f"--dir {shlex.quote(str(folder / 'engram'))}")
    with running("engram", " ".join(words), port, arguments.server_cores) as peer:
        yield peer


@contextmanager
def running_redis(arguments: argparse.Namespace, folder: Path | None = None) -> Iterator[Peer]:
    """Runs Redis 8, which keeps everything in memory, on the server's cores; snapshots go to `folder`."""
    port = free_port()
    command = f'{arguments.peer} --port {port} --save "" --appendonly no'
    if folder is not None:
        command += f" --dir {shlex.quote(str(folder))}"
    with running("Redis 8", command, port, arguments.server_cores) as peer:
        yield peer


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace, Path], str]) -> int:
    """Prints what `measure` returns, and the machine. The exit code: 1 for a failure, 2 for what is missing.

    `measure` gets the arguments and an empty folder, which is removed afterwards.
    """
    arguments = parser.parse_args()
    end_servers_when_terminated()
    try:
        if not arguments.data.exists():
            raise MissingError(f"there are no embeddings at {arguments.data}: name the file with --data")
        if "peer" in arguments and shutil.which(shlex.split(arguments.peer)[0]) is None:
            raise MissingError(f"there is no program {arguments.peer}: name a Redis 8 with --peer")
        _check_cores([*arguments.server_cores, *arguments.load_cores])
        with tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as folder:
            machine = describe_machine(Path(folder))
            text = measure(arguments, Path(folder))
    except MissingError as error:
        print(error, file=sys.stderr)
        return 2
    except (LoadError, ServerError, OSError) as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    print(f"{text}\n\n{machine}; servers on cores {_words(arguments.server_cores)}", end="")
    print(f", load on {_words(arguments.load_cores)}")
    return 0


def _check_cores(cores: Sequence[int]) -> None:
    missing = set(cores) - os.sched_getaffinity(0)
    if missing:
        raise MissingError(f"this machine has no core {min(missing)}: see --server-cores and --load-cores")


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
