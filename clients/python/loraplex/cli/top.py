"""`loraplex top`: what a server is doing now, from two looks at its metrics."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from loraplex.cli.exposition import Metrics, scrape

DESCRIPTION = """\
Shows, again and again, what a running server does: queue, batch, tokens a second, latencies, and where its
adapters are. Reads the server's metrics alone, so it costs the server nothing."""

EXAMPLES = """\
examples:
  loraplex top
  loraplex top --metrics gpu-box:9400 --interval 5
  loraplex top --once > state.txt        (one look, as plain text)"""

BUSIEST = 8
PARTS = ("plan", "prepare", "run", "sample", "emit")


@dataclasses.dataclass(frozen=True)
class Tier:
    """Where adapters are: how many, and bytes of those there are."""

    adapters: int
    used: float
    capacity: float


@dataclasses.dataclass(frozen=True)
class View:
    """The state at the second look, and rates between the two. Seconds and bytes; rates are per second.

    Attributes:
        batch: mean requests in a step; 0 where there was none.
        parts: mean seconds of a step's parts; 0 where nothing was measured.
        prefix_share: prompt tokens found in the prefix cache, of those looked up; None where none were.
        ttft, tpot: 50th and 95th percentile of what ended in between; None where nothing did.
        busiest: adapters with the most tokens, most first.
    """

    model: str
    waiting: int
    running: int
    waiting_for_adapter: int
    steps: float
    step_s: float
    parts: Mapping[str, float]
    batch: float
    prefill: float
    decode: float
    preemptions: float
    kv_ratio: float
    prefix_share: float | None
    tiers: Mapping[str, Tier]
    hits: float
    misses: float
    swap_ins: float
    swap_bytes: float
    evictions: float
    ended: Mapping[str, float]
    errors: Mapping[str, float]
    ttft: tuple[float, float] | None
    tpot: tuple[float, float] | None
    busiest: Sequence[tuple[str, float]]


def view(before: Metrics, after: Metrics, seconds: float) -> View:
    """What two scrapes, `seconds` apart, say.

    Raises:
        LookupError: they are not a loraplex server's.
    """

    def rate(name: str, /, **labels: str) -> float:
        grown = (after.get(name, **labels) or 0.0) - (before.get(name, **labels) or 0.0)
        return max(0.0, grown) / seconds

    def rates(name: str, label: str) -> dict[str, float]:
        values = {sample.labels[label] for sample in after.samples if sample.name == name}
        found = {value: rate(name, **{label: value}) for value in sorted(values)}
        return {value: grown for value, grown in found.items() if grown}

    def mean(name: str) -> float:
        count = rate(f"{name}_count")
        return rate(f"{name}_sum") / count if count else 0.0

    build = next((s.labels for s in after.samples if s.name == "loraplex_build_info"), {})
    tokens = rates("loraplex_completion_tokens_total", "adapter")
    queries = rate("loraplex_prefix_cache_queries_tokens_total")
    return View(
        model=" · ".join(
            build[key] for key in ("model", "quantization", "dtype", "device", "kernels") if build.get(key)
        ),
        waiting=int(after.value("loraplex_requests_waiting")),
        running=int(after.value("loraplex_requests_running")),
        waiting_for_adapter=int(after.value("loraplex_requests_waiting_for_adapter")),
        steps=rate("loraplex_step_seconds_count"),
        step_s=mean("loraplex_step_seconds"),
        parts={part: mean(f"loraplex_step_{part}_seconds") for part in PARTS},
        batch=mean("loraplex_step_requests"),
        prefill=rate("loraplex_prefill_tokens_total"),
        decode=rate("loraplex_decode_tokens_total"),
        preemptions=rate("loraplex_preemptions_total"),
        kv_ratio=after.value("loraplex_kv_cache_usage_ratio"),
        prefix_share=rate("loraplex_prefix_cache_hits_tokens_total") / queries if queries else None,
        tiers={
            tier: Tier(
                int(after.get("loraplex_adapters_resident", tier=tier) or 0),
                after.get("loraplex_adapter_used_bytes", tier=tier) or 0.0,
                after.get("loraplex_adapter_capacity_bytes", tier=tier) or 0.0,
            )
            for tier in ("device", "host")
        },
        hits=rate("loraplex_adapter_hits_total"),
        misses=rate("loraplex_adapter_misses_total"),
        swap_ins=rate("loraplex_adapter_swap_in_seconds_count", kind="copy"),
        swap_bytes=rate("loraplex_adapter_swap_in_bytes_total", kind="copy"),
        evictions=rate("loraplex_adapter_evictions_total", tier="device"),
        ended=rates("loraplex_requests_total", "outcome"),
        errors=rates("loraplex_errors_total", "reason"),
        ttft=_percentiles(before, after, "loraplex_request_time_to_first_token_seconds"),
        tpot=_percentiles(before, after, "loraplex_request_time_per_output_token_seconds"),
        busiest=sorted(tokens.items(), key=lambda item: -item[1])[:BUSIEST],
    )


def _percentiles(before: Metrics, after: Metrics, name: str) -> tuple[float, float] | None:
    """50th and 95th, linear within a bucket as Prometheus' `histogram_quantile` has it."""
    bounds = sorted(
        (float(sample.labels["le"]), sample.labels["le"])
        for sample in after.samples
        if sample.name == f"{name}_bucket"
    )
    counts = [
        (bound, (after.get(f"{name}_bucket", le=le) or 0.0) - (before.get(f"{name}_bucket", le=le) or 0.0))
        for bound, le in bounds
    ]
    if not counts or counts[-1][1] <= 0:
        return None
    return _quantile(counts, 0.5), _quantile(counts, 0.95)


def _quantile(counts: Sequence[tuple[float, float]], share: float) -> float:
    wanted = share * counts[-1][1]
    low, below = 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            # Past the last finite bound nothing is known but that.
            return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def render(seen: View) -> RenderableType:
    """The screen."""
    load = _grid()
    load.add_row("requests", f"{seen.running} running, {seen.waiting} waiting", _note(seen))
    load.add_row("tokens/s", f"{seen.decode:,.0f} decoded", f"{seen.prefill:,.0f} prefilled")
    load.add_row("steps", f"{seen.steps:.1f}/s of {_ms(seen.step_s)}", f"{seen.batch:.1f} requests each")
    parts = ", ".join(f"{part} {_ms(seconds)}" for part, seconds in seen.parts.items() if seconds)
    load.add_row("of a step", parts or "-", "mean")
    load.add_row("first token", _pair(seen.ttft), "median, 95%")
    load.add_row("next tokens", _pair(seen.tpot), "median, 95%")
    ended = ", ".join(f"{count:.1f}/s {outcome}" for outcome, count in seen.ended.items())
    load.add_row("ended", ended or "none", f"{seen.preemptions:.1f}/s preempted" if seen.preemptions else "")
    if seen.errors:
        load.add_row("errors", ", ".join(f"{count:.1f}/s {reason}" for reason, count in seen.errors.items()))

    memory = Table.grid(padding=(0, 2))
    prefix = "" if seen.prefix_share is None else f"{seen.prefix_share:.0%} of prompts found in it"
    memory.add_row("KV cache", ProgressBar(1.0, seen.kv_ratio, width=24), f"{seen.kv_ratio:.0%}", prefix)
    for name, tier in seen.tiers.items():
        share = tier.used / tier.capacity if tier.capacity else 0.0
        memory.add_row(
            f"adapters, {name}",
            ProgressBar(1.0, share, width=24),
            f"{tier.adapters}",
            f"{tier.used / 2**20:,.0f} of {tier.capacity / 2**20:,.0f} MiB",
        )
    asked = seen.hits + seen.misses
    swaps = _grid()
    swaps.add_row("found on device", f"{seen.hits / asked:.0%}" if asked else "-", f"{seen.misses:.1f}/s not")
    moved = f"{seen.swap_bytes / 2**20:,.1f} MiB/s"
    swaps.add_row("swapped in", f"{seen.swap_ins:.1f}/s, {moved}", f"{seen.evictions:.1f}/s evicted")

    busiest = Table(box=None, padding=(0, 2), show_header=False)
    for name, tokens in seen.busiest:
        busiest.add_row(name, f"{tokens:,.1f} tokens/s")
    panels = [
        Panel(load, title="load", title_align="left"),
        Panel(Group(memory, swaps), title="memory", title_align="left"),
    ]
    if seen.busiest:
        panels.append(Panel(busiest, title="busiest adapters", title_align="left"))
    return Group(f"[bold]loraplex[/bold] {seen.model}", *panels)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=15)
    grid.add_column(min_width=28)
    grid.add_column(style="dim")
    return grid


def _note(seen: View) -> str:
    return f"{seen.waiting_for_adapter} for an adapter" if seen.waiting_for_adapter else ""


def _pair(percentiles: tuple[float, float] | None) -> str:
    return "-" if percentiles is None else ", ".join(map(_ms, percentiles))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until Ctrl-C; 1 if there is no server at the address."""
    parser = argparse.ArgumentParser(
        prog="loraplex top",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", default="127.0.0.1:9400", help="default %(default)s"
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="one look, as plain text")
    args = parser.parse_args(argv)
    if not 0 < args.interval < 3600:
        parser.error(f"--interval {args.interval:g} is not between 0 and 3600 seconds")
    try:
        return _once(args) if args.once else _follow(args)
    except (OSError, ValueError, LookupError) as error:
        print(f"loraplex top: no metrics of a loraplex server at {args.metrics}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _once(args: argparse.Namespace) -> int:
    before, at_s = scrape(args.metrics), time.monotonic()
    time.sleep(args.interval)
    Console().print(render(view(before, scrape(args.metrics), time.monotonic() - at_s)))
    return 0


def _follow(args: argparse.Namespace) -> int:
    before, at_s = scrape(args.metrics), time.monotonic()
    with Live(screen=True, auto_refresh=False) as display:
        while True:
            time.sleep(args.interval)
            after, now_s = scrape(args.metrics), time.monotonic()
            display.update(render(view(before, after, now_s - at_s)), refresh=True)
            before, at_s = after, now_s


if __name__ == "__main__":
    sys.exit(main())
