from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engram.commands import reference

DOCS = Path(__file__).parents[2] / "docs"


def test_commands_page_is_what_the_table_gives() -> None:
    assert (DOCS / "commands.md").read_text() == reference.render()


def test_settings_page_is_what_the_table_gives() -> None:
    assert (DOCS / "settings.md").read_text() == reference.render_settings()


@pytest.mark.parametrize(
    ("arguments", "page"),
    [([], "commands.md"), (["commands"], "commands.md"), (["settings"], "settings.md")],
)
def test_the_command_line_prints_the_page(arguments: list[str], page: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engram.commands.reference", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (DOCS / page).read_text()
    assert done.stderr == ""


def test_an_unknown_page_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engram.commands.reference", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "'commands', 'settings'" in done.stderr
