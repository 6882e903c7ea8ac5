"""Starts a server in which Trio, as it listens to threads, has no memory once a file exists.

python -m tests.crash.deaf FILE <engram arguments>
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from trio._core._wakeup_socketpair import WakeupSocketpair


def main() -> None:
    file = Path(sys.argv[1])
    drain = WakeupSocketpair.drain

    def failing(self: WakeupSocketpair) -> None:
        if file.exists():
            raise MemoryError
        drain(self)

    WakeupSocketpair.drain = failing  # type: ignore[method-assign]
    sys.argv = ["engram", *sys.argv[2:]]
    runpy.run_module("engram", run_name="__main__")


if __name__ == "__main__":
    main()
