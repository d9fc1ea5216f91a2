"""Sends a workload to a server, open-loop, and records when every token came back.

Arrival times do not depend on the server: a request is sent when it is due, whether earlier ones have been
answered or not (unless `max_concurrency` holds it back, which its record shows). Nothing is retried: an error
is a result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import time
from collections.abc import Sequence

from loraplex import AsyncClient
from loraplex.errors import LoraplexError
from loraplex_bench.load.answers import UNCHECKED, AnswerBook, Judgement, Verdict, checkable
from loraplex_bench.load.workload import PlannedRequest


@dataclasses.dataclass
class Outcome:
    """The outcome of one request. Times are seconds since the run started.

    Attributes:
        sent_s: when it was really sent; later than `request.at_s` where the harness held it back.
        chunks: (time, tokens in it) of every message that brought tokens.
        end_s: when the stream ended, by its last message or by an error.
        queue_s, adapter_wait_s: the server's own account; 0 where the request failed.
        error: name of the gRPC status it failed with.
    """

    request: PlannedRequest
    sent_s: float
    end_s: float = 0.0
    chunks: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    queue_s: float = 0.0
    adapter_wait_s: float = 0.0
    preemptions: int = 0
    error: str | None = None
    error_message: str = ""
    judgement: Judgement = UNCHECKED

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.chunks)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending; None if none came."""
        return self.chunks[0][0] - self.sent_s if self.chunks else None

    @property
    def arrival_ttft_s(self) -> float | None:
        """Time to first token from the moment the request was due: counts what the harness held back too."""
        return self.chunks[0][0] - self.request.at_s if self.chunks else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first message; None if no token came later."""
        later = self.output_tokens - self.chunks[0][1] if self.chunks else 0
        return (self.chunks[-1][0] - self.chunks[0][0]) / later if later else None

    @property
    def gaps_s(self) -> list[float]:
        """Time between one message with tokens and the next."""
        return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(self.chunks)]

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the stream."""
        return self.end_s - self.sent_s


@dataclasses.dataclass
class LoadState:
    """Counters of a run, for whoever shows its progress while it goes on."""

    total: int
    sent: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    tokens: int = 0
    right: int = 0
    wrong: int = 0
    leaks: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.completed + self.failed

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """A run's outcomes by arrival, those of the probes beside it, and how long all of it took."""

    outcomes: tuple[Outcome, ...]
    probes: tuple[Outcome, ...]
    duration_s: float


class LoadRun:
    """One pass of a workload over a server.

    Args:
        client: whose channel carries all requests; make it with `retry=None`.
        requests: by arrival.
        max_concurrency: most requests at once; further ones wait in the harness, in order. None: no limit.
        probe_rate: single-token requests to the base per second beside the load, which show what the load
            does to a request that needs next to nothing. 0: none.
        timeout_s: deadline of each request.
    """

    def __init__(
        self,
        client: AsyncClient,
        requests: Sequence[PlannedRequest],
        *,
        max_concurrency: int | None = None,
        probe_rate: float = 0.0,
        timeout_s: float | None = None,
    ) -> None:
        self.state = LoadState(len(requests))
        self._client = client
        self._requests = requests
        self._gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
        self._probe_rate = probe_rate
        self._timeout_s = timeout_s
        self._book = AnswerBook.of(requests)
        self._start = 0.0

    async def run(self) -> LoadResult:
        """Sends everything and waits for every answer."""
        self._start = time.monotonic()
        self.state.started = self._start
        probing = asyncio.create_task(self._probe())
        tasks: list[asyncio.Task[Outcome]] = []
        try:
            for request in self._requests:
                delay = request.at_s - self._now()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(self._one(request)))
            outcomes = await asyncio.gather(*tasks)
            duration_s = self._now()
        finally:
            for task in tasks:
                task.cancel()
            probing.cancel()
            probes = (await asyncio.gather(probing, return_exceptions=True))[0]
        if isinstance(probes, BaseException):
            raise probes
        return LoadResult(tuple(outcomes), tuple(probes), duration_s)

    async def _one(self, request: PlannedRequest) -> Outcome:
        async with self._gate:
            self.state.sent += 1
            self.state.running += 1
            try:
                outcome = await self._send(request)
            finally:
                self.state.running -= 1
        if outcome.error is not None:
            self.state.failed += 1
            return outcome
        self.state.completed += 1
        if request.line is not None and checkable(request):
            outcome.judgement = self._book.judge(request.task, request.line, outcome.text)
            self.state.right += outcome.judgement.verdict is Verdict.RIGHT
            self.state.wrong += outcome.judgement.verdict is Verdict.WRONG
            self.state.leaks += outcome.judgement.verdict is Verdict.LEAK
        return outcome

    async def _send(self, request: PlannedRequest, *, counted: bool = True) -> Outcome:
        outcome = Outcome(request, sent_s=self._now())
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        text: list[str] = []
        try:
            async with self._client.stream(
                prompt,
                adapters=list(request.adapters) or None,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                timeout=self._timeout_s,
            ) as stream:
                async for chunk in stream:
                    if chunk.token_ids:
                        outcome.chunks.append((self._now(), len(chunk.token_ids)))
                        if counted:
                            self.state.tokens += len(chunk.token_ids)
                    text.append(chunk.text)
                    if chunk.usage is not None:
                        outcome.prompt_tokens = chunk.usage.prompt_tokens
                    if chunk.timing is not None:
                        outcome.queue_s = chunk.timing.queue_seconds
                        outcome.adapter_wait_s = chunk.timing.adapter_wait_seconds
                        outcome.preemptions = chunk.timing.preemptions
        except LoraplexError as error:
            outcome.error, outcome.error_message = error.code, str(error)
        outcome.text = "".join(text)
        outcome.end_s = self._now()
        return outcome

    async def _probe(self) -> list[Outcome]:
        """Probes until cancelled; answers with those that ended."""
        if not self._probe_rate:
            return []
        rng = random.Random("probes")
        outcomes: list[Outcome] = []
        tasks: set[asyncio.Task[None]] = set()

        async def one(request: PlannedRequest) -> None:
            outcomes.append(await self._send(request, counted=False))

        try:
            for index in itertools.count():
                await asyncio.sleep(rng.expovariate(self._probe_rate))
                request = PlannedRequest(index, self._now(), (), (0,), max_tokens=1, ignore_eos=True)
                task = asyncio.create_task(one(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes

    def _now(self) -> float:
        return time.monotonic() - self._start
