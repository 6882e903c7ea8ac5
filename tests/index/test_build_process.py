from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from engram.index.build_process import BuildJob, BuildResult, build_segment
from engram.index.distances import row_norms
from engram.index.head import Chunk
from engram.index.segment import SegmentStore

Floats = npt.NDArray[np.float32]

COMMAND = [sys.executable, "-P", "-m", "engram.index.build_process"]
ROOT = Path(__file__).parents[2]


def job_for(store: SegmentStore, rows: Floats) -> BuildJob:
    """Writes the rows that a process should build a segment of."""
    chunk = Chunk(len(rows), rows.shape[1])
    chunk.extend(np.arange(len(rows)), [b"%d" % row for row in range(len(rows))], rows)
    store.write_rows("0123", [(chunk, np.arange(len(rows)))])
    return BuildJob(str(store.folder), "0123", 7, rows.shape[1], "cosine", 16, 128, "int8")


@pytest.fixture
def process() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_process_builds_the_segment_it_is_asked_for(
    store: SegmentStore, process: subprocess.Popen[bytes], clustered: Callable[..., Floats]
) -> None:
    job = job_for(store, clustered(300, 8))
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        # Its input stays open until it has ended.
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        output = process.stdout.read()
    assert process.returncode == 0
    segment = store.open("0123", msgspec.json.decode(output, type=BuildResult).checksum)
    assert segment.index_id == 7
    assert len(segment.graphs[0]) == 300
    assert [path.name for path in store.folder.iterdir()] == ["0123"]


def test_a_segment_knows_how_wide_it_must_be_searched(
    store: SegmentStore, clustered: Callable[..., Floats]
) -> None:
    rows = clustered(6000, 16)
    segment = store.open("0123", build_segment(job_for(store, rows)).checksum)
    assert len(segment.graphs[0]) == 6000
    expansion = segment.expansion_for(0.95)
    assert 0 < expansion < 128
    assert next(ef for ef, recall in segment.curve if recall >= 0.95) >= expansion
    found = segment.graphs[0].search(rows, row_norms(rows), 1, expansion)[:, 0]
    assert (found == np.arange(6000)).mean() > 0.95


def test_a_process_ends_with_its_input(
    store: SegmentStore, process: subprocess.Popen[bytes], clustered: Callable[..., Floats]
) -> None:
    job = job_for(store, clustered(60_000, 32))
    process.communicate(msgspec.json.encode(job) + b"\n")
    assert process.returncode == 1
    assert [path.name for path in store.folder.iterdir()] == ["0123.building"]


def test_a_process_that_fails_says_why(store: SegmentStore, process: subprocess.Popen[bytes]) -> None:
    job = BuildJob(str(store.folder), "4567", 7, 8, "cosine", 16, 128, "int8")
    assert process.stdin is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert b"No such file" in errors
    assert b"4567.building" in errors
