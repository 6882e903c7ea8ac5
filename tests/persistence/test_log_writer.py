from __future__ import annotations

from pathlib import Path

import pytest

from engram.errors import LogFailureError
from engram.operations import encode
from engram.persistence.layout import Layout
from engram.persistence.log_writer import LogWriter, PreparedFile, Run
from tests.persistence.conftest import HookedFiles, LogMaker, numbered, operation, read_back


def payloads(first: int, last: int) -> list[bytes]:
    return [encode(each) for _, each in numbered(first, last)]


def test_the_steps_of_changing_files_are_in_order(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory, files)
    log.write(payloads(1, 2), sync=False)
    old = files.calls[-1][1]
    files.calls.clear()
    log.new_file()
    log.write(payloads(3, 4))
    layout = Layout(directory)
    (created, *rest) = files.calls
    assert created[0] == "create"
    new = rest[1][1]
    assert [call[:2] for call in rest] == [
        ("sync_data", old),
        ("write_at", new),
        ("sync_data", new),
        ("rename", layout.prepared(2)),
        ("sync_folder", directory),
        ("write_at", new),
        ("sync_data", new),
    ]
    assert rest[3][2] == layout.log(3)
    log.close()


@pytest.mark.parametrize("step", range(7))
def test_a_crash_while_changing_files_loses_nothing_synced(
    directory: Path, files: HookedFiles, step: int
) -> None:
    log = LogMaker(directory, files)
    log.write(payloads(1, 2))
    log.write(payloads(3, 3), sync=False)
    log.new_file()
    start = len(files.calls)

    def crash(*_: object) -> None:
        if len(files.calls) == start + 1 + step:
            raise KeyboardInterrupt

    files.hook = crash
    with pytest.raises(KeyboardInterrupt):
        log.write(payloads(4, 4))
    recovered = read_back(directory)
    assert recovered.operations[:3] == numbered(1, 3)
    assert recovered.recovery.torn_bytes == 0
    log = LogMaker(directory)
    log.write(payloads(log.lsn + 1, 9))
    log.close()
    assert read_back(directory).operations == numbered(1, 9)


def test_a_batch_may_span_files(directory: Path) -> None:
    log = LogMaker(directory)
    layout = Layout(directory)
    spare = [
        PreparedFile(layout.prepared(n), 4096, log.files.create(layout.prepared(n), 4096)) for n in (7, 8)
    ]
    commit = log.writer.commit(
        [Run(1, spare[0], payloads(1, 3)), Run(4, spare[1], payloads(4, 5))], sync=False
    )
    assert (commit.durable_lsn, commit.recorded_lsn) == (3, 3)
    commit = log.writer.commit([], sync=True)
    assert (commit.durable_lsn, commit.recorded_lsn) == (5, 3)
    commit = log.writer.commit([Run(6, None, [], mark=True)], sync=True)
    assert (commit.durable_lsn, commit.recorded_lsn) == (5, 5)
    log.close()
    recovered = read_back(directory)
    assert recovered.operations == numbered(1, 5)
    assert recovered.recovery.recorded_durable_lsn == 5


def test_a_sync_with_nothing_to_sync_makes_no_call(directory: Path, files: HookedFiles) -> None:
    log = LogMaker(directory, files)
    assert log.writer.commit([], sync=True).sync_seconds is None
    log.write(payloads(1, 1))
    count = files.count("sync_data")
    assert log.writer.commit([], sync=True).sync_seconds is None
    assert files.count("sync_data") == count
    log.close()


def test_a_file_not_prepared_is_made_by_the_writer(directory: Path, files: HookedFiles) -> None:
    recovery = read_back(directory).recovery
    layout = Layout(directory)
    writer = LogWriter(layout, files, recovery)
    writer.commit([Run(1, PreparedFile(layout.prepared(1), 4096), [encode(operation(1))])], sync=True)
    writer.close()
    assert read_back(directory).operations == numbered(1, 1)


@pytest.mark.parametrize("name", ["write_at", "sync_data", "rename", "sync_folder"])
def test_any_failure_is_a_log_failure(directory: Path, files: HookedFiles, name: str) -> None:
    log = LogMaker(directory, files)
    log.write(payloads(1, 1))

    def fail(call: str, *_: object) -> None:
        if call == name:
            raise OSError(5, "Input/output error")

    log.new_file()
    files.hook = fail
    with pytest.raises(LogFailureError, match=r"wal-0000000002\.log.*Input/output error"):
        log.write(payloads(2, 2))
    log.close()
