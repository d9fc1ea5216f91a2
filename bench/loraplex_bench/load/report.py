"""From the outcomes of a run to figures, tables and JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraplex_bench.load.answers import Verdict
from loraplex_bench.load.generator import LoadResult, Outcome
from loraplex_bench.load.results import Distribution, milliseconds, table

COMPOSITIONS = "(compositions)"
"""The row of all requests that name several adapters."""

GOODPUT_METRICS = ("ttft", "tpot", "e2e")


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """One adapter's part of a run, or the base's, or that of all compositions."""

    label: str
    requests: int
    failed: int
    tokens: int
    ttft_s: Distribution | None
    right: int
    wrong: int
    leaks: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a run. Seconds, and rates per second of `duration_s`.

    Attributes:
        goodput: completed requests per second that met every threshold; None without thresholds.
        fairness: Jain's index over the adapters' mean TTFT: 1 when all wait alike, 1/n when one waits for
            all.
        send_lag_s: how late the harness sent requests; a large one means that the harness was the
            bottleneck, or that `max_concurrency` held requests back.
        accuracy: right answers of those checked; None where nothing could be checked.
        gap_s: between one message with tokens and the next.
    """

    duration_s: float
    completed: int
    failed: int
    errors: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    fairness: float | None
    ttft_s: Distribution | None
    arrival_ttft_s: Distribution | None
    tpot_s: Distribution | None
    gap_s: Distribution | None
    e2e_s: Distribution | None
    queue_s: Distribution | None
    adapter_wait_s: Distribution | None
    send_lag_s: Distribution | None
    probe_s: Distribution | None
    probe_errors: int
    preemptions: int
    right: int
    wrong: int
    leaks: int
    unchecked: int
    adapters: tuple[AdapterSummary, ...]

    @property
    def accuracy(self) -> float | None:
        checked = self.right + self.wrong + self.leaks
        return self.right / checked if checked else None


def summarize(result: LoadResult, goodput_s: Mapping[str, float] | None = None) -> Summary:
    """Figures of a run.

    Args:
        goodput_s: thresholds in seconds for any of `GOODPUT_METRICS`.
    """
    done = [outcome for outcome in result.outcomes if outcome.completed]
    verdicts = Counter(outcome.judgement.verdict for outcome in done)
    by_label: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in result.outcomes:
        many = len(outcome.request.adapters) > 1
        by_label[COMPOSITIONS if many else outcome.request.label].append(outcome)
    adapters = tuple(_adapter_summary(label, by_label[label]) for label in sorted(by_label))
    output_tokens = sum(outcome.output_tokens for outcome in done)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in done)
    good = sum(_meets(outcome, goodput_s) for outcome in done) if goodput_s else None
    return Summary(
        duration_s=result.duration_s,
        completed=len(done),
        failed=len(result.outcomes) - len(done),
        errors=dict(Counter(outcome.error for outcome in result.outcomes if outcome.error is not None)),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_throughput=len(done) / result.duration_s,
        output_throughput=output_tokens / result.duration_s,
        total_throughput=(output_tokens + prompt_tokens) / result.duration_s,
        goodput=None if good is None else good / result.duration_s,
        fairness=jain(adapter.ttft_s.mean for adapter in adapters if adapter.ttft_s is not None),
        ttft_s=Distribution.of(o.ttft_s for o in done if o.ttft_s is not None),
        arrival_ttft_s=Distribution.of(o.arrival_ttft_s for o in done if o.arrival_ttft_s is not None),
        tpot_s=Distribution.of(o.tpot_s for o in done if o.tpot_s is not None),
        gap_s=Distribution.of(gap for o in done for gap in o.gaps_s),
        e2e_s=Distribution.of(o.e2e_s for o in done),
        queue_s=Distribution.of(o.queue_s for o in done),
        adapter_wait_s=Distribution.of(o.adapter_wait_s for o in done),
        send_lag_s=Distribution.of(o.sent_s - o.request.at_s for o in result.outcomes),
        probe_s=Distribution.of(o.e2e_s for o in result.probes if o.completed),
        probe_errors=sum(not o.completed for o in result.probes),
        preemptions=sum(o.preemptions for o in done),
        right=verdicts[Verdict.RIGHT],
        wrong=verdicts[Verdict.WRONG],
        leaks=verdicts[Verdict.LEAK],
        unchecked=verdicts[Verdict.UNCHECKED],
        adapters=adapters,
    )


def jain(values: Iterable[float]) -> float | None:
    """Jain's fairness index, (sum x)^2 / (n sum x^2); None for no values."""
    found = list(values)
    if not found:
        return None
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Seconds by metric, from texts such as "ttft:500" (milliseconds); else raises `ValueError`."""
    thresholds = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in GOODPUT_METRICS:
            raise ValueError(f"goodput: {text!r} names none of {', '.join(GOODPUT_METRICS)}; write ttft:500")
        try:
            thresholds[name] = float(value) / 1000
        except ValueError:
            raise ValueError(f"goodput: {text!r} gives no milliseconds; write {name}:500") from None
    return thresholds


def render(summary: Summary) -> str:
    """The tables that `loraplex bench serve` prints."""
    blocks = [_totals(summary), _latencies(summary)]
    if summary.errors:
        blocks.append(table(["error", "requests"], sorted(summary.errors.items())))
    if len(summary.adapters) > 1:
        blocks.append(_per_adapter(summary))
    return "\n\n".join(blocks)


def raw_outcome(outcome: Outcome, *, brief: bool = False) -> dict[str, Any]:
    """One request as JSON; its text only where the answer was not right. `brief`: of its tokens' times only
    that of the first."""
    raw: dict[str, Any] = {
        "index": outcome.request.index,
        "adapters": [list(adapter) for adapter in outcome.request.adapters],
        "due_s": round(outcome.request.at_s, 6),
        "sent_s": round(outcome.sent_s, 6),
        "end_s": round(outcome.end_s, 6),
        "chunks": [[round(at_s, 6), tokens] for at_s, tokens in outcome.chunks[: 1 if brief else None]],
        "prompt_tokens": outcome.prompt_tokens,
        "queue_s": outcome.queue_s,
        "adapter_wait_s": outcome.adapter_wait_s,
        "preemptions": outcome.preemptions,
        "verdict": str(outcome.judgement.verdict),
    }
    if outcome.error is not None:
        raw |= {"error": outcome.error, "error_message": outcome.error_message}
    if outcome.judgement.verdict in (Verdict.WRONG, Verdict.LEAK):
        raw |= {"line": outcome.request.line, "text": outcome.text, "owner": outcome.judgement.owner}
    return raw


def _meets(outcome: Outcome, thresholds: Mapping[str, float]) -> bool:
    measured = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}
    return all((measured[name] or 0.0) <= limit for name, limit in thresholds.items())


def _adapter_summary(label: str, outcomes: Sequence[Outcome]) -> AdapterSummary:
    done = [outcome for outcome in outcomes if outcome.completed]
    verdicts = Counter(outcome.judgement.verdict for outcome in done)
    return AdapterSummary(
        label=label,
        requests=len(outcomes),
        failed=len(outcomes) - len(done),
        tokens=sum(outcome.output_tokens for outcome in done),
        ttft_s=Distribution.of(o.ttft_s for o in done if o.ttft_s is not None),
        right=verdicts[Verdict.RIGHT],
        wrong=verdicts[Verdict.WRONG],
        leaks=verdicts[Verdict.LEAK],
    )


def _totals(summary: Summary) -> str:
    rows: list[tuple[str, str]] = [
        ("requests", f"{summary.completed} completed, {summary.failed} failed"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("tokens", f"{summary.prompt_tokens} in, {summary.output_tokens} out"),
        ("requests/s", f"{summary.request_throughput:.2f}"),
        ("output tokens/s", f"{summary.output_throughput:.1f}"),
        ("all tokens/s", f"{summary.total_throughput:.1f}"),
    ]
    if summary.goodput is not None:
        rows.append(("goodput requests/s", f"{summary.goodput:.2f}"))
    if summary.fairness is not None and len(summary.adapters) > 1:
        rows.append(("fairness (Jain, TTFT)", f"{summary.fairness:.3f}"))
    if summary.preemptions:
        rows.append(("preemptions", str(summary.preemptions)))
    if summary.accuracy is not None:
        rows.append(
            (
                "answers",
                f"{summary.right} right, {summary.wrong} wrong, {summary.leaks} leaked"
                f" ({100 * summary.accuracy:.2f}% right)",
            )
        )
    if summary.probe_errors:
        rows.append(("probes failed", str(summary.probe_errors)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _latencies(summary: Summary) -> str:
    distributions = {
        "TTFT": summary.ttft_s,
        "TTFT from arrival": summary.arrival_ttft_s,
        "TPOT (first excluded)": summary.tpot_s,
        "inter-token gap": summary.gap_s,
        "end to end": summary.e2e_s,
        "queued (server)": summary.queue_s,
        "adapter wait (server)": summary.adapter_wait_s,
        "probe": summary.probe_s,
        "send lag (harness)": summary.send_lag_s,
    }
    return table(
        ["milliseconds", "mean", "p50", "p90", "p99", "max"],
        [
            [name, *(milliseconds(value) for value in (d.mean, d.p50, d.p90, d.p99, d.max))]
            for name, d in distributions.items()
            if d is not None
        ],
    )


def _per_adapter(summary: Summary) -> str:
    checked = summary.accuracy is not None
    columns = ["adapter", "requests", "failed", "tokens", "TTFT p50", "TTFT p99"]
    return table(
        [*columns, "right", "wrong", "leaked"] if checked else columns,
        [
            [
                adapter.label,
                adapter.requests,
                adapter.failed,
                adapter.tokens,
                milliseconds(adapter.ttft_s.p50) if adapter.ttft_s else "-",
                milliseconds(adapter.ttft_s.p99) if adapter.ttft_s else "-",
                *((adapter.right, adapter.wrong, adapter.leaks) if checked else ()),
            ]
            for adapter in summary.adapters
        ],
    )
