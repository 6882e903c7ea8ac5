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
from typing import Any
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
from engram.index.row_columns import (
    ROW_COLUMNS,
    NumberColumn,
    RowSource,
    StringColumn,
    numbers_of,
)
from engram.index.texts import Positions, Selection, Strings, Texts
from engram.progress import Progress

GRAPH = "graph.usearch"
VECTORS = "vectors.npy"

# What is written before the graph is built, in this order: vectors, most of the bytes, come last.
_WRITTEN = sorted(ROW_COLUMNS, key=lambda column: isinstance(column, NumberColumn) and column.wide)
ROW_FILES = tuple(f"{name}.npy" for column in _WRITTEN for name in column.arrays)

_COPIED_BYTES = 1 << 20


@attrs.frozen(eq=False)
class Segment:
    """An opened segment of `size` bytes; its files may be unlinked while it is used.

    Each of ROW_COLUMNS is an attribute. `graphs` holds one view of the graph for each search worker. `curve`
    holds pairs of an ef and the recall@10 measured at it, both increasing; it is empty where graphs are too
    small to be searched.
    """

    id: str
    path: Path
    checksum: int
    index_id: int
    parameters: Parameters
    curve: Curve
    row_ids: npt.NDArray[np.int64]
    keys: Texts
    vectors: Floats
    attributes: Texts
    norms: Doubles
    graphs: tuple[Graph, ...]
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

    def strings_at(self, column: StringColumn, positions: Positions) -> list[bytes]:
        """The strings of the rows at these positions."""
        return self._texts(column).at(positions)

    def strings_of(self, column: StringColumn, positions: Positions) -> Selection:
        """The same, to be copied block by block."""
        return Selection(self._texts(column), positions)

    def _texts(self, column: StringColumn) -> Texts:
        texts: Texts = getattr(self, column.name)
        return texts


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


Parts = Sequence[tuple[RowSource, Positions]]
"""Rows at positions of sources."""


def _number_bytes(column: NumberColumn, parts: Parts) -> Iterator[memoryview]:
    for source, positions in parts:
        numbers = numbers_of(source, column)
        step = max(1, _COPIED_BYTES // numbers.strides[0])
        for start in range(0, len(positions), step):
            yield _bytes(numbers[positions[start : start + step]])


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
        parameters = Parameters(**metadata["parameters"])
        rows: dict[str, Any] = {column.name: column.open(columns) for column in ROW_COLUMNS}
        vectors: Floats = rows["vectors"]
        shape = (len(rows["row_ids"]), parameters.dimension)
        if vectors.dtype != np.float32 or vectors.shape != shape:
            # Their checksum may not have been compared.
            raise DamagedDataError(path / VECTORS, f"does not hold {shape[0]} rows of {shape[1]} float32")
        quantizer = Quantizer(
            parameters.metric, parameters.quantization, metadata["scale"], np.array(columns["center"])
        )
        graphs = tuple(Graph.open(path / GRAPH, parameters, quantizer) for _ in range(self._views))
        if any(len(graph) != len(vectors) for graph in graphs):
            raise DamagedDataError(path / GRAPH, "does not have as many nodes as the segment has rows")
        segment = Segment(
            id=segment_id,
            path=path,
            checksum=checksum,
            index_id=metadata["index"],
            parameters=parameters,
            curve=tuple((expansion, recall) for expansion, recall in metadata["curve"]),
            norms=columns["norms"],
            graphs=graphs,
            attribute_columns=unpack_attributes(columns, metadata["attributes"], rows["attributes"]),
            size=opened.size,
            folder=opened,
            **rows,
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
        for column in _WRITTEN:
            if isinstance(column, NumberColumn):
                self._write_numbers(path, column, parts, rows)
            else:
                self._write_strings(path, column, parts)
        return rows

    def _write_numbers(self, path: Path, column: NumberColumn, parts: Parts, rows: int) -> None:
        (name,) = column.arrays
        shape = rows, *numbers_of(parts[0][0], column).shape[1:]
        self._write_array(path, name, column.dtype, shape, _number_bytes(column, parts))

    def _write_strings(self, path: Path, column: StringColumn, parts: Parts) -> None:
        """Takes the strings twice, so that none is held for long."""
        joined, stops = column.arrays

        def strings() -> Iterator[Selection | Strings]:
            return (source.strings_of(column, positions) for source, positions in parts)

        ends = np.cumsum(np.concatenate([part.lengths for part in strings()]), dtype=np.int64)
        data = (_bytes(block) for part in strings() for block in part.blocks())
        self._write_array(path, joined, np.uint8, (int(ends[-1]),), data)
        self._write_array(path, stops, np.int64, ends.shape, [_bytes(ends)])

    def _write_array(
        self,
        path: Path,
        name: str,
        dtype: type[np.generic],
        shape: tuple[int, ...],
        data: Iterable[memoryview],
    ) -> None:
        header = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(header, description)
        self.files.write_file(path / f"{name}.npy", chain([header.getvalue()], data))

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
