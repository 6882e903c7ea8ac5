"""redis-cli: single commands, what it reads from standard input, its scans, and its prompt."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from tests.crash.server_process import DEADLINE_SECONDS, HOST, ServerProcess

Run = Callable[..., str]

_COLUMNS = 120
_ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(params=[(), ("-3",)], ids=["RESP2", "RESP3"])
def cli(request: pytest.FixtureRequest, redis_cli: str, server: ServerProcess) -> Run:
    """Runs redis-cli with arguments, in each protocol; returns what it prints."""

    def run(*arguments: str, stdin: bytes = b"") -> str:
        command = [redis_cli, "-p", str(server.port), *request.param, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=DEADLINE_SECONDS, check=True)
        assert done.stderr == b""
        return done.stdout.decode()

    return run


def test_commands(cli: Run) -> None:
    assert cli("ping") == "PONG\n"
    assert cli("set", "key", "value") == "OK\n"
    assert cli("get", "key") == "value\n"
    assert cli("incr", "counter") == "1\n"
    assert cli("--no-raw", "incr", "counter") == "(integer) 2\n"
    assert cli("--no-raw", "get", "missing") == "(nil)\n"
    assert cli("foobar", "x") == "ERR unknown command 'foobar', with args beginning with: 'x' \n\n"


def test_quoted_arguments(cli: Run) -> None:
    assert cli("--quoted-input", "set", '"\\x00\\xff"', "binary") == "OK\n"
    assert cli("--no-raw", "keys", "*") == '1) "\\x00\\xff"\n'


def test_value_from_standard_input(cli: Run) -> None:
    assert cli("-x", "set", "key", stdin=b"from a pipe") == "OK\n"
    assert cli("get", "key") == "from a pipe\n"


def test_commands_from_standard_input(cli: Run) -> None:
    lines = b"SET key 'a value'\nGET key\nINCR counter\nFOOBAR\nPING\n"
    replies = cli(stdin=lines).splitlines()
    assert replies[:3] == ["OK", "a value", "1"]
    assert replies[3].startswith("ERR unknown command 'FOOBAR'")
    assert replies[-1] == "PONG"


def test_vectors(cli: Run) -> None:
    assert cli("vnew", "colours", "3", "metric", "l2") == "OK\n"
    for name, vector in (
        ("red", '"\\x00\\x00\\x80?\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00"'),
        ("blue", '"\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x80?"'),
    ):
        assert cli("--quoted-input", "vadd", "colours", name, vector) == "1\n"
    query = '"\\x00\\x00\\x80?\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00"'
    assert cli("--quoted-input", "vsearch", "colours", query, "2").splitlines()[:3] == ["red", "0", "blue"]
    assert cli("vinfo", "colours").splitlines()[:6] == ["dim", "3", "metric", "l2", "count", "2"]


def test_attributes_and_filters(cli: Run) -> None:
    cli("vnew", "words", "1", "metric", "l2")
    for number, letters in enumerate(("AAAA", "BBBB", "CCCC")):
        assert cli("vmadd", "words", letters.lower(), letters, f'{{"n": {number}}}', "attrs") == "1\n"
    assert cli("vcount", "words", "filter", ".n >= 1") == "2\n"
    found = cli("vsearch", "words", "CCCC", "1", "filter", ".n < 2", "withattrs", "withvectors").splitlines()
    assert [found[0], *found[2:]] == ["bbbb", '{"n": 1}', "BBBB"]
    assert cli("vgetattr", "words", "cccc") == '{"n": 2}\n'
    assert cli("--no-raw", "vgetattr", "words", "nobody") == "(nil)\n"
    assert cli("vdelby", "words", "filter", ".n >= 1") == "2\n"
    assert cli("vscan", "words", "0").splitlines() == ["0", "aaaa"]
    assert cli("vmget", "words", "aaaa", "bbbb").splitlines() == ["AAAA", ""]


def test_scan(cli: Run) -> None:
    keys = {f"key:{number}" for number in range(500)}
    cli(stdin=b"".join(f"SET {key} value\n".encode() for key in sorted(keys)))
    cli("vnew", "index", "4")
    assert set(cli("--scan").split()) == keys | {"index"}
    assert set(cli("--scan", "--pattern", "key:49?").split()) == {f"key:49{digit}" for digit in range(10)}


def test_bigkeys(cli: Run) -> None:
    cli("set", "small", "x")
    cli("set", "big", "x" * 1000)
    report = cli("--bigkeys")
    assert "Biggest string found '\"big\"' has 1000 bytes" in report
    assert "Sampled 2 keys in the keyspace!" in report


def test_bigkeys_counts_what_else_there_is(cli: Run) -> None:
    cli("set", "text", "x")
    cli("vnew", "colours", "3")
    assert "Sampled 2 keys in the keyspace!" in cli("--bigkeys")


def test_memkeys(cli: Run) -> None:
    cli("set", "small", "x")
    cli("set", "big", "x" * 100_000)
    report = cli("--memkeys")
    assert re.search(r"Biggest string found '\"big\"' has 1\d{5} bytes", report), report


def test_transaction_from_standard_input(cli: Run) -> None:
    lines = b"MULTI\nSET key 1\nINCR key\nEXEC\nMULTI\nSET key 5\nNOSUCH\nEXEC\nGET key\n"
    printed = cli(stdin=lines).splitlines()
    assert printed[:5] == ["OK", "QUEUED", "QUEUED", "OK", "2"]
    assert "EXECABORT Transaction discarded because of previous errors." in printed
    assert printed[-1] == "2"


def test_password(cli: Run) -> None:
    cli("acl", "setuser", "reader", "on", ">secret", "~*", "+@all")
    try:
        assert cli("--no-auth-warning", "--user", "reader", "-a", "secret", "acl", "whoami") == "reader\n"
    finally:
        assert cli("acl", "deluser", "reader") == "1\n"


def test_mass_insertion(cli: Run) -> None:
    count = 10_000
    requests = b"".join(
        b"*3\r\n$3\r\nSET\r\n$%d\r\n%d\r\n$5\r\nvalue\r\n" % (len(str(number)), number)
        for number in range(count)
    )
    report = cli("--pipe", stdin=requests)
    assert report.splitlines()[-1] == f"errors: 0, replies: {count}"
    assert cli("dbsize") == f"{count}\n"


def test_mass_insertion_reports_errors(redis_cli: str, server: ServerProcess) -> None:
    command = [redis_cli, "-p", str(server.port), "--pipe"]
    requests = b"SET key text\r\nINCR key\r\nGET key\r\n"
    done = subprocess.run(command, input=requests, capture_output=True, timeout=DEADLINE_SECONDS)
    assert done.returncode == 1
    assert b"value is not an integer or out of range" in done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == b"errors: 1, replies: 3"


def test_monitor(cli: Run, redis_cli: str, server: ServerProcess, tmp_path: Path) -> None:
    with interactive([redis_cli, "-p", str(server.port), "monitor"], tmp_path, endless=True) as terminal:
        terminal.expect("OK\r\n")
        cli("set", "key", 'a "quoted" value')
        terminal.expect('] "set" "key" "a \\"quoted\\" value"\r\n')


def test_stat(redis_cli: str, server: ServerProcess, tmp_path: Path) -> None:
    with server.client() as client:
        client.set("key", "value")
    command = [redis_cli, "-p", str(server.port), "--stat", "-i", "0.05"]
    with interactive(command, tmp_path, endless=True) as terminal:
        terminal.expect("keys       mem      clients blocked requests            connections")
        # Keys, memory, clients, blocked clients, requests, connections.
        shown = terminal.search(rb"\n1 +[\d.]+[BKMG] +(\d+) +0 +(\d+) \(\+1\) +(\d+) +\r")
        assert all(int(number) > 0 for number in shown.groups())


def test_statistics(cli: Run) -> None:
    assert "redis_version:8.4.0\n" in cli("info", "server").replace("\r\n", "\n")
    assert cli("config", "get", "appendfsync").split() == ["appendfsync", "always"]


def test_inline_commands_over_a_plain_socket(server: ServerProcess) -> None:
    done = subprocess.run(
        ["bash", "-c", f"exec 3<>/dev/tcp/{HOST}/{server.port}; cat >&3; cat <&3"],
        input=b"set key 'a value'\r\n\r\nget key\r\nset bad 'quotes\r\n",
        capture_output=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    assert done.stdout == b"+OK\r\n$7\r\na value\r\n-ERR Protocol error: unbalanced quotes in request\r\n"


@attrs.define
class Terminal:
    """The screen side of a pseudo-terminal that a program runs in."""

    descriptor: int
    output: bytes = b""

    def type(self, text: str) -> None:
        """Sends key strokes; what was shown before is forgotten."""
        self.output = b""
        os.write(self.descriptor, text.encode())

    def expect(self, text: str, seconds: float = 10) -> None:
        """Waits until the program has shown a text, colours and cursor movements left out."""
        self.search(re.escape(text.encode()), seconds)

    def search(self, pattern: bytes, seconds: float = 10) -> re.Match[bytes]:
        """As `expect`, for a regular expression."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, _ESCAPE.sub(b"", self.output))) is None:
            rest = deadline - time.monotonic()
            ready, _, _ = select.select([self.descriptor], [], [], max(0, rest))
            assert ready, f"{pattern!r} was not shown, but {self.output!r}"
            self.output += os.read(self.descriptor, 65536)
        return match


@contextmanager
def interactive(command: list[str], home: Path, *, endless: bool = False) -> Iterator[Terminal]:
    """Runs a program in a pseudo-terminal of its own.

    After the block it must end by itself, and well; one that is `endless` is ended.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, _COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "HOME": str(home)}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            yield Terminal(ours)
            if not endless:
                assert process.wait(DEADLINE_SECONDS) == 0
        finally:
            if process.poll() is None:
                process.kill()
            os.close(ours)


@pytest.mark.parametrize("protocol", [(), ("-3",)], ids=["RESP2", "RESP3"])
def test_the_prompt_shows_hints(
    protocol: tuple[str, ...], redis_cli: str, server: ServerProcess, tmp_path: Path
) -> None:
    prompt = f"{HOST}:{server.port}> "
    with interactive([redis_cli, "-p", str(server.port), *protocol], tmp_path) as terminal:
        terminal.expect(prompt)
        terminal.type("VSEARCH ")
        terminal.expect("VSEARCH index query k [EF ef]")
        terminal.type("colours ")
        terminal.expect("VSEARCH colours query k [EF ef]")
        terminal.type("\x15VMADD colours ")
        terminal.expect("VMADD colours member vector [member vector ...]|member vector attributes")
        terminal.type("\x15SET ")
        terminal.expect("SET key value [NX|XX|IFEQ ifeq-value|IFNE ifne-value|")
        terminal.type("key value\r")
        # What is typed before the next prompt is lost.
        terminal.expect("OK\r\n" + prompt)
        terminal.type("DEL ")
        terminal.expect("DEL key [key ...]")
        terminal.type("\x15CONFIG GET ")
        terminal.expect("CONFIG GET pattern [pattern ...]")
        terminal.type("\x15get key\r")
        terminal.expect('"value"\r\n' + prompt)
        terminal.type("vnew colours 3\r")
        terminal.expect("OK\r\n" + prompt)
        terminal.type("vinfo colours\r")
        terminal.expect(' 1) "dim"\r\n 2) "3"\r\n 3) "metric"\r\n 4) "cosine"\r\n 5) "count"\r\n 6) "0"\r\n')
        terminal.expect('31) "last-build-error"\r\n32) ""\r\n' + prompt)
        terminal.type("help vadd\r")
        terminal.expect("VADD index member vector\r\r\n")
        terminal.expect("summary: Adds a vector")
        terminal.expect("group: vector")
        terminal.expect("\r\n" + prompt)
        terminal.type("quit\r")


def test_the_prompt_shows_a_transaction(redis_cli: str, server: ServerProcess, tmp_path: Path) -> None:
    prompt = f"{HOST}:{server.port}"
    with interactive([redis_cli, "-p", str(server.port)], tmp_path) as terminal:
        terminal.expect(prompt + "> ")
        terminal.type("mset ")
        terminal.expect("mset key value [key value ...]")
        terminal.type("\x15multi\r")
        terminal.expect("OK\r\n" + prompt + "(TX)> ")
        terminal.type("incr counter\r")
        terminal.expect("QUEUED\r\n" + prompt + "(TX)> ")
        terminal.type("exec\r")
        terminal.expect("1) (integer) 1\r\n" + prompt + "> ")
        terminal.type("quit\r")


def test_tab_completes_a_command(redis_cli: str, server: ServerProcess, tmp_path: Path) -> None:
    with interactive([redis_cli, "-p", str(server.port)], tmp_path) as terminal:
        terminal.expect(f"{HOST}:{server.port}> ")
        terminal.type("vsea\t")
        terminal.expect("VSEARCH")
        terminal.type("\x15quit\r")
