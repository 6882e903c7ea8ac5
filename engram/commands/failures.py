"""What a client is told when a command fails by no fault of its own."""

from __future__ import annotations

import logging
from contextlib import suppress

from engram.commands.session import Session

OUT_OF_MEMORY = "OOM Insufficient memory, failed allocating what the command needs"
_INTERNAL_ERROR = "ERR internal error, see the log of the server"

logger = logging.getLogger(__name__)


def excuse(error: Exception, session: Session) -> str:
    """The text of the reply to a command that failed by an error of ours, which is logged."""
    # There may be no memory for that.
    with suppress(MemoryError):
        logger.error("a command of client %s failed", session.address, exc_info=error)
    return OUT_OF_MEMORY if isinstance(error, MemoryError) else _INTERNAL_ERROR
