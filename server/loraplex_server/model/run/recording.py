"""Records work on a device for replay.

On CUDA a recording is a graph: one launch replays every kernel of the work, with the recorded arguments and
addresses. On other devices a replay calls the work again, with the inputs that it was recorded with; so tests
there can show what a replay does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Does some work once, and returns a function that replays it."""


def recorder(device: torch.device) -> Recorder:
    """The recorder for a device. Its recordings share memory, so two replays must not overlap."""
    return _GraphRecorder(device).record if device.type == "cuda" else _call_again


def _call_again(work: Work) -> Work:
    work()
    return work


class _GraphRecorder:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA cannot record on the default stream.
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()
        # Garbage that is freed in the middle of a recording could make it fail.
        gc.collect()

    def record(self, work: Work) -> Work:
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            # A first run: compiling and loading kernels and allocating libraries' workspace cannot be
            # recorded.
            work()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Threads that load adapters may use the device at the same time.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        present.wait_stream(self._stream)
        replay: Work = graph.replay
        return replay
