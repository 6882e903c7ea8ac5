"""One index against a dict and a brute-force scan, through whatever happens to it.

For a long run: `STATEFUL_EXAMPLES=200 pytest tests/index/test_stateful.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import compress
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engram.index import planner, vector_index
from engram.index.distances import METRICS
from engram.index.filters import Filter, compile_filter
from engram.index.index_state import export_indices, restore_indices
from engram.index.matching import count_matching, find_matching, find_matching_since
from engram.index.parameters import QUANTIZATIONS, Parameters
from engram.index.recall import Sample
from engram.index.search import SearchOptions, SearchResult, search_batch
from engram.index.segment import SegmentStore
from engram.index.vector_index import VectorIndex, View

Floats = npt.NDArray[np.float32]
Build = Callable[..., Any]

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "7"))

DIMENSION = 8
# Heads of small chunks that soon become segments, larger ones that are scanned by their codes, and those of
# a server, with chunks of thousands of rows.
SEAL_ROWS = [64, 64, 1024, vector_index.SEAL_ROWS]
KEYS = [b"key-%d" % number for number in range(400)]
# Those of bursts, too, so that there are several large chunks.
ALL_KEYS = [*KEYS, *(b"key-%d" % number for number in range(400, 9000))]
LARGEST_BURST = 4000
# The oldest are forgotten beyond so many.
MOMENTS = 6
# How many changes views may lag behind.
FARTHEST_BEHIND = 6

# Directions that rows lie around.
CENTERS = np.random.default_rng(5).normal(size=(12, DIMENSION))

FILTERS = [
    compile_filter(text)
    for text in (
        b".n < 50",
        b".n < 5",
        b".n == 7",
        b".n < 0",
        b".cluster == 3",
        b".cluster in [1, 2] and .n >= 20",
        b".kind == 'a' or .kind == 'b'",
        b"'x' in .tags",
        b"not (.n > 60)",
    )
]
TEXTS = [b"", b'{"n": 7, "kind": "a"}', b'{"n": 70, "kind": "b", "tags": ["x"]}', b'{"n": "5"}', b"{", b"[1]"]

# What graphs of some hundred such rows find at least.
CURVE = ((16, 0.8), (48, 0.99))

# What searches that do not say how wide to search find, on average over so many at least.
LEAST_RECALL = 0.93
FEWEST_QUERIES = 50

seeds = st.integers(0, 1 << 20)
keys = st.sampled_from(KEYS)
texts = st.sampled_from([None, *TEXTS])
# What is asked for, and which part of all rows should be in the radius.
searches = st.tuples(
    st.builds(
        lambda k, width, more: SearchOptions(k, **width, **more),
        st.sampled_from([1, 3, 10, 10, 10, 50, 1000]),
        st.sampled_from(
            [{}, {"exact": True}, {"ef": 1}, {"ef": 16}, {"ef": 64}, {"recall": 0.8}, {"recall": 0.99}]
        ),
        st.fixed_dictionaries(
            {},
            optional={
                "filter": st.sampled_from(FILTERS),
                "attributes": st.just(True),
                "vectors": st.just(True),
            },
        ),
    ),
    st.none() | st.floats(0.0, 1.0),
)


@attrs.frozen(eq=False)
class Row:
    vector: Floats
    attributes: bytes


@attrs.frozen(eq=False)
class Moment:
    """A view, and what the index held then: rows by key, oldest first.

    `present` is what it held when the view was taken, which may be some changes later. Views of one `group`
    can be searched together.
    """

    view: View
    rows: dict[bytes, Row]
    present: dict[bytes, Row]
    group: object

    @cached_property
    def wide(self) -> npt.NDArray[np.float64]:
        """The vectors of the rows."""
        return np.array([row.vector for row in self.rows.values()], np.float64).reshape(-1, DIMENSION)


@attrs.frozen(eq=False)
class Answer:
    """All rows of a moment that a query may find, nearest first, of equal ones the older first."""

    keys: list[bytes]
    distances: Floats


@lru_cache(maxsize=1 << 16)
def accepts(condition: Filter, text: bytes) -> bool:
    return condition.accepts(text)


def answer(metric: str, moment: Moment, query: Floats, options: SearchOptions) -> Answer:
    """Brute force in float64."""
    names = list(moment.rows)
    wide = moment.wide
    if options.filter is not None:
        accepted = [accepts(options.filter, row.attributes) for row in moment.rows.values()]
        names, wide = list(compress(names, accepted)), wide[accepted]
    if not names:
        return Answer([], np.empty(0, np.float32))
    asked = query.astype(np.float64)
    if metric == "l2":
        distances = np.sqrt(((wide - asked) ** 2).sum(axis=1))
        shown = distances.astype(np.float32)
    else:
        products = (wide * asked).sum(axis=1)
        distances = -products
        shown = distances.astype(np.float32)
        if metric == "cosine":
            lengths = np.sqrt((wide**2).sum(axis=1)) * np.sqrt((asked**2).sum())
            cosines = np.divide(products, lengths, out=np.zeros(len(wide)), where=lengths > 0.0)
            distances = np.rint((1.0 - cosines) * 2.0**50)
            shown = np.float32(1.0) - cosines.astype(np.float32)
    order = np.argsort(distances, kind="stable")
    if options.radius is not None:
        order = order[shown[order] <= options.radius]
    return Answer([names[place] for place in order.tolist()], shown[order])


def make_rows(random: np.random.Generator, count: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Rows and their clusters; some are zero or equal to others."""
    clusters = random.integers(0, len(CENTERS), count)
    made = CENTERS[clusters] + 0.3 * random.normal(size=(count, DIMENSION))
    made *= np.exp(random.uniform(-1.0, 1.0, (count, 1)))
    # Of such numbers products and sums are exact in float64, so that equal distances come out equal.
    made = np.round(made * 256.0) / 256.0
    kinds = random.integers(0, 20, count)
    made[kinds == 0] = 0.0
    made[kinds == 1] = made[0]
    return made.astype(np.float32), clusters


class SearchMachine(RuleBasedStateMachine):
    """Exact searches agree with brute force, others nearly do; all that is returned is true."""

    def __init__(
        self, metric: str, quantization: str, store: SegmentStore, build: Build, found: list[float]
    ) -> None:
        super().__init__()
        # Of each search that might have missed something, which part it found.
        self.found = found
        self.metric = metric
        self.store = store
        self.build = build
        self.patch = pytest.MonkeyPatch()
        self.parameters = Parameters(DIMENSION, metric, 8, 32, quantization)
        self.seal_rows = SEAL_ROWS[0]
        self.index = VectorIndex(1, self.parameters)
        self.life: object = object()
        # In the order of their age.
        self.rows: dict[bytes, Row] = {}
        self.moments: list[Moment] = []
        # What it held after each of the last changes, by LSN.
        self.past: list[tuple[int, dict[bytes, Row]]] = [(1, {})]
        self.pending: Any = None
        self.lsn = 1
        self.walked = False

    def teardown(self) -> None:
        self.patch.undo()

    @initialize(
        seal_rows=st.sampled_from(SEAL_ROWS),
        walked=st.sampled_from([True, True, True, False]),
        seed=seeds,
        parts=st.integers(0, 4),
    )
    def begin(self, seal_rows: int, walked: bool, seed: int, parts: int) -> None:
        self.seal_rows = seal_rows
        self.index = VectorIndex(1, self.parameters, seal_rows=seal_rows)
        self.walked = walked
        if walked:
            # Otherwise segments are so small that they are scanned, and their curves are empty.
            self.patch.setattr(Sample, "measure", lambda *_: CURVE)
            self.patch.setattr(planner, "SCAN_ROWS_PER_EXPANSION", 0)
            self.patch.setattr(planner, "PICKED_ROWS_PER_EXPANSION", 0.25)
        if self.large:
            self.load_beside_readers(0, [1000 * (1 + (seed >> 2 * part) % 4) for part in range(parts)], seed)
            parts = 0
        for part in range(parts):
            self.add_run(100 * part, 100, seed + part, attributes=True)
            if self.index.needs_maintenance:
                self.begin_build()
                self.install()

    def put(self, names: Sequence[bytes], matrix: Floats, given: Sequence[bytes | None]) -> None:
        self.lsn += 1
        new = len(set(names) - set(self.rows))
        assert self.index.add(self.lsn, names, matrix, given) == new
        for place, name in enumerate(names):
            self.rows.pop(name, None)
            self.rows[name] = Row(matrix[place].copy(), (given[place] if given else None) or b"")
        self.remember()

    def remember(self) -> None:
        self.past = [*self.past[-FARTHEST_BEHIND:], (self.lsn, dict(self.rows))]

    @property
    def large(self) -> bool:
        return self.seal_rows == vector_index.SEAL_ROWS

    @rule(start=st.integers(0, len(KEYS)), count=st.integers(1, 200), seed=seeds, attributes=st.booleans())
    def add_run(self, start: int, count: int, seed: int, attributes: bool) -> None:
        self.add([KEYS[(start + step) % len(KEYS)] for step in range(count)], seed, attributes)

    @precondition(lambda self: self.large)
    @rule(
        start=st.integers(0, len(ALL_KEYS)),
        count=st.integers(1000, LARGEST_BURST),
        seed=seeds,
        attributes=st.booleans(),
    )
    def add_burst(self, start: int, count: int, seed: int, attributes: bool) -> None:
        self.add([ALL_KEYS[(start + step) % len(ALL_KEYS)] for step in range(count)], seed, attributes)

    @precondition(lambda self: self.large)
    @rule(
        start=st.integers(0, len(ALL_KEYS)),
        counts=st.lists(st.integers(1000, LARGEST_BURST), min_size=2, max_size=3),
        seed=seeds,
    )
    def load_beside_readers(self, start: int, counts: Sequence[int], seed: int) -> None:
        """One client loads and looks at its rows at once, another sees them later."""
        asked: list[tuple[SearchOptions, float | None]] = [
            (SearchOptions(10, exact=True), None),
            (SearchOptions(10, exact=True, filter=FILTERS[0]), None),
        ]
        for count in counts:
            self.add_burst(start, count, seed, attributes=True)
            start += count
            for behind in (0, 1, 2):
                moment = self.now(behind)
                self.ask([moment], moment, seed, asked)

    def add(self, names: Sequence[bytes], seed: int, attributes: bool) -> None:
        random = np.random.default_rng(seed)
        count = len(names)
        matrix, clusters = make_rows(random, count)
        given: list[bytes | None] = []
        if attributes:
            numbers = random.integers(0, 100, count).tolist()
            given = [
                b'{"n": %d, "cluster": %d, "kind": "%c"}' % (number, cluster, 97 + number % 5)
                for number, cluster in zip(numbers, clusters.tolist(), strict=True)
            ]
        self.put(names, matrix, given)

    @rule(key=keys, seed=seeds, text=texts)
    def add_one(self, key: bytes, seed: int, text: bytes | None) -> None:
        self.put((key,), make_rows(np.random.default_rng(seed), 1)[0], () if text is None else (text,))

    @rule(given=st.lists(st.tuples(st.sampled_from(KEYS[:6]), texts), min_size=2, max_size=8), seed=seeds)
    def add_keys_more_than_once(self, given: list[tuple[bytes, bytes | None]], seed: int) -> None:
        matrix, _ = make_rows(np.random.default_rng(seed), len(given))
        self.put([key for key, _ in given], matrix, [text for _, text in given])

    @precondition(lambda self: self.rows)
    @rule(place=st.integers(0, 1 << 16), text=texts)
    def change_attributes(self, place: int, text: bytes | None) -> None:
        key = list(self.rows)[place % len(self.rows)]
        vector = self.index.vector(key)
        assert vector is not None
        self.put((key,), np.frombuffer(vector, np.float32)[None], (text,))

    @rule(start=st.integers(0, len(KEYS)), count=st.integers(1, 150), step=st.sampled_from([1, 1, 2, 7]))
    def delete(self, start: int, count: int, step: int) -> None:
        self.lsn += 1
        names = [KEYS[(start + step * number) % len(KEYS)] for number in range(count)]
        assert self.index.delete(self.lsn, names) == len(set(names) & set(self.rows))
        for name in names:
            self.rows.pop(name, None)
        self.remember()

    @precondition(lambda self: self.pending is None and self.index.needs_maintenance)
    @rule()
    def begin_build(self) -> None:
        self.pending = self.build(self.index)

    @precondition(lambda self: self.pending is None and not self.index.optimized)
    @rule()
    def begin_optimization(self) -> None:
        self.pending = self.build(self.index, self.index.plan_optimization())

    @precondition(lambda self: self.pending is not None)
    @rule()
    def install(self) -> None:
        self.lsn += 1
        for name in self.pending.install(self.lsn, self.index):
            # Views of it go on.
            self.store.remove(name)
        self.pending = None
        self.remember()

    @precondition(lambda self: self.pending is None and self.index.needs_maintenance)
    @rule()
    def build_all(self) -> None:
        while self.index.needs_maintenance:
            self.begin_build()
            self.install()

    @precondition(lambda self: self.pending is None and not self.index.optimized)
    @rule()
    def optimize(self) -> None:
        self.begin_optimization()
        self.install()
        assert self.index.optimized

    @rule()
    def restart(self) -> None:
        (self.index,) = restore_indices(*export_indices([self.index]), self.store, seal_rows=self.seal_rows)
        self.life = object()
        self.past = []
        self.remember()

    @rule(behind=st.integers(0, FARTHEST_BEHIND))
    def take_view(self, behind: int) -> None:
        self.moments = [*self.moments[1 - MOMENTS :], self.now(behind)]

    def now(self, behind: int = 0) -> Moment:
        """The present, or some changes earlier, if views can still show that."""
        shown = [(lsn, rows) for lsn, rows in self.past if lsn >= self.index.oldest_view]
        lsn, rows = shown[-1 - behind % len(shown)]
        view = self.index.view(lsn)
        return Moment(view, rows, self.past[-1][1], (self.life, view.generation))

    def moment(self, number: int) -> Moment:
        """One of those kept, or the present."""
        moments = [self.now(), *self.moments]
        return moments[number % len(moments)]

    @rule()
    def read(self) -> None:
        assert len(self.index) == len(self.rows)
        for key in ALL_KEYS[:: 10 if self.large else 1]:
            row = self.rows.get(key)
            assert (key in self.index) == (row is not None)
            assert self.index.vector(key) == (row.vector.tobytes() if row else None)
            assert self.index.attributes(key) == (row.attributes if row else b"")

    @rule(count=st.integers(1, 1000))
    def scan(self, count: int) -> None:
        cursor, found = self.index.scan(0, count)
        while cursor:
            cursor, more = self.index.scan(cursor, count)
            found += more
        assert sorted(found) == sorted(self.rows)

    @rule(number=st.integers(0, MOMENTS), condition=st.sampled_from(FILTERS))
    def match(self, number: int, condition: Filter) -> None:
        moment = self.moment(number)
        expected = [key for key, row in moment.rows.items() if accepts(condition, row.attributes)]
        found = find_matching(moment.view, condition)
        assert found.keys == expected
        assert found.row_ids == sorted(found.row_ids)
        assert count_matching(moment.view, condition) == len(expected)
        since = find_matching_since(self.index, moment.view.next_row, condition)
        assert since.keys == [
            key
            for key, row in self.rows.items()
            if moment.present.get(key) is not row and accepts(condition, row.attributes)
        ]

    @rule(
        number=st.integers(0, MOMENTS),
        behind=st.integers(0, FARTHEST_BEHIND),
        seed=seeds,
        asked=st.lists(searches, min_size=1, max_size=4),
    )
    def search(
        self, number: int, behind: int, seed: int, asked: list[tuple[SearchOptions, float | None]]
    ) -> None:
        chosen = self.moment(number)
        together = [moment for moment in (*self.moments, self.now()) if moment.group == chosen.group]
        self.ask([*together, chosen, *together], chosen, seed, asked)
        # Whoever lags behind does not search together with those who see all.
        lagging = self.now(behind)
        self.ask([lagging], lagging, seed, asked)

    def ask(
        self,
        moments: Sequence[Moment],
        chosen: Moment,
        seed: int,
        asked: list[tuple[SearchOptions, float | None]],
    ) -> None:
        for options, part in asked:
            queries = self.queries(seed, chosen, len(moments))
            if part is not None:
                # As far as one of the rows is, which is then inside.
                everything = answer(self.metric, chosen, queries[0], options).distances
                radius = float(everything[int(part * (len(everything) - 1))]) if len(everything) else 1.0
                options = attrs.evolve(options, radius=radius)
            self.check(moments, queries, options)

    def check(self, moments: Sequence[Moment], queries: Floats, options: SearchOptions) -> None:
        results = search_batch([moment.view for moment in moments], queries, options, 0)
        assert len(results) == len(moments)
        for moment, query, result in zip(moments, queries, results, strict=True):
            self.compare(moment, answer(self.metric, moment, query, options), result, options)

    def queries(self, seed: int, moment: Moment, count: int) -> Floats:
        """Some near the rows, some the same as one, perhaps one of zeros."""
        random = np.random.default_rng(seed)
        queries, _ = make_rows(random, count)
        names = list(moment.rows)
        for number in range(0, count, 3):
            if names:
                queries[number] = moment.rows[names[int(random.integers(len(names)))]].vector
        return queries

    def compare(self, moment: Moment, truth: Answer, result: SearchResult, options: SearchOptions) -> None:
        distances = np.array(result.distances, np.float32)
        place = {key: number for number, key in enumerate(truth.keys)}
        places = [place[key] for key in result.keys]
        assert places == sorted(set(places))
        assert distances.tolist() == truth.distances[places].tolist()
        rows = [moment.rows[key] for key in result.keys]
        assert result.attributes == ([row.attributes for row in rows] if options.attributes else [])
        assert result.vectors == ([row.vector.tobytes() for row in rows] if options.vectors else [])

        count = min(options.k, len(truth.keys))
        if options.exact:
            assert places == list(range(count))
        elif options.radius is None:
            assert len(places) == count
        if self.walked and count and not options.exact and options.ef is None:
            near = np.count_nonzero(distances <= truth.distances[count - 1])
            self.found.append(near / count)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_is_a_dict_searched_by_brute_force(
    metric: str, quantization: str, store: SegmentStore, build: Build
) -> None:
    found: list[float] = []

    class Machine(SearchMachine):
        def __init__(self) -> None:
            super().__init__(metric, quantization, store, build, found)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
    if len(found) >= FEWEST_QUERIES:
        assert np.mean(found) >= LEAST_RECALL
