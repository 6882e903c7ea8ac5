"""Segments: immutable rows of an index with a graph, as files that are mapped.

A segment folder is an `engram.columns` folder:

    row-ids                (n,) int64, increasing
    keys-bytes, keys-ends  the key of each row
    attributes-...         the JSON text of each row, empty when it has none
    attribute-...          the same as columns, where there are any (`engram.index.attributes`)
    vectors                (n, dimension) float32
    norms                  (n,) float64
    center                 (dimension,) float32, the quantizer's
    graph.usearch          the HNSW graph; nodes are row positions

The metadata names the index, its parameters, the quantizer's scale and the measured recall curve. While the
graph is being built, a folder `<id>.building` holds the rows.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import attrs
import numpy as np
import numpy.typing as npt

from engram.columns import Array, ColumnFolder, open_columns
from engram.descriptors import NO_LIMITS, DescriptorLimits, in_use
from engram.errors import DamagedDataError
from engram.files import Files
from engram.index.attributes import AttributeColumns, unpack_attributes
from engram.index.distances import Doubles, Floats
from engram.index.graph import Graph, Quantizer
from engram.index.masks import MaskCache
from engram.index.parameters import Parameters
from engram.index.recall import Curve, expansion_for
from engram.index.texts import Positions, Selection, Strings, Texts
from engram.progress import Progress

GRAPH = "graph.usearch"
VECTORS = "vectors.npy"

# What is written before the graph is built.
ROW_FILES = (
    "row-ids.npy",
    "keys-bytes.npy",
    "keys-ends.npy",
    "attributes-bytes.npy",
    "attributes-ends.npy",
    VECTORS,
)

_COPIED_BYTES = 1 << 20


class RowSource(Protocol):
    """Rows by position: a chunk of the head, or a segment."""

    @property
    def row_ids(self) -> npt.NDArray[np.int64]: ...

    @property
    def vectors(self) -> Floats: ...

    def keys_of(self, positions: Positions) -> Selection | Strings: ...

    def attributes_of(self, positions: Positions) -> Selection | Strings: ...


@attrs.frozen(eq=False)
class Segment:
    """An opened segment of `size` bytes; its files may be unlinked while it is used.

    `graphs` holds one view of the graph for each search worker. `curve` holds pairs of an ef and the
    recall@10 measured at it, both increasing; it is empty where graphs are too small to be searched.
    """

    id: str
    path: Path
    checksum: int
    index_id: int
    parameters: Parameters
    curve: Curve
    row_ids: npt.NDArray[np.int64]
    vectors: Floats
    norms: Doubles
    graphs: tuple[Graph, ...]
    keys: Texts
    attributes: Texts
    attribute_columns: AttributeColumns
    size: int
    _folder: ColumnFolder
    masks: MaskCache = attrs.field(factory=MaskCache, init=False)

    @property
    def descriptors(self) -> int:
        """How many files it keeps open, about."""
        return len(self.graphs) + self._folder.descriptors

    def verify_vectors(self) -> None:
        """Compares the checksum of the vectors (blocking: it reads them all).

        Raises:
            DamagedDataError: they are not what was written.
        """
        self._folder.verify(VECTORS)

    def expansion_for(self, recall: float) -> int:
        """The least ef that reaches a recall in (0, 1], 0 when none does: then the segment is scanned."""
        return expansion_for(self.curve, recall)

    def position(self, row_id: int) -> int:
        """Where a row is that is known to be here."""
        return int(self.row_ids.searchsorted(row_id))

    def norms_at(self, positions: Positions) -> Doubles:
        """The norms of the rows at these positions."""
        return self.norms[positions]

    def keys_at(self, positions: Positions) -> list[bytes]:
        """The keys of the rows at these positions."""
        return self.keys.at(positions)

    def attributes_at(self, positions: Positions) -> list[bytes]:
        """The JSON texts of the rows at these positions, empty for those without."""
        return self.attributes.at(positions)

    def keys_of(self, positions: Positions) -> Selection:
        """The keys of the rows at these positions, as arrays."""
        return Selection(self.keys, positions)

    def attributes_of(self, positions: Positions) -> Selection:
        """The JSON texts of the rows at these positions, as arrays."""
        return Selection(self.attributes, positions)


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


Parts = Sequence[tuple[RowSource, Positions]]
"""Rows at positions of sources."""


def _vector_bytes(parts: Parts) -> Iterator[memoryview]:
    for source, positions in parts:
        step = max(1, _COPIED_BYTES // (4 * source.vectors.shape[1]))
        for start in range(0, len(positions), step):
            yield _bytes(source.vectors[positions[start : start + step]])


class SegmentStore:
    """The folder of segments: its path, or what gives the path, which is another once the folder was lost.

    `views` is the number of search workers; with 0 no graph is opened, and segments cannot be searched.
    `progress` is told of segments that are opened again. `limits` are of the files that are open.
    """

    def __init__(
        self,
        folder: Path | Callable[[], Path],
        files: Files,
        views: int,
        progress: Progress | None = None,
        limits: DescriptorLimits = NO_LIMITS,
    ) -> None:
        self._folder = folder
        self.files = files
        self._views = views
        self._progress = progress or Progress()
        self._limits = limits
        self._adopted: dict[str, Segment] = {}
        self._opened: WeakValueDictionary[str, Segment] = WeakValueDictionary()
        self._reopening: dict[str, Future[Segment]] = {}
        self._unverified: WeakSet[Segment] = WeakSet()

    @property
    def folder(self) -> Path:
        """Where segments are by now. Raises OSError when they can be nowhere."""
        return self._folder() if callable(self._folder) else self._folder

    def open(self, segment_id: str, checksum: int) -> Segment:
        """Opens a segment (blocking); every file is read and its checksum compared.

        A damaged graph would end the process; damaged rows or keys would give wrong answers.

        Raises:
            DamagedDataError: a file is missing or is not what was written.
        """
        return self._open(segment_id, checksum, ())

    def _open(self, segment_id: str, checksum: int, deferred: Container[str]) -> Segment:
        path = self.folder / segment_id
        opened = open_columns(path, checksum, deferred=deferred)
        metadata: dict[str, Any] = opened.metadata
        columns = opened.columns
        vectors = columns["vectors"]
        shape = (len(columns["row-ids"]), metadata["parameters"]["dimension"])
        if vectors.dtype != np.float32 or vectors.shape != shape:
            # Their checksum may not have been compared.
            raise DamagedDataError(path / VECTORS, f"does not hold {shape[0]} rows of {shape[1]} float32")
        attributes = Texts(columns["attributes-bytes"], columns["attributes-ends"])
        parameters = Parameters(**metadata["parameters"])
        quantizer = Quantizer(
            parameters.metric, parameters.quantization, metadata["scale"], np.array(columns["center"])
        )
        graphs = tuple(Graph.open(path / GRAPH, parameters, quantizer) for _ in range(self._views))
        if any(len(graph) != len(columns["row-ids"]) for graph in graphs):
            raise DamagedDataError(path / GRAPH, "does not have as many nodes as the segment has rows")
        segment = Segment(
            segment_id,
            path,
            checksum,
            metadata["index"],
            parameters,
            tuple((expansion, recall) for expansion, recall in metadata["curve"]),
            columns["row-ids"],
            vectors,
            columns["norms"],
            graphs,
            Texts(columns["keys-bytes"], columns["keys-ends"]),
            attributes,
            unpack_attributes(columns, metadata["attributes"], attributes),
            opened.size,
            opened,
        )
        self._opened[segment_id] = segment
        return segment

    def _reopen(self, segment_id: str, checksum: int) -> Segment:
        """As `open`, but the vectors, most of what there is, are left to `verify`."""
        # Without views the graph is not used.
        segment = self._open(segment_id, checksum, (VECTORS,) if self._views else (VECTORS, GRAPH))
        self._unverified.add(segment)
        return segment

    def verify(self, segment: Segment) -> None:
        """Compares the checksum of the vectors, unless it has been (blocking).

        Raises:
            DamagedDataError: they are not what was written.
        """
        if segment in self._unverified:
            segment.verify_vectors()
            self._unverified.discard(segment)

    @contextmanager
    def reopening(self, segments: Mapping[str, int]) -> Iterator[None]:
        """Opens segments, given by id and checksum, in threads meanwhile; `take` waits for them."""
        if not segments:
            yield
            return
        self._progress.begin("opening segments", sum(map(self.size, segments)))
        pool = ThreadPoolExecutor(min(len(segments), os.cpu_count() or 1))
        try:
            # Without memory for a thread, `take` opens them.
            with suppress(RuntimeError):
                for segment_id, checksum in segments.items():
                    self._reopening[segment_id] = pool.submit(self._reopen, segment_id, checksum)
            yield
        finally:
            self._reopening = {}
            pool.shutdown(cancel_futures=True)

    def building(self, segment_id: str) -> Path:
        """The folder of a segment that is not finished."""
        return self.folder / f"{segment_id}.building"

    def check_descriptors(self) -> None:
        """Raises OSError (EMFILE) when the limit of open files leaves no room for one more segment."""
        segments = [reference() for reference in self._opened.valuerefs()]
        taken = sum(segment.descriptors for segment in segments if segment is not None)
        if taken + self._views > self._limits.segments or in_use() + self._views > self._limits.numbers:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def write_rows(self, segment_id: str, parts: Parts) -> int:
        """Writes `ROW_FILES` of a segment to be built, from the rows at these positions (blocking).

        Returns how many rows there are; when there is none, nothing is written. Vectors and texts are copied
        block by block: they may be many times what memory has room for. Raises OSError.
        """
        rows = sum(len(positions) for _, positions in parts)
        if not rows:
            return 0
        path = self.building(segment_id)
        self.files.make_folder(path)
        dimension = parts[0][0].vectors.shape[1]
        self._write_column(
            path, "row-ids", np.concatenate([source.row_ids[wanted] for source, wanted in parts])
        )
        self._write_texts(path, "keys", lambda: (source.keys_of(wanted) for source, wanted in parts))
        self._write_texts(
            path, "attributes", lambda: (source.attributes_of(wanted) for source, wanted in parts)
        )
        self._write_array(path / VECTORS, np.dtype(np.float32), (rows, dimension), _vector_bytes(parts))
        return rows

    def _write_texts(self, path: Path, name: str, parts: Callable[[], Iterable[Selection | Strings]]) -> None:
        """Writes the two columns of strings; `parts` gives them, twice, so that none is held for long."""
        ends = np.cumsum(np.concatenate([part.lengths for part in parts()]), dtype=np.int64)
        data = (_bytes(block) for part in parts() for block in part.blocks())
        self._write_array(path / f"{name}-bytes.npy", np.dtype(np.uint8), (int(ends[-1]),), data)
        self._write_column(path, f"{name}-ends", ends)

    def _write_column(self, path: Path, name: str, column: Array) -> None:
        self._write_array(path / f"{name}.npy", column.dtype, column.shape, [_bytes(column)])

    def _write_array(
        self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], data: Iterable[memoryview]
    ) -> None:
        header = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(header, description)
        self.files.write_file(path, chain([header.getvalue()], data))

    def adopt(self, segment: Segment) -> None:
        """Keeps an opened segment for `take`."""
        self._adopted[segment.id] = segment

    def take(self, segment_id: str, checksum: int) -> Segment:
        """The adopted segment of that id, else one that is opened again (which blocks).

        The checksum of its vectors is then still to be compared, by `verify`: reading them all would take
        most of the time of a start.

        Raises:
            DamagedDataError: a file is missing or is not what was written.
            InterruptedWorkError: the progress was interrupted.
        """
        adopted = self._adopted.pop(segment_id, None)
        if adopted is not None:
            return adopted
        reopening = self._reopening.pop(segment_id, None)
        if reopening is None:
            return self._reopen(segment_id, checksum)
        segment = reopening.result()
        self._progress.advance(segment.size)
        return segment

    def discard(self, segment_id: str) -> None:
        """Forgets an adopted segment that was not taken."""
        self._adopted.pop(segment_id, None)

    def is_open(self, segment_id: str) -> bool:
        """Whether anything, a search for one, still refers to a segment that was opened here.

        When its files are removed before, the last to let go of it waits until the system has given back
        what it kept of them in memory: 60 ms for 400 MB.
        """
        return segment_id in self._opened

    def size(self, segment_id: str) -> int:
        """Bytes of a finished segment's files (blocking); those that are removed meanwhile may not count."""
        total = 0
        with suppress(FileNotFoundError), os.scandir(self.folder / segment_id) as files:
            for file in files:
                with suppress(FileNotFoundError):
                    total += file.stat().st_size
        return total

    def remove(self, segment_id: str) -> None:
        """Deletes the files of a segment, finished or not (blocking); without any it does nothing."""
        self.files.remove_tree(self.building(segment_id))
        self.files.remove_tree(self.folder / segment_id)
