from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.server_process import ServerProcess, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """An engram that keeps nothing on disk, and must still be well after everything a module does to it."""
    with running_server() as server:
        yield server
