from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import pytest
import trio
import trio.testing

from engram import REDIS_VERSION
from engram.commands import client as client_module
from engram.commands import long_work
from tests.commands.conftest import Conversation, Converse
from tests.conftest import House, ManualJournal, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "ping and echo": (
        ("PING", b"+PONG\r\n"),
        ("PING hello", b"$5\r\nhello\r\n"),
        ("PING a b", b"-ERR wrong number of arguments for 'ping' command\r\n"),
        ("ECHO hello", b"$5\r\nhello\r\n"),
        ("ECHO", b"-ERR wrong number of arguments for 'echo' command\r\n"),
    ),
    "select": (
        ("SELECT 0", b"+OK\r\n"),
        ("SELECT -1", b"-ERR DB index is out of range\r\n"),
        ("SELECT 10000", b"-ERR DB index is out of range\r\n"),
        ("SELECT a", b"-ERR value is not an integer or out of range\r\n"),
        ("SELECT", b"-ERR wrong number of arguments for 'select' command\r\n"),
    ),
    "auth without passwords": (
        (
            "AUTH pw",
            b"-ERR AUTH <password> called without any password configured for the default user. "
            b"Are you sure your configuration is correct?\r\n",
        ),
        ("AUTH default pw", b"+OK\r\n"),
        ("AUTH foo bar", b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
        ("AUTH a b c", b"-ERR syntax error\r\n"),
        ("AUTH", b"-ERR wrong number of arguments for 'auth' command\r\n"),
    ),
    "hello misused": (
        ("HELLO 4", b"-NOPROTO unsupported protocol version\r\n"),
        ("HELLO 1", b"-NOPROTO unsupported protocol version\r\n"),
        ("HELLO a", b"-ERR Protocol version is not an integer or out of range\r\n"),
        ("HELLO 2 AUTH a", b"-ERR Syntax error in HELLO option 'AUTH'\r\n"),
        ("HELLO 2 AUTH foo bar", b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
        ("HELLO 2 SETNAME", b"-ERR Syntax error in HELLO option 'SETNAME'\r\n"),
        (
            [b"HELLO", b"2", b"SETNAME", b"a b"],
            b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n",
        ),
        ("HELLO 2 FOO", b"-ERR Syntax error in HELLO option 'FOO'\r\n"),
        ("HELLO 2 SETNAME a foo", b"-ERR Syntax error in HELLO option 'foo'\r\n"),
        ("CLIENT GETNAME", b"$-1\r\n"),
    ),
    "names": (
        ("CLIENT GETNAME", b"$-1\r\n"),
        ("CLIENT SETNAME foo", b"+OK\r\n"),
        ("CLIENT GETNAME", b"$3\r\nfoo\r\n"),
        (
            [b"CLIENT", b"SETNAME", b"a b"],
            b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n",
        ),
        (
            [b"CLIENT", b"SETNAME", b"a\nb"],
            b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n",
        ),
        ("CLIENT GETNAME", b"$3\r\nfoo\r\n"),
        ([b"CLIENT", b"SETNAME", b""], b"+OK\r\n"),
        ("CLIENT GETNAME", b"$-1\r\n"),
        ("CLIENT SETNAME", b"-ERR wrong number of arguments for 'client|setname' command\r\n"),
        ("CLIENT GETNAME x", b"-ERR wrong number of arguments for 'client|getname' command\r\n"),
    ),
    "setinfo": (
        ("CLIENT SETINFO lib-name redis", b"+OK\r\n"),
        ("CLIENT SETINFO LIB-VER 1.2", b"+OK\r\n"),
        (
            [b"CLIENT", b"SETINFO", b"LIB-VER", b"a b"],
            b"-ERR LIB-VER cannot contain spaces, newlines or special characters.\r\n",
        ),
        (
            [b"CLIENT", b"SETINFO", b"lib-name", b"a\nb"],
            b"-ERR lib-name cannot contain spaces, newlines or special characters.\r\n",
        ),
        ("CLIENT SETINFO foo bar", b"-ERR Unrecognized option 'foo'\r\n"),
        ("CLIENT SETINFO foo", b"-ERR wrong number of arguments for 'client|setinfo' command\r\n"),
    ),
    "list misused": (
        ("CLIENT LIST foo", b"-ERR syntax error\r\n"),
        ("CLIENT LIST TYPE foo", b"-ERR Unknown client type 'foo'\r\n"),
        ("CLIENT LIST TYPE", b"-ERR syntax error\r\n"),
        ("CLIENT LIST ID", b"-ERR syntax error\r\n"),
        ("CLIENT LIST ID a", b"-ERR Invalid client ID\r\n"),
    ),
    "kill misused": (
        ("CLIENT KILL", b"-ERR wrong number of arguments for 'client|kill' command\r\n"),
        ("CLIENT KILL 1.1.1.1:5", b"-ERR No such client\r\n"),
        ("CLIENT KILL ID 99999999", b":0\r\n"),
        ("CLIENT KILL ID a", b"-ERR client-id should be greater than 0\r\n"),
        ("CLIENT KILL ID 0", b"-ERR client-id should be greater than 0\r\n"),
        ("CLIENT KILL ID -1", b"-ERR client-id should be greater than 0\r\n"),
        ("CLIENT KILL ID 5 ADDR", b"-ERR syntax error\r\n"),
        ("CLIENT KILL ADDR 1.1.1.1:1", b":0\r\n"),
        ("CLIENT KILL LADDR 1.1.1.1:1", b":0\r\n"),
        ("CLIENT KILL TYPE foo", b"-ERR Unknown client type 'foo'\r\n"),
        ("CLIENT KILL TYPE pubsub", b":0\r\n"),
        ("CLIENT KILL USER nosuch", b"-ERR No such user 'nosuch'\r\n"),
        ("CLIENT KILL SKIPME maybe", b"-ERR syntax error\r\n"),
        ("CLIENT KILL FOO bar", b"-ERR syntax error\r\n"),
        ("CLIENT KILL MAXAGE a", b"-ERR maxage is not an integer or out of range\r\n"),
        ("CLIENT KILL MAXAGE 0", b"-ERR maxage should be greater than 0\r\n"),
        ("CLIENT KILL MAXAGE 1000000", b":0\r\n"),
    ),
    "pause misused": (
        ("CLIENT PAUSE abc", b"-ERR timeout is not an integer or out of range\r\n"),
        ("CLIENT PAUSE -1", b"-ERR timeout is negative\r\n"),
        ("CLIENT PAUSE 9223372036854775807", b"-ERR timeout is out of range\r\n"),
        ("CLIENT PAUSE 1 FOO", b"-ERR CLIENT PAUSE mode must be WRITE or ALL\r\n"),
        (
            "CLIENT pause 1 ALL x",
            b"-ERR unknown subcommand or wrong number of arguments for 'pause'. Try CLIENT HELP.\r\n",
        ),
        ("CLIENT UNPAUSE", b"+OK\r\n"),
        ("CLIENT UNPAUSE x", b"-ERR wrong number of arguments for 'client|unpause' command\r\n"),
    ),
    "unblock": (
        ("CLIENT UNBLOCK a", b"-ERR value is not an integer or out of range\r\n"),
        ("CLIENT UNBLOCK 1", b":0\r\n"),
        ("CLIENT UNBLOCK 99 TIMEOUT", b":0\r\n"),
        ("CLIENT UNBLOCK 1 FOO", b"-ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR\r\n"),
    ),
    "switches": (
        ("CLIENT NO-EVICT on", b"+OK\r\n"),
        ("CLIENT NO-EVICT foo", b"-ERR syntax error\r\n"),
        ("CLIENT NO-TOUCH off", b"+OK\r\n"),
        ("CLIENT NO-TOUCH foo", b"-ERR syntax error\r\n"),
    ),
    "tracking": (
        ("CLIENT GETREDIR", b":-1\r\n"),
        ("CLIENT TRACKING OFF", b"+OK\r\n"),
        ("CLIENT TRACKING foo", b"-ERR syntax error\r\n"),
        (
            "CLIENT TRACKING ON BCAST",
            b"-ERR client-side caching is not supported: keys are not tracked\r\n",
        ),
        (
            "CLIENT CACHING yes",
            b"-ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or"
            b" OPTOUT mode enabled\r\n",
        ),
    ),
    "reply": (
        ("CLIENT REPLY ON", b"+OK\r\n"),
        ("CLIENT REPLY foo", b"-ERR syntax error\r\n"),
        ("CLIENT REPLY", b"-ERR wrong number of arguments for 'client|reply' command\r\n"),
    ),
    "subcommands": (
        ("CLIENT", b"-ERR wrong number of arguments for 'client' command\r\n"),
        ("CLIENT FOO", b"-ERR unknown subcommand 'FOO'. Try CLIENT HELP.\r\n"),
        ("CLIENT ID x", b"-ERR wrong number of arguments for 'client|id' command\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


HELLO_FIELDS = (
    b"$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$%d\r\n%b\r\n$5\r\nproto\r\n:%d\r\n$2\r\nid\r\n:1\r\n"
    b"$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n"
)


def hello_reply(version: int) -> bytes:
    start = b"*14\r\n" if version == 2 else b"%7\r\n"
    return start + HELLO_FIELDS % (len(REDIS_VERSION), REDIS_VERSION.encode(), version)


async def test_hello_chooses_the_version_of_the_protocol(house: House) -> None:
    client = house.connect()
    assert await client.call("HELLO") == hello_reply(2)
    assert await client.call("HELLO 3") == hello_reply(3)
    assert await client.call("GET nosuch") == b"_\r\n"
    assert await client.call("HELLO") == hello_reply(3)
    assert (await client.call("HELLO 4")).startswith(b"-NOPROTO ")
    assert await client.call("GET nosuch") == b"_\r\n"
    assert await client.call("HELLO 2") == hello_reply(2)
    assert await client.call("GET nosuch") == b"$-1\r\n"


async def test_hello_authenticates_and_names(house: House) -> None:
    client = house.connect()
    assert await client.call("HELLO 3 AUTH default pw SETNAME foo") == hello_reply(3)
    assert await client.call("CLIENT GETNAME") == b"$3\r\nfoo\r\n"
    assert (await client.call("HELLO 2 SETNAME bar AUTH foo bar")).startswith(b"-WRONGPASS ")
    assert await client.call("CLIENT GETNAME") == b"$3\r\nfoo\r\n"
    assert await client.call("GET nosuch") == b"_\r\n"


async def test_reset_goes_back_to_the_start(house: House) -> None:
    client = house.connect()
    await client.call("HELLO 3 SETNAME foo")
    await client.call("CLIENT SETINFO lib-name tests")
    assert await client.call("RESET") == b"+RESET\r\n"
    assert await client.call("CLIENT GETNAME") == b"$-1\r\n"
    assert b" lib-name=tests " in await client.call("CLIENT INFO")
    assert await client.call("RESET x") == b"-ERR wrong number of arguments for 'reset' command\r\n"


async def test_client_info_and_list(house: House) -> None:
    client = house.connect()
    await client.call("HELLO 3 SETNAME me")
    other = house.connect()
    await other.call("PING")
    await client.call("CLIENT SETINFO LIB-NAME tests")
    await client.call("CLIENT SETINFO LIB-VER 1.2")
    assert await client.call("CLIENT ID") == b":1\r\n"
    info = (await client.call("CLIENT INFO")).decode()
    assert re.fullmatch(
        r"=\d+\r\ntxt:id=1 addr=127.0.0.1:1000 laddr=127.0.0.1:6380 fd=1000 name=me age=\d+ idle=0 flags=N"
        r" db=0 sub=0 psub=0 ssub=0 multi=-1 watch=0 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0"
        r" rbp=0 obl=0 oll=0 omem=0 tot-mem=\d+ events=r cmd=client\|info user=default redir=-1 resp=3"
        r" lib-name=tests lib-ver=1.2 io-thread=0\n\r\n",
        info,
    )
    listed = (await other.call("CLIENT LIST")).decode()
    assert re.findall(r"\bid=\d+", listed) == ["id=1", "id=2"]
    assert listed.startswith("$")
    for request, ids in {
        "CLIENT LIST ID 2": ["id=2"],
        "CLIENT LIST ID 2 7 1 2": ["id=2", "id=1", "id=2"],
        "CLIENT LIST TYPE normal": ["id=1", "id=2"],
        "CLIENT LIST TYPE pubsub": [],
    }.items():
        assert re.findall(r"\bid=\d+", (await client.call(request)).decode()) == ids


async def test_many_clients_are_listed_in_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it is when it is looked at, and none that has gone by then."""
    monkeypatch.setattr(client_module, "_CLIENTS_A_TURN", 2)
    clients = [house.connect() for _ in range(7)]
    for client in clients:
        await client.call("PING")
    sessions = house.server.sessions
    gone, named = sessions[6], sessions[7]

    for words in ("CLIENT LIST", "CLIENT LIST ID 9 7 6 5 4 3 2 1 7"):
        listed = (await clients[0].call(words)).decode()
        wanted = re.findall(r"\d", words) or list("1234567")
        assert re.findall(r"\bid=(\d+)", listed) == [number for number in wanted if number != "9"]
    assert await clients[0].call("CLIENT LIST ID 1 2 3 x") == b"-ERR Invalid client ID\r\n"
    assert await clients[0].call("MULTI") == b"+OK\r\n"
    assert await clients[0].call("CLIENT LIST") == b"+QUEUED\r\n"
    assert (await clients[0].call("EXEC")).count(b"id=") == 7
    taken = 0
    turns = long_work.by_slices

    def disturbed(items: Sequence[object], size: int, work: Callable[..., object]) -> Iterator[None]:
        nonlocal taken
        for _ in turns(items, size, work):
            taken += 1
            if taken == 1:
                gone.close()
                named.name = "late"
            yield

    monkeypatch.setattr(client_module, "by_slices", disturbed)
    listed = (await clients[0].call("CLIENT LIST")).decode()
    assert re.findall(r"\bid=(\d+)", listed) == list("123457")
    assert " name=late " in listed
    assert taken == 3


async def test_many_clients_are_killed_in_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client that asked for it may be gone by then."""
    monkeypatch.setattr(client_module, "_CLIENTS_A_TURN", 2)
    clients = [house.connect() for _ in range(6)]
    for client in clients:
        await client.call("PING")
    assert await clients[0].call("CLIENT KILL TYPE normal") == b":5\r\n"
    for client in clients[1:]:
        assert await client.ended() == b""
    others = [house.connect() for _ in range(6)]
    for client in others:
        await client.call("PING")
    assert await clients[0].call("CLIENT KILL TYPE normal SKIPME no") == b":7\r\n"
    for client in (clients[0], *others):
        assert await client.ended() == b""
    assert not house.server.sessions


async def test_kill_by_what_clients_are(house: House) -> None:
    client = house.connect()
    others = [house.connect() for _ in range(4)]
    for other in others:
        await other.call("PING")
    assert await client.call("CLIENT KILL ADDR 127.0.0.1:1001") == b":1\r\n"
    assert await others[0].ended() == b""
    assert await client.call("CLIENT KILL ADDR 127.0.0.1:1002 ID 4") == b":0\r\n"
    assert await client.call("CLIENT KILL LADDR 127.0.0.1:6380 USER default ID 3 TYPE normal") == b":1\r\n"
    assert await others[1].ended() == b""
    assert await client.call("CLIENT KILL TYPE normal") == b":2\r\n"
    assert await others[3].ended() == b""
    assert await client.call("CLIENT KILL TYPE normal SKIPME yes") == b":0\r\n"
    assert await client.call("CLIENT KILL SKIPME no") == b":1\r\n"
    assert await client.ended() == b""


async def test_of_a_filter_given_twice_the_last_counts(house: House) -> None:
    client, other = house.connect(), house.connect()
    await other.call("PING")
    assert await client.call("CLIENT KILL ID 77 ID 2") == b":1\r\n"
    assert await other.ended() == b""
    assert await client.call("CLIENT KILL MAXAGE 99999999999999999999 ID 1") == (
        b"-ERR maxage is not an integer or out of range\r\n"
    )


async def test_kill_by_user(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.call("ACL SETUSER alice on nopass allcommands allkeys")
    assert await other.call("AUTH alice x") == b"+OK\r\n"
    assert b" user=alice " in await client.call("CLIENT LIST ID 2")
    assert await client.call("CLIENT KILL USER alice") == b":1\r\n"
    assert await other.ended() == b""


async def test_flags_say_what_a_client_is_doing(house: House) -> None:
    client, other = house.connect(), house.connect()

    async def flags() -> str:
        found = re.search(r" flags=(\S+) ", (await client.call("CLIENT LIST ID 2")).decode())
        assert found is not None
        return found[1]

    await other.call("CLIENT NO-EVICT on")
    await other.call("CLIENT NO-TOUCH on")
    assert await flags() == "eT"
    await other.call("RESET")
    assert await flags() == "N"
    await other.call("WATCH a")
    await client.call("SET a 1")
    assert await flags() == "d"
    await other.call("MULTI")
    await other.call("GET abc")
    assert await flags() == "xd"
    line = (await client.call("CLIENT LIST ID 2")).decode()
    assert re.search(r" multi=1 watch=1 .* multi-mem=2\d\d ", line)
    await other.call("DISCARD")
    await other.call("MONITOR")
    assert await flags() == "O"


async def test_what_tracking_is_asked_about(house: House) -> None:
    client = house.connect()
    assert await client.call("CLIENT TRACKINGINFO") == (
        b"*6\r\n$5\r\nflags\r\n*1\r\n$3\r\noff\r\n$8\r\nredirect\r\n:-1\r\n$8\r\nprefixes\r\n*0\r\n"
    )
    await client.call("HELLO 3")
    assert await client.call("CLIENT TRACKINGINFO") == (
        b"%3\r\n$5\r\nflags\r\n~1\r\n$3\r\noff\r\n$8\r\nredirect\r\n:-1\r\n$8\r\nprefixes\r\n*0\r\n"
    )


async def test_a_pause_holds_all_commands_for_its_time(
    house: House, autojump_clock: trio.testing.MockClock
) -> None:
    client, other = house.connect(), house.connect()
    assert await client.call("CLIENT PAUSE 3000") == b"+OK\r\n"
    began = trio.current_time()
    # As in Redis, what would end it waits for its end, too.
    assert await other.call("CLIENT UNPAUSE") == b"+OK\r\n"
    assert trio.current_time() - began == pytest.approx(3)
    assert await client.call("PING") == b"+PONG\r\n"
    assert not house.server.guarded


async def test_a_pause_of_writes_holds_no_reads(house: House) -> None:
    client, other = house.connect(), house.connect()
    assert await client.call("CLIENT PAUSE 100000 WRITE") == b"+OK\r\n"
    await other.send("GET a", "SET a 1", "GET a")
    assert await other.arrived() == b"$-1\r\n"
    assert b" flags=b " in await client.call("CLIENT LIST ID 2")
    assert b"\r\nblocked_clients:1\r\n" in await client.call("INFO clients")
    assert await client.call("GET a") == b"$-1\r\n"
    assert await client.call("CLIENT UNPAUSE") == b"+OK\r\n"
    assert await other.arrived() == b"+OK\r\n$1\r\n1\r\n"
    assert b" flags=N " in await client.call("CLIENT LIST ID 2")


async def test_nothing_is_evicted_during_a_pause_of_writes(house: House) -> None:
    client, other = house.connect(), house.connect()
    for number in range(20):
        await client.call([b"SET", b"%d" % number, bytes(1000), b"EX", b"1000"])
    await client.call("CONFIG SET maxmemory-policy volatile-ttl")
    assert await client.call("CLIENT PAUSE 100000 WRITE") == b"+OK\r\n"
    house.server.config.maxmemory = 10_000
    house.server.reconsider()
    await other.send("SET a 1")
    assert await other.arrived() == b""
    assert await client.call("DBSIZE") == b":20\r\n"
    assert await client.call("CLIENT UNPAUSE") == b"+OK\r\n"
    assert await other.reply() == b"+OK\r\n"
    assert len(house.engine.keyspace.values) < 12


async def test_the_stricter_and_longer_pause_counts(
    house: House, autojump_clock: trio.testing.MockClock
) -> None:
    client, other = house.connect(), house.connect()
    began = trio.current_time()
    assert await client.call("CLIENT PAUSE 2000 WRITE") == b"+OK\r\n"
    assert await client.call("CLIENT PAUSE 1000 ALL") == b"+OK\r\n"
    await other.call("PING")
    assert trio.current_time() - began == pytest.approx(2)


async def test_a_paused_client_can_be_killed(house: House) -> None:
    client, other = house.connect(), house.connect()
    await client.call("CLIENT PAUSE 100000 WRITE")
    await other.send("SET a 1")
    await trio.testing.wait_all_tasks_blocked()
    assert await client.call("CLIENT KILL ID 2") == b":1\r\n"
    assert await other.ended() == b""
    await client.call("CLIENT UNPAUSE")
    assert await client.call("GET a") == b"$-1\r\n"


async def test_who_is_killed_is_seen_no_more(house: House) -> None:
    killer, killed = house.connect(), house.connect()
    await killed.call("CLIENT SETNAME victim")
    await killer.send("CLIENT KILL ID 2", "CLIENT LIST", "CLIENT KILL ID 2")
    data = await killer.arrived()
    assert data.startswith(b":1\r\n")
    assert b"victim" not in data
    assert data.endswith(b"\r\n:0\r\n")
    assert await killed.ended() == b""


async def test_a_pause_of_writes_holds_an_exec_that_writes(house: House) -> None:
    client, reader, other = house.connect(), house.connect(), house.connect()
    for one, command in ((client, "SET k v"), (reader, "GET k")):
        await one.call("MULTI")
        await one.call(command)
    await other.call("CLIENT PAUSE 100000 WRITE")
    assert await reader.call("EXEC") == b"*1\r\n$-1\r\n"
    await client.send("EXEC")
    assert await client.arrived() == b""
    assert await other.call("CLIENT UNPAUSE") == b"+OK\r\n"
    assert await client.reply() == b"*1\r\n+OK\r\n"


async def test_a_pause_of_writes_holds_what_would_be_queued(house: House) -> None:
    """As in Redis, whose pause comes before the queue of MULTI."""
    client, other = house.connect(), house.connect()
    await other.call("CLIENT PAUSE 100000 WRITE")
    await client.send("MULTI", "GET k", "SET k v", "EXEC")
    assert await client.arrived() == b"+OK\r\n+QUEUED\r\n"
    assert await other.call("CLIENT UNPAUSE") == b"+OK\r\n"
    assert await client.arrived() == b"+QUEUED\r\n*2\r\n$-1\r\n+OK\r\n"


@pytest.mark.parametrize("requests", [["SET k v"], ["MULTI", "SET k v", "EXEC"]])
async def test_a_write_that_waits_for_room_is_held_by_a_pause_that_began_meanwhile(
    open_house: OpenHouse, requests: list[str]
) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        journal.room = False
        await client.send(*requests)
        await client.arrived()
        await other.call("CLIENT PAUSE 100000 WRITE")
        journal.make_room()
        assert await client.arrived() == b""
        assert await other.call("EXISTS k") == b":0\r\n"
        assert await other.call("CLIENT UNPAUSE") == b"+OK\r\n"
        assert (await client.arrived()).endswith(b"+OK\r\n")
        assert await other.call("EXISTS k") == b":1\r\n"


async def test_who_is_killed_as_a_pause_ends_changes_nothing(house: House) -> None:
    client, other = house.connect(), house.connect()
    assert await client.call("CLIENT ID") == b":1\r\n"
    await other.call("CLIENT PAUSE 100000 WRITE")
    await client.send("SET k 1", "SET l 2")
    assert await client.arrived() == b""
    await other.send("CLIENT UNPAUSE", "CLIENT KILL ID 1", "DBSIZE")
    assert await other.arrived() == b"+OK\r\n:1\r\n:0\r\n"
    assert await other.call("DBSIZE") == b":0\r\n"


async def test_who_is_killed_as_there_is_room_for_its_exec_changes_nothing(open_house: OpenHouse) -> None:
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        client, other = house.connect(), house.connect()
        await client.call("MULTI")
        await client.call("SET k v")
        journal.room = False
        await client.send("EXEC")
        assert await client.arrived() == b""
        journal.make_room()
        house.server.sessions[1].close()
        assert await client.ended() == b""
        assert await other.call("DBSIZE") == b":0\r\n"
