from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from engram.transport import CHUNK, SocketTransport, StreamTransport


@pytest.fixture
def pair() -> Iterator[tuple[SocketTransport, socket.socket]]:
    """A transport over a real socket, and the blocking other end."""
    near, far = socket.socketpair()
    far.settimeout(5)
    with near, far:
        yield SocketTransport(near), far


async def test_a_socket_receives_what_is_there(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"x" * (CHUNK + 1))
    received = await transport.receive()
    assert 0 < len(received) <= CHUNK
    while len(received) <= CHUNK:
        received += await transport.receive()
    assert received == b"x" * (CHUNK + 1)
    peer.shutdown(socket.SHUT_WR)
    assert await transport.receive() == b""


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
    assert await transport.receive() == b""
    with pytest.raises(OSError, match="Broken pipe"):
        transport.send_now(b"x")
    with pytest.raises(OSError, match="Broken pipe"):
        await transport.send_all(b"x")


async def test_a_reset_reads_as_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    transport = SocketTransport(accepted)
    # Closed without waiting for what is unsent: a reset.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert await transport.receive() == b""
    await transport.close()


async def test_closing_wakes_who_waits(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, _ = pair
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await transport.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await transport.close()
    assert received == [b""]


async def test_receiving_is_a_checkpoint(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"x")
    with trio.testing.assert_checkpoints():
        await transport.receive()


async def test_a_stream() -> None:
    near, far = memory_stream_pair()
    transport = StreamTransport(near)
    assert transport.send_now(b"x") == 0
    await transport.send_all(b"abc")
    assert await far.receive_some() == b"abc"
    await far.send_all(b"def")
    received = await transport.receive()
    assert received == b"def"
    assert type(received) is bytes
    await far.aclose()
    assert await transport.receive() == b""
    with pytest.raises(trio.BrokenResourceError):
        await transport.send_all(b"x")
    await transport.close()
    assert await transport.receive() == b""
