"""What operators ask is answered as Redis 8 answers it, errors included, wherever there is one answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.compat.differential.peers import Pair, redis8_command, running_pair
from tests.compat.differential.wire import Reply, WireClient

REQUESTS = """
CLIENT NO-EVICT
CLIENT NO-EVICT on
CLIENT NO-EVICT foo
CLIENT NO-TOUCH on
CLIENT NO-TOUCH foo
CLIENT PAUSE
CLIENT PAUSE abc
CLIENT PAUSE -1
CLIENT PAUSE 1 FOO
CLIENT PAUSE 1 WRITE
CLIENT PAUSE 1 ALL
CLIENT PAUSE 1 ALL x
CLIENT PAUSE 99999999999999999999
CLIENT PAUSE 9223372036854775807
CLIENT UNPAUSE
CLIENT UNPAUSE x
CLIENT UNBLOCK
CLIENT UNBLOCK a
CLIENT UNBLOCK 1
CLIENT UNBLOCK 1 TIMEOUT
CLIENT UNBLOCK 1 FOO
CLIENT UNBLOCK -5
CLIENT GETREDIR
CLIENT TRACKINGINFO
CLIENT TRACKING
CLIENT TRACKING off
CLIENT TRACKING foo
CLIENT CACHING yes
CLIENT LIST TYPE
CLIENT LIST TYPE foo
CLIENT LIST ID
CLIENT LIST ID a
CLIENT LIST ID 0
CLIENT LIST TYPE normal ID 1
CLIENT KILL TYPE
CLIENT KILL ID 99 ID 98
CLIENT KILL ID 1 2
CLIENT KILL MAXAGE 99999999999999999999
CLIENT KILL MAXAGE -1
CLIENT KILL ID 99999999999999999999
CLIENT KILL USER default ID 444
CLIENT KILL USER nosuch ID 5
CLIENT KILL SKIPME foo
CLIENT KILL foo bar
CLIENT HELP
MONITOR x
SLOWLOG
SLOWLOG FOO
SLOWLOG GET a
SLOWLOG GET -2
SLOWLOG GET 1 2
SLOWLOG LEN x
SLOWLOG RESET
SLOWLOG HELP
LATENCY
LATENCY FOO
LATENCY LATEST
LATENCY HISTORY
LATENCY HISTORY foo
LATENCY RESET
LATENCY RESET foo
LATENCY GRAPH foo
LATENCY HISTOGRAM nosuch
LATENCY HELP
CONFIG
CONFIG GET
CONFIG GET slowlog-max-len SLOWLOG-MAX-LE[N]
CONFIG SET maxclients
CONFIG SET maxclients 100 maxclients 200
CONFIG SET maxclients abc
CONFIG SET maxclients 100 nosuch 1
CONFIG SET nosuch 1 maxclients 100
CONFIG SET maxclients 100 slowlog-max-len -1
CONFIG SET maxclients 300 slowlog-max-len 100 save
CONFIG SET maxclients 300 slowlog-max-len 100
CONFIG GET maxclients
CONFIG SET appendfsync foo
CONFIG SET slowlog-log-slower-than -5
CONFIG SET slowlog-max-len 1k
CONFIG SET maxmemory 1x
CONFIG SET databases 3
CONFIG SET loglevel foo
CONFIG SET logfile foo
CONFIG REWRITE
CONFIG REWRITE x
CONFIG RESETSTAT x
CONFIG HELP
WAITAOF
WAITAOF 0 0 0
WAITAOF 1 0 0
WAITAOF 2 0 0
WAITAOF a 0 0
WAITAOF 0 a 0
WAITAOF 0 -1 0
WAITAOF 0 0 a
WAITAOF 0 0 -1
WAITAOF 0 1 10
WAIT 0 0
WAIT 1 10
WAIT a 0
WAIT 0 -1
WAIT 1 9223372036854775807
WAITAOF 0 1 9223372036854775807
WAIT 0 a
DEBUG
DEBUG SLEEP 0
LOLWUT VERSION a
ROLE x
BGSAVE FOO
COMMAND FOO
COMMAND GETKEYS foo
COMMAND GETKEYS get
COMMAND GETKEYS mset a b c d
COMMAND GETKEYS ping
COMMAND GETKEYS client
COMMAND GETKEYS client foo
COMMAND GETKEYSANDFLAGS get a
COMMAND GETKEYSANDFLAGS ping
COMMAND LIST FILTERBY foo bar
INFO nosuch
SHUTDOWN foo
SHUTDOWN ABORT
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    command = redis8_command()
    if command is None:
        pytest.skip("no Redis 8 to compare with (set REDIS8 to the command that runs one)")
    with running_pair(command) as pair:
        yield pair


@pytest.fixture
def clients(pair: Pair) -> Iterator[tuple[WireClient, WireClient]]:
    """A client of each."""
    found = pair.redis.connect(), pair.engram.connect()
    yield found
    for client in found:
        client.close()


@pytest.mark.parametrize("version", [b"2", b"3"])
def test_replies(clients: tuple[WireClient, WireClient], version: bytes) -> None:
    redis, engram = clients
    for client in (redis, engram):
        client.call(b"HELLO", version)
    different = []
    for line in REQUESTS.strip().splitlines():
        words = line.encode().split()
        answers: tuple[Reply, Reply] = redis.call(*words), engram.call(*words)
        if answers[0] != answers[1]:
            different.append((line, *map(str, answers)))
    assert different == []


def test_what_a_monitor_sees(pair: Pair) -> None:
    seen = []
    for peer in pair.both:
        watching, client = peer.connect(), peer.connect()
        watching.call(b"MONITOR")
        for words in (
            (b"SET", b"k\x00\xff", b'a"b\\c\n\r\t\a\b\x1b\x7f'),
            (b"auth", b"x"),
            (b"auth", b"a", b"b"),
            (b"hello", b"3", b"auth", b"u", b"p", b"setname", b"x"),
            (b"config", b"get", b"port"),
            (b"get",),
            (b"nosuch", b"x"),
            (b"client", b"id"),
            (b"multi",),
        ):
            client.call(*words)
        lines = [re.sub(r"\d+\.\d{6} \[0 [\d.]+:\d+\]", "", str(watching.reply())) for _ in range(6)]
        seen.append(lines)
        watching.close()
        client.close()
    assert seen[0] == seen[1]


def test_sections_of_info(clients: tuple[WireClient, WireClient]) -> None:
    own = {b"# Vectors"}
    absent = {b"# Threads", b"# Modules", b"# Keysizes", b"# Hotkeys"}
    for sections in ((), (b"default",), (b"all",), (b"everything",), (b"cpu", b"server"), (b"commandstats",)):
        titles = [
            [line for line in client.call(b"INFO", *sections).text.split(b"\r\n") if line.startswith(b"#")]
            for client in clients
        ]
        assert [each for each in titles[0] if each not in absent] == [
            each for each in titles[1] if each not in own
        ]
