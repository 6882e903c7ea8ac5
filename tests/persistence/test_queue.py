from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from engram.operations import InstallSegment, SetString, encode
from engram.persistence import queue as queue_module
from engram.persistence.log_format import FILE_HEADER_SIZE, RECORD_HEADER_SIZE
from tests.persistence.conftest import operation
from tests.persistence.parts import Parts, bytes_in, files_of


def append(parts: Parts, size: int = 5) -> bytes:
    """Appends one operation; returns its payload."""
    queue = parts.queue
    lsn = queue.appended_lsn + 1
    payload = queue.reserve(lsn, operation(lsn, size))
    queue.append(lsn, operation(lsn, size), payload)
    return payload


def append_together(parts: Parts, *sizes: int) -> list[bytes]:
    first_lsn = parts.queue.appended_lsn + 1
    payloads: list[bytes] = []
    for lsn, size in enumerate(sizes, first_lsn):
        payloads.append(parts.queue.encode(operation(lsn, size), sum(map(len, payloads))))
    parts.queue.append_together(first_lsn, payloads)
    return payloads


def test_what_is_appended_in_one_step_is_one_run() -> None:
    parts = Parts()
    calls: list[int] = []
    parts.queue.on_run = lambda: calls.append(parts.queue.appended_lsn)
    assert not parts.queue.has_runs
    payloads = [append(parts) for _ in range(3)]
    assert parts.queue.has_runs
    assert calls == [0]
    parts.write()
    (run,) = parts.runs
    assert (run.first_lsn, run.payloads, run.mark) == (1, payloads, False)
    assert run.next_file is not None
    assert (parts.queue.has_runs, parts.queue.queued_bytes) == (False, 0)
    append(parts)
    assert calls == [0, 3]
    parts.write()
    assert [run.first_lsn for run in parts.runs] == [1, 4]
    assert parts.runs[1].next_file is None


def test_a_batch_says_where_it_ends() -> None:
    parts = Parts()
    append(parts, size=5000)
    append(parts)
    parts.write()
    append(parts)
    parts.write()
    assert [(batch.lsn, batch.file_number) for batch in parts.batches] == [(2, 3), (3, 3)]
    assert parts.batches[1].end == parts.queue.end > parts.batches[0].end


def test_an_lsn_out_of_turn_is_a_mistake() -> None:
    parts = Parts()
    with pytest.raises(ValueError, match="LSN 2 does not follow 0"):
        parts.queue.reserve(2, operation(2))
    with pytest.raises(ValueError, match="LSN 2 does not follow 0"):
        parts.queue.append_together(2, [b"x"])
    assert not parts.queue.has_runs


def test_a_segment_that_goes_into_effect_is_noted() -> None:
    parts = Parts()
    queue = parts.queue
    for lsn, segment in enumerate(("a", ""), 1):
        install = InstallSegment(1, segment, 0, 0, ())
        queue.append(lsn, install, queue.reserve(lsn, install))
    append(parts)
    assert parts.segments == [(1, "a")]


def test_a_full_record_is_followed_by_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "LARGEST_TOGETHER", 1000)
    parts = Parts()
    payloads = [append(parts, size=400) for _ in range(5)]
    parts.write()
    assert [run.payloads for run in parts.runs] == [payloads[:2], payloads[2:4], payloads[4:]]
    assert len([run for run in parts.runs if run.next_file is not None]) == 1


def test_a_mark_has_space_of_its_own() -> None:
    parts = Parts()
    append(parts)
    parts.write()
    before = parts.queue.end
    assert parts.queue.mark()
    assert parts.queue.end == before
    parts.write()
    assert (parts.runs[-1].mark, parts.runs[-1].payloads) == (True, [])


async def test_a_mark_in_a_full_file_is_the_header_of_the_next() -> None:
    parts = Parts()
    append(parts, size=4096 - FILE_HEADER_SIZE - 60)
    while parts.queue.file_end - parts.queue.end >= RECORD_HEADER_SIZE:
        assert parts.queue.mark()
    parts.write()
    # No file is prepared.
    assert not parts.queue.mark()
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        assert parts.queue.mark()
        nursery.cancel_scope.cancel()
    parts.write()
    last = parts.runs[-1]
    assert (last.mark, last.payloads) == (False, [])
    assert last.next_file is not None
    assert not parts.queue.file_has_records


def test_files_taken_for_what_is_never_written_are_told() -> None:
    parts = Parts()
    append(parts)
    parts.write()
    append(parts)
    append(parts, size=5000)
    append(parts)
    assert [file.size > 5000 for file in parts.queue.unused_files()] == [True, False]
    parts.write()
    assert parts.queue.unused_files() == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3000)),
        st.tuples(st.just("append together"), st.lists(st.integers(0, 1500), min_size=1, max_size=5)),
        st.tuples(st.just("reserve only"), st.integers(0, 3000)),
        st.tuples(st.sampled_from(["mark", "switch", "write", "prepare"]), st.none()),
    ),
    max_size=60,
)


async def follow(
    steps: list[tuple[str, Any]], *, largest: int, admitted: bool
) -> tuple[Parts, list[list[bytes]]]:
    """Does the steps, with `admitted` only what there is room for; returns what was appended together.

    What takes more than `largest` bytes is left out.
    """
    parts = Parts()
    queue = parts.queue
    groups: list[list[bytes]] = []
    async with trio.open_nursery() as nursery:
        await parts.start(nursery)
        for step, argument in steps:
            sizes = argument if isinstance(argument, list) else [argument or 0]
            size = sum(len(encode(operation(10**6, each))) for each in sizes)
            if size > largest:
                continue
            if admitted and argument is not None and not parts.admission.has_room(size):
                continue
            if step == "append":
                groups.append([append(parts, argument)])
            elif step == "append together":
                groups.append(append_together(parts, *argument))
            elif step == "reserve only":
                queue.reserve(queue.appended_lsn + 1, SetString(b"k", bytes(argument)))
            elif step == "mark":
                queue.mark()
            elif step == "switch" and (not admitted or parts.space.holds(0)):
                queue.switch()
            elif step == "write":
                parts.write()
            elif step == "prepare":
                await trio.testing.wait_all_tasks_blocked()
        parts.write()
        nursery.cancel_scope.cancel()
    return parts, groups


@pytest.mark.parametrize("largest", [1 << 30, 2000])
@given(steps=STEPS, admitted=st.booleans())
@hypothesis.settings(max_examples=150, deadline=None)
def test_each_operation_is_in_one_run_and_no_run_exceeds_its_file(
    largest: int, steps: list[tuple[str, Any]], admitted: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "LARGEST_TOGETHER", largest)
        parts, groups = trio.run(partial(follow, steps, largest=largest, admitted=admitted))
    runs = parts.runs
    # Each in one run, in order, and what goes together in the same.
    appended = [payload for group in groups for payload in group]
    assert [payload for run in runs for payload in run.payloads] == appended
    lsn = 0
    for run in runs:
        assert run.first_lsn == lsn + 1
        assert sum(map(len, run.payloads)) <= largest
        lsn += len(run.payloads)
    assert lsn == parts.queue.appended_lsn == len(appended)
    ends = {run.first_lsn + len(run.payloads) for run in runs} | {1}
    first = 1
    for group in groups:
        assert not ends & set(range(first + 1, first + len(group)))
        first += len(group)
    # Each in space that was allocated for it.
    for file, within in files_of(runs):
        assert bytes_in(within) <= file.size
    if admitted:
        assert all(file.descriptor is not None for file, _ in files_of(runs))
