"""What decided the settings and constants of search: one table for each choice.

    python -m benchmarks.choices
    python -m benchmarks.choices --only head graph

Each value gets a server of its own. `EF` is what engram chose where it says so; elsewhere it is the least
with which recall@10 reaches 0.99, so that speeds are those of equally good answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from benchmarks import altered
from benchmarks.command_line import K, make_parser, run, running_engram
from benchmarks.dialects import Engram
from benchmarks.embeddings import DataSet, Truth, find_truths, make_data
from benchmarks.load import LoadError
from benchmarks.measures import (
    Loading,
    add_rows,
    index_fields,
    least_expansion,
    measure_recall,
    search_load,
    search_requests,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table, render_number

# How much lengths vary: the longest of 20,000 rows is some 7 times as long as the median where the longest
# are the nearest, and twice as long where differences count.
_DOT_SCALE = 0.5
_L2_SCALE = 0.2


@attrs.frozen
class Trial:
    """One value of a choice.

    `flags` are settings of the server, `options` words of VNEW; for `constants` see `altered`. `rows` are
    the first of the set, None for all. With `tuned` the least EF that is good enough is used, else engram's
    own. `scale` and `metric` are those of the data: see `embeddings.make_data`.
    """

    label: str
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    constants: Mapping[str, float] = attrs.field(factory=dict)
    rows: int | None = None
    tuned: bool = False
    metric: str = "cosine"
    scale: float | None = None


def head_trials() -> list[Trial]:
    """The scan of a head as full as it gets, and the search of the whole set."""
    trials = []
    for rows in (1024, 2048, 4096, 8192, 16384):
        flags = (f"--seal-rows {rows}",)
        trials += [
            Trial(f"{rows}, a full head alone", flags, rows=rows - 1),
            Trial(f"{rows}, all rows", flags),
        ]
    return trials


def graph_trials() -> list[Trial]:
    return [
        Trial(
            f"M {connectivity}, EF_CONSTRUCTION {expansion}",
            options=("M", str(connectivity), "EF_CONSTRUCTION", str(expansion)),
            tuned=True,
        )
        for connectivity in (8, 12, 16, 24, 32)
        for expansion in (64, 128, 256)
    ]


def quantization_trials() -> list[Trial]:
    return [
        Trial(
            f"{metric}, {'lengths vary' if scale else 'length 1'}, QUANT {quantization}",
            options=("METRIC", metric, "QUANT", quantization),
            tuned=True,
            metric=metric,
            scale=scale,
        )
        for metric, scale in (("cosine", None), ("l2", _L2_SCALE), ("dot", _DOT_SCALE))
        for quantization in ("int8", "bf16", "f32")
    ]


def oversampling_trials() -> list[Trial]:
    return [
        Trial(str(factor), constants={"engram.index.recall.OVERSAMPLING": factor}, tuned=True)
        for factor in (1, 2, 3, 4, 6)
    ]


def switch_interval_trials() -> list[Trial]:
    return [
        Trial(f"{interval * 1000:g} ms", constants={"engram.server.SWITCH_INTERVAL": interval})
        for interval in (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005)
    ]


def batch_trials() -> list[Trial]:
    return [Trial(str(size), (f"--search-batch {size}",)) for size in (1, 4, 8, 16, 32, 64, 128)]


def build_trials() -> list[Trial]:
    return [Trial(str(number), (f"--builds-at-once {number}",)) for number in (1, 2, 3)]


def thread_trials() -> list[Trial]:
    return [Trial(str(number), (f"--search-threads {number}",)) for number in (1, 2, 3, 4)]


CHOICES: Mapping[str, Callable[[], list[Trial]]] = {
    "head": head_trials,
    "graph": graph_trials,
    "quantization": quantization_trials,
    "oversampling": oversampling_trials,
    "batch": batch_trials,
    "threads": thread_trials,
    "switch-interval": switch_interval_trials,
    "builds": build_trials,
}

_HEADER = (
    "rows/s",
    "s to graphs",
    "segments",
    "MiB mapped",
    "EF",
    f"recall@{K}",
    "searches/s, 1",
    "p99 ms, 1",
    "searches/s, {clients}",
    "p99 ms, {clients}",
    "CPU us, {clients}",
)


class Sets:
    """The data sets and their exact answers, each made once."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._data: dict[float | None, DataSet] = {}
        self._truths: dict[tuple[str, float | None, int], Truth] = {}

    def get(self, trial: Trial) -> tuple[DataSet, Truth]:
        if trial.scale not in self._data:
            folder = self._folder / f"scale-{trial.scale}"
            folder.mkdir()
            self._data[trial.scale] = make_data(self._arguments, folder, trial.scale)
        data = self._data[trial.scale]
        if trial.rows is not None:
            data = attrs.evolve(data, rows=data.rows.first(trial.rows))
        name = (trial.metric, trial.scale, data.rows.rows)
        if name not in self._truths:
            self._truths[name] = find_truths(data.rows, data.queries, K, [None], trial.metric)[0]
        return data, self._truths[name]


def try_out(trial: Trial, sets: Sets, arguments: argparse.Namespace) -> list[str]:
    """A row of the table."""
    data, truth = sets.get(trial)
    dialect = Engram(data.rows.dimension, trial.options)
    command = altered.command(trial.constants) if trial.constants else None
    with running_engram(arguments, *trial.flags, command=command) as peer:
        rate = add_rows(peer, Loading(dialect, data.rows), arguments.load_cores)
        seconds = wait_for_graphs(peer)
        fields = index_fields(peer)
        row = [trial.label, f"{rate:,.0f}", f"{seconds:.1f}", fields["segments"]]
        row.append(f"{int(fields['bytes-mapped']) / 2**20:.0f}")
        try:
            expansion, recall = choose_expansion(peer, dialect, data, truth, tuned=trial.tuned)
        except LoadError as error:
            return [*row, str(error), *[""] * (len(_HEADER) - len(row))]
        requests = search_requests(dialect, data.queries, K, expansion)
        one, many = (
            search_load(peer, requests, clients, arguments.seconds, arguments.load_cores)
            for clients in (1, arguments.clients)
        )
    row += ["its own" if expansion is None else str(expansion), f"{recall:.4f}"]
    row += [render_number(one.rate), f"{one.p99:.2f}"]
    return [*row, render_number(many.rate), f"{many.p99:.2f}", f"{many.cpu:.0f}"]


def choose_expansion(
    peer: Peer, dialect: Engram, data: DataSet, truth: Truth, *, tuned: bool
) -> tuple[int | None, float]:
    """The EF to search with, None for engram's own, and its recall."""

    def recall_at(expansion: int | None) -> float:
        return measure_recall(peer, search_requests(dialect, data.queries, K, expansion), truth)

    return least_expansion(recall_at, 0.99) if tuned else (None, recall_at(None))


def render(name: str, rows: Sequence[Sequence[str]], arguments: argparse.Namespace) -> str:
    header = [name, *(title.format(clients=arguments.clients) for title in _HEADER)]
    return markdown_table(header, rows)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    sets = Sets(arguments, folder)
    tables = [f"{arguments.rows:,} rows, {arguments.queries:,} queries, k = {K}"]
    for name in arguments.only:
        rows = [try_out(trial, sets, arguments) for trial in CHOICES[name]()]
        tables.append(render(name, rows, arguments))
    return "\n\n".join(tables)


def main() -> int:
    parser = make_parser("what decided the settings and constants of search", seconds=3.0, cores="most")
    parser.add_argument(
        "--only", nargs="+", choices=list(CHOICES), default=list(CHOICES), help="choices to try out"
    )
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
