"""From the start of the process to the first search answered: engram beside Redis 8, each from its own files.

    python -m benchmarks.starting [--directory DIR] [--redis-file RDB]

Both hold vectors and as many strings, and have their files in the page cache. What DIR and RDB name is
measured when it is there, and made when it is not.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import attrs

from benchmarks.command_line import K, MissingError, add_redis_options, make_parser, run
from benchmarks.dialects import INDEX, Dialect, Engram, Redis
from benchmarks.embeddings import RowFile, key_of, make_data
from benchmarks.load import Client, LoadError
from benchmarks.measures import (
    Loading,
    add_rows,
    add_strings,
    index_fields,
    key_of_string,
    save,
    value_of_string,
    wait_for_graphs,
)
from benchmarks.peers import (
    Peer,
    Started,
    free_port,
    markdown_table,
    render_number,
    running,
    started,
)

# Bytes of a string.
VALUE_SIZE = 32

# Adding a million vectors to Redis takes the better part of an hour.
ADDING_SECONDS = 7200.0

_LOADING_SECONDS = 600.0
_POLL_SECONDS = 0.002
_READ_SIZE = 1 << 24


@attrs.frozen
class Case:
    """A server, and the files that it starts from: `path` is a folder or a file.

    `vectors` counts those in the index.
    """

    name: str
    dialect: Dialect
    command: str
    path: Path
    vectors: Callable[[Peer], int]

    def command_at(self, port: int) -> str:
        return f"{self.command} --port {port}"

    def files(self) -> list[Path]:
        return [file for file in sorted(self.path.rglob("*")) if file.is_file()] or [self.path]


@attrs.frozen
class Holding:
    """What a server holds: of vectors and strings so many, in files of `size` bytes."""

    vectors: int
    strings: int
    size: int


@attrs.frozen
class Start:
    """Seconds from the start of the process to the first right answer and CPU seconds until then; then
    bytes of anonymous and of mapped memory."""

    seconds: float
    cpu: float
    anonymous: int
    mapped: int


def engram_case(arguments: argparse.Namespace, directory: Path, dimension: int) -> Case:
    command = f"{arguments.engram} {arguments.engram_flags} --dir {shlex.quote(str(directory))}"
    return Case("engram", Engram(dimension), command, directory, _vectors_of_engram)


def _vectors_of_engram(peer: Peer) -> int:
    return int(index_fields(peer)["count"])


def redis_case(arguments: argparse.Namespace, file: Path) -> Case:
    where = f"--dir {shlex.quote(str(file.parent))} --dbfilename {shlex.quote(file.name)}"
    command = f'{arguments.peer} {where} --save "" --appendonly no'
    return Case("Redis 8", Redis(), command, file, _vectors_of_redis)


def _vectors_of_redis(peer: Peer) -> int:
    with closing(Client(peer.port)) as client:
        return int(client.call(b"VCARD", INDEX))


def prepare_engram(case: Case, rows: RowFile, strings: int, arguments: argparse.Namespace) -> None:
    """Makes the data directory beside its place, and moves it there when all graphs are built."""
    unfinished = case.path.with_name(f"{case.path.name}.unfinished")
    if unfinished.exists():
        raise MissingError(f"{unfinished} is left from a run that did not finish: remove it")
    making = engram_case(arguments, unfinished, rows.dimension)
    port = free_port()
    command = f"{making.command_at(port)} --appendfsync everysec"
    with running("engram", command, port, arguments.server_cores) as peer:
        add_rows(peer, Loading(case.dialect, rows), arguments.load_cores, ADDING_SECONDS)
        add_strings(peer, strings, VALUE_SIZE, arguments.load_cores)
        wait_for_graphs(peer)
        with closing(Client(peer.port)) as client:
            save(client)
    unfinished.rename(case.path)


def add_strings_to(case: Case, strings: int, arguments: argparse.Namespace) -> None:
    port = free_port()
    command = f"{case.command_at(port)} --appendfsync everysec"
    with running("engram", command, port, arguments.server_cores) as peer:
        add_strings(peer, strings, VALUE_SIZE, arguments.load_cores)
        wait_for_graphs(peer)
        with closing(Client(peer.port)) as client:
            save(client)


def prepare_redis(case: Case, rows: RowFile, strings: int, arguments: argparse.Namespace) -> None:
    """Redis writes its file beside its place, and renames it."""
    port = free_port()
    with running("Redis 8", case.command_at(port), port, arguments.server_cores) as peer:
        add_rows(peer, Loading(case.dialect, rows), arguments.load_cores, ADDING_SECONDS)
        add_strings(peer, strings, VALUE_SIZE, arguments.load_cores)
        with closing(Client(peer.port)) as client:
            client.call(b"SAVE")


def read_files(case: Case) -> int:
    """Brings the files into the page cache; returns their bytes."""
    size = 0
    for path in case.files():
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_READ_SIZE):
                size += len(chunk)
    return size


def start(case: Case, request: bytes, arguments: argparse.Namespace) -> tuple[Start, Holding]:
    """Starts the server, asks until the search is answered, looks at what it holds, and ends it.

    Raises:
        LoadError: the answer, or a string, is wrong.
        ServerError: the server ended or gave no answer.
    """
    size = read_files(case)
    port = free_port()
    began = time.monotonic()
    with (
        started(case.name, case.command_at(port), port, arguments.server_cores) as server,
        closing(_connect(server, began)) as client,
    ):
        reply = _first_answer(client, server, request, began)
        seconds = time.monotonic() - began
        measured = Start(seconds, server.peer.cpu_seconds(), *server.peer.resident())
        if key_of(0) not in reply[::2]:
            raise LoadError(f"{case.name}: the first search did not find {key_of(0)!r}")
        vectors, strings = case.vectors(server.peer), client.call(b"DBSIZE") - 1
        if strings:
            last = strings - 1
            if client.call(b"GET", key_of_string(last)) != value_of_string(last, VALUE_SIZE):
                raise LoadError(f"{case.name}: {key_of_string(last)!r} is not what was stored")
    return measured, Holding(vectors, strings, size)


def _connect(server: Started, began: float) -> Client:
    while True:
        try:
            return Client(server.peer.port)
        except OSError:
            _check_patience(server, began)
            time.sleep(_POLL_SECONDS)


def _first_answer(client: Client, server: Started, request: bytes, began: float) -> list[bytes]:
    while True:
        try:
            client.send(request)
            reply: list[bytes] = client.receive(1)[0]
        except LoadError as error:
            if "LOADING" not in str(error):
                raise
            _check_patience(server, began)
            time.sleep(_POLL_SECONDS)
        else:
            return reply


def _check_patience(server: Started, began: float) -> None:
    if server.process.poll() is not None or time.monotonic() - began > _LOADING_SECONDS:
        raise server.failure("does not answer")


def render(starts: dict[str, list[Start]], holdings: dict[str, Holding]) -> str:
    lines = [_line(name, starts[name], holdings[name]) for name in starts]
    header = ["", "vectors", "strings", "files MiB", "seconds", "least", "most", "CPU s", "us a vector"]
    table = markdown_table([*header, "RssAnon MiB", "RssFile MiB"], lines)
    ours, theirs = (_median_seconds(runs) for runs in starts.values())
    rows, other_rows = (holding.vectors for holding in holdings.values())
    ratio = f"engram's time as a part of Redis 8's: {render_number(ours / theirs)}"
    if rows != other_rows:
        scaled = (ours / rows) / (theirs / other_rows)
        ratio += (
            f" as measured, with {other_rows / rows:.3g} times as many rows in Redis 8;"
            f" {render_number(scaled)} a row"
        )
    return f"{table}\n\n{ratio}"


def _median_seconds(starts: Sequence[Start]) -> float:
    return statistics.median(start.seconds for start in starts)


def _line(name: str, starts: Sequence[Start], holding: Holding) -> list[str]:
    seconds = [start.seconds for start in starts]
    cpu, anonymous, mapped = (
        statistics.median(figures)
        for figures in zip(*((start.cpu, start.anonymous, start.mapped) for start in starts), strict=True)
    )
    return [
        name,
        f"{holding.vectors:,}",
        f"{holding.strings:,}",
        f"{holding.size / 2**20:,.0f}",
        *(f"{figure:.3f}" for figure in (statistics.median(seconds), min(seconds), max(seconds))),
        f"{cpu:.2f}",
        f"{statistics.median(seconds) / holding.vectors * 1e6:.2f}",
        f"{anonymous / 2**20:,.0f}",
        f"{mapped / 2**20:,.0f}",
    ]


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    directory = (arguments.directory or folder / "engram").resolve()
    file = (arguments.redis_file or folder / "dump.rdb").resolve()
    redis_rows = min(arguments.redis_rows, arguments.rows)
    # Where all is prepared, the query is the only row that is needed.
    needed = 1
    if not file.exists():
        needed = redis_rows
    if not (directory / "MANIFEST").exists():
        needed = arguments.rows
    rows = make_data(argparse.Namespace(**{**vars(arguments), "rows": needed}), folder).rows
    ours, theirs = engram_case(arguments, directory, rows.dimension), redis_case(arguments, file)
    if not (directory / "MANIFEST").exists():
        prepare_engram(ours, rows, arguments.strings, arguments)
    elif arguments.add_strings:
        add_strings_to(ours, arguments.strings, arguments)
    if not file.exists():
        strings = round(arguments.strings * redis_rows / arguments.rows)
        prepare_redis(theirs, rows.first(redis_rows), strings, arguments)
    query = rows.vectors()[0].tobytes()
    starts: dict[str, list[Start]] = {ours.name: [], theirs.name: []}
    holdings: dict[str, Holding] = {}
    for _ in range(arguments.rounds):
        for case in (ours, theirs):
            figures, holdings[case.name] = start(case, case.dialect.search(query, K), arguments)
            starts[case.name].append(figures)
    return render(starts, holdings)


def main() -> int:
    parser = make_parser(
        "from the start of the process to the first search answered", rows=1_000_000, cores="half"
    )
    add_redis_options(parser)
    parser.add_argument("--strings", type=int, default=1_000_000, help="strings to add")
    parser.add_argument("--redis-rows", type=int, default=100_000, help="vectors to add to Redis 8, at most")
    parser.add_argument("--directory", type=Path, help="engram's data: made when it is not there, and kept")
    parser.add_argument("--redis-file", type=Path, help="Redis's data: made when it is not there, and kept")
    parser.add_argument("--add-strings", action="store_true", help="set the strings in --directory, too")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each; the table shows medians")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
