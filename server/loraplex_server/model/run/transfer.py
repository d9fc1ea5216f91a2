"""Copies a step's small inputs to the device, and its results back, with one copy each way.

On a GPU, copies are queued on the current stream and use pinned memory; only `Fetch.wait` waits for the
device. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Words = np.ndarray[Any, np.dtype[np.int64]] | np.ndarray[Any, np.dtype[np.float64]]
"""An array of eight-byte numbers."""


def send(arrays: Sequence[Words], device: torch.device) -> list[torch.Tensor]:
    """Copies one-dimensional arrays to the device in one piece; returns a tensor per array, in its dtype."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    host = torch.empty(sum(len(array) for array in arrays), dtype=torch.int64, pin_memory=pins(device))
    fill(host, arrays)
    # The allocator does not reuse pinned memory before the copy is done.
    copied = host.to(device, non_blocking=True)
    parts, start = [], 0
    for array in arrays:
        part = copied[start : start + len(array)]
        parts.append(part.view(torch.float64) if array.dtype == np.float64 else part)
        start += len(array)
    return parts


def fill(host: torch.Tensor, arrays: Sequence[Words]) -> None:
    """Writes arrays one after the other into `host`: int64 [sum of their lengths] on the CPU."""
    np.concatenate([array.view(np.int64) for array in arrays], out=host.numpy())


def pins(device: torch.device) -> bool:
    """True if asynchronous copies to and from `device` need pinned memory on the host."""
    return device.type == "cuda"


class Fetch:
    """A tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Queues the copy on the current stream."""
        self._copied: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type != "cpu":
            pinned = pins(tensor.device)
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._host.copy_(tensor, non_blocking=True)
            if pinned:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def wait(self) -> np.ndarray[Any, Any]:
        """Waits for the copy and returns the values."""
        if self._copied is not None:
            self._copied.synchronize()
        values: np.ndarray[Any, Any] = self._host.numpy()
        return values
