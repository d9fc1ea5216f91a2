"""loraplex's engine as a contender, in this process: no API, no gRPC, no other process."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from loraplex_bench.peers.jobs import MAX_BATCH_TOKENS, Answered, BenchModel, Job
from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig
from loraplex_server.config.model_settings import Dtype, Quantization
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.build import build_engine
from loraplex_server.wire.messages import Failed, FromEngine, Tokens

_CLIENT = "bench"


class InProcessEngine:
    """An engine that answers jobs, stepped by the caller's thread."""

    def __init__(self, model: BenchModel, quantization: Quantization, dtype: Dtype, threads: int) -> None:
        self._tokens: dict[str, list[int]] = {}
        self._failures: list[str] = []
        self._wake = threading.Event()
        config = EngineConfig(
            model=ModelConfig(str(model.base), quantization=quantization, dtype=dtype, threads=threads),
            # The same requests are answered again and again, and PEFT computes them every time.
            scheduler=SchedulerConfig(
                max_model_len=512, max_batch_tokens=MAX_BATCH_TOKENS, prefix_cache=False
            ),
            adapters=AdapterConfig(folders=(model.adapters,)),
        )
        self._engine = build_engine(config, self._emit, wake=self._wake.set, progress=False)

    def answer(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """All jobs at once, greedy, `max_tokens` each.

        Raises:
            RuntimeError: the engine refused a job.
        """
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._tokens = {str(index): [] for index in range(len(jobs))}
        self._failures.clear()
        started = time.perf_counter()
        for index, job in enumerate(jobs):
            adapters = (AdapterUse(job.adapter),) if job.adapter is not None else ()
            self._engine.submit(_CLIENT, Request(str(index), job.prompt, sampling, adapters))
        while self._engine.has_work:
            self._wake.clear()
            if not self._engine.step():
                self._wake.wait(1.0)
        seconds = time.perf_counter() - started
        if self._failures:
            raise RuntimeError(f"the engine failed: {self._failures[0]}")
        return Answered(seconds, list(self._tokens.values()))

    def close(self) -> None:
        self._engine.adapters.close()

    def _emit(self, client: str, message: FromEngine) -> None:
        match message:
            case Tokens(deltas):
                for delta in deltas:
                    self._tokens[delta.request_id].extend(delta.token_ids)
            case Failed(request_id, error):
                self._failures.append(f"request {request_id}: {error.message}")
