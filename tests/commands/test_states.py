"""What may happen to a client in which state: every state with every event, also those that cannot come."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import pytest

from engram.commands.states import (
    MACHINES,
    ClientState,
    Course,
    Event,
    ImpossibleEventError,
    Queueing,
    ReplyMode,
    Role,
    Standing,
)
from tests.conftest import House

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"

KINDS: Mapping[str, type[StrEnum]] = {
    "standing": Standing,
    "queueing": Queueing,
    "replies": ReplyMode,
    "course": Course,
    "role": Role,
}

# What follows each state after each event; a dot where the event cannot come. Events that are named in no row
# of a machine do not concern it.
EXPECTED = {
    "standing": """
                 LOG_IN   OPEN      SHUT      LOSE_USER  RESET
      STRANGER   MEMBER   GUEST     STRANGER  .          STRANGER
      GUEST      MEMBER   GUEST     STRANGER  .          STRANGER
      MEMBER     MEMBER   MEMBER    MEMBER    REMOVED    STRANGER
      REMOVED    MEMBER   REMOVED   REMOVED   REMOVED    .
    """,
    "queueing": """
                 MULTI     REFUSE   END_MULTI  EXECUTE    FINISH
      NONE       QUEUEING  .        NONE       EXECUTING  .
      QUEUEING   .         FAILED   NONE       .          .
      FAILED     .         FAILED   NONE       .          .
      EXECUTING  .         .        EXECUTING  .          NONE
    """,
    "replies": """
                 REPLY_ON  REPLY_OFF  REPLY_SKIP  WITHHOLD  RESET
      ON         ON        OFF        SKIP_NEXT   .         ON
      OFF        ON        OFF        OFF         OFF       ON
      SKIP_NEXT  ON        OFF        SKIP_NEXT   SKIP      ON
      SKIP       ON        OFF        SKIP_NEXT   ON        ON
    """,
    "course": """
                 PAUSE   RESUME  BLOCK    UNBLOCK  LEAVE    CLOSE
      READY      PAUSED  .       BLOCKED  .        CLOSING  CLOSED
      PAUSED     .       READY   .        .        .        CLOSED
      BLOCKED    .       .       .        READY    .        CLOSED
      CLOSING    .       .       .        .        CLOSING  CLOSED
      CLOSED     CLOSED  CLOSED  CLOSED   CLOSED   CLOSED   CLOSED
    """,
    "role": """
                 MONITOR  RESET
      NORMAL     MONITOR  NORMAL
      MONITOR    MONITOR  NORMAL
    """,
}


def _cases() -> list[tuple[str, str, Event, str]]:
    cases = []
    for name, grid in EXPECTED.items():
        header, *rows = [line.split() for line in grid.strip().splitlines()]
        for state, *following in rows:
            for event, after in zip(header, following, strict=True):
                cases.append((name, state, Event[event], after))
    return cases


CASES = _cases()


def in_state(name: str, state: str) -> ClientState:
    """A client in that state of one machine, and in the other machines as at the start."""
    client = ClientState()
    setattr(client, name, KINDS[name][state])
    return client


@pytest.mark.parametrize(("name", "state", "event", "after"), CASES)
def test_transitions(name: str, state: str, event: Event, after: str) -> None:
    client = in_state(name, state)
    before = {other: getattr(client, other) for other in MACHINES}
    if after == ".":
        with pytest.raises(ImpossibleEventError, match=rf"{event.name} .*\.{state}$"):
            client.happen(event)
        assert {other: getattr(client, other) for other in MACHINES} == before
    else:
        client.happen(event)
        assert getattr(client, name) is KINDS[name][after]


def test_every_state_has_a_row_and_every_event_a_column() -> None:
    assert {(name, state) for name, state, _, _ in CASES} == {
        (name, state.name) for name, kind in KINDS.items() for state in kind
    }
    assert {event for _, _, event, _ in CASES} == set(Event)
    assert MACHINES.keys() == KINDS.keys()
    for name, table in MACHINES.items():
        concerned = {event for row in table.values() for event in row}
        assert concerned == {event for other, _, event, _ in CASES if other == name}


def test_an_event_moves_all_machines_or_none() -> None:
    client = in_state("standing", "REMOVED")
    client.role = Role.MONITOR
    with pytest.raises(ImpossibleEventError):
        client.happen(Event.RESET)
    assert client.role is Role.MONITOR
    client = in_state("standing", "MEMBER")
    client.role, client.replies = Role.MONITOR, ReplyMode.OFF
    client.happen(Event.RESET)
    assert (client.standing, client.role, client.replies) == (Standing.STRANGER, Role.NORMAL, ReplyMode.ON)


def test_the_machines_are_drawn_in_the_docs() -> None:
    [drawing] = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    names = {kind.__name__: name for name, kind in KINDS.items()}
    drawn: dict[str, set[tuple[str, str, str]]] = {}
    for title, body in re.findall(r"state (\w+) \{\n(.*?)\n    \}", drawing, re.DOTALL):
        [start] = re.findall(r"\[\*\] --> (\w+)\n", body)
        assert getattr(ClientState(), names[title]).name == start
        drawn[names[title]] = {
            (state, event, after)
            for state, after, events in re.findall(r"(\w+) --> (\w+): (.*)", body)
            for event in events.split(", ")
        }
    assert drawn == {
        name: {
            (state.name, event.name, after.name)
            for state, row in table.items()
            for event, after in row.items()
            if after is not state
        }
        for name, table in MACHINES.items()
    }


@pytest.mark.parametrize(
    ("name", "states", "attribute"),
    [
        ("standing", {"GUEST", "MEMBER"}, "authenticated"),
        ("queueing", {"QUEUEING", "FAILED"}, "in_multi"),
        ("replies", {"ON"}, "flowing"),
        ("course", {"READY", "PAUSED", "BLOCKED", "CLOSED"}, "flowing"),
    ],
)
def test_what_follows_from_the_states(name: str, states: set[str], attribute: str) -> None:
    found = set()
    for state, row in MACHINES[name].items():
        event = next((event for event, after in row.items() if after is state), None)
        client = in_state(name, state.name)
        # An event that leaves the machine where it is, or one that concerns another one.
        client.happen(event or Event.MONITOR)
        if getattr(client, attribute):
            found.add(state.name)
    assert found == states


def test_replies_of_exec_go_into_its_own() -> None:
    client = in_state("replies", "OFF")
    client.happen(Event.EXECUTE)
    assert client.flowing
    client.happen(Event.FINISH)
    assert not client.flowing


async def test_a_session_goes_through_its_states(house: House) -> None:
    client, operator = house.connect(), house.connect()
    await client.call("PING")
    session = house.server.sessions[1]
    state = session.state

    async def states(*requests: str) -> tuple[str, str, str, str, str]:
        if requests:
            await client.send(*requests)
        await client.arrived()
        machines = (state.standing, state.queueing, state.replies, state.course, state.role)
        return tuple(machine.name for machine in machines)  # type: ignore[return-value]

    assert await states("PING") == ("MEMBER", "NONE", "ON", "READY", "NORMAL")
    assert await states("MULTI") == ("MEMBER", "QUEUEING", "ON", "READY", "NORMAL")
    assert await states("NOSUCH") == ("MEMBER", "FAILED", "ON", "READY", "NORMAL")
    assert await states("EXEC") == ("MEMBER", "NONE", "ON", "READY", "NORMAL")
    assert await states("EXEC x", "WAIT 1 0") == ("MEMBER", "NONE", "ON", "BLOCKED", "NORMAL")
    assert await operator.call("CLIENT UNBLOCK 1") == b":1\r\n"
    assert await states() == ("MEMBER", "NONE", "ON", "READY", "NORMAL")
    assert await states("MONITOR", "CLIENT REPLY SKIP") == ("MEMBER", "NONE", "SKIP", "READY", "MONITOR")
    assert await states("PING", "CLIENT REPLY OFF") == ("MEMBER", "NONE", "OFF", "READY", "MONITOR")
    await operator.call("ACL SETUSER default resetpass >secret")
    assert await states("RESET") == ("STRANGER", "NONE", "ON", "READY", "NORMAL")
    await operator.call("ACL SETUSER default nopass")
    assert await states() == ("GUEST", "NONE", "ON", "READY", "NORMAL")
    await operator.call("ACL SETUSER bob on nopass +@all ~*")
    assert await states("AUTH bob x") == ("MEMBER", "NONE", "ON", "READY", "NORMAL")
    await operator.call("CLIENT PAUSE 100000 WRITE")
    assert await states("SET a 1") == ("MEMBER", "NONE", "ON", "PAUSED", "NORMAL")
    await operator.call("ACL DELUSER bob")
    assert await states() == ("REMOVED", "NONE", "ON", "CLOSED", "NORMAL")
