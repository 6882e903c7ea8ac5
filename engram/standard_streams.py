"""Standard output and standard error: what they cannot take is no reason to end.

A stream may be closed, full, a pipe that nobody reads, or of an encoding that lacks a character of a path.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn, TextIO

from engram.errors import OperatorError

EXIT_FAILURE = 1
"""What the process ends with when it could not start or cannot go on."""


class OutputError(OperatorError):
    """Standard output cannot be written."""


def prepare_streams() -> None:
    """Opens /dev/null for each standard stream that is closed, and lets every text be printed.

    A file or socket would get the number of a closed one, and what a library prints would end up there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has none for a stream that was closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def say(text: str) -> None:
    """Prints lines on standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OutputError(f"standard output: cannot be written: {error.strerror}") from error


def complain(what: object) -> None:
    """Prints a line on standard error, if that can be written."""
    try:
        print(f"engram: {what}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def end_at_once(reason: bytes) -> NoReturn:
    """Ends the process where it can do nothing else any more, and prints the reason on standard error."""
    try:
        os.write(2, b"engram: %s\n" % reason)
    finally:
        os._exit(EXIT_FAILURE)


def discard(stream: TextIO) -> None:
    """Lets what is printed, and what is still in the stream's buffer, go nowhere."""
    descriptor = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(descriptor, stream.fileno())
    finally:
        os.close(descriptor)
    with suppress(OSError):
        stream.flush()
