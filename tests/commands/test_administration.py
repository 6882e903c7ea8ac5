from __future__ import annotations

import re
import time
from pathlib import Path

import attrs
import hiredis
import pytest
import trio
import trio.testing

from engram.commands import configuration
from engram.commands.session import StorageStatus
from engram.config import SETTINGS, Config, load_config
from engram.errors import ConfigError, SnapshotError
from tests.commands.conftest import Conversation, Converse
from tests.conftest import House, OpenHouse

CONVERSATIONS: dict[str, Conversation] = {
    "dbsize and flushing": (
        ("DBSIZE", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("SET b 1", b"+OK\r\n"),
        ("DBSIZE", b":2\r\n"),
        ("FLUSHALL foo", b"-ERR syntax error\r\n"),
        ("FLUSHALL sync async", b"-ERR syntax error\r\n"),
        ("DBSIZE", b":2\r\n"),
        ("FLUSHDB ASYNC", b"+OK\r\n"),
        ("DBSIZE", b":0\r\n"),
        ("SET a 1", b"+OK\r\n"),
        ("FLUSHALL SYNC", b"+OK\r\n"),
        ("DBSIZE", b":0\r\n"),
        ("DBSIZE x", b"-ERR wrong number of arguments for 'dbsize' command\r\n"),
    ),
    "config set": (
        ("CONFIG SET maxclients 1000", b"+OK\r\n"),
        ("CONFIG SET MAXCLIENTS 1001 appendfsync everysec", b"+OK\r\n"),
        ("CONFIG SET appendfsync always", b"+OK\r\n"),
        ([b"CONFIG", b"SET", b"save", b""], b"+OK\r\n"),
    ),
    "config set misused": (
        ("CONFIG SET nosuch 1", b"-ERR Unknown option or number of arguments for CONFIG SET - 'nosuch'\r\n"),
        ("CONFIG SET nosuch", b"-ERR wrong number of arguments for 'config|set' command\r\n"),
        ("CONFIG SET maxclients", b"-ERR wrong number of arguments for 'config|set' command\r\n"),
        (
            "CONFIG SET maxclients a",
            b"-ERR CONFIG SET failed (possibly related to argument 'maxclients') - argument "
            b"couldn't be parsed into an integer\r\n",
        ),
        ("CONFIG SET maxclients 10 x", b"-ERR syntax error\r\n"),
        (
            "CONFIG SET maxclients 10 maxclients 10",
            b"-ERR CONFIG SET failed (possibly related to argument 'maxclients') - duplicate parameter\r\n",
        ),
        (
            "CONFIG SET databases 1",
            b"-ERR CONFIG SET failed (possibly related to argument 'databases') - can't set "
            b"immutable config\r\n",
        ),
        (
            "CONFIG SET maxclients 10 nosuch 1",
            b"-ERR Unknown option or number of arguments for CONFIG SET - 'nosuch'\r\n",
        ),
        (
            "CONFIG SET maxclients 10 databases 1",
            b"-ERR CONFIG SET failed (possibly related to argument 'databases') - can't set "
            b"immutable config\r\n",
        ),
    ),
    "config subcommands": (
        ("CONFIG", b"-ERR wrong number of arguments for 'config' command\r\n"),
        ("CONFIG FOO", b"-ERR unknown subcommand 'FOO'. Try CONFIG HELP.\r\n"),
        ("CONFIG RESETSTAT", b"+OK\r\n"),
        ("CONFIG RESETSTAT x", b"-ERR wrong number of arguments for 'config|resetstat' command\r\n"),
        ("CONFIG HELP x", b"-ERR wrong number of arguments for 'config|help' command\r\n"),
    ),
    "shutdown misused": (
        ("SHUTDOWN foo", b"-ERR syntax error\r\n"),
        ("SHUTDOWN ABORT", b"-ERR No shutdown in progress.\r\n"),
        ("SHUTDOWN ABORT NOW", b"-ERR syntax error\r\n"),
        ("SHUTDOWN SAVE NOSAVE", b"-ERR syntax error\r\n"),
    ),
    "no replicas, cluster and modules": (
        ("REPLICAOF no one", b"+OK\r\n"),
        ("SLAVEOF NO ONE", b"+OK\r\n"),
        ("REPLICAOF a b", b"-ERR Invalid master port\r\n"),
        ("REPLICAOF a 65536", b"-ERR Invalid master port\r\n"),
        ("REPLICAOF a 6379", b"-ERR replication is not supported\r\n"),
        *(
            (request, b"-ERR This instance has cluster support disabled\r\n")
            for request in (
                "CLUSTER INFO",
                "CLUSTER SLOTS",
                "CLUSTER KEYSLOT a",
                "READONLY",
                "READWRITE",
                "ASKING",
            )
        ),
        ("CLUSTER FOO", b"-ERR unknown subcommand 'FOO'. Try CLUSTER HELP.\r\n"),
        ("CLUSTER INFO x", b"-ERR wrong number of arguments for 'cluster|info' command\r\n"),
        ("MODULE LIST", b"*0\r\n"),
        ("MODULE FOO", b"-ERR unknown subcommand 'FOO'. Try MODULE HELP.\r\n"),
    ),
    "role, debug and lolwut": (
        ("ROLE", b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"),
        ("ROLE x", b"-ERR wrong number of arguments for 'role' command\r\n"),
        ("DEBUG", b"-ERR wrong number of arguments for 'debug' command\r\n"),
        (
            "DEBUG SLEEP 0",
            b'-ERR DEBUG command not allowed. If the enable-debug-command option is set to "local", you can'
            b" run it from a local connection, otherwise you need to set this option in the configuration"
            b" file, and then restart the server.\r\n",
        ),
        ("LOLWUT VERSION a", b"-ERR value is not an integer or out of range\r\n"),
        ("BGREWRITEAOF", b"-ERR persistence not enabled; start with a data dir\r\n"),
        ("BGREWRITEAOF x", b"-ERR wrong number of arguments for 'bgrewriteaof' command\r\n"),
        ("CONFIG REWRITE", b"-ERR The server is running without a config file\r\n"),
        ("CONFIG REWRITE x", b"-ERR wrong number of arguments for 'config|rewrite' command\r\n"),
    ),
    "numbers of arguments": (
        ("TIME x", b"-ERR wrong number of arguments for 'time' command\r\n"),
        ("LASTSAVE x", b"-ERR wrong number of arguments for 'lastsave' command\r\n"),
        ("SAVE x", b"-ERR wrong number of arguments for 'save' command\r\n"),
        ("BGSAVE foo", b"-ERR syntax error\r\n"),
        ("BGSAVE SCHEDULE x", b"-ERR syntax error\r\n"),
    ),
}


@pytest.mark.parametrize("topic", CONVERSATIONS)
async def test_replies(topic: str, converse: Converse) -> None:
    await converse(CONVERSATIONS[topic])


NOT_PERSISTENT = b"-ERR persistence not enabled; start with a data dir\r\n"


@attrs.define
class Status:
    """What a storage tells about itself."""

    appended_lsn: int = 12
    durable_lsn: int = 11
    queued_bytes: int = 0
    batches: int = 3
    last_fsync_seconds: float = 0.002
    log_file: int = 4
    log_bytes: int = 1000
    allocation_error: str = ""
    snapshot_running: bool = False
    last_save_time: int = 1_700_000_000
    last_save_ok: bool = True
    last_save_error: str = ""
    last_save_seconds: float = 1.6
    cleanup_error: str = ""
    changes_since_save: int = 7


class Snapshots:
    """A storage whose snapshots last until `finish` is set and end in `error`, when there is one."""

    def __init__(self) -> None:
        self.held = Status()
        self.requested = 0
        self.finish = trio.Event()
        self.error = ""

    @property
    def status(self) -> StorageStatus:
        return self.held

    async def snapshot(self) -> None:
        await self.finish.wait()
        if self.error:
            raise SnapshotError(self.error)

    def request_snapshot(self) -> None:
        self.requested += 1


@pytest.mark.parametrize("command", ["SAVE", "VSAVE"])
async def test_save_answers_when_the_snapshot_is_made(open_house: OpenHouse, command: str) -> None:
    storage = Snapshots()
    async with open_house(storage=storage) as house:
        client, other = house.connect(), house.connect()
        await client.send("PING", command, "PING")
        assert await client.arrived() == b"+PONG\r\n"
        assert await other.call("SET k v") == b"+OK\r\n"
        storage.finish.set()
        assert await client.arrived() == b"+OK\r\n+PONG\r\n"


@pytest.mark.parametrize("command", ["SAVE", "VSAVE"])
async def test_a_snapshot_that_fails_is_an_error(open_house: OpenHouse, command: str) -> None:
    storage = Snapshots()
    storage.error = "No space left on device"
    storage.finish.set()
    async with open_house(storage=storage) as house:
        client = house.connect()
        assert await client.call(command) == b"-ERR save failed: No space left on device\r\n"
        assert await client.call("PING") == b"+PONG\r\n"


async def test_bgsave_and_lastsave(open_house: OpenHouse) -> None:
    storage = Snapshots()
    async with open_house(storage=storage) as house:
        client = house.connect()
        assert await client.call("BGSAVE") == b"+Background saving started\r\n"
        assert await client.call("BGSAVE SCHEDULE") == b"+Background saving started\r\n"
        assert storage.requested == 2
        storage.held.snapshot_running = True
        assert await client.call("BGSAVE") == b"-ERR Background save already in progress\r\n"
        assert storage.requested == 2
        assert await client.call("LASTSAVE") == b":1700000000\r\n"


async def test_nothing_to_save_to(house: House) -> None:
    client = house.connect()
    for command in ("SAVE", "VSAVE", "BGSAVE"):
        assert await client.call(command) == NOT_PERSISTENT
    assert await client.call("LASTSAVE") == b":1800000000\r\n"
    assert await client.call("VSAVE x") == b"-ERR wrong number of arguments for 'vsave' command\r\n"


async def test_shutdown_is_not_answered(house: House) -> None:
    client = house.connect()
    await client.send("PING", "SHUTDOWN NOSAVE", "PING")
    assert await client.ended() == b"+PONG\r\n"
    assert house.shutdown.is_set()


@pytest.mark.parametrize("version", [2, 3])
async def test_config_get(house: House, version: int) -> None:
    client = house.connect()
    await client.call(f"HELLO {version}")
    header = {2: b"*%d\r\n", 3: b"%%%d\r\n"}[version]
    fields = 2 if version == 2 else 1
    assert await client.call("CONFIG GET nosuch") == header % 0
    assert await client.call("CONFIG GET save") == header % fields + b"$4\r\nsave\r\n$0\r\n\r\n"
    assert await client.call("CONFIG GET save MAXCLIENT[S] save") == (
        header % (2 * fields) + b"$4\r\nsave\r\n$0\r\n\r\n$10\r\nmaxclients\r\n$4\r\n1024\r\n"
    )
    reader = hiredis.Reader()
    reader.feed(await client.call("CONFIG GET *"))
    found = reader.gets()
    assert set(found if version == 3 else found[::2]) == {name.encode() for name in (*SETTINGS, "appendonly")}


async def test_appendonly_follows_from_the_storage(open_house: OpenHouse) -> None:
    for storage, value in ((None, b"$2\r\nno\r\n"), (Snapshots(), b"$3\r\nyes\r\n")):
        async with open_house(storage=storage) as house:
            reply = await house.connect().call("CONFIG GET appendonly")
            assert reply == b"*2\r\n$10\r\nappendonly\r\n" + value


async def test_config_set_takes_all_or_nothing(house: House) -> None:
    client = house.connect()
    configured: list[str] = []
    house.server.reconfigure = lambda: configured.append(house.server.config.appendfsync)
    assert await client.call("CONFIG SET appendfsync no maxclients 0") == (
        b"-ERR CONFIG SET failed (possibly related to argument 'maxclients')"
        b" - argument must be between 1 and 1000000 inclusive\r\n"
    )
    assert house.server.config.appendfsync == "always"
    assert configured == []
    assert await client.call("CONFIG SET appendfsync no maxclients 5") == b"+OK\r\n"
    assert house.server.config.maxclients == 5
    assert configured == ["no"]
    assert await client.call("CONFIG SET client-output-buffer-limit 64mb") == b"+OK\r\n"
    assert house.server.config.client_output_buffer_limit == 64 << 20
    assert (await client.call([b"CONFIG", b"SET", b"save", b"60 1"])).startswith(b"-ERR CONFIG SET failed")


async def test_config_set_is_undone_when_it_cannot_be(house: House) -> None:
    def refuse() -> None:
        raise ConfigError("Unable to update TLS configuration.")

    client = house.connect()
    house.server.reconfigure = refuse
    assert await client.call("CONFIG SET maxclients 7 tls-cert-file nosuch") == (
        b"-ERR CONFIG SET failed (possibly related to argument 'tls-cert-file')"
        b" - Unable to update TLS configuration.\r\n"
    )
    assert house.server.config.maxclients == 1024
    assert house.server.config.tls_cert_file == ""


async def test_config_rewrite(open_house: OpenHouse, tmp_path: Path) -> None:
    path = tmp_path / "engram.conf"
    path.write_text("# mine\nmaxclients 9\n")
    async with open_house(config=load_config([str(path)])) as house:
        client = house.connect()
        await client.call("CONFIG SET maxclients 10 slowlog-max-len 5")
        assert await client.call("CONFIG REWRITE") == b"+OK\r\n"
        assert path.read_text() == (
            "# mine\nmaxclients 10\n# Generated by CONFIG REWRITE\nslowlog-max-len 5\n"
        )
        house.server.config.file = str(tmp_path / "nosuch" / "engram.conf")
        assert await client.call("CONFIG REWRITE") == (
            b"-ERR Rewriting config file: No such file or directory\r\n"
        )


async def test_files_are_rewritten_one_at_a_time(
    open_house: OpenHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CONFIG REWRITE, by ACL SAVE and by both, whoever asks."""
    path = tmp_path / "engram.conf"
    path.write_text("# mine\n")
    active = most = 0
    limits: list[int] = []
    go_on = trio.Event()

    def rewrite(config: Config) -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        trio.from_thread.run(go_on.wait)
        limits.append(config.maxclients)
        active -= 1

    def save(content: bytes) -> None:
        rewrite(house.server.config)

    monkeypatch.setattr(configuration, "rewrite", rewrite)
    async with open_house(config=load_config([str(path)])) as house, trio.open_nursery() as nursery:
        house.server.access.path = path
        monkeypatch.setattr(house.server.access, "save", save)
        for number in range(4):
            client = house.connect()
            await client.call(f"CONFIG SET maxclients {100 + number}")
            nursery.start_soon(client.call, "CONFIG REWRITE" if number % 2 else "ACL SAVE")
            await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert most == 1
    # Each writes what holds when its turn comes.
    assert limits == [103] * 4


async def test_bgrewriteaof_makes_a_snapshot(open_house: OpenHouse) -> None:
    storage = Snapshots()
    async with open_house(storage=storage) as house:
        client = house.connect()
        assert await client.call("BGREWRITEAOF") == b"+Background append only file rewriting started\r\n"
        assert storage.requested == 1
        storage.held.snapshot_running = True
        assert await client.call("BGREWRITEAOF") == (
            b"-ERR Background append only file rewriting already in progress\r\n"
        )


async def test_lolwut_tells_the_version(house: House) -> None:
    assert b"Redis ver. " in await house.connect().call("LOLWUT VERSION 5 1")


async def test_time(house: House) -> None:
    before = time.time()
    reply = await house.connect().call("TIME")
    match = re.fullmatch(rb"\*2\r\n\$10\r\n(\d+)\r\n\$\d\r\n(\d{1,6})\r\n", reply)
    assert match is not None
    assert before - 1 <= int(match[1]) + int(match[2]) / 1e6 <= time.time() + 1


async def test_flushing_drops_indices(house: House) -> None:
    client = house.connect()
    await client.call("VNEW a 2")
    await client.call("SET k v EX 100")
    assert await client.call("FLUSHALL") == b"+OK\r\n"
    assert await client.call("DBSIZE") == b":0\r\n"
    assert house.engine.indices == {}
    assert house.engine.keyspace.next_expiry() is None
