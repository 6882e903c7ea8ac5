"""The `engram` and `trio-run` console scripts."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from engram import __version__
from engram.config import SETTINGS, Config, load_config
from engram.errors import ConfigError, DamagedDataError, OperatorError
from engram.hearing import end_once_deaf
from engram.log_lines import logging_to
from engram.server import Started, first_error, serve
from engram.standard_streams import EXIT_FAILURE, OutputError, complain, discard, prepare_streams, say

logger = logging.getLogger("engram")

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

SUBCOMMANDS = ("check", "dump", "load")


def main() -> int:
    """The `engram` script: runs what the command line says; returns the exit code."""
    return _run(command_line, sys.argv[1:])


def trio_run() -> int:
    """The `trio-run` script: `trio-run PACKAGE ARGUMENT...` runs a package's command line under Trio.

    The package has a module `cli` with `async def command_line(arguments) -> exit code`.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: trio-run PACKAGE [ARGUMENT ...]", file=sys.stderr)
        return EXIT_USAGE
    package = sys.argv[1]
    try:
        entry = importlib.import_module(f"{package}.cli").command_line
    except (ImportError, AttributeError):
        print(f"trio-run: '{package}' has no cli.command_line to run", file=sys.stderr)
        return EXIT_USAGE
    return _run(entry, sys.argv[2:])


def _run(entry: Callable[[Sequence[str]], Awaitable[int]], arguments: Sequence[str]) -> int:
    prepare_streams()
    code = EXIT_FAILURE
    try:
        code = trio.run(entry, arguments)
    except* KeyboardInterrupt:
        # A thread that reads or writes may hold what an orderly exit would wait for.
        os._exit(EXIT_INTERRUPTED)
    return code


async def command_line(arguments: Sequence[str]) -> int:
    """Runs a subcommand, or else a server until SIGTERM, SIGINT or SHUTDOWN; a second signal ends it at once.

    Returns 0 after a clean shutdown, 1 when the server cannot start, cannot go on or was ended at once, 2 for
    a bad command line. A subcommand returns 0 when it could do what it was told and found nothing wrong.
    """
    if arguments and arguments[0] in SUBCOMMANDS:
        return await _subcommand(arguments[0], arguments[1:])
    if list(arguments) in (["--help"], ["-h"]):
        return _tell(usage())
    if list(arguments) in (["--version"], ["-v"]):
        return _tell(f"engram {__version__}")
    try:
        config = load_config(arguments)
    except ConfigError as error:
        complain(error)
        return EXIT_USAGE
    try:
        with logging_to(config.logfile, config.loglevel):
            return await _serve(config)
    except OperatorError as error:
        complain(error)
        return EXIT_FAILURE


def _tell(text: str) -> int:
    try:
        say(text)
    except OutputError as error:
        complain(error)
    except BrokenPipeError:
        pass
    else:
        return 0
    return EXIT_FAILURE


async def _serve(config: Config) -> int:
    shutdown = trio.Event()
    code = EXIT_FAILURE
    try:
        async with trio.open_nursery() as signals:
            signals.start_soon(_watch_signals, shutdown, signals.cancel_scope)
            signals.start_soon(end_once_deaf)
            async with trio.open_nursery() as nursery:
                report(await nursery.start(partial(serve, config, shutdown=shutdown)))
            code = 0
            signals.cancel_scope.cancel()
    except* OperatorError as group:
        reason = first_error(group)
        hint = f"; run `engram check {shlex.quote(config.dir)}` to see what can be done"
        complain(f"{reason}{hint if isinstance(reason, DamagedDataError) else ''}")
    return code


async def _subcommand(name: str, arguments: Sequence[str]) -> int:
    try:
        # Not imported above: a server starts the sooner without.
        subcommand = importlib.import_module("engram.subcommands").SUBCOMMANDS[name]
        code: int = await subcommand(arguments)
        return code
    except SystemExit as ended:
        # What argparse has said.
        return ended.code if isinstance(ended.code, int) else EXIT_USAGE
    except OperatorError as error:
        complain(error)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nor is there anyone for what is still in the buffer.
        discard(sys.stdout)
    return EXIT_FAILURE


def report(started: Started) -> None:
    """Prints what recovery found, on standard error, and the line that says the server is up.

    The server goes on where that cannot be printed.
    """
    if started.recovery is not None:
        for path in started.recovery.cut_files:
            complain(
                f"the last {started.recovery.torn_bytes} bytes of the log are not whole records, and"
                f" are not known to have been durable; they were cut and are kept in {path}"
            )
    addresses = [f"{host}:{port}" for host, port in started.addresses]
    addresses += [f"{host}:{port} (TLS)" for host, port in started.tls_addresses]
    where = ", ".join((*addresses, started.unixsocket) if started.unixsocket else addresses)
    if started.directory:
        kept = (
            f"persisting to {started.directory}: recovered {started.keys} keys and {started.vectors} vectors"
            f" in {started.seconds:.3f} s"
        )
    else:
        kept = "keeping nothing (no --dir): 0 keys and 0 vectors"
    try:
        say(f"engram {__version__} listening on {where}, {kept}")
    except (OutputError, BrokenPipeError) as error:
        logger.warning("listening on %s, which could not be printed: %s", where, error)


def usage() -> str:
    """The text of --help."""
    lines = [
        "usage: engram [config-file] [--setting value ...]",
        "       engram check DIR [--repair]",
        "       engram dump DIR [--output FILE] [--compact]",
        "       engram load FILE [--host HOST] [--port PORT] [--replace]",
        "",
        "The first runs a server, the others have a --help of their own. A config file holds `setting value`",
        "lines and # comments; the command line wins. Write ./check for one that is named like a subcommand.",
        "",
    ]
    for setting in SETTINGS.values():
        default = f" (default: {setting.default_text})" if setting.default_text else ""
        lines.append(f"  --{setting.name:<28} {setting.summary}{default}")
    return "\n".join(lines)


async def _watch_signals(shutdown: trio.Event, everything: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if shutdown.is_set():
                everything.cancel()
            shutdown.set()
