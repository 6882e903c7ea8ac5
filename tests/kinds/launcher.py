"""engram with one kind of value more: `python -m tests.kinds.launcher` in place of `engram`."""

from __future__ import annotations

import sys

from engram.kinds import register

if __name__ == "__main__":
    register(["tests.kinds.bag"])
    # After the kinds: the table of commands has those of theirs.
    from engram.cli import main

    sys.exit(main())
