"""What a request may ask for at most. Each bound is a setting, and looked at before anything is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engram.commands.allowance import SMALL_REPLY, NoRoomError, reply_too_long
from engram.commands.session import Session
from engram.commands.table import Command
from engram.commands.wording import in_words
from engram.config import Config
from engram.errors import CommandError
from engram.index.errors import FilterError, FilterTooDeepError, FilterTooLongError
from engram.index.filters import Filter, compile_filter


def check_reply(session: Session, size: int) -> None:
    """Raises CommandError when a large reply of `size` bytes must not be made.

    It may be as long as the longest string, and as all replies that are held leave room for.
    """
    if size > session.server.held_replies.longest:
        raise CommandError(
            f"ERR the reply would take {size} bytes, more than client-output-buffer-limit and"
            " proto-max-bulk-len"
        )
    _check_room(session, size)


def check_results(session: Session, size: int) -> None:
    """As `check_reply`, for one that need not have a string of any length."""
    if size > session.server.config.client_output_buffer_limit:
        raise reply_too_long(size)
    _check_room(session, size)


def _check_room(session: Session, size: int) -> None:
    if size > SMALL_REPLY:
        try:
            session.server.held_replies.check_room(size)
        except NoRoomError:
            session.server.hurry_clients()
            raise


def check(value: int, most: int, name: str) -> None:
    """Raises CommandError when a value, which clients know by `name`, is more than it may be."""
    if value > most:
        raise CommandError(f"ERR {name} must be at most {most}")


def check_keys(command: Command, request: Sequence[bytes], config: Config) -> None:
    """Raises CommandError when a command that writes names a key longer than `max-key-length`."""
    if command.writes:
        _check_lengths((request[position] for position in command.key_positions(request)), "key", config)


def check_members(members: Iterable[bytes], config: Config) -> None:
    """Raises CommandError when a member to be added to an index is longer than `max-key-length`."""
    _check_lengths(members, "member", config)


def _check_lengths(names: Iterable[bytes], kind: str, config: Config) -> None:
    most = config.max_key_length
    if max(map(len, names), default=0) > most:
        raise CommandError(f"ERR {kind} is longer than max-key-length, {most} bytes")


Compiled = Filter | FilterError
"""A filter that has been compiled already, or what was wrong with it."""


def bounded_filter(session: Session, expression: bytes, compiled: Compiled | None = None) -> Filter:
    """The filter of an expression, which may have been compiled already.

    Raises CommandError when it is not one, too long, or too deep.
    """
    config = session.server.config
    if len(expression) > config.vector_max_filter_length:
        raise in_words(FilterTooLongError(config.vector_max_filter_length))
    if compiled is None or (isinstance(compiled, Filter) and compiled.text != expression):
        try:
            compiled = compile_filter(expression)
        except FilterError as error:
            compiled = error
    if isinstance(compiled, FilterError):
        raise in_words(compiled)
    if compiled.depth > config.vector_max_filter_depth:
        raise in_words(FilterTooDeepError(config.vector_max_filter_depth))
    return compiled
