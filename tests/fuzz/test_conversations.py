"""Random conversations of several clients with a server in memory: see `converse` and `converse_apart`."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.commands.registry import COMMANDS
from engram.commands.session import Session
from engram.protocol.inline import split_inline
from tests.fuzz import grammar
from tests.fuzz.conversations import (
    CLIENTS,
    FULL,
    LEAVE,
    RELEASE,
    RELEASE_NEXT,
    RESUME,
    ROOM,
    SEARCH,
    SETTLE,
    TICK,
    Step,
    converse,
    converse_apart,
    spelled_out,
)

# Enough for a few seconds in the test suite; `python -m tests.fuzz` asks for more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.steps"))

# They end, silence or lock out clients, so that fewer requests are answered.
_DISTURBING = re.compile(
    r"client\|(kill|reply|pause)|acl\|(setuser|deluser|load)|config\|set|monitor|quit|shutdown"
)
# A server in memory builds no graphs, for which VOPTIMIZE would wait.
table = [command for command in grammar.leaves(COMMANDS.values()) if command.name != "voptimize"]
transactions = st.one_of(
    st.sampled_from([b"multi", b"exec", b"multi", b"exec", b"discard", b"reset", b"unwatch"]).map(
        lambda name: [name]
    ),
    st.lists(grammar.keys, min_size=1, max_size=2).map(lambda keys: [b"watch", *keys]),
    st.sampled_from([b"2", b"3"]).map(lambda version: [b"hello", version]),
)
quiet = grammar.requests_for([command for command in table if not _DISTURBING.fullmatch(command.name)])
usual = quiet | quiet | quiet | transactions
disturbing = grammar.requests_for([command for command in table if _DISTURBING.fullmatch(command.name)])
numbers = st.integers(0, CLIENTS - 1).map(lambda number: b"%d" % number)
meanwhile = st.one_of(
    st.sampled_from(
        [[SETTLE]] * 3 + [[word] for word in (RELEASE, RELEASE_NEXT, FULL, ROOM, RESUME, SEARCH)]
    ),
    numbers.map(lambda number: [LEAVE, number]),
)
ticks = st.sampled_from([1, 999, 1000, 10**6, 10**12]).map(lambda time: [TICK, b"%d" % time])


def conversations_of(
    requests: st.SearchStrategy[list[bytes]], others: st.SearchStrategy[list[bytes]]
) -> st.SearchStrategy[list[list[bytes]]]:
    """Steps of which most are requests."""
    said = st.tuples(numbers, requests).map(lambda parts: [parts[0], *parts[1]])
    return st.lists(st.one_of(*[said] * 5, others), min_size=12, max_size=60)


conversations = st.one_of(
    *[conversations_of(usual, meanwhile | ticks)] * 3,
    conversations_of(usual | usual | disturbing, meanwhile | ticks),
)

# What one client says when it shares no keys with others; see `spelled_out`.
_PLAIN = """SET $a x, SET $b 12, SET $n 1, SET $a y NX, SET $b z EX 100 GET, GET $a, GET $b, GET $n, INCR $n,
    INCRBY $n 5, DECR $b, INCR $a, INCRBYFLOAT $n 0.5, APPEND $a z, SETRANGE $b 2 q, MSET $a 1 $n 2,
    MGET $a $b $v, MSETNX $a 3 $b 4, DEL $a $b, RENAME $a $b, RENAME $missing $a, COPY $b $a REPLACE,
    MOVE $a 1, MOVE $v 0, COPY $b $a REPLACE DB 1,
    GETDEL $n, EXPIRE $a 100, PERSIST $a, TTL $a, TYPE $v, EXISTS $a $b $n $v, DEL $v, GET $v, INCR $v,
    SET $v text, GET, NONESUCH, PING, ECHO word"""
_INDEX = """VNEW $v 2, VADD $v one ab345678, VADD $v two 12345678, VSETATTR $v one {"n":1},
    VSEARCH $v 12345678 5, VSEARCH $v 12345678 5 FILTER .n>0 WITHATTRS, VDEL $v one, VGET $v one"""
_COURSE = """MULTI, MULTI, EXEC, EXEC, DISCARD, WATCH $a, WATCH $n $v, UNWATCH, SELECT 1, SELECT 0,
    HELLO 2, HELLO 3, RESET, CLIENT REPLY SKIP, CLIENT REPLY OFF, CLIENT REPLY ON,
    CLIENT PAUSE 100000 WRITE, CLIENT PAUSE 100000 ALL, QUIT"""
# Long enough to fill a burst of replies, or a socket.
_LONG = "ECHO $70000, ECHO $300000, SET $b $70000, SET $b $300000"
_ALIKE = "SET $a x, SET $b y, GET $a, GET $b, INCR $n, DECR $n, INCR $a"


_OPENING = "VNEW $v 2, VADD $v one 12345678, SET $a text, SET $n 1"


def listed(requests: str) -> list[list[bytes]]:
    return [request.encode().split() for request in requests.split(",")]


def one_of(requests: str) -> st.SearchStrategy[list[list[bytes]]]:
    return st.sampled_from([[request] for request in listed(requests)])


# Several of one command that come one after the other may be carried out together.
alike = st.tuples(one_of(_ALIKE), st.integers(2, 5)).map(lambda parts: parts[0] * parts[1])
plain = st.one_of(one_of(_PLAIN), one_of(_PLAIN), one_of(_INDEX), alike)
transactions_apart = st.tuples(
    st.sampled_from([[], [[b"WATCH", b"$a"]]]),
    st.lists(plain, max_size=4).map(grammar.joined),
    one_of("EXEC, EXEC, EXEC, DISCARD"),
).map(lambda parts: [*parts[0], [b"MULTI"], *parts[1], *parts[2]])
sayings = st.one_of(plain, plain, plain, transactions_apart, one_of(_COURSE), one_of(_LONG))
steps_apart = st.one_of(
    *[st.tuples(numbers, sayings).map(lambda parts: [[parts[0], *request] for request in parts[1]])] * 4,
    meanwhile.map(lambda step: [step]),
)
openings = [[b"%d" % number, *request] for number in range(CLIENTS) for request in listed(_OPENING)]
conversations_apart = st.lists(steps_apart, min_size=6, max_size=50).map(
    lambda parts: [*openings, *grammar.joined(parts)]
)


def play(steps: Sequence[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trio.run(converse, Path(folder), steps)


def play_apart(steps: Sequence[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trio.run(converse_apart, Path(folder), steps)


@settings(max_examples=EXAMPLES, deadline=None)
@given(conversations)
def test_a_conversation(steps: list[list[bytes]]) -> None:
    play(steps)


@settings(max_examples=EXAMPLES, deadline=None)
@given(conversations_apart)
def test_who_shares_no_keys_is_told_the_same_as_alone(steps: list[list[bytes]]) -> None:
    play_apart(steps)


def read(path: Path) -> list[list[bytes]]:
    """One step a line, its words quoted as in an inline request."""
    return list(map(split_inline, path.read_bytes().splitlines()))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_of_conversations(path: Path) -> None:
    steps = read(path)
    play(list(map(spelled_out, steps)))
    play_apart(steps)


def test_nothing_outlives_its_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    held: weakref.WeakSet[object] = weakref.WeakSet()
    begin = Session.__attrs_post_init__

    def remember(session: Session) -> None:
        held.add(session)
        held.add(session.server.database.engine)
        begin(session)

    monkeypatch.setattr(Session, "__attrs_post_init__", remember)
    for path in CORPUS:
        play(read(path))
        assert held
    gc.collect()
    assert not list(held)
