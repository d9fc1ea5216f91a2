"""The text that the commands print: tables, states, counts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex import AdapterInfo, GenerationChunk


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_adapters(adapters: Iterable[AdapterInfo]) -> None:
    """Prints a table of adapters."""
    rows = [("NAME", "STATE", "RANK", "BYTES", "IN USE", "HITS", "MISSES", "MODULES")]
    rows += [
        (
            adapter.name,
            state_text(adapter),
            str(adapter.rank),
            f"{adapter.bytes:,}",
            str(adapter.references),
            str(adapter.hits),
            str(adapter.misses),
            ",".join(adapter.target_modules),
        )
        for adapter in adapters
    ]
    print_table(rows)


def state_text(adapter: AdapterInfo) -> str:
    """The adapter's state, such as `device pinned`."""
    marks = (" pinned" if adapter.pinned else "") + (" draining" if adapter.draining else "")
    return adapter.state + marks


def print_stream(chunks: Iterable[GenerationChunk]) -> GenerationChunk | None:
    """Prints the first answer as it arrives and the others below it; returns the last chunk."""
    last: GenerationChunk | None = None
    others: dict[int, str] = {}
    for last in chunks:
        # The pieces of several answers come mixed.
        if last.index:
            others[last.index] = others.get(last.index, "") + last.text
        else:
            print(last.text, end="", flush=True)
    print()
    for _, text in sorted(others.items()):
        print(text)
    return last


def print_stats(last: GenerationChunk) -> None:
    """Prints the tokens and seconds of a finished answer on stderr."""
    if last.usage is None or last.timing is None:
        return
    accepted = f" ({last.usage.accepted_tokens} drafted)" if last.usage.accepted_tokens else ""
    print(
        f"{last.usage.prompt_tokens} ({last.usage.cached_prompt_tokens} cached) + "
        f"{last.usage.completion_tokens} tokens{accepted} in "
        f"{last.timing.total_seconds:.3f} s, the first after "
        f"{last.timing.time_to_first_token_seconds:.3f} s; ended by {last.finish_reason}",
        file=sys.stderr,
    )


def print_progress(sent: int, total: int) -> None:
    """Prints the bytes of an upload on stderr, over the line before."""
    print(f"\r{sent:,} of {total:,} bytes", end="\n" if sent == total else "", file=sys.stderr, flush=True)
