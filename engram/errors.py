"""The errors engram raises itself.

EngramError
├── CommandError            what a client did wrong; its text is the error reply
├── StorageError            what the log or a snapshot cannot take or do; nothing has changed by it
│   ├── LogFullError        no space can be allocated for the log
│   ├── RecordTooLargeError a change does not fit into one record of the log
│   ├── SnapshotRunningError another snapshot is being made
│   └── SnapshotError       a snapshot could not be made
└── OperatorError           what the operator must see
    ├── ConfigError         a setting is unknown or malformed
    ├── DirectoryInUseError another server holds the data directory
    ├── DamagedDataError    what was durable cannot be trusted; names the file and the place
    ├── NewerFormatError    what is intact, but written by a newer engram
    ├── LogFailureError     a write or sync of the log failed; nothing more may be acknowledged
    └── ChangeFailureError  a change failed half-way; what is in memory may not be shown any more

What an index refuses has a tree of its own: see `engram.index.errors`. NothingChangedError, a MemoryError,
says that a change which ran out of memory had not begun. UnknownKindError, a TypeError, is our own fault.
"""

from __future__ import annotations

from pathlib import Path


class EngramError(Exception):
    """The root of all errors engram raises itself."""


class CommandError(EngramError):
    """A command cannot be carried out, and has changed nothing.

    The text is sent as it is: a code word in capitals (ERR, WRONGTYPE, MISCONF...) and a sentence.
    """


class StorageError(EngramError):
    """The log or a snapshot cannot take or do what was asked of it; nothing has changed by it.

    `engram.commands.storage_errors` has the words for clients.
    """


class LogFullError(StorageError):
    """No space can be allocated for the log: `reason` says why, in the system's words."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RecordTooLargeError(StorageError):
    """What is to be recovered together does not fit into one record of the log."""


class SnapshotRunningError(StorageError):
    """Another snapshot is being made."""


class SnapshotError(StorageError):
    """A snapshot could not be made, for this `reason`; the state on disk is as before."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class OperatorError(EngramError):
    """The server cannot start or go on; the text says why and what to do."""


class ConfigError(OperatorError):
    """A setting is unknown or malformed."""


class DirectoryInUseError(OperatorError):
    """Another server holds the data directory."""


class DamagedDataError(OperatorError):
    """A file of the data directory is missing, or is not what was written."""

    def __init__(self, path: Path, reason: str, offset: int | None = None) -> None:
        self.path = path
        self.reason = reason
        self.offset = offset
        where = f"{path}" if offset is None else f"{path} at offset {offset}"
        super().__init__(f"{where}: {reason}")


class NewerFormatError(OperatorError):
    """A file is intact, and holds what only a newer engram can read: `what`, a phrase, is not known."""

    def __init__(self, path: Path, what: str, offset: int | None = None) -> None:
        where = f"{path}" if offset is None else f"{path} at offset {offset}"
        super().__init__(
            f"{where}: written by a newer engram ({what}): use that version; to go back to this one, dump the"
            " directory there and load the dump here, see docs/how-to/upgrade.md"
        )


class LogFailureError(OperatorError):
    """A write or sync of the log failed."""


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: of a group the first error, of a long text the last line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines()
    if not lines:
        return "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    if isinstance(error, EngramError | OSError):
        return lines[-1]
    return f"{type(error).__name__}: {lines[-1]}"


class ChangeFailureError(OperatorError):
    """A change of the state failed half-way, or could not be logged.

    What is in memory is not what recovery would make of the log: nothing may be read or changed any more.
    `__cause__` is what went wrong.
    """

    def __str__(self) -> str:
        return (
            f"a change failed half-way ({self.__cause__!r}), and what is in memory cannot be trusted;"
            " what was acknowledged is recovered at the next start"
        )


class UnknownKindError(TypeError):
    """A value is of no kind that is known: nothing could copy it, count it or keep it on disk."""

    def __init__(self, found: type) -> None:
        super().__init__(f"{found.__name__} is the type of no kind of value")


class NothingChangedError(MemoryError):
    """There was no memory for the first step of a change, which is taken as a whole: nothing has changed."""
