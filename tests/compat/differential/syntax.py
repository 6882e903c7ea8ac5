"""The syntax of commands as a Redis documents it: https://redis.io/docs/latest/commands/command-docs/."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from tests.compat.differential.wire import Reply


@attrs.frozen
class Argument:
    """One argument; see "Key-Value arguments" in Redis's page."""

    name: str
    type: str
    token: bytes | None
    optional: bool
    multiple: bool
    multiple_token: bool
    arguments: tuple[Argument, ...]


def documented(reply: Reply) -> dict[str, tuple[Argument, ...]]:
    """The arguments of each command in a reply of COMMAND DOCS; containers are replaced by their parts."""
    found: dict[str, tuple[Argument, ...]] = {}
    for name, fields in _pairs(reply):
        table = dict(_pairs(fields))
        if b"subcommands" in table:
            found |= documented(table[b"subcommands"])
        else:
            found[name.decode().lower()] = _arguments(table)
    return found


def _pairs(reply: Reply) -> Iterator[tuple[bytes, Reply]]:
    words = iter(reply.elements)
    for name in words:
        yield name.text, next(words)


def _arguments(table: dict[bytes, Reply]) -> tuple[Argument, ...]:
    if b"arguments" not in table:
        return ()
    found = []
    for element in table[b"arguments"].elements:
        fields = dict(_pairs(element))
        flags = {flag.text for flag in fields[b"flags"].elements} if b"flags" in fields else set()
        token = fields.get(b"token")
        found.append(
            Argument(
                fields[b"name"].text.decode(),
                fields[b"type"].text.decode(),
                None if token is None else token.text,
                b"optional" in flags,
                b"multiple" in flags,
                b"multiple_token" in flags,
                _arguments(fields),
            )
        )
    return tuple(found)
