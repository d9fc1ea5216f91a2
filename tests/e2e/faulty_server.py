"""`loraplex serve` with faults built in, for tests; the folder `FAULTS` in its environment switches them.

A prompt with the token `STEP_FAILS` fails the step that computes it, one with `DEVICE_FAILS` that and all
that follow. While there is a file `hold`, the engine stands still in a step; while there is a file `closed`,
no engine starts.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STEP_FAILS, DEVICE_FAILS = 3, 98
"""Token ids of the demo model that no line has: `<unk>` and `~`."""

SECRET = "/secret/place"
"""Text that no client may see."""

UPLOAD_WAIT_S = 0.3


def _wait_without(name: str) -> None:
    while (Path(os.environ["FAULTS"]) / name).exists():
        time.sleep(0.005)


def _break_engine() -> None:
    from loraplex_server.model.run.runner import ModelRunner

    launch, lost = ModelRunner.launch, False

    def faulty(runner: ModelRunner, plan: object) -> object:
        nonlocal lost
        _wait_without("hold")
        pending = launch(runner, plan)
        lost = lost or DEVICE_FAILS in plan.token_ids
        if lost or STEP_FAILS in plan.token_ids:
            raise RuntimeError(f"a fault at {SECRET}")
        return pending

    ModelRunner.launch = faulty
    ModelRunner.usable = lambda runner: not lost
    _wait_without("closed")


if __name__ == "__mp_main__":
    # The engine's process, which is spawned.
    _break_engine()
elif __name__ == "__main__":
    from loraplex_server.api.requests import uploads
    from loraplex_server.cli import main

    uploads.CHUNK_WAIT_S = UPLOAD_WAIT_S
    sys.exit(main())
