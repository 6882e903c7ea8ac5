"""Clients that mean harm, or are broken: the others do not notice, and memory returns."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, running_server, wait_until

CONNECTIONS = 10_000
OPEN_AT_ONCE = 200
COMMANDS = 100_000
BIG_VALUE = 4096

# What a server may hold more than before, once a client that made it hold much has left.
SLACK_BYTES = 64 << 20

PING = b"*1\r\n$4\r\nPING\r\n"
PONG = b"+PONG\r\n"


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection((HOST, server.port), DEADLINE_SECONDS)


def receive(client: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, fewer only at the end of the stream."""
    data = b""
    while len(data) < size and (chunk := client.recv(size - len(data))):
        data += chunk
    return data


def receive_all(client: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    return b"".join(iter(partial(client.recv, 65536), b""))


@contextmanager
def unnoticed(server: ServerProcess) -> Iterator[None]:
    """Another client's PINGs are answered all along, and afterwards memory and connections are as before."""
    before = server.resident_bytes()
    stop = threading.Event()
    answered = 0
    failures: list[BaseException] = []

    def ping(client: socket.socket) -> None:
        nonlocal answered
        try:
            while not stop.is_set():
                client.sendall(PING)
                assert receive(client, len(PONG)) == PONG
                answered += 1
        except BaseException as error:
            failures.append(error)

    with connect(server) as witness:
        thread = threading.Thread(target=ping, args=(witness,))
        thread.start()
        try:
            yield
            seen = answered
            wait_until(lambda: answered > seen or bool(failures), "a PING to be answered")
        finally:
            stop.set()
            thread.join()
    assert failures == []
    with server.client() as client:
        wait_until(lambda: client.info("clients")["connected_clients"] == 1, "the clients to be gone")
        wait_until(
            lambda: server.resident_bytes() < before + SLACK_BYTES,
            f"the memory to fall from {server.resident_bytes():,} to near {before:,} bytes",
            20,
        )


def test_ten_thousand_connections(server: ServerProcess) -> None:
    with unnoticed(server):
        for start in range(0, CONNECTIONS, OPEN_AT_ONCE):
            clients = [connect(server) for _ in range(OPEN_AT_ONCE)]
            for number, client in enumerate(clients, start):
                # Some ask and read, some ask and leave, some say nothing.
                if number % 3:
                    client.sendall(PING)
                if number % 3 == 2:
                    assert receive(client, len(PONG)) == PONG
                if number % 5 == 0:
                    # The peer sees a reset instead of an end.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
        with server.client() as client:
            assert client.info("stats")["total_connections_received"] >= CONNECTIONS


def test_more_clients_than_are_served(server: ServerProcess) -> None:
    limit = 50
    with server.client() as client:
        client.config_set("maxclients", limit)
        try:
            clients = [connect(server) for _ in range(limit - 1)]
            for each in clients:
                each.sendall(PING)
                assert receive(each, len(PONG)) == PONG
            with connect(server) as refused:
                assert receive_all(refused) == b"-ERR max number of clients reached\r\n"
            for each in clients:
                each.close()
            wait_until(lambda: client.info("clients")["connected_clients"] == 1, "the clients to be gone")
        finally:
            client.config_set("maxclients", 1024)


def test_pipelining_without_reading() -> None:
    """Replies are held up to a limit, then requests are left unread, then the client is dropped."""
    limit = 16 << 20
    arguments = ("--client-output-buffer-limit", str(limit), "--client-write-timeout", "1")
    requests = b"GET big\r\n" * COMMANDS
    with running_server(*arguments) as server, unnoticed(server):
        before = server.resident_bytes()
        with server.client() as client, connect(server) as hostile:
            assert client.set("big", bytes(BIG_VALUE))
            hostile.sendall(PING)
            assert receive(hostile, len(PONG)) == PONG
            sender = threading.Thread(target=send_until_dropped, args=(hostile, requests))
            sender.start()
            wait_until(lambda: len(client.client_list()) == 2, "the client to be dropped")
            sender.join()
        assert server.peak_resident_bytes() < before + limit + SLACK_BYTES


def send_until_dropped(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        client.sendall(data)


def test_reading_late(server: ServerProcess) -> None:
    """A client that reads only once the server will hold no more has all its answers, in order."""
    with server.client() as client:
        assert client.set("big", bytes(BIG_VALUE))
        limit = int(client.config_get("client-output-buffer-limit")["client-output-buffer-limit"])
    reply = b"$%d\r\n%s\r\n" % (BIG_VALUE, bytes(BIG_VALUE))
    with unnoticed(server), server.client() as client, connect(server) as late:
        sender = threading.Thread(target=late.sendall, args=(b"GET big\r\n" * COMMANDS,))
        sender.start()
        wait_until(
            lambda: any(int(each["omem"]) >= limit for each in client.client_list()),
            "replies to wait for the client",
        )
        for _ in range(COMMANDS // 100):
            assert receive(late, 100 * len(reply)) == 100 * reply
        sender.join()


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"*2000000000\r\n", b"-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*99999999999999999999\r\n", b"-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n$2000000000\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"*1\r\n$-5\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"*1\r\n+PING\r\n", b"-ERR Protocol error: expected '$', got '+'\r\n"),
        (b"*1\r\n*1\r\n$4\r\nPING\r\n", b"-ERR Protocol error: expected '$', got '*'\r\n"),
        (b'SET key "value\r\n', b"-ERR Protocol error: unbalanced quotes in request\r\n"),
        (b"x" * 70_000, b"-ERR Protocol error: too big inline request\r\n"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_protocol_error_ends_only_that_client(request_: bytes, reply: bytes, server: ServerProcess) -> None:
    with unnoticed(server), connect(server) as hostile:
        hostile.sendall(PING + request_)
        assert receive_all(hostile) == PONG + reply


def test_half_a_command_left_open(server: ServerProcess) -> None:
    """Announced memory is not reserved, and a half-sent request holds up nobody."""
    halves = (
        b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$536870912\r\nonly the first few bytes",
        b"*1048576\r\n$4\r\nPING\r\n",
        b"*2\r\n$3\r\nGET\r\n$1",
        b"GET ke",
        b"*",
    )
    with unnoticed(server):
        before = server.resident_bytes()
        clients = [connect(server) for _ in range(20) for _ in halves]
        for client, half in zip(clients, itertools.cycle(halves), strict=False):
            client.sendall(half)
        with server.client() as client_:
            wait_until(
                lambda: sum(int(each["qbuf"]) > 0 for each in client_.client_list()) >= len(clients),
                "all halves to be read",
            )
        assert server.resident_bytes() < before + SLACK_BYTES
        for client in clients:
            client.close()


def test_a_request_sent_byte_by_byte(server: ServerProcess) -> None:
    with unnoticed(server), connect(server) as slow:
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in PING * 100:
            slow.send(bytes((byte,)))
        assert receive(slow, 100 * len(PONG)) == 100 * PONG


def test_a_large_value_comes_and_goes(server: ServerProcess) -> None:
    value = bytes(100 << 20)
    with unnoticed(server), server.client() as client:
        assert client.set("large", value)
        assert client.get("large") == value
        assert client.delete("large") == 1


def test_garbage(server: ServerProcess) -> None:
    """Random bytes, plain or behind the start of a real request: the client is answered or waited for."""
    source = random.Random(5)
    openings = (b"", b"*3\r\n$3\r\nSET\r\n", b"*2\r\n$3\r\nGET\r\n$5\r\n", b"\r\n", b"*-", b"$5\r\n", b"\x00")
    with unnoticed(server):
        for number in range(300):
            with connect(server) as hostile:
                hostile.sendall(openings[number % len(openings)] + source.randbytes(source.randint(1, 5000)))
                hostile.shutdown(socket.SHUT_WR)
                answer = receive_all(hostile)
                assert answer == b"" or answer[:1] in b"+-$*:_"
