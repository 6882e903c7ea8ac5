"""The two servers that are compared: a Redis and an engram, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import attrs

from tests.compat.differential.wire import HOST, Reply, WireClient
from tests.crash.server_process import running_server

# Given to both, so that limits are within reach of short requests.
OPTIONS = ("--proto-max-bulk-len", "1mb")

REDIS8 = Path(__file__).parents[4] / "shared" / "peers" / "redis8.6"

_STOP_SECONDS = 20
_READY = b"Ready to accept connections"


def redis8_command() -> list[str] | None:
    """How to run Redis 8: the environment's REDIS8, or the peer beside this tree; None without either."""
    command = shlex.split(os.environ.get("REDIS8", str(REDIS8)))
    return command if shutil.which(command[0]) else None


@attrs.define(eq=False)
class Peer:
    """A server that runs, and a connection to it that no sequence disturbs."""

    name: str
    port: int
    control: WireClient

    def connect(self) -> WireClient:
        return WireClient(self.port)

    @cached_property
    def commands(self) -> frozenset[str]:
        """Names of its commands in lower case, subcommands as `container|subcommand`."""
        names = set()
        for entry in self.control.call(b"COMMAND").elements:
            fields = entry.elements
            names.add(fields[0].text.decode().lower())
            if len(fields) > 9:
                names.update(part.elements[0].text.decode().lower() for part in fields[9].elements)
        return frozenset(names)

    @cached_property
    def documentation(self) -> Reply:
        """Its COMMAND DOCS."""
        return self.control.call(b"COMMAND", b"DOCS")

    @cached_property
    def version(self) -> tuple[int, ...]:
        """Of the Redis it is or claims to be."""
        for line in self.control.call(b"INFO", b"server").text.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"redis_version":
                return tuple(int(part) for part in value.split(b"."))
        raise AssertionError("no redis_version in INFO")


@attrs.frozen(eq=False)
class Pair:
    """The servers to compare."""

    redis: Peer
    engram: Peer

    @property
    def both(self) -> tuple[Peer, Peer]:
        return self.redis, self.engram


@contextmanager
def running_redis(command: list[str]) -> Iterator[int]:
    """A Redis that keeps nothing on disk; yields its port."""
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options = ["--bind", HOST, "--port", str(port), "--save", "", "--dir", folder, *OPTIONS]
        process = stack.enter_context(
            subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        try:
            assert process.stdout is not None
            output = b""
            while _READY not in output:
                line = process.stdout.readline()
                assert line, f"Redis did not start: {output.decode(errors='replace')}"
                output += line
            yield port
        finally:
            process.terminate()
            process.communicate(timeout=_STOP_SECONDS)


@contextmanager
def running_pair(command: list[str]) -> Iterator[Pair]:
    """A Redis that `command` starts, and an engram."""
    with ExitStack() as stack:
        redis = stack.enter_context(running_redis(command))
        engram = stack.enter_context(running_server(*OPTIONS)).port
        peers = []
        for name, port in (("Redis", redis), ("engram", engram)):
            control = WireClient(port)
            stack.callback(control.close)
            peers.append(Peer(name, port, control))
        yield Pair(*peers)
