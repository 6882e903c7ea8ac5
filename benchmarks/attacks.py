"""What a client can do to a server that others use, too; those that never end are in `hostile`."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import attrs
import hiredis
import numpy as np

from benchmarks import hostile
from benchmarks.dialects import INDEX, Dialect, Engram
from benchmarks.embeddings import key_of
from benchmarks.load import pack

KEYS = 1_000_000
WATCHED = 500_000
VOLATILE = 100_000
LAPSE_SECONDS = 5
QUEUED = 200_000
ROWS = 20_000
DIMENSION = 16
SCANNERS = 16

_MIB = 1 << 20
# Keys in one request of what is prepared.
_MANY = 1000
_READ_SIZE = 1 << 20


@attrs.frozen
class Side:
    """A server that is attacked, and how it is spoken to."""

    target: hostile.Target
    dialect: Dialect

    @property
    def is_engram(self) -> bool:
        return isinstance(self.dialect, Engram)

    def connect(self) -> Attacker:
        return Attacker(self.target)


class Attacker:
    """A connection that may do everything. It sends and reads at once: neither end waits for the other."""

    def __init__(self, target: hostile.Target) -> None:
        self._socket = target.connect()
        self._socket.setblocking(False)
        self._reader = hiredis.Reader()
        self.ask(pack(b"AUTH", hostile.PASSWORD.encode()))

    def fileno(self) -> int:
        return self._socket.fileno()

    def begin(self, request: bytes) -> None:
        """Sends a request that is so short that the socket has room for it."""
        self._socket.sendall(request)

    def receive(self) -> list[object]:
        """The replies, errors among them, that have come whole."""
        with suppress(BlockingIOError):
            data = self._socket.recv(_READ_SIZE)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._reader.feed(data)
        replies = []
        while (reply := self._reader.gets()) is not False:
            replies.append(reply)
        return replies

    def ask(self, requests: bytes, count: int = 1) -> list[str]:
        """Sends the requests, waits for so many replies, and returns which were errors, in their order."""
        errors = []
        unsent = memoryview(requests)
        while count:
            readable, writable, _ = select.select([self], [self] if unsent else [], [])
            if readable:
                replies = self.receive()
                count -= len(replies)
                errors += [str(reply) for reply in replies if isinstance(reply, hiredis.ReplyError)]
            if writable:
                with suppress(BlockingIOError):
                    unsent = unsent[self._socket.send(unsent[: 4 * _READ_SIZE]) :]
        return errors

    def call(self, *words: bytes) -> list[str]:
        return self.ask(pack(*words))


# What it returns is what the server refused.
Attack = Callable[[Side], Sequence[str]]
Prepare = Callable[[Attacker, Side], object]


@attrs.frozen
class Case:
    """An attack and what the server holds before it.

    One that is `endless` is ended after some seconds; several attackers go on at once.
    One that `destroys` what was prepared has it prepared again before each repetition.
    """

    name: str
    attack: Attack
    prepare: Prepare = lambda client, side: None
    endless: bool = False
    attackers: int = 1
    destroys: bool = False


# What servers hold.


def fill(client: Attacker, side: Side, count: int = KEYS, size: int = 3) -> None:
    """So many strings, those of one attack named as in `key`."""
    value = b"x" * size
    many = max(1, min(_MANY, _MIB // size))
    for start in range(0, count, many):
        part = range(start, min(start + many, count))
        client.call(b"MSET", *itertools.chain.from_iterable((key(number), value) for number in part))


def fill_volatile(client: Attacker, side: Side) -> None:
    """Strings that all lapse at one moment, shortly after."""
    moment = b"%d" % round(1000 * (time.time() + LAPSE_SECONDS))
    for start in range(0, VOLATILE, _MANY):
        sets = [pack(b"SET", key(number), b"xyz", b"PXAT", moment) for number in range(start, start + _MANY)]
        client.ask(b"".join(sets), len(sets))


def key(number: int) -> bytes:
    return b"key:%07d" % number


def long_string(client: Attacker, side: Side, mib: int) -> None:
    client.call(b"SETRANGE", b"long", b"%d" % (mib * _MIB - 1), b"x")


def rows(client: Attacker, side: Side) -> None:
    """Vectors with attributes, in an index."""
    for request in side.dialect.prepare():
        client.ask(request)
    data = vectors(ROWS)
    for start in range(0, ROWS, _MANY):
        part = range(start, min(start + _MANY, ROWS))
        client.ask(*side.dialect.add([(key_of(row), data[row], b'{"size":%d}' % row) for row in part]))


def vectors(count: int) -> list[bytes]:
    """Around a hundred centres, so that graphs have something to find."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((100, DIMENSION))
    made = centres[random.integers(100, size=count)] + 0.3 * random.standard_normal((count, DIMENSION))
    return [row.tobytes() for row in made.astype("<f4")]


# Attacks.


def once(*requests: bytes) -> Attack:
    """Sends the requests, which have a reply each."""

    def attack(side: Side) -> Sequence[str]:
        return side.connect().ask(b"".join(requests), len(requests))

    return attack


def command(*words: bytes, times: int = 1) -> Attack:
    return once(*itertools.repeat(pack(*words), times))


def only_engram(attack: Attack, instead: Attack) -> Attack:
    """For Redis, what comes nearest."""
    return lambda side: attack(side) if side.is_engram else instead(side)


def execute(requests: Sequence[bytes]) -> Attack:
    """Has them carried out by one EXEC, or as many of them as may be queued."""

    def attack(side: Side) -> Sequence[str]:
        client = side.connect()
        client.call(b"MULTI")
        refused = client.ask(b"".join(requests), len(requests))
        if refused:
            client.call(b"DISCARD")
            client.call(b"MULTI")
            fewer = requests[: len(requests) - len(refused)]
            client.ask(b"".join(fewer), len(fewer))
        return [*refused, *client.call(b"EXEC")]

    return attack


def watch(watchers: int) -> Attack:
    """Clients watch many keys, as many each, while another writes, to these and to others."""

    def attack(side: Side) -> Sequence[str]:
        clients = [side.connect() for _ in range(watchers)]
        writer = side.connect()
        refused = []
        for number, client in enumerate(clients):
            refused += client.call(b"WATCH", *map(key, range(number, WATCHED, watchers)))
        end = time.monotonic() + 2
        vector = vectors(1)[0]
        for number in itertools.count():
            if time.monotonic() > end:
                break
            writer.call(b"SET", key(number), b"v")
            writer.ask(*side.dialect.add([(key_of(number % 50), vector, None)]))
        return [*refused, *(error for client in clients for error in client.call(b"UNWATCH"))]

    return attack


def scan(*options: bytes) -> Attack:
    """Many clients that iterate at once, over and over."""

    def attack(side: Side) -> Sequence[str]:
        clients = [side.connect() for _ in range(SCANNERS)]
        for client in clients:
            client.begin(pack(b"SCAN", b"0", *options))
        while True:
            for client in select.select(clients, [], [])[0]:
                for reply in client.receive():
                    assert isinstance(reply, list)
                    client.begin(pack(b"SCAN", reply[0], *options))

    return attack


def search_many(queries: int, k: int) -> Attack:
    """Searches in one request, or pipelined where there is none for several."""

    def attack(side: Side) -> Sequence[str]:
        sought = vectors(queries)
        client = side.connect()
        if side.is_engram:
            return client.call(b"VMSEARCH", INDEX, b"%d" % k, b"%d" % queries, *sought)
        return client.ask(b"".join(side.dialect.search(query, k) for query in sought), queries)

    return attack


def search_in_transaction(queries: int, k: int) -> Attack:
    return lambda side: execute([side.dialect.search(query, k) for query in vectors(queries)])(side)


def search_with_attributes(times: int) -> Attack:
    word = (b"WITHATTRS", b"WITHATTRIBS")
    return only_engram(
        command(b"VSEARCH", INDEX, vectors(1)[0], b"%d" % ROWS, word[0], times=times),
        command(b"VSIM", INDEX, b"FP32", vectors(1)[0], b"COUNT", b"%d" % ROWS, word[1], times=times),
    )


def search_filtered(expression: bytes) -> Attack:
    def attack(side: Side) -> Sequence[str]:
        requests = [side.dialect.search(query, 10, None, expression.decode()) for query in vectors(10)]
        return side.connect().ask(b"".join(requests), len(requests))

    return attack


def add_many(side: Side) -> Sequence[str]:
    """All rows in one request where there is one for several, else pipelined."""
    client = side.connect()
    made = [(b"new:%d" % number, vector) for number, vector in enumerate(vectors(ROWS))]
    if side.is_engram:
        return client.call(b"VMADD", INDEX, *itertools.chain.from_iterable(made))
    return client.ask(*side.dialect.add([(member, vector, None) for member, vector in made]))


def expire_all(side: Side) -> Sequence[str]:
    """The keys lapse by themselves meanwhile."""
    time.sleep(LAPSE_SECONDS)
    return ()


def all_cases() -> list[Case]:
    """All attacks, those of `hostile` first."""
    keys = [key(number) for number in range(KEYS)]
    everything = (b"INFO", *[b"everything"] * 20_000)
    repeated = {
        "COMMAND DOCS, a name 5,000 times": (b"COMMAND", b"DOCS", *[b"client"] * 5000),
        "COMMAND INFO, a name 5,000 times": (b"COMMAND", b"INFO", *[b"client"] * 5000),
        "INFO, a section 20,000 times": everything,
        "CONFIG GET, a pattern 2,000 times": (b"CONFIG", b"GET", *[b"*"] * 2000),
        "LATENCY HISTOGRAM, a name 20,000 times": (b"LATENCY", b"HISTOGRAM", *[b"set"] * 20_000),
        "CLIENT LIST ID, an id 5,000 times": (b"CLIENT", b"LIST", b"ID", *[b"1"] * 5000),
    }
    of_a_million = {
        "KEYS *": command(b"KEYS", b"*"),
        "KEYS with a pattern of a few": command(b"KEYS", b"*999*7"),
        "KEYS with a pattern that backtracks": command(b"KEYS", b"*0*0*0*0*0*0*x"),
        "MGET of all": command(b"MGET", *keys),
        "EXISTS of all": command(b"EXISTS", *keys),
        "RANDOMKEY 20,000 times": command(b"RANDOMKEY", times=20_000),
        "SCAN with COUNT a million": command(b"SCAN", b"0", b"COUNT", b"1000000"),
        "SCAN whose pattern matches nothing": command(b"SCAN", b"0", b"COUNT", b"1000000", b"MATCH", b"x*"),
    }
    that_remove = {
        "DEL of all in one request": command(b"DEL", *keys),
        "UNLINK of all in one request": command(b"UNLINK", *keys),
        "FLUSHALL": command(b"FLUSHALL"),
        "FLUSHALL ASYNC": command(b"FLUSHALL", b"ASYNC"),
        "MSET over half of them in one request": command(b"MSET", *pairs(keys[: KEYS // 2])),
    }
    writes = [
        pack(b"SET", b"m%d" % number, b"v") if number % 2 else pack(b"INCR", b"n%d" % number)
        for number in range(QUEUED)
    ]
    return [
        *(
            Case(name, partial(endlessly, attack), set_big, endless=True, attackers=2 if attack else 0)
            for name, attack in hostile.ATTACKS.items()
        ),
        Case("EXEC of 200,000 SET and INCR in turn", execute(writes)),
        Case("EXEC of 200,000 GET", execute([pack(b"GET", b"big")] * QUEUED), set_big),
        Case("EXEC of 50,000 COMMAND DOCS", execute([pack(b"COMMAND", b"DOCS", b"client")] * 50_000)),
        Case("200,000 SET and INCR in turn, pipelined", once(*writes)),
        Case(
            "200,000 GET and STRLEN in turn, pipelined",
            once(*[pack(b"GET", b"big"), pack(b"STRLEN", b"big")] * (QUEUED // 2)),
            set_big,
        ),
        *(Case(name, command(*words), set_big) for name, words in repeated.items()),
        Case("WATCH of 500,000 keys by a client, and writes", watch(1), index_only),
        Case("WATCH of 500,000 keys by 50 clients, and writes", watch(50), index_only),
        *(
            Case(f"SCAN by 16 clients, COUNT {count}", scan(b"COUNT", b"%d" % count), fill, endless=True)
            for count in (10, 1000)
        ),
        *(Case(f"a million keys: {name}", attack, fill) for name, attack in of_a_million.items()),
        *(
            Case(f"a million keys: {name}", attack, fill, destroys=True)
            for name, attack in that_remove.items()
        ),
        Case("100,000 keys that lapse at one moment", expire_all, fill_volatile, destroys=True),
        *(
            Case(f"{mib} MiB: {name}", command(*words, times=times), partial(long_string, mib=mib))
            for mib in (64, 500)
            for name, times, words in (
                ("SETBIT", 20, (b"SETBIT", b"long", b"1000", b"1")),
                ("SETRANGE of a byte", 20, (b"SETRANGE", b"long", b"1000", b"x")),
                ("APPEND of a byte", 20, (b"APPEND", b"long", b"x")),
                ("GETRANGE of a byte", 20, (b"GETRANGE", b"long", b"1000", b"1000")),
                ("BITCOUNT", 3, (b"BITCOUNT", b"long")),
                ("COPY", 3, (b"COPY", b"long", b"other", b"REPLACE")),
            )
        ),
        Case("SET of 64 MiB", command(b"SET", b"long", bytes(64 * _MIB), times=3)),
        Case("GET of 30 MiB", command(b"GET", b"long", times=10), partial(long_string, mib=30)),
        Case(
            "MGET of 1 MiB each, 50 at a time",
            command(b"MGET", *keys[:50], times=10),
            partial(fill, count=50, size=_MIB),
        ),
        Case("VMSEARCH of 150 queries, k 1,000", search_many(150, 1000), rows),
        Case("VMSEARCH of 1,000 queries, k 100", search_many(1000, 100), rows),
        Case("VSEARCH of all rows, with attributes", search_with_attributes(5), rows),
        Case("EXEC of 100 searches, k 1,000", search_in_transaction(100, 1000), rows),
        Case(
            "VSEARCH with a filter that is long",
            search_filtered(b" or ".join(b".size == %d" % number for number in range(2000))),
            rows,
        ),
        Case("VMADD of 20,000 rows", add_many, index_only, destroys=True),
        Case(
            "VDELBY of all rows",
            only_engram(command(b"VDELBY", INDEX, b"FILTER", b".size >= 0"), command(b"DEL", INDEX)),
            rows,
            destroys=True,
        ),
        Case("DEL of an index", command(b"DEL", INDEX), rows, destroys=True),
        Case(
            "VSCAN of all rows",
            only_engram(
                command(b"VSCAN", INDEX, b"0", b"COUNT", b"20000", times=5),
                command(b"VRANDMEMBER", INDEX, b"20000", times=5),
            ),
            rows,
        ),
    ]


def pairs(keys: Sequence[bytes]) -> Iterator[bytes]:
    return itertools.chain.from_iterable((key, b"new") for key in keys)


def endlessly(attack: hostile.Attack | None, side: Side) -> Sequence[str]:
    if attack is not None:
        attack(side.target)
    return ()


def set_big(client: Attacker, side: Side) -> None:
    client.call(b"SET", b"big", b"x" * 4096)


def index_only(client: Attacker, side: Side) -> None:
    client.call(b"DEL", INDEX)
    for request in side.dialect.prepare():
        client.ask(request)
