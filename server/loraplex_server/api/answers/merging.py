"""Several answers at once: piece by piece as they come, or each when it is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


async def merged(sources: Sequence[AsyncGenerator[ItemT]]) -> AsyncGenerator[ItemT]:
    """The items of all `sources` as they come.

    The first error of a source ends all. Leaving early closes every source. A source is asked for its next
    item only when its last one was taken, so a slow reader makes them wait.
    """
    queue: asyncio.Queue[tuple[ItemT] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(source: AsyncGenerator[ItemT]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    await queue.put((item,))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    left = len(tasks)
    try:
        while left:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                left -= 1
            else:
                yield entry[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def as_finished(jobs: Iterable[Coroutine[Any, Any, ItemT]], limit: int) -> AsyncGenerator[ItemT]:
    """The results of the jobs, as they finish. They begin in order, and no more than `limit` of them are
    unfinished, or finished and not taken. Leaving early cancels those that run. A job that raises ends all.
    """
    waiting = iter(jobs)
    tasks = {asyncio.create_task(job) for job in islice(waiting, limit)}
    try:
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            while done:
                yield done.pop().result()
                tasks |= {asyncio.create_task(job) for job in islice(waiting, 1)}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
