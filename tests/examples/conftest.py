from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

STOP_SECONDS = 30


@pytest.fixture
def port() -> Iterator[int]:
    """The port of an engram that keeps nothing on disk and ends with the test."""
    command = [sys.executable, "-P", "-m", "engram", "--port", "0"]
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
