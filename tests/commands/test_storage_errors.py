from __future__ import annotations

import pytest

from engram.commands.storage_errors import refusals_in_words, worded
from engram.errors import (
    CommandError,
    LogFullError,
    RecordTooLargeError,
    SnapshotError,
    SnapshotRunningError,
    StorageError,
)
from engram.operations import Operation
from tests.conftest import ManualJournal, OpenHouse

NO_SPACE = "No space left on device"
TOO_LARGE = "ERR what would be changed at once does not fit into one record of the log, which holds 4 GiB"

WORDS: list[tuple[StorageError, str]] = [
    (LogFullError(NO_SPACE), f"MISCONF Errors writing to the log: {NO_SPACE}"),
    (RecordTooLargeError(), TOO_LARGE),
    (SnapshotRunningError(), "ERR Background save already in progress"),
    (SnapshotError(NO_SPACE), f"ERR save failed: {NO_SPACE}"),
]


@pytest.mark.parametrize(("error", "words"), WORDS)
def test_each_error_has_words(error: StorageError, words: str) -> None:
    assert str(worded(error)) == words
    with pytest.raises(CommandError) as raised, refusals_in_words():
        raise error
    assert str(raised.value) == words


def test_each_kind_is_worded() -> None:
    assert {type(error) for error, _ in WORDS} == set(StorageError.__subclasses__())


def test_other_errors_pass() -> None:
    with pytest.raises(CommandError, match=r"^ERR other$"), refusals_in_words():
        raise CommandError("ERR other")
    with pytest.raises(KeyError), refusals_in_words():
        raise KeyError


class NarrowJournal(ManualJournal):
    """A log whose records hold 100 bytes."""

    def reserve(self, lsn: int, operation: Operation) -> bytes:
        return self.encode(operation)

    def encode(self, operation: Operation, before: int = 0) -> bytes:
        payload = super().encode(operation)
        if before + len(payload) > 100:
            raise RecordTooLargeError
        return payload


async def test_what_is_too_large_for_the_log_is_refused_and_changes_nothing(open_house: OpenHouse) -> None:
    refused = f"-{TOO_LARGE}\r\n".encode()
    async with open_house(NarrowJournal(automatic=True)) as house:
        client = house.connect()
        assert await client.call([b"SET", b"k", bytes(100)]) == refused
        assert await client.call("GET k") == b"$-1\r\n"
        assert await client.call([b"SET", b"a", bytes(60)]) == b"+OK\r\n"
        await client.send("MULTI", [b"SET", b"b", bytes(60)], [b"SET", b"c", bytes(60)], "GET b", "EXEC")
        replies = await client.arrived()
        assert replies.endswith(b"*3\r\n+OK\r\n" + refused + b"$60\r\n" + bytes(60) + b"\r\n")
