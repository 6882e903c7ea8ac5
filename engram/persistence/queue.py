"""The queue of the log: operations that have a place in it and wait to be written.

The place is settled on the loop, when an operation is appended: the queue knows how much of the file in use
is left and which files are prepared. The writer follows that plan batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import msgspec

from engram.errors import RecordTooLargeError
from engram.operations import LARGEST_TOGETHER, InstallSegment, Operation, encode
from engram.persistence import log_format
from engram.persistence.log_writer import PreparedFile, Run
from engram.persistence.recovery import Recovery
from engram.persistence.space import Space

# Bytes around the operations of a record, however many it holds.
FRAME_SIZE = log_format.RECORD_HEADER_SIZE + log_format.ARRAY_HEADER_SIZE


@attrs.define
class Batch:
    """What is written in one call.

    Attributes:
        lsn: the last operation in it, or before it.
        file_number: of the file that it ends in.
        end: what `RunQueue.end` was behind it.
    """

    runs: Sequence[Run]
    lsn: int
    file_number: int
    end: int


def _nothing() -> None:
    pass


class RunQueue:
    """Gives each operation its place in the log: one run, which becomes one record in one file.

    Args:
        note_segment: called with the LSN and the id of each segment that an operation puts into effect.

    Attributes:
        appended_lsn: of the last operation that was appended.
        file_number: of the file that it goes into.
        end: bytes of records that were planned since the start.
        file_end: what `end` will be when the file in use is full.
        written_end: what `end` was behind the last batch that is written.
        on_run: called when there is something to write.
    """

    def __init__(self, space: Space, recovery: Recovery, note_segment: Callable[[int, str], None]) -> None:
        self.appended_lsn = recovery.lsn
        self.file_number = recovery.log_file
        self.end = 0
        self.file_end = 0
        self.written_end = 0
        self.on_run: Callable[[], None] = _nothing
        self._space = space
        self._note_segment = note_segment
        # What `end` was when the file in use was begun, and may become at most before the last run is a
        # record that is full; -1 when none is.
        self._file_start = -1
        self._run_end = -1
        self._runs: list[Run] = []
        # Those of the last run.
        self._payloads: list[bytes] = []

    @property
    def queued_bytes(self) -> int:
        """Bytes of records that are not written yet."""
        return self.end - self.written_end

    @property
    def has_runs(self) -> bool:
        """Whether there is something to take."""
        return bool(self._runs)

    @property
    def file_has_records(self) -> bool:
        """Whether anything goes into the file in use; what recovery found counts as such a file."""
        return self.end > self._file_start

    def reserve(self, lsn: int, operation: Operation) -> bytes:
        """Encodes an operation that is about to be applied, and settles where it goes in the log.

        What is returned is for `append`, the next call, unless the operation is not applied after all.

        Raises:
            RecordTooLargeError: it does not fit into one record.
            ValueError: `lsn` does not follow the last one.
        """
        if lsn != self.appended_lsn + 1:
            raise self._out_of_turn(lsn)
        payload = self.encode(operation)
        if self.end + len(payload) > self._run_end:
            self._open_run(len(payload))
        return payload

    def append(self, lsn: int, operation: Operation, payload: bytes) -> None:
        """Queues an operation for the log, which has been reserved and applied."""
        self._payloads.append(payload)
        self.appended_lsn = lsn
        self.end += len(payload)
        if type(operation) is InstallSegment and operation.segment:
            self._note_segment(lsn, operation.segment)

    def encode(self, operation: Operation, before: int = 0) -> bytes:
        """Encodes an operation for `append_together`; `before` is what those before it take.

        Raises:
            RecordTooLargeError: what is to be recovered together does not fit into one record.
        """
        try:
            payload = encode(operation)
        except msgspec.MsgspecError as error:
            raise RecordTooLargeError from error
        if before + len(payload) > LARGEST_TOGETHER:
            raise RecordTooLargeError
        return payload

    def append_together(self, first_lsn: int, payloads: Sequence[bytes]) -> None:
        """As `append` one after the other, in one record: they are recovered all or none.

        They have a place in the log from here on only, for they may have been gathered for long. No segment
        is put into effect by them.

        Raises ValueError when `first_lsn` does not follow the last one.
        """
        if first_lsn != self.appended_lsn + 1:
            raise self._out_of_turn(first_lsn)
        size = sum(map(len, payloads))
        if self.end + size > self._run_end:
            self._open_run(size)
        self._payloads += payloads
        self.appended_lsn = first_lsn + len(payloads) - 1
        self.end += size

    def mark(self) -> bool:
        """Has the log say what is durable, by a mark or by the header of the next file.

        Returns False when there is no space for either.
        """
        if self.file_end - self.end >= log_format.RECORD_HEADER_SIZE:
            self._plan_run()
            self._runs[-1].mark = True
            self.file_end -= log_format.RECORD_HEADER_SIZE
        elif self._space.holds(0):
            self.switch()
        else:
            return False
        return True

    def switch(self, size: int = 0) -> None:
        """Has the log go on in the next file, which has room for a record of `size` bytes."""
        file = self._space.take(size + log_format.FILE_HEADER_SIZE)
        self._plan_run(file)
        self.file_number += 1
        self._file_start = self.end
        self.file_end = self.end + file.size - log_format.FILE_HEADER_SIZE

    def take(self) -> Batch:
        """Takes away all that is queued."""
        batch = Batch(self._runs, self.appended_lsn, self.file_number, self.end)
        self._runs, self._payloads, self._run_end = [], [], -1
        return batch

    def unused_files(self) -> list[PreparedFile]:
        """Those that were taken for runs which nobody has taken away."""
        return [run.next_file for run in self._runs if run.next_file is not None]

    def _open_run(self, size: int) -> None:
        """Has the next operations, which take so many bytes together, go into another record."""
        size += FRAME_SIZE
        if size > self.file_end - self.end:
            self.switch(size)
        elif self._payloads or not self._runs:
            self._plan_run()
        self.end += FRAME_SIZE
        self._run_end = min(self.file_end, self.end + LARGEST_TOGETHER)

    def _plan_run(self, next_file: PreparedFile | None = None) -> None:
        run = Run(self.appended_lsn + 1, next_file)
        self._runs.append(run)
        self._payloads, self._run_end = run.payloads, -1
        self.on_run()

    def _out_of_turn(self, lsn: int) -> ValueError:
        return ValueError(f"LSN {lsn} does not follow {self.appended_lsn}")
