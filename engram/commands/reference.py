"""The reference page of commands: `python -m engram.commands.reference` prints docs/commands.md."""

from __future__ import annotations

from collections.abc import Iterable

from engram.commands.registry import COMMANDS
from engram.commands.table import Command

_GROUPS = {
    "vector": "Vector indices",
    "string": "Strings",
    "generic": "Keys",
    "connection": "Connections",
    "server": "Server",
}

_INTRODUCTION = """\
# Commands

Made from the command table by `python -m engram.commands.reference`. *Since* names the release of Redis that
brought a command, or of engram where the command is its own.
"""


def render() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    for group, title in _GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(command) for command in COMMANDS.values() if command.group == group]
    return "\n".join(parts)


def _entry(command: Command) -> str:
    lines = [f"### {command.name.upper()}\n", f"{command.summary}\n"]
    if command.subcommands:
        lines += [_line(each) for each in command.subcommands.values()]
        lines.append("")
    else:
        lines += [f"```\n{_usage(command)}\n```\n", f"{_facts(command)}\n"]
    return "\n".join(lines)


def _line(command: Command) -> str:
    return f"- `{_usage(command)}`: {command.summary}"


def _usage(command: Command) -> str:
    return f"{command.name.replace('|', ' ').upper()} {command.usage}".strip()


def _facts(command: Command) -> str:
    facts = [
        f"Since: {command.since}",
        f"Complexity: {command.complexity.rstrip('.')}",
        f"Flags: {_words(command.flags)}",
        f"ACL categories: {_words(command.categories)}",
    ]
    return ". ".join(facts) + "."


def _words(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


if __name__ == "__main__":
    print(render(), end="")
