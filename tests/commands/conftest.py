"""Conversations: requests and the replies that must come, written as Redis 8 sends them in RESP2."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from typing import Any

import hiredis
import pytest

from tests.conftest import Client, House, vector

NO_INDEX = b"-ERR no such index\r\n"
NOT_AN_INTEGER = b"-ERR value is not an integer or out of range\r\n"
SYNTAX_ERROR = b"-ERR syntax error\r\n"
WRONG_TYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"

EMPTY = b"*0\r\n"

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


@pytest.fixture(params=["HELLO 2", "HELLO 3"])
async def client(request: pytest.FixtureRequest, house: House) -> Client:
    """A client that speaks RESP2, and one that speaks RESP3."""
    client = house.connect()
    await client.call(request.param)
    return client


def bulk(value: str | bytes) -> bytes:
    """A bulk string."""
    value = value.encode() if isinstance(value, str) else value
    return b"$%d\r\n%b\r\n" % (len(value), value)


def bulks(*values: str | bytes) -> bytes:
    """An array of bulk strings."""
    return array(*map(bulk, values))


def array(*replies: bytes) -> bytes:
    """An array of replies."""
    return b"*%d\r\n%b" % (len(replies), b"".join(replies))


async def add(client: Client, index: str, key: str, *numbers: float) -> bytes:
    """Sends VADD."""
    return await client.call([b"VADD", index.encode(), key.encode(), vector(*numbers)])


async def search(client: Client, index: str, query: bytes, *rest: bytes) -> bytes:
    """Sends VSEARCH."""
    return await client.call([b"VSEARCH", index.encode(), query, *rest])


def parse(reply: bytes) -> Any:
    """A reply as values of Python."""
    reader = hiredis.Reader()
    reader.feed(reply)
    return reader.gets()


async def info(client: Client, index: str) -> dict[str, str]:
    """Sends VINFO."""
    words = [word.decode() for word in parse(await client.call(f"VINFO {index}"))]
    return dict(zip(words[::2], words[1::2], strict=True))
