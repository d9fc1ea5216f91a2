"""The device's working and idle times, by its own clock: CUDA events between the kernels of the steps."""

from __future__ import annotations

import torch


class Span:
    """The device's time for one step."""

    def __init__(
        self, before: torch.cuda.Event | None, begin: torch.cuda.Event, end: torch.cuda.Event
    ) -> None:
        self._before = before
        self._begin = begin
        self._end = end

    def seconds(self) -> tuple[float, float | None]:
        """Waits for the step's end, and returns its working time and the idle time before it, in seconds.

        The working time is from the first kernel to the last result. The idle time is from the end of the
        previous step to the first kernel; None for the first step.
        """
        self._end.synchronize()
        waited = None if self._before is None else self._before.elapsed_time(self._begin) / 1e3
        return self._begin.elapsed_time(self._end) / 1e3, waited


class DeviceClock:
    """Marks the steps on a CUDA device's current stream. On other devices it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._running = device.type == "cuda"
        self._begin: torch.cuda.Event | None = None
        self._last_end: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Marks the begin of a step: its inputs are queued, its kernels come next."""
        self._begin = self._mark()

    def end(self) -> Span | None:
        """Marks the end of the step: all its kernels are launched. None if the device has no clock."""
        begin, end = self._begin, self._mark()
        if begin is None or end is None:
            return None
        span = Span(self._last_end, begin, end)
        self._last_end = end
        return span

    def _mark(self) -> torch.cuda.Event | None:
        if not self._running:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
