"""The data that is measured on: real embeddings, made ones around them, attributes, and exact answers.

Rows are kept in a file that every process maps, so that a million of them take no memory of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "packages-20k.npz"
CATEGORIES = 20

_SEED = 20_000
_BLOCK_ROWS = 8192
# Copies of one text have no distance from which noise could take its length.
_LEAST_DISTANCE = 0.05
# A row as near as the k-th, but for the rounding of float32, is a right answer, too: some texts occur twice.
_TOLERANCE = 1e-6


def key_of(row: int) -> bytes:
    return b"row:%d" % row


def row_of(key: bytes) -> int:
    return int(key[4:])


@attrs.frozen
class RowFile:
    """Vectors in a file: (rows, dimension) <f4."""

    path: Path
    rows: int
    dimension: int

    def vectors(self) -> Floats:
        """The vectors, mapped."""
        return np.memmap(self.path, "<f4", "r", shape=(self.rows, self.dimension))

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        vectors = self.vectors()
        for start in range(0, self.rows, _BLOCK_ROWS):
            part = slice(start, min(start + _BLOCK_ROWS, self.rows))
            yield part, vectors[part]

    def first(self, rows: int) -> RowFile:
        return attrs.evolve(self, rows=min(rows, self.rows))


@attrs.frozen(eq=False)
class Attributes:
    """Attributes of n rows, a column each; `sections` are numbers of `section_names`."""

    section_names: list[str]
    sections: npt.NDArray[np.int16]
    sizes: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int16]
    uniforms: Doubles

    def json_of(self, row: int) -> bytes:
        fields = {
            "section": self.section_names[self.sections[row]],
            "size": int(self.sizes[row]),
            "category": f"c{self.categories[row]}",
            "uniform": float(self.uniforms[row]),
        }
        return json.dumps(fields).encode()


@attrs.frozen(eq=False)
class DataSet:
    """Rows, their attributes, and queries (m, dimension) <f4 that are not among the rows."""

    rows: RowFile
    attributes: Attributes
    queries: Floats


def make_data(arguments: argparse.Namespace, folder: Path, scale: float | None = None) -> DataSet:
    """The first `arguments.rows` of the real rows; once these are used up, made ones.

    A made row is a real one, drawn at random, and noise in a random direction. The noise is as long as a part
    of the real row's distance to the nearest other one, drawn evenly from 0 to `arguments.noise`, so that
    the made set is dense where the real one is. Always the same for the same arguments.

    With `scale` rows and queries get lengths that vary: they are multiplied by exp(scale z), z normally
    distributed.
    """
    with np.load(arguments.data) as arrays:
        real = unit(arrays["vectors"][: arguments.rows]).astype("<f4")
        queries = unit(arrays["query_vectors"][: arguments.queries]).astype("<f4")
        names, codes = np.unique(arrays["sections"][: arguments.rows], return_inverse=True)
        sizes = arrays["sizes"][: arguments.rows]
    rows = max(arguments.rows, len(real))
    random = np.random.default_rng(_SEED)
    bases = np.concatenate([np.arange(len(real)), random.integers(len(real), size=rows - len(real))])
    attributes = Attributes(
        section_names=names.tolist(),
        sections=codes[bases].astype(np.int16),
        sizes=sizes[bases],
        categories=random.integers(CATEGORIES, size=rows).astype(np.int16),
        uniforms=random.random(rows),
    )
    lengths = _nearest_distances(real) * arguments.noise if rows > len(real) else np.zeros(len(real))
    file = RowFile(folder / "rows.f32", rows, real.shape[1])
    with file.path.open("wb") as output:
        for start in range(0, rows, _BLOCK_ROWS):
            part = bases[start : start + _BLOCK_ROWS]
            noise = unit(random.standard_normal((len(part), file.dimension), np.float32))
            noise *= (lengths[part] * random.random(len(part)))[:, None]
            noise[: max(0, len(real) - start)] = 0.0
            block = real[part] + noise
            if scale is not None:
                block *= _lengths(random, scale, len(part))
            output.write(block.astype("<f4").tobytes())
    if scale is not None:
        queries = (queries * _lengths(random, scale, len(queries))).astype("<f4")
    return DataSet(file, attributes, queries)


def _lengths(random: np.random.Generator, scale: float, count: int) -> Doubles:
    lengths: Doubles = np.exp(scale * random.standard_normal(count))[:, None]
    return lengths


def unit(vectors: npt.NDArray[np.floating]) -> Doubles:
    wide = vectors.astype(np.float64)
    scaled: Doubles = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return scaled


def _nearest_distances(rows: Floats) -> Doubles:
    """The distance of each row to the nearest other one; rows have length 1."""
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        similarities = rows[start : start + 1024] @ rows.T
        block = np.arange(len(similarities))
        similarities[block, start + block] = -1.0
        nearest[start : start + 1024] = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * similarities.max(axis=1)))
    return np.maximum(nearest, _LEAST_DISTANCE)


@attrs.frozen(eq=False)
class Truth:
    """The exact answers of some queries: `wanted` results each, at least as near as `thresholds` (m,).

    Nearness is a number that is greater for nearer rows. `matching` tells the rows that may be found, all
    of them when it is None.
    """

    rows: RowFile
    queries: Floats
    metric: str
    wanted: int
    thresholds: Doubles
    matching: Mask | None

    def recall(self, found: Sequence[Sequence[bytes]]) -> float:
        """The part of the right answers that is among the keys found, over all queries."""
        if not self.wanted:
            return 1.0
        nearness, vectors = _nearness(self.metric), self.rows.vectors()
        right = 0
        for query, keys, threshold in zip(self.queries, found, self.thresholds, strict=True):
            rows = np.array(sorted({row_of(key) for key in keys}), np.int64)
            if self.matching is not None:
                rows = rows[self.matching[rows]]
            near = nearness(query[None], vectors[rows])[0] if len(rows) else np.empty(0)
            right += min(self.wanted, int(np.count_nonzero(near >= threshold)))
        return right / (self.wanted * len(found))


def find_truths(
    rows: RowFile, queries: Floats, k: int, matching: Sequence[Mask | None], metric: str = "cosine"
) -> list[Truth]:
    """The exact answers among the rows that match, for each of the masks; one pass over the rows."""
    nearness = _nearness(metric)
    best = [np.empty((len(queries), 0)) for _ in matching]
    greatest = 0.0
    for part, block in rows.blocks():
        near = nearness(queries, block)
        greatest = max(greatest, float(np.abs(near).max()))
        for number, mask in enumerate(matching):
            candidates = near if mask is None else near[:, mask[part]]
            if candidates.shape[1] > k:
                candidates = np.partition(candidates, -k, axis=1)[:, -k:]
            merged = np.concatenate([best[number], candidates], axis=1)
            merged.sort(axis=1)
            best[number] = merged[:, -k:]
    tolerance = _TOLERANCE * max(1.0, greatest)
    return [
        Truth(
            rows,
            queries,
            metric,
            wanted=nearest.shape[1],
            thresholds=nearest[:, 0] - tolerance if nearest.shape[1] else np.empty(len(queries)),
            matching=mask,
        )
        for nearest, mask in zip(best, matching, strict=True)
    ]


def _nearness(metric: str) -> Callable[[Floats, Floats], Doubles]:
    return {"cosine": _cosine, "dot": _dot, "l2": _l2}[metric]


def _cosine(queries: Floats, rows: Floats) -> Doubles:
    return unit(queries) @ unit(rows).T


def _dot(queries: Floats, rows: Floats) -> Doubles:
    return queries.astype(np.float64) @ rows.astype(np.float64).T


def _l2(queries: Floats, rows: Floats) -> Doubles:
    """The negative of the squared distance."""
    query_lengths, row_lengths = (np.square(part, dtype=np.float64).sum(axis=1) for part in (queries, rows))
    nearness: Doubles = 2.0 * _dot(queries, rows) - query_lengths[:, None] - row_lengths
    return nearness
