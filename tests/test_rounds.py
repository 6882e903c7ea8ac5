from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from engram import rounds as rounds_module
from engram.rounds import Rounds


class Reader:
    """One socket in the rounds, and its peer. What it was served is in `log`, which all share."""

    def __init__(self, name: str, rounds: Rounds, log: list[str]) -> None:
        self.name = name
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.rounds = rounds
        self.log = log
        # Called whenever it is served.
        self.served: Callable[[], None] = lambda: None
        rounds.watch(self.near.fileno(), self.serve)

    def serve(self) -> None:
        self.log.append(self.name)
        self.near.recv(100)
        assert self.rounds.under_way
        self.rounds.at_end(lambda: self.log.append(self.name.upper()))
        self.served()

    def leave(self) -> None:
        self.rounds.unwatch(self.near.fileno())
        self.near.close()
        self.far.close()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


@pytest.fixture
def readers(rounds: Rounds, log: list[str]) -> Iterator[list[Reader]]:
    readers = [Reader(name, rounds, log) for name in "abcd"]
    yield readers
    for reader in readers:
        if reader.near.fileno() >= 0:
            reader.leave()


async def test_who_is_ready_is_served_and_then_all_depart(
    rounds: Rounds, readers: list[Reader], log: list[str], nursery: trio.Nursery
) -> None:
    for reader in readers[:3]:
        reader.far.send(b"x")
    nursery.start_soon(rounds.run)
    await wait_all_tasks_blocked()
    assert sorted(log[:3]) == ["a", "b", "c"]
    assert sorted(log[3:]) == ["A", "B", "C"]
    assert not rounds.under_way
    log.clear()
    readers[3].far.send(b"x")
    readers[0].far.send(b"x")
    await wait_all_tasks_blocked()
    assert sorted(log) == ["A", "D", "a", "d"]


async def test_what_is_left_unread_comes_again(
    rounds: Rounds, readers: list[Reader], log: list[str], nursery: trio.Nursery
) -> None:
    readers[0].far.send(b"x" * 250)
    nursery.start_soon(rounds.run)
    await wait_all_tasks_blocked()
    assert log == ["a", "A"] * 3


async def test_who_is_not_watched_is_not_served(
    rounds: Rounds, readers: list[Reader], log: list[str], nursery: trio.Nursery
) -> None:
    nursery.start_soon(rounds.run)
    for reader in readers:
        reader.far.send(b"x")
    rounds.unwatch(readers[1].near.fileno())
    rounds.unwatch(readers[1].near.fileno())
    # By whoever comes first.
    readers[0].served = readers[2].leave
    readers[2].served = readers[0].leave
    await wait_all_tasks_blocked()
    assert {*log} in ({"a", "A", "d", "D"}, {"c", "C", "d", "D"})


async def test_a_long_round_is_interrupted_for_others(
    rounds: Rounds, readers: list[Reader], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client takes as long as a turn may last: others on the loop come after each of them."""
    monkeypatch.setattr(rounds_module, "_TURN_NANOSECONDS", -1)
    for reader in readers:
        reader.far.send(b"x")

    async def other() -> None:
        while True:
            log.append("-")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rounds.run)
        nursery.start_soon(other)
        while log.count("-") < 9:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    # Tasks that are ready are stepped through in any order, so two parts of the round may meet.
    turns = "".join(log).split("-")
    assert max(map(len, turns)) <= 4
    assert sorted(batched("".join(turns), 2)) == ["aA", "bB", "cC", "dD"]


async def test_who_comes_in_place_of_one_who_left_is_not_taken_for_it(
    rounds: Rounds, readers: list[Reader], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a round is interrupted, a descriptor goes and comes back as another's, who has sent nothing."""
    monkeypatch.setattr(rounds_module, "_TURN_NANOSECONDS", -1)
    for reader in readers:
        reader.far.send(b"x")
    calls: list[str] = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rounds.run)
        while not log:
            await trio.lowlevel.checkpoint()
        [gone] = [reader for reader in readers if reader.name not in log][-1:]
        descriptor = gone.near.fileno()
        gone.leave()
        near, far = socket.socketpair()
        if far.fileno() == descriptor:
            near, far = far, near
        with far:
            taken = near.detach()
            if taken != descriptor:
                os.dup2(taken, descriptor)
                os.close(taken)
            rounds.watch(descriptor, lambda: calls.append("new"))
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            assert gone.name not in log
            # It may be asked once, to no purpose.
            assert len(calls) <= 1
            far.send(b"x")
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            assert calls
            rounds.unwatch(descriptor)
            os.close(descriptor)
        nursery.cancel_scope.cancel()


def batched(text: str, size: int) -> Iterator[str]:
    for start in range(0, len(text), size):
        yield text[start : start + size]


async def test_who_cannot_be_served_ends_nobody_else(
    readers: list[Reader], rounds: Rounds, log: list[str], nursery: trio.Nursery
) -> None:
    def fail() -> None:
        raise MemoryError

    readers[0].served = fail
    nursery.start_soon(rounds.run)
    for reader in readers[:2]:
        reader.far.send(b"x")
    await wait_all_tasks_blocked()
    assert sorted(log) == ["A", "B", "a", "b"]
    for reader in readers[:2]:
        reader.far.send(b"x")
    await wait_all_tasks_blocked()
    # The one that failed is not served again.
    assert sorted(log) == ["A", "B", "B", "a", "b", "b"]


async def test_a_reply_that_cannot_be_sent_keeps_no_other_back(
    readers: list[Reader], rounds: Rounds, log: list[str], nursery: trio.Nursery
) -> None:
    def fail() -> None:
        raise MemoryError

    readers[0].served = lambda: rounds.at_end(fail)
    nursery.start_soon(rounds.run)
    for reader in readers:
        reader.far.send(b"x")
    await wait_all_tasks_blocked()
    assert sorted(log) == ["A", "B", "C", "D", "a", "b", "c", "d"]


def test_a_socket_that_has_just_gone_is_let_go_of(rounds: Rounds) -> None:
    near, far = socket.socketpair()
    descriptor = near.fileno()
    rounds.watch(descriptor, near.close)
    near.close()
    rounds.unwatch(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rounds.watch(descriptor, near.close)
    # Whoever has that number next is not taken for the one before.
    with socket.socket() as other:
        assert other.fileno() == descriptor
        rounds.watch(descriptor, other.close)
        rounds.unwatch(descriptor)
    far.close()


async def test_what_is_to_be_done_soon_is_done_when_all_are_served(
    rounds: Rounds, readers: list[Reader], log: list[str], nursery: trio.Nursery
) -> None:
    rounds.soon(lambda: log.append("at once"))
    assert log == ["at once"]
    log.clear()
    for reader in readers[:2]:
        reader.served = lambda: rounds.soon(lambda: log.append("soon"))
        reader.far.send(b"x")
    nursery.start_soon(rounds.run)
    await wait_all_tasks_blocked()
    assert sorted(log[:2]) == ["a", "b"]
    assert sorted(log[2:]) == ["A", "B", "soon", "soon"]
