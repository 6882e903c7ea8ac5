"""Load from processes of their own: raw sockets, requests packed beforehand, replies read by hiredis.

The generator shares the machine with the server it measures, so it does as little as it can.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from threading import BrokenBarrierError
from typing import Any

import attrs
import hiredis

HOST = "127.0.0.1"

# No process of the load lives longer.
LIMIT_SECONDS = 600.0

_READ_SIZE = 1 << 18


class LoadError(Exception):
    """A server answered with an error or left, or a process of the load failed."""


@attrs.frozen
class Measured:
    """What one process did. Times are in seconds, `began` and `ended` by the machine's monotonic clock.

    `moments` are when answers arrived, by the same clock. What `replies` counts is the work's own affair.
    """

    began: float
    ended: float
    replies: int
    latencies: list[float] = attrs.field(factory=list)
    moments: list[float] = attrs.field(factory=list)


# A process calls `ready` once, when it is connected; it returns when all the others are, too.
Work = Callable[[Callable[[], object]], Measured]
# A companion goes on until `finished()` says that all works have ended.
Companion = Callable[[Callable[[], object], Callable[[], bool]], Measured]


def pack(*arguments: bytes) -> bytes:
    """A request as RESP."""
    bulks = (b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments)
    return b"*%d\r\n%b" % (len(arguments), b"".join(bulks))


class Client:
    """One blocking connection, speaking RESP2."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=LIMIT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def close(self) -> None:
        self.socket.close()

    def send(self, requests: bytes) -> None:
        self.socket.sendall(requests)

    def receive(self, count: int) -> list[Any]:
        """The next `count` replies.

        Raises:
            LoadError: one of them is an error, or the server has closed the connection.
        """
        replies: list[Any] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is False:
                chunk = self.socket.recv(_READ_SIZE)
                if not chunk:
                    raise LoadError("the server closed the connection")
                self._reader.feed(chunk)
            elif isinstance(reply, hiredis.ReplyError):
                raise LoadError(f"the server answered: {reply}")
            else:
                replies.append(reply)
        return replies

    def call(self, *arguments: bytes) -> Any:
        self.send(pack(*arguments))
        return self.receive(1)[0]


def pipeline(port: int, requests: Sequence[bytes], depth: int, ready: Callable[[], object]) -> Measured:
    """Sends requests `depth` at a time, waiting for the replies in between."""
    batches = [requests[start : start + depth] for start in range(0, len(requests), depth)]
    joined = [(b"".join(batch), len(batch)) for batch in batches]
    with closing(Client(port)) as client:
        ready()
        began = time.monotonic()
        for data, count in joined:
            client.send(data)
            client.receive(count)
        return Measured(began, time.monotonic(), len(requests))


def exchange(
    port: int, requests: Sequence[bytes], clients: int, seconds: float, ready: Callable[[], object]
) -> Measured:
    """Clients that each send the next request when the last is answered, for a time."""
    connections = [Client(port) for _ in range(clients)]
    latencies: list[float] = []
    with selectors.EpollSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        ready()
        began = now = time.monotonic()
        sent = dict.fromkeys(connections, began)
        for number, connection in enumerate(connections):
            connection.send(requests[number % len(requests)])
        number = clients
        waiting = clients
        while waiting:
            for key, _ in selector.select(LIMIT_SECONDS):
                connection = key.data
                connection.receive(1)
                now = time.monotonic()
                latencies.append(now - sent[connection])
                if now - began < seconds:
                    sent[connection] = now
                    connection.send(requests[number % len(requests)])
                    number += 1
                else:
                    waiting -= 1
    for connection in connections:
        connection.close()
    return Measured(began, now, len(latencies), latencies)


def ping(port: int, interval: float, seconds: float, ready: Callable[[], object]) -> Measured:
    """One client that sends a PING every `interval` seconds, or as soon as the last is answered."""
    request = pack(b"PING")
    latencies = []
    with closing(Client(port)) as client:
        ready()
        began = planned = now = time.monotonic()
        while now - began < seconds:
            client.send(request)
            client.receive(1)
            answered = time.monotonic()
            latencies.append(answered - now)
            planned = max(planned + interval, answered)
            time.sleep(planned - answered)
            now = time.monotonic()
        return Measured(began, now, len(latencies), latencies)


def rest(seconds: float, ready: Callable[[], object]) -> Measured:
    """Nothing, for a time: something for companions to accompany."""
    ready()
    began = time.monotonic()
    time.sleep(seconds)
    return Measured(began, time.monotonic(), 0)


def run_together(
    works: Sequence[Work], companions: Sequence[Companion] = (), limit: float = LIMIT_SECONDS
) -> list[Measured]:
    """Runs each work and companion in a spawned process; all begin when the last is ready.

    Returns in the same order, works first.

    Raises:
        LoadError: one of them failed or took longer than `limit` seconds; the others have been ended.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(works) + len(companions))
    finished = context.Event()
    deadline = time.monotonic() + limit
    started = []
    try:
        for task in [*works, *(partial(_accompany, companion, finished.is_set) for companion in companions)]:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(task, barrier.wait, sender), daemon=True)
            process.start()
            sender.close()
            started.append((process, receiver))
        results: list[Measured] = []
        for _, receiver in started:
            if len(results) == len(works):
                finished.set()
            try:
                if not receiver.poll(max(0.0, deadline - time.monotonic())):
                    raise LoadError("a process of the load took too long")
                result = receiver.recv()
            except EOFError:
                raise LoadError("a process of the load died") from None
            if isinstance(result, str):
                raise LoadError(result)
            results.append(result)
        return results
    finally:
        for process, _ in started:
            process.terminate()
            process.join()


def _accompany(companion: Companion, finished: Callable[[], bool], ready: Callable[[], object]) -> Measured:
    return companion(ready, finished)


def _run(work: Work, wait: Callable[[float], int], sender: Connection[Measured | str, object]) -> None:
    try:
        sender.send(work(lambda: wait(LIMIT_SECONDS)))
    except (LoadError, OSError, BrokenBarrierError) as error:
        sender.send(f"{type(error).__name__}: {error}")
