"""The longest PING, and the longest pause of the garbage collector, among millions of containers.

    python -m benchmarks.collector [--containers 5000000] [--seconds 10]

The server is engram with a kind of value that is nothing but lists, tuples and dictionaries
(`benchmarks.containers`). They are made; then some are replaced, clients come and leave, and writes are
queued; at last a full collection is asked for. Pauses are in processor time. One of over 20 ms makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import hiredis

from benchmarks import hostile
from benchmarks.attacks import Case, Side, command
from benchmarks.containers import CONTAINERS_OF_AN_ITEM
from benchmarks.dialects import Engram
from benchmarks.gaps import longest_ping
from benchmarks.load import pack
from benchmarks.peers import (
    describe_machine,
    end_servers_when_terminated,
    free_port,
    markdown_table,
    running,
)

BOUND_MS = 20.0
SERVER = f"{sys.executable} -P -m benchmarks.containers"

_ITEMS_OF_A_REQUEST = 250
_REQUESTS_OF_A_KEY = 100
_CLIENTS = 300
_QUEUED = 10_000
_MAKING_SECONDS = 600.0


def make(side: Side, items: int, prefix: bytes) -> Sequence[str]:
    """Makes so many items, at many keys."""
    client = side.connect()
    for number in range(items // _ITEMS_OF_A_REQUEST):
        key = b"%b:%d" % (prefix, number // _REQUESTS_OF_A_KEY)
        if refused := client.call(b"CONTAINERS.ADD", key, b"%d" % _ITEMS_OF_A_REQUEST):
            return refused
    return ()


def replace(side: Side) -> Sequence[str]:
    """Makes keys and deletes older ones, over and over."""
    client = side.connect()
    while True:
        make(side, _ITEMS_OF_A_REQUEST * _REQUESTS_OF_A_KEY, b"other")
        client.call(b"DEL", b"other:0")


def connect_and_leave(side: Side) -> Sequence[str]:
    """Many clients that come, talk and leave, over and over."""
    while True:
        clients = [side.connect() for _ in range(_CLIENTS)]
        for client in clients:
            client.ask(pack(b"SET", b"k", b"v") + pack(b"MULTI") + pack(b"GET", b"k"), 3)


def queue(side: Side) -> Sequence[str]:
    """A client that writes many keys, and queues as many writes, over and over."""
    client = side.connect()
    writes = b"".join(pack(b"SET", b"k:%d" % number, b"v") for number in range(_QUEUED))
    while True:
        client.ask(writes, _QUEUED)
        client.ask(pack(b"MULTI") + writes + pack(b"DISCARD"), _QUEUED + 2)


def pauses(side: Side) -> list[tuple[int, float, float]]:
    """Of each generation since the last call: collections, the longest in milliseconds, and all together."""
    with side.target.connect() as client:
        reader = hiredis.Reader()
        client.sendall(pack(b"AUTH", hostile.PASSWORD.encode()) + pack(b"CONTAINERS.PAUSES"))
        found: list[object] = []
        while len(found) < 2:
            reader.feed(client.recv(4096))
            while (reply := reader.gets()) is not False:
                found.append(reply)
    text = found[1]
    assert isinstance(text, bytes)
    return [(count, longest, total) for count, longest, total in json.loads(text)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--containers", type=int, default=5_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case that has no end")
    parser.add_argument("--server", default=SERVER, help="command that runs the server")
    arguments = parser.parse_args()
    end_servers_when_terminated()
    items = arguments.containers // CONTAINERS_OF_AN_ITEM
    cases = [
        Case("nothing", lambda side: (), attackers=0),
        Case("the containers are made", lambda side: make(side, items, b"c"), endless=True),
        Case("some are replaced", replace, endless=True),
        Case("clients come and leave", connect_and_leave, endless=True),
        Case("writes are queued", queue, endless=True),
        Case("a full collection", command(b"CONTAINERS.COLLECT", times=3)),
    ]
    port = free_port()
    lines = []
    longest_pause = 0.0
    with running("engram", f"{arguments.server} --port {port} --requirepass '{hostile.PASSWORD}'", port):
        side = Side(hostile.Target(port, 0, ""), Engram(1))
        pauses(side)
        for number, case in enumerate(cases):
            # Making all of them ends by itself.
            seconds = _MAKING_SECONDS if number == 1 else arguments.seconds
            longest, refused = longest_ping(case, side, seconds)
            if refused:
                print(f"{case.name}: refused: {refused}", file=sys.stderr)
            found = pauses(side)
            longest_pause = max(longest_pause, *(pause for _, pause, _ in found))
            cells = [f"{count:,}: {pause:.1f}, {total:,.0f}" for count, pause, total in found]
            lines.append([case.name, f"{longest:.1f}", *cells])
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    header = ["ms", "longest PING", *(f"generation {number}" for number in range(3))]
    print(markdown_table(header, lines))
    print("\nOf each generation: collections, ms of the longest, of all.", describe_machine(), sep="\n\n")
    return 0 if longest_pause <= BOUND_MS else 1


if __name__ == "__main__":
    sys.exit(main())
