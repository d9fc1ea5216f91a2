"""When the device worked and when it waited, by its own clock: events between the kernels of the steps."""

from __future__ import annotations

import torch


class Span:
    """One step's time on the device."""

    def __init__(
        self, before: torch.cuda.Event | None, begin: torch.cuda.Event, end: torch.cuda.Event
    ) -> None:
        self._before = before
        self._begin = begin
        self._end = end

    def seconds(self) -> tuple[float, float | None]:
        """Waits for the step's end: from its first kernel to its last result, and from the end of the step
        before to the first kernel, None for the first of all steps.
        """
        self._end.synchronize()
        waited = None if self._before is None else self._before.elapsed_time(self._begin) / 1e3
        return self._begin.elapsed_time(self._end) / 1e3, waited


class DeviceClock:
    """Marks the steps on a CUDA device's current stream; on any other device it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._running = device.type == "cuda"
        self._begin: torch.cuda.Event | None = None
        self._last_end: torch.cuda.Event | None = None

    def begin(self) -> None:
        """The step's inputs are on their way; what is launched from here on is its work."""
        self._begin = self._mark()

    def end(self) -> Span | None:
        """The step is launched. None where there is no clock."""
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
