from __future__ import annotations

from pathlib import Path

import pytest

from engram.config import SETTINGS, Config, load_config
from engram.errors import ConfigError


def test_defaults() -> None:
    config = load_config([])
    assert (config.port, config.bind, config.maxclients) == (6380, ("127.0.0.1",), 1024)
    assert (config.dir, config.appendfsync) == ("", "always")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "engram.conf"
    path.write_text(
        "# a comment\nport 7000\n\nmaxclients 10 # another\ndir 'with space'\nbind 127.0.0.1 ::1\n"
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
            " argument(s) must be one of the following: always, everysec, no",
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
    with pytest.raises(ConfigError, match=r"engram\.conf, line 2: No closing quotation"):
        load_config([str(path)])


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
