"""Sequences of commands, made from what both servers have in common.

Most commands follow the syntax that the Redis documents, with values at the edges of what it takes;
some have then a word lost, doubled, replaced or moved. A command that both servers learn is generated
from that day on, without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Literal

import attrs
import xxhash
from hypothesis import strategies as st

from tests.compat.differential.peers import Pair
from tests.compat.differential.syntax import Argument, documented

CLIENTS = 3
LONGEST = 12

Words = tuple[bytes, ...]
Strategy = st.SearchStrategy[Words]

# What these answer is the server's own affair, ends it, or takes replies away or holds them back.
EXCLUDED = frozenset(
    {
        *("bgrewriteaof", "bgsave", "save", "lastsave", "shutdown", "sync", "psync", "replconf", "failover"),
        *("replicaof", "slaveof", "debug", "monitor", "module", "lolwut", "script", "function"),
        *("subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe", "latency"),
        *("blpop", "brpop", "blmove", "blmpop", "bzpopmin", "bzpopmax", "bzmpop", "brpoplpush"),
        *("client|reply", "client|pause", "client|kill", "client|tracking", "command", "command|count"),
        *("command|docs", "command|info", "command|list", "config|rewrite", "acl|load", "acl|save"),
        *("slowlog|get", "slowlog|len", "migrate", "pfselftest", "pfdebug"),
        *("info", "memory|doctor", "memory|malloc-stats", "memory|stats", "memory|purge"),
    }
)

# Commands that Redis 7 answers otherwise than Redis 8, which engram follows; of containers all parts.
# (Of an unknown command without arguments it says that it begins with none.)
CHANGED_IN_8 = frozenset({"acl", "bitcount", "hello", "scan"})

# A setting of neither.
_UNKNOWN = b"nosuch"

# Settings whose values mean the same to both, and values to give them.
SETTINGS = {
    b"maxmemory": (b"0", b"100mb", b"1gb", b"1k", b"1", b"-1", b"abc", b"", b"1.5gb", b"1xb"),
    b"maxmemory-policy": (b"noeviction", b"volatile-ttl", b"VOLATILE-TTL", b"nosuch", b""),
    b"timeout": (b"0", b"300", b"-1", b"abc", b"9223372036854775808", b" 1"),
    b"tcp-keepalive": (b"0", b"300", b"-1", b"abc"),
    b"slowlog-log-slower-than": (b"-1", b"10000", b"1000000", b"abc"),
    b"slowlog-max-len": (b"0", b"128", b"abc"),
    b"maxclients": (b"500", b"1000", b"0", b"abc"),
    b"appendfsync": (b"always", b"everysec", b"no", b"NO", b"nosuch", b""),
    b"save": (b"",),
    b"databases": (b"1", b"16"),
    b"tcp-backlog": (b"511",),
    b"proto-max-bulk-len": (b"1mb", b"2mb", b"1048576", b"1", b"abc"),
    b"client-query-buffer-limit": (b"1gb", b"2mb", b"1", b"abc"),
    b"latency-tracking": (b"yes", b"no", b"YES", b"maybe"),
    b"acllog-max-len": (b"0", b"128", b"abc", b"-1"),
    b"protected-mode": (b"yes", b"no", b"maybe"),
    b"unixsocket": (b"",),
    _UNKNOWN: (b"1",),
}

KEYS = (b"a", b"b", b"c", b"number", b"index", b"", b"x{a}\x00\xff")
INDEX = b"index"
PASSWORDS = (b"secret", b"", b"other", b"\xff\x00 x")
USERS = (b"alice", b"bob", b"default", b"nobody", b"")
FUTURE_SECONDS = (3_000_000_000, 3_000_000_001, 4_102_444_800)
# From a base of its own for each unit: what is relative to now lies days apart from what is not.
SPANS = (100, 101, 5_000, 86_400, 1_000_000)

_EDGES = (0, 1, -1, 2, 7, 8, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64)
_ODD = (
    *(b"", b"nan", b"inf", b"-inf", b"-0", b"+1", b" 1", b"1 ", b"01", b"1.0", b"1e3", b"0x10", b"1_0"),
    *(b"abc", b"\xff", b"\r\n", b"%s", b"'", b"\\", b"*", b"(", b"1" * 40, b"a\x00b"),
)


def _numbers(*numbers: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from([b"%d" % number for number in numbers])


odd = st.sampled_from(_ODD)
integers = st.one_of(_numbers(*range(-4, 12)), _numbers(*_EDGES), _numbers(*range(-4, 12)))
floats = st.one_of(
    st.sampled_from(
        [
            *(b"0", b"1", b"-1", b"0.1", b"0.2", b"3.0", b"1e17", b"1e-17", b"5.0e3", b"-2.5", b"1e308"),
            *(b"1e4932", b"1e5000", b"inf", b"-inf", b"nan", b"0x1p3", b".5", b"1.", b"-0", b"-0.0"),
            b"123456789.123456789",
        ]
    ),
    st.floats(-1e6, 1e6).map(lambda number: repr(number).encode()),
)
keys = st.sampled_from((*KEYS[:3], *KEYS))
values = st.one_of(
    integers,
    floats,
    odd,
    st.sampled_from([b"value", b"x" * 44, b"x" * 45, b"y" * 5000, b"\x00\x01\x80\xff", b"foobar", b"10"]),
    st.binary(max_size=8),
)
seconds = st.one_of(_numbers(*SPANS), _numbers(0, -1, -100, 2**63 - 1, 2**63, 2**63 // 1000, -(2**63)), odd)
milliseconds = st.one_of(
    _numbers(*(span * 1000 for span in SPANS)), _numbers(0, -1, -100, 2**63 - 1, 2**63, -(2**63)), odd
)
moments = _numbers(*FUTURE_SECONDS, *FUTURE_SECONDS, 0, 1, -1, 1_000_000_000, 2**63 - 1, 2**63 // 1000) | odd
moments_in_milliseconds = st.one_of(
    _numbers(*(moment * 1000 + offset for moment in FUTURE_SECONDS for offset in (0, 499, 500))),
    _numbers(0, 1, -1, 1_000_000_000_000, 2**63 - 1, 2**63),
    odd,
)
offsets = _numbers(*range(-12, 12), 1 << 20, (1 << 20) - 1, (1 << 20) - 8, *_EDGES) | odd
bits = _numbers(*range(20), 100, (1 << 23) - 1, 1 << 23, (1 << 32) - 1, 1 << 32, -1, 2**63) | odd
# Some that occur often, so that a condition may hold.
wanted = st.sampled_from([b"value", b"10", b"1", b"-1", b"foobar", b"", b"x" * 45])
digests = st.one_of(
    wanted.map(lambda value: xxhash.xxh3_64_hexdigest(value).encode()),
    wanted.map(lambda value: xxhash.xxh3_64_hexdigest(value).upper().encode()),
    st.sampled_from([b"0" * 16, b"z" * 16, b"0" * 15, b"0" * 17, b"0x" + b"0" * 14, b""]),
)
patterns = st.sampled_from(
    [b"*", b"a", b"?", b"[a-c]", b"[^a]", b"n*r", b"\\a", b"x*", b"", b"[", b"*\xff", b"[b-", b"\\", b"i*x"]
)
users = st.sampled_from(USERS)
passwords = st.sampled_from(PASSWORDS)
names = st.sampled_from([b"me", b"", b"two words", b"line\n", b"\xff", b"n-1"])

# By the name of the argument, where its type does not say enough.
_NAMED: dict[str, st.SearchStrategy[bytes]] = {
    "seconds": seconds,
    "milliseconds": milliseconds,
    "unix-time-seconds": moments,
    "unix-time-milliseconds": moments_in_milliseconds,
    "offset": offsets,
    "start": offsets,
    "end": offsets,
    "pattern": patterns,
    "username": users,
    "password": passwords,
    "clientname": names,
    "connection-name": names,
    "increment": integers | floats,
    "decrement": integers,
    "ifeq-value": wanted | values,
    "ifne-value": wanted | values,
    "ifdeq-digest": digests,
    "ifdne-digest": digests,
}


def _one(strategy: st.SearchStrategy[bytes]) -> Strategy:
    return strategy.map(lambda word: (word,))


def _joined(parts: Sequence[Words]) -> Words:
    return tuple(chain.from_iterable(parts))


def _value(command: str, argument: Argument) -> Strategy:
    """Words for an argument that is there once, its token left out."""
    match argument.type:
        case "oneof":
            return st.one_of([_words(command, each) for each in argument.arguments])
        case "block":
            return st.tuples(*(_words(command, each) for each in argument.arguments)).map(_joined)
        case "pure-token":
            return st.just(())
        case "key":
            return _one(keys)
    if command in ("setbit", "getbit") and argument.name == "offset":
        return _one(bits)
    if command == "setbit":
        return _one(_numbers(0, 1, 0, 1, 2, -1))
    if argument.name in _NAMED:
        return _one(_NAMED[argument.name])
    match argument.type:
        case "integer" | "unix-time":
            return _one(integers | integers | odd)
        case "double":
            return _one(floats)
    return _one(values)


def _words(command: str, argument: Argument) -> Strategy:
    """Words for an argument, as the command's syntax has it."""
    token = () if argument.token is None else (argument.token,)
    once = _value(command, argument)
    if argument.multiple_token:
        once = once.map(lambda found: (*token, *found))
    if argument.multiple:
        once = st.lists(once, min_size=1, max_size=3).map(_joined)
    if not argument.multiple_token:
        once = once.map(lambda found: (*token, *found))
    return st.just(()) | once if argument.optional else once


def _sampled(*requests: str) -> Strategy:
    """Arguments that are one of these, each a line of words."""
    return st.sampled_from([tuple(request.encode().split()) for request in requests])


_ACL_RULES = (
    "on off nopass resetpass reset allkeys resetkeys ~* ~a* ~a %R~b %W~a %RW~c %~x &* resetchannels"
    " allchannels allcommands nocommands +@all -@all +@read -@write +@string -@fast +@connection"
    " +@transaction +@keyspace -@dangerous +@bitmap +@nosuch +get -get +SET +config|get -config|get -client"
    " +client|id +ping +nosuch +config|x +get|x +select|0 + nosuch >secret <secret >other #00"
    f" sanitize-payload skip-sanitize-payload clearselectors #{'a' * 64} !{'a' * 64} #{'A' * 64}"
).split()


def _special(settings: Sequence[bytes]) -> dict[str, Strategy]:
    """Arguments of commands whose documented syntax says too little."""
    setting = st.sampled_from(settings)
    assignment = setting.flatmap(lambda name: st.sampled_from([(name, value) for value in SETTINGS[name]]))
    rules = st.lists(st.sampled_from(_ACL_RULES).map(str.encode), max_size=5).map(tuple)
    restricted = st.sampled_from([b"alice", b"alice", b"bob", b"", b"two words"])
    credentials = st.one_of(
        st.tuples(users, passwords), st.tuples(passwords), st.tuples(st.just(b"alice"), st.just(b"secret"))
    )
    options = st.one_of(
        credentials.map(lambda words: (b"AUTH", *words)),
        names.map(lambda name: (b"SETNAME", name)),
        st.just((b"NOSUCH",)),
    )
    hello: Strategy = st.tuples(
        st.sampled_from([b"2", b"3", b"2", b"3", b"1", b"4", b"abc", b""]).map(lambda word: (word,)),
        st.lists(options, max_size=2).map(_joined),
    ).map(_joined)
    keyed = _sampled("get a", "set a b", "mset a 1 b 2", "mset a 1 b", "nosuch a", "ping", "del a b", "set a")
    return {
        "config|get": st.lists(setting, min_size=1, max_size=3).map(tuple),
        "config|set": st.lists(assignment, min_size=1, max_size=2).map(_joined),
        "acl|setuser": st.tuples(restricted.map(lambda user: (user,)), rules).map(_joined),
        "acl|deluser": st.lists(users, min_size=1, max_size=2).map(tuple),
        "acl|cat": _sampled(
            "", "read", "WRITE", "string", "transaction", "connection", "bitmap", "no", "a b"
        ),
        "acl|genpass": _sampled("", "5", "1024", "0", "-1", "5000", "abc", "4096"),
        "acl|log": _sampled("RESET", "reset", "-1", "abc"),
        "acl|dryrun": st.tuples(users, keyed).map(lambda parts: (parts[0], *parts[1])),
        "auth": credentials,
        "hello": st.just(()) | hello | hello,
        "select": _sampled(*"00011259", "15", "-1", "abc", "9223372036854775808", "16", "00", "2147483648"),
        "swapdb": _sampled("0 0", "0 1", "1 0", "2 1", "0 16", "a 0", "0 a", "-1 0", "0 9223372036854775808"),
        "move": st.tuples(keys, st.sampled_from([b"0", b"1", b"1", b"2", b"16", b"abc"])),
        "flushdb": _sampled("", "", "ASYNC", "sync", "x"),
        "client|setinfo": st.tuples(st.sampled_from([b"LIB-NAME", b"lib-ver", b"nosuch"]), names),
        "client|list": _sampled(
            "", "TYPE normal", "TYPE nosuch", "ID 1 a", "ID", "NO", "TYPE", "TYPE pubsub"
        ),
        "client|unblock": _sampled("99999999", "abc", "99999999 ERROR", "99999999 NOSUCH"),
        "client|no-evict": _sampled("ON", "off", "x"),
        "client|no-touch": _sampled("ON", "off", "x"),
        "client|caching": _sampled("YES", "no", "x"),
        "object|encoding": _one(keys),
        "object|freq": _one(keys),
        "object|idletime": _one(keys),
        "command|getkeys": keyed,
        "command|getkeysandflags": keyed,
        "wait": _sampled("0 0", "0 1", "0 -1", "abc 0", "0 abc", "-1 0"),
        "waitaof": _sampled("0 0 0", "1 0 0", "2 0 0", "0 0 -1", "abc 0 0", "0 abc 0", "-1 0 0"),
        "reset": st.just(()),
        "quit": st.just(()),
        "time": st.just(()),
        "memory|usage": st.tuples(keys) | st.tuples(keys, st.just(b"SAMPLES"), integers),
        "ping": st.just(()) | _one(values) | st.tuples(values, values),
        "scan": _scan(),
    }


def _scan() -> Strategy:
    options = st.one_of(
        patterns.map(lambda pattern: (b"MATCH", pattern)),
        st.sampled_from([b"1", b"2", b"100", b"0", b"-1", b"abc", b"9223372036854775808"]).map(
            lambda count: (b"COUNT", count)
        ),
        st.sampled_from([b"string", b"STRING", b"vectorset", b"list"]).map(lambda kind: (b"TYPE", kind)),
        st.just((b"NOSUCH",)),
    )
    cursors = st.sampled_from([b"0", b"0", b"0", b"0", b"abc", b"-1", b"", b"18446744073709551616"])
    return st.tuples(_one(cursors), st.lists(options, max_size=3).map(_joined)).map(_joined)


# How often a command is drawn; 1 unless it stands here.
_WEIGHTS = {
    **dict.fromkeys(("set", "getex", "get", "incrby", "expire", "pexpireat", "setrange"), 4),
    **dict.fromkeys(("incrbyfloat", "mset", "copy", "rename", "bitcount", "getrange", "setbit", "scan"), 3),
    **dict.fromkeys(("select", "move"), 4),
    **dict.fromkeys(("swapdb", "dbsize"), 2),
    **dict.fromkeys(("multi", "exec", "watch", "object|encoding", "expireat", "pexpire", "acl|setuser"), 2),
    **dict.fromkeys(("config|set", "delex", "getdel", "msetnx", "append", "hello", "auth"), 2),
}


def _shown(word: bytes) -> str:
    if len(word) > 100:
        return f"({len(word)} bytes: {word[:10]!r}...)"
    return word.decode() if word.isalnum() and word.isascii() else repr(word)[1:]


@attrs.frozen
class Step:
    """One thing that one client does.

    A call sends `words`. "settle" has a key lapse on both servers before its words are sent. "index" makes
    a vector set at the key, or an index, by the server's own means; its reply is not compared.
    """

    client: int
    words: Words
    action: Literal["call", "settle", "index"] = "call"

    def __str__(self) -> str:
        shown = " ".join(map(_shown, self.words))
        return f"client {self.client}: {shown}" + ("" if self.action == "call" else f" ({self.action})")


@attrs.frozen
class CommandSequence:
    """What is replayed: the protocol that each client starts with, and the steps."""

    protocols: tuple[int, ...]
    steps: tuple[Step, ...]


class Grammar:
    """The commands that both servers of a pair have, and strategies for calls of them."""

    def __init__(self, pair: Pair, without: Iterable[str] = ()) -> None:
        left_out = set(without) | (CHANGED_IN_8 if pair.redis.version < (8,) else set())
        common = frozenset(
            name
            for name in pair.redis.commands & pair.engram.commands
            if left_out.isdisjoint((name, name.partition("|")[0]))
        )
        syntax = documented(pair.redis.documentation)
        shared = [
            name
            for name in SETTINGS
            if name == _UNKNOWN
            or all(peer.control.call(b"CONFIG", b"GET", name).elements for peer in pair.both)
        ]
        special = _special(shared)
        self.settings = [name for name in shared if name != _UNKNOWN]
        self.containers = {name.partition("|")[0] for name in common if "|" in name}
        self.commands = common
        # engram's indices have a dialect of their own.
        dialect = {name for name in common if name.startswith("v")}
        self.common_commands = common - dialect
        self.common_settings = frozenset(name.decode() for name in shared)
        self.has_index = "vadd" in common
        self.arguments: dict[str, Strategy] = {}
        for name in sorted(common - self.containers - dialect):
            if name in EXCLUDED or name.partition("|")[0] in EXCLUDED:
                continue
            if name in special:
                self.arguments[name] = special[name]
            elif name in syntax:
                self.arguments[name] = st.tuples(*(_words(name, each) for each in syntax[name])).map(_joined)
        # Since 8.6; the text is another one before.
        self.unknown_words = 0 if pair.redis.version >= (8, 6) else 1
        self.drawn = [name for name in self.arguments for _ in range(_WEIGHTS.get(name, 1))]

    def calls(self) -> Strategy:
        """Whole requests, most of them well formed."""
        requests = _requests(
            self.drawn, self.arguments, sorted(self.containers - EXCLUDED), self.unknown_words
        )
        return requests.filter(lambda words: not _answered_twice(words))

    def sequences(self) -> st.SearchStrategy[CommandSequence]:
        """Sequences of at most a few dozen steps."""
        return _sequences(self)


@st.composite
def _requests(
    draw: st.DrawFn,
    drawn: Sequence[str],
    arguments: dict[str, Strategy],
    containers: Sequence[str],
    unknown_words: int,
) -> Words:
    kind = draw(st.integers(0, 40))
    if kind == 40:
        unknown = st.sampled_from([b"foobar", b"", b"FOO|BAR", b"x" * 200, b"\xff\r\n", b"get ", b"client|x"])
        return (draw(unknown), *draw(st.lists(values, min_size=unknown_words, max_size=4)))
    if kind == 39 and containers:
        container = draw(st.sampled_from(containers)).encode()
        return (container, *draw(st.lists(odd, max_size=2)))
    name = draw(st.sampled_from(drawn))
    words = (*name.encode().split(b"|"), *draw(arguments[name]))
    first = name.count("|") + 1
    if kind < 26:
        return words
    if kind < 30:
        spelling = draw(st.sampled_from([bytes.upper, bytes.title]))
        return (*map(spelling, words[:first]), *words[first:])
    return _spoilt(draw, words, first)


def _answered_twice(words: Words) -> bool:
    """Whether it is a SET to which Redis 8.6 replies with the old value and then with an error, too."""
    options = [word.upper() for word in words[3:]]
    return (
        words[0].upper() == b"SET"
        and b"GET" in options
        and any(option in (b"IFDEQ", b"IFDNE") and len(digest) != 16 for option, digest in pairwise(options))
    )


def _spoilt(draw: st.DrawFn, words: Words, first: int) -> Words:
    """The request with one fault; its name, before `first`, stays."""
    name, rest = words[:first], list(words[first:])
    place = draw(st.integers(0, max(0, len(rest) - 1)))
    match draw(st.sampled_from(["lose", "double", "replace", "add", "move", "case", "repeat"])):
        case "lose":
            del rest[place : place + 1]
        case "double":
            rest[place:place] = rest[place : place + 1]
        case "replace":
            rest[place : place + 1] = [draw(odd)]
        case "add":
            rest.append(draw(odd))
        case "move":
            tail = rest[1:]
            rest[1:] = draw(st.permutations(tail)) if tail else []
        case "case":
            rest = [word.lower() if word.isupper() else word.upper() for word in rest]
        case "repeat":
            rest += rest[1:]
    return (*name, *rest)


@st.composite
def _sequences(draw: st.DrawFn, grammar: Grammar) -> CommandSequence:
    calls = grammar.calls()
    steps: list[Step] = []
    client = st.sampled_from([0, 0, 0, 1, 2])
    segments: dict[str, Callable[[], list[Step]]] = {}

    def call(number: int, *words: bytes) -> Step:
        return Step(number, words)

    def single() -> list[Step]:
        return [Step(draw(client), draw(calls))]

    def several(number: int, most: int) -> list[Step]:
        return [Step(number, draw(calls)) for _ in range(draw(st.integers(0, most)))]

    def transaction() -> list[Step]:
        number = draw(client)
        end = draw(st.sampled_from([b"EXEC", b"exec", b"EXEC", b"DISCARD"]))
        return [call(number, b"MULTI"), *several(number, 4), call(number, end)]

    def conflict() -> list[Step]:
        watched = tuple(draw(st.lists(keys, min_size=1, max_size=2)))
        before = [call(0, b"WATCH", *watched), *several(1, 2)]
        return [*before, call(0, b"MULTI"), *several(0, 2), *several(1, 1), call(0, b"EXEC")]

    def lapse() -> list[Step]:
        key = draw(keys)
        watching = [call(1, b"WATCH", key)] if "watch" in grammar.commands and draw(st.booleans()) else []
        made = [call(0, b"SET", key, draw(values)), call(0, b"PEXPIRE", key, b"%d" % draw(st.integers(1, 5)))]
        after = [call(1, b"MULTI"), call(1, b"GET", key), call(1, b"EXEC")] if watching else []
        return [*made, *watching, Step(0, (b"EXISTS", key), "settle"), *after]

    def user() -> list[Step]:
        rules = draw(st.lists(st.sampled_from(_ACL_RULES).map(str.encode), max_size=4))
        made = call(0, b"ACL", b"SETUSER", b"alice", b"on", b">secret", *rules)
        number = draw(st.sampled_from([1, 2]))
        return [made, call(number, b"AUTH", b"alice", b"secret"), *several(number, 4)]

    def password() -> list[Step]:
        number = draw(st.sampled_from([1, 2]))
        demanded = call(0, b"CONFIG", b"SET", b"requirepass", draw(passwords))
        return [demanded, call(number, b"RESET"), *several(number, 3), call(number, b"AUTH", draw(passwords))]

    def index() -> list[Step]:
        return [Step(0, (INDEX,), "index")]

    segments = {"single": single}
    if {"multi", "exec", "discard"} <= grammar.commands:
        segments["transaction"] = transaction
        if "watch" in grammar.commands:
            segments["conflict"] = conflict
    if {"pexpire", "exists"} <= grammar.commands:
        segments["lapse"] = lapse
    if "acl|setuser" in grammar.commands:
        segments["user"] = user
        if "reset" in grammar.commands:
            segments["password"] = password
    if grammar.has_index:
        segments["index"] = index
    often = ["single"] * 12 + ["transaction"] * 3 + ["conflict"]
    chosen = st.sampled_from([name for name in (*often, *segments) if name in segments])
    for _ in range(draw(st.integers(2, LONGEST))):
        steps += segments[draw(chosen)]()
    protocols = tuple(draw(st.lists(st.sampled_from([2, 3]), min_size=CLIENTS, max_size=CLIENTS)))
    return CommandSequence(protocols, tuple(steps))
