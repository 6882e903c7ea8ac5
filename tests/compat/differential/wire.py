"""A client that sees replies as they are on the wire: their types, and every byte of their text."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import attrs

HOST = "127.0.0.1"
PATIENCE_SECONDS = 60.0

_AGGREGATES = {"*": 1, "~": 1, ">": 1, "%": 2}
_SIZED = "$=!"


@attrs.frozen
class Reply:
    """One reply of RESP2 or RESP3.

    `kind` is its type byte, "closed" when the connection ended instead, or "silent" when nothing, or only
    a part, came. `value` is the text between
    the type and the line's end, the bytes of a bulk string, or the elements of an aggregate (of a map keys
    and values by turns); None is RESP2's null of that kind.
    """

    kind: str
    value: bytes | tuple[Reply, ...] | None = None

    @property
    def text(self) -> bytes:
        """The text of a reply that is not an aggregate; empty of one that is."""
        return self.value if isinstance(self.value, bytes) else b""

    @property
    def elements(self) -> tuple[Reply, ...]:
        """The elements of an aggregate; empty of what is not one."""
        return self.value if isinstance(self.value, tuple) else ()

    @property
    def is_error(self) -> bool:
        return self.kind in "-!"

    def __str__(self) -> str:
        if isinstance(self.value, tuple):
            return f"{self.kind}[{', '.join(map(str, self.value))}]"
        if self.value is None:
            return f"{self.kind}null"
        shown = self.value if len(self.value) <= 300 else self.value[:300] + b"..."
        return f"{self.kind}{shown!r}"


CLOSED = Reply("closed")
SILENT = Reply("silent")


def encode(words: Sequence[bytes]) -> bytes:
    """A request, as an array of bulk strings."""
    return b"*%d\r\n%b" % (len(words), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))


class WireClient:
    """One connection to a server on this machine."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), PATIENCE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, words: Sequence[bytes]) -> None:
        """Sends a request; a server that has gone shows in the reply."""
        try:
            self._socket.sendall(encode(words))
        except (BrokenPipeError, ConnectionResetError):
            return

    def reply(self) -> Reply:
        """The next reply; CLOSED when the server ended the connection, SILENT when it takes too long.

        A connection that is silent cannot be used again. Raises ValueError when the reply is not RESP.
        """
        try:
            return self._read()
        except TimeoutError:
            return SILENT
        except (EOFError, ConnectionResetError):
            return CLOSED

    def call(self, *words: bytes) -> Reply:
        """Sends a request and returns its reply."""
        self.send(words)
        return self.reply()

    def _read(self) -> Reply:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError
        kind, text = chr(line[0]), line[1:-2]
        if kind in _SIZED:
            if text == b"-1":
                return Reply(kind)
            data = self._file.read(int(text) + 2)
            if len(data) < int(text) + 2:
                raise EOFError
            return Reply(kind, data[:-2])
        if kind in _AGGREGATES:
            if text == b"-1":
                return Reply(kind)
            return Reply(kind, tuple(self._read() for _ in range(int(text) * _AGGREGATES[kind])))
        if kind not in "+-:_,#(":
            raise ValueError(f"not a reply: {line!r}")
        return Reply(kind, text)
