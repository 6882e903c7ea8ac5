"""Sequences carried out on both servers at once, and the first replies that differ."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import ExitStack

import attrs

from tests.compat.differential.comparison import differ, tells_time
from tests.compat.differential.departures import departure_of
from tests.compat.differential.peers import Pair, Peer
from tests.compat.differential.sequences import CommandSequence, Grammar, Step, Words
from tests.compat.differential.wire import CLOSED, SILENT, Reply, WireClient

# Longer than any key that is meant to lapse has.
SETTLING_SECONDS = 0.012

# When they fail in a transaction, Redis 8 leaves the reply of EXEC short of an element.
UNANSWERED_IN_TRANSACTIONS = frozenset({"auth", "hello"})

# A difference that shows in fewer of as many replays is one of timing, not of behaviour.
REPETITIONS = 4

# Characters of a reply that a report shows.
SHOWN = 1000

# A command, the request, Redis's reply and engram's.
Answers = tuple[str, Words, Reply, Reply]

_OK, _QUEUED = Reply("+", b"OK"), Reply("+", b"QUEUED")
_QUOTED = re.compile(rb"('[^']*' ?)+|\d+")


@attrs.frozen
class Difference:
    """The first step of a sequence that the servers answer differently."""

    sequence: CommandSequence
    place: int
    command: str
    theirs: Reply
    ours: Reply

    @property
    def signature(self) -> tuple[str, bytes, bytes]:
        """The same for differences that probably have one cause."""
        return self.command, _outline(self.theirs), _outline(self.ours)

    def __str__(self) -> str:
        steps = self.sequence.steps[: self.place + 1]
        used = {step.client for step in steps}
        protocols = ", ".join(f"client {each} RESP{self.sequence.protocols[each]}" for each in sorted(used))
        lines = [f"{self.command} ({protocols})", *(f"    {step}" for step in steps)]
        return "\n".join([*lines, f"  Redis:  {_shown(self.theirs)}", f"  engram: {_shown(self.ours)}"])


def _shown(reply: Reply) -> str:
    text = str(reply)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _outline(reply: Reply) -> bytes:
    if reply.is_error:
        return _QUOTED.sub(b"?", reply.text)
    return reply.kind.encode() + (b"null" if reply.value is None else b"")


@attrs.define
class Coverage:
    """What has been replayed. `replies` counts (command, kind of reply); an error's kind is its code."""

    sequences: int = 0
    steps: int = 0
    replies: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    departures: Counter[str] = attrs.field(factory=Counter)

    def count(self, command: str, reply: Reply) -> None:
        kind = reply.kind
        if reply.is_error:
            kind += reply.text.split(b" ")[0].decode(errors="replace")
        elif reply.value is None:
            kind += "null"
        self.replies[command, kind] += 1

    @property
    def commands(self) -> set[str]:
        return {command for command, _ in self.replies}


@attrs.define
class _Client:
    """One client of a sequence, on both servers.

    `queued` are the commands that its EXEC will answer; None outside a transaction.
    """

    protocol: int
    connections: list[WireClient]
    queued: list[Words] | None = None


class Replay:
    """Carries out sequences on a pair of servers, each on empty ones with fresh connections."""

    def __init__(self, pair: Pair, grammar: Grammar) -> None:
        self.pair = pair
        self.grammar = grammar
        self.coverage = Coverage()
        self._settings = [
            (name, pair.redis.control.call(b"CONFIG", b"GET", name).elements[1].text)
            for name in grammar.settings
        ]

    def run(self, sequence: CommandSequence, coverage: Coverage | None = None) -> Difference | None:
        """The first difference, and None when there is none; `coverage` is added to."""
        for peer in self.pair.both:
            self._clear(peer)
        coverage = Coverage() if coverage is None else coverage
        coverage.sequences += 1
        relative = False
        with ExitStack() as stack:
            clients = [_Client(protocol, self._connect(stack, protocol)) for protocol in sequence.protocols]
            for place, step in enumerate(sequence.steps):
                client = clients[step.client]
                relative = relative or tells_time(step.words)
                if step.action == "index":
                    self._make_index(client, step.words[0])
                    continue
                name = self._name(step.words)
                if client.queued is not None and name in UNANSWERED_IN_TRANSACTIONS:
                    continue
                if step.action == "settle":
                    time.sleep(SETTLING_SECONDS)
                for connection in client.connections:
                    connection.send(step.words)
                theirs, ours = (connection.reply() for connection in client.connections)
                coverage.steps += 1
                coverage.count(name, theirs)
                departures = [
                    departure_of(*answers)
                    for answers in self._differing(client, name, step.words, theirs, ours, relative=relative)
                ]
                known = [departure for departure in departures if departure is not None]
                if len(known) < len(departures):
                    return Difference(sequence, place, name, theirs, ours)
                coverage.departures.update(departure.title for departure in known)
                if theirs == SILENT or any(departure.ends_sequence for departure in known):
                    return None
                if theirs == ours == CLOSED or name == "quit":
                    for connection in client.connections:
                        connection.close()
                    client.connections = self._connect(stack, client.protocol)
                    client.queued = None
        return None

    def repeats(self, difference: Difference) -> bool:
        """Whether the difference shows every time."""
        again = (self.run(difference.sequence) for _ in range(REPETITIONS))
        return all(each is not None and each.signature == difference.signature for each in again)

    def minimised(self, difference: Difference) -> Difference:
        """The same difference by fewer and shorter steps."""
        smaller = True
        while smaller:
            smaller = False
            for sequence in _smaller(difference):
                found = self.run(sequence)
                if found is not None and found.signature == difference.signature:
                    difference, smaller = found, True
                    break
        return difference

    def _differing(
        self, client: _Client, name: str, words: Words, theirs: Reply, ours: Reply, *, relative: bool
    ) -> list[Answers]:
        """What of the replies to a request differs: all of it, or some of the commands that EXEC answers."""
        answers = [(name, words, theirs, ours)]
        if client.queued is not None and theirs == ours == _QUEUED:
            client.queued.append(words)
            return []
        if name == "multi" and theirs == ours == _OK:
            client.queued = []
        elif name in ("exec", "discard", "reset"):
            queued, client.queued = client.queued or [], None
            if name == "exec" and theirs.kind == ours.kind and len(queued) == len(theirs.elements):
                if len(queued) != len(ours.elements):
                    return answers
                answers = [
                    (self._name(each), each, their, our)
                    for each, their, our in zip(queued, theirs.elements, ours.elements, strict=True)
                ]
        elif name == "scan" and len(theirs.elements) == len(ours.elements) == 2:
            their, our = (self._scanned(connection, words) for connection in client.connections)
            return answers if their != our else []
        elif name == "randomkey" and theirs.kind == ours.kind == "$" and theirs.text and ours.text:
            exist = all(
                connection.call(b"EXISTS", reply.text).text == b"1"
                for connection, reply in zip(client.connections, (theirs, ours), strict=True)
            )
            return [] if exist else answers
        return [
            answer
            for answer in answers
            if differ(
                answer[0],
                answer[2],
                answer[3],
                relative=relative,
                commands=self.grammar.common_commands,
                settings=self.grammar.common_settings,
            )
        ]

    @staticmethod
    def _scanned(connection: WireClient, words: Words) -> list[bytes]:
        """All that an iteration with the options of this call of SCAN yields, from its beginning."""
        cursor = b"0"
        found: set[bytes] = set()
        while True:
            reply = connection.call(words[0], cursor, *words[2:])
            if len(reply.elements) != 2:
                return [reply.text]
            cursor, keys = reply.elements[0].text, reply.elements[1]
            found.update(key.text for key in keys.elements)
            if cursor == b"0":
                return sorted(found)

    def _name(self, words: Words) -> str:
        """The command that a request is for."""
        name = words[0].decode(errors="replace").lower()
        if "|" in name:
            return "?"
        if name in self.grammar.containers and len(words) > 1:
            whole = f"{name}|{words[1].decode(errors='replace').lower()}"
            return whole if whole in self.grammar.commands else f"{name}|?"
        return name if name in self.grammar.commands else "?"

    def _connect(self, stack: ExitStack, protocol: int) -> list[WireClient]:
        connections = []
        for peer in self.pair.both:
            connection = peer.connect()
            stack.callback(connection.close)
            # Answered once the server knows the client: a password that is set later does not concern it.
            connection.call(*([b"HELLO", b"3"] if protocol == 3 else [b"PING"]))
            connections.append(connection)
        return connections

    def _make_index(self, client: _Client, key: bytes) -> None:
        redis, engram = self.pair.both
        redis.control.call(b"VADD", key, b"VALUES", b"2", b"1", b"0", b"element")
        engram.control.call(b"VNEW", key, b"2")

    def _clear(self, peer: Peer) -> None:
        """Takes back all that a sequence may have done; refusals do not matter."""
        control = peer.control
        for name, value in self._settings:
            control.send((b"CONFIG", b"SET", name, value))
        control.send((b"CONFIG", b"SET", b"requirepass", b""))
        control.send((b"ACL", b"DELUSER", b"alice", b"bob"))
        control.send((b"FLUSHALL",))
        for _ in range(len(self._settings) + 3):
            control.reply()


def _smaller(difference: Difference) -> list[CommandSequence]:
    """Sequences that are a little less than that of a difference, the smallest first."""
    sequence = difference.sequence
    steps = sequence.steps[: difference.place + 1]
    found = []

    def add(shorter: tuple[Step, ...]) -> None:
        if shorter:
            found.append(attrs.evolve(sequence, steps=shorter))

    size = len(steps) // 2
    while size:
        for start in range(0, len(steps) - size, size):
            add(steps[:start] + steps[start + size :])
        size //= 2
    for place, step in enumerate(steps):
        if step.action != "call":
            continue
        for word in range(len(step.words) - 1, 0, -1):
            words = step.words[:word] + step.words[word + 1 :]
            add((*steps[:place], attrs.evolve(step, words=words), *steps[place + 1 :]))
    if set(sequence.protocols) != {2}:
        found.append(CommandSequence((2,) * len(sequence.protocols), steps))
    return found
