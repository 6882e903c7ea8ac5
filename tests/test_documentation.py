"""What the pages say of files, commands and settings is so, and the tutorial runs as it is printed."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engram.commands.registry import COMMANDS
from engram.commands.syntax import Argument
from engram.config import SETTINGS
from engram.index import segment
from engram.persistence import layout, log_format, log_writer, snapshot

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])

# Those that describe engram as it is now.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]

# Words in capitals that are no commands, and commands that the pages say are not there.
OTHER_WORDS = {
    *("ERR", "MISCONF", "WRONGTYPE", "EXECABORT", "NOAUTH", "NOPERM", "OOM", "BUSY"),
    *("MANIFEST", "LOCK", "HOST", "POST", "CI"),
}
ABSENT = {
    *("VSIM", "BITFIELD", "BITFIELD_RO", "BITOP", "BITPOS", "LCS", "MSETEX", "DUMP", "RESTORE", "MIGRATE"),
    *("SORT", "SORT_RO", "HOTKEYS", "FAILOVER"),
}

STOP_SECONDS = 30

LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<!\S)--([a-z][a-z-]*)")
HYPHENATED = re.compile(r"[a-z]+(-[a-z]+)+")
CAPITALS = re.compile(r"([A-Z]{2,})(?: ([A-Z]{2,}(?:-[A-Z]+)*))?\b")
SENT = re.compile(
    r"^127\.0\.0\.1:6380> (.*)|(?:execute_command|sendCommand|call)\(\[?(\"[A-Z].*)", re.MULTILINE
)


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages]


def fences(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def inline_code(page: Path) -> list[str]:
    return CODE.findall(FENCE.sub("", page.read_text()))


def tokens(arguments: Iterable[Argument]) -> set[str]:
    """The words in capitals that commands take among their arguments."""
    found = set()
    for argument in arguments:
        found |= tokens(argument.arguments) | ({argument.token} if argument.token else set())
    return found


def script_options() -> set[str]:
    """The options of the scripts that pages tell how to run."""
    scripts = [ROOT / "engram" / "subcommands.py"]
    for pattern in ("benchmarks/*.py", "examples/*.py", "tests/*/*.py", "tests/compat/*/*.py"):
        scripts += ROOT.glob(pattern)
    return {
        option
        for script in scripts
        for option in re.findall(r"add_argument\(\s*\"--([a-z-]+)\"", script.read_text())
    }


def commands_in(page: Path) -> Iterator[tuple[str, str]]:
    """(Command, word in capitals after it or "") for each use of a command, typed, sent or named."""
    text = page.read_text()
    sent = [typed or call.replace('"', "").replace(",", "") for typed, call in SENT.findall(text)]
    for code in (*inline_code(page), *sent):
        if match := CAPITALS.match(code):
            yield match[1], match[2] or ""


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


# What pages have a reader pass to redis-cli and npm.
OPTIONS_OF_OTHERS = {"tls", "cacert", "cert", "key", "no-package-lock", "help", "name"}
# Values of settings that look like settings.
VALUES = {"volatile-ttl"}


@pytest.mark.parametrize("page", named(CURRENT))
def test_options_are_there(page: Path) -> None:
    code = "\n".join((*inline_code(page), *(text for _, text in FENCE.findall(page.read_text()))))
    assert set(OPTION.findall(code)) - SETTINGS.keys() - script_options() - OPTIONS_OF_OTHERS == set()


@pytest.mark.parametrize("page", named(CURRENT))
def test_settings_are_there(page: Path) -> None:
    words = {word for code in inline_code(page) if HYPHENATED.fullmatch(word := code.split()[0])}
    assert {word for word in words if not word.startswith("redis-")} - SETTINGS.keys() - VALUES == set()


@pytest.mark.parametrize("page", named(CURRENT))
def test_commands_are_there(page: Path) -> None:
    options = tokens(argument for command in COMMANDS.values() for argument in command.arguments)
    for name, subcommand in commands_in(page):
        if name in OTHER_WORDS | ABSENT | options:
            continue
        assert name.lower().encode() in COMMANDS, name
        subcommands = COMMANDS[name.lower().encode()].subcommands
        if subcommands and subcommand:
            assert subcommand.lower().encode() in subcommands, f"{name} {subcommand}"


def test_what_is_said_to_be_absent_is() -> None:
    assert {name for name in ABSENT if name.lower().encode() in COMMANDS} == set()


def test_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`VNO x`, `CONFIG NO`, `--none`\n```\n127.0.0.1:6380> VNAY y\n```\n[there](not.md)\n")
    assert list(commands_in(page)) == [("VNO", ""), ("CONFIG", "NO"), ("VNAY", "")]
    for check in (test_links_lead_somewhere, test_options_are_there, test_commands_are_there):
        with pytest.raises(AssertionError):
            check(page)


def test_readme_starts_with_one_command_to_run_it_and_one_to_test_it() -> None:
    start, test = fences(ROOT / "README.md", "sh")[:2]
    assert start.startswith("python3 -m venv ")
    assert start.endswith("/engram\n")
    assert test.startswith("python3 -m venv ")
    assert "/pytest" in test
    assert start.count("\n") == test.count("\n") == 1


@contextmanager
def running(folder: Path, port: int) -> Iterator[int]:
    """The port of a server that keeps its data in a folder."""
    command = [sys.executable, "-P", "-m", "engram", "--port", str(port), "--dir", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"listening on 127\.0\.0\.1:(\d+)", line)
            assert match is not None, f"engram did not start; it printed {line!r}"
            yield int(match[1])
        finally:
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0


def run_session(text: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a printed session of Python and compares what it answers; returns the variables it leaves."""
    test = doctest.DocTestParser().get_doctest(text, dict(variables), "page", None, None)
    report: list[str] = []
    results = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert results.attempted > 0
    assert results.failed == 0, "".join(report)
    return test.globs


def test_the_tutorial_runs(tmp_path: Path) -> None:
    page = tmp_path / "tutorial.md"
    before, restart, after = (ROOT / "docs" / "tutorial.md").read_text().partition("\n## Restart\n")
    assert restart
    sessions = []
    for part in (before, after):
        page.write_text(part)
        sessions.append("\n".join(fences(page, "python")))
    with running(tmp_path / "data", 0) as port:
        variables = run_session(sessions[0].replace("port=6380", f"port={port}"), {})
    with running(tmp_path / "data", port):
        run_session(sessions[1], variables)
        variables["client"].close()


def test_how_to_search_runs(tmp_path: Path) -> None:
    session = "\n".join(fences(ROOT / "docs" / "how-to" / "search.md", "python"))
    with running(tmp_path / "data", 0) as port:
        run_session(session.replace("port=6380", f"port={port}"), {})["client"].close()


@pytest.mark.parametrize(
    "module", [layout, log_format, log_writer, snapshot, segment], ids=lambda module: str(module.__name__)
)
def test_the_page_of_files_shows_the_tables_of_the_modules_that_write_them(module: ModuleType) -> None:
    shown = "\n".join(fences(ROOT / "docs" / "files.md", ""))
    assert module.__doc__ is not None
    table = [line.strip() for line in module.__doc__.splitlines() if re.search(r"\S  +\S|^ +\d\. ", line)]
    assert len(table) > 4
    missing = [line for line in table if line not in shown]
    assert not missing
