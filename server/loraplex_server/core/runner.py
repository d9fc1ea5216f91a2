"""The interface between the engine, which plans steps, and the model, which computes them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from loraplex_server.core.step import StepOutput, StepPlan


class Launched(Protocol):
    """A step that may still be running."""

    def result(self) -> StepOutput:
        """Waits for the step; the output has one token for each of the plan's `sample_row`."""


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    @property
    def asynchronous(self) -> bool:
        """True if `launch` returns before the step is computed."""

    def launch(self, plan: StepPlan) -> Launched:
        """Starts to compute and sample a plan. Its `fed_from` refers to the plan of the previous call."""

    def usable(self) -> bool:
        """True if the device still computes; the engine asks after a failed step."""

    def weight_checksum(self) -> Generator[None, None, str]:
        """Computes SHA-256 over the resident base weights piece by piece.

        It yields between pieces, so that the caller can do other work, and returns the hex digest at the end.
        """
