"""Distances as replies have them: decimal texts."""

from __future__ import annotations

import numpy as np

from engram.index.distances import Floats

# Texts of distances that are made in one go: nothing else runs in this process meanwhile.
_TEXTS_AT_ONCE = 2048


def format_distances(distances: Floats) -> list[bytes]:
    """Decimal texts, the shortest that read back as the same float32, without exponent: `0`, `2.5`, `-6`."""
    texts: list[bytes] = []
    for start in range(0, len(distances), _TEXTS_AT_ONCE):
        texts += _format(distances[start : start + _TEXTS_AT_ONCE])
    return texts


def _format(distances: Floats) -> list[bytes]:
    # Adding 0 turns -0 into 0.
    texts: list[bytes] = (distances + np.float32(0.0)).astype("S32").tolist()
    texts = [text[:-2] if text[-2:] == b".0" else text for text in texts]
    if b"e" in b"".join(texts):
        for position, text in enumerate(texts):
            if b"e" in text:
                plain = np.format_float_positional(distances[position], unique=True, trim="-")
                texts[position] = plain.encode()
    return texts
