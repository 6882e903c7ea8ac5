"""Filtered searches: recall and time by the part of the rows that match, Redis 8's FILTER beside them.

    python -m benchmarks.filters

Filters of about 50, 5, 0.5 and 0.01 %. Sections and sizes are real and go with the vectors; categories and
uniform numbers are made and do not. A made row has the section and the size of the row it was made from.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import numpy as np

from benchmarks.command_line import K, add_redis_options, make_parser, run, running_engram, running_redis
from benchmarks.dialects import Dialect, Engram, Redis
from benchmarks.embeddings import Attributes, DataSet, Mask, Truth, find_truths, make_data
from benchmarks.measures import (
    Loading,
    add_rows,
    measure_recall,
    search_load,
    search_requests,
    wait_for_graphs,
)
from benchmarks.peers import Peer, markdown_table


@attrs.frozen(eq=False)
class FilterCase:
    """An expression, and the rows for which it is true: of all rows when there is none."""

    text: str | None
    matching: Mask | None


def filter_cases(attributes: Attributes) -> list[FilterCase]:
    """No filter at first, then from the widest to the narrowest."""
    sizes, uniforms, categories = attributes.sizes, attributes.uniforms, attributes.categories
    low, high = (int(cut) for cut in np.quantile(sizes, (0.25, 0.75)))
    rarest = max(1, len(uniforms) // 10_000)
    least = float(np.partition(uniforms, rarest)[rarest])
    half = ", ".join(f'"c{number}"' for number in range(10))
    return [
        FilterCase(None, None),
        FilterCase(f".size >= {low} and .size < {high}", (sizes >= low) & (sizes < high)),
        FilterCase(f".category in [{half}]", categories < 10),
        FilterCase('.section == "rust"', _in_section(attributes, "rust")),
        FilterCase('.category == "c3"', categories == 3),
        FilterCase('.section == "web"', _in_section(attributes, "web")),
        FilterCase(
            '.category in ["c1", "c2"] and (.uniform < 0.04 or .uniform > 0.99) and not (.size < 0)',
            np.isin(categories, (1, 2)) & ((uniforms < 0.04) | (uniforms > 0.99)),
        ),
        FilterCase(f".uniform < {least!r}", uniforms < least),
    ]


def _in_section(attributes: Attributes, section: str) -> Mask:
    matching: Mask = np.asarray(attributes.section_names)[attributes.sections] == section
    return matching


@attrs.frozen
class Figures:
    """Of one server and filter; the times, by number of clients, are multiples of the unfiltered search's."""

    recall: float
    rates: dict[int, float]
    times: dict[int, float]


def measure_filters(
    peer: Peer,
    dialect: Dialect,
    data: DataSet,
    cases: Sequence[FilterCase],
    truths: Sequence[Truth],
    arguments: argparse.Namespace,
) -> list[Figures]:
    """Figures for each case, the first of which has no filter. Cases take turns; medians over the rounds."""
    requests = [search_requests(dialect, data.queries, K, filter_text=case.text) for case in cases]
    recalls = [measure_recall(peer, part, truth) for part, truth in zip(requests, truths, strict=True)]
    samples: dict[tuple[int, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for clients in (1, arguments.clients):
            for number, part in enumerate(requests):
                load = search_load(peer, part, clients, arguments.seconds, arguments.load_cores)
                samples.setdefault((number, clients), []).append(load.rate)
    rates = {case: statistics.median(found) for case, found in samples.items()}
    return [
        Figures(
            recall,
            {clients: rates[number, clients] for clients in (1, arguments.clients)},
            {clients: rates[0, clients] / rates[number, clients] for clients in (1, arguments.clients)},
        )
        for number, recall in enumerate(recalls)
    ]


def render(
    cases: Sequence[FilterCase], servers: dict[str, list[Figures]], rows: int, arguments: argparse.Namespace
) -> str:
    header = ["filter", "matching"]
    for name in servers:
        header.append(f"{name}: recall@{K}")
        for clients in (1, arguments.clients):
            header += [f"searches/s, {clients}", f"x time, {clients}"]
    lines = []
    for number, case in enumerate(cases):
        part = 1.0 if case.matching is None else np.count_nonzero(case.matching) / rows
        line = [f"`{case.text}`" if case.text else "none", f"{part:.4%}"]
        for figures in servers.values():
            line.append(f"{figures[number].recall:.4f}")
            for clients in (1, arguments.clients):
                line += [f"{figures[number].rates[clients]:,.0f}", f"{figures[number].times[clients]:.2f}"]
        lines.append(line)
    return (
        f"{rows:,} rows, no EF given, 1 and {arguments.clients} clients; x time: as a multiple of the"
        f" unfiltered search's\n\n{markdown_table(header, lines)}"
    )


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    data = make_data(arguments, folder)
    cases = filter_cases(data.attributes)
    truths = find_truths(data.rows, data.queries, K, [case.matching for case in cases])
    ours = Engram(data.rows.dimension)
    theirs = Redis(tuple(arguments.peer_words.split()))
    servers = {}
    with ExitStack() as stack:
        engram = stack.enter_context(running_engram(arguments))
        add_rows(engram, Loading(ours, data.rows, data.attributes), arguments.load_cores)
        wait_for_graphs(engram, arguments.optimize)
        servers["engram"] = measure_filters(engram, ours, data, cases, truths, arguments)
        if not arguments.without_redis:
            redis = stack.enter_context(running_redis(arguments))
            add_rows(redis, Loading(theirs, data.rows, data.attributes), arguments.load_cores)
            servers["Redis 8"] = measure_filters(redis, theirs, data, cases, truths, arguments)
    return render(cases, servers, data.rows.rows, arguments)


def main() -> int:
    parser = make_parser("filtered searches: engram beside Redis 8", seconds=2.0)
    add_redis_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the table shows medians")
    parser.add_argument("--clients", type=int, default=32, help="clients of the concurrent search")
    parser.add_argument("--without-redis", action="store_true", help="engram alone, for many rows")
    parser.add_argument("--optimize", action="store_true", help="one graph for all rows, by VOPTIMIZE")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
