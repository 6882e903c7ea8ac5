"""redis-py, the synchronous client."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.cache import CacheConfig
from redis.exceptions import (
    AuthenticationError,
    ExecAbortError,
    NoPermissionError,
    ResponseError,
    WatchError,
)

from tests.crash.server_process import HOST, ServerProcess, running_server, wait_until

BINARY_KEY = bytes(range(256))


def test_default_settings(server: ServerProcess) -> None:
    """No option but the port: RESP3, with retries and maintenance notifications."""
    with Redis(port=server.port) as client:
        assert client.ping()
        assert client.set("key", "value")
        assert client.get("key") == b"value"
        assert client.client_info()["resp"] == "3"


def test_from_url(server: ServerProcess, protocol: int) -> None:
    with redis.from_url(f"redis://{HOST}:{server.port}/0?protocol={protocol}") as client:
        assert client.ping()
        assert client.client_info()["resp"] == str(protocol)


def test_another_database(server: ServerProcess, client: Redis, protocol: int) -> None:
    """As redis://host/1 has it."""
    with Redis.from_url(f"redis://{HOST}:{server.port}/1", protocol=protocol) as other:
        assert other.set("key", "of database 1")
        assert client.get("key") is None
        assert other.move("key", 0)
        assert client.get("key") == b"of database 1"
    with (
        server.client(db=16, protocol=protocol) as refused,
        pytest.raises(ResponseError, match="out of range"),
    ):
        refused.ping()


def test_strings(client: Redis) -> None:
    assert client.get("missing") is None
    assert client.set("key", "value")
    assert client.get("key") == b"value"
    assert client.set("key", "other", nx=True) is None
    assert client.set("key", "other", xx=True, get=True) == b"value"
    assert client.append("key", "!") == 6
    assert client.strlen("key") == 6
    assert client.delete("key", "missing") == 1
    assert client.exists("key") == 0


def test_counters(client: Redis) -> None:
    assert client.incr("counter") == 1
    assert client.incrby("counter", 41) == 42
    assert client.decr("counter") == 41
    assert client.decrby("counter", 40) == 1
    assert client.get("counter") == b"1"
    client.set("text", "many")
    with pytest.raises(ResponseError, match=r"^value is not an integer or out of range$"):
        client.incr("text")
    client.set("counter", (1 << 63) - 1)
    with pytest.raises(ResponseError, match=r"^increment or decrement would overflow$"):
        client.incr("counter")


def test_expiry(client: Redis) -> None:
    assert client.ttl("missing") == -2
    assert client.set("key", "value")
    assert client.ttl("key") == -1
    assert client.expire("key", 100)
    assert client.ttl("key") in (99, 100)
    assert 99_000 < client.pttl("key") <= 100_000
    assert not client.expire("key", 200, nx=True)
    assert client.expire("key", 200, gt=True)
    assert client.persist("key")
    at = int(time.time()) + 1000
    assert client.expireat("key", at)
    assert client.expiretime("key") == at
    assert client.pexpiretime("key") == at * 1000
    assert client.set("key", "kept", keepttl=True)
    assert client.expiretime("key") == at
    assert client.set("key", "value", ex=50)
    assert client.ttl("key") in (49, 50)
    assert client.expire("key", -1)
    assert client.get("key") is None


def test_keyspace(client: Redis) -> None:
    names = {b"key:%d" % number for number in range(1000)}
    with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.set(name, name)
        pipeline.execute()
    client.execute_command("VNEW", "index", 4)
    assert client.dbsize() == 1001
    assert set(client.scan_iter(match="key:*", count=70)) == names
    assert sorted(client.scan_iter()) == sorted([*names, b"index"])
    assert list(client.scan_iter(_type="vectorset")) == [b"index"]
    assert set(client.keys("key:99?")) == {b"key:99%d" % digit for digit in range(10)}
    assert client.type("index") == b"vectorset"
    assert client.type("key:1") == b"string"
    assert client.type("missing") == b"none"
    with pytest.raises(ResponseError, match=r"^WRONGTYPE "):
        client.get("index")
    assert client.unlink("index") == 1
    assert client.flushdb()
    assert client.keys() == []


def test_binary_keys_and_values(client: Redis) -> None:
    value = bytes(reversed(BINARY_KEY)) * 5000
    assert client.set(BINARY_KEY, value)
    assert client.get(BINARY_KEY) == value
    assert client.set(b"", b"")
    assert client.get(b"") == b""
    assert sorted(client.keys()) == [b"", BINARY_KEY]


def test_decode_responses(server: ServerProcess, protocol: int) -> None:
    with server.client(protocol=protocol, decode_responses=True) as client:
        assert client.set("ключ", "значение")
        assert client.get("ключ") == "значение"
        assert client.keys() == ["ключ"]
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        client.execute_command("VNEW", "index", 2)
        found = client.execute_command("VINFO", "index")
        assert found[:6] == ["dim", "2", "metric", "cosine", "count", "0"]


def test_config(client: Redis) -> None:
    assert client.config_get("bind") == {"bind": HOST}
    assert client.config_get("no-such-setting") == {}
    assert {"maxclients", "max-unindexed-rows"} <= client.config_get("max*").keys()
    assert client.config_set("maxclients", 512)
    assert client.config_get("maxclients") == {"maxclients": "512"}
    assert client.config_set("maxclients", 1024)
    with pytest.raises(ResponseError, match="Unknown option"):
        client.config_set("no-such-setting", 1)
    with pytest.raises(ResponseError, match="immutable"):
        client.config_set("port", 1)
    assert client.config_resetstat()


def test_info(client: Redis, server: ServerProcess) -> None:
    client.set("key", "value")
    info: dict[str, Any] = client.info()
    assert info["redis_version"] == "8.4.0"
    assert info["tcp_port"] == server.port
    assert info["process_id"] == server.pid
    assert (info["loading"], info["cluster_enabled"], info["arch_bits"]) == (0, 0, 64)
    assert info["db0"]["keys"] == 1
    assert client.info("clients")["connected_clients"] >= 1
    assert "redis_version" not in client.info("clients")


def test_client_commands(client: Redis, server: ServerProcess, protocol: int) -> None:
    assert client.client_setname("tester")
    assert text(client.client_getname()) == "tester"
    info = client.client_info()
    assert int(info["id"]) == client.client_id()
    assert info["name"] == "tester"
    assert info["resp"] == str(protocol)
    assert str(info["lib-name"]).startswith("redis-py")
    with server.client(client_name="victim") as victim:
        identity = victim.client_id()
        assert names_by_id(client)[identity] == "victim"
        assert client.client_kill_filter(_id=identity) == 1
        wait_until(lambda: identity not in names_by_id(client), "the victim to be gone")
        # redis-py sees that its connection is closed, and makes another.
        assert victim.client_id() > identity


def names_by_id(client: Redis) -> dict[int, str]:
    return {int(each["id"]): each["name"] for each in client.client_list()}


def test_command(client: Redis) -> None:
    table = client.command()
    assert len(table) == client.command_count()
    assert table["get"]["arity"] == 2
    assert table["vsearch"]["first_key_pos"] == 1
    assert "readonly" in table["vsearch"]["flags"]
    assert {"get", "vadd"} <= {text(name) for name in client.command_list()}
    assert list(map(text, client.command_getkeys("VADD", "index", "row", "vector"))) == ["index"]
    docs = client.execute_command("COMMAND DOCS", "vsearch")
    assert b"vsearch" in docs


def text(name: bytes | str | None) -> str | None:
    return name.decode() if isinstance(name, bytes) else name


def test_server_commands(client: Redis) -> None:
    seconds, microseconds = client.time()
    assert abs(seconds - time.time()) < 60
    assert 0 <= microseconds < 1_000_000
    assert client.echo("hello") == b"hello"
    assert client.lastsave() is not None
    with pytest.raises(ResponseError, match="persistence not enabled"):
        client.save()


def test_before_the_first_snapshot_the_last_one_is_the_start(tmp_path: Path, protocol: int) -> None:
    with running_server("--dir", str(tmp_path)) as server, server.client(protocol=protocol) as client:
        saved = client.lastsave()
        assert saved is not None
        assert saved.timestamp() == client.info("persistence")["rdb_last_save_time"]


def test_errors_leave_the_connection_usable(client: Redis) -> None:
    with pytest.raises(ResponseError, match=r"^unknown command 'FOOBAR', with args beginning with: 'x' $"):
        client.execute_command("FOOBAR", "x")
    with pytest.raises(ResponseError, match=r"^wrong number of arguments for 'get' command$"):
        client.execute_command("GET")
    assert client.ping()


def test_pipeline(client: Redis) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for request in (("SET", "key", 1), ("INCR", "key"), ("GET", "key"), ("NOSUCH",), ("DEL", "key")):
            pipeline.execute_command(*request)
        replies = pipeline.execute(raise_on_error=False)
    assert replies[:3] == [True, 2, b"2"]
    assert isinstance(replies[3], ResponseError)
    assert replies[4:] == [1]


def test_pipeline_of_a_hundred_thousand_commands(client: Redis) -> None:
    count = 100_000
    with client.pipeline(transaction=False) as pipeline:
        for _ in range(count):
            pipeline.incr("counter")
        assert pipeline.execute() == list(range(1, count + 1))


def test_threads_share_a_connection_pool(server: ServerProcess, protocol: int) -> None:
    threads, rounds = 8, 200
    pool = ConnectionPool(host=HOST, port=server.port, protocol=protocol, max_connections=threads)
    client = Redis(connection_pool=pool)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for index in range(rounds):
                client.incr("together")
                client.set(f"{number}:{index}", number)
                assert client.get(f"{number}:{index}") == b"%d" % number
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert client.get("together") == b"%d" % (threads * rounds)
    assert client.dbsize() == threads * rounds + 1
    pool.disconnect()


def test_transaction(client: Any) -> None:
    with client.pipeline() as pipeline:
        pipeline.set("key", 1).incr("key").get("key")
        assert pipeline.execute() == [True, 2, b"2"]
        pipeline.set("key", "text").incr("key").get("key")
        with pytest.raises(ResponseError, match="value is not an integer or out of range"):
            pipeline.execute()
        assert client.get("key") == b"text"
        pipeline.set("key", "unset").execute_command("GET")
        with pytest.raises(ResponseError, match="wrong number of arguments for 'get' command"):
            pipeline.execute()
        assert client.get("key") == b"text"
        assert pipeline.set("key", "later").execute() == [True]


def test_an_error_while_queueing_discards_the_transaction(server: ServerProcess, protocol: int) -> None:
    with server.client(protocol=protocol, single_connection_client=True) as client:
        assert client.execute_command("MULTI")
        with pytest.raises(ResponseError, match="unknown command 'FOOBAR'"):
            client.execute_command("FOOBAR")
        with pytest.raises(ExecAbortError, match="because of previous errors"):
            client.execute_command("EXEC")
        with pytest.raises(ResponseError, match=r"^EXEC without MULTI$"):
            client.execute_command("EXEC")


def test_watched_key_changes(client: Any) -> None:
    client.set("key", 1)
    with client.pipeline() as pipeline:
        pipeline.watch("key")
        value = int(pipeline.get("key"))
        client.set("key", 10)
        pipeline.multi()
        pipeline.set("key", value + 1)
        with pytest.raises(WatchError):
            pipeline.execute()
    assert client.get("key") == b"10"
    tries = []

    def increment(pipeline: Any) -> None:
        value = int(pipeline.get("key"))
        tries.append(value)
        if len(tries) == 1:
            client.set("key", 20)
        pipeline.multi()
        pipeline.set("key", value + 1)

    assert client.transaction(increment, "key") == [True]
    assert tries == [10, 20]
    assert client.get("key") == b"21"


def test_threads_increment_in_transactions(server: ServerProcess, protocol: int) -> None:
    threads, rounds = 4, 25
    pool = BlockingConnectionPool(host=HOST, port=server.port, protocol=protocol, max_connections=2 * threads)
    client = Redis(connection_pool=pool)

    def increment(pipeline: Any) -> None:
        value = int(pipeline.get("watched") or 0)
        pipeline.multi()
        pipeline.set("watched", value + 1)

    def work() -> None:
        for _ in range(rounds):
            client.transaction(increment, "watched")

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert client.get("watched") == b"%d" % (threads * rounds)
    pool.disconnect()


def test_client_side_caching_is_refused(server: ServerProcess) -> None:
    client = server.client(protocol=3, cache_config=CacheConfig())
    with pytest.raises(ResponseError, match="client-side caching is not supported"):
        client.get("key")
    client.close()


def test_more_strings(client: Redis) -> None:
    assert client.mset({"a": 1, "b": "two"})
    assert client.mget("a", "missing", "b") == [b"1", None, b"two"]
    assert not client.msetnx({"a": 2, "c": 3})
    assert client.execute_command("GETSET", "a", 5) == b"1"
    assert client.getdel("b") == b"two"
    assert client.getex("a", ex=100) == b"5"
    assert client.ttl("a") in (99, 100)
    assert client.execute_command("SETEX", "c", 100, "x")
    assert client.execute_command("PSETEX", "c", 100_000, "x")
    assert not client.execute_command("SETNX", "c", "y")
    assert client.setrange("c", 3, "z") == 4
    assert client.getrange("c", 0, -1) == b"x\0\0z"
    assert client.incrbyfloat("a", 0.25) == 5.25
    assert client.setbit("bits", 9, 1) == 0
    assert client.getbit("bits", 9) == 1
    assert client.bitcount("bits", 0, 0) == 0
    with pytest.raises(ResponseError, match=r"^value is not a valid float$"):
        client.incrbyfloat("c", 1)


def test_more_keys(client: Any) -> None:
    client.set("key", "value", ex=100)
    assert client.rename("key", "renamed")
    with pytest.raises(ResponseError, match=r"^no such key$"):
        client.rename("key", "renamed")
    assert client.copy("renamed", "copied")
    assert not client.renamenx("copied", "renamed")
    assert client.ttl("copied") in (99, 100)
    assert client.randomkey() in (b"copied", b"renamed")
    assert client.touch("copied", "missing") == 1
    assert client.object("ENCODING", "copied") in (b"embstr", "embstr")
    assert client.memory_usage("copied") > 0
    assert client.select(0)
    assert client.swapdb(0, 1)
    assert client.dbsize() == 0
    assert client.swapdb(0, 1)
    with pytest.raises(ResponseError, match=r"^DB index is out of range$"):
        client.swapdb(0, 16)


def test_passwords_and_permissions(server: ServerProcess, client: Any, protocol: int) -> None:
    assert client.acl_whoami() in (b"default", "default")
    assert client.acl_setuser(
        "reader", enabled=True, passwords=["+secret"], keys=["public:*"], commands=["+get", "+@connection"]
    )
    try:
        user = client.acl_getuser("reader")
        assert user is not None
        assert "on" in user["flags"]
        assert {text(name) for name in client.acl_users()} == {"default", "reader"}
        assert "string" in {text(category) for category in client.acl_cat()}
        with server.client(username="reader", password="secret", protocol=protocol) as reader:
            assert reader.get("public:key") is None
            with pytest.raises(NoPermissionError):
                reader.get("private:key")
            with pytest.raises(NoPermissionError):
                reader.set("public:key", 1)
        with (
            server.client(username="reader", password="wrong", protocol=protocol) as stranger,
            pytest.raises(AuthenticationError),
        ):
            stranger.ping()
    finally:
        assert client.acl_deluser("reader") == 1


def test_monitor(server: ServerProcess, client: Redis) -> None:
    with server.client().monitor() as monitor:
        client.set("key", "a value")
        command = monitor.next_command()
        while command["command"] != "SET key a value":
            command = monitor.next_command()
    assert command["client_address"] == HOST
    assert command["db"] == 0


def test_slow_log(client: Any) -> None:
    before = client.config_get("slowlog-log-slower-than")
    assert client.config_set("slowlog-log-slower-than", 0)
    try:
        assert client.slowlog_reset()
        client.get("slow")
        assert b"GET slow" in [entry["command"] for entry in client.slowlog_get(10)]
        assert client.slowlog_len() >= 1
    finally:
        client.config_set("slowlog-log-slower-than", before["slowlog-log-slower-than"])


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
def test_vectors(client: Redis, metric: str) -> None:
    rows = np.random.default_rng(11).standard_normal((50, 16)).astype("<f4")
    query = rows[7] * np.float32(0.5)
    assert client.execute_command("VNEW", "index", 16, "METRIC", metric) in (b"OK", True)
    for number, row in enumerate(rows):
        assert client.execute_command("VADD", "index", f"row-{number}", row.tobytes()) == 1
    assert client.execute_command("VADD", "index", "row-0", rows[0].tobytes()) == 0
    assert client.execute_command("VINFO", "index")[:6] == [
        *(b"dim", b"16"),
        *(b"metric", metric.encode()),
        *(b"count", b"50"),
    ]
    found = client.execute_command("VSEARCH", "index", query.tobytes(), 5)
    expected = exact_distances(metric, query, rows)
    nearest = np.argsort(expected, kind="stable")[:5]
    assert found[::2] == [b"row-%d" % number for number in nearest]
    assert [float(word) for word in found[1::2]] == pytest.approx(expected[nearest].tolist(), abs=1e-5)
    assert client.execute_command("VSEARCH", "index", query.tobytes(), 5, "EF", 200) == found
    assert client.execute_command("VSEARCH", "index", query.tobytes(), 0) == []
    assert client.execute_command("VDEL", "index", found[0]) == 1
    assert client.execute_command("VDEL", "index", found[0]) == 0
    assert client.execute_command("VSEARCH", "index", query.tobytes(), 5)[0] == found[2]


def test_attributes_and_filters(client: Redis) -> None:
    client.execute_command("VNEW", "index", 2, "METRIC", "l2")
    rows = [(f"row-{n}", blob(n, 0), f'{{"n": {n}}}') for n in range(20)]
    words = [word for row in rows for word in row]
    assert client.execute_command("VMADD", "index", *words, "ATTRS") == 20
    assert client.execute_command("VCOUNT", "index") == 20
    assert client.execute_command("VCOUNT", "index", "FILTER", ".n % 2 == 0") == 10
    asked = ("VSEARCH", "index", blob(0, 0), 2, "FILTER", ".n > 10")
    assert client.execute_command(*asked) == [b"row-11", b"11", b"row-12", b"12"]
    assert client.execute_command(*asked, "WITHATTRS", "WITHVECTORS") == [
        *(b"row-11", b"11", b'{"n": 11}', blob(11, 0)),
        *(b"row-12", b"12", b'{"n": 12}', blob(12, 0)),
    ]
    assert client.execute_command("VDELBY", "index", "FILTER", ".n > 10 or .n == 3") == 10
    assert client.execute_command("VSEARCH", "index", blob(20, 0), 1, "WITHATTRS") == [
        *(b"row-10", b"10", b'{"n": 10}')
    ]
    with pytest.raises(ResponseError, match=r"^syntax error in FILTER expression near: "):
        client.execute_command("VCOUNT", "index", "FILTER", ".n >")


def test_the_clients_own_methods_for_attributes(client: Redis) -> None:
    client.execute_command("VNEW", "index", 2)
    client.execute_command("VADD", "index", "row", blob(1, 2))
    assert client.vset().vsetattr("index", "row", {"year": 1999})
    assert client.vset().vgetattr("index", "row") == {"year": 1999}
    assert not client.vset().vsetattr("index", "nobody", {})
    assert client.vset().vgetattr("index", "nobody") is None


def test_batches_and_scans(client: Redis) -> None:
    client.execute_command("VNEW", "index", 2, "METRIC", "l2")
    words = [word for n in range(100) for word in (f"row-{n}", blob(n, 0))]
    assert client.execute_command("VMADD", "index", *words) == 100
    assert client.execute_command("VMADD", "index", *words, "new", blob(0, 1)) == 1
    queries = [blob(5.25, 0), blob(98, 0)]
    assert client.execute_command("VMSEARCH", "index", 2, 2, *queries) == [
        [b"row-5", b"0.25", b"row-6", b"0.75"],
        [b"row-98", b"0", b"row-97", b"1"],
    ]
    assert client.execute_command("VGET", "index", "row-7") == blob(7, 0)
    assert client.execute_command("VMGET", "index", "row-7", "nobody") == [blob(7, 0), None]
    found, cursor = set(), b"0"
    while True:
        cursor, keys = client.execute_command("VSCAN", "index", cursor, "COUNT", 13)
        found.update(keys)
        if cursor == b"0":
            break
    assert found == {b"new", *(b"row-%d" % n for n in range(100))}
    assert client.execute_command("VLIST") == [b"index"]


def test_a_pipeline_of_everything(client: Redis) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for request in (
            (
                "VNEW",
                "index",
                1,
                "METRIC",
                "l2",
                "M",
                8,
                "EF_CONSTRUCTION",
                40,
                "QUANT",
                "f32",
                "RECALL",
                0.9,
            ),
            ("VMADD", "index", "a", blob(1), '{"n": 1}', "b", blob(2), '{"n": 2}', "c", blob(3), "", "ATTRS"),
            ("VSEARCH", "index", blob(0), 9),
            ("VSETATTR", "index", "c", '{"n": 3}'),
            ("VDELBY", "index", "FILTER", ".n >= 2"),
            ("VMSEARCH", "index", 9, 1, blob(0), "EXACT"),
            ("VOPTIMIZE", "index"),
            ("VSEARCH", "index", blob(0), 9, "WITHATTRS"),
            ("VCOUNT", "index"),
            ("VDEL", "index", "a"),
            ("VSCAN", "index", 0),
            ("VLIST",),
        ):
            pipeline.execute_command(*request)
        assert pipeline.execute() == [
            b"OK",
            3,
            [b"a", b"1", b"b", b"2", b"c", b"3"],
            1,
            2,
            [[b"a", b"1"]],
            b"OK",
            [b"a", b"1", b'{"n": 1}'],
            1,
            1,
            [b"0", []],
            [b"index"],
        ]


def test_parameters_and_attributes_survive_a_restart(tmp_path: Path, protocol: int) -> None:
    options = ("METRIC", "dot", "M", 24, "EF_CONSTRUCTION", 99, "QUANT", "int8", "RECALL", 0.875)

    def state(client: Redis) -> Any:
        info = client.execute_command("VINFO", "index")
        names = (b"metric", b"m", b"ef-construction", b"quant", b"recall", b"count")
        fields = [info[info.index(name) + 1] for name in names]
        rows = client.execute_command("VSEARCH", "index", blob(1, 1), 9, "WITHATTRS", "WITHVECTORS")
        return fields, rows

    with running_server("--dir", str(tmp_path)) as server, server.client(protocol=protocol) as client:
        client.execute_command("VNEW", "index", 2, *options)
        words = [word for n in range(9) for word in (f"row-{n}", blob(n, 0), f'{{"n": {n}}}')]
        client.execute_command("VMADD", "index", *words, "ATTRS")
        client.execute_command("VADD", "index", "row-1", blob(7, 7))
        client.execute_command("VSETATTR", "index", "row-2", "")
        client.execute_command("VDELBY", "index", "FILTER", ".n == 3")
        before = state(client)
    assert before[0] == [b"dot", b"24", b"99", b"int8", b"0.875", b"8"]
    assert before[1][:4] == [b"row-1", b"-14", b'{"n": 1}', blob(7, 7)]
    for save in (False, True):
        with running_server("--dir", str(tmp_path)) as server, server.client(protocol=protocol) as client:
            assert state(client) == before
            if save:
                client.execute_command("VSAVE")
                client.execute_command("VOPTIMIZE", "index")
    with running_server("--dir", str(tmp_path)) as server, server.client(protocol=protocol) as client:
        assert state(client) == before


def blob(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


def exact_distances(metric: str, query: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> Any:
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.linalg.norm(rows - query, axis=1)
    products = rows @ query
    if metric == "dot":
        return -products
    return 1 - products / (np.linalg.norm(rows, axis=1) * np.linalg.norm(query))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("VNEW", "index", 4), "^index already exists$"),
        (("VNEW", "other", 0), "^dimension must be a positive integer$"),
        (("VNEW", "other", 4, "METRIC", "hamming"), "^unknown metric$"),
        (("VNEW", "other", 4, "METRIC"), "^syntax error$"),
        (("VADD", "missing", "row", bytes(16)), "^no such index$"),
        (("VADD", "index", "row", b"odd"), "^invalid vector encoding$"),
        (("VADD", "index", "row", bytes(12)), "^wrong vector dimension: index expects 4, got 3$"),
        (("VADD", "string", "row", bytes(16)), "^WRONGTYPE "),
        (("VSEARCH", "index", bytes(16), "ten"), "^value is not an integer or out of range$"),
        (("VSEARCH", "index", bytes(16), 1, "EF"), "^syntax error$"),
        (("VDEL", "missing", "row"), "^no such index$"),
        (("VINFO", "missing"), "^no such index$"),
        (
            ("VMADD", "index", "a", bytes(16), "b", bytes(12)),
            "^wrong vector dimension: index expects 4, got 3$",
        ),
        (("VMADD", "index", "a", bytes(16), "b"), "^wrong number of arguments for 'vmadd' command$"),
        (("VMSEARCH", "index", 1, 2, bytes(16)), "^syntax error$"),
        (("VSEARCH", "index", bytes(16), 1, "RADIUS", "far"), "^value is not a valid float$"),
        (("VSCAN", "index", "x"), "^invalid cursor$"),
        (("VGET", "missing", "row"), "^no such index$"),
        (("VSAVE",), "^persistence not enabled; start with a data dir$"),
    ],
)
def test_vector_errors(request_: tuple[str | bytes | int, ...], message: str, client: Redis) -> None:
    client.execute_command("VNEW", "index", 4)
    client.set("string", "value")
    with pytest.raises(ResponseError, match=message):
        client.execute_command(*request_)
