"""Starts everything that is compared on one model, each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from loraplex import AsyncClient
from loraplex_bench.load.launcher import LaunchedServer
from loraplex_bench.peers.contender import Contender, ContenderError
from loraplex_bench.peers.jobs import MAX_BATCH_TOKENS, PEFT_WEIGHTS, Answered, BenchModel, Job

SERVER_QUANTIZATIONS = ("none", "int4")
"""Those of them that are also measured as a server."""


@dataclasses.dataclass
class Case:
    """A case while it is measured; `answer` keeps the tokens of the first turn."""

    system: str
    weights: str
    adapters: bool
    run: Callable[[int], Answered]
    turns: list[float] = dataclasses.field(default_factory=list)
    spent_s: float = 0.0
    answer: Answered | None = None


@contextlib.contextmanager
def contenders(
    model: BenchModel, threads: int, quantizations: Sequence[str], mixed: Sequence[Job], left_out: list[str]
) -> Iterator[tuple[list[Case], Contender]]:
    """Starts all contenders; yields their cases, and PEFT on fp32."""
    base_jobs = [Job(job.prompt, None) for job in mixed]
    cases: list[Case] = []
    with contextlib.ExitStack() as stack:

        def add(
            system: str, weights: str, jobs: Sequence[Job], run: Callable[[Sequence[Job], int], Answered]
        ) -> None:
            with_adapters = any(job.adapter is not None for job in jobs)
            cases.append(Case(system, weights, with_adapters, lambda tokens: run(jobs, tokens)))

        def start(spec: dict[str, str]) -> Contender:
            contender = Contender(model, spec, threads)
            stack.callback(contender.close)
            return contender

        # They load at the same time; nothing is measured before the last is ready.
        say(f"loading everything on {model.label}, {threads} threads")
        peers = {weights: start({"kind": "peft", "weights": weights}) for weights in PEFT_WEIGHTS}
        engines = {
            quantization: start(
                {"kind": "engine", "quantization": quantization, "dtype": dtype(quantization)}
            )
            for quantization in quantizations
        }
        for weights, peer in list(peers.items()):
            try:
                peer.wait_ready()
                peer.run("one_by_one", mixed[:1], 1)
            except ContenderError as error:
                if weights == "dense":
                    raise
                last_line = str(error).strip().splitlines()[-1]
                left_out.append(f"PEFT on {weights}, {model.label}, {threads} threads: {last_line}")
                continue
            label = "fp32" if weights == "dense" else weights
            add("peft (a)", label, mixed, _how(peer, "one_by_one"))
            add("peft (b)", label, mixed, _how(peer, "padded"))
            add("peft (b)", label, base_jobs, _how(peer, "padded"))
        for quantization, engine in engines.items():
            engine.wait_ready()
            add("engine", quantization, mixed, _how(engine, "answer"))
            add("engine", quantization, base_jobs, _how(engine, "answer"))
        for quantization in [name for name in SERVER_QUANTIZATIONS if name in quantizations]:
            server = stack.enter_context(Server(model, quantization, threads))
            add("server", quantization, mixed, server.answer)
            add("server", quantization, base_jobs, server.answer)
        yield cases, peers["dense"]


class Server:
    """A loraplex server as a contender, asked through the SDK over gRPC from this process."""

    def __init__(self, model: BenchModel, quantization: str, threads: int) -> None:
        flags = [
            *("--model", str(model.base), "--adapters", str(model.adapters), "--quantization", quantization),
            *("--dtype", dtype(quantization), "--threads", str(threads), "--max-model-len", "512"),
            *("--max-batch-tokens", str(MAX_BATCH_TOKENS), "--prefix-cache", "off"),
            *("--port", "0", "--metrics-port", "0"),
        ]
        self._server = LaunchedServer(flags)
        self._runner = asyncio.Runner()
        self._client = AsyncClient(self._server.grpc, retry=None)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        self._server.stop()

    def answer(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """All jobs at once, each a stream of its own."""
        return self._runner.run(self._answer(jobs, max_tokens))

    async def _answer(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        async def one(job: Job) -> list[int]:
            tokens: list[int] = []
            async for chunk in self._client.stream(
                list(job.prompt), adapter=job.adapter, max_tokens=max_tokens, ignore_eos=True
            ):
                tokens.extend(chunk.token_ids)
            return tokens

        started = time.perf_counter()
        answers = await asyncio.gather(*(one(job) for job in jobs))
        return Answered(time.perf_counter() - started, list(answers))


def _how(contender: Contender, method: str) -> Callable[[Sequence[Job], int], Answered]:
    return lambda jobs, max_tokens: contender.run(method, jobs, max_tokens)


def dtype(quantization: str) -> str:
    """fp32 where tokens are compared with PEFT's; elsewhere what the server would choose."""
    return "float32" if quantization == "none" else "auto"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
