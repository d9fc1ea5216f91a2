"""A real server with faults built in, and what the tests of faults share."""

from __future__ import annotations

import dataclasses
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraplex_bench.load.launcher import LaunchedServer

_SCRIPT = Path(__file__).with_name("faulty_server.py")


@dataclasses.dataclass(frozen=True)
class Faulty:
    """`faulty_server.py`: what it goes wrong at, and how to start it."""

    step_fails: int
    device_fails: int
    secret: str

    def launch(self, flags: Sequence[str], faults: Path, around: Sequence[str] = ()) -> LaunchedServer:
        """A server, once it is ready. `faults` is the folder whose files switch it, `around` runs it."""
        command = (*around, sys.executable, "-W", "ignore", str(_SCRIPT))
        return LaunchedServer(flags, command=command, env={"FAULTS": str(faults)})


@pytest.fixture(scope="session")
def faulty() -> Faulty:
    told = runpy.run_path(str(_SCRIPT))
    return Faulty(told["STEP_FAILS"], told["DEVICE_FAILS"], told["SECRET"])


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any]], Any]:
    """`until(condition)`: the first true value of `condition`; fails if there is none for two minutes."""

    def wait(condition: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + 120
        while not (value := condition()):
            assert time.monotonic() < end_s, "it did not come about"
            time.sleep(0.02)
        return value

    return wait
