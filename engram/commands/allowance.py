"""How many bytes replies may take: one of them, those of one client, and those of all clients together."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Protocol

from engram.config import Config
from engram.errors import CommandError

# Replies of up to so many bytes are made whatever else is held: only so many may wait for a client.
SMALL_REPLY = 64 << 10


class NoRoomError(CommandError):
    """The replies held for all clients leave no room for a large one."""


def reply_too_long(size: int) -> CommandError:
    """What is answered in place of results of `size` bytes, or more."""
    return CommandError(f"ERR the reply would take {size} bytes, more than client-output-buffer-limit")


class Client(Protocol):
    """Whom replies are for."""

    @property
    def buffered(self) -> Callable[[], tuple[int, int]]:
        """Bytes of requests and of replies that are held for the client."""

    @property
    def reserved(self) -> int:
        """Bytes of replies that are being made."""

    @reserved.setter
    def reserved(self, size: int) -> None: ...


class HeldReplies:
    """Bytes of replies that are held for all clients together.

    Attributes:
        waiting: those in outboxes; changed on the loop only.
        reserved: those of allowances.
        lock: held while allowances are changed, by any thread.
    """

    __slots__ = ("_config", "lock", "reserved", "waiting")

    def __init__(self, config: Config) -> None:
        self._config = config
        self.waiting = 0
        self.reserved = 0
        # An allowance may be within another, and end whenever memory is freed.
        self.lock = RLock()

    @property
    def longest(self) -> int:
        """Bytes that a reply of strings may take. A long one asked for many times would fill any memory."""
        return max(self._config.client_output_buffer_limit, self._config.proto_max_bulk_len)

    def check_room(self, size: int) -> None:
        """Raises NoRoomError when a large reply of `size` bytes would be more than all may have waiting."""
        total = self.waiting + self.reserved + size
        if total > max(self._config.output_buffer_total_limit, self.longest):
            raise NoRoomError(
                f"ERR the replies that wait for all clients would take {total} bytes, more than"
                " output-buffer-total-limit"
            )

    def check_client(self, client: Client, size: int, most: int) -> None:
        """Raises CommandError when a client would have more waiting than its limit and `most`.

        It is read from only below its limit, so that this takes several searches whose replies are much
        longer than they were thought to be.
        """
        waiting = client.reserved + client.buffered()[1] + size
        if waiting > self._config.client_output_buffer_limit + most:
            raise CommandError(
                f"ERR the replies that wait for this client would take {waiting} bytes, more than"
                " client-output-buffer-limit"
            )

    def allowance(
        self, client: Client, within: Allowance | None = None, most: int | None = None
    ) -> Allowance:
        """What one reply may take, perhaps within what those of an EXEC may take together.

        That is `most`, or client-output-buffer-limit when None.
        """
        limit = self._config.client_output_buffer_limit
        return Allowance(self, client, limit if most is None else most, within)


class Allowance:
    """The bytes that a reply may take, or all those of one EXEC together: `most`.

    Threads take of it what they are about to make. As soon as that is more than a small reply it counts as
    held, until `release`, or until nobody refers to the allowance any more: whoever drops a search need not
    know what was made for it. What is made on the loop is added to `made`. An allowance within another takes
    of both.
    """

    __slots__ = ("_client", "_held", "_most", "_reserved", "_within", "made", "taken")

    def __init__(self, held: HeldReplies, client: Client, most: int, within: Allowance | None = None) -> None:
        self.made = 0
        self.taken = 0
        self._most = most
        self._held = held
        self._client = client
        self._within = within
        self._reserved = 0

    def __del__(self) -> None:
        self.release()

    @property
    def used(self) -> int:
        """Bytes of what has been made, or is being made."""
        return self.taken + self.made

    @property
    def left(self) -> int:
        """Bytes that may be made beside; negative when more has been made than should be."""
        return self._most - self.taken - self.made

    @property
    def exceeded(self) -> bool:
        """Whether more has been made than should be."""
        return self.left < 0

    def take(self, size: int) -> None:
        """Takes bytes that are about to be made. Raises CommandError when they are too many."""
        # Threads may take at the same time, for parts of the same reply.
        with self._held.lock:
            used = self.taken + self.made + size
            if used > self._most:
                raise reply_too_long(used)
            if self._within is not None:
                self._within.take(size)
            elif used > SMALL_REPLY:
                self._held.check_client(self._client, size, self._most)
                self._held.check_room(size)
                self._reserve(self.taken + size - self._reserved)
            self.taken += size

    def hold(self) -> None:
        """What was made on the loop is held from here on, too."""
        self.taken, self.made = self.used, 0
        self._reserve(self.taken - self._reserved)

    def release(self) -> None:
        """What was made has been handed on, or is gone."""
        if self._reserved:
            self._reserve(-self._reserved)

    def _reserve(self, size: int) -> None:
        with self._held.lock:
            self._reserved += size
            self._held.reserved += size
            self._client.reserved += size
