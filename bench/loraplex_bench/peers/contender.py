"""One contender of the side-by-side bench in a process of its own, driven over pipes.

A process for each keeps their memory and their thread pools apart, and lets their runs be interleaved. The
worker reads one JSON command a line from standard input and answers each with one JSON line on standard
output.

    python -m loraplex_bench.peers.contender '{"kind": "peft", "weights": "dense", "threads": 1, "model": …}'
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from loraplex_bench.load.launcher import child_environment
from loraplex_bench.peers.folder import BITSANDBYTES
from loraplex_bench.peers.jobs import Answered, BenchModel, Job

# Freed memory is kept for the next pass, for all alike; loraplex asks for that by itself.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}


class ContenderError(RuntimeError):
    """A contender could not be started, or failed; the text ends with what it wrote."""


class Contender:
    """A worker, starting when it is made; call `wait_ready` before anything else.

    Args:
        spec: what `_open` takes: kind ("peft" or "engine"), weights or quantization, dtype, device of PEFT.
        threads: of torch; the only ones that compute.
    """

    def __init__(self, model: BenchModel, spec: dict[str, str], threads: int) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        document = {
            **spec,
            "threads": threads,
            "model": {**dataclasses.asdict(model), "base": str(model.base), "adapters": str(model.adapters)},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loraplex_bench.peers.contender", json.dumps(document)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=child_environment({"OMP_NUM_THREADS": str(threads), **_KEEP_MEMORY}),
        )

    def wait_ready(self) -> float:
        """Waits until it has loaded everything; the seconds that took.

        Raises:
            ContenderError: it could not.
        """
        seconds: float = self._receive()["seconds"]
        return seconds

    def run(self, how: str, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """One measured pass; `how` is a method of the contender ("answer", "one_by_one", "padded")."""
        reply = self._call(
            {"op": how, "jobs": [[job.prompt, job.adapter] for job in jobs], "max_tokens": max_tokens}
        )
        return Answered(reply["seconds"], reply["token_ids"])

    def margin(self, job: Job, answer: Sequence[int]) -> tuple[float, float]:
        """See `PeftPeer.margin`."""
        reply = self._call({"op": "margin", "jobs": [[job.prompt, job.adapter]], "answer": list(answer)})
        gap, largest = reply["margin"]
        return gap, largest

    def close(self) -> None:
        """Ends the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _call(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            size = os.fstat(self._log.fileno()).st_size
            log = os.pread(self._log.fileno(), 3000, max(0, size - 3000)).decode(errors="replace")
            raise ContenderError(f"a contender ended with exit code {self._process.returncode}\n{log}")
        reply: dict[str, Any] = json.loads(line)
        return reply


Operation = Callable[[dict[str, Any]], dict[str, Any]]


def _open(spec: dict[str, Any]) -> dict[str, Operation]:
    """The contender's operations by name."""
    import torch

    torch.set_num_threads(spec["threads"])
    raw = spec["model"]
    model = BenchModel(
        raw["label"], Path(raw["base"]), Path(raw["adapters"]), tuple(raw["names"]), raw["vocab_size"]
    )

    def measured(method: Callable[[Sequence[Job], int], Answered]) -> Operation:
        return lambda command: dataclasses.asdict(method(_jobs(command), command["max_tokens"]))

    if spec["kind"] == "peft":
        if spec["weights"] == "bnb-nf4" and BITSANDBYTES.is_dir():
            # Before transformers looks for it. What is installed comes first.
            sys.path.append(str(BITSANDBYTES))
        from loraplex_bench.peers.peft import PeftPeer

        dtype = getattr(torch, spec.get("dtype", "float32"))
        peer = PeftPeer(model, spec["weights"], spec.get("device", "cpu"), dtype)
        return {
            "one_by_one": measured(peer.one_by_one),
            "padded": measured(peer.padded),
            "margin": lambda command: {"margin": peer.margin(_jobs(command)[0], command["answer"])},
        }
    from loraplex_bench.peers.engine import InProcessEngine

    engine = InProcessEngine(model, spec["quantization"], spec["dtype"], spec["threads"])
    # Its adapter store has threads that would keep the process alive.
    atexit.register(engine.close)
    return {"answer": measured(engine.answer)}


def _jobs(command: dict[str, Any]) -> list[Job]:
    return [Job(tuple(prompt), adapter) for prompt, adapter in command["jobs"]]


def main(spec: str) -> None:
    """Answers commands until standard input ends."""
    # Whatever a library prints must not come between the answers.
    replies, sys.stdout = sys.stdout, sys.stderr
    started = time.perf_counter()
    operations = _open(json.loads(spec))
    print(json.dumps({"seconds": time.perf_counter() - started}), file=replies, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(operations[command["op"]](command)), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
