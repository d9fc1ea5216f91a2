"""Every Prometheus metric of the server but the gateway's, declared once.

The collectors and docs/reference/metrics.md are made from this. Metrics of steps, queue and caches come from
the engine's `Stats`; those of requests and calls are the API's own. Seconds, bytes and ratios say so in their
names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# Parts of a step that take microseconds where the step is short.
_PART_BUCKETS = (0.00005, 0.0001, 0.00025, *_STEP_BUCKETS)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Metric:
    """The declaration of a metric, without its name and kind.

    Attributes:
        buckets: upper bounds, of a histogram.
    """

    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class DeclaredMetric(NamedTuple):
    """A metric with what follows from its declaration.

    Attributes:
        field: of `Collectors`.
        name: as Prometheus collects it; it adds `_total` to a counter's and `_info` to an info's.
        kind: Info, Gauge, Counter or Histogram.
    """

    field: str
    name: str
    kind: type[Any]
    metric: Metric


@dataclass(frozen=True)
class Collectors:
    """One collector for each metric; the metric's name is `loraplex_` and the field's."""

    build: Annotated[Info, Metric("What runs here.")]
    requests_waiting: Annotated[Gauge, Metric("Requests in the queue.")]
    requests_running: Annotated[Gauge, Metric("Requests being computed.")]
    requests_waiting_for_adapter: Annotated[
        Gauge, Metric("Requests of the queue whose adapters are not on the device.")
    ]
    step_seconds: Annotated[
        Histogram, Metric("Time of a step: plan, run, sample, commit.", buckets=_STEP_BUCKETS)
    ]
    step_plan_seconds: Annotated[
        Histogram, Metric("Part of a step spent planning it.", buckets=_STEP_BUCKETS)
    ]
    step_prepare_seconds: Annotated[
        Histogram,
        Metric("Part of a step spent on its inputs and, on a GPU, on launching it.", buckets=_STEP_BUCKETS),
    ]
    step_run_seconds: Annotated[
        Histogram,
        Metric(
            "Part of a step that the forward pass takes; on a GPU by its own clock, with sampling.",
            buckets=_STEP_BUCKETS,
        ),
    ]
    step_sample_seconds: Annotated[
        Histogram,
        Metric(
            "Part of a step spent on sampling; on a GPU, on waiting for its tokens.",
            buckets=_PART_BUCKETS,
        ),
    ]
    step_emit_seconds: Annotated[
        Histogram,
        Metric(
            "Part of a step spent on committing its tokens and handing them to their readers.",
            buckets=_PART_BUCKETS,
        ),
    ]
    step_device_seconds: Annotated[
        Histogram, Metric("Time of a step by the GPU's own clock.", buckets=_STEP_BUCKETS)
    ]
    step_device_idle_seconds: Annotated[
        Histogram,
        Metric(
            "Time the GPU waited for a step although there was work.",
            buckets=_PART_BUCKETS,
        ),
    ]
    step_requests: Annotated[Histogram, Metric("Requests in a step (batch size).", buckets=_COUNT_BUCKETS)]
    step_tokens: Annotated[
        Histogram, Metric("Tokens computed in a step, prefill and decode.", buckets=_COUNT_BUCKETS)
    ]
    step_adapters: Annotated[
        Histogram, Metric("Different adapters in a step.", buckets=(0, *_COUNT_BUCKETS[:9]))
    ]
    failed_steps: Annotated[Counter, Metric("Steps that failed, and with them every request in them.")]
    prefill_tokens: Annotated[Counter, Metric("Prompt tokens computed.")]
    decode_tokens: Annotated[Counter, Metric("Tokens decoded, rejected draft tokens left out.")]
    drafted_tokens: Annotated[Counter, Metric("Draft tokens, accepted or rejected.")]
    accepted_tokens: Annotated[Counter, Metric("Draft tokens accepted.")]
    preemptions: Annotated[Counter, Metric("Requests preempted, to be recomputed.")]
    kv_cache_usage_ratio: Annotated[Gauge, Metric("KV blocks in use, of all, 0 to 1.")]
    kv_cache_blocks: Annotated[Gauge, Metric("KV blocks there are.")]
    kv_cache_blocks_used: Annotated[Gauge, Metric("KV blocks that requests hold.")]
    kv_cache_blocks_cached: Annotated[
        Gauge, Metric("KV blocks that no request holds and whose content a later one can have.")
    ]
    prefix_cache_queries_tokens: Annotated[Counter, Metric("Prompt tokens looked up in the prefix cache.")]
    prefix_cache_hits_tokens: Annotated[
        Counter, Metric("Prompt tokens found in the prefix cache and not computed.")
    ]
    integrity_problems: Annotated[
        Gauge, Metric("Broken invariants of the pools in the last audit; 0 is right.")
    ]
    weight_checksum_ok: Annotated[
        Gauge, Metric("1 if the base weights had their checksum in the last audit.")
    ]
    audits: Annotated[Gauge, Metric("Audits completed; one runs after work, when idle.")]
    memory_planned_bytes: Annotated[
        Gauge, Metric("Device memory by the plan made at start.", labels=("part",))
    ]
    adapter_hits: Annotated[Counter, Metric("Requests that found an adapter on the device.")]
    adapter_misses: Annotated[Counter, Metric("Requests that had to wait for an adapter.")]
    adapter_evictions: Annotated[Counter, Metric("Adapters evicted from a tier.", labels=("tier",))]
    adapter_swap_in_seconds: Annotated[
        Histogram,
        Metric(
            "Time to bring an adapter from disk to host (load) or from host to device (copy).",
            labels=("kind",),
            buckets=(*_STEP_BUCKETS, 5.0, 10.0),
        ),
    ]
    adapter_swap_in_bytes: Annotated[
        Counter, Metric("Bytes brought from disk (load) or to the device (copy).", labels=("kind",))
    ]
    adapter_used_bytes: Annotated[Gauge, Metric("Bytes adapters take up.", labels=("tier",))]
    adapter_capacity_bytes: Annotated[Gauge, Metric("Bytes there are for adapters.", labels=("tier",))]
    adapters_resident: Annotated[Gauge, Metric("Adapters in a tier.", labels=("tier",))]
    requests: Annotated[
        Counter,
        Metric("Generations by how they ended: stop, length, cancelled, or an error.", labels=("outcome",)),
    ]
    request_time_to_first_token_seconds: Annotated[
        Histogram, Metric("From arrival to the first token.", buckets=_REQUEST_BUCKETS)
    ]
    request_time_per_output_token_seconds: Annotated[
        Histogram, Metric("Mean time between tokens of a request, after its first.", buckets=_TOKEN_BUCKETS)
    ]
    request_seconds: Annotated[
        Histogram, Metric("From arrival to the end of a generation.", buckets=_REQUEST_BUCKETS)
    ]
    request_queue_seconds: Annotated[
        Histogram, Metric("From arrival until first scheduled.", buckets=_REQUEST_BUCKETS)
    ]
    request_adapter_wait_seconds: Annotated[
        Histogram, Metric("Part of the queueing spent on adapters.", buckets=_REQUEST_BUCKETS)
    ]
    prompt_tokens: Annotated[Counter, Metric("Prompt tokens of answered requests.", labels=("adapter",))]
    completion_tokens: Annotated[Counter, Metric("Tokens returned.", labels=("adapter",))]
    engine_restarts: Annotated[Counter, Metric("Times that an engine that had died was started again.")]
    grpc_calls: Annotated[Counter, Metric("Calls that ended.", labels=("method", "code"))]
    grpc_call_seconds: Annotated[
        Histogram, Metric("Time of a call on the server.", labels=("method",), buckets=_REQUEST_BUCKETS)
    ]
    errors: Annotated[
        Counter, Metric("Errors that callers were answered with, of gRPC and HTTP.", labels=("reason",))
    ]
    http_requests: Annotated[Counter, Metric("HTTP requests that ended.", labels=("route", "status"))]
    http_request_seconds: Annotated[
        Histogram,
        Metric("Time of an HTTP request on the server.", labels=("route",), buckets=_REQUEST_BUCKETS),
    ]


def declared_metrics() -> list[DeclaredMetric]:
    """All metrics of `Collectors` in their order."""
    hints = get_type_hints(Collectors, include_extras=True)
    return [DeclaredMetric(field, f"loraplex_{field}", *get_args(hint)) for field, hint in hints.items()]


def make_collectors(registry: CollectorRegistry) -> Collectors:
    """New collectors, registered."""
    made = {}
    for field, name, kind, metric in declared_metrics():
        options = {"buckets": metric.buckets} if metric.buckets else {}
        made[field] = kind(name, metric.help, metric.labels, registry=registry, **options)
    return Collectors(**made)
