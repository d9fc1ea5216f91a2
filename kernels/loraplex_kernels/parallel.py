"""The number of CPU threads for an op.

torch splits most ops among all its threads, and each split ends in a barrier. It takes a few microseconds
while the other threads spin, a hundred or more once they sleep, milliseconds if another process has their
core. A decode step is hundreds of small ops, so an op that one thread finishes in less than `MIN_US` stays on
one thread.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

MIN_US = 150.0
"""Microseconds of one thread; shorter ops are not split."""

PRODUCTS_PER_US = 25_000
"""Approximate multiply-adds per microsecond of one core in a dense float32 product (50 GFLOP/s)."""

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
    """Set the most threads that an op may use, for the whole process."""
    global _all
    _all = count
    torch.set_num_threads(count)


def threads_for(cost_us: float) -> AbstractContextManager[None]:
    """A with block whose ops run on one thread or on all, depending on their cost; the inner block decides.

    Does nothing without `set_threads`, or if it set 1.

    Args:
        cost_us: microseconds that a single thread needs for one of the ops, within a factor of about two.
    """
    if _all is None or _all == 1:
        return _NOTHING
    wanted = _all if cost_us >= MIN_US else 1
    return _NOTHING if wanted == torch.get_num_threads() else _Threads(wanted)
