"""A server on a random Llama-3-8B under its load harness, and transformers + PEFT with the same requests.

    python -m loraplex_bench.gpu --only server

First all requests at once, for throughput; then as many in a Poisson stream at a share of that rate, for the
time to the first token and between tokens. transformers + PEFT gets the same requests as one padded batch
with `adapter_names`, which is the most that it can do, in bf16, and in bitsandbytes' NF4 where that runs,
each in a process of its own and never beside the server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraplex import AsyncClient
from loraplex.cli.exposition import Metrics, scrape
from loraplex_bench.load.generator import LoadRun
from loraplex_bench.load.launcher import LaunchedServer
from loraplex_bench.load.report import Summary, summarize
from loraplex_bench.load.workload import (
    LengthRange,
    PlannedRequest,
    WorkloadConfig,
    make_workload,
    random_prompts,
)
from loraplex_bench.models import random_weights
from loraplex_bench.peers.contender import Contender, ContenderError
from loraplex_bench.peers.jobs import Answered, BenchModel, Job

GOAL_SPEEDUP = 20.0
"""Of the server over transformers + PEFT on one GPU."""


@dataclasses.dataclass(frozen=True)
class ServerTable:
    """Settings of a run.

    Attributes:
        rate_share: of the requests a second that it answered all at once, for the stream.
        dtype: of the checkpoint, and of transformers + PEFT's activations.
        peft: weights for transformers + PEFT: "dense", or "bnb-nf4".
    """

    shape: str = "llama-3-8b"
    quantization: str = "nf4"
    adapters: int = 16
    requests: int = 256
    prompt_tokens: int = 256
    max_tokens: int = 64
    rate_share: float = 0.6
    dtype: str = "bfloat16"
    peft: tuple[str, ...] = ("dense", "bnb-nf4")
    server_flags: tuple[str, ...] = ("--max-batch-tokens", "4096", "--adapter-device-bytes", "2GiB")

    @classmethod
    def tiny(cls) -> ServerTable:
        """For trying it out on a CPU."""
        return cls(
            shape="tiny",
            adapters=2,
            requests=6,
            prompt_tokens=12,
            max_tokens=4,
            dtype="float32",
            peft=("dense",),
            server_flags=("--adapter-device-bytes", "4MiB"),
        )


@dataclasses.dataclass(frozen=True)
class ServerRow:
    """One system under one load; times in seconds.

    Attributes:
        system: "loraplex" or "transformers + PEFT".
        load: "all at once", "stream at N/s" or "one padded batch".
        speedup: the server's tokens a second, all at once, over this row's.
        batch: requests in a step, on average, by the server's own account.
        step_device_s: time of a step on the device, on average; None where there is no such clock.
        idle_share: of the device's time, what it waited between one step and the next.
        not_run: why there are no figures.
    """

    system: str
    weights: str
    load: str
    tokens_per_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    gap_p50_s: float | None = None
    gap_p99_s: float | None = None
    failed: int = 0
    start_s: float | None = None
    speedup: float | None = None
    batch: float | None = None
    step_device_s: float | None = None
    idle_share: float | None = None
    not_run: str | None = None

    def line(self) -> str:
        """For the printed table."""
        head = f"{self.system}, {self.weights}, {self.load}: "
        if self.tokens_per_s is None:
            return f"{head}not run: {self.not_run}"
        parts = [f"{self.tokens_per_s:.0f} tokens/s"]
        if self.ttft_p50_s is not None and self.ttft_p99_s is not None:
            parts.append(f"TTFT p50 {self.ttft_p50_s * 1e3:.0f} ms, p99 {self.ttft_p99_s * 1e3:.0f} ms")
        if self.gap_p50_s is not None and self.gap_p99_s is not None:
            parts.append(
                f"between tokens p50 {self.gap_p50_s * 1e3:.1f} ms, p99 {self.gap_p99_s * 1e3:.1f} ms"
            )
        if self.batch is not None:
            parts.append(f"{self.batch:.1f} requests a step")
        if self.step_device_s is not None and self.idle_share is not None:
            parts.append(
                f"{self.step_device_s * 1e3:.2f} ms a step on the device, "
                f"which waits {self.idle_share:.1%} of the time"
            )
        if self.failed:
            parts.append(f"{self.failed} FAILED")
        if self.speedup is not None and self.system != "loraplex":
            parts.append(f"the server is {self.speedup:.1f}x as fast")
        return head + ", ".join(parts)


class StepAccount(NamedTuple):
    """The server's own account of its steps; see `ServerRow`."""

    batch: float | None
    step_device_s: float | None
    idle_share: float | None


def measure(
    wanted: ServerTable, device: torch.device, limit_s: float, say: Callable[[ServerRow], None]
) -> list[ServerRow]:
    """All rows, each told to `say` as soon as it is there; none is begun after `limit_s` seconds."""
    end_s = time.monotonic() + limit_s
    rows: list[ServerRow] = []

    def add(row: ServerRow) -> None:
        rows.append(row)
        say(row)

    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        model = random_weights.write(
            Path(folder),
            wanted.shape,
            wanted.adapters,
            dtype=getattr(torch, wanted.dtype),
            device=device,
        )
        if device.type == "cuda":
            # The server, a process of its own, plans with what is free.
            torch.cuda.empty_cache()
        _measure_server(wanted, model, device, max(end_s - time.monotonic(), 60.0), add)
        throughput = rows[0].tokens_per_s
        for weights in wanted.peft:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or throughput is None:
                reason = f"{limit_s:.0f} s are over" if throughput is not None else "the server did not run"
                add(ServerRow("transformers + PEFT", weights, "one padded batch", not_run=reason))
                continue
            add(_measure_peft(wanted, model, weights, device, throughput))
    return rows


def _measure_server(
    wanted: ServerTable,
    model: BenchModel,
    device: torch.device,
    timeout_s: float,
    add: Callable[[ServerRow], None],
) -> None:
    flags = [
        *("--model", str(model.base), "--adapters", str(model.adapters)),
        *("--quantization", wanted.quantization, "--device", device.type),
        *("--max-num-requests", str(wanted.requests), "--max-queue", str(4 * wanted.requests)),
        *("--max-model-len", str(wanted.prompt_tokens + wanted.max_tokens + 1)),
        *("--port", "0", "--metrics-port", "0", *wanted.server_flags),
    ]
    with LaunchedServer(flags, timeout_s=timeout_s) as server:
        assert server.metrics is not None
        found = asyncio.run(_load(wanted, model, server.grpc, server.metrics))
        for load, summary, steps in found:
            row = _row(wanted, load, summary, server.start_s)
            add(dataclasses.replace(row, **steps._asdict()))


class _Loaded(NamedTuple):
    """A load, what was measured of it, and the server's account of its steps."""

    load: str
    summary: Summary
    steps: StepAccount


async def _load(wanted: ServerTable, model: BenchModel, address: str, metrics: str) -> list[_Loaded]:
    async with AsyncClient(address, retry=None) as client:
        await client.wait_until_ready(60.0)

        async def run(seed: int, rate: float) -> tuple[Summary, StepAccount]:
            before = await asyncio.to_thread(scrape, metrics)
            result = await LoadRun(client, requests(wanted, model, seed, rate)).run()
            # The engine reports its steps some ten times a second.
            await asyncio.sleep(0.5)
            return summarize(result), steps_between(before, await asyncio.to_thread(scrape, metrics))

        # Adapters are brought in, and every size of step was seen.
        await run(1, math.inf)
        at_once = await run(0, math.inf)
        rate = max(at_once[0].request_throughput * wanted.rate_share, 0.1)
        stream = await run(2, rate)
    return [_Loaded("all at once", *at_once), _Loaded(f"stream at {rate:.1f}/s", *stream)]


def steps_between(before: Metrics, after: Metrics) -> StepAccount:
    """Of the steps between two scrapes."""

    def grown(name: str) -> float:
        return after.value(name) - before.value(name)

    def mean(name: str) -> float | None:
        count = grown(f"{name}_count")
        return grown(f"{name}_sum") / count if count else None

    device = grown("loraplex_step_device_seconds_sum")
    idle = grown("loraplex_step_device_idle_seconds_sum")
    return StepAccount(
        batch=mean("loraplex_step_requests"),
        step_device_s=mean("loraplex_step_device_seconds"),
        idle_share=idle / (device + idle) if device else None,
    )


def requests(wanted: ServerTable, model: BenchModel, seed: int, rate: float) -> list[PlannedRequest]:
    """The workload: every request has an adapter, drawn uniformly."""
    lengths = LengthRange(wanted.max_tokens, wanted.max_tokens)
    config = WorkloadConfig(
        num_requests=wanted.requests,
        seed=seed,
        rate=rate,
        adapters=model.names,
        adapter_choice="uniform",
        max_tokens=lengths,
        ignore_eos=True,
    )
    prompts = random_prompts(LengthRange(wanted.prompt_tokens, wanted.prompt_tokens), model.vocab_size)
    return make_workload(config, prompts)


def _row(wanted: ServerTable, load: str, summary: Summary, start_s: float) -> ServerRow:
    ttft, gap = summary.ttft_s, summary.gap_s
    return ServerRow(
        system="loraplex",
        weights=wanted.quantization,
        load=load,
        tokens_per_s=summary.output_throughput,
        ttft_p50_s=None if ttft is None else ttft.p50,
        ttft_p99_s=None if ttft is None else ttft.p99,
        gap_p50_s=None if gap is None else gap.p50,
        gap_p99_s=None if gap is None else gap.p99,
        failed=summary.failed,
        start_s=start_s,
    )


def _measure_peft(
    wanted: ServerTable, model: BenchModel, weights: str, device: torch.device, throughput: float
) -> ServerRow:
    row = ServerRow("transformers + PEFT", weights, "one padded batch")
    jobs = []
    for request in requests(wanted, model, 0, math.inf):
        assert isinstance(request.prompt, tuple)
        jobs.append(Job(request.prompt, request.adapters[0][0]))
    spec = {"kind": "peft", "weights": weights, "device": device.type, "dtype": wanted.dtype}
    contender = Contender(model, spec, 1)
    try:
        start_s = contender.wait_ready()
        contender.run("padded", jobs, 2)
        answered: Answered = contender.run("padded", jobs, wanted.max_tokens)
    except ContenderError as error:
        return dataclasses.replace(row, not_run=str(error).strip().splitlines()[-1][:300])
    finally:
        contender.close()
    tokens_per_s = sum(map(len, answered.token_ids)) / answered.seconds
    return dataclasses.replace(
        row, tokens_per_s=tokens_per_s, start_s=start_s, speedup=throughput / tokens_per_s
    )


def goal_line(rows: list[ServerRow]) -> str | None:
    """The server's ratio to the fastest of the others, and its goal; None without one."""
    ratios = [row.speedup for row in rows if row.speedup is not None]
    if not ratios:
        return None
    ratio = min(ratios)
    verdict = "met" if ratio >= GOAL_SPEEDUP else "missed"
    return f"server over transformers + PEFT: {ratio:.1f}x, wanted at least {GOAL_SPEEDUP:g}x: {verdict}"


def as_json(rows: list[ServerRow], wanted: ServerTable) -> dict[str, Any]:
    """The table for the results."""
    return {"workload": dataclasses.asdict(wanted), "rows": [dataclasses.asdict(row) for row in rows]}
