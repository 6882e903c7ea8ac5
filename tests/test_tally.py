from __future__ import annotations

from engram.tally import Tally


def test_sums_are_those_of_the_values_that_are_there() -> None:
    sizes = {number: number for number in range(1000)}
    tally: Tally[int] = Tally(lambda number: (1, sizes[number]), 2)
    assert tally.sums() == (0, 0)
    for number in sizes:
        tally.change(number)
    assert tally.sums() == (1000, sum(sizes.values()))
    for number in range(600):
        sizes[number] += 5
        tally.change(number)
    tally.remove(599)
    tally.remove_many(range(3))
    assert tally.sums() == (996, sum(sizes[number] for number in range(3, 1000) if number != 599))
    tally.remove_all()
    assert tally.sums() == (0, 0)


def test_few_values_are_left_to_be_counted_at_once() -> None:
    measured: list[int] = []

    def measure(value: int) -> tuple[int]:
        measured.append(value)
        return (1,)

    tally = Tally(measure, 1)
    for _ in range(100):
        tally.change(7)
    assert not measured
    for number in range(10_000):
        tally.change(number)
    counted = len(measured)
    assert tally.sums() == (10_000,)
    assert len(measured) - counted < 256
