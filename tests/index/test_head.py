from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index.distances import Queries
from engram.index.filters import compile_filter
from engram.index.head import ALIVE, Chunk, Head
from engram.index.matching import chunk_mask


def filled(rows: int, *, chunk_rows: int = 8, first: int = 0, step: int = 1) -> Head:
    """A head of rows whose ids are first, first + step...; the vector of each holds its id."""
    head = Head(2, chunk_rows)
    for row_id in range(first, first + rows * step, step):
        head.tail().append(row_id, b"%d" % row_id, np.full(2, row_id, np.float32))
    return head


def content(head: Head) -> list[int]:
    ids = [row for chunk in head.chunks for row in chunk.row_ids[: chunk.count].tolist()]
    vectors = [row for chunk in head.chunks for row in chunk.vectors[: chunk.count, 0].tolist()]
    keys = [int(key) for chunk in head.chunks for key in chunk.keys]
    assert ids == vectors == keys
    return ids


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 40, 41])
def test_rows_are_kept_in_order_in_chunks(rows: int) -> None:
    head = filled(rows)
    assert content(head) == list(range(rows))
    assert head.rows == rows
    assert all(chunk.count == 8 for chunk in head.chunks[:-1])


def test_adding_at_once_is_adding_one_by_one() -> None:
    head = Head(2, 8)
    for start, stop in ((0, 3), (3, 30), (30, 31)):
        ids = np.arange(start, stop)
        head.extend(ids, [b"%d" % row for row in ids], np.repeat(ids[:, None], 2, axis=1).astype(np.float32))
    assert content(head) == content(filled(31))


def test_a_small_head_takes_little_room() -> None:
    head = filled(3, chunk_rows=2048)
    assert head.chunks[0].capacity == 16
    assert filled(17, chunk_rows=2048).chunks[0].capacity == 24
    assert filled(2049, chunk_rows=2048).chunks[1].capacity == 2048


def test_a_chunk_that_has_grown_leaves_the_old_one_as_it_was() -> None:
    head = filled(16, chunk_rows=64)
    (old,) = head.chunks
    old.kill(3, 7)
    head.tail().append(16, b"16", np.full(2, 16, np.float32))
    (grown,) = head.chunks
    grown.kill(4, 8)
    assert old is not grown
    assert (old.count, old.dead, old.deaths[4]) == (16, 1, ALIVE)
    assert (grown.count, grown.dead, grown.deaths[3]) == (17, 2, 7)
    assert content(head) == list(range(17))


@pytest.mark.parametrize("step", [1, 5])
def test_every_row_is_found_by_its_id(step: int) -> None:
    head = filled(53, first=100, step=step)
    for row_id in range(100, 100 + 53 * step, step):
        chunk, position = head.find(row_id)
        assert chunk.vectors[position, 0] == row_id


@pytest.mark.parametrize("through", [-1, 0, 6, 7, 8, 20, 39, 40, 99])
def test_rows_go_up_to_any_row(through: int) -> None:
    head = filled(41)
    before = head.chunks
    head.drop_through(through)
    assert content(head) == list(range(max(0, through + 1), 41))
    assert head.rows == len(content(head))
    assert [chunk.count for chunk in before] == [8, 8, 8, 8, 8, 1]
    for row_id in content(head):
        assert head.find(row_id)[0].keys[head.find(row_id)[1]] == b"%d" % row_id


def test_what_remains_of_a_chunk_keeps_deaths_and_attributes() -> None:
    head = filled(8)
    (chunk,) = head.chunks
    chunk.kill(1, 5)
    chunk.kill(6, 9)
    chunk.attributes = {0: b"{}", 6: b'{"a":1}'}
    head.drop_through(2)
    (rest,) = head.chunks
    assert rest.deaths[: rest.count].tolist() == [ALIVE, ALIVE, ALIVE, 9, ALIVE]
    assert rest.dead == 1
    assert rest.attributes_at(np.arange(rest.count)) == [b"", b"", b"", b'{"a":1}', b""]


def test_norms_are_those_of_the_rows_however_they_are_asked_for() -> None:
    head = filled(30, chunk_rows=32)
    (chunk,) = head.chunks
    for count in (1, 10, 5, 30):
        expected = np.linalg.norm(chunk.vectors[:count].astype(np.float64), axis=1)
        assert chunk.norms(count) == pytest.approx(expected)


ACCESSES: dict[str, Callable[[Chunk, int], object]] = {
    "norms": Chunk.norms,
    "codes": lambda chunk, count: chunk.codes(Queries.of("l2", np.ones((1, 2), np.float32)), count),
    "attributes": Chunk.attribute_columns,
    "mask": lambda chunk, count: chunk_mask(chunk, count, compile_filter(b".n == 1")),
}


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("count", [-4000, -1, 301, 4096, 4097])
@pytest.mark.parametrize("access", ACCESSES)
def test_rows_that_are_not_there_are_refused_and_not_remembered(
    access: str, count: int, described: bool
) -> None:
    head = filled(300, chunk_rows=4096)
    (chunk,) = head.chunks
    if described:
        chunk.describe(0, b'{"n": 1}')
    with pytest.raises(ValueError, match=f"{count} of the 300 rows"):
        ACCESSES[access](chunk, count)
    ACCESSES[access](chunk, 0)
    ACCESSES[access](chunk, 300)


@pytest.mark.parametrize("chunk_rows", [4, 8, 100])
def test_the_rows_born_by_an_lsn_are_the_first_ones(chunk_rows: int) -> None:
    head = Head(2, chunk_rows)
    for lsn in range(1, 31):
        # One, two or three at each even LSN.
        rows = np.arange(100 * lsn, 100 * lsn + lsn % 3 + 1)
        if lsn % 2 == 0:
            vectors = np.repeat(rows[:, None], 2, axis=1).astype(np.float32)
            head.extend(rows, [b"%d" % row for row in rows], vectors, lsn)
    every = content(head)
    for lsn in range(32):
        born = head.born_by(lsn)
        assert all(0 < count <= chunk.count for chunk, count in born)
        rows = np.concatenate([np.empty(0), *(chunk.row_ids[:count] for chunk, count in born)])
        assert rows.tolist() == [row for row in every if row < 100 * (lsn + 1)]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "extend", "described", "drop"]), st.integers(0, 40)), max_size=30
    )
)
@settings(deadline=None)
def test_bytes_reserved_are_those_of_the_chunks(steps: list[tuple[str, int]]) -> None:
    head = Head(3, 8)
    next_row = first_row = 0
    described: dict[int, int] = {}
    for word, number in steps:
        if word == "append":
            head.tail().append(next_row, b"key", np.zeros(3, np.float32))
            next_row += 1
        elif word == "extend":
            row_ids = np.arange(next_row, next_row + number)
            head.extend(row_ids, [b"key"] * number, np.zeros((number, 3), np.float32))
            next_row += number
        elif word == "described":
            row_ids = np.arange(next_row, next_row + number)
            texts_of = [bytes(row % 5) or None for row in row_ids.tolist()]
            vectors = np.zeros((number, 3), np.float32)
            head.extend(row_ids, [b"key"] * number, vectors, attributes=texts_of)
            described |= {
                row: len(text) for row, text in zip(row_ids.tolist(), texts_of, strict=True) if text
            }
            next_row += number
        elif word == "drop" and (row := first_row + number) < next_row:
            head.drop_through(row)
            first_row = row + 1
        held = sum(chunk.capacity * (3 * 4 + 5 * 8) for chunk in head.chunks)
        texts = [length for row, length in described.items() if row >= first_row]
        objects = 1500 * len(head.chunks) + 136 * len(texts)
        assert head.bytes_reserved == held + objects + sum(texts)
