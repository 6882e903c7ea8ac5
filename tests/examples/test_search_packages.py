from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.search_packages import read_packages

ROOT = Path(__file__).parents[2]
SCRIPTS = ["examples.search_packages", "examples.search_packages_async"]
QUERIES = 5
NEAREST = 3
FOUND = re.compile(r"  (\d\.\d{3})  (\S+) +(.*)")


def run_script(module: str, port: int) -> list[str]:
    command = [sys.executable, "-m", module, "--port", str(port), "--queries", str(QUERIES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def nearest() -> list[tuple[str, list[tuple[str, float]]]]:
    """Each text with the names and cosine distances of the nearest packages, in float64."""
    packages = read_packages()
    names = list(packages.synopses)
    rows, queries = (
        matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        for matrix in (
            packages.vectors.astype(np.float64),
            packages.query_vectors[:QUERIES].astype(np.float64),
        )
    )
    distances = 1 - queries @ rows.T
    return [
        (text, [(names[row], float(line[row])) for row in np.argsort(line, kind="stable")[:NEAREST]])
        for text, line in zip(packages.query_texts, distances, strict=False)
    ]


@pytest.mark.parametrize("module", SCRIPTS)
def test_prints_the_nearest_packages(module: str, port: int) -> None:
    first, *lines = run_script(module, port)
    assert first == "2000 of 2000 packages were new"
    expected = nearest()
    assert lines[:: NEAREST + 1] == [text for text, _ in expected]
    found = [FOUND.fullmatch(line) for line in lines if line.startswith(" ")]
    assert [match and match[2] for match in found] == [name for _, rows in expected for name, _ in rows]
    assert [float(match[1]) for match in found if match] == pytest.approx(
        [distance for _, rows in expected for _, distance in rows], abs=0.001
    )
    synopses = read_packages().synopses
    assert all(match[3] == synopses[match[2]] for match in found if match)


@pytest.mark.parametrize("module", SCRIPTS)
def test_running_it_again_overwrites(module: str, port: int) -> None:
    before = run_script(module, port)
    after = run_script(module, port)
    assert after == ["0 of 2000 packages were new", *before[1:]]


def test_the_file_is_small() -> None:
    path = ROOT / "examples" / "packages.npz"
    assert path.stat().st_size < 2_000_000
    packages = read_packages()
    assert packages.vectors.shape == (2000, 384)
    assert packages.query_vectors.shape == (len(packages.query_texts), 384)
    assert len(packages.synopses) == 2000
