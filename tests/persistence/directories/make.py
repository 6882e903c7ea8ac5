"""Makes a small data directory of this engram's format level, and the dump of it that a later one must give.

    python -m tests.persistence.directories.make FOLDER

writes FOLDER/level-<n>/ and FOLDER/level-<n>.jsonl: two indices, attributes, strings and expiries, in a
snapshot, in segments and in a log behind them, from level 3 on in several databases. Run it once a level,
with the first engram that writes it.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

from redis import Redis

from tests.crash.server_process import running_server

EXPIRES_AT = 4_102_444_800_000  # milliseconds since the epoch: the year 2100
SEAL_ROWS = 32
LEVEL = 3


def vector(index: int, row: int, dimension: int) -> bytes:
    """Numbers that float32 holds exactly, another direction for each row."""
    numbers = [((row * 37 + place * place * 11 + index * 5) % 101 - 50) / 16 for place in range(dimension)]
    return struct.pack(f"<{dimension}f", *numbers)


def fill_before_the_snapshot(client: Redis) -> None:
    client.execute_command("SET", "to be flushed", "x")
    client.execute_command("FLUSHALL")
    client.execute_command("SET", "plain", "a value")
    client.execute_command("SET", b"\xff\x00 key", b"\x00\xfe value")
    client.execute_command("SET", "empty", "")
    client.execute_command("SET", "expiring", "later", "PXAT", EXPIRES_AT)
    client.execute_command("SET", "to be deleted", "x")
    client.execute_command(
        "VNEW", "words", 8, "METRIC", "cosine", "M", 8, "EF_CONSTRUCTION", 40, "RECALL", 0.95
    )
    for row in range(50):
        client.execute_command("VADD", "words", f"word {row}", vector(0, row, 8))
        client.execute_command(
            "VSETATTR", "words", f"word {row}", f'{{"rank": {row}, "kind": "{"ab"[row % 2]}"}}'
        )
    client.execute_command("VDEL", "words", "word 3")
    client.execute_command("VOPTIMIZE", "words")
    client.execute_command("SELECT", 5)
    client.execute_command("SET", "plain", "of database 5", "PXAT", EXPIRES_AT + 3)
    client.execute_command("SET", "to be moved", "x")
    client.execute_command("VNEW", "words", 4, "METRIC", "l2")
    for row in range(20):
        client.execute_command("VADD", "words", f"word {row}", vector(3, row, 4))
    client.execute_command("SELECT", 0)


def fill_behind_the_snapshot(client: Redis) -> None:
    client.execute_command("MSET", "first", "1", "second", "2")
    client.execute_command("APPEND", "plain", ", longer")
    client.execute_command("INCR", "second")
    client.execute_command("SETRANGE", "ranged", 3, "abc")
    client.execute_command("COPY", "expiring", "copied")
    client.execute_command("RENAME", "first", "renamed")
    client.execute_command("DEL", "to be deleted")
    client.execute_command("PEXPIREAT", "plain", EXPIRES_AT + 1)
    client.execute_command("VNEW", b"points \xfe", 4, "METRIC", "l2", "QUANT", "f32")
    client.execute_command("PEXPIREAT", b"points \xfe", EXPIRES_AT + 2)
    for row in range(40):
        client.execute_command("VADD", b"points \xfe", f"point {row}", vector(1, row, 4))
    client.execute_command("VOPTIMIZE", b"points \xfe")
    for row in range(40, 50):
        client.execute_command("VADD", b"points \xfe", f"point {row}", vector(1, row, 4))
    client.execute_command("VADD", "words", "word 7", vector(2, 7, 8))
    client.execute_command("VADD", "words", b"word \xff", vector(2, 8, 8))
    client.execute_command("VSETATTR", "words", "word 9", '{"rank": -1, "tags": ["x", "y"]}')
    client.execute_command("VSETATTR", "words", "word 10", "")
    client.execute_command("VDEL", "words", "word 11")
    client.execute_command("VDEL", b"points \xfe", "point 12")
    client.execute_command("COPY", "plain", "plain", "DB", 7)
    client.execute_command("SELECT", 5)
    client.execute_command("MOVE", "to be moved", 7)
    client.execute_command("VDEL", "words", "word 4")
    client.execute_command("SELECT", 9)
    client.execute_command("SET", "to be flushed", "x")
    client.execute_command("FLUSHDB")
    client.execute_command("SET", "exchanged", "of database 9")
    client.execute_command("SWAPDB", 9, 10)


def main() -> None:
    folder = Path(sys.argv[1]) / f"level-{LEVEL}"
    settings = ("--appendfsync", "always", "--seal-rows", str(SEAL_ROWS), "--log-file-size", str(1 << 16))
    with running_server("--dir", str(folder), *settings) as server, server.client() as client:
        fill_before_the_snapshot(client)
        client.execute_command("SAVE")
        fill_behind_the_snapshot(client)
        server.terminate()
    dump = subprocess.run(
        [sys.executable, "-P", "-m", "engram", "dump", folder], stdout=subprocess.PIPE, check=True
    )
    folder.with_suffix(".jsonl").write_bytes(dump.stdout)


if __name__ == "__main__":
    main()
