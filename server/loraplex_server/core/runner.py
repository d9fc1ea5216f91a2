"""The engine's side of the model: what it asks of whoever computes its steps."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from loraplex_server.core.step import StepOutput, StepPlan


class Launched(Protocol):
    """A step that may still be running."""

    def result(self) -> StepOutput:
        """Waits for the step; one token for each of the plan's `sample_row`."""


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    @property
    def asynchronous(self) -> bool:
        """True if `launch` returns before the step is computed."""

    def launch(self, plan: StepPlan) -> Launched:
        """Starts to compute and sample a plan, whose `fed_from` is about the plan of the call before."""

    def usable(self) -> bool:
        """True if the device still computes; asked after a step that failed."""

    def weight_checksum(self) -> Generator[None, None, str]:
        """SHA-256 over the resident base weights, in pieces: yields between them, returns it at the end."""
