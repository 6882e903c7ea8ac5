"""Indices that are loaded in bursts of thousands of rows, beside readers, by a server with default settings.

    python -m tests.crash.loading --kills 20

The head of an index then has chunks of thousands of rows, with codes. One client loads: it sends a burst,
and searches for its own rows at once, before the log has them. Readers see what the log has. A burst is
there as a whole or not at all, and in order, so what a search that misses nothing may answer is known
exactly: the nearest of the first so many bursts, no fewer than had been acknowledged when it was sent, no
more than had been sent when it was answered. The same goes for VCOUNT with a filter. In the end the server
is killed, started again, and asked once more.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
from redis import Connection
from redis.exceptions import RedisError

from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, StartError, start_server

SETTINGS = ("--appendfsync", "always")
READERS = 4
DIMENSION = 32
METRICS = ("cosine", "l2", "dot")
# Of an index: more than a chunk, and now and then so many that the head is sealed meanwhile.
BURSTS = (3, 7)
SMALLEST_BURST, LARGEST_BURST = 500, 3000
NEAREST = 10
# Searches of a round by each reader, at least.
LEAST_SEARCHES = 3
GROUPS = 3

Rows = npt.NDArray[np.float32]


@attrs.define
class Loaded:
    """An index that is being loaded: burst n has the rows from `ends[n]` to `ends[n + 1]`, of group n % 3.

    `sent` and `acknowledged` count bursts.
    """

    key: bytes
    metric: str
    rows: Rows
    ends: Sequence[int]
    sent: int = 0
    acknowledged: int = 0

    @property
    def bursts(self) -> int:
        return len(self.ends) - 1

    def members(self, burst: int) -> range:
        return range(self.ends[burst], self.ends[burst + 1])

    def load(self, burst: int) -> list[bytes]:
        """The request that adds a burst."""
        text = b'{"g":%d}' % (burst % GROUPS)
        words = [
            word for row in self.members(burst) for word in (b"%d" % row, self.rows[row].tobytes(), text)
        ]
        return [b"VMADD", self.key, *words, b"ATTRS"]

    def search(self, query: Rows, group: int | None) -> list[bytes]:
        """The request for the nearest rows, all or those of a group."""
        words = [b"VSEARCH", self.key, query.tobytes(), b"%d" % NEAREST, b"EXACT"]
        return words if group is None else [*words, b"FILTER", b".g == %d" % group]

    def nearest(self, query: Rows, group: int | None, bursts: int) -> list[bytes]:
        """What the search should answer when so many bursts are there: the members."""
        wide, asked = self.rows[: self.ends[bursts]].astype(np.float64), query.astype(np.float64)
        if self.metric == "l2":
            distances = ((wide - asked) ** 2).sum(axis=1)
        else:
            distances = -(wide @ asked)
            if self.metric == "cosine":
                distances /= np.sqrt((wide**2).sum(axis=1))
        if group is not None:
            for burst in range(bursts):
                if burst % GROUPS != group:
                    distances[self.ends[burst] : self.ends[burst + 1]] = np.inf
        order = np.argsort(distances, kind="stable")[:NEAREST]
        return [b"%d" % row for row in order.tolist() if distances[row] < np.inf]

    def matching(self, group: int, bursts: int) -> int:
        """What VCOUNT should answer of a group when so many bursts are there."""
        return sum(len(self.members(burst)) for burst in range(bursts) if burst % GROUPS == group)


def make_index(number: int, seed: int) -> Loaded:
    """Random rows and bursts of them."""
    chance = random.Random(f"{seed} {number}")
    ends = [0]
    for _ in range(chance.randint(*BURSTS)):
        ends.append(ends[-1] + chance.randint(SMALLEST_BURST, LARGEST_BURST))
    rows = np.random.default_rng([seed, number]).standard_normal((ends[-1], DIMENSION), np.float32)
    return Loaded(b"index-%d" % number, METRICS[number % 3], rows, ends)


@attrs.define
class Loading:
    """A data directory, and the server that is loaded, killed and started again, an index a round."""

    directory: Path
    seed: int
    searches: int = 0
    server: ServerProcess | None = None
    _number: int = 0
    _failures: list[BaseException] = attrs.field(factory=list)

    def begin(self) -> None:
        """Starts the first server."""
        self.server = start_server("--dir", str(self.directory), *SETTINGS)

    def kill_once(self) -> str:
        """Loads one index beside readers, kills the server, and looks again; returns a line on it.

        Raises:
            AssertionError: an answer was wrong.
        """
        assert self.server is not None
        index = make_index(self._number, self.seed)
        self._number += 1
        with self.server.client() as client:
            client.execute_command("VNEW", index.key, DIMENSION, "METRIC", index.metric)
        before = self.searches
        finished = threading.Event()
        readers = [
            threading.Thread(target=self._run, args=(self._read, index, reader, finished))
            for reader in range(READERS)
        ]
        for thread in readers:
            thread.start()
        self._run(self._load, index, READERS, finished)
        finished.set()
        for thread in readers:
            thread.join()
        for failure in self._failures:
            raise failure
        self.server.kill()
        self.server.close()
        self.begin()
        self._read(index, READERS + 1, finished)
        with self.server.client() as client:
            for group in range(GROUPS):
                expected = index.matching(group, index.bursts)
                deleted = client.execute_command("VDELBY", index.key, "FILTER", f".g == {group}")
                assert deleted == expected, f"VDELBY deleted {deleted} rows instead of {expected}"
            client.execute_command("DEL", index.key)
        return f"{index.metric:<6} {len(index.rows):>6} rows, {self.searches - before:>5} searches"

    def close(self) -> None:
        if self.server is not None:
            self.server.close()

    def _run(
        self,
        function: Callable[[Loaded, int, threading.Event], None],
        index: Loaded,
        number: int,
        finished: threading.Event,
    ) -> None:
        try:
            function(index, number, finished)
        except (AssertionError, RedisError, OSError) as error:
            self._failures.append(error)
            finished.set()

    def _connect(self) -> Connection:
        assert self.server is not None
        return Connection(host=HOST, port=self.server.port, retry=None, socket_timeout=DEADLINE_SECONDS)

    def _load(self, index: Loaded, number: int, finished: threading.Event) -> None:
        """Adds one burst after the other, and searches for its rows before they are durable."""
        chance = np.random.default_rng([self.seed, self._number, number])
        connection = self._connect()
        try:
            for burst in range(index.bursts):
                query = index.rows[int(chance.choice(index.members(burst)))]
                group = (None, burst % GROUPS)[burst % 2]
                index.sent = burst + 1
                connection.send_packed_command(
                    connection.pack_commands([index.load(burst), index.search(query, group)])
                )
                added = connection.read_response()
                assert added == len(index.members(burst)), f"VMADD answered {added}"
                index.acknowledged = burst + 1
                found = connection.read_response()[::2]
                expected = index.nearest(query, group, burst + 1)
                assert found == expected, f"who loads found {found} instead of {expected}"
                if finished.is_set():
                    return
        finally:
            connection.disconnect()

    def _read(self, index: Loaded, number: int, finished: threading.Event) -> None:
        """Searches and counts, until the index is loaded, and a little longer."""
        chance = np.random.default_rng([self.seed, self._number, number])
        connection = self._connect()
        left = LEAST_SEARCHES
        try:
            while left or not finished.is_set():
                left -= bool(left and finished.is_set())
                query = index.rows[int(chance.integers(len(index.rows)))]
                group = int(chance.integers(GROUPS))
                asked = None if chance.random() < 0.5 else group
                counted = [b"VCOUNT", index.key, b"FILTER", b".g == %d" % group]
                least = index.acknowledged
                connection.send_packed_command(connection.pack_commands([index.search(query, asked)]))
                found = connection.read_response()[::2]
                most = index.sent
                allowed = [index.nearest(query, asked, bursts) for bursts in range(least, most + 1)]
                assert found in allowed, f"a reader found {found} instead of {allowed}"
                least = index.acknowledged
                connection.send_packed_command(connection.pack_commands([counted]))
                count = connection.read_response()
                counts = [index.matching(group, bursts) for bursts in range(least, index.sent + 1)]
                assert count in counts, f"a reader counted {count} instead of {counts}"
                self.searches += 1
        finally:
            connection.disconnect()


def run(directory: Path, seed: int, kills: int) -> int:
    """Loads and kills so often, with a line on each; returns how many searches there were.

    Raises:
        AssertionError: an answer was wrong.
    """
    loading = Loading(directory, seed)
    try:
        loading.begin()
        for number in range(1, kills + 1):
            print(f"{number:>4}  {loading.kill_once()}", flush=True)
    finally:
        loading.close()
    return loading.searches


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.loading", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20, help="one after each index")
    parser.add_argument("--seed", type=int, default=None, help="of rows and queries; default: random")
    parser.add_argument("--dir", type=Path, help="an empty or missing folder; default: a temporary one")
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="engram-loading-") as scratch:
        print(f"seed {seed}, {READERS} readers, {arguments.kills} indices", flush=True)
        try:
            searches = run(arguments.dir or Path(scratch) / "data", seed, arguments.kills)
        except (AssertionError, RedisError, StartError) as error:
            print(f"FAILED with seed {seed}: {error}")
            return 1
    print(f"passed: {searches} searches beside loading")
    return 0


if __name__ == "__main__":
    sys.exit(main())
