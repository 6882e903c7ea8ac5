from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
import trio.testing

from engram.monitors import Monitors
from engram.protocol.inline import quoted
from engram.slowlog import SlowLog, redacted
from tests.conftest import House


@attrs.define(eq=False)
class Watching:
    """A client that watches, and reads nothing while `held` is what its buffer holds."""

    address: str = "127.0.0.1:1"
    database_number: int = 0
    name: str = ""
    held: int = 0
    closed: bool = False
    lines: list[bytes] = attrs.field(factory=list)

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True

    def buffered(self) -> tuple[int, int]:
        return 0, self.held


def _never(job: Callable[[], Awaitable[None]]) -> None:
    raise AssertionError("a task has been started")


def test_a_line_is_as_redis_writes_it() -> None:
    monitors = Monitors(lambda: 1000, _never, now=lambda: 1_795_392_261_510_101_999)
    watching = Watching()
    monitors.add(watching)
    monitors.feed(Watching("127.0.0.1:53724"), [b"SET", b"k\x00\xff\xc3\xa9", b'a"b\\c\n\r\t\a\b\x1b\x7f'])
    assert watching.lines == [
        b'+1795392261.510101 [0 127.0.0.1:53724] "SET" "k\\x00\\xff\\xc3\\xa9"'
        b' "a\\"b\\\\c\\n\\r\\t\\a\\b\\x1b\\x7f"\r\n'
    ]


def test_an_address_may_be_a_socket_of_unix() -> None:
    monitors = Monitors(lambda: 1000, _never, now=lambda: 0)
    watching = Watching()
    monitors.add(watching)
    monitors.feed(Watching("/run/engram.sock:0"), [b"PING"])
    assert watching.lines == [b'+0.000000 [0 unix:/run/engram.sock] "PING"\r\n']


def test_who_does_not_read_is_dropped_alone() -> None:
    monitors = Monitors(lambda: 1000, _never, now=lambda: 0)
    slow, quick = Watching(held=990), Watching()
    monitors.add(slow)
    monitors.add(quick)
    monitors.feed(Watching(), [b"PING"])
    assert slow.closed
    assert not slow.lines
    assert slow not in monitors
    assert len(quick.lines) == len(monitors) == 1


def test_who_does_not_read_is_dropped_though_clients_have_no_limit() -> None:
    monitors = Monitors(lambda: 1 << 50, _never, now=lambda: 0)
    slow = Watching(held=64 << 20)
    monitors.add(slow)
    monitors.feed(Watching(), [b"PING"])
    assert slow.closed


# It takes several turns of the loop to be quoted.
LONG = [b"SET", b"a", bytes(1 << 20)]

Jobs = list[Callable[[], Awaitable[None]]]


async def test_quoting_what_is_long_lets_others_go_on() -> None:
    jobs: Jobs = []
    monitors, watching = Monitors(lambda: 8 << 20, jobs.append), Watching()
    monitors.add(watching)
    for request in (LONG, [b"PING"], LONG):
        monitors.feed(Watching(), request)
    (job,) = jobs
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        assert not watching.lines
        await job()
        nursery.cancel_scope.cancel()
    assert turns >= 2
    shown = b"".join(watching.lines).splitlines()
    long = b'"SET" "a" "%b"' % (b"\\x00" * (1 << 20))
    assert [line.partition(b"] ")[2] for line in shown] == [long, b'"PING"', long]
    monitors.feed(Watching(), [b"PING"])
    assert watching.lines[-1].endswith(b'"PING"\r\n')


@pytest.mark.parametrize("length", [0, 1, 200_000])
async def test_what_is_quoted_bit_by_bit_is_as_it_were_at_once(length: int) -> None:
    jobs: Jobs = []
    monitors, watching = Monitors(lambda: 32 << 20, jobs.append), Watching()
    monitors.add(watching)
    request = [
        b"MSET",
        *[bytes(range(256)) * (length // 256) + b"x" * (length % 256), b""] * (3 if length > 1 else 5000),
    ]
    monitors.feed(Watching(), request)
    await jobs.pop()()
    assert b"".join(watching.lines).partition(b"] ")[2] == b" ".join(map(quoted, request)) + b"\r\n"


async def test_what_waits_to_be_quoted_is_shown_to_those_that_watched_and_still_do() -> None:
    jobs: Jobs = []
    monitors, stays, leaves, late = Monitors(lambda: 8 << 20, jobs.append), Watching(), Watching(), Watching()
    monitors.add(stays)
    monitors.add(leaves)
    monitors.feed(Watching(), LONG)
    monitors.add(late)
    monitors.feed(Watching(), [b"PING"])
    monitors.remove(leaves)
    await jobs.pop()()
    assert b"".join(stays.lines).count(b"\r\n") == 2
    assert b"".join(late.lines).count(b"\r\n") == 1
    assert not leaves.lines


async def test_nothing_is_quoted_for_nobody() -> None:
    jobs: Jobs = []
    monitors, leaves = Monitors(lambda: 1 << 50, jobs.append), Watching()
    monitors.add(leaves)
    monitors.feed(Watching(), [b"SET", b"a", bytes(64 << 20)])
    assert leaves.closed
    assert not jobs
    monitors.add(leaves)
    monitors.feed(Watching(), LONG)
    monitors.remove(leaves)
    await jobs.pop()()
    assert not leaves.lines


async def test_too_much_that_waits_to_be_quoted_drops_who_watches() -> None:
    jobs: Jobs = []
    monitors, watching = Monitors(lambda: 5 << 20, jobs.append), Watching()
    monitors.add(watching)
    for _ in range(4):
        monitors.feed(Watching(), LONG)
    assert not watching.closed
    monitors.feed(Watching(), LONG)
    assert watching.closed
    await jobs.pop()()
    assert not watching.lines


async def test_who_misses_a_line_for_want_of_memory_is_dropped() -> None:
    jobs: Jobs = []

    class Full(Watching):
        def push(self, line: bytes) -> None:
            raise MemoryError

    monitors, watching = Monitors(lambda: 8 << 20, jobs.append), Full()
    monitors.add(watching)
    monitors.feed(Watching(), LONG)
    with pytest.raises(MemoryError):
        await jobs.pop()()
    assert watching.closed
    assert len(monitors) == 0


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        ("auth x", "auth (redacted)"),
        ("AUTH a b", "AUTH (redacted) (redacted)"),
        ("hello 3 auth u p setname x", "hello 3 auth (redacted) (redacted) setname x"),
        ("hello 3 setname auth", "hello 3 setname auth"),
        ("acl setuser bob on >pw", "acl setuser (redacted) (redacted) (redacted)"),
        ("acl getuser bob", "acl getuser (redacted)"),
        ("acl whoami", "acl whoami"),
        ("config set RequirePass pw maxclients 4", "config set RequirePass (redacted) maxclients 4"),
        ("config get requirepass", "config get requirepass"),
        ("set auth x", "set auth x"),
    ],
)
def test_passwords_are_not_shown(request_: str, shown: str) -> None:
    assert redacted(request_.encode().split()) == shown.encode().split()


def test_every_byte_is_shown_in_print() -> None:
    assert quoted(bytes(range(256))).isascii()
    assert quoted(b"") == b'""'


@pytest.mark.parametrize("length", [1, 47, 48, 49, 1000])
def test_a_long_argument_is_shown_as_its_bytes_are(length: int) -> None:
    argument = (bytes(range(256)) * 4)[:length]
    assert quoted(argument) == b'"%b"' % b"".join(quoted(bytes((byte,)))[1:-1] for byte in argument)


def test_slow_calls_are_kept_short() -> None:
    slowlog = SlowLog(lambda: 2, now=lambda: 17.9)
    slowlog.add(Watching(name="me"), [b"mset", *[b"x" * 150] * 50], 14_999)
    slowlog.add(Watching(), [b"AUTH", b"secret"], 1000)
    newest, oldest = slowlog
    assert newest.arguments == [b"AUTH", b"(redacted)"]
    assert (oldest.id, oldest.time, oldest.microseconds, oldest.name) == (0, 17, 14, "me")
    assert len(oldest.arguments) == 32
    assert oldest.arguments[1] == b"x" * 128 + b"... (22 more bytes)"
    assert oldest.arguments[31] == b"... (20 more arguments)"
    slowlog.add(Watching(), [b"GET", b"a"], 1000)
    assert [call.id for call in slowlog] == [2, 1]
    slowlog.clear()
    slowlog.add(Watching(), [b"GET", b"a"], 1000)
    assert [call.id for call in slowlog] == [3]


async def test_monitor_shows_what_others_do(house: House) -> None:
    watching, client = house.connect(), house.connect()
    assert await watching.call("MONITOR") == b"+OK\r\n"
    for request in ("SET a 1", "CONFIG GET port", "GET", "AUTH x", "CLIENT ID", "NOSUCH"):
        await client.call(request)
    await client.call("MULTI")
    await client.call("SET a b")
    await client.call("EXEC")
    lines = (await watching.arrived()).decode().splitlines()
    assert all(re.match(r"\+\d+\.\d{6} \[0 127\.0\.0\.1:1001\] ", line) for line in lines)
    assert [line.partition("] ")[2] for line in lines] == [
        '"SET" "a" "1"',
        '"AUTH" "(redacted)"',
        '"CLIENT" "ID"',
        '"MULTI"',
        '"SET" "a" "b"',
        '"EXEC"',
    ]


async def test_monitor_shows_an_exec_that_carries_nothing_out(house: House) -> None:
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    for request in ("EXEC", "MULTI", "NOSUCH", "EXEC", "WATCH a", "SET a 1", "MULTI", "GET a", "EXEC"):
        await client.call(request)
    lines = (await watching.arrived()).decode().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        *('"EXEC"', '"MULTI"', '"EXEC"', '"WATCH" "a"', '"SET" "a" "1"', '"MULTI"', '"EXEC"')
    ]


async def test_a_client_sees_its_own_requests_before_their_replies(house: House) -> None:
    client = house.connect()
    await client.send("HELLO 3", "MONITOR", "PING", "PING")
    arrived = (await client.arrived()).decode()
    assert re.search(
        r'\+OK\r\n\+\S+ \[0 \S+\] "PING"\r\n\+PONG\r\n\+\S+ \[0 \S+\] "PING"\r\n\+PONG\r\n$', arrived
    )


async def test_reset_ends_it(house: House) -> None:
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    assert house.server.guarded
    await watching.send("RESET")
    assert re.fullmatch(rb'\+\S+ \[0 \S+\] "RESET"\r\n\+RESET\r\n', await watching.arrived())
    await client.call("PING")
    assert await watching.arrived() == b""
    assert not house.server.guarded


async def test_one_that_leaves_is_forgotten(house: House) -> None:
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    assert await client.call("CLIENT KILL ID 1") == b":1\r\n"
    await watching.ended()
    await trio.testing.wait_all_tasks_blocked()
    assert len(house.server.monitors) == 0
    assert not house.server.guarded


async def test_one_that_does_not_read_holds_nobody_up(house: House) -> None:
    house.server.config.client_output_buffer_limit = 1 << 16
    streams = trio.testing.lockstep_stream_pair()
    watching, client = house.connect(streams=streams, reads=False), house.connect()
    await watching.send("MONITOR")
    for _ in range(80):
        assert await client.call([b"SET", b"a", bytes(1000)]) == b"+OK\r\n"
    await trio.testing.wait_all_tasks_blocked()
    assert len(house.server.monitors) == 0
    assert 1 not in house.server.sessions


async def test_what_takes_long_to_be_quoted_is_shown_in_order(house: House) -> None:
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    long, many = bytes(range(256)) * 1024, [b"k%d" % number for number in range(5000)]
    requests = [[b"SET", b"a", b"0"], [b"SET", b"a", long], [b"SET", b"b", b""], [b"MGET", *many], [b"PING"]]
    await client.send(*requests)
    shown = (await watching.arrived()).splitlines()
    assert [line.partition(b"] ")[2] for line in shown] == [
        b" ".join(map(quoted, request)) for request in requests
    ]


async def test_a_line_above_the_limit_is_not_quoted(house: House) -> None:
    house.server.config.client_output_buffer_limit = 1 << 20
    watching, client = house.connect(), house.connect()
    await watching.call("MONITOR")
    assert await client.call([b"SET", b"a", b"x" * (1 << 20)]) == b"+OK\r\n"
    assert len(house.server.monitors) == 0
    await watching.ended()


async def test_not_in_a_transaction(house: House) -> None:
    client = house.connect()
    await client.call("MULTI")
    assert await client.call("MONITOR") == b"+QUEUED\r\n"
    assert await client.call("EXEC") == b"*1\r\n-ERR MONITOR isn't allowed for DENY BLOCKING client\r\n"
