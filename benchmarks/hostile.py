"""What another client notices while hostile ones attack: the time of its PINGs, and the server's memory.

    python -m benchmarks.hostile

Each attack runs in processes of its own for some seconds, against one server that has a password and speaks
TLS beside plain TCP. The first line is without any attack.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import numpy as np

from benchmarks.peers import ENGRAM, describe_machine, end_servers_when_terminated, family, free_port, running

PASSWORD = "correct horse battery staple"
OPEN_AT_ONCE = 200
_PING = b"*1\r\n$4\r\nPING\r\n"
_PONG = b"+PONG\r\n"
_PAUSE_SECONDS = 0.002
_TIMEOUT_SECONDS = 5.0


@attrs.frozen
class Target:
    """A server to attack, and what trusts its certificate."""

    port: int
    tls_port: int
    certificate: str

    def connect(self, tls: bool = False) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.tls_port if tls else self.port), _TIMEOUT_SECONDS)

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def encrypt(self, client: socket.socket) -> ssl.SSLSocket:
        return self.context().wrap_socket(client, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first message of a TLS handshake."""
        outgoing = ssl.MemoryBIO()
        client = self.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        return outgoing.read()


Attack = Callable[[Target], None]


def repeatedly_send(data: bytes, tls: bool = False) -> Attack:
    """Connects, sends and leaves, over and over, with some connections left open for a while."""

    def attack(target: Target) -> None:
        kept: list[socket.socket] = []
        while True:
            with suppress(OSError):
                kept.append(target.connect(tls))
                kept[-1].sendall(data)
            if len(kept) > OPEN_AT_ONCE:
                kept.pop(0).close()

    return attack


def start_handshakes(target: Target) -> None:
    """Has the server sign again and again, and never finishes."""
    repeatedly_send(target.hello(), tls=True)(target)


def start_half_handshakes(target: Target) -> None:
    hello = target.hello()
    repeatedly_send(hello[: len(hello) // 2], tls=True)(target)


def shake_hands(target: Target) -> None:
    """Finishes handshakes and says nothing."""
    kept: list[socket.socket] = []
    while True:
        with suppress(OSError):
            kept.append(target.encrypt(target.connect(tls=True)))
        if len(kept) > OPEN_AT_ONCE:
            kept.pop(0).close()


def guess_passwords(target: Target) -> None:
    guess = b"x" * (16 << 10)
    request = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n" % (len(guess), guess)
    while True:
        with suppress(OSError), target.connect() as client:
            for _ in range(100):
                client.sendall(request)
                client.recv(1000)


def never_read(authenticate: bool, tls: bool) -> Attack:
    """Pipelines and leaves the replies unread."""

    def attack(target: Target) -> None:
        while True:
            with suppress(OSError):
                client = target.connect(tls)
                client = target.encrypt(client) if tls else client
                if authenticate:
                    client.sendall(b'AUTH "%s"\r\n' % PASSWORD.encode())
                client.settimeout(1)
                with client:
                    for _ in itertools.repeat(None):
                        client.sendall(b"GET big\r\n" * 1000)

    return attack


def flood(requests: bytes) -> Attack:
    """Sends requests that cost the server more than their bytes suggest, and reads the replies."""

    def attack(target: Target) -> None:
        with target.connect() as client:
            client.sendall(b'AUTH "%s"\r\n' % PASSWORD.encode())
            unsent = memoryview(b"")
            while True:
                client.setblocking(False)
                with suppress(BlockingIOError):
                    while True:
                        unsent = unsent or memoryview(requests)
                        unsent = unsent[client.send(unsent) :]
                client.settimeout(_TIMEOUT_SECONDS)
                client.recv(1 << 20)

    return attack


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "connections that say nothing": repeatedly_send(b""),
    "garbage": repeatedly_send(bytes(range(256)) * 16),
    "unfinished requests": repeatedly_send(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$16000\r\nx"),
    "guesses at the password, 16 KiB each": guess_passwords,
    "large requests before AUTH": repeatedly_send(b"*2\r\n$4\r\nAUTH\r\n$500000000\r\n" + b"x" * 60_000),
    "requests of two bytes": flood(b"a\n" * 30_000),
    "lines of 30,000 words": flood(b"a " * 30_000 + b"\r\n"),
    "INFO": flood(b"INFO everything\r\n" * 2000),
    "numbers of 4,932 digits": flood(b"INCRBYFLOAT number 1e4931\r\n" * 2000),
    "transactions of 10,000 commands": flood(b"MULTI\r\n" + b"SET k v\r\n" * 10_000 + b"EXEC\r\n"),
    "replies unread, before AUTH": never_read(authenticate=False, tls=False),
    "replies unread": never_read(authenticate=True, tls=False),
    "replies unread, TLS": never_read(authenticate=True, tls=True),
    "TLS: connections that say nothing": repeatedly_send(b"", tls=True),
    "TLS: half a hello": start_half_handshakes,
    "TLS: hello, and no more": start_handshakes,
    "TLS: a handshake, and no more": shake_hands,
}


def make_certificate(folder: Path, kind: str) -> tuple[str, str]:
    """A certificate that signs itself, and its key; `kind` is what openssl calls the kind of key."""
    certificate, key = str(folder / "server.pem"), str(folder / "server.key")
    options = "-pkeyopt ec_paramgen_curve:prime256v1" if kind == "ec" else ""
    subprocess.run(
        shlex.split(
            f"openssl req -x509 -newkey {kind} {options} -nodes -days 2 -subj /CN=localhost"
            f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
        ),
        check=True,
        capture_output=True,
    )
    return certificate, key


def ping(target: Target, seconds: float) -> np.ndarray:
    """Times of PINGs, in milliseconds."""
    times = []
    with target.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b'AUTH "%s"\r\n' % PASSWORD.encode())
        client.recv(100)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            client.sendall(_PING)
            if client.recv(100) != _PONG:
                raise ConnectionError("a PING was not answered")
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(_PAUSE_SECONDS)
    return np.array(times)


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def measure(target: Target, pid: int, attack: Attack | None, seconds: float, attackers: int) -> str:
    """The rest of a line of the table."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=attack, args=(target,)) for _ in range(attackers) if attack]
    for process in processes:
        process.start()
    try:
        time.sleep(min(1.0, seconds / 4))
        times = ping(target, seconds)
        memory = resident_mib(pid)
    finally:
        for process in processes:
            process.kill()
            process.join()
    p50, p99 = np.percentile(times, (50, 99))
    return f"{p50:.2f} | {p99:.1f} | {times.max():.1f} | {memory:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack (default: 5)")
    parser.add_argument("--attackers", type=int, default=2, help="processes that attack (default: 2)")
    parser.add_argument("--key", choices=("ec", "rsa:2048"), default="ec", help="of the TLS certificate")
    parser.add_argument("--only", default="", help="attacks whose names contain this")
    arguments = parser.parse_args()
    end_servers_when_terminated()
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder), arguments.key)
        target = Target(free_port(), free_port(), certificate)
        command = (
            f"{ENGRAM} --port {target.port} --tls-port {target.tls_port}"
            f" --tls-cert-file {certificate} --tls-key-file {key} --tls-auth-clients no"
            f" --requirepass '{PASSWORD}' --client-write-timeout 2"
        )
        with running("engram", command, target.port) as server:
            with target.connect() as client:
                client.sendall(b'AUTH "%s"\r\nSET big %s\r\n' % (PASSWORD.encode(), b"x" * 4096))
                client.recv(100)
            print(f"{describe_machine()}; key {arguments.key}; {arguments.attackers} attackers\n")
            print("| attack | PING p50, ms | p99 | longest | memory, MiB |")
            print("|---|---|---|---|---|")
            for name, attack in ATTACKS.items():
                if arguments.only not in name:
                    continue
                line = measure(target, family(server.pid)[0], attack, arguments.seconds, arguments.attackers)
                print(f"| {name} | {line} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
