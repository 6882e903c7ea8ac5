"""How many files and connections this process may have open, and what leaves room for what.

The system gives the lowest number that is free: the number that somebody gets tells how many are in use.
"""

from __future__ import annotations

import os
import resource
import sys

import attrs

# Kept for the log, snapshots and processes that build graphs, however many clients and segments there are.
RESERVED = 128


@attrs.frozen
class DescriptorLimits:
    """What clients and segments may take.

    Attributes:
        numbers: the bound of the numbers of their descriptors, exclusive. What is above is for whatever must
            not fail.
        segments: how many segments may have, before there are no more of them.
    """

    numbers: int
    segments: int


NO_LIMITS = DescriptorLimits(sys.maxsize, sys.maxsize)


def raise_limits(most_clients: int) -> DescriptorLimits:
    """Raises the limit of open files as far as this process may, and shares it out.

    `most_clients` is how many clients are wanted: they are left as much, but no more than half.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = hard if hard != resource.RLIM_INFINITY else sys.maxsize
    numbers = limit - RESERVED
    return DescriptorLimits(numbers, numbers - min(most_clients, numbers // 2))


def in_use() -> int:
    """How many descriptors are in use, or a few less when one of the first was closed. Raises OSError."""
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(descriptor)
    return descriptor
