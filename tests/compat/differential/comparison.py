"""What of two replies must be equal: all of it, but for what no server promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from tests.compat.differential.wire import Reply

# How far apart replies that tell a time may be: the servers are asked one after the other.
TOLERANCE_MILLISECONDS = 3000

View = Callable[[Reply], Reply]

# Commands and options whose times count from now.
_RELATIVE = frozenset({b"EX", b"PX", b"EXPIRE", b"PEXPIRE", b"SETEX", b"PSETEX"})


def _whole(reply: Reply) -> Reply:
    return reply


def _kind(reply: Reply) -> Reply:
    return reply if reply.is_error else Reply(reply.kind)


def _sorted(reply: Reply) -> Reply:
    return Reply(reply.kind, tuple(sorted(reply.elements, key=str))) if reply.elements else reply


def _sorted_pairs(reply: Reply) -> Reply:
    words = reply.elements
    pairs = sorted(zip(words[::2], words[1::2], strict=True), key=str)
    return Reply(reply.kind, tuple(word for pair in pairs for word in pair)) if words else reply


def _scanned(reply: Reply) -> Reply:
    # Inside a transaction only the first part of an iteration is seen, and which it is is free.
    if len(reply.elements) != 2:
        return reply
    return Reply(reply.kind, tuple(map(_kind, reply.elements)))


def _greeting(reply: Reply) -> Reply:
    """HELLO without what names the server."""
    words = list(reply.elements)
    for place in range(0, len(words), 2):
        if words[place].text in (b"version", b"id", b"modules"):
            words[place + 1] = _kind(words[place + 1])
    return Reply(reply.kind, tuple(words)) if words else reply


_VIEWS: dict[str, View] = {
    **dict.fromkeys(("client|id", "client|info", "client|list", "acl|genpass", "time", "randomkey"), _kind),
    **dict.fromkeys(
        ("memory|usage", "acl|log", "object|idletime", "slowlog|reset", "client|trackinginfo"), _kind
    ),
    **dict.fromkeys(("keys", "acl|cat", "acl|list", "acl|users"), _sorted),
    "config|get": _sorted_pairs,
    "scan": _scanned,
    "hello": _greeting,
}

_TIMES = {"ttl": 1000, "pttl": 1, "expiretime": 1000, "pexpiretime": 1}


def tells_time(words: Sequence[bytes]) -> bool:
    """Whether a request makes times that depend on when it is carried out."""
    return any(word.upper() in _RELATIVE for word in words)


def differ(
    name: str,
    theirs: Reply,
    ours: Reply,
    *,
    relative: bool,
    commands: frozenset[str],
    settings: frozenset[str],
) -> bool:
    """Whether the replies of both to a command are not the same.

    `relative` says that there may be keys whose time to live counts from when it was set; `commands`
    and `settings` are the names of those that both have.
    """
    if theirs == ours:
        return False
    unit = _TIMES.get(name)
    if unit is not None and theirs.kind == ours.kind == ":" and (relative or name in ("ttl", "pttl")):
        times = int(theirs.text), int(ours.text)
        return min(times) < 0 or abs(times[0] - times[1]) * unit > TOLERANCE_MILLISECONDS
    view = _VIEWS.get(name, _whole)
    if name == "acl|cat":
        theirs, ours = _known(theirs, commands), _known(ours, commands)
    elif name == "config|get":
        theirs, ours = _known_pairs(theirs, settings), _known_pairs(ours, settings)
    elif name == "command|help" or name.endswith("|help"):
        view = _kind
    return _plain(view(theirs)) != _plain(view(ours))


def _known(reply: Reply, common: frozenset[str]) -> Reply:
    """A list of commands without those that only one server has; a list of categories as it is."""
    kept = tuple(word for word in reply.elements if word.text.decode() in common)
    return Reply(reply.kind, kept) if kept else reply


def _known_pairs(reply: Reply, common: frozenset[str]) -> Reply:
    words = iter(reply.elements)
    pairs = [(word, next(words)) for word in words if word.text.decode(errors="replace").lower() in common]
    return reply if not reply.elements else Reply(reply.kind, tuple(chain.from_iterable(pairs)))


def _plain(reply: Reply) -> Reply:
    """The reply with its sets and maps in one order."""
    if not isinstance(reply.value, tuple):
        return reply
    plain = Reply(reply.kind, tuple(map(_plain, reply.value)))
    if reply.kind == "~":
        return _sorted(plain)
    return _sorted_pairs(plain) if reply.kind == "%" else plain
