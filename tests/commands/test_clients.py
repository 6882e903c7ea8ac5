from __future__ import annotations

import re

import pytest

from engram import REDIS_VERSION
from tests.commands.conftest import Conversation, Converse
from tests.conftest import House

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
        r" db=0 sub=0 psub=0 ssub=0 multi=-1 watch=0 qbuf=0 qbuf-free=0 obl=0 oll=0 omem=0 tot-mem=0"
        r" events=r cmd=\S+ user=default redir=-1 resp=3 lib-name=tests lib-ver=1.2\n\r\n",
        info,
    )
    listed = (await other.call("CLIENT LIST")).decode()
    assert re.findall(r"\bid=\d+", listed) == ["id=1", "id=2"]
    assert listed.startswith("$")
    for request, ids in {
        "CLIENT LIST ID 2": ["id=2"],
        "CLIENT LIST ID 1 7 2 1": ["id=1", "id=2"],
        "CLIENT LIST TYPE normal": ["id=1", "id=2"],
        "CLIENT LIST TYPE pubsub": [],
    }.items():
        assert re.findall(r"\bid=\d+", (await client.call(request)).decode()) == ids


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
