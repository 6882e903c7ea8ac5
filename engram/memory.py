"""The limit of memory, `maxmemory`: what counts as used, who is refused, and which keys give way.

See https://redis.io/docs/latest/develop/reference/eviction/. What counts is the data: keys, strings and
expiries with the tables they are in, and what vector indices hold in memory. The interpreter, buffers of
clients and files that are mapped do not.
"""

from __future__ import annotations

import logging
from typing import Protocol

from engram.config import Config
from engram.database import Database
from engram.errors import CommandError
from engram.keyspace import nearest_to_lapse
from engram.kinds import KINDS
from engram.operations import DeleteKeys

OUT_OF_MEMORY = "OOM command not allowed when used memory > 'maxmemory'."

# Keys that make room for one command at most: while there are more to go, it is let through, as in Redis.
_EVICTED_AT_ONCE = 1024

logger = logging.getLogger(__name__)


class Named(Protocol):
    """What is said of a command that is refused."""

    @property
    def name(self) -> str: ...


class MemoryLimit:
    """Keeps what the database holds under `config.maxmemory` bytes; 0 is no limit.

    `evicted_keys` counts the keys that had to go.
    """

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self._refusing = False
        self.evicted_keys = 0
        self.reconfigure()

    def used(self) -> int:
        """Bytes that the data takes in memory.

        Exact to the bytes of keys and strings while there is a limit. Without one they are not counted:
        when there are thousands of keys, the oldest and the newest stand for all.
        """
        return self._database.engine.bytes_held()

    def vectors(self) -> int:
        """Bytes of it that vector indices take."""
        return self._database.engine.totals().bytes_reserved

    def reconfigure(self) -> None:
        """Follows a change of the settings: makes room at once, as far as that takes no time."""
        limit = self._config.maxmemory
        self._database.engine.keyspaces.count(limit > 0)
        self._refusing = False
        if limit:
            self._make_room()

    def admit(self, command: Named) -> None:
        """Makes room before a command that takes memory.

        To be called while there is a limit. Room is made for what is there, not for what the command adds.

        Raises:
            CommandError: more is used than the limit allows, and nothing can be evicted.
        """
        self._database.engine.keyspaces.count(True)
        if self._make_room():
            self._refusing = False
            return
        if not self._refusing:
            self._refusing = True
            logger.warning(
                "%s is refused, and what else takes memory: %d bytes are used, maxmemory is %d",
                command.name,
                self.used(),
                self._config.maxmemory,
            )
        raise CommandError(OUT_OF_MEMORY)

    def _make_room(self) -> bool:
        """Evicts as far as it may; whether commands may go on."""
        config = self._config
        excess = self.used() - config.maxmemory
        if excess <= 0:
            return True
        if config.maxmemory_policy == "noeviction":
            return False
        database = self._database
        left = _EVICTED_AT_ONCE
        while excess > 0 and left > 0:
            found = nearest_to_lapse(database.engine.keyspaces, excess, left, _evictable_bytes)
            if not found:
                return False
            for number, nearest in found.items():
                keys = database.deletable(nearest)
                if not keys:
                    # The command has to wait for the log before it is carried out.
                    return True
                database.commit(DeleteKeys(tuple(keys), number))
                self.evicted_keys += len(keys)
                left -= len(keys)
            excess = self.used() - config.maxmemory
        return True


def _evictable_bytes(value: object) -> int | None:
    """The bytes of a value, None for one that may not be evicted."""
    kind = KINDS.of(value)
    return kind.bytes_held(value) if kind.may_be_evicted else None
