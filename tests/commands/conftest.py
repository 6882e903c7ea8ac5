"""Conversations: requests and the replies that must come, written as Redis 8 sends them in RESP2."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable

import pytest

from tests.conftest import House

Conversation = tuple[tuple[str | list[bytes], bytes], ...]
Converse = Callable[[Conversation], Awaitable[None]]


@pytest.fixture(params=[2, 3])
def converse(request: pytest.FixtureRequest, house: House) -> Converse:
    """Holds a conversation in RESP2 and in RESP3.

    Replies that differ in more than how null is written do not belong in one.
    """
    version: int = request.param

    async def hold(conversation: Conversation) -> None:
        client = house.connect()
        if version == 3:
            await client.call("HELLO 3")
        for words, expected in conversation:
            if isinstance(words, str):
                words = [word.encode() for word in shlex.split(words)]
            if version == 3:
                expected = expected.replace(b"$-1\r\n", b"_\r\n")
            assert (words, await client.call(words)) == (words, expected)

    return hold
