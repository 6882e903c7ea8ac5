"""Clients that mean harm, or are broken: the others do not notice, and memory returns."""

from __future__ import annotations

import itertools
import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest

from tests.certificates import Authority
from tests.conftest import encode_request
from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess, running_server, wait_until

CONNECTIONS = 10_000
OPEN_AT_ONCE = 200
COMMANDS = 100_000
BIG_VALUE = 4096

# What a server may hold more than before, once a client that made it hold much has left.
SLACK_BYTES = 64 << 20

PING = b"*1\r\n$4\r\nPING\r\n"
PONG = b"+PONG\r\n"


PASSWORD = "correct horse battery staple"
ATTEMPTS = 10_000


def connect(server: ServerProcess, port: int | None = None) -> socket.socket:
    return socket.create_connection((HOST, port or server.port), DEADLINE_SECONDS)


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
def unnoticed(server: ServerProcess, password: str | None = None) -> Iterator[None]:
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
        if password is not None:
            witness.sendall(encode_request([b"AUTH", password.encode()]))
            assert receive(witness, 5) == b"+OK\r\n"
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
    with server.client(password=password) as client:
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


def test_ten_thousand_attempts_without_the_password() -> None:
    """What is not small costs nothing before AUTH, and what is small is refused or guessed wrong."""
    large = b"x" * (16 << 10)
    too_large = b"x" * ((16 << 10) + 1)
    attempts = itertools.cycle(
        (
            (encode_request([b"AUTH", large]), b"-WRONGPASS "),
            (encode_request([b"AUTH", too_large]), b"-ERR Protocol error: unauthenticated bulk length\r\n"),
            (encode_request([b"MGET", *[b"k"] * 9]), b"-NOAUTH Authentication required.\r\n"),
            (
                encode_request([b"MGET", *[b"k"] * 10]),
                b"-ERR Protocol error: unauthenticated multibulk length\r\n",
            ),
            (encode_request([b"HELLO", b"3", b"AUTH", b"default", large]), b"-WRONGPASS "),
            (encode_request([b"SET", b"k", large]), b"-NOAUTH Authentication required.\r\n"),
        )
    )
    with running_server("--requirepass", PASSWORD) as server, unnoticed(server, PASSWORD):
        before = server.resident_bytes()
        for _ in range(ATTEMPTS):
            request, reply = next(attempts)
            with connect(server) as hostile, suppress(ConnectionError):
                # What is refused before all of it is here may end in a reset instead of the reply.
                hostile.sendall(request)
                assert hostile.recv(1000).startswith(reply)
        assert server.peak_resident_bytes() < before + SLACK_BYTES


def test_pipelining_without_password_and_without_reading() -> None:
    """Before AUTH replies are held for a client up to a kilobyte or a burst."""
    arguments = ("--requirepass", PASSWORD, "--client-write-timeout", "1")
    with running_server(*arguments) as server, unnoticed(server, PASSWORD):
        before = server.resident_bytes()
        clients = [connect(server) for _ in range(5)]
        senders = [
            threading.Thread(target=send_until_dropped, args=(client, b"PING\r\n" * 1_000_000))
            for client in clients
        ]
        for sender in senders:
            sender.start()
        with server.client(password=PASSWORD) as client:
            wait_until(lambda: len(client.client_list()) == 2, "the clients to be dropped")
        for sender, hostile in zip(senders, clients, strict=True):
            sender.join()
            hostile.close()
        assert server.peak_resident_bytes() < before + SLACK_BYTES


@attrs.frozen
class Encrypted:
    """A server that speaks TLS beside plain TCP, and what its clients need."""

    process: ServerProcess
    port: int
    context: ssl.SSLContext

    def connect(self) -> ssl.SSLSocket:
        return self.context.wrap_socket(connect(self.process, self.port), server_hostname="localhost")


@contextmanager
def running_encrypted(folder: Path, *arguments: str) -> Iterator[Encrypted]:
    authority = Authority(folder)
    identity = authority.issue("server")
    # The server must be told a port, and another while both are free.
    with socket.create_server((HOST, 0)) as first, socket.create_server((HOST, 0)) as second:
        plain, encrypted = first.getsockname()[1], second.getsockname()[1]
    with running_server(
        *("--port", str(plain), "--tls-port", str(encrypted), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(identity.certificate), "--tls-key-file", str(identity.key)),
        *arguments,
    ) as server:
        yield Encrypted(server, encrypted, authority.client_context())


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    with running_encrypted(tmp_path_factory.mktemp("certificates")) as server:
        yield server


def hello(context: ssl.SSLContext) -> bytes:
    """The first message of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("said", ["nothing", "half a hello", "hello", "hello, and no TLS", "no TLS"])
def test_handshakes_that_are_not_finished(said: str, encrypted: Encrypted) -> None:
    """They take neither memory nor the places of others, plain or TLS."""
    greeting = hello(encrypted.context)
    data = {
        "nothing": b"",
        "half a hello": greeting[: len(greeting) // 2],
        "hello": greeting,
        "hello, and no TLS": greeting + PING,
        "no TLS": PING,
    }[said]
    with unnoticed(encrypted.process):
        before = encrypted.process.resident_bytes()
        # More than maxclients: the first must give way.
        clients = [connect(encrypted.process, encrypted.port) for _ in range(1500)]
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(data)
        with encrypted.connect() as honest:
            honest.sendall(PING)
            assert receive(honest, len(PONG)) == PONG
        assert encrypted.process.resident_bytes() < before + SLACK_BYTES
        for client in clients:
            client.close()


def test_handshakes_and_then_silence(encrypted: Encrypted) -> None:
    with unnoticed(encrypted.process):
        clients = [encrypted.connect() for _ in range(200)]
        with encrypted.connect() as honest:
            honest.sendall(PING)
            assert receive(honest, len(PONG)) == PONG
        for client in clients:
            client.close()


def test_many_handshakes(encrypted: Encrypted) -> None:
    """Clients that come over TLS, ask once or not at all, and leave politely or not."""
    with unnoticed(encrypted.process):
        for number in range(300):
            with encrypted.connect() as client:
                if number % 2:
                    client.sendall(PING)
                    assert receive(client, len(PONG)) == PONG
                if number % 5 == 0:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_pipelining_without_reading_over_tls(tmp_path: Path) -> None:
    limit = 16 << 20
    arguments = ("--client-output-buffer-limit", str(limit), "--client-write-timeout", "1")
    with running_encrypted(tmp_path, *arguments) as server, unnoticed(server.process):
        before = server.process.resident_bytes()
        with server.process.client() as client, server.connect() as hostile:
            assert client.set("big", bytes(BIG_VALUE))
            hostile.sendall(PING)
            assert receive(hostile, len(PONG)) == PONG
            sender = threading.Thread(target=send_until_dropped, args=(hostile, b"GET big\r\n" * COMMANDS))
            sender.start()
            wait_until(lambda: len(client.client_list()) == 2, "the client to be dropped")
            sender.join()
        assert server.process.peak_resident_bytes() < before + limit + SLACK_BYTES


def test_reading_late_over_tls(encrypted: Encrypted) -> None:
    with encrypted.process.client() as client:
        assert client.set("big", bytes(BIG_VALUE))
    reply = b"$%d\r\n%s\r\n" % (BIG_VALUE, bytes(BIG_VALUE))
    # Enough that the sockets do not take all of it.
    count = 10_000
    with unnoticed(encrypted.process), encrypted.process.client() as client, encrypted.connect() as late:
        late.sendall(b"GET big\r\n" * count)
        wait_until(
            lambda: any(int(each["omem"]) > 1 << 20 for each in client.client_list()),
            "replies to wait for the client",
        )
        for _ in range(count // 100):
            assert receive(late, 100 * len(reply)) == 100 * reply


def test_more_clients_than_are_served_over_tls(encrypted: Encrypted) -> None:
    with encrypted.process.client() as client:
        client.config_set("maxclients", 10)
        try:
            clients = [encrypted.connect() for _ in range(9)]
            for each in clients:
                each.sendall(PING)
                assert receive(each, len(PONG)) == PONG
            with encrypted.connect() as refused:
                assert receive_all(refused) == b"-ERR max number of clients reached\r\n"
            for each in clients:
                each.close()
        finally:
            client.config_set("maxclients", 1024)


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\nSET k v\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nSET k v\r\n",
        b"*2\r\n$4\r\nPost\r\n$1\r\n/\r\nSET k v\r\n",
    ],
)
def test_a_browser_is_not_answered(request_: bytes, server: ServerProcess) -> None:
    """Cross-protocol scripting: https://redis.io/docs/latest/operate/oss_and_stack/management/security/."""
    with unnoticed(server), server.client() as client:
        with connect(server) as browser:
            browser.sendall(request_)
            assert b"OK" not in receive_all(browser)
        assert client.get("k") is None
        wait_until(lambda: "attack" in server.errors.lower(), "the line of the log")
