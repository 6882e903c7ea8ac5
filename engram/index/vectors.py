"""Vectors as clients send them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engram.index.errors import VectorEncodingError, VectorNormError, WrongDimensionError

Vector = npt.NDArray[np.float32]

# Squares, and sums of a few of them, then stay finite in float32.
MAXIMUM_NORM = 1e18
# What a sum of squares may lose to rounding, generously.
_SURELY_WITHIN = 0.99


def decode_vector(blob: bytes, dimension: int) -> Vector:
    """The vector, float32 of shape (dimension,), that little-endian float32 bytes stand for.

    It is a read-only view of `blob`.

    Raises:
        VectorEncodingError: the bytes are no float32 numbers.
        WrongDimensionError: there are more of them, or fewer.
        VectorNormError: there is a NaN or an infinity among them, or distances would overflow.
    """
    size = len(blob)
    if size != 4 * dimension:
        if not size or size % 4:
            raise VectorEncodingError(size)
        raise WrongDimensionError(dimension, size // 4)
    vector = np.frombuffer(blob, "<f4")
    # Unlike other products, vdot does not warn of an overflow. Written so that a NaN fails too.
    if not np.vdot(vector, vector) <= MAXIMUM_NORM**2:
        raise VectorNormError(MAXIMUM_NORM)
    return vector


def check_sizes(blobs: Sequence[bytes], dimension: int) -> None:
    """Raises VectorError, as `decode_vector` does, for the first of some vectors that has a wrong size."""
    if not set(map(len, blobs)) <= {4 * dimension}:
        for blob in blobs:
            if len(blob) != 4 * dimension:
                decode_vector(blob, dimension)


def join_vectors(blobs: Sequence[bytes], dimension: int) -> bytes:
    """Vectors, each as `decode_vector` takes it, one after the other.

    Raises:
        VectorError: as `decode_vector`, for one that is wrong; those of a wrong size come first.
    """
    check_sizes(blobs, dimension)
    joined = b"".join(blobs)
    rows = np.frombuffer(joined, "<f4").reshape(len(blobs), dimension)
    with np.errstate(all="ignore"):
        # It sums in another order than `decode_vector`, which has the last word.
        suspect = ~(np.einsum("ij,ij->i", rows, rows) <= _SURELY_WITHIN * MAXIMUM_NORM**2)
    for position in np.flatnonzero(suspect).tolist():
        decode_vector(blobs[position], dimension)
    return joined
