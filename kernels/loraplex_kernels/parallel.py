"""The number of CPU threads that an op is worth.

torch splits most ops among all its threads, and each split ends in a barrier: a few microseconds while the
other threads still spin at it, a hundred or more once they sleep, milliseconds where another process has
their core. A decode step is hundreds of small ops, so an op that one thread finishes in less than `MIN_US`
stays on one thread.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

MIN_US = 150.0
"""Ops that take one thread less than this are not split, in microseconds."""

PRODUCTS_PER_US = 25_000
"""Multiply-adds per microsecond of one core in a dense float32 product (50 GFLOP/s), about."""

_NOTHING = nullcontext()

_all: int | None = None


class _Threads:
    def __init__(self, wanted: int) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._wanted)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        torch.set_num_threads(self._before)


def set_threads(count: int) -> None:
    """The most threads that an op may use, for the whole process."""
    global _all
    _all = count
    torch.set_num_threads(count)


def threads_for(cost_us: float) -> AbstractContextManager[None]:
    """A with block whose ops run on one thread, or on all, as their cost says. Nests: the inner one holds.

    Without `set_threads` nothing is changed, nor where it said 1.

    Args:
        cost_us: what one of the ops takes a single thread, in microseconds, within a factor of two or so.
    """
    if _all is None or _all == 1:
        return _NOTHING
    wanted = _all if cost_us >= MIN_US else 1
    return _NOTHING if wanted == torch.get_num_threads() else _Threads(wanted)
