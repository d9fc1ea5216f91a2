"""Threads for the store's slow work. A job's outcome comes back as data; nothing here touches the store."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loraplex_server.core.errors import (
    InternalError,
    Reason,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The outcome of a job: its result or its error, and the seconds that it took."""

    result: T | None
    error: ServerError | None
    seconds: float


class Worker:
    """One thread that does its jobs in the order they came.

    Args:
        post: takes (what to call, with what) from this thread; the store's own thread makes the call.
    """

    def __init__(self, name: str, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T], then: Callable[[Outcome[T]], None]) -> None:
        """Runs `work` on the thread and posts `then` with its outcome."""

        def job() -> None:
            outcome = _attempt(work)
            self._post(lambda: then(outcome))

        self._jobs.put(job)

    def close(self) -> None:
        """Waits for the running job; those that wait are not done any more."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed:
            job()


class WorkerPool:
    """A thread for each job, up to `size` at once; for jobs that mostly wait for others.

    Args:
        post: as for `Worker`.
    """

    def __init__(self, name: str, size: int, post: Callable[[Callable[[], None]], None]) -> None:
        self._name = name
        self._size = size
        self._post = post
        self._threads: set[threading.Thread] = set()

    def submit(self, work: Callable[[], T], then: Callable[[Outcome[T]], None]) -> None:
        """Runs `work` on a thread of its own and posts `then` with its outcome.

        Raises:
            ResourceExhaustedError: `size` jobs are running.
        """
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) >= self._size:
            raise ResourceExhaustedError(
                f"{self._size} adapters are being fetched already; try again later",
                resource=("jobs", "fetches"),
                retry_after_s=5.0,
                reason=Reason.TOO_MANY_JOBS,
            )

        def job() -> None:
            outcome = _attempt(work)
            self._post(lambda: then(outcome))

        thread = threading.Thread(target=job, name=self._name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def close(self, timeout_s: float) -> None:
        """Waits for the running jobs, which were told to end, but no longer than `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))


def _attempt(work: Callable[[], T]) -> Outcome[T]:
    begin = time.perf_counter()
    result, error = None, None
    try:
        result = work()
    except ServerError as failure:
        error = failure
    except OSError as failure:
        error = UnavailableError(f"reading failed: {failure.strerror or failure.__class__.__name__}")
    except Exception as failure:
        _log.exception("a job of the adapter cache failed")
        error = InternalError(f"the adapter cache failed: {failure.__class__.__name__}")
    return Outcome(result, error, time.perf_counter() - begin)


class DeviceCopier:
    """Copies a host blob into the device arena, beside the steps.

    On CUDA the copy has a stream of its own. It begins after all that was launched before `prepare`, because
    earlier steps may still read what lay in the extent before.
    """

    def __init__(self, arena: Tensor) -> None:
        self._arena = arena
        self._stream: torch.cuda.Stream | None = None
        if arena.device.type == "cuda":
            self._stream = torch.cuda.Stream(arena.device)

    def prepare(self, start: int, blob: Tensor) -> Callable[[], None]:
        """A job that fills the extent at `start`; call this on the thread that launches the steps."""
        target = self._arena[start : start + blob.numel()]
        if self._stream is None:
            return lambda: _copy_on_cpu(target, blob)
        stream = self._stream
        readers_done = torch.cuda.Event()
        readers_done.record(torch.cuda.current_stream(self._arena.device))

        def copy() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(readers_done)
                target.copy_(blob, non_blocking=True)
            stream.synchronize()

        return copy


def _copy_on_cpu(target: Tensor, source: Tensor) -> None:
    # NumPy copies without waking torch's worker threads, which belong to the steps.
    target.view(torch.uint8).numpy()[:] = source.view(torch.uint8).numpy()
