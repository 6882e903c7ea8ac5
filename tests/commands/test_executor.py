"""The executor, with a gate and an outlet that a test holds in its hand."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import trio

from engram.commands.executor import Batch, Executor
from engram.commands.guard import Gate, Wait
from engram.commands.meter import Meter
from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.session import Pieces, Session
from engram.commands.table import LONGEST_RUN, Command, CommandTable, Handler, Reply
from engram.errors import CommandError
from engram.operations import SetString
from tests.conftest import House

OK, ONE, PONG = b"+OK\r\n", b":1\r\n", b"+PONG\r\n"
NEVER = sys.maxsize


class Outlet:
    """Keeps the replies. `waits` is what has to be waited for once they are handed on."""

    def __init__(self) -> None:
        self.batch = Batch(1 << 20)
        self.over = False
        self.taken: list[Reply] = []
        self.waits: Wait | None = None
        self.errors: list[Exception] = []
        self.latest: list[str | None] = []

    def hand_on(self, *, turn_over: bool) -> Wait | None:
        self.taken += self.batch.replies
        self.batch.take()
        return trio.lowlevel.checkpoint if turn_over else self.waits

    def settle(self, reply: Reply) -> Wait | None:
        self.hand_on(turn_over=False)
        self.taken.append(reply)
        return self.waits

    def half_done(self, error: Exception) -> None:
        self.errors.append(error)

    def end(self, latest: Command | None) -> None:
        self.hand_on(turn_over=False)
        self.latest.append(None if latest is None else latest.name)


class Lists(Gate):
    """Lets requests through, but those of some commands one by one, as `answers` says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.answers: dict[str, Callable[[], bytes | Wait | None]] = {}

    def begin(self, command: Command) -> Handler | None:
        self.begun.append(command.name)
        return None if command.name in self.answers else command.handler

    def admit(self, command: Command, request: list[bytes]) -> bytes | Wait | None:
        return self.answers[command.name]()


class Bench:
    def __init__(self, house: House) -> None:
        house.connect()
        self.session: Session = house.connections[0].session
        self.usage = house.server.statistics.usage
        self.database = house.database
        self.gate, self.outlet = Lists(), Outlet()
        self.executor = Executor(self.session, self.gate, self.outlet, Meter(self.session))

    def carry_out(self, *requests: str, turn_ends: int = NEVER) -> Wait | None:
        if requests:
            self.executor.take([request.encode().split() for request in requests])
        return self.executor.carry_out(turn_ends)

    def replace(self, name: str, **fields: Any) -> None:
        """Has a command do something else."""
        command = attrs.evolve(COMMANDS[name.encode()], **fields)
        table = {name.encode(): command, name.upper().encode(): command}
        self.session.table = CommandTable({**COMMANDS, **table}, {**SPELLINGS, **table})

    def counts(self, name: str) -> tuple[int, int, int]:
        usage = self.usage[name]
        return usage.calls, usage.failed, usage.rejected


@pytest.fixture
async def bench(house: House) -> Bench:
    return Bench(house)


async def test_requests_are_carried_out_in_order(bench: Bench) -> None:
    wait = bench.carry_out("SET a 1", "INCR a", "get a", "PING", "CLIENT ID", "Get b")
    assert wait is None
    assert bench.executor.done
    assert bench.outlet.taken == [OK, b":2\r\n", b"$1\r\n2\r\n", PONG, ONE, b"$-1\r\n"]
    assert bench.outlet.latest == ["get"]


async def test_the_gate_is_asked_once_for_requests_of_one_command(bench: Bench) -> None:
    bench.carry_out("ECHO a", "ECHO b", "ECHO c", "PING", "ECHO d", "CLIENT ID", "CLIENT ID")
    assert bench.gate.begun == ["echo", "ping", "echo", "client|id", "client|id"]
    assert bench.counts("echo") == (4, 0, 0)
    assert bench.counts("client|id") == (2, 0, 0)


async def test_nothing_is_carried_out(bench: Bench) -> None:
    assert bench.executor.done
    assert bench.carry_out() is None
    assert bench.outlet.latest == [None]


async def test_those_alike_are_carried_out_together(bench: Bench) -> None:
    bench.carry_out("SET a 1", "SET b 2", "GET a", "GET b", "SET a 3 EX 5", "SET b 4")
    assert bench.outlet.taken == [OK * 2, b"$1\r\n1\r\n$1\r\n2\r\n", OK, OK]
    assert bench.database.lsn == 3
    assert bench.counts("set") == (4, 0, 0)


async def test_a_long_run_is_several(bench: Bench) -> None:
    bench.carry_out(*["SET a 1"] * (2 * LONGEST_RUN + 1))
    assert bench.outlet.taken == [OK * LONGEST_RUN, OK * LONGEST_RUN, OK]


async def test_what_a_run_leaves_out_is_carried_out_one_by_one(bench: Bench) -> None:
    runs: list[int] = []

    def run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
        runs.append(len(requests))
        return 2, ONE * 2

    bench.replace("incr", run=run)
    bench.carry_out(*["INCR a"] * 5)
    assert bench.outlet.taken == [ONE * 2, ONE, b":2\r\n", b":3\r\n"]
    assert runs == [5]


@pytest.mark.parametrize("error", [MemoryError(), CommandError("ERR too large")])
async def test_where_a_run_fails_each_learns_why_by_itself(bench: Bench, error: Exception) -> None:
    def run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
        raise error

    bench.replace("incr", run=run)
    bench.carry_out("INCR a", "INCR a")
    assert bench.outlet.taken == [ONE, b":2\r\n"]
    assert bench.counts("incr") == (2, 0, 0)


async def test_a_run_that_fails_behind_its_change_is_not_answered(bench: Bench) -> None:
    def run(session: Session, requests: Sequence[list[bytes]]) -> tuple[int, bytes]:
        bench.database.commit(SetString(b"a", b"1"))
        raise ZeroDivisionError

    bench.replace("incr", run=run)
    with pytest.raises(ZeroDivisionError):
        bench.carry_out("INCR a", "INCR a")


async def test_no_runs_where_a_gate_has_its_own_handler(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[list[bytes]] = []

    def handle(session: Session, request: list[bytes]) -> bytes:
        handled.append(request)
        return OK

    monkeypatch.setattr(bench.gate, "begin", lambda command: handle)
    bench.carry_out("SET a 1", "SET b 2")
    assert handled == [[b"SET", b"a", b"1"], [b"SET", b"b", b"2"]]


async def test_errors_are_replies(bench: Bench) -> None:
    bench.carry_out("NOSUCH", "GET", "SET a x", "INCR a", "CLIENT NOSUCH", "PING")
    assert bench.outlet.taken == [
        b"-ERR unknown command 'NOSUCH'\r\n",
        b"-ERR wrong number of arguments for 'get' command\r\n",
        OK,
        b"-ERR value is not an integer or out of range\r\n",
        b"-ERR unknown subcommand 'NOSUCH'. Try CLIENT HELP.\r\n",
        PONG,
    ]
    assert bench.counts("get") == (0, 0, 1)
    assert bench.counts("incr") == (1, 1, 0)


async def test_an_error_tells_of_data_whatever_the_command(bench: Bench) -> None:
    bench.carry_out("PING")
    assert not bench.outlet.batch.shows_data
    bench.carry_out("PING", "PING 1 2")
    assert bench.outlet.batch.shows_data


async def test_an_error_of_ours_is_a_reply_where_nothing_has_changed(bench: Bench) -> None:
    def broken(session: Session, request: list[bytes]) -> bytes:
        raise ZeroDivisionError

    bench.replace("append", handler=broken)
    bench.carry_out("APPEND a b", "PING")
    assert bench.outlet.taken == [b"-ERR internal error, see the log of the server\r\n", PONG]
    assert bench.outlet.errors == []
    assert bench.counts("append") == (1, 1, 0)


async def test_the_outlet_is_told_of_a_call_that_failed_behind_its_change(bench: Bench) -> None:
    error = ZeroDivisionError()

    def broken(session: Session, request: list[bytes]) -> bytes:
        bench.database.commit(SetString(b"a", b"1"))
        raise error

    bench.replace("append", handler=broken)
    bench.carry_out("APPEND a b")
    assert bench.outlet.errors == [error]


async def test_a_request_waits_and_is_looked_at_again(bench: Bench) -> None:
    waited = 0

    async def wait() -> None:
        nonlocal waited
        waited += 1

    bench.gate.answers["echo"] = lambda: wait
    obstacle = bench.carry_out("PING", "ECHO a", "PING")
    assert obstacle is not None
    assert bench.outlet.taken == [PONG]
    await obstacle()
    obstacle = bench.carry_out()
    assert obstacle is not None
    await obstacle()
    assert (waited, bench.executor.done) == (2, False)
    bench.gate.answers["echo"] = lambda: None
    assert bench.carry_out() is None
    assert bench.outlet.taken == [PONG, b"$1\r\na\r\n", PONG]


async def test_a_request_that_waited_is_refused(bench: Bench) -> None:
    async def wait() -> None:
        raise CommandError("MISCONF no")

    bench.gate.answers["set"] = lambda: wait
    obstacle = bench.carry_out("SET a 1", "PING")
    assert obstacle is not None
    await obstacle()
    assert bench.outlet.taken == [b"-MISCONF no\r\n"]
    assert bench.carry_out() is None
    assert bench.outlet.taken == [b"-MISCONF no\r\n", PONG]
    assert bench.counts("set") == (0, 0, 1)


async def test_the_gate_answers_or_refuses(bench: Bench) -> None:
    def refuse() -> None:
        raise CommandError("NOPERM no")

    bench.gate.answers["get"] = lambda: b"+QUEUED\r\n"
    bench.gate.answers["set"] = refuse
    bench.carry_out("GET a", "GET b", "SET a 1", "GET", "PING")
    assert bench.outlet.taken == [
        b"+QUEUED\r\n",
        b"+QUEUED\r\n",
        b"-NOPERM no\r\n",
        b"-ERR wrong number of arguments for 'get' command\r\n",
        PONG,
    ]
    assert bench.counts("get") == (0, 0, 1)
    assert bench.counts("set") == (0, 0, 1)


async def test_a_turn_ends(bench: Bench) -> None:
    """Behind each call where calls vary, else behind some."""
    requests = ["MGET a", "MGET b", *["PING"] * 100]
    for left in (101, 100, 36):
        assert bench.carry_out(*requests, turn_ends=0) is trio.lowlevel.checkpoint
        requests = requests[len(bench.outlet.taken) :]
        assert len(requests) == left
        bench.outlet.taken.clear()
    assert bench.carry_out(*requests, turn_ends=0) is None


async def test_replies_are_handed_on_where_there_are_many(bench: Bench) -> None:
    bench.outlet.batch.most = 3 * len(PONG)

    async def wait() -> None:
        pass

    bench.outlet.waits = wait
    assert bench.carry_out(*["PING"] * 7) is wait
    assert bench.outlet.taken == [PONG] * 3
    bench.outlet.waits = None
    assert bench.carry_out() is None
    assert bench.outlet.taken == [PONG] * 7


async def test_a_long_reply_goes_its_own_way(bench: Bench) -> None:
    bench.database.commit(SetString(b"a", bytes(1 << 20)))
    bench.carry_out("PING", "GET a", "PING")
    first, second, third = bench.outlet.taken
    assert (first, type(second), third) == (PONG, Pieces, PONG)


async def test_nothing_is_carried_out_behind_the_end(bench: Bench) -> None:
    bench.outlet.over = True
    assert bench.carry_out("PING", "QUIT", "QUIT", "SET a 1") is None
    assert bench.outlet.taken == [PONG, OK]
    assert bench.executor.done
    assert not bench.database.engine.keyspace.values


async def test_http_ends_the_client(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert bench.carry_out("PING", "POST /", "SET a 1") is None
    assert bench.outlet.taken == []
    assert bench.outlet.batch.replies == []
    assert "as in HTTP" in caplog.text
    assert not bench.database.engine.keyspace.values


async def test_requests_are_let_go_of_once_they_are_carried_out(house: House) -> None:
    """A client may be silent for long afterwards."""
    client = house.connect()
    word = b"x" * 5_000_017
    assert await client.call([b"EXISTS", word]) == b":0\r\n"
    await client.call([b"SET", b"k", b"v"])
    assert await client.call([b"EXISTS", word]) == b":0\r\n"
    del word
    gc.collect()
    held = [each for each in gc.get_objects() if type(each) is list and any(_is_long(word) for word in each)]
    assert held == []


def _is_long(word: object) -> bool:
    return type(word) is bytes and len(word) == 5_000_017
