"""Starts a server in which one function raises MemoryError when an argument of it shows a word.

    python -m tests.crash.failing MODULE FUNCTION WORD <engram arguments>

A word that begins with "before" has it raised at once, another one when the function is done.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from typing import Any


def main() -> None:
    module, path, word = sys.argv[1:4]
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    real = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        fails = any(word in repr(argument) for argument in arguments)
        if fails and word.startswith("before"):
            raise MemoryError
        result = real(*arguments, **options)
        if fails:
            raise MemoryError
        return result

    setattr(owner, name, failing)
    sys.argv = ["engram", *sys.argv[4:]]
    runpy.run_module("engram", run_name="__main__")


if __name__ == "__main__":
    main()
