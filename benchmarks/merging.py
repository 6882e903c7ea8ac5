"""Simulates sealing and merging: how many segments there are, and how often a row is built.

    python -m benchmarks.merging

Nothing is built: building n rows takes the time that it took for 384 dimensions on one core. Clients add at
the speed given, and at the builder's pace beyond 16,384 rows without a graph.
"""

from __future__ import annotations

import attrs
import numpy as np
import trio
import trio.testing

from engram.index.merging import next_merge
from engram.index.pace import Pace

SEAL_ROWS = 8192
LARGEST_SEAL = 4 * SEAL_ROWS
CHUNK_ROWS = 4096
LIMIT = 16_384
TICK = 0.1

# Rows of a build, and rows a second.
BUILD_RATES = ((16_384, 9000), (131_072, 5000), (262_144, 4000), (524_288, 2900), (1_048_576, 2200))
BUILD_START = 0.6


def build_seconds(rows: int) -> float:
    """What building a segment of so many rows takes."""
    sizes, rates = zip(*BUILD_RATES, strict=True)
    return BUILD_START + rows / float(np.interp(np.log(max(1, rows)), np.log(sizes), rates))


@attrs.define
class Simulation:
    """An index of sizes: `segments` holds rows and dead rows of each."""

    speed: float
    order: str = ""
    live_limit: int = 1 << 62
    head: int = 0
    segments: list[list[int]] = attrs.Factory(list)
    pace: Pace = attrs.Factory(lambda: Pace(lambda: LIMIT))
    added: int = 0
    built: int = 0
    most_segments: int = 0
    most_head: int = 0
    most_held: int = 0
    segment_seconds: float = 0.0
    loaded: bool = False
    id: int = 1

    @property
    def rows_unindexed(self) -> int:
        return self.head

    @property
    def seal_wanted(self) -> bool:
        return self.rows_to_seal > 0

    @property
    def rows_to_seal(self) -> int:
        whole = self.head // CHUNK_ROWS * CHUNK_ROWS
        return min(whole, LARGEST_SEAL) if whole >= SEAL_ROWS else 0

    async def build(self) -> None:
        """The builder, as `VectorIndex.plan` and `Builder` do it, until nothing is left to be built."""
        while True:
            sizes = [(rows, dead) for rows, dead in self.segments]
            waiting = self.rows_to_seal > 0
            merged = next_merge(sizes, LARGEST_SEAL, waiting=waiting)
            began = trio.current_time()
            if merged is not None:
                sources = self.segments[merged]
                rows = sum(size - dead for size, dead in sources)
                await trio.sleep(build_seconds(rows) if rows else 0.01)
                died = rows - sum(size - dead for size, dead in sources)
                self.segments[merged] = [[rows, died]] if rows else []
                self.built += rows
                self.pace.record(0, trio.current_time() - began, waited=self.rows_to_seal > 0)
            elif waiting:
                rows = self.rows_to_seal
                await trio.sleep(build_seconds(rows))
                self.segments.append([rows, 0])
                self.head -= rows
                self.built += rows
                self.pace.record(rows, trio.current_time() - began, waited=True)
                self.pace.review(self.id)
            elif self.loaded:
                return
            else:
                await trio.sleep(TICK)

    async def add(self, total: int) -> None:
        """A client adds rows; beyond `live_limit` each kills one, the oldest or any."""
        batch = max(1, round(self.speed * TICK / 10))
        while total > 0:
            began = trio.current_time()
            count = min(batch, total)
            wait = self.pace.admit(self, count)
            if wait is not None:
                await wait()
            await trio.sleep(max(0.0, count / self.speed - (trio.current_time() - began)))
            total -= count
            self.added += count
            self.head += count
            held = self.head + sum(rows for rows, _ in self.segments)
            self.most_head = max(self.most_head, self.head)
            self.most_held = max(self.most_held, held)
            self.most_segments = max(self.most_segments, len(self.segments))
            self.segment_seconds += len(self.segments) * (trio.current_time() - began)
            live = held - sum(dead for _, dead in self.segments)
            if live > self.live_limit:
                self._kill(live - self.live_limit)

    def _kill(self, count: int) -> None:
        living = sum(rows - dead for rows, dead in self.segments)
        share = 1.0 if self.order == "oldest" else min(1.0, count / max(1, living))
        for segment in self.segments:
            rows, dead = segment
            killed = min(count, round((rows - dead) * share + 0.5), rows - dead)
            segment[1] += killed
            count -= killed


async def simulate(rows: int, speed: float, overwritten: int, order: str) -> str:
    """Loads rows, or overwrites some of so many that are there; the figures of that."""
    simulation = Simulation(speed, order)
    if overwritten:
        simulation.segments = [[min(rows - start, 131_072), 0] for start in range(0, rows, 131_072)]
        simulation.live_limit = rows
    async with trio.open_nursery() as nursery:
        nursery.start_soon(simulation.build)
        await simulation.add(overwritten or rows)
        seconds = trio.current_time()
        ended = len(simulation.segments)
        simulation.loaded = True
    settled = trio.current_time()
    sizes = " ".join(f"{size // 1000}k" for size, _ in simulation.segments)
    dead = max((dead / size for size, dead in simulation.segments), default=0.0)
    return (
        f"{simulation.added / seconds:>8,.0f} {simulation.most_head:>8,} {simulation.most_held:>10,}"
        f" {simulation.segment_seconds / seconds:>6.1f} {simulation.most_segments:>4} {ended:>5}"
        f" {settled - seconds:>7.0f} {simulation.built / simulation.added:>6.2f} {dead:>5.0%}  {sizes}"
    )


SCENARIOS = (
    (300_000, 20_000, 0, ""),
    (1_000_000, 20_000, 0, ""),
    (1_000_000, 3000, 0, ""),
    (300_000, 1000, 0, ""),
    (300_000, 200, 0, ""),
    (300_000, 20_000, 900_000, "oldest"),
    (300_000, 20_000, 900_000, "any"),
    (300_000, 1000, 900_000, "oldest"),
    (300_000, 1000, 900_000, "any"),
)


def main() -> None:
    print(
        "   loaded  overwritten       clients/s   rows/s most head  most held  mean most   end  idle s"
        "  built  dead  segments in the end"
    )
    for rows, speed, overwritten, order in SCENARIOS:
        clock = trio.testing.MockClock(autojump_threshold=0)
        line = trio.run(simulate, rows, float(speed), overwritten, order, clock=clock)
        print(f"{rows:>9,} {overwritten:>12,} {order:<6} {speed:>13,} {line}")


if __name__ == "__main__":
    main()
