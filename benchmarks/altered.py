"""Runs an engram in which some constants have other values: `MODULE.NAME=VALUE ... -- [engram's arguments]`.

For constants that are no settings, so that what decided them can be measured again. Children that engram
starts keep their own.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path


def command(constants: Mapping[str, float]) -> str:
    """The command that runs engram so."""
    words = [f"{name}={value}" for name, value in constants.items()]
    root = Path(__file__).parents[1]
    return " ".join(
        ["env", f"PYTHONPATH={root}", sys.executable, "-P", "-m", "benchmarks.altered", *words, "--"]
    )


def alter(assignment: str) -> None:
    """Changes a constant before the modules that take it from there are imported."""
    path, _, value = assignment.partition("=")
    module_name, _, name = path.rpartition(".")
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        sys.exit(f"{module_name} has no {name}")
    setattr(module, name, ast.literal_eval(value))


def main() -> int:
    separator = sys.argv.index("--")
    for assignment in sys.argv[1:separator]:
        alter(assignment)
    cli = importlib.import_module("engram.cli")
    sys.argv[1:] = sys.argv[separator + 1 :]
    result: int = cli.main()
    return result


if __name__ == "__main__":
    sys.exit(main())
