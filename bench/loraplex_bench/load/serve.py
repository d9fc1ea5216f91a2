"""`loraplex bench serve`: measures a server under an open-loop load of many adapters."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex import AdapterInfo, AsyncClient, LoraplexError, ModelInfo
from loraplex_bench.demo.tasks import TASKS
from loraplex_bench.load.environment import environment
from loraplex_bench.load.generator import LoadResult, LoadRun
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.progress import describe, live
from loraplex_bench.load.report import Summary, parse_goodput, raw_outcome, render, summarize
from loraplex_bench.load.results import table, write_json
from loraplex_bench.load.workload import (
    ADAPTER_CHOICES,
    LengthRange,
    PlannedRequest,
    PromptSource,
    WorkloadConfig,
    demo_prompts,
    make_workload,
    random_prompts,
    text_prompts,
)

DEFAULT_SERVER = "127.0.0.1:50051"

DESCRIPTION = """\
Sends requests to a loraplex server as users would: they arrive at a rate, whether earlier ones have been
answered or not, and ask for different adapters, a few of them much more often than the others. Then it tells
how long users waited: TTFT (time to first token), TPOT (time per output token, the first left out), the gaps
between tokens, and end to end. On the demo model every answer is checked, so an answer from the wrong adapter
is seen at once.
"""

EXAMPLES = """\
examples:
  loraplex bench serve --launch
      a server on the embedded demo model, 200 requests at once over all its adapters, answers checked
  loraplex bench serve --server 10.0.0.5:50051 --rate 8 --num-requests 1000 --zipf 1.2 --json run.json
      a server that runs already: 8 requests a second, Zipf with exponent 1.2, raw numbers in run.json
  loraplex bench serve --launch --launch-flags="--max-adapters-on-device 3" --rate 50 --probe-rate 2
      more adapters than slots, with two small requests a second beside them that show what others feel
  loraplex bench serve --prompts random --input-len 256:1024 --max-tokens 128 --ignore-eos
      any model: random prompts of 256 to 1,024 tokens, 128 tokens generated for each

the exit code is 1 if a request failed, an answer leaked, or fewer than --min-accuracy of those checked were
right.
"""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """All that one run found out."""

    model: ModelInfo
    workload: WorkloadConfig
    result: LoadResult
    summary: Summary
    cache: Mapping[str, Mapping[str, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench serve`."""
    _add_server_options(parser.add_argument_group("server"))
    _add_load_options(parser.add_argument_group("load"))
    _add_adapter_options(parser.add_argument_group("adapters"))
    _add_prompt_options(parser.add_argument_group("prompts and answers"))
    _add_result_options(parser.add_argument_group("results"))


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    target = group.add_mutually_exclusive_group()
    target.add_argument("--server", metavar="HOST:PORT", help=f"a running server (default: {DEFAULT_SERVER})")
    target.add_argument("--launch", action="store_true", help="start a server, and stop it at the end")
    group.add_argument(
        "--launch-flags",
        metavar="FLAGS",
        default="",
        help="flags of `loraplex serve` for --launch, in one string (default: the embedded demo model, nf4)",
    )
    group.add_argument("--token", help="bearer token, where the server asks for one")


def _add_load_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-requests", type=int, default=200, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="arrivals per second; inf: all at once (default)",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma-distributed gaps between arrivals; below 1 is bursty (default: 1, Poisson)",
    )
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="most requests at once (default: no limit)"
    )
    group.add_argument(
        "--warmup", type=int, default=16, metavar="N", help="unmeasured requests before (default: 16)"
    )
    group.add_argument("--timeout", type=float, metavar="S", help="deadline of each request in seconds")
    group.add_argument(
        "--probe-rate",
        type=float,
        default=0.0,
        metavar="R",
        help="single-token requests per second beside the load, measured apart (default: none)",
    )
    group.add_argument("--seed", type=int, default=0, help="same seed, same workload (default: %(default)s)")


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapters",
        metavar="NAMES",
        default="all",
        help="'all' the server knows (default), 'none', or names parted by commas, the most popular first",
    )
    group.add_argument(
        "--adapter-choice",
        choices=ADAPTER_CHOICES,
        default="zipf",
        help="who asks for which (default: %(default)s)",
    )
    group.add_argument(
        "--zipf",
        type=float,
        default=1.0,
        metavar="S",
        help="exponent: the adapter of rank k has a share proportional to k**-S; 0 is uniform (default: 1)",
    )
    group.add_argument(
        "--base-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="requests without adapter (default: 0.1)",
    )
    group.add_argument(
        "--composition-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="requests with two weighted adapters (default: 0)",
    )


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        default="auto",
        metavar="WHAT",
        help="'demo' lines whose answers are checked, 'random' token ids, or a file, a prompt on each line; "
        "'auto' (default) is demo if the server's adapters are the demo's, else random",
    )
    group.add_argument(
        "--input-len",
        type=LengthRange.parse,
        default="128",
        metavar="LOW:HIGH",
        help="tokens of random prompts",
    )
    group.add_argument(
        "--max-tokens",
        type=LengthRange.parse,
        metavar="LOW:HIGH",
        help="tokens to generate (default: what the demo needs, else 128)",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="generate all of max-tokens; answers go unchecked"
    )


def _add_result_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--json", type=Path, metavar="PATH", help="write every raw number there, with the environment"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests within all of these, for example: ttft:500 tpot:50 e2e:5000",
    )
    group.add_argument(
        "--min-accuracy",
        type=float,
        default=0.99,
        metavar="F",
        help="least fraction of right answers among those checked (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; answers with the exit code."""
    try:
        goodput = parse_goodput(args.goodput)
        with _server(args) as address:
            measurement = asyncio.run(_measure(args, address, goodput))
    except (ValueError, OSError, LaunchError, LoraplexError) as error:
        print(f"loraplex bench serve: {error}", file=sys.stderr)
        return 2
    print(_header(measurement))
    print()
    print(render(measurement.summary))
    print()
    print(_cache_table(measurement.cache))
    if args.json is not None:
        write_json(args.json, document(measurement))
        print(f"\nraw numbers: {args.json}")
    return _exit_code(measurement.summary, args.min_accuracy)


def document(measurement: Measurement) -> dict[str, Any]:
    """A measurement as JSON."""
    workload = dataclasses.asdict(measurement.workload)
    workload["rate"] = str(workload["rate"]) if math.isinf(workload["rate"]) else workload["rate"]
    model = dataclasses.asdict(measurement.model)
    model["name"] = Path(model["name"]).name
    return {
        "kind": "serve",
        "environment": environment(),
        "model": model,
        "workload": workload,
        "summary": measurement.summary,
        "adapter_cache": measurement.cache,
        "requests": [raw_outcome(outcome) for outcome in measurement.result.outcomes],
        "probes": [raw_outcome(outcome) for outcome in measurement.result.probes],
    }


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    if not args.launch:
        if args.launch_flags:
            raise ValueError("--launch-flags: has a meaning only with --launch")
        yield args.server or DEFAULT_SERVER
        return
    flags = shlex.split(args.launch_flags)
    with LaunchedServer([*(() if "--model" in flags else demo_flags()), *flags]) as server:
        print(f"started a server at {server.grpc} in {server.start_s:.1f} s", file=sys.stderr)
        yield server.grpc


async def _measure(args: argparse.Namespace, address: str, goodput: Mapping[str, float]) -> Measurement:
    async with AsyncClient(address, retry=None, token=args.token) as client:
        model = await client.wait_until_ready(30.0)
        registered = {adapter.name: adapter for adapter in await client.adapters.list()}
        config = WorkloadConfig(
            num_requests=args.num_requests,
            seed=args.seed,
            rate=args.rate,
            burstiness=args.burstiness,
            adapters=_adapter_names(args.adapters, registered),
            adapter_choice=args.adapter_choice,
            zipf=args.zipf,
            base_fraction=args.base_fraction,
            composition_fraction=args.composition_fraction,
            max_tokens=args.max_tokens,
            ignore_eos=args.ignore_eos,
        )
        await _warm_up(client, args, config, model)
        before = await client.adapters.list()
        requests = make_workload(config, _prompts(args, config.adapters, model, args.seed))
        load = LoadRun(
            client,
            requests,
            max_concurrency=args.max_concurrency,
            probe_rate=args.probe_rate,
            timeout_s=args.timeout,
        )
        async with live(lambda: describe(load.state)):
            result = await load.run()
        after = await client.adapters.list()
    return Measurement(model, config, result, summarize(result, goodput), cache_events(before, after))


def _adapter_names(text: str, registered: Mapping[str, AdapterInfo]) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(sorted(registered)) if text == "all" else ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in registered]
    if unknown:
        raise ValueError(
            f"--adapters: the server knows no {', '.join(unknown)}; it has {', '.join(sorted(registered))}"
        )
    return names


def _prompts(args: argparse.Namespace, adapters: Sequence[str], model: ModelInfo, seed: int) -> PromptSource:
    kind = args.prompts
    if kind == "auto":
        kind = "demo" if adapters and all(name in TASKS for name in adapters) else "random"
    if kind == "demo":
        return demo_prompts(seed)
    if kind == "random":
        lengths: LengthRange = args.input_len
        if lengths.high >= model.max_model_len:
            raise ValueError(
                f"--input-len: {lengths.high} leaves no room for an answer within {model.max_model_len}"
            )
        return random_prompts(lengths, model.vocab_size)
    return text_prompts([line for line in Path(kind).read_text().splitlines() if line])


async def _warm_up(
    client: AsyncClient, args: argparse.Namespace, config: WorkloadConfig, model: ModelInfo
) -> None:
    """Runs a few requests of the same kind, from another seed, all at once."""
    if args.warmup < 1:
        return
    seed = args.seed + 1_000_000_007
    workload = dataclasses.replace(config, num_requests=args.warmup, seed=seed, rate=math.inf)
    requests: list[PlannedRequest] = make_workload(workload, _prompts(args, config.adapters, model, seed))
    await LoadRun(client, requests, max_concurrency=args.max_concurrency, timeout_s=args.timeout).run()


def cache_events(before: Sequence[AdapterInfo], after: Sequence[AdapterInfo]) -> dict[str, dict[str, int]]:
    """Hits, misses and evictions of each adapter between two listings."""
    old = {adapter.name: adapter for adapter in before}
    events = {}
    for adapter in after:
        was = old.get(adapter.name)
        events[adapter.name] = {
            "hits": adapter.hits - (was.hits if was else 0),
            "misses": adapter.misses - (was.misses if was else 0),
            "evictions": adapter.evictions - (was.evictions if was else 0),
        }
    return events


def _header(measurement: Measurement) -> str:
    model, workload = measurement.model, measurement.workload
    arrivals = "all at once" if math.isinf(workload.rate) else f"{workload.rate:g}/s"
    return (
        f"{model.architecture}, {model.parameters / 1e6:.1f} M parameters, {model.quantization}, "
        f"{model.dtype} on {model.device}, {model.kernels} kernels\n"
        f"{workload.num_requests} requests, {arrivals}, {len(workload.adapters)} adapters by "
        f"{workload.adapter_choice}, seed {workload.seed}"
    )


def _cache_table(cache: Mapping[str, Mapping[str, int]]) -> str:
    total = {key: sum(events[key] for events in cache.values()) for key in ("hits", "misses", "evictions")}
    return table(["adapter cache", *total], [["all adapters", *total.values()]])


def _exit_code(summary: Summary, min_accuracy: float) -> int:
    accurate = summary.accuracy is None or summary.accuracy >= min_accuracy
    return 0 if accurate and not summary.failed and not summary.leaks else 1
