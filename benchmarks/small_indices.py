"""Many small indices: the memory each takes, and the time to make, search and count them.

    python -m benchmarks.small_indices [--indices 10000] [--rows 50] [--dimension 384]

Without a network: operations are applied to an engine, as a server applies them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from engram.collector import brief_collections
from engram.commands.information import resident_memory
from engram.engine import Engine
from engram.files import DiskFiles
from engram.heap import Heap
from engram.index.search import SearchOptions, search_batch
from engram.index.segment import SegmentStore
from engram.operations import AddVectors, CreateIndex


@contextmanager
def timed(what: str, count: int) -> Iterator[None]:
    """Prints the time that each of `count` things has taken."""
    began = time.perf_counter()
    yield
    print(f"{what:<34} {(time.perf_counter() - began) / count * 1e6:>10,.1f} us")


def fill(engine: Engine, indices: int, rows: int, vectors: list[bytes]) -> None:
    """Makes the indices and adds their rows one by one, in turn, as many clients would."""
    dimension = len(vectors[0]) // 4
    for number in range(indices):
        engine.apply(engine.lsn + 1, CreateIndex(b"index:%d" % number, dimension, "cosine", 16, 128, "int8"))
    ids = list(engine.indices)
    for row in range(rows):
        for number, index_id in enumerate(ids):
            operation = AddVectors(index_id, (b"key:%d" % row,), vectors[(row * 7 + number) % len(vectors)])
            engine.apply(engine.lsn + 1, operation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--indices", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--dimension", type=int, default=384)
    arguments = parser.parse_args()
    count, rows = arguments.indices, arguments.rows
    threadpool_limits(1, user_api="blas")
    Heap().tune()
    random = np.random.default_rng(0)
    vectors = [row.tobytes() for row in random.normal(size=(1000, arguments.dimension)).astype(np.float32)]
    with brief_collections(), tempfile.TemporaryDirectory() as folder:
        engine = Engine(SegmentStore(Path(folder), DiskFiles(), 1), seal_rows=8192)
        gc.collect()
        before = resident_memory()
        with timed(f"VNEW and {rows} VADD", count):
            fill(engine, count, rows, vectors)
        gc.collect()
        each = (resident_memory() - before) / count
        bare = 4 * arguments.dimension * rows
        print(f"{'memory of an index':<34} {each:>10,.0f} bytes, {each / bare:.2f} times its vectors")
        indices = list(engine.indices.values())
        query = random.normal(size=(1, arguments.dimension)).astype(np.float32)
        options = SearchOptions(k=10)
        for what in ("the first search of an index", "a search"):
            with timed(what, count):
                for index in indices:
                    search_batch([index.view(engine.lsn)], query, options, 0)
        gc.collect()
        after = (resident_memory() - before) / count
        print(f"{'memory of an index, searched':<34} {after:>10,.0f} bytes, {after / bare:.2f} times as much")
        with timed("VINFO of an index", count):
            counted = [index.statistics().bytes_in_memory for index in indices]
        print(f"{'memory of an index, as VINFO says':<34} {statistics.mean(counted):>10,.0f} bytes")
        for what in ("INFO vectors after they all changed", "INFO vectors again"):
            with timed(what, 1):
                engine.totals()


if __name__ == "__main__":
    main()
