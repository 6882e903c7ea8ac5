"""The reference pages, made from the tables of commands and of settings.

`python -m engram.commands.reference` prints docs/commands.md, and with the argument `settings`
docs/settings.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from engram.commands.registry import COMMANDS
from engram.commands.table import Command
from engram.config import SETTINGS, Setting

_GROUPS = {
    "vector": "Vector indices",
    "string": "Strings",
    "bitmap": "Bitmaps",
    "generic": "Keys",
    "transactions": "Transactions",
    "connection": "Connections",
    "server": "Server",
    "cluster": "Cluster",
}

_COMMANDS_INTRODUCTION = """\
# Commands

Made from the command table by `python -m engram.commands.reference`. *Since* names the release of Redis that
brought a command, or of engram where the command is its own.
"""

_SETTINGS_INTRODUCTION = """\
# Settings

Made from the table of settings by `python -m engram.commands.reference settings`.

Where a setting comes from; the later wins:

1. its default;
2. a config file, whose path is the first argument: `engram engram.conf`. It holds lines `name value`, and
   those that begin with `#` are comments; what has blanks is quoted as in Redis (`"a\\n\\x00b"`).
3. the command line: `--name value`, or `--name=value`;
4. `CONFIG SET name value` while the server runs, where the table says so. It lasts until the server ends.

`CONFIG GET *` shows the values in force. Sizes are in bytes and take a unit: `kb`, `mb` and `gb` are powers
of 1,024, `k`, `m` and `g` powers of 1,000. An unknown setting or a value that is not one of its values ends
the start with one line and exit code 2.

| setting | default | `CONFIG SET` | what |
|---|---|---|---|
"""


def render() -> str:
    """The page of commands as Markdown."""
    parts = [_COMMANDS_INTRODUCTION]
    for group, title in _GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(command) for command in COMMANDS.values() if command.group == group]
    return "\n".join(parts)


def render_settings() -> str:
    """The page of settings as Markdown."""
    return _SETTINGS_INTRODUCTION + "".join(map(_row, SETTINGS.values()))


def _row(setting: Setting) -> str:
    default = f"`{setting.default_text}`" if setting.default_text else "empty"
    changeable = "yes" if setting.mutable else "no"
    return f"| `{setting.name}` | {default} | {changeable} | {setting.summary} |\n"


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


def main() -> None:
    """Prints the page that the command line names."""
    pages = {"commands": render, "settings": render_settings}
    parser = argparse.ArgumentParser(description="print a reference page as Markdown")
    parser.add_argument("page", nargs="?", choices=pages, default="commands")
    print(pages[parser.parse_args().page](), end="")


if __name__ == "__main__":
    main()
