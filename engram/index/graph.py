"""HNSW graphs: the one module that touches usearch.

usearch trusts its callers and its files: a flipped bit in a file, a `remove` on a view or a missing path
corrupt or end the process. So only two things are offered here: building a graph, in a process made for
that, and searching a file whose checksum has been compared.
"""

from __future__ import annotations

import errno
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
from usearch.compiled import MetricKind, ScalarKind
from usearch.index import Index

from engram.columns import Array
from engram.index.distances import TINY_NORM, Doubles, Floats
from engram.index.parameters import Parameters
from engram.index.texts import Positions

# The rest of the numbers are held finer when the largest few are clipped.
_PERCENTILE = 99.95
# No more of the squares of all numbers is lost by that; of the normal distribution it is 0.0001.
_MOST_CLIPPED = 0.01
# Rows so many times longer than most are clipped.
_LONGEST = 16.0
_SAMPLE_ROWS = 4096
_SAMPLE_NUMBERS = 1 << 22
_ADD_NUMBERS = 1 << 20
# Of bf16 and f32: the products of 65,536 such numbers have a sum in float32.
_LARGEST = np.float32(1e16)

_SCALARS = {"int8": ScalarKind.I8, "bf16": ScalarKind.BF16, "f32": ScalarKind.F32}


@attrs.frozen(eq=False)
class Quantizer:
    """How rows and queries are written in a graph, and what it orders them by.

    cosine: unit rows, by inner product. l2: rows less `center`, their median, by squared Euclidean distance.
    dot: rows as they are, by inner product. "int8" multiplies by `scale`, rounds, and clips to -127..127;
    "bf16" and "f32" are rounded by usearch.
    """

    metric: str
    quantization: str
    scale: float
    center: Floats

    @classmethod
    def fit(cls, parameters: Parameters, rows: Floats, norms: Doubles) -> Quantizer:
        """The quantizer for these rows, shape (n, dimension), with their norms (n,)."""
        step = max(1, len(rows) // min(_SAMPLE_ROWS, max(64, _SAMPLE_NUMBERS // parameters.dimension)))
        # In float64 nothing overflows that float32 holds.
        sample, sample_norms = rows[::step].astype(np.float64), norms[::step]
        center = np.zeros(parameters.dimension, np.float32)
        if parameters.metric == "l2":
            # Unlike the mean it is near the rows even if a few are far from all others.
            center = np.median(sample, axis=0).astype(np.float32)
        quantizer = cls(parameters.metric, parameters.quantization, 1.0, center)
        if parameters.quantization != "int8":
            return quantizer
        prepared = _unit(sample, sample_norms) if parameters.metric == "cosine" else sample - center
        lengths = np.sqrt(np.vecdot(prepared, prepared))
        long = lengths > TINY_NORM
        if not long.any():
            return quantizer
        lengths = lengths[long]
        # Clipping would hurt the longest rows, which win dot, and of which l2 tells the neighbours apart by
        # as much as they are long.
        longest = min(float(lengths.max()), _LONGEST * float(np.median(lengths)))
        shares = (np.abs(prepared[long]) / lengths[:, None]).astype(np.float32)
        return attrs.evolve(quantizer, scale=127.0 / (_greatest_share(shares) * longest))

    def encode(self, rows: Floats, norms: Doubles) -> Array:
        """Rows, shape (n, dimension), with their norms (n,), as the graph takes them."""
        with np.errstate(over="ignore"):
            return self._round(self._prepare(rows, norms), self.scale)

    def encode_queries(self, queries: Floats, norms: Doubles) -> Array:
        """Queries, shape (n, dimension), with their norms (n,), as the graph takes them."""
        if self.metric != "dot":
            return self.encode(queries, norms)
        prepared = self._prepare(queries, norms)
        # However long a query is, it orders the rows in the same way.
        return self._round(_unit(prepared, np.abs(prepared).max(axis=1).astype(np.float64)), 127.0)

    def _prepare(self, rows: Floats, norms: Doubles) -> Floats:
        if self.metric == "cosine":
            return _unit(rows, norms)
        if self.metric == "l2":
            return rows - self.center
        return np.ascontiguousarray(rows)

    def _round(self, prepared: Floats, scale: float) -> Array:
        if self.quantization != "int8":
            # Sums of their products are numbers.
            return np.clip(prepared, -_LARGEST, _LARGEST)
        scaled = prepared * np.float32(scale)
        np.rint(scaled, out=scaled)
        return np.clip(scaled, -127.0, 127.0, out=scaled).astype(np.int8)


def _unit(rows: npt.NDArray[np.floating], lengths: Doubles) -> Floats:
    """Rows divided by their lengths, zeros for those without."""
    unit: Floats = np.divide(rows, lengths[:, None], out=np.zeros(rows.shape), where=lengths[:, None] > 0.0)
    return unit.astype(np.float32)


def _greatest_share(shares: Floats) -> float:
    """The part of a row's length from which on numbers are clipped, in (0, 1].

    `shares` holds the numbers of rows, as parts of the lengths of these: the squares of a row's have the
    sum 1. Zeros say nothing: of sparse rows nearly all numbers are.
    """
    share = float(np.percentile(shares[shares > 0.0], _PERCENTILE))
    clipped = np.maximum(shares - np.float32(share), np.float32(0.0))
    if np.vdot(clipped, clipped) > _MOST_CLIPPED * len(shares):
        # It is not a few that are large: what is left would not be these rows any more.
        share = float(shares.max())
    return share


def _empty_index(parameters: Parameters) -> Index:
    return Index(
        ndim=parameters.dimension,
        metric=MetricKind.L2sq if parameters.metric == "l2" else MetricKind.IP,
        dtype=_SCALARS[parameters.quantization],
        connectivity=parameters.connectivity,
        expansion_add=parameters.expansion,
        # A node's key is its position. The table that finds a node by its key would take time and memory.
        enable_key_lookups=False,
    )


class Graph:
    """A graph that can be searched, by one thread at a time."""

    def __init__(self, index: Index, quantizer: Quantizer) -> None:
        # The wrapper empties the compiled object when it is collected: it must live as long.
        self._index = index
        self._compiled = index._compiled
        self._quantizer = quantizer

    @classmethod
    def open(cls, path: Path, parameters: Parameters, quantizer: Quantizer) -> Graph:
        """Maps a graph file, whose checksum must have been compared (blocking, and holds the GIL).

        Raises:
            OSError: there is no such file, or it cannot be mapped.
        """
        # usearch closes descriptor 0 when it cannot open the file.
        path.open("rb").close()
        index = _empty_index(parameters)
        try:
            index.view(path)
        except RuntimeError as error:
            # The file is what was written: it is the system that does not map it.
            raise OSError(errno.ENOMEM, str(error), str(path)) from error
        return cls(index, quantizer)

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries: Floats, norms: Doubles, count: int, expansion: int) -> Positions:
        """Positions of up to `count` near rows for each query, shape (n, count), -1 where there are fewer.

        `queries` is (n, dimension), with their norms (n,).
        """
        self._compiled.expansion_search = max(expansion, count)
        encoded = self._quantizer.encode_queries(queries, norms)
        keys, _, counts, _, _ = self._compiled.search_many(encoded, count, exact=False, threads=1)
        positions: Positions = keys.astype(np.int64)
        if counts.min() < count:
            positions[np.arange(count) >= counts[:, None]] = -1
        return positions


class GraphBuilder:
    """A graph that grows. `save` and adding hold the GIL or run for long: for a process of its own."""

    def __init__(self, parameters: Parameters, quantizer: Quantizer) -> None:
        self._index = _empty_index(parameters)
        self._quantizer = quantizer

    @property
    def graph(self) -> Graph:
        """What has been added so far, to be searched."""
        return Graph(self._index, self._quantizer)

    def add(self, positions: Positions, rows: Floats, norms: Doubles) -> None:
        """Adds the rows at `positions` of `rows` (n, dimension) with their norms (n,)."""
        step = max(1, _ADD_NUMBERS // rows.shape[1])
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            encoded = self._quantizer.encode(rows[part], norms[part])
            # Adding with several threads can leave nodes that no search reaches.
            self._index.add(part.astype(np.uint64), encoded, threads=1)

    def save(self, path: Path) -> None:
        """Writes the graph file; it is not synced.

        Raises:
            OSError: it cannot be written, or is not as long as it should be: usearch does not notice every
                full disk.
        """
        try:
            self._index.save(path)
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from error
        size, expected = path.stat().st_size, self._index.serialized_length
        if size != expected:
            raise OSError(f"{path} has {size} bytes instead of {expected}: is the disk full?")
