"""What tells an operator how the server is doing: SLOWLOG, LATENCY and MONITOR."""

from __future__ import annotations

from functools import cache, partial

from engram.commands.arguments import integer, text
from engram.commands.long_work import array_by_slices
from engram.commands.session import Session
from engram.commands.table import Command, Reply, container, help_command
from engram.errors import CommandError
from engram.protocol import replies
from engram.protocol.replies import EMPTY_ARRAY, OK, ZERO
from engram.slowlog import SlowCall
from engram.statistics import Usage

_SHOWN_BY_DEFAULT = 10
# Entries of the slow log that are encoded in one turn of the loop.
_SHOWN_AT_ONCE = 256

_WRONG_NUMBER = "ERR unknown subcommand or wrong number of arguments for '{}'. Try {} HELP."


def _slowlog_get(session: Session, arguments: list[bytes]) -> Reply:
    if len(arguments) > 3:
        raise CommandError(_WRONG_NUMBER.format(text(arguments[1]), "SLOWLOG"))
    count = _SHOWN_BY_DEFAULT
    if len(arguments) == 3:
        message = "ERR count should be greater than or equal to -1"
        count = integer(arguments[2], message)
        if count < -1:
            raise CommandError(message)
    calls = list(session.server.slowlog)
    if count >= 0:
        calls = calls[:count]
    return array_by_slices(session, calls, _SHOWN_AT_ONCE, partial(map, _slow_call))


def _slow_call(call: SlowCall) -> bytes:
    return replies.array(
        (
            replies.integer(call.id),
            replies.integer(call.time),
            replies.integer(call.microseconds),
            replies.bulk_array(call.arguments),
            replies.bulk(call.address.encode("utf-8", "surrogateescape")),
            replies.bulk(call.name.encode()),
        )
    )


def _slowlog_len(session: Session, arguments: list[bytes]) -> bytes:
    return replies.integer(len(session.server.slowlog))


def _slowlog_reset(session: Session, arguments: list[bytes]) -> bytes:
    session.server.slowlog.clear()
    return OK


def _monitor(session: Session, arguments: list[bytes]) -> bytes:
    if session.executing:
        raise CommandError("ERR MONITOR isn't allowed for DENY BLOCKING client")
    session.monitor()
    return OK


def _no_events(session: Session, arguments: list[bytes]) -> bytes:
    return EMPTY_ARRAY


def _latency_reset(session: Session, arguments: list[bytes]) -> bytes:
    return ZERO


def _latency_graph(session: Session, arguments: list[bytes]) -> bytes:
    raise CommandError(f"ERR No samples available for event '{text(arguments[2])}'")


def _latency_doctor(session: Session, arguments: list[bytes]) -> bytes:
    return session.encoder.verbatim(
        "Events of latency are not monitored here. LATENCY HISTOGRAM, INFO latencystats and SLOWLOG tell how"
        " long commands took.\n"
    )


def _latency_histogram(session: Session, arguments: list[bytes]) -> bytes:
    usage = session.server.statistics.usage
    names: list[str] = sorted(usage)
    if len(arguments) > 2:
        # A container stands for its subcommands.
        meant: dict[bytes, list[str]] = {}
        for name in names:
            meant.setdefault(name.encode(), []).append(name)
            container_name, bar, _ = name.partition("|")
            if bar:
                meant.setdefault(container_name.encode(), []).append(name)
        # There may be many words, but few of them are names.
        wanted = dict.fromkeys(filter(meant.__contains__, map(bytes.lower, arguments[2:])))
        names = list(dict.fromkeys(name for word in wanted for name in meant[word]))
    encoder = session.encoder
    return encoder.map(
        (replies.bulk(name.encode()), encoder.map(_histogram(session, usage[name])))
        for name in names
        if usage[name].calls
    )


def _histogram(session: Session, usage: Usage) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    buckets = ((_bound(bound), replies.integer(calls)) for bound, calls in usage.histogram())
    return (
        (replies.bulk(b"calls"), replies.integer(usage.calls)),
        (replies.bulk(b"histogram_usec"), session.encoder.map(buckets)),
    )


@cache
def _bound(nanoseconds: int) -> bytes:
    """The bound of a bucket as Redis has it, whose histogram keeps two significant digits."""
    return replies.integer((nanoseconds + (nanoseconds >> 7) - 1) // 1000)


_SLOWLOG_HELP = (
    "SLOWLOG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "GET [<count>]",
    "    Return top <count> entries from the slowlog (default: 10, -1 mean all).",
    "    Entries are made of:",
    "    id, timestamp, time in microseconds, arguments array, client IP and port,",
    "    client name",
    "LEN",
    "    Return the length of the slowlog.",
    "RESET",
    "    Reset the slowlog.",
    "HELP",
    "    Print this help.",
)

_LATENCY_HELP = (
    "LATENCY <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    "DOCTOR",
    "    Return a human readable latency analysis report.",
    "GRAPH <event>",
    "    Return an ASCII latency graph for the <event> class.",
    "HISTORY <event>",
    "    Return time-latency samples for the <event> class.",
    "LATEST",
    "    Return the latest latency samples for all events.",
    "RESET [<event> ...]",
    "    Reset latency data of one or more <event> classes.",
    "    (default: reset all data for all event classes)",
    "HISTOGRAM [COMMAND ...]",
    "    Return a cumulative distribution of latencies in the format of a histogram for the specified command"
    " names.",
    "    If no commands are specified then all histograms are replied.",
    "HELP",
    "    Print this help.",
)

_GROUP = "server"
_ADMIN = ("admin", "loading", "stale")
_FLAGS = ("admin", "noscript", "loading", "stale")
_EVENTS = "Nothing: events of latency are not monitored."

COMMANDS = (
    Command(
        "monitor",
        _monitor,
        1,
        "",
        "Shows each request that the server carries out, as it comes.",
        _GROUP,
        _FLAGS,
    ),
    container(
        "slowlog",
        (
            Command(
                "slowlog|get",
                _slowlog_get,
                -2,
                "[count]",
                "Returns the slow log's entries.",
                _GROUP,
                _ADMIN,
                since="2.2.12",
                complexity="O(N) where N is the number of entries returned",
            ),
            Command(
                "slowlog|len",
                _slowlog_len,
                2,
                "",
                "Returns the number of entries in the slow log.",
                _GROUP,
                _ADMIN,
                since="2.2.12",
            ),
            Command(
                "slowlog|reset",
                _slowlog_reset,
                2,
                "",
                "Clears all entries from the slow log.",
                _GROUP,
                _ADMIN,
                since="2.2.12",
                complexity="O(N) where N is the number of entries in the slowlog",
            ),
            help_command("slowlog", _GROUP, _SLOWLOG_HELP),
        ),
        summary="A container for slow log commands.",
        group=_GROUP,
        since="2.2.12",
    ),
    container(
        "latency",
        (
            Command("latency|doctor", _latency_doctor, 2, "", _EVENTS, _GROUP, _FLAGS, since="2.8.13"),
            Command("latency|graph", _latency_graph, 3, "event", _EVENTS, _GROUP, _FLAGS, since="2.8.13"),
            Command("latency|history", _no_events, 3, "event", _EVENTS, _GROUP, _FLAGS, since="2.8.13"),
            Command("latency|latest", _no_events, 2, "", _EVENTS, _GROUP, _FLAGS, since="2.8.13"),
            Command(
                "latency|reset",
                _latency_reset,
                -2,
                "[event [event ...]]",
                _EVENTS,
                _GROUP,
                _FLAGS,
                since="2.8.13",
            ),
            Command(
                "latency|histogram",
                _latency_histogram,
                -2,
                "[command [command ...]]",
                "Returns the cumulative distribution of latencies of commands.",
                _GROUP,
                _FLAGS,
                since="7.0.0",
                complexity="O(N) where N is the number of commands",
            ),
            help_command("latency", _GROUP, _LATENCY_HELP),
        ),
        summary="A container for latency diagnostics commands.",
        group=_GROUP,
        since="2.8.13",
    ),
)
