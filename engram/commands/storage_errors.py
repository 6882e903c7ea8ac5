"""What a client is told when the log or a snapshot cannot do what a command asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engram.errors import (
    CommandError,
    LogFullError,
    RecordTooLargeError,
    SnapshotError,
    SnapshotRunningError,
    StorageError,
)


def worded(error: StorageError) -> CommandError:
    """The same in words for a client."""
    match error:
        case LogFullError():
            return CommandError(f"MISCONF Errors writing to the log: {error.reason}")
        case RecordTooLargeError():
            return CommandError(
                "ERR what would be changed at once does not fit into one record of the log, which holds 4 GiB"
            )
        case SnapshotRunningError():
            return CommandError("ERR Background save already in progress")
        case SnapshotError():
            return CommandError(f"ERR save failed: {error.reason}")
        case _:
            raise AssertionError(f"there are no words for {error!r}")


@contextmanager
def refusals_in_words() -> Iterator[None]:
    """Raises as CommandError what the log or a snapshot refuses inside."""
    try:
        yield
    except StorageError as error:
        raise worded(error) from error
