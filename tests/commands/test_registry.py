"""What must hold for every row of the command table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engram.commands import reference
from engram.commands.registry import COMMANDS, SPELLINGS
from engram.commands.table import Command

# Every command that a Redis client may rely on here.
EXPECTED = [
    "ping",
    "echo",
    "quit",
    "select",
    "hello",
    "reset",
    "auth",
    "client",
    "set",
    "get",
    "del",
    "unlink",
    "exists",
    "type",
    "append",
    "strlen",
    "incr",
    "decr",
    "incrby",
    "decrby",
    "expire",
    "pexpire",
    "expireat",
    "pexpireat",
    "persist",
    "ttl",
    "pttl",
    "expiretime",
    "pexpiretime",
    "dbsize",
    "flushdb",
    "flushall",
    "keys",
    "scan",
    "config",
    "info",
    "command",
    "time",
    "shutdown",
    "vnew",
    "vadd",
    "vsearch",
    "vmadd",
    "vmsearch",
    "vget",
    "vmget",
    "vsetattr",
    "vgetattr",
    "vscan",
    "vcount",
    "vdel",
    "vdelby",
    "vlist",
    "voptimize",
    "vinfo",
    "vsave",
    "bgsave",
    "save",
    "lastsave",
    "acl",
    "bgrewriteaof",
    "bitcount",
    "copy",
    "debug",
    "discard",
    "exec",
    "getbit",
    "getdel",
    "getex",
    "delex",
    "digest",
    "getrange",
    "getset",
    "incrbyfloat",
    "latency",
    "lolwut",
    "memory",
    "mget",
    "monitor",
    "move",
    "mset",
    "msetnx",
    "multi",
    "object",
    "psetex",
    "randomkey",
    "rename",
    "renamenx",
    "role",
    "replicaof",
    "slaveof",
    "cluster",
    "readonly",
    "readwrite",
    "asking",
    "module",
    "setbit",
    "setex",
    "setnx",
    "setrange",
    "slowlog",
    "substr",
    "swapdb",
    "touch",
    "unwatch",
    "wait",
    "waitaof",
    "watch",
]


def every_command() -> Iterator[Command]:
    for command in COMMANDS.values():
        yield command
        yield from command.subcommands.values()


def test_the_table_is_complete() -> None:
    assert {name.decode() for name in COMMANDS} == set(EXPECTED)


@pytest.mark.parametrize("command", list(every_command()), ids=lambda command: command.name)
def test_a_row_agrees_with_itself(command: Command) -> None:
    assert command.name == command.name.lower()
    assert command.summary.endswith(".")
    assert command.arity != 0
    writes, reads = "write" in command.flags, "readonly" in command.flags
    assert not (writes and reads)
    assert command.writes == writes
    required = sum(not argument.optional for argument in command.arguments)
    if not command.subcommands:
        words = command.name.count("|") + 1
        assert command.minimum >= required + words
        if command.arity > 0:
            assert not any(argument.optional or argument.multiple for argument in command.arguments)
    if command.keys[0]:
        assert writes or reads or command.name == "watch"
        assert command.key_flags


def test_only_what_writes_is_slowed_down_and_subcommands_never_write() -> None:
    # The connection looks at these of the command it dispatches, and only when it writes.
    for command in COMMANDS.values():
        assert command.throttle is None or command.writes
        assert not any(each.writes for each in command.subcommands.values())


def test_usual_spellings_need_no_change_of_case() -> None:
    assert SPELLINGS[b"GET"] is SPELLINGS[b"get"] is COMMANDS[b"get"]
    assert len(SPELLINGS) == 2 * len(COMMANDS)


def test_the_reference_page_has_every_command() -> None:
    page = reference.render()
    for command in every_command():
        name = command.name.replace("|", " ").upper()
        assert f"### {name}\n" in page or f"- `{name}" in page
