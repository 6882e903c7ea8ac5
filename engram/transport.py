"""Bytes to and from one client."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from engram.rounds import Rounds

CHUNK = 65536


class Transport(Protocol):
    """A connection as `Connection` uses it. A peer that has gone away reads as the end of the stream."""

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        """Gives `take` what arrives, at most CHUNK bytes at a time, until it returns False.

        The end of the stream is no bytes. What `take` raises is raised here.
        """
        ...

    def send_now(self, data: bytes | memoryview) -> int:
        """Sends what can be sent without waiting; returns how many bytes that was.

        Raises OSError when the peer has gone away.
        """
        ...

    async def send_all(self, data: bytes | memoryview) -> None:
        """Sends all of `data`. Raises OSError or trio.BrokenResourceError when the peer has gone away."""
        ...

    def hang_up(self) -> None:
        """Ends the connection for the peer, at once; `close` is still to be called."""
        ...

    async def close(self) -> None: ...


class _Socket:
    """A connected socket, written directly."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    def send_now(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            await trio.lowlevel.wait_writable(self._socket)
            rest = rest[self.send_now(rest) :]

    async def receive(self) -> bytes:
        """The next bytes, at most CHUNK of them; empty at the end of the stream."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._socket)
                return self._socket.recv(CHUNK)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return b""

    def hang_up(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close_now(self) -> None:
        """Closes the socket; no checkpoint."""
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


class SocketTransport(_Socket):
    """A connected socket, read in the rounds of all clients.

    `trio.SocketStream` yields to the scheduler on each send and receive even when it need not.
    """

    def __init__(self, connected: socket.socket, rounds: Rounds) -> None:
        super().__init__(connected)
        self._rounds = rounds

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        descriptor = self._socket.fileno()
        receive, unwatch = self._socket.recv, self._rounds.unwatch
        done = trio.Event()
        failure: Exception | None = None

        def serve() -> None:
            nonlocal failure
            try:
                try:
                    data = receive(CHUNK)
                except BlockingIOError:
                    return
                except OSError:
                    data = b""
                if take(data):
                    return
            except Exception as error:
                failure = error
            unwatch(descriptor)
            done.set()

        self._rounds.watch(descriptor, serve)
        try:
            await done.wait()
        finally:
            unwatch(descriptor)
        if failure is not None:
            raise failure

    async def close(self) -> None:
        self.close_now()


class StreamTransport:
    """Any Trio stream: for what is not a plain socket."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def deliver(self, take: Callable[[bytes], bool]) -> None:
        while take(await self._receive()):
            pass

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    def send_now(self, data: bytes | memoryview) -> int:
        return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._stream.send_all(data)

    def hang_up(self) -> None:
        """Does nothing: of Trio's streams none can do it at once."""

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)


class Wire(trio.abc.Stream):
    """What a TLS client sends and is sent, encrypted, on its socket.

    A step of a handshake takes the processor for a millisecond or so, and nobody else is served meanwhile.
    Of many that could be taken at once, only one at a time is: each holds `computing` from the moment its
    bytes are here until it has sent its answer or waits for more, and the other clients come between.
    """

    def __init__(self, connected: socket.socket, computing: trio.Lock) -> None:
        self._socket = _Socket(connected)
        self._computing = computing
        self._shaking_hands = True
        self._in_step = False
        self._leaving = False

    def settle(self) -> None:
        """Ends the handshake: what follows takes no turns."""
        self._shaking_hands = False
        self._end_step()

    def hang_up(self) -> None:
        """Ends the connection for the peer, at once."""
        self._socket.hang_up()

    def leave(self) -> None:
        """From here on what the socket will not take at once is not sent."""
        self._leaving = True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises trio.BrokenResourceError when the peer has gone away."""
        self._end_step()
        rest = memoryview(data)
        try:
            rest = rest[self._socket.send_now(rest) :]
            if rest and not self._leaving:
                await self._socket.send_all(rest)
            else:
                # What has been sent cannot be taken back.
                await trio.lowlevel.cancel_shielded_checkpoint()
        except (OSError, trio.ClosedResourceError) as error:
            raise trio.BrokenResourceError from error

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes; empty at the end of the stream."""
        self._end_step()
        data = await self._socket.receive()
        if self._shaking_hands and data:
            await self._computing.acquire()
            self._in_step = True
        return data

    async def aclose(self) -> None:
        self.cut()
        await trio.lowlevel.checkpoint()

    def cut(self) -> None:
        """Closes the socket without a word."""
        self._end_step()
        self._socket.close_now()

    def _end_step(self) -> None:
        if self._in_step:
            self._in_step = False
            self._computing.release()


class TlsTransport(StreamTransport):
    """A client behind TLS, after the handshake."""

    def __init__(self, stream: trio.SSLStream[Wire]) -> None:
        super().__init__(stream)
        self._encrypted = stream

    def hang_up(self) -> None:
        self._encrypted.transport_stream.hang_up()

    async def close(self) -> None:
        """Tells the peer that this is the end, if its socket takes that now, and closes."""
        self._encrypted.transport_stream.leave()
        await self._encrypted.aclose()
        _forget(self._encrypted)


def _forget(stream: trio.SSLStream[Wire]) -> None:
    # It refers to itself. The garbage collector, which does not see the 40 KiB and more that OpenSSL holds
    # for each, would come only after thousands.
    vars(stream).clear()


async def shake_hands(
    connected: socket.socket, context: ssl.SSLContext, computing: trio.Lock
) -> TlsTransport:
    """Has a client that just connected prove what `context` asks of it, and encrypts what follows.

    Of all handshakes that share `computing`, one at a time uses the processor. It closes the socket unless it
    returns.

    Raises:
        trio.BrokenResourceError: the client left, or it and the server cannot agree; the cause says why.
    """
    wire = Wire(connected, computing)
    stream = trio.SSLStream(wire, context, server_side=True)
    try:
        await stream.do_handshake()
    except BaseException:
        wire.cut()
        _forget(stream)
        raise
    wire.settle()
    return TlsTransport(stream)
