"""What takes longer than one step of the loop may: reads in a thread, and what is taken in turns.

A read looks at what does not change any more: a view of the state as it is when the request is carried out. A
thread of the search service makes the reply from it, while its client and all others go on. What cannot be
done so, since it changes the state or names many keys, is done in turns: between two of them other clients
go on, but see no data and change none until it is over. What is not about the data needs no such care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

import trio

from engram.commands.allowance import Allowance
from engram.commands.session import Barrier, Pieces, Server, Session, Slot, Turns
from engram.commands.table import Reply
from engram.commands.wording import in_words
from engram.errors import CommandError
from engram.index.errors import RefusalError
from engram.protocol import replies

T = TypeVar("T")

ELEMENTS_A_TURN: Final = 1024
"""Elements, such as keys, that are looked at or changed in one turn of the loop: a millisecond or so."""

_OVER = object()


def read(
    session: Session,
    make: Callable[[Allowance], bytes],
    failed: str,
    *,
    elements: int | None = None,
    held: int = 0,
    size: int = 0,
    most: int | None = None,
) -> bytes | Slot:
    """A reply that is made from what does not change any more.

    Args:
        make: makes it, and takes of the allowance what it is about to make.
        failed: what has failed, where `make` raises what is no CommandError.
        elements: how many `make` looks at. It is called at once for few of them; a thread calls it for many,
            or for None.
        held: bytes of memory that are held for `make` until it is called.
        size: about how many bytes the reply will have, where that may be many.
        most: bytes that it may have; client-output-buffer-limit when None.

    Raises:
        CommandError: `make` was called, and raised it; or there is no room for what is held.
    """
    held_replies = session.server.held_replies
    if elements is not None and elements <= ELEMENTS_A_TURN:
        # In EXEC as well what is made here is counted once it has been made.
        allowance = held_replies.allowance(session, most=most)
        try:
            return make(allowance)
        finally:
            allowance.release()
    allowance = held_replies.allowance(session, session.allowance, most=most)
    allowance.take(held)
    slot = Slot(size)

    def done(outcome: bytes | Exception) -> None:
        # From here on the outbox counts it.
        allowance.release()
        session.fill(slot, outcome, failed)

    searches = session.server.searches
    searches.submit_read(partial(make, allowance), done, lambda: slot.awaited, session.id)
    return slot


async def outcome_of(session: Session, function: Callable[[], T], failed: str) -> T:
    """What a read returns that is a part of something longer. A thread makes it.

    Raises:
        CommandError: it has failed; `failed` says what has.
    """
    outcomes: list[tuple[T] | Exception] = []
    known = trio.Event()
    wanted = True

    def done(outcome: tuple[T] | Exception) -> None:
        outcomes.append(outcome)
        known.set()

    # What it returns may be an error, too.
    session.server.searches.submit_read(lambda: (function(),), done, lambda: wanted, session.id)
    try:
        await known.wait()
    finally:
        wanted = False
    outcome = outcomes.pop()
    if isinstance(outcome, RefusalError):
        raise in_words(outcome)
    if isinstance(outcome, Exception):
        raise CommandError(f"ERR {failed}: {outcome}") from outcome
    return outcome[0]


def in_turns(session: Session, turns: Iterator[object], answer: Callable[[], bytes | Pieces]) -> Reply:
    """Takes one turn after the other, beside which nobody sees or changes the data, and then answers.

    The first is taken at once. In EXEC the others are turns of its own.
    """
    if not session.executing:
        return alone(session.server, turns, answer)
    return answer() if next(turns, _OVER) is _OVER else Turns(turns, answer)


def beside_others(session: Session, turns: Iterator[object], answer: Callable[[], bytes]) -> Reply:
    """Takes one turn after the other, between which others go on as ever, and then answers.

    The first is taken at once. What has been begun is finished even if the client leaves. In EXEC the others
    are turns of its own.
    """
    if next(turns, _OVER) is _OVER:
        return answer()
    if session.executing:
        return Turns(turns, answer)

    async def go_on() -> bytes:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            for _ in turns:
                await trio.lowlevel.checkpoint()
        return answer()

    return Barrier(go_on)


def by_slices(items: Sequence[T], size: int, work: Callable[[Sequence[T]], object]) -> Iterator[None]:
    """Does the work on one slice after the other of so many items; yields between two."""
    for start in range(0, len(items), size):
        if start:
            yield
        work(items[start : start + size])


def array_by_slices(
    session: Session, items: Sequence[T], size: int, encode: Callable[[Sequence[T]], Iterable[bytes]]
) -> Reply:
    """The array of what `encode` makes of each of the items; others go on after each `size` of them."""
    parts: list[bytes] = []
    turns = by_slices(items, size, lambda some: parts.extend(encode(some)))
    return beside_others(session, turns, lambda: replies.array(parts))


def alone(
    server: Server, turns: Iterator[object], answer: Callable[[], bytes | Pieces | Barrier]
) -> bytes | Pieces | Barrier:
    """Takes one turn after the other while other clients are kept from the data, and then answers.

    The first is taken at once. When it is not the only one, the server's own task takes the others: what has
    been begun is finished even if the client leaves.
    """
    if next(turns, _OVER) is _OVER:
        return answer()
    server.exclusion.begin()
    over = trio.Event()
    failure: Exception | None = None

    async def go_on() -> None:
        nonlocal failure
        try:
            with trio.CancelScope(shield=True):
                for _ in turns:
                    await trio.lowlevel.checkpoint()
        except Exception as error:
            failure = error
        finally:
            server.exclusion.end()
            over.set()

    async def wait() -> bytes | Pieces:
        await over.wait()
        if failure is not None:
            raise failure
        reply = answer()
        return await reply.reply() if isinstance(reply, Barrier) else reply

    try:
        server.start_soon(go_on)
    except BaseException:
        # What has been begun is finished all the same, in one turn.
        for _ in turns:
            pass
        server.exclusion.end()
        raise
    return Barrier(wait)
