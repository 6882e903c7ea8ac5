"""Loads 2,000 Debian packages with their embeddings into engram and searches them.

    python -m examples.search_packages --port 6380

Needs a running engram, and redis and numpy (both in engram's `dev` extra).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import redis

INDEX = "packages"
BATCH = 500


class Packages(NamedTuple):
    """The rows of packages.npz: `vectors` (2000, 384) and `query_vectors` (50, 384), as <f4."""

    vectors: npt.NDArray[np.float32]
    synopses: dict[str, str]
    query_vectors: npt.NDArray[np.float32]
    query_texts: list[str]


def read_packages() -> Packages:
    with np.load(Path(__file__).with_name("packages.npz")) as arrays:
        return Packages(
            vectors=arrays["vectors"].astype("<f4"),
            synopses=dict(zip(arrays["names"].tolist(), arrays["synopses"].tolist(), strict=True)),
            query_vectors=arrays["query_vectors"].astype("<f4"),
            query_texts=arrays["query_texts"].tolist(),
        )


def show_found(text: str, reply: Sequence[bytes], synopses: dict[str, str]) -> None:
    """Prints a reply of VSEARCH, a flat array of key and distance, closest first."""
    print(text)
    for name, distance in zip(reply[::2], reply[1::2], strict=True):
        print(f"  {float(distance):.3f}  {name.decode():<32} {synopses[name.decode()]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="load 2,000 package descriptions and search them")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6380)
    parser.add_argument("--queries", type=int, default=4, help="how many of the 50 texts to search for")
    return parser.parse_args()


def load(client: redis.Redis, packages: Packages) -> int:
    """Adds every package in pipelines of `BATCH`; returns how many were new."""
    if not client.exists(INDEX):
        client.execute_command("VNEW", INDEX, packages.vectors.shape[1])
    rows = list(zip(packages.synopses, packages.vectors, strict=True))
    replies: list[Any] = []
    for start in range(0, len(rows), BATCH):
        pipeline = client.pipeline(transaction=False)
        for name, vector in rows[start : start + BATCH]:
            pipeline.execute_command("VADD", INDEX, name, vector.tobytes())
        replies += pipeline.execute()
    return sum(replies)


def main() -> None:
    arguments = parse_arguments()
    packages = read_packages()
    with redis.Redis(host=arguments.host, port=arguments.port) as client:
        print(f"{load(client, packages)} of {len(packages.synopses)} packages were new")
        texts = packages.query_texts[: arguments.queries]
        for text, query in zip(texts, packages.query_vectors, strict=False):
            found = client.execute_command("VSEARCH", INDEX, query.tobytes(), 3)
            show_found(text, found, packages.synopses)


if __name__ == "__main__":
    main()
