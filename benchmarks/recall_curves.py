"""How well measured recall curves foretell real searches, and what graphs of other parameters would cost.

    python -m benchmarks.recall_curves
    python -m benchmarks.recall_curves --only promise --sets 20000 20000/4 131072:0.3
    python -m benchmarks.recall_curves --only parameters --parameter-sets 20000 131072:1

All happens in this process, on one core; times are of CPU. A set is named by its rows, then `/` and the
number of segments they are split into, then `:` and the noise of made rows (`embeddings.make_data`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import attrs
import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.embeddings import DATA, DataSet, Truth, find_truths, key_of, make_data
from benchmarks.peers import describe_machine, markdown_table
from engram.index.distances import Floats, row_norms
from engram.index.graph import Graph, GraphBuilder, Quantizer
from engram.index.parameters import QUANTIZATIONS, Parameters, default_parameters
from engram.index.recall import NEIGHBORS, OVERSAMPLING, Curve, Sample, expansion_for

K = NEIGHBORS
TARGETS = (0.9, 0.95, 0.99)

_BATCH = 25
_WIDEST = 4096
_SETS = (
    "4000",
    "8192",
    "10000",
    "20000",
    "20000/2",
    "20000/4",
    "32768",
    "131072:0.1",
    "131072:0.5",
    "131072",
    "262144",
)
_PARAMETER_SETS = ("20000", "131072")
_SHAPES = ((12, 128), (16, 64), (16, 128), (16, 200), (24, 128), (32, 128), (32, 200))
# Of l2 and dot: rows of one length, and of lengths that vary like exp(scale z), z normally distributed.
_SCALES = (None, 0.25, 0.7)


@attrs.frozen
class SetName:
    """A set of rows to measure on, as the command line names it."""

    rows: int
    segments: int
    noise: float
    scale: float | None = None

    @classmethod
    def parse(cls, text: str) -> SetName:
        sizes, _, noise = text.partition(":")
        rows, _, segments = sizes.partition("/")
        return cls(int(rows), int(segments or 1), float(noise or 1.0))

    def __str__(self) -> str:
        words = [f"{self.rows:,} rows"]
        if self.rows > 20_000:
            words.append(f"noise {self.noise:g}")
        if self.segments > 1:
            words.append(f"{self.segments} segments")
        if self.scale is not None:
            words.append(f"lengths vary by {self.scale:g}")
        return ", ".join(words)


@attrs.frozen(eq=False)
class Part:
    """A segment: rows from `start` on, its graph, what was measured, and the CPU seconds these took."""

    start: int
    graph: Graph
    curve: Curve
    building: float
    measuring: float


def build(rows: Floats, start: int, parameters: Parameters, *, measured: bool) -> Part:
    """Builds a graph as `engram.index.build_process` does."""
    norms = row_norms(rows)
    builder = GraphBuilder(parameters, Quantizer.fit(parameters, rows, norms))
    if not measured:
        seconds = _timed(lambda: builder.add(np.arange(len(rows)), rows, norms))
        return Part(start, builder.graph, (), seconds, 0.0)
    began = time.process_time()
    sample = Sample.choose(parameters.metric, rows, norms)
    measuring = time.process_time() - began
    building = _timed(lambda: builder.add(sample.inside, rows, norms))
    began = time.process_time()
    curve = sample.measure(builder.graph, rows, norms)
    measuring += time.process_time() - began
    building += _timed(lambda: builder.add(sample.held, rows, norms))
    began = time.process_time()
    curve = sample.measure_whole(builder.graph, rows, norms, curve)
    measuring += time.process_time() - began
    return Part(start, builder.graph, curve, building, measuring)


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def search(
    parts: Sequence[Part], expansions: Sequence[int], data: DataSet, truth: Truth
) -> tuple[float, float]:
    """Recall and CPU microseconds a query of searching each part as wide as `expansions` say."""
    queries, norms = data.queries, row_norms(data.queries)
    found: list[list[bytes]] = [[] for _ in queries]
    seconds = 0.0
    for part, expansion in zip(parts, expansions, strict=True):
        for start in range(0, len(queries), _BATCH):
            batch = slice(start, start + _BATCH)
            began = time.thread_time()
            positions = part.graph.search(queries[batch], norms[batch], OVERSAMPLING * K, expansion)
            seconds += time.thread_time() - began
            for keys, line in zip(found[batch], positions.tolist(), strict=True):
                keys += [key_of(part.start + position) for position in line if position >= 0]
    return truth.recall(found), seconds / len(queries) * 1e6


def least_expansion(
    parts: Sequence[Part], target: float, data: DataSet, truth: Truth
) -> tuple[int, float, float]:
    """The least ef, one for all parts, that reaches a recall, 0 when none does; the recall and the time."""
    low, high = OVERSAMPLING * K - 1, OVERSAMPLING * K
    while (reached := search(parts, [high] * len(parts), data, truth))[0] < target:
        low, high = high, high * 2
        if high > _WIDEST:
            return 0, *reached
    while high - low > max(1, high // 40):
        middle = (low + high) // 2
        tried = search(parts, [middle] * len(parts), data, truth)
        if tried[0] < target:
            low = middle
        else:
            high, reached = middle, tried
    return high, *reached


@contextmanager
def opened(name: SetName, metric: str, arguments: argparse.Namespace) -> Iterator[tuple[DataSet, Truth]]:
    """A set with its exact answers; its file is there until the block ends."""
    options = argparse.Namespace(**vars(arguments) | {"rows": name.rows, "noise": name.noise})
    with tempfile.TemporaryDirectory(prefix="engram-benchmark-", dir=arguments.scratch) as folder:
        data = make_data(options, Path(folder), name.scale)
        yield data, find_truths(data.rows, data.queries, K, [None], metric)[0]


def promise_rows(name: SetName, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """For each target what the widths that the curves tell really find, and the least that would do."""
    with opened(name, "cosine", arguments) as (data, truth):
        vectors = data.rows.vectors()
        parameters = default_parameters(data.rows.dimension, "cosine")
        bounds = np.linspace(0, name.rows, name.segments + 1).astype(int).tolist()
        parts = [
            build(np.array(vectors[start:stop]), start, parameters, measured=True)
            for start, stop in pairwise(bounds)
        ]
        building, measuring = (
            sum(getattr(part, what) for part in parts) for what in ("building", "measuring")
        )
        for target in TARGETS:
            row = [
                str(name),
                f"{building:.1f}",
                f"{measuring:.2f}",
                f"{measuring / building:.0%}",
                str(target),
            ]
            expansions = [expansion_for(part.curve, target) for part in parts]
            least, _, fastest = least_expansion(parts, target, data, truth)
            if 0 in expansions:
                yield [*row, "scan", "1", "", str(least or "none"), f"{fastest:.0f}"]
                continue
            recall, micros = search(parts, expansions, data, truth)
            chosen = " ".join(map(str, expansions))
            yield [*row, chosen, f"{recall:.4f}", f"{micros:.0f}", str(least or "none"), f"{fastest:.0f}"]


def parameter_trials(dimension: int, *, everything: bool) -> Iterator[tuple[float | None, Parameters]]:
    """The graphs to compare: with `everything` all metrics, scales and kinds of numbers."""
    for connectivity, expansion in _SHAPES:
        yield None, Parameters(dimension, "cosine", connectivity, expansion, "int8")
    if not everything:
        return
    for quantization in QUANTIZATIONS[1:]:
        yield None, Parameters(dimension, "cosine", 16, 128, quantization)
    for metric in ("l2", "dot"):
        for scale in _SCALES:
            for quantization in QUANTIZATIONS:
                for connectivity in (16, 32) if quantization == "int8" else (16,):
                    yield scale, Parameters(dimension, metric, connectivity, 128, quantization)


def parameter_rows(name: SetName, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """What graphs cost to build, and to search at a recall of 0.99 or the best there is."""
    trials = list(parameter_trials(arguments.dimension, everything=name.rows <= arguments.everything))
    for metric, scale in dict.fromkeys((parameters.metric, scale) for scale, parameters in trials):
        with opened(attrs.evolve(name, scale=scale), metric, arguments) as (data, truth):
            vectors = np.array(data.rows.vectors())
            for parameters in (tried for by, tried in trials if (tried.metric, by) == (metric, scale)):
                part = build(vectors, 0, parameters, measured=False)
                least, recall, micros = least_expansion([part], arguments.recall, data, truth)
                yield [
                    str(attrs.evolve(name, scale=scale)),
                    metric,
                    parameters.quantization,
                    str(parameters.connectivity),
                    str(parameters.expansion),
                    f"{len(vectors) / part.building:,.0f}",
                    str(least or "none"),
                    f"{recall:.4f}",
                    f"{micros:.0f}",
                ]


_PROMISE = (
    "set",
    "build s",
    "measure s",
    "of build",
    "target",
    "EF chosen",
    f"recall@{K}",
    "us",
    "least EF",
    "us then",
)
_PARAMETERS = ("set", "metric", "numbers", "M", "ef_construction", "rows/s", "EF", f"recall@{K}", "us")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="measured recall curves against real searches, and graphs of other parameters",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the embeddings")
    parser.add_argument("--queries", type=int, default=1_000, help="distinct queries")
    parser.add_argument(
        "--only", nargs="+", choices=["promise", "parameters"], default=["promise", "parameters"]
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        type=SetName.parse,
        default=[SetName.parse(text) for text in _SETS],
        help="sets to compare curves on: rows[/segments][:noise]",
    )
    parser.add_argument(
        "--parameter-sets",
        nargs="+",
        type=SetName.parse,
        default=[SetName.parse(text) for text in _PARAMETER_SETS],
        help="to try parameters on",
    )
    parser.add_argument(
        "--everything", type=int, default=20_000, help="rows up to which all metrics are tried, else cosine"
    )
    parser.add_argument("--recall", type=float, default=0.99, help="at which parameters are compared")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on")
    parser.add_argument("--scratch", type=Path, help="folder for data; the temporary one when not given")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        print(f"there are no embeddings at {arguments.data}: name the file with --data", file=sys.stderr)
        return 2
    with np.load(arguments.data) as arrays:
        arguments.dimension = arrays["query_vectors"].shape[1]
    os.sched_setaffinity(0, [arguments.core])
    with threadpool_limits(1, user_api="blas"):
        if "promise" in arguments.only:
            lines = [line for name in arguments.sets for line in promise_rows(name, arguments)]
            print(markdown_table(_PROMISE, lines), end="\n\n")
        if "parameters" in arguments.only:
            lines = [line for name in arguments.parameter_sets for line in parameter_rows(name, arguments)]
            print(markdown_table(_PARAMETERS, lines), end="\n\n")
    print(f"k = {K}, CPU times; {describe_machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
