from __future__ import annotations

import re
from pathlib import Path

import pytest

from engram.config import SETTINGS, Config, load_config
from engram.errors import ConfigError
from engram.operations import LARGEST_TOGETHER, SetString, encode


def test_defaults() -> None:
    config = load_config([])
    assert (config.port, config.bind, config.maxclients) == (6380, ("127.0.0.1",), 1024)
    assert (config.dir, config.appendfsync) == ("", "always")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "engram.conf"
    path.write_text(
        "# a comment\nport 7000\n\n  # another\r\nmaxclients 10\r\ndir 'with space'\nbind 127.0.0.1 ::1\n"
    )
    config = load_config([str(path), "--port", "7001", "--log-file-size=1mb"])
    assert (config.port, config.maxclients, config.log_file_size) == (7001, 10, 1 << 20)
    assert Path(config.dir).name == "with space"
    assert config.bind == ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense: unknown setting 'nonsense'"),
        (["--port"], "--port: setting 'port' takes a value"),
        (["--port", "1", "2"], "--port: setting 'port' takes one value"),
        (
            ["--port", "x"],
            "--port: bad value 'x' for setting 'port': argument couldn't be parsed into an integer",
        ),
        (
            ["--port", "65536"],
            "--port: bad value '65536' for setting 'port': argument must be between 0 and 65535 inclusive",
        ),
        (
            ["--appendfsync", "never"],
            "--appendfsync: bad value 'never' for setting 'appendfsync':"
            " argument(s) must be one of the following: everysec, always, no",
        ),
        (
            ["--log-file-size", "12parsecs"],
            "--log-file-size: bad value '12parsecs' for setting 'log-file-size':"
            " argument must be a memory value",
        ),
        (["missing.conf"], "cannot read config file 'missing.conf': No such file or directory"),
        (["--port", "1", "--", "x"], "--: unknown setting ''"),
    ],
)
def test_a_bad_command_line_says_why(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert str(caught.value) == message


def test_a_bad_line_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "engram.conf"
    path.write_text('port 1\ndir "unbalanced\n')
    with pytest.raises(ConfigError, match=r"engram\.conf, line 2: unbalanced quotes"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("line", "password"),
    [
        (b"requirepass foo#bar", "foo#bar"),
        (b"requirepass #foo", "#foo"),
        (b"requirepass pa\\ss", "pa\\ss"),
        (rb'requirepass "a\x41\tb\"\\"', 'aA\tb"\\'),
        (rb"requirepass 'a\x41 \'b'", "a\\x41 'b"),
        (b"# caf\xe9\nrequirepass \xff\xc3\xa9", "\udcff\xe9"),
        (b"requirepass a\xe2\x80\xa8b\xc2\x85c", "a\u2028b\x85c"),
    ],
)
def test_words_of_a_file_are_those_of_redis(tmp_path: Path, line: bytes, password: str) -> None:
    path = tmp_path / "engram.conf"
    path.write_bytes(line + b"\n")
    assert load_config([str(path)]).requirepass == password


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_of_a_setting_reads_back(name: str) -> None:
    config = Config()
    text = config.get(name)
    config.set(name, text)
    assert config == Config()
    assert SETTINGS[name].default_text == text
    assert SETTINGS[name].summary


def test_sizes_have_redis_units() -> None:
    config = Config()
    for text, size in (
        ("100000", 100_000),
        ("100k", 100_000),
        ("100kb", 102_400),
        ("2MB", 2 << 20),
        ("1g", 10**9),
    ):
        config.set("log-file-size", text)
        assert config.log_file_size == size


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5mb", 5 << 20),
        ("normal 5mb 0 0", 5 << 20),
        ("normal 0 0 0", 1 << 50),
        ("NORMAL 100000 2 3 replica 256mb 64mb 60 pubsub 32mb 8mb 60", 100_000),
    ],
)
def test_the_output_limit_is_a_size_or_what_redis_calls_a_class(text: str, limit: int) -> None:
    config = Config()
    config.set("client-output-buffer-limit", text)
    assert config.client_output_buffer_limit == limit
    assert load_config(["--client-output-buffer-limit", *text.split()]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The first three are Redis's words.
        ("foo 1 2 3", "Invalid client class specified in buffer limit configuration."),
        ("normal 1 2", "Wrong number of arguments in buffer limit configuration."),
        ("normal a 2 3", "Error in hard, soft or soft_seconds setting in buffer limit configuration."),
        ("replica 1 2 3", "only clients of the class 'normal' have a limit here"),
        ("normal 1 0 0", "argument must be between 65536 and 1125899906842624 inclusive"),
        ("", "Wrong number of arguments in buffer limit configuration."),
    ],
)
def test_an_output_limit_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config().set("client-output-buffer-limit", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9", "argument couldn't be parsed as an octal number"),
        ("x", "argument couldn't be parsed as an octal number"),
        ("1777", "argument must be between 0 and 777 inclusive"),
    ],
)
def test_a_mode_is_octal(text: str, message: str) -> None:
    config = Config()
    config.set("unixsocketperm", "0770")
    assert config.get("unixsocketperm") == "770"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config.set("unixsocketperm", text)


@pytest.mark.parametrize("name", ["proto-max-bulk-len", "client-query-buffer-limit", "log-file-size"])
def test_sizes_are_bounded_by_what_the_log_can_hold(name: str) -> None:
    config = Config()
    for text in ("5gb", str(1 << 50)):
        with pytest.raises(ValueError, match=r"^argument must be between \d+ and \d+ inclusive$"):
            config.set(name, text)
    config.set(name, "3gb")
    assert config.get(name) == str(3 << 30)
    longest = SetString(b"k", b"")
    config.set("proto-max-bulk-len", str((1 << 32) - (1 << 20)))
    assert config.proto_max_bulk_len + len(encode(longest)) + 4 <= LARGEST_TOGETHER
