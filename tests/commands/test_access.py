from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from redis import AuthenticationError, Redis
from redis.exceptions import ConnectionError as DisconnectedError
from redis.exceptions import NoPermissionError
from trio.testing import wait_all_tasks_blocked

from engram.access import PROTECTED, Access, file_of_users
from engram.commands import access as access_commands
from engram.commands import session as session_module
from engram.commands.registry import COMMANDS
from engram.config import Config
from engram.files import DiskFiles
from engram.listeners import Reception, listening
from engram.permissions import Rules, all_commands, categories
from tests.commands.conftest import SYNTAX_ERROR, Conversation, Converse, array, bulk, bulks, parse
from tests.conftest import Client, House, ManualJournal, OpenHouse
from tests.crash.server_process import StartError, running_server, start_server

OK, PONG = b"+OK\r\n", b"+PONG\r\n"
WRONG_PASSWORD = b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
NO_AUTHENTICATION = b"-NOAUTH Authentication required.\r\n"
HASH = hashlib.sha256(b"pw").hexdigest()
DEFAULT = "user default on nopass sanitize-payload ~* &* +@all"
NO_FILE = (
    b"-ERR This Redis instance is not configured to use an ACL file. You may want to specify users via the"
    b" ACL SETUSER command and then issue a CONFIG REWRITE (assuming you have a Redis configuration file set)"
    b" in order to store users in the Redis configuration.\r\n"
)

# The replies are those of Redis 8.6.3.
CONVERSATIONS: dict[str, Conversation] = {
    "auth without passwords": (
        (
            "AUTH pw",
            b"-ERR AUTH <password> called without any password configured for the default user."
            b" Are you sure your configuration is correct?\r\n",
        ),
        ("AUTH default pw", OK),
        ("AUTH foo bar", WRONG_PASSWORD),
        ("AUTH a b c", SYNTAX_ERROR),
    ),
    "who am I": (
        ("ACL WHOAMI", bulk("default")),
        ("ACL SETUSER bob on >pw +@all ~*", OK),
        ("AUTH bob no", WRONG_PASSWORD),
        ("ACL WHOAMI", bulk("default")),
        ("AUTH bob pw", OK),
        ("ACL WHOAMI", bulk("bob")),
        ("ACL USERS", bulks("bob", "default")),
        ("RESET", b"+RESET\r\n"),
        ("ACL WHOAMI", bulk("default")),
    ),
    "a user is listed": (
        ("ACL LIST", bulks(DEFAULT)),
        ("ACL SETUSER bob", OK),
        ("ACL LIST", bulks("user bob off sanitize-payload resetchannels -@all", DEFAULT)),
        (
            "ACL SETUSER bob on >pw ~a:* %R~r:* &ch:* +get (+set ~k",
            b"-ERR Unmatched parenthesis in acl selector starting at '(+set'.\r\n",
        ),
        ("ACL SETUSER bob on >pw ~a:* %R~r:* &ch:* +get (+set ~k )", OK),
        (
            "ACL LIST",
            bulks(
                f"user bob on sanitize-payload #{HASH} ~a:* %R~r:* resetchannels &ch:* -@all +get"
                " (~k resetchannels -@all +set)",
                DEFAULT,
            ),
        ),
        ("ACL GETUSER nobody", b"$-1\r\n"),
    ),
    "a wrong rule changes nothing": (
        ("ACL SETUSER bob on foo", b"-ERR Error in ACL SETUSER modifier 'foo': Syntax error\r\n"),
        ("ACL GETUSER bob", b"$-1\r\n"),
        (
            "ACL SETUSER bob +@nosuch",
            b"-ERR Error in ACL SETUSER modifier '+@nosuch': Unknown command or category name in ACL\r\n",
        ),
        ("ACL SETUSER 'a b' on", b"-ERR Usernames can't contain spaces or null characters\r\n"),
        ("ACL SETUSER", b"-ERR wrong number of arguments for 'acl|setuser' command\r\n"),
    ),
    "users are deleted": (
        ("ACL SETUSER bob", OK),
        ("ACL SETUSER carl", OK),
        ("ACL DELUSER nobody", b":0\r\n"),
        ("ACL DELUSER bob default", b"-ERR The 'default' user cannot be removed\r\n"),
        ("ACL DELUSER bob bob nobody carl", b":2\r\n"),
        ("ACL USERS", bulks("default")),
        ("ACL DELUSER", b"-ERR wrong number of arguments for 'acl|deluser' command\r\n"),
    ),
    "categories": (
        ("ACL CAT nosuch", b"-ERR Unknown category 'nosuch'\r\n"),
        ("ACL CAT BITMAP", bulks("setbit", "getbit", "bitcount")),
        (
            "ACL CAT a b",
            b"-ERR unknown subcommand or wrong number of arguments for 'CAT'. Try ACL HELP.\r\n",
        ),
    ),
    "passwords are made": (
        (
            "ACL GENPASS 0",
            b"-ERR ACL GENPASS argument must be the number of bits for the output password, a positive number"
            b" up to 4096\r\n",
        ),
        (
            "ACL GENPASS 4097",
            b"-ERR ACL GENPASS argument must be the number of bits for the output password, a positive number"
            b" up to 4096\r\n",
        ),
        ("ACL GENPASS x", b"-ERR value is not an integer or out of range\r\n"),
        (
            "ACL GENPASS 1 2",
            b"-ERR unknown subcommand or wrong number of arguments for 'GENPASS'. Try ACL HELP.\r\n",
        ),
    ),
    "dry runs": (
        ("ACL SETUSER bob +@all -del ~a:* %R~r:* %W~w:*", OK),
        ("ACL DRYRUN nobody get x", b"-ERR User 'nobody' not found\r\n"),
        ("ACL DRYRUN bob get r:x", OK),
        ("ACL DRYRUN bob get x", bulk("User bob has no permissions to access the 'x' key")),
        ("ACL DRYRUN bob DEL a:x", bulk("User bob has no permissions to run the 'del' command")),
        ("ACL DRYRUN bob mset a:1 1 x 2", bulk("User bob has no permissions to access the 'x' key")),
        ("ACL DRYRUN bob foo", b"-ERR Command 'foo' not found\r\n"),
        ("ACL DRYRUN bob get", b"-ERR wrong number of arguments for 'get' command\r\n"),
        ("ACL DRYRUN bob client", b"-ERR wrong number of arguments for 'client' command\r\n"),
        ("ACL DRYRUN bob client nosuch", b"-ERR Command 'client' not found\r\n"),
        ("ACL DRYRUN bob client kill", b"-ERR wrong number of arguments for 'client|kill' command\r\n"),
        ("ACL SETUSER bob -client|kill", OK),
        (
            "ACL DRYRUN bob client kill x",
            bulk("User bob has no permissions to run the 'client|kill' command"),
        ),
        ("ACL DRYRUN bob", b"-ERR wrong number of arguments for 'acl|dryrun' command\r\n"),
    ),
    "no file": (
        ("ACL SAVE", NO_FILE),
        ("ACL LOAD", NO_FILE),
    ),
    "an empty log": (
        ("ACL LOG", array()),
        ("ACL LOG -1", array()),
        ("ACL LOG RESET", OK),
        ("ACL LOG x", b"-ERR value is not an integer or out of range\r\n"),
        (
            "ACL LOG 1 2",
            b"-ERR unknown subcommand or wrong number of arguments for 'LOG'. Try ACL HELP.\r\n",
        ),
    ),
    "misused": (
        ("ACL", b"-ERR wrong number of arguments for 'acl' command\r\n"),
        ("ACL nosuch", b"-ERR unknown subcommand 'nosuch'. Try ACL HELP.\r\n"),
        ("ACL WHOAMI x", b"-ERR wrong number of arguments for 'acl|whoami' command\r\n"),
        ("ACL GETUSER", b"-ERR wrong number of arguments for 'acl|getuser' command\r\n"),
        ("ACL HELP x", b"-ERR wrong number of arguments for 'acl|help' command\r\n"),
    ),
    "a user with few rights": (
        ("SET x v", OK),
        ("ACL SETUSER bob on nopass +@all -del ~a:* %R~r:* %W~w:*", OK),
        ("AUTH bob whatever", OK),
        ("DEL a:1", b"-NOPERM User bob has no permissions to run the 'del' command\r\n"),
        ("GET x", b"-NOPERM No permissions to access a key\r\n"),
        ("GET w:1", b"-NOPERM No permissions to access a key\r\n"),
        ("SET w:1 a", OK),
        ("SET w:1 a GET", b"-NOPERM No permissions to access a key\r\n"),
        ("GET r:1", b"$-1\r\n"),
        ("MSET a:1 1 x 2", b"-NOPERM No permissions to access a key\r\n"),
        ("NOSUCH", b"-ERR unknown command 'NOSUCH'\r\n"),
        ("DEL", b"-ERR wrong number of arguments for 'del' command\r\n"),
        ("ACL SETUSER bob -@all +client|id", OK),
        ("CLIENT NOSUCH", b"-ERR unknown subcommand 'NOSUCH'. Try CLIENT HELP.\r\n"),
        ("CLIENT KILL x", b"-NOPERM User bob has no permissions to run the 'client|kill' command\r\n"),
        ("ACL WHOAMI", b"-NOPERM User bob has no permissions to run the 'acl|whoami' command\r\n"),
        ("RESET", b"+RESET\r\n"),
        ("GET x", bulk("v")),
    ),
    "what is queued is checked": (
        ("ACL SETUSER bob on nopass +@all -del ~a", OK),
        ("AUTH bob whatever", OK),
        ("MULTI", OK),
        ("DEL a", b"-NOPERM User bob has no permissions to run the 'del' command\r\n"),
        ("EXEC", b"-EXECABORT Transaction discarded because of previous errors.\r\n"),
        ("MULTI", OK),
        ("GET x", b"-NOPERM No permissions to access a key\r\n"),
        ("EXEC", b"-EXECABORT Transaction discarded because of previous errors.\r\n"),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_conversation(converse: Converse, name: str) -> None:
    await converse(CONVERSATIONS[name])


async def test_what_was_queued_is_checked_again(house: House) -> None:
    """In the words of Redis 8."""
    client, other = house.connect(), house.connect()
    await other.call("ACL SETUSER bob on nopass ~* +@all")
    for request in ("AUTH bob x", "MULTI", "GET a", "SET b 1", "PING"):
        await client.call(request)
    await other.call("ACL SETUSER bob resetkeys ~a -ping")
    changed = (
        b"-NOPERM ACLs rules changed between the moment the transaction was accumulated and the EXEC call."
        b" This command is no longer allowed for the following reason: no permission to "
    )
    assert await client.call("EXEC") == array(
        b"$-1\r\n",
        changed + b"touch the specified keys\r\n",
        changed + b"execute the command or subcommand\r\n",
    )
    assert b"b" not in house.engine.keyspace.values


async def test_who_waits_is_checked_again(house: House) -> None:
    client, other = house.connect(), house.connect()
    await other.call("ACL SETUSER bob on nopass ~* +@all")
    await client.call("AUTH bob x")
    await other.call("CLIENT PAUSE 100000 WRITE")
    await client.send("SET a 1", "SET b 1")
    assert await client.arrived() == b""
    await other.call("ACL SETUSER bob resetkeys ~b")
    await other.call("CLIENT UNPAUSE")
    assert await client.arrived() == b"-NOPERM No permissions to access a key\r\n" + OK
    assert house.engine.keyspace.values == {b"b": b"1"}


async def test_a_user_in_detail(house: House) -> None:
    client = house.connect()
    await client.call("ACL SETUSER bob on >pw ~a:* %R~r:* &ch:* +get -@dangerous")
    await client.send([b"ACL", b"SETUSER", b"bob", b"(+set ~k)"])
    assert await client.reply() == OK
    parts = {
        "flags": bulks("on", "sanitize-payload"),
        "passwords": bulks(HASH),
        "commands": bulk("-@all +get -@dangerous"),
        "keys": bulk("~a:* %R~r:*"),
        "channels": bulk("&ch:*"),
    }
    selector = b"".join(map(bulk, ("commands", "-@all +set", "keys", "~k", "channels", "")))
    body = b"".join(bulk(name) + value for name, value in parts.items()) + bulk("selectors")
    assert await client.call("ACL GETUSER bob") == b"*12\r\n" + body + array(b"*6\r\n" + selector)
    await client.call("HELLO 3")
    body = body.replace(bulk("flags") + b"*", bulk("flags") + b"~")
    assert await client.call("ACL GETUSER bob") == b"%6\r\n" + body + array(b"%3\r\n" + selector)


async def test_all_categories(client: Client) -> None:
    known = parse(await client.call("ACL CAT"))
    assert known[:3] == [b"keyspace", b"read", b"write"]
    assert known[-1] == b"vectorset"
    assert len(known) == len(set(known)) == 22
    for category in known:
        names = parse(await client.call([b"ACL", b"CAT", category]))
        listed = parse(await client.call([b"COMMAND", b"LIST", b"FILTERBY", b"ACLCAT", category]))
        assert names == listed


def test_every_category_of_a_command_is_known() -> None:
    known = {f"@{category}" for category in categories(COMMANDS)}
    for command in all_commands(COMMANDS):
        assert set(command.categories) <= known
        assert {"@fast", "@slow"} & set(command.categories)


async def test_help(client: Client) -> None:
    lines = parse(await client.call("ACL HELP"))
    assert lines[0] == b"ACL <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"
    assert len(lines) == 29


@pytest.mark.parametrize(("bits", "digits"), [("", 64), ("5", 2), ("4", 1), ("4096", 1024)])
async def test_made_passwords(client: Client, bits: str, digits: int) -> None:
    first, second = [parse(await client.call(f"ACL GENPASS {bits}")) for _ in range(2)]
    assert re.fullmatch(rb"[0-9a-f]+", first)
    assert len(first) == digits
    assert first != second or digits < 3


@pytest.mark.parametrize("version", [2, 3])
async def test_the_log(house: House, version: int) -> None:
    client = house.connect()
    await client.call(f"HELLO {version}")
    await client.call("ACL SETUSER bob on >pw +get +hello ~k")
    await client.call("AUTH bob no")
    await client.call(f"HELLO {version} AUTH nobody no")
    await client.call(f"HELLO {version} AUTH bob pw")
    for request in ("GET x", "DEL k", "get x"):
        assert (await client.call(request)).startswith(b"-NOPERM ")
    reader = house.connect()
    await reader.call(f"HELLO {version}")
    reply = await reader.call("ACL LOG")
    assert reply.startswith(b"*4\r\n%10\r\n" if version == 3 else b"*4\r\n*20\r\n")
    entries = [
        entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        for entry in parse(reply)
    ]
    assert [b" ".join(entry) for entry in entries] == [
        b"count reason context object username age-seconds client-info entry-id timestamp-created"
        b" timestamp-last-updated"
    ] * 4
    assert [(e[b"entry-id"], e[b"reason"], e[b"object"], e[b"username"], e[b"count"]) for e in entries] == [
        (2, b"key", b"x", b"bob", 2),
        (3, b"command", b"del", b"bob", 1),
        (1, b"auth", b"HELLO", b"nobody", 1),
        (0, b"auth", b"AUTH", b"bob", 1),
    ]
    for entry in entries:
        assert entry[b"context"] == b"toplevel"
        assert 0 <= float(entry[b"age-seconds"]) < 5
        assert entry[b"timestamp-created"] <= entry[b"timestamp-last-updated"]
        assert entry[b"client-info"].startswith(b"id=1 addr=127.0.0.1:1000 ")
    assert b" cmd=get user=bob " in entries[0][b"client-info"]
    assert b" cmd=del user=bob " in entries[1][b"client-info"]
    assert await reader.call("ACL LOG RESET") == OK
    assert await reader.call("ACL LOG") == array()


async def test_a_long_log_is_shown_in_turns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_commands, "_ENTRIES_A_TURN", 2)
    client = house.connect()
    for number in range(7):
        await client.call(f"AUTH nobody{number} x")
    entries = parse(await client.call("ACL LOG"))
    assert [entry[9] for entry in entries] == [b"nobody%d" % number for number in reversed(range(7))]
    assert len(parse(await client.call("ACL LOG 3"))) == 3
    await client.call("MULTI")
    await client.call("ACL LOG 7")
    assert len(parse(await client.call("EXEC"))[0]) == 7


async def test_many_users_are_listed_by_name(house: House) -> None:
    client = house.connect()
    for number in range(300):
        house.server.access.put(b"u%03d" % number, Rules())
    listed = parse(await client.call("ACL LIST"))
    assert listed[0] == DEFAULT.encode()
    assert listed[1:] == [
        b"user u%03d off sanitize-payload resetchannels -@all" % number for number in range(300)
    ]


async def test_a_change_holds_at_once_for_connected_clients(house: House) -> None:
    operator, client = house.connect(), house.connect()
    await operator.call("ACL SETUSER bob on >pw +@all ~*")
    await client.call("AUTH bob pw")
    assert await client.call("SET k v") == OK
    assert not house.server.sessions[2].guarded
    await operator.call("ACL SETUSER bob -set")
    assert house.server.sessions[2].guarded
    assert (await client.call("SET k v")).startswith(b"-NOPERM ")
    # As in Redis, who is in stays in.
    await operator.call("ACL SETUSER bob off resetpass +set")
    assert await client.call("SET k v") == OK
    assert await client.call("AUTH bob pw") == WRONG_PASSWORD
    assert b" user=bob " in await operator.call("CLIENT LIST")


async def test_who_is_deleted_is_disconnected(house: House) -> None:
    operator, client, other = house.connect(), house.connect(), house.connect()
    await operator.call("ACL SETUSER bob on nopass +@all ~*")
    await client.call("AUTH bob x")
    assert await other.call("PING") == PONG
    assert await operator.call("ACL DELUSER bob") == b":1\r\n"
    assert await client.ended() == b""
    assert await other.call("PING") == PONG


async def test_who_is_deleted_carries_nothing_out_that_was_on_its_way(house: House) -> None:
    operator, client = house.connect(), house.connect()
    await operator.call("ACL SETUSER bob on nopass +@all ~*")
    await client.call("AUTH bob x")
    await operator.call("PING")
    session = house.server.sessions[2]
    house.server.access.delete(b"bob")
    house.server.review_sessions()
    assert session.guarded
    assert not session.authenticated


async def test_of_many_sessions_none_does_anything_before_it_follows(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that ask for nothing end, or are let in, in further turns."""
    monkeypatch.setattr(session_module, "_FOLLOWING_A_TURN", 1)
    operator, first, second, third = (house.connect() for _ in range(4))
    await operator.call("ACL SETUSER bob on nopass +@all ~*")
    for client in (first, second, third):
        await client.call("AUTH bob x")
    sessions = [house.server.sessions[number] for number in (2, 3, 4)]
    house.server.access.delete(b"bob")
    house.server.review_sessions()
    assert [session.id in house.server.sessions for session in sessions] == [False, True, True]
    assert [(session.guarded, session.authenticated) for session in sessions] == [(True, False)] * 3
    await third.send("SET k v", "AUTH default x", "SET k v")
    for client in (first, second, third):
        assert await client.ended() == b""
    assert len(house.database.engine.keyspace) == 0
    assert await operator.call("PING") == PONG
    await operator.call("ACL SETUSER default >secret")
    strangers = [house.connect() for _ in range(3)]
    for stranger in strangers:
        assert await stranger.call("PING") == NO_AUTHENTICATION
    await operator.call("ACL SETUSER default nopass")
    for stranger in strangers:
        assert await stranger.call("PING") == PONG


async def test_a_change_of_users_is_followed_while_the_server_shuts_down(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task can be begun any more."""
    monkeypatch.setattr(session_module, "_FOLLOWING_A_TURN", 1)
    clients = [house.connect() for _ in range(3)]
    for client in clients:
        await client.call("ACL SETUSER bob on nopass +@all ~*")
        await client.call("AUTH bob x")

    def refuse(job: object) -> None:
        raise RuntimeError("Nursery is closed to new arrivals")

    house.server.start_soon = refuse
    house.server.access.delete(b"bob")
    house.server.review_sessions()
    assert not house.server.sessions


async def test_an_exec_that_waits_is_not_carried_out_for_a_user_that_is_gone(
    open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_FOLLOWING_A_TURN", 1)
    journal = ManualJournal(automatic=True)
    async with open_house(journal) as house:
        operator, client, other = house.connect(), house.connect(), house.connect()
        await operator.call("ACL SETUSER bob on nopass +@all ~*")
        for each in (other, client):
            await each.call("AUTH bob x")
        await client.send("MULTI", "SET k v")
        assert await client.reply() == OK
        assert await client.reply() == b"+QUEUED\r\n"
        journal.room = False
        await client.send("EXEC")
        await wait_all_tasks_blocked()
        house.server.start_soon = lambda job: None
        house.server.sessions[3], house.server.sessions[2] = (
            house.server.sessions.pop(3),
            house.server.sessions.pop(2),
        )
        house.server.access.delete(b"bob")
        house.server.review_sessions()
        assert house.server.sessions[2].stale
        journal.make_room()
        assert await client.ended() == b""
        assert journal.records == []


async def test_who_deletes_itself_is_told_so(house: House) -> None:
    client = house.connect()
    await client.call("ACL SETUSER bob on nopass +@all ~*")
    await client.call("AUTH bob x")
    await client.send("ACL DELUSER bob", "SET k v")
    assert await client.ended() == b":1\r\n"
    assert len(house.database.engine.keyspace) == 0


def keeping(house: House, path: Path, *, automatic: bool, files: DiskFiles | None = None) -> Access:
    """Lets the users of a house be kept in a file."""
    access = Access(COMMANDS, path=path, automatic=automatic, files=files)
    house.server.access = access
    return access


async def test_changes_are_kept_before_they_are_answered(house: House, tmp_path: Path) -> None:
    path = tmp_path / "users.acl"
    keeping(house, path, automatic=True)
    client = house.connect()
    assert await client.call("ACL SETUSER bob on >pw ~k +get") == OK
    line = f"user bob on sanitize-payload #{HASH} ~k resetchannels -@all +get\n"
    assert path.read_text() == line
    assert await client.call("ACL SETUSER carl") == OK
    assert path.read_text() == line + "user carl off sanitize-payload resetchannels -@all\n"
    assert await client.call("ACL DELUSER bob nobody") == b":1\r\n"
    assert path.read_text() == "user carl off sanitize-payload resetchannels -@all\n"
    assert await client.call("ACL SETUSER default -flushall") == OK
    assert path.read_text().splitlines()[1].endswith(" +@all -flushall")
    assert await client.call("ACL SAVE") == OK
    assert await client.call("MULTI") == OK
    assert await client.call("ACL SETUSER x") == b"+QUEUED\r\n"
    assert await client.call("EXEC") == array(OK)
    assert path.read_text().endswith("\nuser x off sanitize-payload resetchannels -@all\n")


async def test_many_change_users_at_once(house: House, tmp_path: Path) -> None:
    path = tmp_path / "users.acl"
    access = keeping(house, path, automatic=True)
    clients = [house.connect() for _ in range(8)]
    for number, client in enumerate(clients):
        await client.send(
            f"ACL SETUSER u{number} on", "ACL SETUSER shared ~k", f"ACL SETUSER shared ~{number}"
        )
    for client in clients:
        assert [await client.reply() for _ in range(3)] == [OK] * 3
    assert path.read_bytes() == file_of_users(access.kept())
    assert len(access.users) == 10
    assert len(access.users[b"shared"].rules.root.keys) == 9


class FailingDisk(DiskFiles):
    """A disk that takes no new file."""

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        raise OSError(28, "No space left on device")


async def test_a_change_that_cannot_be_kept_is_not_made(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "users.acl"
    access = keeping(house, path, automatic=True, files=FailingDisk())
    access.put(b"carl", Rules())
    client = house.connect()
    error = (
        b"-ERR There was an error trying to save the ACLs. Please check the server logs for more"
        b" information\r\n"
    )
    for request in ("ACL SETUSER bob on", "ACL DELUSER carl", "ACL SAVE"):
        assert await client.call(request) == error
    assert set(access.users) == {b"default", b"carl"}
    assert f"cannot save users to {path}: No space left on device" in caplog.text


async def test_users_are_saved_and_loaded(house: House, tmp_path: Path) -> None:
    path = tmp_path / "people"
    keeping(house, path, automatic=False)
    client, other = house.connect(), house.connect()
    missing = f"-ERR Error loading ACLs, opening file '{path}': No such file or directory\r\n".encode()
    assert await client.call("ACL LOAD") == missing
    assert await client.call("ACL SETUSER bob on nopass +@all ~*") == OK
    assert not path.exists()
    assert await client.call("ACL SAVE") == OK
    assert path.read_text() == f"user bob on nopass sanitize-payload ~* resetchannels +@all\n{DEFAULT}\n"
    assert await other.call("AUTH bob x") == OK
    assert await client.call("ACL SETUSER bob -set") == OK
    assert await client.call("ACL LOAD") == OK
    assert await other.call("SET k v") == OK
    path.write_text("user bob on foo\n")
    refusal = (
        f"-ERR {path}:1: Syntax error. WARNING: ACL errors detected, no change to the previously active ACL"
        " rules was performed\r\n"
    )
    assert await client.call("ACL LOAD") == refusal.encode()
    assert await other.call("SET k v") == OK
    path.write_text("user carl on\n")
    assert await client.call("ACL LOAD") == OK
    assert await other.ended() == b""
    assert await client.call("ACL USERS") == bulks("carl", "default")


async def test_a_pipe_is_no_file_of_users(house: House, tmp_path: Path) -> None:
    """Nobody waits for who might write into it."""
    path = tmp_path / "people"
    os.mkfifo(path)
    keeping(house, path, automatic=False)
    client = house.connect()
    error = f"-ERR Error loading ACLs, opening file '{path}': Not a regular file\r\n".encode()
    assert await client.call("ACL LOAD") == error


async def test_before_authentication(house: House) -> None:
    house.server.access.require(b"secret")
    client = house.connect()
    hello = (
        b"-NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto>"
        b" AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol"
        b" version at the same time\r\n"
    )
    for request, reply in {
        "PING": NO_AUTHENTICATION,
        "GET k": NO_AUTHENTICATION,
        "ACL WHOAMI": NO_AUTHENTICATION,
        "MULTI": NO_AUTHENTICATION,
        "NOSUCH": b"-ERR unknown command 'NOSUCH'\r\n",
        "GET": b"-ERR wrong number of arguments for 'get' command\r\n",
        "HELLO": hello,
        "HELLO 3": hello,
        "HELLO 3 SETNAME x": hello,
        "HELLO 5": b"-NOPROTO unsupported protocol version\r\n",
        "HELLO 3 AUTH default no": WRONG_PASSWORD,
        "AUTH no": WRONG_PASSWORD,
        "AUTH default no": WRONG_PASSWORD,
        "AUTH nobody secret": WRONG_PASSWORD,
        "RESET": b"+RESET\r\n",
    }.items():
        assert (request, await client.call(request)) == (request, reply)
    assert await client.call("AUTH secret") == OK
    assert await client.call("PING") == PONG
    assert await client.call("RESET") == b"+RESET\r\n"
    assert await client.call("PING") == NO_AUTHENTICATION
    assert (await client.call("HELLO 3 AUTH default secret")).startswith(b"%7\r\n")
    assert await client.call("PING") == PONG
    other = house.connect()
    assert await other.call("QUIT") == OK
    assert await other.ended() == b""


async def test_who_came_while_a_password_was_needed_is_let_in_while_none_is(house: House) -> None:
    """As Redis 8 does: who came in while none was needed stays in."""
    access = house.server.access

    def require(password: bytes) -> None:
        access.require(password)
        house.server.review_sessions()

    require(b"secret")
    waiting = house.connect()
    assert await waiting.call("PING") == NO_AUTHENTICATION
    require(b"")
    assert await waiting.call("PING") == PONG
    assert (await waiting.call("HELLO")).startswith(b"-NOAUTH HELLO must be called")
    inside = house.connect()
    assert await inside.call("PING") == PONG
    require(b"secret")
    assert await waiting.call("PING") == NO_AUTHENTICATION
    assert await inside.call("PING") == PONG


async def test_protected_mode(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    server = house.server
    shutdown, ready = trio.Event(), trio.Event()
    with listening(Config(port=0)) as listeners:
        host, port = listeners[0].address
        house.nursery.start_soon(Reception(server, listeners, 100).run, shutdown, ready.set)
        await ready.wait()

        async def connect() -> Client:
            client = Client(await trio.open_tcp_stream(host, port))
            house.nursery.start_soon(client.read)
            return client

        local = await connect()
        assert await local.call("PING") == PONG
        monkeypatch.setattr("engram.access._is_loopback", lambda address: address != host)
        assert await (await connect()).ended() == PROTECTED
        assert await local.call("CONFIG SET protected-mode no") == OK
        assert await (await connect()).call("PING") == PONG
        assert await local.call("CONFIG SET protected-mode yes") == OK
        server.access.require(b"secret")
        assert await (await connect()).call("AUTH secret") == OK
        assert server.statistics.connections_rejected == 1
        shutdown.set()


def outcome(client: Redis, *words: str) -> object:
    """A reply, or the class of the error."""
    try:
        return client.execute_command(*words)
    except (AuthenticationError, NoPermissionError, DisconnectedError) as error:
        return type(error)


def test_users_outlive_the_server(tmp_path: Path) -> None:
    folder = str(tmp_path / "data")
    with running_server("--dir", folder) as server:
        operator = server.client()
        assert operator.acl_setuser("bob", enabled=True, passwords=["+pw"], commands=["+get"], keys=["k"])
        assert operator.acl_setuser("carl", enabled=True, nopass=True)
        assert operator.acl_deluser("carl") == 1
    server = start_server("--dir", folder)
    try:
        operator, bob = server.client(), server.client(username="bob", password="pw")
        assert operator.acl_users() == ["bob", "default"]
        assert outcome(bob, "GET", "k") is None
        assert outcome(bob, "GET", "x") is NoPermissionError
        assert operator.acl_setuser("dora", enabled=True, nopass=True, commands=["+ping"])
        server.kill()
    finally:
        server.close()
    with running_server("--dir", folder, "--requirepass", "secret") as server:
        assert outcome(server.client(), "PING") is AuthenticationError
        operator = server.client(password="secret")
        assert operator.acl_users() == ["bob", "default", "dora"]
        assert operator.config_set("requirepass", "other")
        assert outcome(server.client(password="other"), "PING") is True
        assert outcome(server.client(password="secret"), "PING") is AuthenticationError
        assert operator.config_set("requirepass", "")
        assert outcome(server.client(), "PING") is True


def test_users_of_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "engram.conf"
    path.write_text(
        f"# a comment\nport 0\nuser bob on #{HASH} +get ~k\\* # no comment\nuser carl on >'two words' +ping\n"
    )
    with pytest.raises(
        StartError, match="Error in user declaration 'bob': The password hash must be exactly"
    ):
        start_server(module=("engram", str(path)))
    path.write_text(f'user bob on #{HASH} +get ~k\\*\nuser carl on ">two words" +ping\n')
    server = start_server(module=("engram", str(path)))
    try:
        bob = server.client(username="bob", password="pw")
        assert outcome(bob, "GET", "k*") is None
        assert outcome(bob, "GET", "kk") is NoPermissionError
        assert outcome(server.client(username="carl", password="two words"), "PING") is True
        assert server.terminate() == 0
    finally:
        server.close()
