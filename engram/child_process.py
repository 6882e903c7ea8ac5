"""How a server starts processes of its own package: with its engram, and nothing of the working directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module, to be started with `module_environment`.

    `-m` alone would let a file in the working directory stand in for any module, be it a standard one.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables with which a child finds the package of this process.

    An empty place in PYTHONPATH, which stands for the working directory, is left out. The folder that holds
    the package is added where nothing else leads to it: after `python -m engram` in that folder.
    """
    paths = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) == _ROOT:
        paths.insert(0, _ROOT)
    return {**variables, "PYTHONPATH": os.pathsep.join(paths)}
