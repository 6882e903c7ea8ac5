"""`engram check`, `engram dump` and `engram load`: their command lines and what they print."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio
from tqdm import tqdm

from engram.dump import dump_blocks, read_state, write_dump
from engram.errors import OperatorError
from engram.files import DiskFiles
from engram.load import Loaded, LoadError, load
from engram.persistence.check import (
    Examination,
    cut_log,
    describe_loss,
    describe_place,
    hold_directory,
    is_own,
)
from engram.standard_streams import EXIT_FAILURE, complain, discard, say

UNDAMAGED = "nothing that was durable is damaged"


async def _check(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "engram check",
        description="Reads a data directory that no server uses, without changing it, and prints for each"
        " file what it holds and the first thing wrong with it. The exit code is 0 when nothing is wrong,"
        " else 1.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the data directory")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="cut a damaged log at the first bad record, and keep what is cut under other names",
    )
    given = parser.parse_args(arguments)
    work = _repair_directory if given.repair else _check_directory
    return await trio.to_thread.run_sync(work, given.directory, abandon_on_cancel=not given.repair)


def _check_directory(directory: Path) -> int:
    with hold_directory(directory):
        examination = _examine(directory)
        cut = examination.cut()
    if not examination.damages:
        say(f"{directory}: {UNDAMAGED}")
        return 0
    _complain_of(examination)
    if cut is None:
        complain("cutting the log would not repair that: restore a copy of the directory")
    else:
        complain(
            f"`engram check {shlex.quote(str(directory))} --repair` would cut the log at"
            f" {describe_place(cut, directory)}; lost would be {describe_loss(cut)}"
        )
    return EXIT_FAILURE


def _repair_directory(directory: Path) -> int:
    with hold_directory(directory, exclusive=True):
        examination = _examine(directory)
        if not examination.damages:
            say(f"{directory}: {UNDAMAGED}; there is nothing to repair")
            return 0
        _complain_of(examination)
        cut = examination.cut()
        if cut is None:
            complain(
                "cutting the log would not repair that; nothing was changed: restore a copy of the directory"
            )
            return EXIT_FAILURE
        try:
            aside = cut_log(directory, DiskFiles(), cut)
        except OSError as error:
            reason = f"{error.filename or directory}: cannot be repaired: {error.strerror}"
            raise OperatorError(reason) from error
        say(f"cut {describe_place(cut, directory)}")
        say(f"lost {describe_loss(cut)}")
        for path in aside:
            say(f"kept {path}")
        again = Examination(directory)
        for _ in again.reports():
            pass
    if again.damages:
        _complain_of(again)
        return EXIT_FAILURE
    say(f"{directory}: {UNDAMAGED}")
    return 0


def _complain_of(examination: Examination) -> None:
    for damage in examination.damages:
        complain(damage)


def _examine(directory: Path) -> Examination:
    examination = Examination(directory)
    try:
        for report in examination.reports():
            say(f"{report.name:<25} {report.state:<7}  {report.details}")
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OperatorError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    return examination


async def _dump(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "engram dump",
        description="Writes what a data directory holds, which no server uses, as lines of JSON.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the data directory")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write this file, once the dump is whole, not standard output",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="write vectors as base64 of float32: smaller, faster, less plain",
    )
    given = parser.parse_args(arguments)
    work = partial(_dump_directory, given.directory, given.output, base64=given.compact)
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def _dump_directory(directory: Path, output: Path | None, *, base64: bool) -> int:
    files = DiskFiles()
    if output is not None and is_own(directory, output):
        raise OperatorError(f"{output}: a file of the data directory, which is not to be replaced")
    with hold_directory(directory):
        state = read_state(directory, files)
        if state.torn_bytes:
            complain(f"the last {state.torn_bytes} bytes of the log are not whole records, and left out")
        blocks = dump_blocks(state.engine, base64=base64)
        try:
            if output is None:
                for block in blocks:
                    sys.stdout.buffer.write(block)
                sys.stdout.flush()
            else:
                write_dump(files, output, blocks)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            if output is None:
                discard(sys.stdout)
            where = output or "standard output"
            raise OperatorError(f"{where}: cannot be written: {error.strerror}") from error
    return 0


async def _load(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "engram load", description="Loads a dump into a running server, and stops at the first error."
    )
    parser.add_argument("file", metavar="FILE", help="the dump; - for standard input")
    parser.add_argument("--host", default="127.0.0.1", help="of the server (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6380, help="of the server (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="overwrite keys that are there")
    given = parser.parse_args(arguments)
    started = trio.current_time()
    with ExitStack() as stack:
        # Not sys.stdin, for which an exit waits while a thread reads it; nor is this one closed, therefore.
        file: BinaryIO = open(0, "rb", closefd=False)  # noqa: ASYNC230, SIM115
        if given.file != "-":
            try:
                file = stack.enter_context(open(given.file, "rb"))  # noqa: ASYNC230 - nothing else runs
            except OSError as error:
                raise LoadError(f"{given.file}: cannot be read: {error.strerror}") from error
        loaded = await _load_file(file, given.host, given.port, replace=given.replace)
    seconds = trio.current_time() - started
    say(f"loaded {loaded.keys} keys and {loaded.vectors} vectors in {seconds:.1f} s")
    return 0


async def _load_file(file: BinaryIO, host: str, port: int, *, replace: bool) -> Loaded:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except (OSError, OverflowError) as error:
        # Trio's own error for a host that was found says only that all its addresses failed: theirs say why.
        cause = error.__cause__
        causes = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause or error,)
        reason = next((each.strerror for each in causes if isinstance(each, OSError) and each.strerror), None)
        reason = reason and reason.rpartition("): ")[2]  # trio puts the address before it
        raise LoadError(f"cannot connect to {host} port {port}: {reason or error}") from error
    with tqdm(unit=" lines", unit_scale=True, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        async with stream:
            return await load(file, stream, replace=replace, begin=bar.reset, advance=bar.update)


SUBCOMMANDS: Mapping[str, Callable[[Sequence[str]], Awaitable[int]]] = {
    "check": _check,
    "dump": _dump,
    "load": _load,
}
