"""Log lines of `key=value` pairs: `time=... level=warning message="..."`, and what a record has more.

A call such as `logger.warning("...", extra={"fields": {"client": 7}})` adds pairs of its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any

from engram.config import LogLevel
from engram.errors import OperatorError

NOTICE = 25

_LEVELS: dict[LogLevel, int] = {
    "debug": logging.DEBUG,
    "verbose": logging.INFO,
    "notice": NOTICE,
    "warning": logging.WARNING,
    "nothing": logging.CRITICAL + 1,
}
_NAMES = {number: name for name, number in _LEVELS.items()}


class Formatter(logging.Formatter):
    """One line for each record; line breaks in it are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        pairs: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": _NAMES.get(record.levelno, record.levelname.lower()),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            pairs["exception"] = self.formatException(record.exc_info)
        return " ".join(f"{name}={quoted(str(value))}" for name, value in pairs.items())


def quoted(value: str) -> str:
    """A value as it stands behind the equals sign: in double quotes unless it is one plain word."""
    if value and value.isprintable() and not any(character in value for character in ' "=\\'):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def set_level(level: LogLevel) -> None:
    """Lets records of that level and above be logged."""
    logging.getLogger("engram").setLevel(_LEVELS[level])


@contextmanager
def logging_to(file: str, level: LogLevel) -> Iterator[None]:
    """Writes the lines to the end of a file, or to standard error, while inside.

    A thread of its own does it: a disk that is slow holds up nobody.

    Raises:
        OperatorError: the file cannot be opened.
    """
    try:
        handler: logging.StreamHandler[Any]
        if file:
            # The path in a line need not be text.
            handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        else:
            handler = logging.StreamHandler(sys.stderr)
    except OSError as error:
        raise OperatorError(f"cannot log to {file}: {error.strerror}") from error
    handler.setFormatter(Formatter())
    queue: SimpleQueue[logging.LogRecord] = SimpleQueue()
    listener = QueueListener(queue, handler)
    root, own = logging.getLogger(), logging.getLogger("engram")
    front, level_before = _Front(queue), own.level
    set_level(level)
    root.addHandler(front)
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(front)
        own.setLevel(level_before)
        listener.stop()
        handler.close()


class _Front(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The thread is this process's own: nothing need be made fit to be pickled.
        return record
