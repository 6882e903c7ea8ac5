from __future__ import annotations

import pytest

from engram.commands.delivery import Delivery
from engram.commands.meter import Meter
from engram.commands.registry import COMMANDS
from engram.commands.session import Barrier, Pieces, Session, Slot
from engram.commands.states import Event
from engram.errors import CommandError
from engram.operations import SetString
from tests.conftest import House

OK = b"+OK\r\n"


class Outbox:
    """Notes what it is given to send, with the state that it shows."""

    def __init__(self) -> None:
        self.observed_lsn = 0
        self.congested = False
        self.sent: list[tuple[str, bytes | Slot, int]] = []

    async def relieved(self) -> None:
        pass

    def send(self, reply: bytes | Pieces, lsn: int) -> None:
        self._note("now", bytes(reply), lsn)

    def send_soon(self, reply: bytes, lsn: int) -> None:
        self._note("soon", reply, lsn)

    def expect(self, slot: Slot, lsn: int) -> None:
        self._note("later", slot, lsn)

    def _note(self, when: str, reply: bytes | Slot, lsn: int) -> None:
        self.observed_lsn = lsn
        self.sent.append((when, reply, lsn))


class Bench:
    """A delivery of a client that nothing else is asked for."""

    def __init__(self, house: House) -> None:
        house.connect()
        self.session: Session = house.connections[0].session
        self.database = house.database
        self.outbox = Outbox()
        self.meter = Meter(self.session)
        self.meter.turn_to(COMMANDS[b"get"])
        self.delivery = Delivery(self.session, self.outbox, self.meter)

    def take(self, *replies: bytes) -> None:
        """Replies that simply follow those before."""
        self.delivery.batch.replies += replies
        self.delivery.batch.made += sum(map(len, replies))

    def change(self) -> int:
        return self.database.commit(SetString(b"a", b"1"))


@pytest.fixture
async def bench(house: House) -> Bench:
    return Bench(house)


async def test_replies_are_handed_on_together(bench: Bench) -> None:
    bench.change()
    bench.take(b"+1\r\n", b"+2\r\n")
    assert bench.delivery.observed_lsn == 1
    bench.delivery.batch.shows_data = True
    bench.delivery.end(COMMANDS[b"get"])
    assert bench.outbox.sent == [("soon", b"+1\r\n+2\r\n", 1)]
    assert (bench.delivery.batch.replies, bench.delivery.batch.made, bench.session.last_command) == (
        [],
        0,
        "get",
    )
    bench.delivery.end(None)
    assert len(bench.outbox.sent) == 1


async def test_what_shows_no_data_shows_no_change(bench: Bench) -> None:
    bench.change()
    bench.take(b"+PONG\r\n")
    bench.delivery.end(COMMANDS[b"ping"])
    assert bench.outbox.sent == [("soon", b"+PONG\r\n", 0)]


@pytest.mark.parametrize("turn_over", [False, True])
@pytest.mark.parametrize("congested", [False, True])
async def test_others_have_a_turn_or_replies_go_first(bench: Bench, turn_over: bool, congested: bool) -> None:
    bench.outbox.congested = congested
    bench.take(OK)
    wait = bench.delivery.hand_on(turn_over=turn_over)
    assert bench.outbox.sent == [("now", OK, 0)]
    assert bench.delivery.batch.made == 0
    assert (wait is not None) is (turn_over or congested)
    if wait is not None:
        await wait()


async def test_a_long_reply_follows_those_before_it(bench: Bench) -> None:
    bench.take(OK)
    assert bench.delivery.settle(Pieces((b"$1\r\n", b"x", b"\r\n"))) is None
    assert bench.outbox.sent == [("now", OK, 0), ("now", b"$1\r\nx\r\n", 0)]
    bench.outbox.congested = True
    assert bench.delivery.settle(Pieces((OK,))) is not None


async def test_a_place_is_kept_for_a_reply_and_its_call_counted_later(bench: Bench) -> None:
    bench.take(OK)
    bench.meter.calls = 2
    slot = Slot()
    assert bench.delivery.settle(slot) is None
    assert bench.outbox.sent == [("now", OK, 0), ("later", slot, 0)]
    assert bench.meter.calls == 1
    usage = bench.session.server.statistics.usage["get"]
    slot.fill(OK)
    assert usage.calls == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_a_barrier_is_waited_for(bench: Bench, fails: bool) -> None:
    async def reply() -> bytes:
        if fails:
            raise CommandError("ERR no")
        return OK

    bench.meter.calls = 1
    wait = bench.delivery.settle(Barrier(reply))
    assert wait is not None
    assert bench.meter.calls == 0
    bench.change()
    await wait()
    assert bench.outbox.sent == [("now", b"-ERR no\r\n" if fails else OK, 1)]
    usage = bench.session.server.statistics.usage["get"]
    assert (usage.calls, usage.failed) == (1, int(fails))


@pytest.mark.parametrize("name", [b"get", b"set", b"exec"])
async def test_an_error_of_ours_behind_a_barrier(bench: Bench, name: bytes) -> None:
    async def reply() -> bytes:
        raise ZeroDivisionError

    bench.meter.turn_to(COMMANDS[name])
    wait = bench.delivery.settle(Barrier(reply))
    assert wait is not None
    if name == b"get":
        await wait()
        assert bench.outbox.sent == [("now", b"-ERR internal error, see the log of the server\r\n", 0)]
    else:
        # It may have changed something.
        with pytest.raises(ZeroDivisionError):
            await wait()


async def test_replies_that_nobody_wants(bench: Bench) -> None:
    bench.session.happen(Event.REPLY_SKIP)
    bench.change()
    assert bench.delivery.settle(OK) is None
    slot = Slot()
    assert bench.delivery.settle(slot) is None
    assert not slot.awaited
    assert bench.session.reply_mode.name == "ON"
    bench.session.happen(Event.REPLY_OFF)

    async def reply() -> bytes:
        return OK

    wait = bench.delivery.settle(Barrier(reply))
    assert wait is not None
    await wait()
    assert bench.session.reply_mode.name == "OFF"
    assert bench.outbox.sent == []
    # A search shows what they would have shown.
    assert bench.outbox.observed_lsn == 1


async def test_the_last_reply_of_a_client_that_leaves(bench: Bench) -> None:
    assert not bench.delivery.over
    bench.session.leave()
    assert bench.delivery.settle(OK) is None
    assert bench.delivery.over
    bench.delivery.end(None)
    assert bench.outbox.sent == [("soon", OK, 0)]


async def test_what_is_no_reply_follows_those_before_it(bench: Bench) -> None:
    bench.delivery.push(b"+1\r\n")
    bench.take(OK)
    bench.delivery.push(b"+2\r\n")
    bench.delivery.release()
    bench.delivery.release()
    assert bench.outbox.sent == [("now", b"+1\r\n", 0), ("now", OK + b"+2\r\n", 0)]


async def test_a_call_that_failed_behind_its_change_is_not_answered(bench: Bench) -> None:
    with pytest.raises(ZeroDivisionError):
        bench.delivery.half_done(ZeroDivisionError())
