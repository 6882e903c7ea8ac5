from __future__ import annotations

from collections.abc import Iterator

import pytest

from engram.commands import meter as meter_module
from engram.commands.meter import Meter
from engram.commands.registry import COMMANDS
from engram.commands.session import Session, Slot
from tests.conftest import House

GET, SET, MGET, EXEC = (COMMANDS[name] for name in (b"get", b"set", b"mget", b"exec"))


class Watch:
    """A clock that a test sets."""

    time = 0

    def __call__(self) -> int:
        return self.time


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch()
    monkeypatch.setattr(meter_module, "_clock", watch)
    return watch  # type: ignore[return-value]


@pytest.fixture
async def session(house: House) -> Session:
    house.connect()
    return house.connections[0].session


def called(meter: Meter, *requests: str) -> None:
    """Notes calls, as who makes them does."""
    for request in requests:
        meter.calls += 1
        meter.latest = request.encode().split()


def counts(session: Session, name: str) -> tuple[int, int, list[int]]:
    """Calls, the time of all of them, and the different times that they took, in steps of 64 ns."""
    usage = session.server.statistics.usage[name]
    return usage.calls, usage.nanoseconds, [up_to for up_to, _ in usage.latencies()]


def slow_calls(session: Session) -> list[tuple[bytes, int]]:
    return [(b" ".join(call.arguments), call.microseconds) for call in session.server.slowlog]


async def test_calls_one_after_the_other_are_counted_together(session: Session, watch: Watch) -> None:
    meter = Meter(session)
    watch.time = 1000
    meter.turn_to(GET)
    called(meter, "GET a", "GET b")
    watch.time = 1200
    called(meter, "GET c", "GET d")
    watch.time = 1400
    assert counts(session, "get") == (0, 0, [])
    meter.turn_to(SET)
    assert counts(session, "get") == (4, 400, [128])
    called(meter, "SET a 1")
    watch.time = 1500
    meter.turn_to(None)
    assert counts(session, "set") == (1, 100, [128])
    watch.time = 9000
    meter.turn_to(GET)
    meter.turn_to(None)
    assert counts(session, "get") == (4, 400, [128])


async def test_calls_are_counted_each_by_itself(session: Session, watch: Watch) -> None:
    meter = Meter(session, each=True)
    meter.turn_to(GET)
    assert meter.timed
    called(meter, "GET a")
    watch.time = 50
    assert meter.lap() == 50
    assert counts(session, "get") == (1, 50, [64])
    called(meter, "GET b", "GET c")
    watch.time = 1050
    assert meter.lap() == 1050
    assert counts(session, "get") == (3, 1050, [64, 512])
    meter.turn_to(None)
    assert counts(session, "get") == (3, 1050, [64, 512])


async def test_what_is_slow_on_average_is_kept(session: Session, watch: Watch) -> None:
    session.server.config.slowlog_log_slower_than = 10
    meter = Meter(session)
    meter.turn_to(GET)
    assert not meter.timed
    called(meter, "GET a", "GET b")
    watch.time = 20_000
    meter.turn_to(SET)
    assert slow_calls(session) == []
    called(meter, "SET a 1", "SET b 1")
    watch.time += 24_000
    meter.turn_to(None)
    assert slow_calls(session) == [(b"SET b 1", 12)]


async def test_where_calls_vary_each_may_be_slow(session: Session, watch: Watch) -> None:
    session.server.config.slowlog_log_slower_than = 10
    meter = Meter(session)
    meter.turn_to(MGET)
    assert meter.timed
    for request, end in (("MGET a", 10_000), ("MGET b", 21_000), ("MGET c", 25_000)):
        called(meter, request)
        watch.time = end
        assert meter.lap() == end
    # All of them took less than that on average.
    meter.turn_to(None)
    assert slow_calls(session) == [(b"MGET b", 11)]
    assert counts(session, "mget")[:2] == (3, 25_000)


@pytest.mark.parametrize("each", [False, True])
async def test_some_commands_are_never_slow(session: Session, watch: Watch, each: bool) -> None:
    session.server.config.slowlog_log_slower_than = 0
    meter = Meter(session, each=each)
    meter.turn_to(EXEC)
    called(meter, "EXEC")
    watch.time = 1_000_000_000
    meter.lap()
    meter.turn_to(None)
    assert slow_calls(session) == []


@pytest.mark.parametrize(("limit", "kept"), [(-1, 0), (0, 1), (1_000_000, 0)])
async def test_the_limit_is_a_setting(session: Session, watch: Watch, limit: int, kept: int) -> None:
    session.server.config.slowlog_log_slower_than = limit
    meter = Meter(session)
    for _ in range(2):
        meter.turn_to(GET)
        called(meter, "GET a")
        watch.time += 5000
        meter.turn_to(None)
    assert len(session.server.slowlog) == 2 * kept


async def test_a_call_is_counted_when_its_reply_is_there(session: Session, watch: Watch) -> None:
    session.server.config.slowlog_log_slower_than = 10
    meter = Meter(session)
    meter.turn_to(GET)
    called(meter, "GET a")
    watch.time = 100
    slot = Slot()
    meter.put_off(slot)
    called(meter, "GET b")
    watch.time = 300
    meter.turn_to(None)
    assert counts(session, "get")[:2] == (1, 300)
    watch.time = 50_100
    slot.fill(b"+OK\r\n")
    assert counts(session, "get")[:2] == (2, 50_300)
    assert slow_calls(session) == [(b"GET a", 50)]
