"""After a soak: the server must be idle, hold nothing, and be as it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from loraplex import AdapterInfo, AdapterState, LoraplexError, ModelInfo
from loraplex.cli.exposition import Metrics, scrape
from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, prompt
from loraplex_bench.scenarios.checks import Check, zero_check
from loraplex_bench.scenarios.soak.state import AUDIT_INTERVAL_S, CHANGING, Soak


async def look(soak: Soak, before: ModelInfo) -> list[Check]:
    """The checks once the load has ended. `before`: the model as it was described at the start."""
    await soak.client.adapters.unload(CHANGING)
    idle_s = await _wait_idle(soak)
    await _verify_all(soak)
    metrics = await _audited(soak)
    adapters = await soak.client.adapters.list()
    checksum = (await soak.client.model()).weight_checksum
    return [
        _answers_check(soak),
        Check("became idle", idle_s is not None, "no" if idle_s is None else f"within {idle_s:.1f} s"),
        *_leak_checks(soak, adapters, metrics),
        Check(
            "base weights unchanged",
            checksum == before.weight_checksum and metrics.get("loraplex_weight_checksum_ok") == 1,
            f"sha256 {checksum[:16]}, recomputed over the resident weights",
        ),
    ]


async def _wait_idle(soak: Soak, timeout_s: float = 30.0) -> float | None:
    """Seconds until the server had neither running nor waiting requests; None if it never did."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        if _busy(await _scrape(soak)) == 0:
            return time.monotonic() - started
        await asyncio.sleep(0.2)
    return None


async def _audited(soak: Soak, timeout_s: float = 60.0) -> Metrics:
    """The metrics once the engine, idle, has looked at its pools and weights again.

    An audit may have begun before the last request: the one that counts is that after which no more
        comes.
    """
    first = metrics = await _scrape(soak)
    started = changed = time.monotonic()
    while time.monotonic() - started < timeout_s:
        await asyncio.sleep(0.5)
        latest = await _scrape(soak)
        if latest.get("loraplex_audits") != metrics.get("loraplex_audits"):
            changed = time.monotonic()
        metrics = latest
        new = metrics.get("loraplex_audits") != first.get("loraplex_audits")
        if new and time.monotonic() - changed > AUDIT_INTERVAL_S:
            return metrics
    soak.fault(f"the engine did not audit itself within {timeout_s:g} s", "errors: no audit")
    return metrics


async def _scrape(soak: Soak) -> Metrics:
    assert soak.server.metrics is not None
    return await asyncio.to_thread(scrape, soak.server.metrics)


async def _verify_all(soak: Soak) -> None:
    """Every adapter once more, all at once."""

    async def ask(task: str | None) -> None:
        line = soak.lines[task][0]
        try:
            answer = await soak.client.generate(
                prompt(line), adapter=task, max_tokens=MAX_ANSWER_TOKENS, timeout=120
            )
        except LoraplexError as error:
            soak.fault(f"afterwards, {task or 'base'}: {error.code}: {error}", f"errors: {error.code}")
            return
        soak.judged(task, line, answer.text, soak.book.judge(task, line, answer.text))
        soak.events["requests: afterwards"] += 1

    await asyncio.gather(*(ask(task) for task in (None, *soak.served)))


def _answers_check(soak: Soak) -> Check:
    bad = {key: count for key, count in soak.events.items() if key.startswith(("answers: ", "errors: "))}
    right = bad.pop("answers: right", 0)
    found = (
        ", ".join(f"{count} {key}" for key, count in sorted(bad.items()))
        or "none wrong, none leaked, no error"
    )
    return Check("answers", right > 0 and not bad, f"{right} right; {found}")


def _leak_checks(soak: Soak, adapters: Sequence[AdapterInfo], metrics: Metrics) -> Iterator[Check]:
    yield zero_check("KV blocks free", metrics, "loraplex_kv_cache_blocks_used", "in use")
    held = {adapter.name: adapter.references for adapter in adapters if adapter.references}
    yield Check("adapter references free", not held, f"held: {held}" if held else "none held")
    resident = [adapter.name for adapter in adapters if adapter.state is AdapterState.DEVICE]
    yield Check(
        "slots within their number",
        len(resident) <= soak.config.slots,
        f"{len(resident)} of {soak.config.slots}",
    )
    names = {adapter.name for adapter in adapters}
    odd = [a.name for a in adapters if a.draining or a.pinned]
    yield Check(
        "adapters as at the start",
        names == set(soak.served) and not odd,
        f"{len(names)} registered" + (f", draining or pinned: {odd}" if odd else ""),
    )
    yield zero_check("pools intact", metrics, "loraplex_integrity_problems", "problems")


def coverage_check(soak: Soak, adapters: Sequence[AdapterInfo]) -> Check:
    """A soak in which nothing was evicted, killed or broken off would prove little."""
    evictions = sum(adapter.evictions for adapter in adapters)
    soak.events["adapter evictions"] = evictions
    soak.events["adapter hits"] = sum(adapter.hits for adapter in adapters)
    soak.events["adapter misses"] = sum(adapter.misses for adapter in adapters)
    wanted = (
        "requests: cancelled, broken off",
        "requests: expiring, broken off",
        "requests: weighted, answered",
        "clients killed in mid-stream",
        "adapters loaded",
        "adapters replaced in place",
        "requests: to the adapter that changes",
        "adapters pinned",
        "adapter evictions",
    )
    missing = [name for name in wanted if not soak.events[name]]
    return Check(
        "everything happened", not missing, f"never: {', '.join(missing)}" if missing else "all kinds"
    )


def _busy(metrics: Metrics) -> float:
    return metrics.value("loraplex_requests_running") + metrics.value("loraplex_requests_waiting")
