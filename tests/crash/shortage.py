"""Takes the memory from a server that is being written to, again and again, and checks what it acknowledged.

    python -m tests.crash.shortage --rounds 20

In each round the server may have little more address space than it has taken when it listens. Writers of
strings and of vectors write until memory has run out several times, or the server has ended, which it may do
with a reason. An error reply says that nothing has changed. Then it is started again without the limit: each
key holds what was acknowledged last, or, where the connection has broken, perhaps what was sent last; `engram
check` finds nothing.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from redis import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError

from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, start_server

SETTINGS = ("--seal-rows", "256", "--log-file-size", "1mb", "--search-threads", "1")
DIMENSION = 1021
INDEX = b"index"
PIPELINE = 20
# Errors after which a writer has seen enough.
ERRORS = 30
# Bytes of address space that the server may take beyond what it has when it listens.
ROOM = (8 << 20, 64 << 20)
_MOST_REQUESTS = 40_000

Request = tuple[bytes, ...]


@attrs.define(eq=False)
class Writer:
    """Writes over one connection. `held` is what its keys hold, `perhaps` what they may hold instead."""

    prefix: bytes
    random: random.Random
    held: dict[bytes, bytes] = attrs.Factory(dict)
    perhaps: dict[bytes, set[bytes]] = attrs.Factory(dict)
    errors: int = 0
    failure: BaseException | None = None

    def key(self) -> bytes:
        return self.prefix + b"%d" % self.random.randrange(5000)

    def request(self, held: dict[bytes, bytes]) -> tuple[Request, bytes, bytes]:
        """A request for the state `held`, the key that it changes and what that holds then."""
        raise NotImplementedError

    def read(self, key: bytes) -> Request:
        """The request whose reply is what a key holds."""
        raise NotImplementedError

    def run(self, port: int) -> None:
        """Writes until memory has run out often enough or the connection breaks."""
        try:
            self._write(port)
        except (RedisConnectionError, OSError):
            return
        except BaseException as error:
            self.failure = error

    def _write(self, port: int) -> None:
        connection = Connection(host=HOST, port=port, retry=None, socket_timeout=DEADLINE_SECONDS)
        self.errors = 0
        connection.connect()
        try:
            for _ in range(_MOST_REQUESTS // PIPELINE):
                if self.errors >= ERRORS:
                    return
                # One change of a key at a time, so that an error of one is not felt by the next.
                made = {
                    key: (request, value) for request, key, value in map(self.request, [self.held] * PIPELINE)
                }
                for key, (_, value) in made.items():
                    self.perhaps.setdefault(key, set()).add(value)
                connection.send_packed_command(connection.pack_commands([each for each, _ in made.values()]))
                for key, (_, value) in made.items():
                    try:
                        connection.read_response()
                        self.held[key] = value
                    except ResponseError as error:
                        # The log refuses, too, where there is no memory to make its next file.
                        if not (isinstance(error, OutOfMemoryError) or str(error).startswith("MISCONF")):
                            raise
                        self.errors += 1
                    self.perhaps.pop(key)
        finally:
            connection.disconnect()

    def check(self, server: ServerProcess) -> None:
        """Raises AssertionError when a key does not hold what it should."""
        with server.client() as client:
            for key in self.held.keys() | self.perhaps.keys():
                found = client.execute_command(*self.read(key))
                if found != self.held.get(key):
                    assert found in self.perhaps.get(key, ()), f"{key!r} holds {str(found)[:60]}"
                    self.held[key] = found
        self.perhaps.clear()


class Strings(Writer):
    """Writes strings of all sizes, or appends to them."""

    def request(self, held: dict[bytes, bytes]) -> tuple[Request, bytes, bytes]:
        key = self.key()
        value = self.random.randbytes(self.random.choice((10, 300, 20_000, 1_000_000)))
        if key in held and self.random.random() < 0.3:
            return (b"APPEND", key, value[:1000]), key, held[key] + value[:1000]
        return (b"SET", key, value), key, value

    def read(self, key: bytes) -> Request:
        return b"GET", key


class Vectors(Writer):
    """Adds vectors, one or several at once."""

    def request(self, held: dict[bytes, bytes]) -> tuple[Request, bytes, bytes]:
        key = self.key()
        value = (
            np.frombuffer(self.random.randbytes(4 * DIMENSION), np.uint8).astype("<f4")[:DIMENSION].tobytes()
        )
        if self.random.random() < 0.3:
            # Of a member given twice the last counts.
            return (b"VMADD", INDEX, key, bytes(4 * DIMENSION), key, value), key, value
        return (b"VADD", INDEX, key, value), key, value

    def read(self, key: bytes) -> Request:
        return b"VGET", INDEX, key


@attrs.define(eq=False)
class Shortage:
    """A data directory, its writers, and servers without memory, one after the other.

    `errors` counts the replies that said so, `ended` the servers that did not go on.
    """

    directory: Path
    seed: int
    writers: list[Writer] = attrs.field(init=False)
    errors: int = 0
    ended: int = 0
    _random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)
        kinds: list[type[Writer]] = [Strings, Vectors, Vectors]
        self.writers = [
            kind(b"w%d:" % number, random.Random(f"{self.seed} {number}"))
            for number, kind in enumerate(kinds)
        ]

    def round(self) -> str:
        """Writes until there is no memory, starts the server again and checks it; returns a line on it."""
        server = start_server("--dir", str(self.directory), *SETTINGS)
        try:
            with server.client() as client:
                if not client.exists(INDEX):
                    client.execute_command("VNEW", INDEX, DIMENSION, "METRIC", "l2")
            room = self._random.randrange(*ROOM)
            self._limit(server, room)
            threads = [threading.Thread(target=writer.run, args=(server.port,)) for writer in self.writers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            errors = sum(writer.errors for writer in self.writers)
            for writer in self.writers:
                if writer.failure is not None:
                    raise writer.failure
            ended = server.process.poll()
            if ended is not None:
                assert ended == 1, f"the server ended with {ended}: {server.errors}"
                assert "engram: " in server.errors, server.errors
            else:
                server.kill()
        finally:
            server.close()
        self.errors += errors
        self.ended += ended is not None
        server = start_server("--dir", str(self.directory), *SETTINGS)
        try:
            for writer in self.writers:
                writer.check(server)
            assert server.terminate() == 0, server.errors
        finally:
            server.close()
        command = [sys.executable, "-P", "-m", "engram", "check", str(self.directory)]
        checked = subprocess.run(command, capture_output=True, check=False, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        keys = sum(len(writer.held) for writer in self.writers)
        went = "ended with a reason" if ended is not None else "went on"
        return f"{room >> 20:>4} MiB: {errors:>4} errors of memory, the server {went}; {keys} keys are right"

    def _limit(self, server: ServerProcess, room: int) -> None:
        limit = server.address_space() + room
        subprocess.run(["prlimit", f"--pid={server.pid}", f"--as={limit}:unlimited"], check=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.shortage")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.getrandbits(32))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="engram-shortage-") as folder:
        shortage = Shortage(Path(folder, "data"), options.seed)
        print(f"seed {options.seed}, {options.rounds} rounds", flush=True)
        for number in range(1, options.rounds + 1):
            print(f"{number:>4} {shortage.round()}", flush=True)
    print(f"passed: {shortage.errors} errors of memory, {shortage.ended} servers ended")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
