from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from engram.config import Config
from engram.errors import ConfigError, OperatorError
from engram.listeners import HANDSHAKE_SECONDS, Listener, Reception, listening, tcp_port
from tests.certificates import Authority, Identity
from tests.conftest import PATIENCE, Client, House, OpenHouse

OK, PONG = b"+OK\r\n", b"+PONG\r\n"
FULL = b"-ERR max number of clients reached\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    return authority.issue("server")


@pytest.fixture(scope="module")
def known(authority: Authority) -> Identity:
    return authority.issue("client", "somebody@example.org")


@pytest.fixture
def encrypting(authority: Authority, identity: Identity) -> Config:
    """Settings of a server that speaks TLS to anybody."""
    return Config(
        port=0,
        tls_port=free_port(),
        tls_cert_file=str(identity.certificate),
        tls_key_file=str(identity.key),
        tls_ca_cert_file=str(authority.file),
        tls_auth_clients="no",
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@attrs.define
class Door:
    """A house that clients come into through sockets."""

    house: House
    reception: Reception
    listeners: list[Listener]
    clients: trio.Nursery
    streams: list[trio.SocketStream]

    @property
    def config(self) -> Config:
        return self.house.server.config

    def serve(self, stream: trio.abc.Stream) -> Client:
        client = Client(stream)
        self.clients.start_soon(client.read)
        return client

    async def connect(self, number: int = 0) -> Client:
        """A client of one of the TCP addresses."""
        return self.serve(await trio.open_tcp_stream(*self.listeners[number].address))

    async def connect_encrypted(self, context: ssl.SSLContext) -> Client:
        stream = await self.connect_silently()
        return self.serve(trio.SSLStream(stream, context, server_hostname="localhost"))

    async def connect_silently(self) -> trio.SocketStream:
        """A client of the TLS port that has yet to say something."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.config.tls_port)
        self.streams.append(stream)
        return stream


@asynccontextmanager
async def open_door(open_house: OpenHouse, config: Config) -> AsyncIterator[Door]:
    shutdown, ready = trio.Event(), trio.Event()
    streams: list[trio.SocketStream] = []
    with trio.fail_after(100 * PATIENCE):
        with listening(config) as listeners:
            async with open_house(config=config) as house, trio.open_nursery() as clients:
                reception = Reception(house.server, listeners, 1000)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(reception.run, shutdown, ready.set)
                    await ready.wait()
                    yield Door(house, reception, listeners, clients, streams)
                    shutdown.set()
        for stream in streams:
            await trio.aclose_forcefully(stream)


def described(config: Config) -> list[tuple[str, bool]]:
    """What is listened on: a host or a path, and whether that is for TLS."""
    with listening(config) as listeners:
        return [(each.path or each.address[0], each.encrypted) for each in listeners]


def test_port_0_is_a_free_port_only_without_any_other_way_in(encrypting: Config, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    assert described(Config(port=0)) == [("127.0.0.1", False)]
    assert described(encrypting) == [("127.0.0.1", True)]
    assert described(Config(port=0, unixsocket=path)) == [(path, False)]
    everything = attrs.evolve(encrypting, port=free_port(), unixsocket=path, bind=("127.0.0.1", "127.0.0.2"))
    assert described(everything) == [
        ("127.0.0.1", False),
        ("127.0.0.2", False),
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        (path, False),
    ]


def test_the_port_that_is_shown(encrypting: Config, tmp_path: Path) -> None:
    with listening(encrypting) as listeners:
        assert tcp_port(listeners) == encrypting.tls_port
    with listening(Config(port=0, unixsocket=str(tmp_path / "socket"))) as listeners:
        assert tcp_port(listeners) == 0


def test_a_unix_socket_has_its_mode_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(Config(port=0, unixsocket=str(path), unixsocketperm="600")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()
    before = os.umask(0o027)
    try:
        with listening(Config(port=0, unixsocket=str(path))):
            assert stat.S_IMODE(path.stat().st_mode) == 0o750
    finally:
        os.umask(before)


def test_a_unix_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    assert path.exists()
    with listening(Config(port=0, unixsocket=str(path))), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    config = Config(port=0, unixsocket=str(path))
    with listening(config):
        with pytest.raises(OperatorError, match=f"^cannot listen on {path}: Address already in use$"):
            described(config)
        assert path.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("important")
    with pytest.raises(OperatorError, match=f"^cannot listen on {path}: there is a file that is no socket$"):
        described(Config(port=0, unixsocket=str(path)))
    assert path.read_text() == "important"


def test_a_path_that_became_another_servers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(Config(port=0, unixsocket=str(path))):
        path.unlink()
        path.write_text("another's")
    assert path.exists()


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"^cannot listen on .*x: AF_UNIX path too long$"):
        described(Config(port=0, unixsocket=str(tmp_path / ("x" * 200))))


def test_nothing_stays_open_when_a_later_address_cannot_be_used(tmp_path: Path) -> None:
    port = free_port()
    config = Config(port=port, unixsocket=str(tmp_path / "missing" / "socket"))
    with pytest.raises(OperatorError, match="No such file or directory"):
        described(config)
    socket.create_server(("127.0.0.1", port)).close()


async def test_a_client_of_a_unix_socket(open_house: OpenHouse, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with open_door(open_house, Config(port=0, unixsocket=path)) as door:
        client = door.serve(await trio.open_unix_socket(path))
        assert await client.call("SET k v") == OK
        assert await client.call("GET k") == b"$1\r\nv\r\n"
        assert f" addr={path}:0 laddr={path}:0 ".encode() in await client.call("CLIENT LIST")


async def test_silence_is_watched_over_as_redis_does(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[socket.socket] = []
    accept = socket.socket.accept

    def keep(listener: socket.socket) -> tuple[socket.socket, object]:
        client, peer = accept(listener)
        accepted.append(client)
        return client, peer

    monkeypatch.setattr(socket.socket, "accept", keep)

    def options(client: socket.socket) -> tuple[int, ...]:
        return (
            client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            *(
                client.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ),
        )

    async with open_door(open_house, Config(port=0)) as door:
        for interval in (300, 2, 1_000_000, 0):
            door.config.tcp_keepalive = interval
            assert await (await door.connect()).call("PING") == PONG
        served = [options(client) for client in accepted]
    # Those of Redis 8.6.3 with the same settings, seen by strace; Linux takes no more than 32767.
    assert served[:3] == [(1, 300, 100, 3), (1, 2, 1, 3), (1, 32767, 32767, 3)]
    assert served[3][0] == 0


async def test_idle_clients_are_dropped(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds
        # One look at all clients.
        mock_clock.jump(1)

    async with open_door(open_house, Config(port=0, timeout=30)) as door:
        idle, busy, monitor, blocked, paused = [await door.connect() for _ in range(5)]
        for client in (idle, busy, monitor, blocked, paused):
            assert await client.call("PING") == PONG
        assert await monitor.call("MONITOR") == OK
        assert await busy.call("CLIENT PAUSE 1000000 WRITE") == OK
        await blocked.send("WAIT 1 0")
        await paused.send("SET k v")
        await wait_all_tasks_blocked()
        pass_time(30)
        assert await busy.call("PING") == PONG
        assert len(door.house.server.sessions) == 5
        pass_time(1)
        assert await idle.ended() == b""
        pass_time(29)
        assert await busy.call("CLIENT UNPAUSE") == OK
        assert await paused.reply() == OK
        assert await busy.call("CLIENT UNBLOCK 4") == b":1\r\n"
        assert await blocked.reply() == b":0\r\n"
        assert not monitor.gone.is_set()
        # Who was held is idle from when it no longer is.
        pass_time(30)
        assert await paused.call("PING") == PONG
        door.config.timeout = 0
        pass_time(1e6)
        assert await blocked.call("PING") == PONG
        assert await busy.call("PING") == PONG


async def test_who_leaves_while_its_command_waits_is_dropped(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    async with open_door(open_house, Config(port=0, shutdown_timeout=5)) as door:
        stays, leaves, says_no_more, paused, other = [await door.connect() for _ in range(5)]
        for client in (stays, leaves, says_no_more):
            assert await client.call("PING") == PONG
            await client.send("WAIT 1 0")
        await paused.send("CLIENT PAUSE 1000000 WRITE", "SET k v")
        await other.send("WAIT 1 0")
        await wait_all_tasks_blocked()
        now += 100
        await leaves.stream.aclose()
        await paused.stream.aclose()
        assert isinstance(says_no_more.stream, trio.SocketStream)
        await says_no_more.stream.send_eof()
        await wait_all_tasks_blocked()
        for _ in range(2):
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
            now += 5
        sessions = door.house.server.sessions
        assert len(sessions) == 5
        # It still wants its reply.
        session = sessions[3]
        assert session.unblock is not None
        session.unblock(False)
        assert await says_no_more.ended() == b":0\r\n"
        now += 0.1
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert sorted(sessions) == [1, 5]
        sessions[5].close()
        assert await other.ended() == b""
    assert door.house.engine.lsn == 0


async def test_what_was_sent_before_leaving_without_a_wish_for_replies_is_carried_out(
    open_house: OpenHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    """A Unix socket says at once that its client has gone, whatever it has sent before."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    config = Config(port=0, unixsocket=str(tmp_path / "socket"), shutdown_timeout=5)
    async with open_door(open_house, config) as door:
        client = door.serve(await trio.open_unix_socket(config.unixsocket))
        await client.send("CLIENT REPLY OFF", "CLIENT PAUSE 1000000 WRITE", "SET k v")
        await wait_all_tasks_blocked()
        await client.send("SET l v")
        await client.stream.aclose()
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert len(door.house.server.sessions) == 1
        door.house.server.pause.end()
        await wait_all_tasks_blocked()
        assert door.house.server.sessions == {}
        assert door.house.database.engine.keyspace.values == {b"k": b"v", b"l": b"v"}


async def test_tls(open_house: OpenHouse, encrypting: Config, authority: Authority) -> None:
    large = b"x" * 3_000_000
    async with open_door(open_house, encrypting) as door:
        client = await door.connect_encrypted(authority.client_context())
        assert await client.call("PING") == PONG
        assert await client.call([b"SET", b"k", large]) == OK
        assert await client.call("GET k") == b"$3000000\r\n" + large + b"\r\n"
        await client.send(*["PING"] * 5000)
        for _ in range(5000):
            assert await client.reply() == PONG
        [session] = door.house.server.sessions.values()
        assert session.local_address == f"127.0.0.1:{encrypting.tls_port}"
        assert session.address.startswith("127.0.0.1:")
        await client.send("QUIT")
        # No TLS error: the server says that this is the end.
        assert await client.ended() == OK


async def test_a_client_that_leaves_is_forgotten(
    open_house: OpenHouse, encrypting: Config, authority: Authority
) -> None:
    async with open_door(open_house, encrypting) as door:
        client = await door.connect_encrypted(authority.client_context())
        assert await client.call("PING") == PONG
        assert isinstance(client.stream, trio.SSLStream)
        # Without the end that TLS asks for.
        await client.stream.transport_stream.send_eof()
        while door.house.server.sessions:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("required", "shown", "served"),
    [
        ("no", None, True),
        ("no", "known", True),
        ("optional", None, True),
        ("optional", "known", True),
        ("optional", "stranger", False),
        ("yes", None, False),
        ("yes", "known", True),
        ("yes", "stranger", False),
    ],
)
async def test_certificates_of_clients(
    required: str,
    shown: str | None,
    served: bool,
    version: ssl.TLSVersion,
    open_house: OpenHouse,
    encrypting: Config,
    authority: Authority,
    known: Identity,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "engram")
    encrypting.set("tls-auth-clients", required)
    stranger = Authority(tmp_path).issue("stranger", "stranger@example.org")
    context = authority.client_context({"known": known, "stranger": stranger, None: None}[shown])
    context.minimum_version = context.maximum_version = version
    async with open_door(open_house, encrypting) as door:
        if served:
            client = await door.connect_encrypted(context)
            assert await client.call("PING") == PONG
            return
        stream = trio.SSLStream(await door.connect_silently(), context, server_hostname="localhost")
        with suppress(trio.BrokenResourceError):
            # With TLS 1.3 a client that is refused knows only once it reads.
            await stream.send_all(b"PING\r\n")
            assert await stream.receive_some() == b""
        while not caplog.records:
            await trio.lowlevel.checkpoint()
        assert caplog.text.count("TLS handshake with 127.0.0.1:") == 1
        assert door.house.server.sessions == {}


@pytest.mark.parametrize(
    "said", [b"PING\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0\0\0", b"\x16\x03\x01\xff\xff\0\0"]
)
async def test_what_is_no_tls_is_dropped(said: bytes, open_house: OpenHouse, encrypting: Config) -> None:
    async with open_door(open_house, encrypting) as door:
        stream = await door.connect_silently()
        await stream.send_all(said)
        with suppress(OSError, trio.BrokenResourceError):
            await stream.send_eof()
        assert await received(stream) == b""


async def received(stream: trio.SocketStream) -> bytes:
    """All that comes, without the alert of TLS that may."""
    try:
        return b"".join([data async for data in stream if data[:1] != b"\x15"])
    except trio.BrokenResourceError:
        return b""


async def test_tls_from_1_2_on(open_house: OpenHouse, encrypting: Config, authority: Authority) -> None:
    context = authority.client_context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with open_door(open_house, encrypting) as door:
        stream = trio.SSLStream(await door.connect_silently(), context, server_hostname="localhost")
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()


def is_readable(stream: trio.SocketStream) -> bool:
    return bool(select.select([stream.socket.fileno()], [], [], 0)[0])


async def test_who_does_not_shake_hands_is_dropped_in_time(
    open_house: OpenHouse, encrypting: Config, mock_clock: MockClock
) -> None:
    async with open_door(open_house, encrypting) as door:
        silent, half = await door.connect_silently(), await door.connect_silently()
        await half.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01")
        await wait_all_tasks_blocked()
        mock_clock.jump(HANDSHAKE_SECONDS - 1)
        await wait_all_tasks_blocked()
        assert [is_readable(each) for each in (silent, half)] == [False, False]
        mock_clock.jump(1)
        assert await received(silent) == b""
        assert await received(half) == b""
        assert door.house.server.statistics.connections_rejected == 0


async def test_who_does_not_shake_hands_takes_no_place_from_who_does(
    open_house: OpenHouse, encrypting: Config, authority: Authority
) -> None:
    encrypting.maxclients = 4
    async with open_door(open_house, encrypting) as door:
        silent = [await door.connect_silently() for _ in range(20)]
        served = []
        for _ in range(4):
            served.append(await door.connect_encrypted(authority.client_context()))
            assert await served[-1].call("PING") == PONG
        for stream in silent:
            assert await received(stream) == b""
        for client in served:
            assert await client.call("PING") == PONG


async def test_more_clients_than_allowed_over_tls(
    open_house: OpenHouse, encrypting: Config, authority: Authority
) -> None:
    encrypting.maxclients = 1
    context = authority.client_context()
    async with open_door(open_house, encrypting) as door:
        client = await door.connect_encrypted(context)
        assert await client.call("PING") == PONG
        refused = [await door.connect_encrypted(context) for _ in range(3)]
        for each in refused:
            # Its handshake begins with the first bytes that it reads.
            assert await each.ended() == FULL
        assert door.house.server.statistics.connections_rejected == 3
        assert await client.call("PING") == PONG


async def test_many_handshakes_at_once(
    open_house: OpenHouse, encrypting: Config, authority: Authority
) -> None:
    async with open_door(open_house, encrypting) as door:
        clients = [await door.connect_encrypted(authority.client_context()) for _ in range(50)]
        for client in clients:
            assert await client.call("PING") == PONG


async def test_certificates_are_read_again(
    open_house: OpenHouse, encrypting: Config, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_door(open_house, encrypting) as door:
        door.house.server.reconfigure = door.reception.reload_certificates
        context = authority.client_context()

        async def serial_number() -> object:
            stream = trio.SSLStream(await door.connect_silently(), context, server_hostname="localhost")
            await stream.do_handshake()
            certificate = stream.getpeercert()
            await stream.aclose()
            return certificate["serialNumber"]

        client = await door.connect_encrypted(context)
        first = await serial_number()
        other = authority.issue("other")
        failed = (
            b"-ERR CONFIG SET failed (possibly related to argument 'tls-cert-file') - Unable to update TLS"
            b" configuration. Check server logs.\r\n"
        )
        for bad in ("/nowhere", str(other.certificate), str(other.key)):
            assert await client.call(f"CONFIG SET timeout 7 tls-cert-file {bad}") == failed
        assert (door.config.timeout, door.config.tls_cert_file) == (0, encrypting.tls_cert_file)
        assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
            "No such file or directory",
            "key values mismatch",
            "one is not PEM, or the key needs a password",
        ]
        assert await serial_number() == first
        assert (
            await client.call(
                f"CONFIG SET tls-cert-file {other.certificate} tls-key-file {other.key} tls-auth-clients yes"
            )
            == OK
        )
        context = authority.client_context(other)
        assert await serial_number() != first
        # Who is connected stays.
        assert await client.call("PING") == PONG


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tls-cert-file", "", "tls-cert-file is not set"),
        ("tls-key-file", "", "tls-key-file is not set"),
        ("tls-ca-cert-file", "", "tls-ca-cert-file must say who signs"),
        ("tls-key-file", "/nowhere", "tls-key-file '/nowhere' cannot be read: No such file or directory"),
        ("tls-cert-file", os.devnull, f"tls-cert-file '{os.devnull}' cannot be read: Not a regular file"),
        ("tls-ca-cert-file", __file__, "holds no certificates: no certificate or crl found"),
        ("tls-cert-file", __file__, "cannot be used together: one is not PEM"),
    ],
)
def test_certificates_that_cannot_be_used(name: str, value: str, message: str, encrypting: Config) -> None:
    encrypting.set("tls-auth-clients", "yes")
    encrypting.set(name, value)
    with pytest.raises(ConfigError, match=message):
        described(encrypting)


def test_a_key_with_a_password_is_refused_rather_than_asked_for(
    encrypting: Config, identity: Identity, tmp_path: Path
) -> None:
    key = load_pem_private_key(identity.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    encrypting.set("tls-key-file", str(locked))
    with pytest.raises(ConfigError, match="cannot be used together"):
        described(encrypting)
