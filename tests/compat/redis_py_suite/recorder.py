"""A pytest plugin, run among redis-py's own tests: it writes what became of each, and the commands it sent.

Which commands a test sent is told by the server's INFO commandstats before and after it, which counts what
MONITOR leaves out: administrative commands, those that were refused, and those inside transactions.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_TIMEOUT_SECONDS = 10
_STATISTIC = re.compile(rb"^cmdstat_([^:]+):calls=(\d+),.*rejected_calls=(\d+)", re.MULTILINE)

Counts = dict[str, tuple[int, ...]]


class Recorder:
    """Writes a line of JSON for each test: its id, its outcome, why it did not pass, and its commands.

    `port` is that of the server whose commands are counted; without one none are.
    """

    def __init__(self, path: Path, port: int | None) -> None:
        self._file = path.open("w", buffering=1)
        self._port = port
        self._connection: socket.socket | None = None
        self._outcomes: list[tuple[str, str]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._outcomes = []
        before = self._counts()
        result = yield
        after = self._counts()
        outcome, reason = max(self._outcomes, default=("failed", "it did not run"), key=_gravity)
        if before and "info" in after:
            # The recorder's own.
            calls, rejected = after["info"]
            after["info"] = (calls - 1, rejected)
        commands = sorted(name for name, count in after.items() if count != before.get(name, (0, 0)))
        line = {"test": item.nodeid, "outcome": outcome, "reason": reason, "commands": commands}
        self._file.write(json.dumps(line) + "\n")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
        elif not report.passed:
            crash: Any = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash is not None else str(report.longrepr)
        self._outcomes.append((report.outcome, reason))

    def _counts(self) -> Counts:
        if self._port is None:
            return {}
        try:
            text = self._ask(b"INFO commandstats\r\n")
        except OSError:
            # A test ended all connections.
            self._connection = None
            text = self._ask(b"INFO commandstats\r\n")
        return {name.decode(): tuple(map(int, numbers)) for name, *numbers in _STATISTIC.findall(text)}

    def _ask(self, request: bytes) -> bytes:
        if self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self._port), _TIMEOUT_SECONDS)
        self._connection.sendall(request)
        reply = b""
        while (head := reply.partition(b"\r\n"))[1] == b"" or len(head[2]) < int(head[0][1:]) + 2:
            data = self._connection.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            reply += data
        return head[2]


def _gravity(outcome: tuple[str, str]) -> int:
    return ["passed", "skipped", "failed"].index(outcome[0])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="the file for what became of the tests")
    parser.addoption("--count-commands-at", type=int, metavar="PORT", help="count the commands of each test")


def pytest_configure(config: pytest.Config) -> None:
    recorder = Recorder(config.getoption("--record"), config.getoption("--count-commands-at"))
    config.pluginmanager.register(recorder)
