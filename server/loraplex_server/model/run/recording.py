"""Recording work on a device, to be done again as it was.

On CUDA that is a graph: one launch replays every kernel of the work, with the arguments and at the addresses
of the recording. Elsewhere the work is called again; having kept what it was recorded with, it can show what
a replay would do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Does some work once and returns how to do it again."""


def recorder(device: torch.device) -> Recorder:
    """The recorder for a device; what it records shares memory, so no two replays may overlap."""
    return _GraphRecorder(device).record if device.type == "cuda" else _call_again


def _call_again(work: Work) -> Work:
    work()
    return work


class _GraphRecorder:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Recording wants a stream that is not the default one.
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()
        # What a collection frees in the middle of a recording could end it.
        gc.collect()

    def record(self, work: Work) -> Work:
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            # Compiles and loads kernels, has libraries allocate their workspace: it cannot be recorded.
            work()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The adapters' threads may use the device meanwhile.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        present.wait_stream(self._stream)
        replay: Work = graph.replay
        return replay
