"""What search_packages.py does, with redis-py's asynchronous client.

    python -m examples.search_packages_async --port 6380

Searches that run side by side reach engram together, and it answers them as one batch.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis

from examples.search_packages import BATCH, INDEX, Packages, parse_arguments, read_packages, show_found


async def load(client: Redis, packages: Packages) -> int:
    """Adds every package in pipelines of `BATCH`; returns how many were new."""
    if not await client.exists(INDEX):
        await client.execute_command("VNEW", INDEX, packages.vectors.shape[1])
    rows = list(zip(packages.synopses, packages.vectors, strict=True))
    replies: list[Any] = []
    for start in range(0, len(rows), BATCH):
        pipeline = client.pipeline(transaction=False)
        for name, vector in rows[start : start + BATCH]:
            pipeline.execute_command("VADD", INDEX, name, vector.tobytes())
        replies += await pipeline.execute()
    return sum(replies)


async def main() -> None:
    arguments = parse_arguments()
    packages = read_packages()
    async with Redis(host=arguments.host, port=arguments.port) as client:
        print(f"{await load(client, packages)} of {len(packages.synopses)} packages were new")
        texts = packages.query_texts[: arguments.queries]
        found = await asyncio.gather(
            *(
                client.execute_command("VSEARCH", INDEX, query.tobytes(), 3)
                for query in packages.query_vectors[: arguments.queries]
            )
        )
        for text, reply in zip(texts, found, strict=True):
            show_found(text, reply, packages.synopses)


if __name__ == "__main__":
    asyncio.run(main())
