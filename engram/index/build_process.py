"""The process that builds one segment: `python -m engram.index.build_process`.

It reads a `BuildJob` as one line of JSON from standard input and ends when that closes, so that none
outlives its server. It prints a `BuildResult`.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from engram.columns import write_columns
from engram.errors import EngramError, one_line
from engram.files import DiskFiles, Files
from engram.index.attributes import decode_columns, pack_attributes
from engram.index.distances import row_norms
from engram.index.graph import GraphBuilder, Quantizer
from engram.index.parameters import Parameters
from engram.index.recall import Sample
from engram.index.segment import GRAPH, ROW_FILES, SegmentStore
from engram.index.texts import Texts

# The exit code for a failure that would come again: nothing but the rows and the code has a part in it.
CERTAIN_FAILURE = os.EX_SOFTWARE

_NICENESS = 10
_CHECKED_ROWS = 128
_CHECK_EXPANSION = 64


class BuildJob(msgspec.Struct, frozen=True):
    """What to build: the folder `<segment>.building` in `store` holds the rows (`segment.ROW_FILES`)."""

    store: str
    segment: str
    index: int
    dimension: int
    metric: str
    connectivity: int
    expansion: int
    quantization: str
    recall: float = 0.99


class BuildResult(msgspec.Struct, frozen=True):
    """`checksum` is that of the table of columns of the finished folder."""

    checksum: int


def build_segment(job: BuildJob, files: Files | None = None) -> BuildResult:
    """Adds a graph to the rows, makes all durable, and gives the folder its name (blocking).

    Raises:
        DamagedDataError: what was written does not read back.
        OSError: it cannot be written.
    """
    files = files or DiskFiles()
    store = SegmentStore(Path(job.store), files, 1)
    building = store.building(job.segment)
    parameters = Parameters(
        job.dimension, job.metric, job.connectivity, job.expansion, job.quantization, job.recall
    )
    rows = np.load(building / "vectors.npy", mmap_mode="r").view(np.ndarray)
    norms = row_norms(rows)
    quantizer = Quantizer.fit(parameters, rows, norms)
    builder = GraphBuilder(parameters, quantizer)

    sample = Sample.choose(parameters.metric, rows, norms)
    builder.add(sample.inside, rows, norms)
    curve = sample.measure(builder.graph, rows, norms)
    builder.add(sample.held, rows, norms)
    curve = sample.measure_whole(builder.graph, rows, norms, curve)
    builder.save(building / GRAPH)

    attributes, fields = pack_attributes(decode_columns(_read_attributes(building)))
    checksum = write_columns(
        files,
        building,
        {"norms": norms, "center": quantizer.center, **attributes},
        {
            "index": job.index,
            "parameters": msgspec.to_builtins(parameters),
            "scale": quantizer.scale,
            "curve": curve,
            "attributes": fields,
        },
        [*ROW_FILES, GRAPH],
    )
    segment = store.open(building.name, checksum)
    asked = slice(None, None, max(1, len(rows) // _CHECKED_ROWS))
    search = (rows[asked], norms[asked], 1, _CHECK_EXPANSION)
    if not np.array_equal(segment.graphs[0].search(*search), builder.graph.search(*search)):
        raise OSError(f"{building / GRAPH} does not answer as the graph that was written")
    files.rename(building, store.folder / job.segment)
    files.sync_folder(store.folder)
    return BuildResult(checksum)


def _read_attributes(folder: Path) -> Texts:
    ends = np.load(folder / "attributes-ends.npy")
    # What is empty cannot be mapped.
    mode: Literal["r"] | None = "r" if ends[-1] else None
    return Texts(np.load(folder / "attributes-bytes.npy", mmap_mode=mode).view(np.ndarray), ends)


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """Builds the segment that standard input asks for."""
    os.nice(_NICENESS)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildJob)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        result = build_segment(job)
    except (EngramError, OSError, MemoryError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(one_line(error), file=sys.stderr)
        return CERTAIN_FAILURE
    sys.stdout.buffer.write(msgspec.json.encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
