"""What takes one client several turns of the loop: until it is over, the data belong to that client."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from engram.commands.session import Barrier, Pieces, Server

# Keys of a request that are looked at, set or deleted in one turn: a millisecond or two.
KEYS_A_TURN = 2048

_OVER = object()


def take_turns(
    server: Server, turns: Iterator[object], answer: Callable[[], bytes | Pieces | Barrier]
) -> bytes | Pieces | Barrier:
    """Takes one turn after the other, beside which nobody sees or changes the data, and then answers.

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
