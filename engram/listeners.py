"""Where clients come in: TCP, TLS and Unix sockets, and what holds those that come or stay too many.

A TLS handshake costs the server about a millisecond of processor time, nearly all of it one signature (see
docs/how-to/tls.md for figures). It is spent on the event loop: a thread would give the time back to other
clients only while it lasts, and would let strangers keep every core busy. Instead, of all clients that shake
hands one at a time is given a step, and everyone who is ready is served between two steps: see
`engram.transport.Wire`. Who does not finish has a deadline, and cannot keep others from trying.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import attrs
import trio

from engram.access import PROTECTED
from engram.certificates import reason, server_context
from engram.commands.session import Server, Session
from engram.commands.states import ReplyMode
from engram.config import Config
from engram.connection import Connection
from engram.errors import ConfigError, OperatorError
from engram.protocol import replies
from engram.supervision import keep_running, run_contained
from engram.transport import SocketTransport, TlsTransport, Transport, shake_hands

logger = logging.getLogger("engram")

MAXCLIENTS_REACHED = replies.error("ERR max number of clients reached")

HANDSHAKE_SECONDS = 10.0
"""How long a client has for its TLS handshake."""

# So many clients that are not to be served may shake hands at once to be told why; others are just dropped.
_MOST_REFUSED_AT_ONCE = 16
_LOOK_INTERVAL = 1.0
_KEEPALIVE_PROBES = 3
# Linux takes no more (MAX_TCP_KEEPIDLE).
_LONGEST_KEEPALIVE = 32767
_ACCEPT_PAUSE = 0.1


@attrs.frozen(eq=False)
class Listener:
    """A socket that clients connect to. `path` is that of a Unix socket, `file` its device and inode."""

    socket: socket.socket
    encrypted: bool = False
    path: str = ""
    file: tuple[int, int] = (0, 0)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.socket.getsockname()[:2]
        return host, port


@contextmanager
def listening(config: Config) -> Iterator[list[Listener]]:
    """Everything that the settings say to listen on: TCP first, then TLS, then a Unix socket.

    Afterwards it is closed, and the file of the Unix socket is gone.

    Raises:
        ConfigError: there is a TLS port, and the certificates cannot be used.
        OperatorError: an address cannot be used.
    """
    listeners: list[Listener] = []
    if config.tls_port:
        # They are read again when clients are served; but that may be long after.
        server_context(config)
    try:
        # Without any other way in, port 0 stands for a free one.
        if config.port or not (config.tls_port or config.unixsocket):
            _listen_tcp(config, config.port, False, listeners)
        if config.tls_port:
            _listen_tcp(config, config.tls_port, True, listeners)
        if config.unixsocket:
            _listen_unix(config, listeners)
        yield listeners
    finally:
        for listener in listeners:
            if listener.path:
                _remove_own(listener)
            listener.socket.close()


def _listen_tcp(config: Config, port: int, encrypted: bool, listeners: list[Listener]) -> None:
    for host in config.bind:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.create_server(address, family=family, backlog=config.tcp_backlog)
        except OSError as error:
            unresolved = isinstance(error, socket.gaierror)
            why = error.strerror if unresolved else os.strerror(error.errno or 0)
            raise OperatorError(f"cannot listen on {host} port {port}: {why}") from error
        listeners.append(Listener(listener, encrypted))
        listener.setblocking(False)
        # All addresses share the port that the first one was given.
        port = listener.getsockname()[1]


def _listen_unix(config: Config, listeners: list[Listener]) -> None:
    path = config.unixsocket
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        listener.bind(path)
        listeners.append(Listener(listener, path=path, file=_identity(path)))
        # Nobody can connect before it listens.
        if mode := int(config.unixsocketperm, 8):
            os.chmod(path, mode)
        listener.listen(config.tcp_backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        # A path that is too long has no number.
        raise OperatorError(f"cannot listen on {path}: {error.strerror or error}") from error


def _remove_stale(path: str) -> None:
    """Removes the socket that a server left behind which was killed."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            # Someone listens, and is busy.
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _remove_own(listener: Listener) -> None:
    """Removes the file of a Unix socket, unless another server has put its own there."""
    with suppress(FileNotFoundError):
        if _identity(listener.path) == listener.file:
            os.unlink(listener.path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def tcp_port(listeners: Sequence[Listener]) -> int:
    """The port that INFO shows, as in Redis: that of TCP, or else that of TLS, or else 0."""
    return next((each.address[1] for each in listeners if not each.path), 0)


class Reception:
    """Accepts clients, and serves each until it leaves.

    Clients have descriptors below `most_descriptors`. The settings `maxclients`, `timeout` and
    `tcp-keepalive` are looked at whenever they matter, certificates when `reload_certificates` is called.

    Raises:
        ConfigError: there is a TLS port, and the certificates cannot be used.
    """

    def __init__(self, server: Server, listeners: Sequence[Listener], most_descriptors: int) -> None:
        self._server = server
        self._listeners = listeners
        self._most_descriptors = most_descriptors
        self._connections: set[Connection] = set()
        # In the order in which they began.
        self._handshakes: dict[trio.CancelScope, None] = {}
        # Who was found to say no more, and since when.
        self._silent: dict[Session, float] = {}
        self._refusals = 0
        self._computing = trio.Lock()
        self._context = server_context(server.config) if server.config.tls_port else None

    def reload_certificates(self) -> None:
        """Reads the files of the TLS settings again; who connects from now on sees what is in them.

        Raises:
            ConfigError: they cannot be used. Those read before stay in force.
        """
        if self._context is None:
            return
        try:
            self._context = server_context(self._server.config)
        except ConfigError as error:
            logger.warning("the certificates stay as they are: %s", error)
            raise ConfigError("Unable to update TLS configuration. Check server logs.") from error

    async def run(self, shutdown: trio.Event, ready: Callable[[], None]) -> None:
        """Serves until `shutdown`, then lets each client have its last replies."""
        async with trio.open_nursery() as client_nursery:
            async with trio.open_nursery() as front_nursery:
                for listener in self._listeners:
                    accept = partial(self._accept, listener, front_nursery, client_nursery)
                    front_nursery.start_soon(
                        partial(keep_running, "accepting clients", accept, pause=_ACCEPT_PAUSE)
                    )
                front_nursery.start_soon(keep_running, "looking after clients", self._look_after_clients)
                ready()
                await shutdown.wait()
                front_nursery.cancel_scope.cancel()
            for connection in self._connections:
                connection.finish()

    async def _accept(
        self, listener: Listener, front_nursery: trio.Nursery, client_nursery: trio.Nursery
    ) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            try:
                client, peer = listener.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                # Otherwise it is out of descriptors or memory, or, as accept(2) has it, an error of the new
                # connection.
                continue
            try:
                self._receive(listener, client, peer, front_nursery, client_nursery)
            except BaseException:
                client.close()
                raise

    def _receive(
        self,
        listener: Listener,
        client: socket.socket,
        peer: tuple[str, int],
        front_nursery: trio.Nursery,
        client_nursery: trio.Nursery,
    ) -> None:
        """Admits or refuses a client; who calls this closes its socket when it raises."""
        server, connections = self._server, self._connections
        refusal: bytes | None = None
        if len(connections) >= (limit := self._limit(client.fileno())):
            refusal = MAXCLIENTS_REACHED
        elif not listener.path and server.access.refuses_peer(
            peer[0], protected=server.config.protected_mode == "yes"
        ):
            refusal = PROTECTED
        if refusal is not None:
            server.statistics.connections_rejected += 1
        elif self._handshakes:
            self._limit_handshakes(limit)
        if listener.path:
            address = local_address = f"{listener.path}:0"
        else:
            address, local_address = _address(peer), _address(client.getsockname())
            _tune(client, server.config.tcp_keepalive)
        if listener.encrypted:
            if refusal is None:
                admit = partial(self._admit_encrypted, client, address, local_address, client_nursery)
                front_nursery.start_soon(run_contained, "admitting a client", admit)
            elif self._refusals < _MOST_REFUSED_AT_ONCE:
                refuse = partial(self._refuse_encrypted, client, address, refusal)
                front_nursery.start_soon(run_contained, "refusing a client", refuse)
            else:
                client.close()
        elif refusal is not None:
            _send_and_close(client, refusal)
        else:
            transport = SocketTransport(client, server.rounds)
            self._admit(transport, client, address, local_address, client_nursery)

    def _limit(self, descriptor: int) -> int:
        """How many clients are served at once, when the next has this descriptor."""
        if descriptor >= self._most_descriptors:
            return len(self._connections) + len(self._handshakes)
        return self._server.config.maxclients

    def _admit(
        self,
        transport: Transport,
        client: socket.socket,
        address: str,
        local_address: str,
        nursery: trio.Nursery,
    ) -> None:
        connection = Connection(
            transport,
            self._server,
            address=address,
            local_address=local_address,
            descriptor=client.fileno(),
        )
        self._connections.add(connection)
        self._server.statistics.connections_received += 1
        nursery.start_soon(self._attend, connection)

    async def _attend(self, connection: Connection) -> None:
        """Serves one client; what goes wrong there ends that client alone."""
        try:
            await connection.serve()
        except Exception:
            logger.exception("client %s ended by an error", connection.session.address)
        finally:
            self._connections.discard(connection)

    def _limit_handshakes(self, limit: int) -> None:
        """Has the first of those that still shake hands give way when a client comes.

        Who never finishes takes no place from who does, and all of them together leave half of the places.
        """
        handshakes = len(self._handshakes)
        if len(self._connections) + handshakes >= limit or 2 * handshakes > limit:
            next(iter(self._handshakes)).cancel()

    async def _admit_encrypted(
        self, client: socket.socket, address: str, local_address: str, client_nursery: trio.Nursery
    ) -> None:
        scope = trio.CancelScope()
        self._handshakes[scope] = None
        try:
            with scope:
                transport = await self._shake_hands(client, address)
        finally:
            del self._handshakes[scope]
        if scope.cancelled_caught:
            logger.info("TLS handshake with %s given up: others came", address)
        elif transport is not None:
            self._admit(transport, client, address, local_address, client_nursery)

    async def _refuse_encrypted(self, client: socket.socket, address: str, refusal: bytes) -> None:
        self._refusals += 1
        try:
            if (transport := await self._shake_hands(client, address)) is None:
                return
            with trio.CancelScope(shield=True):
                with trio.move_on_after(HANDSHAKE_SECONDS), suppress(trio.BrokenResourceError):
                    await transport.send_all(refusal)
                await transport.close()
        finally:
            self._refusals -= 1

    async def _shake_hands(self, client: socket.socket, address: str) -> TlsTransport | None:
        """The client once it has shaken hands; None when it is not to be served."""
        assert self._context is not None
        try:
            with trio.move_on_after(HANDSHAKE_SECONDS):
                return await shake_hands(client, self._context, self._computing)
            logger.info("TLS handshake with %s took too long", address)
        except trio.BrokenResourceError as error:
            logger.info("TLS handshake with %s failed: %s", address, reason(error.__cause__))
        except Exception:
            logger.exception("TLS handshake with %s ended by an error", address)
        return None

    async def _look_after_clients(self) -> None:
        while True:
            await trio.sleep(_LOOK_INTERVAL)
            if self._server.config.timeout:
                self._drop_idle(self._server.config.timeout)
            self._drop_departed()

    def _drop_idle(self, timeout: int) -> None:
        """Ends clients that have been silent for longer than `timeout` seconds."""
        latest = time.monotonic() - timeout
        for session in list(self._server.sessions.values()):
            busy = session.awaiting() or session.monitoring
            if session.last_active < latest and not busy:
                logger.info("client %s dropped: idle for more than %d s", session.address, timeout)
                session.close()

    def _drop_departed(self) -> None:
        """Ends clients that left while a command of theirs waits; nobody reads from them meanwhile.

        Who only says no more may still want the reply, and who wants none may have sent more before it left:
        these have `shutdown-timeout` seconds from when they were found so, or when a command of theirs went
        on.
        """
        sessions = self._server.sessions.values()
        waiting = {session.descriptor: session for session in sessions if session.awaiting()}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLRDHUP)
        now = time.monotonic()
        silent: dict[Session, float] = {}
        for descriptor, events in poll.poll(0) if waiting else ():
            session = waiting[descriptor]
            gone = events & (select.POLLHUP | select.POLLERR) and session.reply_mode is ReplyMode.ON
            since = silent[session] = max(self._silent.get(session, now), session.last_active)
            if gone or since < now - self._server.config.shutdown_timeout:
                logger.info("client %s dropped: it left while its command waited", session.address)
                session.close()
        self._silent = silent


def _tune(client: socket.socket, keepalive: int) -> None:
    """Sets what is the same for all TCP clients: what Redis sets (its anetKeepAlive)."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(keepalive, _LONGEST_KEEPALIVE))
        interval = max(1, keepalive // _KEEPALIVE_PROBES)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(interval, _LONGEST_KEEPALIVE))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def _send_and_close(client: socket.socket, data: bytes) -> None:
    with client:
        client.setblocking(False)
        try:
            client.send(data)
        except OSError as error:
            logger.debug("a rejected client left at once: %s", error)


def _address(name: tuple[str, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
