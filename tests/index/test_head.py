from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.index.head import ALIVE, Head


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


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "extend", "describe", "drop"]), st.integers(0, 40)), max_size=30
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
        elif word == "describe" and (row := first_row + number) < next_row and row not in described:
            described[row] = number
            head.describe(row, bytes(number))
        elif word == "drop" and (row := first_row + number) < next_row:
            head.drop_through(row)
            first_row = row + 1
        held = sum(chunk.capacity * (3 * 4 + 5 * 8) for chunk in head.chunks)
        texts = [length for row, length in described.items() if row >= first_row]
        objects = 1500 * len(head.chunks) + 136 * len(texts)
        assert head.bytes_reserved == held + objects + sum(texts)
