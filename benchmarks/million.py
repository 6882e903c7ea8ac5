"""One long run over a million rows with attributes: memory, recall and filters.

    python -m benchmarks.million

Takes a quarter of an hour and more. The tables are those of `memory`, `recall` and `filters`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import filters, memory
from benchmarks.command_line import K, make_parser, run, running_engram
from benchmarks.dialects import Engram
from benchmarks.embeddings import find_truths, make_data
from benchmarks.measures import Loading
from benchmarks.recall import measure_recalls


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    dialect = Engram(data.rows.dimension)
    cases = filters.filter_cases(data.attributes)
    truths = find_truths(data.rows, data.queries, K, [case.matching for case in cases])
    with running_engram(arguments, "--appendfsync always", folder=folder) as engram:
        watcher = memory.Watcher(engram)
        with watcher.watching():
            loading = Loading(dialect, data.rows, data.attributes)
            rate = memory.load_and_save(engram, watcher, data, loading, arguments)
            recalls = measure_recalls(engram, data, truths[0], arguments)
            watcher.phase = "filtered searches"
            figures = filters.measure_filters(engram, dialect, data, cases, truths, arguments)
    tables = [
        f"added at {rate:,.0f} rows/s",
        recalls,
        filters.render(cases, {"engram": figures}, data.rows.rows, arguments),
        memory.render(watcher, data.rows.rows),
    ]
    return "\n\n".join(tables)


def main() -> int:
    parser = make_parser(
        "memory, recall and filters over a million rows", rows=1_000_000, seconds=5.0, cores="half"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of the filters; the table shows medians")
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
