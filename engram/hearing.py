"""Whether the loop hears its threads: without that, whatever waits for one waits for ever."""

from __future__ import annotations

from contextlib import suppress

import trio

from engram.standard_streams import end_at_once

# What is asked so often, with so many seconds between, and is never heard, will not be heard.
_LOOKS = 20
_LOOK_SECONDS = 0.1


async def end_once_deaf() -> None:
    """Waits until it is cancelled; if the loop hears no thread then, it ends the process.

    Trio hears threads in a task of its own (`TrioToken.run_sync_soon`), which ends where it finds no memory.
    Everything is cancelled then, but tasks that wait for a thread are not told what it did.
    """
    token, heard = trio.lowlevel.current_trio_token(), trio.Event()
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            for _ in range(_LOOKS):
                with suppress(MemoryError), trio.move_on_after(_LOOK_SECONDS):
                    token.run_sync_soon(heard.set)
                    await heard.wait()
                if heard.is_set():
                    break
            else:
                # What was acknowledged is as durable as it was promised to be.
                end_at_once(b"the word of threads does not arrive any more; was there no memory?")
