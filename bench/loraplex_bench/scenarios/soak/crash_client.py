"""A client that opens streams and reads them until somebody kills it: what the soak kills.

    python -m loraplex_bench.scenarios.soak.crash_client HOST:PORT STREAMS ADAPTER...

Prints "streaming" once a token has come.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Sequence

from loraplex import AsyncClient
from loraplex_bench.demo.tasks import make_lines, prompt


async def main(server: str, streams: int, adapters: Sequence[str]) -> None:
    """Holds `streams` open, one after another on each, until it is killed."""
    said = False

    async with AsyncClient(server, retry=None) as client:

        async def read(index: int) -> None:
            nonlocal said
            lines = itertools.cycle(make_lines(index, 8))
            while True:
                async for _ in client.stream(
                    prompt(next(lines)),
                    adapter=adapters[index % len(adapters)],
                    max_tokens=400,
                    ignore_eos=True,
                ):
                    if not said:
                        said = True
                        print("streaming", flush=True)

        await asyncio.gather(*(read(index) for index in range(streams)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
