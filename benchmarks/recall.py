"""Recall and speed of an engram that is not told how hard to try, and of one asked for less.

    python -m benchmarks.recall
    python -m benchmarks.recall --rows 1000000

The queries are real and not among the rows; the exact answers come from a pass over all rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.command_line import K, make_parser, run, running_engram
from benchmarks.dialects import Engram
from benchmarks.embeddings import DataSet, Truth, find_truths, make_data
from benchmarks.measures import (
    Loading,
    add_rows,
    index_fields,
    measure_recall,
    search_load,
    search_requests,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table, render_number

ASKED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "RECALL 0.95": ("RECALL", "0.95"),
    "RECALL 0.9": ("RECALL", "0.9"),
}


def measure_recalls(peer: Peer, data: DataSet, truth: Truth, arguments: argparse.Namespace) -> str:
    """The table: recall, and speed of a single client, by what is asked for."""
    rows = []
    for name, words in ASKED.items():
        dialect = Engram(data.rows.dimension, search_options=words)
        requests = search_requests(dialect, data.queries, K)
        recall = measure_recall(peer, requests, truth)
        load = search_load(peer, requests, 1, arguments.seconds, arguments.load_cores)
        rows.append([name, f"{recall:.4f}", render_number(load.rate), f"{load.p50:.2f}", f"{load.p99:.2f}"])
    fields = index_fields(peer)
    table = markdown_table(["asked for", f"recall@{K}", "searches/s", "p50 ms", "p99 ms"], rows)
    return (
        f"{data.rows.rows:,} rows, {len(data.queries):,} held-out queries, one client; {fields['segments']}"
        f" segments, {fields['head-rows']} rows in the head; ef:recall measured when they were built:"
        f" {fields['recall-curve']}\n\n{table}"
    )


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    with running_engram(arguments, "--appendfsync everysec", folder=folder) as engram:
        add_rows(engram, Loading(Engram(data.rows.dimension), data.rows), arguments.load_cores)
        wait_for_graphs(engram, arguments.optimize)
        # Only now, so that it takes nothing from the building of graphs.
        truth = find_truths(data.rows, data.queries, K, [None])[0]
        return measure_recalls(engram, data, truth, arguments)


def main() -> int:
    parser = make_parser("recall and speed of searches by default and at lower targets", cores="half")
    parser.add_argument("--optimize", action="store_true", help="one graph for all rows, by VOPTIMIZE")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
