"""No request holds the others up in proportion to what there is, or to what it asks for.

Each command is carried out on a server with much in it, asked for as much as it can be, and the steps are
counted that are taken on the loop between two checkpoints: see `tests.commands.steps`. They are no time, and
so the same on any machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import trio

from engram.commands.registry import COMMANDS, TABLE
from tests.commands.steps import (
    HOLES,
    INDICES,
    LAPSED,
    OF_INDICES,
    VECTORS,
    LargeServer,
    Steps,
    Tally,
    request,
)

# A slice of 1,024 keys, each of which DEL takes 60 steps for, or a page of a scan, and some more.
MOST_STEPS = 110_000

# Commands of a transaction; each takes far more steps than a key of a command with many.
QUEUED = 8_000


@attrs.frozen
class Row:
    """A request, and what comes before it. The other fields are as in `LargeServer.carry_out`.

    Attributes:
        text: the request; of its words some stand for many: see `request`.
        before: requests that come before it.
        queued: those that come before it in a transaction.
        fails: whether the reply is an error, or one of a transaction is; None where it may be.
    """

    text: str
    before: tuple[str, ...] = ()
    queued: tuple[str, ...] = ()
    database: int = 0
    fails: bool | None = False
    answered: bool = True
    monitored: bool = False
    builds: bool = False

    def __str__(self) -> str:
        queued = f"of {len(self.queued)} {self.queued[-1]}" if self.queued else ""
        before = f"behind {self.before[-1]}" if self.before else ""
        place = f"in {self.database}" if self.database else ""
        return " ".join(filter(None, (self.text, queued, before, place, "monitored" * self.monitored)))


CONNECTION = (
    Row("PING @long"),
    Row("ECHO @long"),
    Row("QUIT"),
    Row("SELECT 3"),
    Row("HELLO 3 AUTH u1 x SETNAME name"),
    Row("AUTH u1 x"),
    Row("AUTH u1 @long"),
    Row("RESET"),
    Row("RESET", ("WATCH @keys",)),
    Row("RESET", queued=("SET k1 v",) * QUEUED),
    Row("CLIENT ID"),
    Row("CLIENT INFO", ("WATCH @keys",)),
    Row("CLIENT LIST"),
    Row("CLIENT LIST ID @ids"),
    Row("CLIENT GETNAME"),
    Row("CLIENT SETNAME @key"),
    Row("CLIENT SETINFO LIB-NAME name"),
    Row("CLIENT KILL 10.0.19.0:1234", fails=None),
    Row("CLIENT KILL TYPE normal"),
    Row("CLIENT KILL USER u1"),
    Row("CLIENT KILL ID 1"),
    Row("CLIENT PAUSE 1000"),
    Row("CLIENT UNPAUSE", ("CLIENT PAUSE 1000 WRITE",)),
    Row("CLIENT UNBLOCK 1"),
    Row("CLIENT NO-EVICT ON"),
    Row("CLIENT NO-TOUCH ON"),
    Row("CLIENT REPLY OFF", answered=False),
    Row("CLIENT TRACKING OFF"),
    Row("CLIENT TRACKINGINFO"),
    Row("CLIENT CACHING YES", fails=True),
    Row("CLIENT GETREDIR"),
    Row("CLIENT HELP"),
)
ACCESS = (
    Row("ACL CAT"),
    Row("ACL CAT read"),
    Row("ACL SETUSER u1 ~x*"),
    Row("ACL SETUSER new @rules"),
    Row("ACL SETUSER default >password"),
    Row("ACL DELUSER @users"),
    Row("ACL DRYRUN some MGET @keys"),
    Row("ACL DRYRUN many DEL k499"),
    Row("ACL GENPASS 4096"),
    Row("ACL GETUSER many"),
    Row("ACL LIST"),
    Row("ACL LOAD"),
    Row("ACL LOG 5000"),
    Row("ACL LOG RESET"),
    Row("ACL SAVE"),
    Row("ACL USERS"),
    Row("ACL WHOAMI"),
    Row("ACL HELP"),
    Row("MGET @keys", ("AUTH some x",)),
    Row("MSET @pairs", ("AUTH some x",)),
    Row("DEL @keys", ("AUTH some x",)),
    Row("GET k499", ("AUTH many x",)),
)
TRANSACTIONS = (
    Row("MULTI"),
    Row("EXEC", queued=("SET k1 v",) * QUEUED),
    Row("EXEC", queued=("PEXPIRE k1 100000000",) * QUEUED),
    Row("EXEC", queued=("VADD index m1 @vector",) * QUEUED, database=VECTORS),
    Row("EXEC", ("WATCH @keys",), ("SET k1 v",)),
    Row("DISCARD", queued=("SET k1 v",) * QUEUED),
    Row("DISCARD", ("WATCH @keys",), ("SET k1 v",)),
    Row("WATCH @keys"),
    Row("WATCH @keys", database=LAPSED),
    Row("WATCH @keys", database=OF_INDICES),
    Row("UNWATCH", ("WATCH @keys",)),
)
STRING_KEYS = (
    Row("SET long @long"),
    Row("SET watched v"),
    Row("SET long v GET"),
    Row("SET long v IFEQ @long"),
    Row("GET long"),
    Row("MGET @keys"),
    Row("MGET @same"),
    Row("MGET @keys", database=LAPSED),
    Row("MSET @pairs"),
    Row("MSET @new-pairs"),
    Row("MSET @pairs", database=OF_INDICES),
    Row("MSETNX @new-pairs"),
    Row("MSETNX @pairs"),
    Row("SETNX new @long"),
    Row("SETEX long 10 @long"),
    Row("PSETEX long 10000 @long"),
    Row("GETSET long @long"),
    Row("GETDEL long"),
    Row("DELEX long IFEQ @long"),
    Row("DIGEST long"),
    Row("GETEX long EX 10"),
    Row("APPEND long @long"),
    Row("STRLEN long"),
    Row("GETRANGE long 0 -1"),
    Row("SUBSTR long 1 -2"),
    Row("SETRANGE long 1 @long"),
    Row("INCR number"),
    Row("DECR number"),
    Row("INCRBY number 2"),
    Row("DECRBY number 2"),
    Row("INCRBYFLOAT number 2.5"),
    Row("INCRBYFLOAT long 2.5", fails=True),
    Row("SETBIT long 1000000000 1"),
    Row("GETBIT long 1000"),
    Row("BITCOUNT long"),
    Row("BITCOUNT long 1 -3 BIT"),
)
ANY_KEYS = (
    Row("DEL @keys"),
    Row("DEL @keys", database=LAPSED),
    Row("DEL @keys", database=OF_INDICES),
    Row("UNLINK @keys"),
    Row("EXISTS @keys"),
    Row("TOUCH @keys"),
    Row("RENAME long new"),
    Row("RENAME index new", database=VECTORS),
    Row("RENAMENX long new"),
    Row("COPY long new"),
    Row("COPY long new DB 5 REPLACE"),
    Row("MOVE long 5"),
    Row("MOVE index 5", database=VECTORS),
    Row("SWAPDB 0 1"),
    Row("SWAPDB 0 4"),
    Row("SWAPDB 3 5"),
    Row("RANDOMKEY"),
    Row("RANDOMKEY", database=HOLES),
    Row("RANDOMKEY", database=LAPSED),
    Row("TYPE long"),
    Row("EXPIRE k1 0"),
    Row("EXPIRE k1 100"),
    Row("PEXPIRE k1 100"),
    Row("EXPIREAT k1 1900000000"),
    Row("PEXPIREAT k1 1900000000000"),
    Row("TTL k1"),
    Row("PTTL k1"),
    Row("EXPIRETIME k1"),
    Row("PEXPIRETIME k1"),
    Row("PERSIST k4"),
    Row("KEYS *"),
    Row("KEYS *", database=LAPSED),
    Row("KEYS k*"),
    Row("SCAN 0 COUNT 1000000"),
    Row("SCAN 0 COUNT 1000000 MATCH ?*"),
    Row("SCAN 0 COUNT 1000000 TYPE string"),
    Row("SCAN 0 COUNT 1000000", database=HOLES),
    Row("SCAN 0 COUNT 1000000", database=LAPSED),
    Row("SCAN 0 COUNT 1000000 TYPE vectorset", database=OF_INDICES),
    Row("OBJECT ENCODING long"),
    Row("OBJECT REFCOUNT long"),
    Row("OBJECT IDLETIME long"),
    Row("OBJECT FREQ long", fails=True),
    Row("OBJECT HELP"),
    Row("MEMORY USAGE long SAMPLES 0"),
    Row("MEMORY USAGE index SAMPLES 0", database=VECTORS),
    Row("MEMORY HELP"),
)
VECTOR_INDICES = (
    Row("VNEW new 1000", database=VECTORS),
    Row("VNEW new 4", database=OF_INDICES),
    Row("VINFO index", database=VECTORS),
    Row("VLIST", database=OF_INDICES),
    Row("VLIST"),
    Row("VOPTIMIZE index", database=VECTORS, builds=True),
    Row("VSAVE"),
    Row("VADD index m1 @vector", database=VECTORS),
    Row("VMADD empty @rows ATTRS", database=VECTORS),
    Row("VMADD index @rows ATTRS", database=VECTORS),
    Row("VMADD index @bare-rows", database=VECTORS),
    Row("VGET index m1", database=VECTORS),
    Row("VMGET index @members", database=VECTORS),
    Row("VMGET index @keys", database=VECTORS),
    Row("VDEL index m1", database=VECTORS),
    Row("VSETATTR index m1 @attributes", database=VECTORS),
    Row("VGETATTR index m1", database=VECTORS),
    Row("VSCAN index 0 COUNT 1000000", database=VECTORS),
    Row("VSCAN index 0 COUNT 1000000 MATCH ?*", database=VECTORS),
    Row("VSEARCH index @vector 20000 WITHATTRS WITHVECTORS", database=VECTORS),
    Row("VSEARCH index @vector 10 FILTER @filter", database=VECTORS),
    Row("VMSEARCH one 1 16384 @queries WITHATTRS WITHVECTORS", database=VECTORS),
    Row("VMSEARCH index 0 16384 @queries", database=VECTORS),
    Row("VCOUNT index", database=VECTORS),
    Row("VCOUNT index FILTER .n>=0", database=VECTORS),
    Row("VDELBY index FILTER .n>=0", database=VECTORS),
)
SERVER = (
    Row("DBSIZE"),
    Row("FLUSHDB"),
    Row("FLUSHDB", database=OF_INDICES),
    Row("FLUSHDB", database=VECTORS),
    Row("FLUSHALL"),
    Row("TIME"),
    Row("INFO"),
    Row("INFO everything"),
    Row("INFO", tuple(f"VADD k{n} m @vector" for n in range(INDICES)), database=OF_INDICES),
    *(
        Row(f"INFO {section}")
        for section in (
            "server",
            "clients",
            "memory",
            "stats",
            "commandstats",
            "latencystats",
            "keyspace",
            "vectors",
        )
    ),
    Row("SAVE"),
    Row("BGSAVE SCHEDULE"),
    Row("BGREWRITEAOF"),
    Row("DEBUG OBJECT long", fails=True),
    Row("LOLWUT VERSION 5"),
    Row("LASTSAVE"),
    Row("SHUTDOWN NOSAVE", answered=False),
    Row("CONFIG GET *"),
    Row("CONFIG GET @patterns"),
    Row("CONFIG SET slowlog-max-len 1"),
    Row("CONFIG SET maxmemory 100gb"),
    Row("CONFIG SET maxmemory-policy volatile-ttl maxmemory 1"),
    Row("CONFIG SET requirepass password"),
    Row("SET k1 v", ("CONFIG SET maxmemory-policy volatile-ttl maxmemory 1",), fails=None),
    Row("CONFIG RESETSTAT"),
    Row("CONFIG REWRITE"),
    Row("CONFIG HELP"),
    Row("MONITOR"),
    Row("MGET @keys", monitored=True),
    Row("SET long @long", monitored=True),
    Row("SLOWLOG GET -1"),
    Row("SLOWLOG LEN"),
    Row("SLOWLOG RESET"),
    Row("SLOWLOG HELP"),
    Row("LATENCY DOCTOR"),
    Row("LATENCY GRAPH command", fails=True),
    Row("LATENCY HISTORY command"),
    Row("LATENCY LATEST"),
    Row("LATENCY RESET @keys"),
    Row("LATENCY HISTOGRAM"),
    Row("LATENCY HISTOGRAM @commands"),
    Row("LATENCY HELP"),
    Row("ROLE"),
    Row("REPLICAOF NO ONE"),
    Row("SLAVEOF NO ONE"),
    *(Row(name, fails=True) for name in ("READONLY", "READWRITE", "ASKING")),
    *(
        Row(f"CLUSTER {name}", fails=True)
        for name in ("INFO", "NODES", "SLOTS", "SHARDS", "MYID", "KEYSLOT k", "HELP")
    ),
    Row("MODULE LIST"),
    Row("MODULE HELP"),
    Row("WAIT 1 1"),
    Row("WAITAOF 0 1 1"),
    Row("COMMAND"),
    Row("COMMAND COUNT"),
    Row("COMMAND INFO"),
    Row("COMMAND INFO @commands"),
    Row("COMMAND INFO @unknown"),
    Row("COMMAND DOCS"),
    Row("COMMAND DOCS @commands"),
    Row("COMMAND DOCS @unknown"),
    Row("COMMAND GETKEYS MGET @keys"),
    Row("COMMAND GETKEYSANDFLAGS MSET @pairs"),
    Row("COMMAND LIST"),
    Row("COMMAND LIST FILTERBY PATTERN *a*"),
    Row("COMMAND LIST FILTERBY ACLCAT read"),
    Row("COMMAND HELP"),
)
ROWS = (*CONNECTION, *ACCESS, *TRANSACTIONS, *STRING_KEYS, *ANY_KEYS, *VECTOR_INDICES, *SERVER)

# What takes more today, and how many steps.
KNOWN: dict[str, int] = {
    # Each key is counted.
    "CONFIG SET maxmemory-policy volatile-ttl maxmemory 1": 257_696,
    "CONFIG SET maxmemory 100gb": 185_619,
    # In a transaction a filter is compiled, or keys deleted, in one turn.
    "EXEC of 1 DEL @keys in 3": 497_316,
    "EXEC of 1 VSEARCH index @vector 10 FILTER @filter in 4": 342_973,
    # A slice of keys takes long: those that lapsed are deleted one by one, indices are let go of.
    "DEL @keys in 3": 179_147,
    # Each session is looked at.
    "INFO behind VADD k4999 m @vector in 3": 169_996,
    "INFO everything": 163_884,
    "INFO": 153_382,
}


# A part of a transaction takes no turns of its own while it changes something.
IN_EXEC = tuple(
    Row("EXEC", queued=(row.text,), database=row.database, fails=None)
    for row in (*STRING_KEYS, *ANY_KEYS, *VECTOR_INDICES)
    if row.text
    in (
        "MGET @keys",
        "MSET @pairs",
        "MSETNX @new-pairs",
        "DEL @keys",
        "EXISTS @keys",
        "KEYS *",
        "VLIST",
        "VMADD index @rows ATTRS",
        "VMGET index @members",
        "VSEARCH index @vector 10 FILTER @filter",
        "VMSEARCH one 1 16384 @queries WITHATTRS WITHVECTORS",
        "VCOUNT index FILTER .n>=0",
    )
    and row.database in (0, VECTORS, OF_INDICES)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LargeServer]:
    """A server with much in it."""
    large = LargeServer(tmp_path_factory.mktemp("large"))
    # Or each full collection would look at all of it.
    gc.collect()
    gc.freeze()
    yield large
    gc.unfreeze()


class LongTurnError(AssertionError):
    """A turn takes more steps than it may."""

    def __init__(self, steps: Tally) -> None:
        most = sorted(steps.items(), key=lambda item: -item[1])[:5]
        places = [
            f"{code.co_filename.rpartition('engram/')[2]}:{code.co_qualname} {count}" for code, count in most
        ]
        super().__init__(f"{sum(steps.values())} steps: {', '.join(places)}")


def _parameters() -> Iterator[Any]:
    for row in (*ROWS, *IN_EXEC):
        known = KNOWN.get(str(row))
        reason = f"takes {known} steps, more than {MOST_STEPS}"
        marks = (
            () if known is None else (pytest.mark.xfail(strict=True, raises=LongTurnError, reason=reason),)
        )
        yield pytest.param(row, id=str(row), marks=marks)


@pytest.mark.parametrize("row", list(_parameters()))
def test_no_turn_is_long(server: LargeServer, row: Row) -> None:
    before = [request(text) for text in row.before]
    if row.queued:
        before += [[b"MULTI"], *map(request, row.queued)]
    steps, reply = server.carry_out(
        request(row.text),
        before,
        database=row.database,
        answered=row.answered,
        monitored=row.monitored,
        builds=row.builds,
    )
    if row.fails is not None:
        assert _is_error(reply) == row.fails, reply
    if sum(steps.values()) > MOST_STEPS:
        raise LongTurnError(steps)


def _is_error(reply: Any) -> bool:
    return isinstance(reply, Exception) or (isinstance(reply, list) and any(map(_is_error, reply)))


def test_each_command_has_a_row() -> None:
    """The larger a command's reply or request can be, the larger is that of its row."""
    commands = [*COMMANDS.values(), *(sub for each in COMMANDS.values() for sub in each.subcommands.values())]
    # A container is no command, but COMMAND is both.
    wanted = {each.name for each in commands if not each.subcommands or each.arity == -1}
    assert {TABLE.find(request(row.text)).name for row in ROWS} == wanted


def test_what_is_known_is_in_the_table() -> None:
    names = [str(row) for row in (*ROWS, *IN_EXEC)]
    assert set(KNOWN) <= set(names)
    assert len(set(names)) == len(names)


def _look(count: int) -> int:
    found = 0
    for number in range(count):
        found += number
    return found


@pytest.mark.parametrize(
    ("turns", "look", "expected"),
    [
        (1, lambda: _look(1000), 2000),
        (10, lambda: _look(1000), 2000),
        (1, lambda: [number for number in range(1000)], 1000),  # noqa: C416
        (1, lambda: sum(number for number in range(1000)), 2000),
        (1, lambda: list(map(_look, [0] * 1000)), 4000),
        (1, lambda: sorted(range(1000)), 0),
    ],
)
def test_steps_of_a_turn_are_counted(turns: int, look: Callable[[], object], expected: int) -> None:
    steps = Steps()

    async def run() -> None:
        steps.ours.add(trio.lowlevel.current_task())
        _look(100_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            steps.counting = True

    async def take_turns() -> None:
        for _ in range(turns):
            look()
            await trio.lowlevel.checkpoint()

    trio.run(run, instruments=[steps])
    assert expected <= sum(steps.longest.values()) < expected + 400
