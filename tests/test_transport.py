from __future__ import annotations

import gc
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from engram.rounds import Rounds
from engram.transport import (
    CHUNK,
    SocketTransport,
    StreamTransport,
    TlsTransport,
    Transport,
    Wire,
    shake_hands,
)
from tests.certificates import Authority


@pytest.fixture
async def rounds(nursery: trio.Nursery) -> Rounds:
    """Rounds that are under way."""
    rounds = Rounds()
    nursery.start_soon(rounds.run)
    return rounds


@pytest.fixture
def pair(rounds: Rounds) -> Iterator[tuple[SocketTransport, socket.socket]]:
    """A transport over a real socket, and the blocking other end."""
    near, far = socket.socketpair()
    far.settimeout(5)
    with near, far:
        yield SocketTransport(near, rounds), far


async def receive(transport: Transport) -> bytes:
    """What arrives next."""
    received = b""

    def take(data: bytes) -> bool:
        nonlocal received
        received = data
        return False

    await transport.deliver(take)
    return received


async def test_a_socket_receives_what_is_there(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"x" * (CHUNK + 1))
    received = await receive(transport)
    assert 0 < len(received) <= CHUNK
    while len(received) <= CHUNK:
        received += await receive(transport)
    assert received == b"x" * (CHUNK + 1)
    peer.shutdown(socket.SHUT_WR)
    assert await receive(transport) == b""


async def test_a_socket_sends_what_fits_and_the_rest_when_it_does(
    pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, peer = pair
    data = b"0123456789" * 1_000_000
    sent = transport.send_now(data)
    assert 0 < sent < len(data)
    assert transport.send_now(b"x") == 0
    received = bytearray()

    def receive() -> None:
        while len(received) < len(data):
            received.extend(peer.recv(1 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.send_all, memoryview(data)[sent:])
        await trio.to_thread.run_sync(receive)
    assert received == data


async def test_a_peer_that_has_gone(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, peer = pair
    peer.close()
    assert await receive(transport) == b""
    with pytest.raises(OSError, match="Broken pipe"):
        transport.send_now(b"x")
    with pytest.raises(OSError, match="Broken pipe"):
        await transport.send_all(b"x")


async def test_a_reset_reads_as_the_end(rounds: Rounds) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    transport = SocketTransport(accepted, rounds)
    # Closed without waiting for what is unsent: a reset.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert await receive(transport) == b""
    await transport.close()


async def test_what_arrives_is_delivered_until_it_is_enough(
    pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, peer = pair
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return len(taken) < 3

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.deliver, take)
        for data in (b"a", b"b", b"c", b"d"):
            peer.sendall(data)
            await wait_all_tasks_blocked()
    assert taken == [b"a", b"b", b"c"]
    assert await receive(transport) == b"d"


async def test_what_goes_wrong_ends_the_delivery_alone(
    pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, peer = pair
    peer.sendall(b"a")
    with pytest.raises(ZeroDivisionError):
        await transport.deliver(lambda data: 1 // 0 > 0)
    peer.sendall(b"b")
    assert await receive(transport) == b"b"


async def test_a_delivery_that_is_cancelled_takes_no_more(
    pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, peer = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await transport.deliver(lambda data: True)
    peer.sendall(b"a")
    await wait_all_tasks_blocked()
    assert await receive(transport) == b"a"


async def test_hanging_up_ends_both_directions(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, peer = pair
    transport.hang_up()
    assert peer.recv(1) == b""
    assert await receive(transport) == b""
    with pytest.raises(BrokenPipeError):
        peer.send(b"x")
    peer.close()
    transport.hang_up()


async def test_hanging_up_tls(encrypted: Encrypted) -> None:
    transport, client = encrypted
    transport.hang_up()
    # As OpenSSL likes, an end that was not announced is an error or not.
    with suppress(trio.BrokenResourceError):
        assert await client.receive_some() == b""
    assert await receive(transport) == b""
    await transport.close()


async def test_a_stream() -> None:
    near, far = memory_stream_pair()
    transport = StreamTransport(near)
    assert transport.send_now(b"x") == 0
    await transport.send_all(b"abc")
    assert await far.receive_some() == b"abc"
    await far.send_all(b"def")
    received = await receive(transport)
    assert received == b"def"
    assert type(received) is bytes
    await far.aclose()
    assert await receive(transport) == b""
    with pytest.raises(trio.BrokenResourceError):
        await transport.send_all(b"x")
    await transport.close()
    assert await receive(transport) == b""


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For the server and for a client."""
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    identity = authority.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    return context, authority.client_context()


Encrypted = tuple[TlsTransport, trio.SSLStream[trio.SocketStream]]


@pytest.fixture
async def encrypted(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[Encrypted]:
    """A transport and its client after their handshake."""
    near, far = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    client = trio.SSLStream(stream, contexts[1], server_hostname="localhost")
    transports = []

    async def accept() -> None:
        transports.append(await shake_hands(near, contexts[0], trio.Lock()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await client.do_handshake()
    yield transports[0], client
    await trio.aclose_forcefully(client)


async def test_tls(encrypted: Encrypted) -> None:
    transport, client = encrypted
    assert transport.send_now(b"x") == 0
    data = bytes(1_000_000)
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.send_all, data)
        while len(received) < len(data):
            received += await client.receive_some()
    assert received == data
    await client.send_all(b"abc")
    got = await receive(transport)
    assert got == b"abc"
    assert type(got) is bytes
    await transport.close()
    # An end without a TLS error.
    assert await client.receive_some() == b""


async def test_a_tls_peer_that_has_gone(encrypted: Encrypted) -> None:
    transport, client = encrypted
    await client.transport_stream.aclose()
    assert await receive(transport) == b""
    with pytest.raises(trio.BrokenResourceError):
        await transport.send_all(b"x")
    await transport.close()


@pytest.mark.parametrize("said", [b"PING\r\n", b"", b"\x16\x03\x01\x02\x00"])
@pytest.mark.parametrize("leaves", [False, True])
async def test_what_a_failed_handshake_took_is_freed_at_once(
    said: bytes, leaves: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Of what OpenSSL holds the garbage collector knows nothing: it would come late."""
    made: list[weakref.ref[ssl.SSLObject]] = []

    class Watched(ssl.SSLObject):
        @classmethod
        def _create(cls, *arguments: Any, **options: Any) -> Any:
            created = super()._create(*arguments, **options)  # type: ignore[misc]
            made.append(weakref.ref(created))
            return created

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = Watched
    near, far = socket.socketpair()
    gc.disable()
    try:
        with far:
            far.sendall(said)
            if leaves:
                far.shutdown(socket.SHUT_WR)
            with trio.move_on_after(1), suppress(trio.BrokenResourceError):
                await shake_hands(near, context, trio.Lock())
        await trio.lowlevel.checkpoint()
        [reference] = made
        assert reference() is None
    finally:
        gc.enable()


async def test_closing_tls_waits_for_nobody(encrypted: Encrypted) -> None:
    transport, _ = encrypted
    with trio.move_on_after(0.01):
        await transport.send_all(bytes(100_000_000))
    with trio.fail_after(5):
        await transport.close()


async def test_a_handshake_that_fails_closes_the_socket(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall(b"PING\r\n")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await shake_hands(near, contexts[0], trio.Lock())
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        assert near.fileno() == -1


async def test_a_handshake_that_is_cancelled_closes_the_socket(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    near, far = socket.socketpair()
    with far, trio.CancelScope() as scope:
        scope.cancel()
        await shake_hands(near, contexts[0], trio.Lock())
    assert near.fileno() == -1


async def test_one_step_of_a_handshake_at_a_time() -> None:
    """Of clients whose bytes are all here, one is given its step when the last has ended its own."""
    computing = trio.Lock()
    pairs = [socket.socketpair() for _ in range(4)]
    stepping: list[int] = []
    go_on = [trio.Event() for _ in pairs]

    async def step(number: int, wire: Wire) -> None:
        await wire.receive_some()
        stepping.append(number)
        await go_on[number].wait()
        # What ends a step: to answer, to wait for more, to have done, to leave.
        match number:
            case 0:
                await wire.send_all(b"hello")
            case 1:
                with trio.move_on_after(0):
                    await wire.receive_some()
            case 2:
                wire.settle()
        await wire.aclose()

    async with trio.open_nursery() as nursery:
        for number, (near, far) in enumerate(pairs):
            far.sendall(b"hello")
            nursery.start_soon(step, number, Wire(near, computing))
            await wait_all_tasks_blocked()
        for number in range(4):
            assert stepping == list(range(number + 1))
            go_on[number].set()
            await wait_all_tasks_blocked()
    assert not computing.locked()
    for _, far in pairs:
        far.close()
