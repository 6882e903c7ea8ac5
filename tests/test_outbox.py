from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from engram.commands.allowance import HeldReplies
from engram.commands.session import Pieces, Slot
from engram.config import Config
from engram.operations import Flush
from engram.outbox import Outbox
from engram.rounds import Rounds
from engram.statistics import Statistics
from tests.conftest import House, ManualJournal, OpenHouse


class Pipe:
    """A transport that takes `room` bytes at once, and the rest when `drain` lets it."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.taken = bytearray()
        self.sends = 0
        self.gone = False
        self._more = trio.lowlevel.ParkingLot()

    def drain(self, room: int) -> None:
        self.room += room
        self._more.unpark_all()

    async def deliver(self, take: Callable[[bytes], bool]) -> None: ...

    def send_now(self, data: bytes | memoryview) -> int:
        if self.gone:
            raise BrokenPipeError
        self.sends += 1
        sent = min(self.room, len(data))
        self.taken += data[:sent]
        self.room -= sent
        return sent

    async def send_all(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.send_now(rest) :]
            if rest:
                await self._more.park()

    def hang_up(self) -> None: ...

    async def close(self) -> None: ...


@attrs.define
class Bench:
    """An outbox, where it sends to, and whether it has ended its client."""

    outbox: Outbox
    pipe: Pipe
    journal: ManualJournal
    aborted: list[bool]


@pytest.fixture
async def house(open_house: OpenHouse) -> AsyncIterator[House]:
    config = Config(client_output_buffer_limit=1000, client_write_timeout=7)
    async with open_house(ManualJournal(), config=config) as opened:
        yield opened


@pytest.fixture
def bench(house: House) -> Bench:
    return make_bench(house)


def make_bench(house: House) -> Bench:
    journal = house.database.journal
    assert isinstance(journal, ManualJournal)
    pipe, aborted = Pipe(), []
    outbox = Outbox(
        pipe,
        house.server,
        "client:1",
        start_writer=lambda: house.nursery.start_soon(outbox.write),
        abort=lambda: aborted.append(True),
    )
    return Bench(outbox, pipe, journal, aborted)


async def test_what_shows_durable_state_leaves_at_once(bench: Bench) -> None:
    bench.journal.durable = 5
    bench.outbox.send(b"a", 4)
    bench.outbox.send(b"b", 5)
    assert bench.pipe.taken == b"ab"
    assert bench.outbox.size == 0


async def test_what_waits_leaves_in_one_send(bench: Bench) -> None:
    slot = Slot()
    bench.outbox.send(b"a", 1)
    bench.outbox.expect(slot, 2)
    bench.outbox.send(b"c", 2)
    slot.fill(b"b")
    assert bench.pipe.sends == 0
    assert bench.outbox.size == 3
    bench.journal.release(2)
    assert bench.pipe.taken == b"abc"
    assert bench.pipe.sends == 1
    assert bench.outbox.size == 0


async def test_what_comes_later_never_overtakes(bench: Bench) -> None:
    slot = Slot()
    bench.outbox.expect(slot, 0)
    bench.outbox.send(b"b", 0)
    bench.outbox.send_soon(b"c", 0)
    assert bench.pipe.taken == b""
    slot.fill(b"a")
    assert bench.pipe.taken == b"abc"


async def test_the_rest_follows_when_the_socket_takes_it(bench: Bench) -> None:
    bench.pipe.room = 3
    bench.outbox.send(b"abcdef", 0)
    bench.outbox.send(b"ghi", 0)
    assert bench.pipe.taken == b"abc"
    assert bench.outbox.size == 6
    await wait_all_tasks_blocked()
    bench.pipe.drain(4)
    await wait_all_tasks_blocked()
    assert bench.pipe.taken == b"abcdefg"
    bench.pipe.drain(100)
    await bench.outbox.drained()
    assert bench.pipe.taken == b"abcdefghi"
    assert bench.outbox.size == 0
    bench.outbox.send(b"j", 0)
    assert bench.pipe.taken == b"abcdefghij"


async def test_a_client_that_takes_nothing_in_time_is_ended(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bench.pipe.room = 0
    bench.outbox.send(b"x" * 1001, 0)
    assert bench.outbox.congested
    began = trio.current_time()
    await bench.outbox.relieved()
    assert trio.current_time() - began == pytest.approx(7)
    assert bench.aborted
    assert bench.outbox.size == 0
    assert caplog.messages == ["client client:1 dropped: it took no reply for 7 s"]


async def test_a_client_that_takes_a_little_now_and_then_is_kept(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.pipe.room = 0
    size = 2_000_000
    bench.outbox.send(b"x" * size, 0)
    for _ in range(16):
        await trio.sleep(6)
        bench.pipe.drain(256 << 10)
    await bench.outbox.drained()
    assert bench.pipe.taken == b"x" * size
    assert not bench.aborted


async def test_a_client_below_the_limit_is_not_hurried(bench: Bench, autojump_clock: MockClock) -> None:
    bench.pipe.room = 0
    bench.outbox.send(b"x" * 1000, 0)
    assert not bench.outbox.congested
    await trio.sleep(1000)
    assert not bench.aborted
    bench.pipe.drain(1000)
    await bench.outbox.drained()
    assert bench.pipe.taken == b"x" * 1000


async def test_a_client_that_is_hurried_is_ended_unless_it_takes_something(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.outbox.hurry()
    bench.pipe.room = 0
    bench.outbox._server.config.client_output_buffer_limit = 1 << 30
    bench.outbox.send(b"x" * 1_000_000, 0)
    await trio.sleep(1000)
    bench.outbox.hurry()
    await trio.sleep(6)
    bench.pipe.drain(256 << 10)
    await trio.sleep(1000)
    assert not bench.aborted
    bench.outbox.hurry()
    await trio.sleep(6)
    bench.outbox.hurry()
    assert not bench.aborted
    await trio.sleep(2)
    assert bench.aborted
    assert bench.outbox._held.waiting == 0


async def test_what_is_known_counts_as_it_is(bench: Bench) -> None:
    """Not as what was thought of it."""
    held = bench.outbox._held
    first, second, third = Slot(3 << 20), Slot(), Slot()
    for slot in (first, second, third):
        bench.outbox.expect(slot, 0)
    assert (bench.outbox.size, held.waiting, bench.outbox.congested) == (0, 0, False)
    second.fill(bytes(5 << 20))
    assert (bench.outbox.size, held.waiting, bench.outbox.congested) == (5 << 20, 5 << 20, True)
    first.fill(b"a")
    assert (bench.outbox.size, held.waiting, bench.outbox.congested) == (0, 0, False)
    third.fill(b"c")
    assert bench.pipe.taken == b"a" + bytes(5 << 20) + b"c"
    assert (bench.outbox.size, held.waiting) == (0, 0)


async def test_a_reply_that_has_been_sent_is_let_go(bench: Bench) -> None:
    """At once, and not when the garbage collector comes."""
    slot = Slot()
    bench.outbox.expect(slot, 0)
    slot.fill(b"a")
    assert bench.pipe.taken == b"a"
    assert gc.get_referrers(slot) == []


@pytest.mark.parametrize("cause", ["slot", "log", "round"])
async def test_an_error_on_the_way_ends_this_client_alone(bench: Bench, cause: str) -> None:
    """Whoever moves replies along, a thread or the log, is none the worse for it."""
    bench.outbox._transport = Failing()
    if cause == "slot":
        slot = Slot()
        bench.outbox.expect(slot, 0)
        slot.fill(b"a")
    elif cause == "log":
        bench.outbox.send(b"a", 1)
        bench.journal.records.append((1, Flush()))
        bench.journal.release(1)
    else:
        bench.outbox._rounds.under_way = True
        bench.outbox.send_soon(b"a", 0)
        bench.outbox._rounds._end_part()
    assert bench.aborted == [True]
    assert (bench.outbox.size, bench.outbox._held.waiting) == (0, 0)


class Failing(Pipe):
    """A transport that has no memory to send anything."""

    def send_now(self, data: bytes | memoryview) -> int:
        raise MemoryError


async def test_a_peer_that_has_gone_ends_the_client(bench: Bench) -> None:
    bench.pipe.gone = True
    bench.outbox.send(b"a", 0)
    assert bench.aborted == [True]
    await bench.outbox.drained()
    bench.outbox.send(b"b", 0)
    assert bench.pipe.taken == b""


async def test_a_peer_that_goes_while_more_is_sent_ends_the_client(bench: Bench) -> None:
    bench.pipe.room = 1
    bench.outbox.send(b"abc", 0)
    await wait_all_tasks_blocked()
    bench.pipe.gone = True
    bench.pipe.drain(1)
    await bench.outbox.drained()
    assert bench.aborted
    assert bench.outbox.size == 0


async def test_a_slot_filled_after_the_client_has_gone(bench: Bench) -> None:
    slot = Slot()
    bench.outbox.expect(slot, 0)
    bench.outbox.discard()
    slot.fill(b"a")
    assert bench.pipe.taken == b""


@pytest.mark.parametrize("count", [1024, 1025])
async def test_many_replies_that_wait_congest(bench: Bench, count: int) -> None:
    for _ in range(count):
        bench.outbox.expect(Slot(), 0)
    assert bench.outbox.congested == (count > 1024)


async def test_replies_that_will_be_large_congest_before_they_are_known(bench: Bench) -> None:
    slots = [Slot(1 << 20) for _ in range(5)]
    for slot in slots[:4]:
        bench.outbox.expect(slot, 0)
    assert not bench.outbox.congested
    bench.outbox.expect(slots[4], 0)
    assert bench.outbox.congested
    slots[0].fill(b"a")
    assert not bench.outbox.congested
    for slot in slots[1:]:
        slot.fill(b"b")
    assert bench.outbox.size == 0
    assert bench.pipe.taken == b"abbbb"


class HeldRounds(Rounds):
    """Rounds whose end is when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = True
        self.departing: list[Callable[[], None]] = []

    def at_end(self, depart: Callable[[], None]) -> None:
        self.departing.append(depart)

    def end(self) -> None:
        while self.departing:
            self.departing.pop()()


async def test_replies_put_off_leave_with_what_comes_first(house: House) -> None:
    rounds = house.server.rounds = HeldRounds()
    bench = make_bench(house)
    bench.outbox.send_soon(b"a", 0)
    bench.outbox.send_soon(b"b", 0)
    assert bench.pipe.sends == 0
    bench.outbox.send(b"c", 0)
    assert bench.pipe.taken == b"abc"
    bench.outbox.send_soon(b"d", 0)
    assert bench.pipe.taken == b"abc"
    rounds.end()
    assert bench.pipe.taken == b"abcd"
    assert bench.pipe.sends == 2


async def test_nothing_is_put_off_between_rounds(bench: Bench) -> None:
    assert not bench.outbox.size
    bench.outbox.send_soon(b"a", 0)
    assert bench.pipe.taken == b"a"


class SimpleServer:
    """As much of a server as an outbox sees."""

    def __init__(self, journal: ManualJournal) -> None:
        self.journal = journal
        self.database = self
        self.config = Config()
        self.statistics = Statistics()
        self.rounds = HeldRounds()
        self.held_replies = HeldReplies(self.config)


# Replies are numbered; an action sends the next one or moves the log, the slots or the socket on.
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["send", "soon", "slot", "fill", "release", "drain"]), st.integers(0, 50)),
    max_size=60,
)


@given(ACTIONS, st.booleans())
def test_replies_are_whole_in_order_and_never_early(actions: list[tuple[str, int]], in_round: bool) -> None:
    async def main() -> None:
        journal, pipe = ManualJournal(), Pipe(0)
        async with trio.open_nursery() as nursery:
            server = SimpleServer(journal)
            server.rounds.under_way = in_round
            outbox = Outbox(
                pipe,
                server,  # type: ignore[arg-type]
                "client:1",
                start_writer=lambda: nursery.start_soon(outbox.write),
                abort=lambda: None,
            )
            expected: list[tuple[bytes, int]] = []
            slots: list[tuple[Slot, bytes]] = []
            lsn = 0
            for word, number in actions:
                body = b"<%d:%d>" % (len(expected), lsn)
                match word:
                    case "send" | "soon":
                        lsn += number % 2
                        expected.append((body, lsn))
                        (outbox.send if word == "send" else outbox.send_soon)(body, lsn)
                    case "slot":
                        slots.append((Slot(), body))
                        expected.append((body, lsn))
                        outbox.expect(slots[-1][0], lsn)
                    case "fill" if slots:
                        slot, body = slots.pop(number % len(slots))
                        slot.fill(body)
                    case "release":
                        journal.release(min(lsn, journal.durable + number))
                    case "drain":
                        pipe.drain(number)
                await trio.lowlevel.checkpoint()
                allowed = b"".join(body for body, at in expected if at <= journal.durable)
                assert allowed.startswith(pipe.taken)
            for slot, body in slots:
                slot.fill(body)
            journal.release(lsn)
            server.rounds.end()
            pipe.drain(1 << 20)
            await outbox.drained()
            assert pipe.taken == b"".join(body for body, _ in expected)
            assert outbox.size == 0

    trio.run(main)


async def test_next_to_nothing_waits_for_who_has_yet_to_authenticate(house: House, bench: Bench) -> None:
    house.server.config.client_output_buffer_limit = 1 << 20
    bench.pipe.room = 0
    bench.outbox.send(b"x" * 1025, 0)
    assert not bench.outbox.congested
    bench.outbox.authenticated = False
    assert bench.outbox.congested
    bench.pipe.drain(1)
    await wait_all_tasks_blocked()


async def test_who_has_yet_to_authenticate_and_does_not_read_is_ended(
    house: House, bench: Bench, autojump_clock: MockClock
) -> None:
    house.server.config.client_output_buffer_limit = 1 << 20
    bench.outbox.authenticated = False
    bench.pipe.room = 0
    bench.outbox.send(b"x" * 1025, 0)
    await bench.outbox.relieved()
    assert trio.current_time() >= 7
    assert bench.aborted


async def test_what_waits_for_others_than_the_client_is_told(bench: Bench) -> None:
    slot = Slot()
    bench.pipe.room = 0
    bench.outbox.send(b"a", 0)
    assert not bench.outbox.awaiting
    bench.outbox.expect(slot, 0)
    assert bench.outbox.awaiting
    slot.fill(b"b")
    assert not bench.outbox.awaiting


async def test_a_client_that_reads_late_is_seen_to_read(house: House) -> None:
    written: list[float] = []
    pipe = Pipe(3)
    outbox = Outbox(
        pipe,
        house.server,
        "client:1",
        start_writer=lambda: house.nursery.start_soon(outbox.write),
        abort=lambda: None,
        written=lambda: written.append(trio.current_time()),
    )
    outbox.send(b"abc", 0)
    assert written == []
    outbox.send(b"def", 0)
    pipe.drain(3)
    await outbox.drained()
    assert len(written) == 1


@pytest.mark.parametrize("room", [0, 7, 1 << 20, 1 << 40])
@pytest.mark.parametrize("durable", [0, 1])
async def test_parts_of_a_reply_leave_in_order(bench: Bench, room: int, durable: int) -> None:
    bench.pipe.room = room
    bench.journal.durable = durable
    bench.outbox._server.config.client_output_buffer_limit = 1 << 30
    parts: list[bytes | memoryview] = [
        b"a",
        memoryview(b"b" * 300_000),
        b"c" * 10,
        *[b"d" * 65_536] * 90,
        b"e" * 3_000_000,
        b"f",
    ]
    bench.outbox.send(b"first", 1)
    bench.outbox.send(Pieces(parts), 1)
    bench.outbox.send(b"last", 1)
    if not durable:
        assert bench.outbox._held.waiting == bench.outbox.size == 9 + sum(map(len, parts))
        assert not bench.pipe.taken
        bench.journal.release(1)
    bench.pipe.drain(1 << 40)
    await wait_all_tasks_blocked()
    assert bench.pipe.taken == b"".join((b"first", *parts, b"last"))
    assert (bench.outbox.size, bench.outbox._held.waiting) == (0, 0)


async def test_what_is_sent_as_the_client_ends_is_counted_once(bench: Bench) -> None:
    bench.pipe.room = 0
    bench.outbox.send(b"x" * 1_000_000, 0)
    await wait_all_tasks_blocked()
    bench.pipe.drain(1 << 40)
    bench.outbox.discard()
    await wait_all_tasks_blocked()
    assert (bench.outbox.size, bench.outbox._held.waiting) == (0, 0)
