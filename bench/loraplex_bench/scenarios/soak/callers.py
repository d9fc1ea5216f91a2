"""Callers of a soak: whole requests, broken-off ones, ones out of time, and clients killed in mid-stream."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys

from loraplex import LoraplexError
from loraplex.errors import DeadlineExceededError
from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, prompt
from loraplex_bench.load.launcher import child_environment
from loraplex_bench.load.workload import zipf_weights
from loraplex_bench.scenarios.soak.changes import ask_changing
from loraplex_bench.scenarios.soak.state import CHANGING, CHANGING_SHARE, Soak


async def caller(soak: Soak, seed: int) -> None:
    """Asks again and again, by Zipf, in one way or another."""
    rng = random.Random(f"caller {seed} {soak.config.seed}")
    shares = zipf_weights(len(soak.served), soak.config.zipf)
    while soak.running():
        if rng.random() < CHANGING_SHARE:
            await ask_changing(soak, rng.choice(soak.lines[CHANGING]))
            continue
        task = None if rng.random() < 0.08 else rng.choices(soak.served, shares)[0]
        line = rng.choice(soak.lines[task])
        kind = rng.choices(("whole", "cancelled", "expiring", "unary", "weighted"), (55, 15, 12, 10, 8))[0]
        await _call(soak, rng, kind, task, line)


async def _call(soak: Soak, rng: random.Random, kind: str, task: str | None, line: str) -> None:
    """One request of a kind; whatever comes back is judged."""
    adapters: list[tuple[str, float]] = [] if task is None else [(task, 1.0)]
    if kind == "weighted" and task is not None:
        # A second adapter with weight 0 takes a slot and part in the kernel, and must change nothing.
        adapters.append((rng.choice([name for name in soak.served if name != task]), 0.0))
        rng.shuffle(adapters)
    leave_after = rng.randrange(0, len(line)) if kind == "cancelled" else None
    timeout = rng.uniform(0.001, 0.4) if kind == "expiring" else 120.0
    text = ""
    finished = False
    try:
        if kind == "unary":
            answer = await soak.client.generate(
                prompt(line), adapters=adapters or None, max_tokens=MAX_ANSWER_TOKENS, timeout=timeout
            )
            text, finished = answer.text, True
        else:
            async with soak.client.stream(
                prompt(line), adapters=adapters or None, max_tokens=MAX_ANSWER_TOKENS, timeout=timeout
            ) as stream:
                async for chunk in stream:
                    text += chunk.text
                    finished = chunk.finish_reason is not None
                    if leave_after is not None and len(text) >= leave_after:
                        break
    except DeadlineExceededError:
        if kind != "expiring":
            soak.faults.append(f"a request with {timeout:g} s ran out of time")
            soak.events["errors: DEADLINE_EXCEEDED out of place"] += 1
            return
    except LoraplexError as error:
        soak.fault(f"{kind} request: {error.code}: {error}", f"errors: {error.code}")
        return
    if finished:
        soak.judged(task, line, text, soak.book.judge(task, line, text))
        soak.events[f"requests: {kind}, answered"] += 1
    else:
        soak.judged(task, line, text, soak.book.judge_beginning(task, line, text))
        soak.events[f"requests: {kind}, broken off"] += 1


async def crasher(soak: Soak) -> None:
    """Kills client processes in mid-stream."""
    rng = random.Random(f"crasher {soak.config.seed}")
    while soak.running():
        await soak.pause(rng.expovariate(1 / soak.config.crash_interval_s))
        if not soak.running():
            return
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loraplex_bench.scenarios.soak.crash_client", soak.server.grpc, "4"),
            *rng.sample(soak.served, 3),
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
        try:
            assert process.stdout is not None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await process.stdout.readline()
            await asyncio.sleep(rng.uniform(0, 0.3))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            code = await process.wait()
        if code == -signal.SIGKILL:
            soak.events["clients killed in mid-stream"] += 1
        else:
            soak.fault(f"a client ended by itself with exit code {code}", "errors: client")
