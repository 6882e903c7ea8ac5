"""What the server counts of its own work: commands, their latencies, errors and bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, compress

import attrs

# Latencies are counted in steps of 64 ns up to 32 us, where most commands are, and from there on in
# sixteen steps for each doubling, up to 2**44 ns, which is five hours. `record` has the numbers in its code.
_STEP_BITS = 6
_STEPS = 512
_LAST_OCTAVE = 44
_OCTAVE_BITS = 4

# Nanoseconds that the calls of each step took at most.
_FAST_TIMES = range(1 << _STEP_BITS, (_STEPS + 1) << _STEP_BITS, 1 << _STEP_BITS)


@cache
def _slow_time(key: int) -> int:
    """The same for a key of `Usage._slow`."""
    octave, part = key >> _OCTAVE_BITS, key & 15
    return (17 + part) << octave - _OCTAVE_BITS - 1


class Usage:
    """How often a command was called, and how long it took.

    Attributes:
        calls: times that it was carried out, failed or not.
        nanoseconds: what all calls took together.
        rejected: times that it was refused before it was carried out.
        failed: calls that ended with an error.
    """

    __slots__ = ("_fast", "_slow", "calls", "failed", "nanoseconds", "rejected")

    def __init__(self) -> None:
        self.calls = 0
        self.nanoseconds = 0
        self.rejected = 0
        self.failed = 0
        self._fast = [0] * _STEPS
        self._slow: dict[int, int] = {}

    def record(self, count: int, nanoseconds: int) -> None:
        """Counts `count` calls, at least one, that took `nanoseconds` together."""
        self.calls += count
        self.nanoseconds += nanoseconds
        step = nanoseconds // count >> 6
        if step < 512:
            self._fast[step] += count
        else:
            self._record_slow(nanoseconds // count, count)

    def _record_slow(self, each: int, count: int) -> None:
        octave = min(each.bit_length(), _LAST_OCTAVE)
        key = (octave << _OCTAVE_BITS) + (each >> octave - _OCTAVE_BITS - 1 & 15)
        self._slow[key] = self._slow.get(key, 0) + count

    def latencies(self) -> Iterable[tuple[int, int]]:
        """(nanoseconds, calls that took up to about that many), ascending; only where there are calls."""
        return zip(*self._columns(), strict=True)

    def _columns(self) -> tuple[list[int], list[int]]:
        """The two columns of `latencies`, without a step for each number."""
        slow = sorted(self._slow)
        times = [*compress(_FAST_TIMES, self._fast), *map(_slow_time, slow)]
        return times, [*filter(None, self._fast), *map(self._slow.__getitem__, slow)]

    def percentiles(self, percents: Iterable[float]) -> list[int]:
        """For each the nanoseconds that so many percent of the calls took at most; 0 without calls."""
        times, calls = self._columns()
        seen = list(accumulate(calls))
        if not seen:
            return [0 for _ in percents]
        wanted = (max(1, int(percent / 100 * seen[-1] + 0.5)) for percent in percents)
        return [times[min(bisect_left(seen, count), len(times) - 1)] for count in wanted]

    def histogram(self) -> list[tuple[int, int]]:
        """(nanoseconds, calls that took at most so many), for powers of two from 1024 on; ascending, only
        where the number of calls changes."""
        times, calls = self._columns()
        seen = list(accumulate(calls))
        found: list[tuple[int, int]] = []
        position = 0
        while position < len(times):
            bound = 1 << max(10, (times[position] - 1).bit_length())
            position = bisect_right(times, bound, position)
            found.append((bound, seen[position - 1]))
        return found

    def cumulative(self, bounds: Sequence[int]) -> list[tuple[int, int]]:
        """(bound, calls that took at most so many nanoseconds) for each of `bounds`, which ascend."""
        times, calls = self._columns()
        seen = [0, *accumulate(calls)]
        return [(bound, seen[bisect_right(times, bound)]) for bound in bounds]

    def reset(self) -> None:
        """Counts from zero."""
        self.calls = self.nanoseconds = self.rejected = self.failed = 0
        self._fast = [0] * _STEPS
        self._slow.clear()


class UsageTable(dict[str, Usage]):
    """Usage by the name of the command; one that is not there yet is made when it is asked for."""

    def __missing__(self, name: str) -> Usage:
        usage = self[name] = Usage()
        return usage


SAMPLE_INTERVAL = 0.1
"""Seconds between the samples that figures per second are taken from, as in Redis."""

_SAMPLES = 16


class Rate:
    """How fast a counter grows, averaged over the last samples."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []

    def sample(self, now: float, value: int) -> None:
        """Notes the counter at a time in seconds."""
        samples = self._samples
        if samples and value < samples[-1][1]:
            samples.clear()
        samples.append((now, value))
        del samples[:-_SAMPLES]

    @property
    def per_second(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (first_time, first), (last_time, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_time - first_time) if last_time > first_time else 0.0


# So many kinds of errors are told apart, as in Redis: a client may make up words of its own.
_MOST_ERRORS = 128


class ErrorCounts(Counter[str]):
    """How often each error was answered, by its first word."""

    def count(self, reply: str) -> None:
        """Counts an error by its text without the minus: `ERR unknown command`."""
        word = reply.partition(" ")[0]
        if word in self or len(self) < _MOST_ERRORS:
            self[word] += 1


@attrs.define
class Statistics:
    """Counters since the start, or since CONFIG RESETSTAT.

    Attributes:
        keyspace_hits, keyspace_misses: keys whose values clients asked for, found or not, but for GET.
        get_misses: GETs that found nothing. What they find is what is left of their calls: nothing is called
            so often, and nothing need be counted for it.
        usage: by the name of the command; of a subcommand, `client|list`.
        searches, syncs, builds: from the request for a search to its answer; a sync of the log; the making
            of a graph.
    """

    connections_received: int = 0
    connections_rejected: int = 0
    net_input_bytes: int = 0
    net_output_bytes: int = 0
    error_replies: int = 0
    keyspace_hits: int = 0
    keyspace_misses: int = 0
    get_misses: int = 0
    peak_memory: int = 0
    usage: UsageTable = attrs.field(factory=UsageTable)
    errors: ErrorCounts = attrs.field(factory=ErrorCounts)
    searches: Usage = attrs.field(factory=Usage)
    syncs: Usage = attrs.field(factory=Usage)
    builds: Usage = attrs.field(factory=Usage)
    commands_rate: Rate = attrs.field(factory=Rate)
    input_rate: Rate = attrs.field(factory=Rate)
    output_rate: Rate = attrs.field(factory=Rate)

    @property
    def commands_processed(self) -> int:
        """Commands that were carried out, those of transactions among them."""
        return sum(usage.calls for usage in self.usage.values())

    def lookups(self) -> tuple[int, int]:
        """Keys that were found and keys that were not, by commands that ask for values."""
        gets = self.usage["get"]
        found = max(0, gets.calls - gets.failed - self.get_misses)
        return self.keyspace_hits + found, self.keyspace_misses + self.get_misses

    def reset(self) -> None:
        """CONFIG RESETSTAT: counts from zero. Whoever holds a `Usage` may go on using it."""
        for field in attrs.fields(Statistics):
            if field.default == 0:
                setattr(self, field.name, 0)
        for usage in (*self.usage.values(), self.searches, self.syncs, self.builds):
            usage.reset()
        self.errors.clear()

    def sample(self, now: float) -> None:
        """Notes the counters for the figures per second."""
        self.commands_rate.sample(now, self.commands_processed)
        self.input_rate.sample(now, self.net_input_bytes)
        self.output_rate.sample(now, self.net_output_bytes)
