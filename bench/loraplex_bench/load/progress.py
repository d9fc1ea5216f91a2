"""Shows a load run while it goes on: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import TextIO

from loraplex_bench.load.generator import LoadState

PLAIN_INTERVAL_S = 5.0


def describe(state: LoadState) -> str:
    """One line that says how far the run is."""
    elapsed = max(state.elapsed_s, 1e-9)
    parts = [
        f"{state.done}/{state.total} done",
        f"{state.running} running",
        f"{state.tokens / elapsed:.0f} tokens/s",
        f"{elapsed:.0f} s",
    ]
    if state.right or state.wrong or state.leaks:
        parts.insert(2, f"{state.right} right, {state.wrong} wrong, {state.leaks} leaked")
    if state.failed:
        parts.insert(1, f"{state.failed} failed")
    return " | ".join(parts)


@contextlib.asynccontextmanager
async def live(
    text: Callable[[], str], *, stream: TextIO | None = None, interval_s: float = PLAIN_INTERVAL_S
) -> AsyncIterator[None]:
    """Shows `text()` on `stream` (standard error) again and again while the body runs."""
    out = stream or sys.stderr
    task = asyncio.create_task(_live_line(text, out) if out.isatty() else _plain_lines(text, out, interval_s))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _live_line(text: Callable[[], str], out: TextIO) -> None:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:  # rich comes with the extra bench
        await _plain_lines(text, out, PLAIN_INTERVAL_S)
        return
    with Live(text(), console=Console(file=out), transient=True, refresh_per_second=10) as display:
        while True:
            await asyncio.sleep(0.1)
            display.update(text())


async def _plain_lines(text: Callable[[], str], out: TextIO, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        print(text(), file=out, flush=True)
