"""What a client may do now: five small state machines, and the events that move them.

The machines are independent of each other, and one event may move several. Each is a table of transitions,
drawn in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final


class Standing(StrEnum):
    """Whether a client has authenticated: https://redis.io/docs/latest/commands/auth/."""

    STRANGER = "has yet to authenticate"
    GUEST = "has not authenticated, and nobody has to"
    MEMBER = "has authenticated, or came while nobody had to"
    REMOVED = "its user is gone"


class Queueing(StrEnum):
    """MULTI and EXEC: https://redis.io/docs/latest/develop/interact/transactions/."""

    NONE = "commands are carried out as they come"
    QUEUEING = "commands are queued for EXEC"
    FAILED = "a command was refused: EXEC will carry out none"
    EXECUTING = "EXEC carries out what was queued"


class ReplyMode(StrEnum):
    """CLIENT REPLY: https://redis.io/docs/latest/commands/client-reply/."""

    ON = "replies are sent"
    OFF = "no replies are sent"
    SKIP_NEXT = "the reply to the next command is not sent, nor is this one"
    SKIP = "the next reply is not sent"


class Course(StrEnum):
    """Whether the client's next request is carried out."""

    READY = "requests are carried out"
    PAUSED = "a pause holds a request"
    BLOCKED = "a command waits: WAIT or WAITAOF"
    CLOSING = "the connection ends once the replies so far are sent"
    CLOSED = "the connection has ended"


class Role(StrEnum):
    """Whether the client looks on: https://redis.io/docs/latest/commands/monitor/."""

    NORMAL = "has commands carried out"
    MONITOR = "is shown the commands of others, and keeps off the data"


class Event(StrEnum):
    """What happens to a client."""

    LOG_IN = "log in"
    # Nobody has to authenticate from now on, or all those who have not.
    OPEN = "open"
    SHUT = "shut"
    LOSE_USER = "lose user"

    MULTI = "multi"
    REFUSE = "refuse"
    # What was queued is taken or forgotten: by EXEC, DISCARD or RESET, or because the client leaves.
    END_MULTI = "end multi"
    EXECUTE = "execute"
    FINISH = "finish"

    REPLY_ON = "reply on"
    REPLY_OFF = "reply off"
    REPLY_SKIP = "reply skip"
    WITHHOLD = "withhold"

    PAUSE = "pause"
    RESUME = "resume"
    BLOCK = "block"
    UNBLOCK = "unblock"
    LEAVE = "leave"
    CLOSE = "close"

    MONITOR = "monitor"

    RESET = "reset"


# The states, and what follows each after an event. What is not there cannot come.
Machine = Mapping[StrEnum, Mapping[Event, StrEnum]]

STANDING: Final[Machine] = {
    Standing.STRANGER: {
        Event.LOG_IN: Standing.MEMBER,
        Event.OPEN: Standing.GUEST,
        Event.SHUT: Standing.STRANGER,
        Event.RESET: Standing.STRANGER,
    },
    Standing.GUEST: {
        Event.LOG_IN: Standing.MEMBER,
        Event.OPEN: Standing.GUEST,
        Event.SHUT: Standing.STRANGER,
        Event.RESET: Standing.STRANGER,
    },
    Standing.MEMBER: {
        Event.LOG_IN: Standing.MEMBER,
        Event.OPEN: Standing.MEMBER,
        Event.SHUT: Standing.MEMBER,
        Event.RESET: Standing.STRANGER,
        Event.LOSE_USER: Standing.REMOVED,
    },
    # Such a client ends, but an EXEC that removed its user goes on to the end.
    Standing.REMOVED: {
        Event.LOG_IN: Standing.MEMBER,
        Event.OPEN: Standing.REMOVED,
        Event.SHUT: Standing.REMOVED,
        Event.LOSE_USER: Standing.REMOVED,
    },
}

QUEUEING: Final[Machine] = {
    Queueing.NONE: {
        Event.MULTI: Queueing.QUEUEING,
        Event.END_MULTI: Queueing.NONE,
        Event.EXECUTE: Queueing.EXECUTING,
    },
    Queueing.QUEUEING: {
        Event.REFUSE: Queueing.FAILED,
        Event.END_MULTI: Queueing.NONE,
    },
    Queueing.FAILED: {
        Event.REFUSE: Queueing.FAILED,
        Event.END_MULTI: Queueing.NONE,
    },
    Queueing.EXECUTING: {
        # The client leaves: what has been begun is finished.
        Event.END_MULTI: Queueing.EXECUTING,
        Event.FINISH: Queueing.NONE,
    },
}

REPLIES: Final[Machine] = {
    ReplyMode.ON: {
        Event.REPLY_ON: ReplyMode.ON,
        Event.REPLY_OFF: ReplyMode.OFF,
        Event.REPLY_SKIP: ReplyMode.SKIP_NEXT,
        Event.RESET: ReplyMode.ON,
    },
    ReplyMode.OFF: {
        Event.REPLY_ON: ReplyMode.ON,
        Event.REPLY_OFF: ReplyMode.OFF,
        Event.REPLY_SKIP: ReplyMode.OFF,
        Event.WITHHOLD: ReplyMode.OFF,
        Event.RESET: ReplyMode.ON,
    },
    ReplyMode.SKIP_NEXT: {
        Event.REPLY_ON: ReplyMode.ON,
        Event.REPLY_OFF: ReplyMode.OFF,
        Event.REPLY_SKIP: ReplyMode.SKIP_NEXT,
        Event.WITHHOLD: ReplyMode.SKIP,
        Event.RESET: ReplyMode.ON,
    },
    ReplyMode.SKIP: {
        Event.REPLY_ON: ReplyMode.ON,
        Event.REPLY_OFF: ReplyMode.OFF,
        Event.REPLY_SKIP: ReplyMode.SKIP_NEXT,
        Event.WITHHOLD: ReplyMode.ON,
        Event.RESET: ReplyMode.ON,
    },
}

COURSE: Final[Machine] = {
    Course.READY: {
        Event.PAUSE: Course.PAUSED,
        Event.BLOCK: Course.BLOCKED,
        Event.LEAVE: Course.CLOSING,
        Event.CLOSE: Course.CLOSED,
    },
    Course.PAUSED: {Event.RESUME: Course.READY, Event.CLOSE: Course.CLOSED},
    Course.BLOCKED: {Event.UNBLOCK: Course.READY, Event.CLOSE: Course.CLOSED},
    Course.CLOSING: {Event.LEAVE: Course.CLOSING, Event.CLOSE: Course.CLOSED},
    # Whatever was under way comes to its end.
    Course.CLOSED: dict.fromkeys(
        (Event.PAUSE, Event.RESUME, Event.BLOCK, Event.UNBLOCK, Event.LEAVE, Event.CLOSE), Course.CLOSED
    ),
}

ROLE: Final[Machine] = {
    Role.NORMAL: {Event.MONITOR: Role.MONITOR, Event.RESET: Role.NORMAL},
    Role.MONITOR: {Event.MONITOR: Role.MONITOR, Event.RESET: Role.NORMAL},
}

# Each machine by the attribute of `ClientState` that holds its state.
MACHINES: Final[Mapping[str, Machine]] = {
    "standing": STANDING,
    "queueing": QUEUEING,
    "replies": REPLIES,
    "course": COURSE,
    "role": ROLE,
}

# What each event moves: the attribute, and the state that follows each in which the event can come.
_MOVES: Final[Mapping[Event, Sequence[tuple[str, Mapping[StrEnum, StrEnum]]]]] = {
    event: [
        (name, {state: row[event] for state, row in table.items() if event in row})
        for name, table in MACHINES.items()
        if any(event in row for row in table.values())
    ]
    for event in Event
}

_ADMITTED: Final = frozenset({Standing.GUEST, Standing.MEMBER})
_IN_MULTI: Final = frozenset({Queueing.QUEUEING, Queueing.FAILED})
_EXECUTING: Final = Queueing.EXECUTING
_ON: Final = ReplyMode.ON
_CLOSING: Final = Course.CLOSING


class ImpossibleEventError(RuntimeError):
    """An event came in a state in which it cannot."""


class ClientState:
    """The states of one client; `happen` is what changes them.

    What follows from them, and is asked for often:

    Attributes:
        authenticated: whether the client is in.
        in_multi: whether commands are queued, or refused, until EXEC.
        closing: whether the connection ends once the replies so far are sent.
        flowing: whether each reply is sent as it is made, or is a part of EXEC's, and the next request is
            carried out.
    """

    __slots__ = (
        "authenticated",
        "closing",
        "course",
        "flowing",
        "in_multi",
        "queueing",
        "replies",
        "role",
        "standing",
    )

    def __init__(self) -> None:
        self.standing = Standing.STRANGER
        self.queueing = Queueing.NONE
        self.replies = ReplyMode.ON
        self.course = Course.READY
        self.role = Role.NORMAL
        self.authenticated = self.in_multi = self.closing = False
        self.flowing = True

    def happen(self, event: Event) -> None:
        """Moves on each machine that the event concerns.

        Raises:
            ImpossibleEventError: one of them cannot have it now. Nothing has changed.
        """
        moves = _MOVES[event]
        for name, following in moves:
            if (state := getattr(self, name)) not in following:
                raise ImpossibleEventError(f"{event.name} cannot come in {type(state).__name__}.{state.name}")
        for name, following in moves:
            setattr(self, name, following[getattr(self, name)])
        self.authenticated = self.standing in _ADMITTED
        self.in_multi = self.queueing in _IN_MULTI
        self.closing = self.course is _CLOSING
        self.flowing = self.queueing is _EXECUTING or (self.replies is _ON and not self.closing)
