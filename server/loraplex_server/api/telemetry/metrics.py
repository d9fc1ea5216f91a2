"""Every Prometheus metric of the server, in one object with a registry of its own.

Metrics of steps, queue and caches come from the engine's `Stats`; those of requests and calls are the
API's own. Seconds, bytes and ratios say so in their names.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from loraplex_server.api.telemetry.gateway_metrics import GatewayCollector
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import Request
from loraplex_server.wire.messages import EngineInfo, Times
from loraplex_server.wire.stats import Stats

_MAX_ADAPTER_LABELS = 1000
# No adapter's name has parentheses.
_BASE_LABEL = "(base)"
_OVERFLOW_LABEL = "other"

_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Holds the collectors and the few methods that feed them. Each method is cheap and never raises."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapter_labels: set[str] = set()
        self._gateway = GatewayCollector()
        self.registry.register(self._gateway)

        self._build = Info("loraplex_build", "What runs here.", registry=self.registry)
        self._waiting = self._gauge("loraplex_requests_waiting", "Requests in the queue.")
        self._running = self._gauge("loraplex_requests_running", "Requests being computed.")
        self._waiting_for_adapter = self._gauge(
            "loraplex_requests_waiting_for_adapter",
            "Requests of the queue whose adapters are not on the device.",
        )
        self._step_seconds = self._histogram(
            "loraplex_step_seconds", "Time of a step: plan, run, sample, commit.", _STEP_BUCKETS
        )
        self._plan_seconds = self._histogram(
            "loraplex_step_plan_seconds", "Part of a step spent planning it.", _STEP_BUCKETS
        )
        self._prepare_seconds = self._histogram(
            "loraplex_step_prepare_seconds",
            "Part of a step spent on its inputs and, on a GPU, on launching it.",
            _STEP_BUCKETS,
        )
        self._run_seconds = self._histogram(
            "loraplex_step_run_seconds",
            "Part of a step that the forward pass takes; on a GPU by its own clock, with sampling.",
            _STEP_BUCKETS,
        )
        self._sample_seconds = self._histogram(
            "loraplex_step_sample_seconds",
            "Part of a step spent on sampling; on a GPU, on waiting for its tokens.",
            (0.00005, 0.0001, 0.00025, *_STEP_BUCKETS),
        )
        self._emit_seconds = self._histogram(
            "loraplex_step_emit_seconds",
            "Part of a step spent on committing its tokens and handing them to their readers.",
            (0.00005, 0.0001, 0.00025, *_STEP_BUCKETS),
        )
        self._device_seconds = self._histogram(
            "loraplex_step_device_seconds", "Time of a step by the GPU's own clock.", _STEP_BUCKETS
        )
        self._idle_seconds = self._histogram(
            "loraplex_step_device_idle_seconds",
            "Time the GPU waited for a step although there was work.",
            (0.00005, 0.0001, 0.00025, *_STEP_BUCKETS),
        )
        self._step_requests = self._histogram(
            "loraplex_step_requests", "Requests in a step (batch size).", _COUNT_BUCKETS
        )
        self._step_tokens = self._histogram(
            "loraplex_step_tokens", "Tokens computed in a step, prefill and decode.", _COUNT_BUCKETS
        )
        self._step_adapters = self._histogram(
            "loraplex_step_adapters", "Different adapters in a step.", (0, *_COUNT_BUCKETS[:9])
        )
        self._failed_steps = self._counter(
            "loraplex_failed_steps", "Steps that failed, and with them every request in them."
        )
        self._prefill_tokens = self._counter("loraplex_prefill_tokens", "Prompt tokens computed.")
        self._decode_tokens = self._counter(
            "loraplex_decode_tokens", "Tokens decoded, wrong guesses left out."
        )
        self._drafted_tokens = self._counter("loraplex_drafted_tokens", "Tokens guessed, right or wrong.")
        self._accepted_tokens = self._counter("loraplex_accepted_tokens", "Tokens guessed right.")
        self._preemptions = self._counter("loraplex_preemptions", "Requests preempted, to be recomputed.")
        self._kv_ratio = self._gauge("loraplex_kv_cache_usage_ratio", "KV blocks in use, of all, 0 to 1.")
        self._kv_blocks = self._gauge("loraplex_kv_cache_blocks", "KV blocks there are.")
        self._kv_used = self._gauge("loraplex_kv_cache_blocks_used", "KV blocks that requests hold.")
        self._kv_cached = self._gauge(
            "loraplex_kv_cache_blocks_cached",
            "KV blocks that no request holds and whose content a later one can have.",
        )
        self._prefix_queries = self._counter(
            "loraplex_prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "loraplex_prefix_cache_hits_tokens", "Prompt tokens found in the prefix cache and not computed."
        )
        self._problems = self._gauge(
            "loraplex_integrity_problems", "Broken invariants of the pools in the last audit; 0 is right."
        )
        self._weights_ok = self._gauge(
            "loraplex_weight_checksum_ok", "1 if the base weights had their checksum in the last audit."
        )
        self._audits = self._gauge("loraplex_audits", "Audits completed; one runs after work, when idle.")

        self._memory = self._gauge(
            "loraplex_memory_planned_bytes", "Device memory by the plan made at start.", "part"
        )

        self._adapter_hits = self._counter(
            "loraplex_adapter_hits", "Requests that found an adapter on the device."
        )
        self._adapter_misses = self._counter(
            "loraplex_adapter_misses", "Requests that had to wait for an adapter."
        )
        self._adapter_evictions = self._counter(
            "loraplex_adapter_evictions", "Adapters evicted from a tier.", "tier"
        )
        self._adapter_swap_seconds = self._histogram(
            "loraplex_adapter_swap_in_seconds",
            "Time to bring an adapter from disk to host (load) or from host to device (copy).",
            (*_STEP_BUCKETS, 5.0, 10.0),
            "kind",
        )
        self._adapter_swap_bytes = self._counter(
            "loraplex_adapter_swap_in_bytes",
            "Bytes brought from disk (load) or to the device (copy).",
            "kind",
        )
        self._adapter_used = self._gauge("loraplex_adapter_used_bytes", "Bytes adapters take up.", "tier")
        self._adapter_capacity = self._gauge(
            "loraplex_adapter_capacity_bytes", "Bytes there are for adapters.", "tier"
        )
        self._adapters_resident = self._gauge("loraplex_adapters_resident", "Adapters in a tier.", "tier")

        self._requests = self._counter(
            "loraplex_requests",
            "Generations by how they ended: stop, length, cancelled, or an error.",
            "outcome",
        )
        self._ttft = self._histogram(
            "loraplex_request_time_to_first_token_seconds",
            "From arrival to the first token.",
            _REQUEST_BUCKETS,
        )
        self._tpot = self._histogram(
            "loraplex_request_time_per_output_token_seconds",
            "Mean time between tokens of a request, after its first.",
            _TOKEN_BUCKETS,
        )
        self._e2e = self._histogram(
            "loraplex_request_seconds", "From arrival to the end of a generation.", _REQUEST_BUCKETS
        )
        self._queue_seconds = self._histogram(
            "loraplex_request_queue_seconds", "From arrival until first scheduled.", _REQUEST_BUCKETS
        )
        self._adapter_wait_seconds = self._histogram(
            "loraplex_request_adapter_wait_seconds",
            "Part of the queueing spent on adapters.",
            _REQUEST_BUCKETS,
        )
        self._prompt_tokens = self._counter(
            "loraplex_prompt_tokens", "Prompt tokens of answered requests.", "adapter"
        )
        self._completion_tokens = self._counter("loraplex_completion_tokens", "Tokens returned.", "adapter")
        self._engine_restarts = self._counter(
            "loraplex_engine_restarts", "Times that an engine that had died was started again."
        )
        self._calls = self._counter("loraplex_grpc_calls", "Calls that ended.", "method", "code")
        self._call_seconds = self._histogram(
            "loraplex_grpc_call_seconds", "Time of a call on the server.", _REQUEST_BUCKETS, "method"
        )

        self._errors = self._counter(
            "loraplex_errors", "Errors that callers were answered with, of gRPC and HTTP.", "reason"
        )
        self._http_requests = self._counter(
            "loraplex_http_requests", "HTTP requests that ended.", "route", "status"
        )
        self._http_seconds = self._histogram(
            "loraplex_http_request_seconds",
            "Time of an HTTP request on the server.",
            _REQUEST_BUCKETS,
            "route",
        )

    def set_info(self, info: EngineInfo, version: str) -> None:
        """What is served, once it is known."""
        self._build.info(
            {
                "version": version,
                "model": info.model,
                "architecture": info.architecture,
                "quantization": info.quantization,
                "dtype": info.dtype,
                "device": info.device,
                "kernels": info.kernels,
            }
        )
        self._gateway.set_info(info)
        self._kv_blocks.set(info.kv_blocks)
        for part, num_bytes in info.memory:
            self._memory.labels(part).set(num_bytes)
        self._adapter_capacity.labels("device").set(info.adapter_device_bytes)
        self._adapter_capacity.labels("host").set(info.adapter_host_bytes)

    def observe_stats(self, stats: Stats) -> None:
        """Takes in what the engine did since its last message."""
        for step in stats.steps:
            self._step_seconds.observe(step.seconds)
            self._plan_seconds.observe(step.plan_seconds)
            for histogram, seconds in (
                (self._prepare_seconds, step.prepare_seconds),
                (self._run_seconds, step.run_seconds),
                (self._sample_seconds, step.sample_seconds),
                (self._emit_seconds, step.emit_seconds),
                (self._device_seconds, step.device_seconds),
                (self._idle_seconds, step.idle_seconds),
            ):
                if seconds is not None:
                    histogram.observe(seconds)
            self._step_requests.observe(step.requests)
            self._step_tokens.observe(step.prefill_tokens + step.decode_tokens)
            self._step_adapters.observe(step.adapters)
            self._prefill_tokens.inc(step.prefill_tokens)
            wrong = step.drafted_tokens - step.accepted_tokens
            self._decode_tokens.inc(step.decode_tokens - wrong)
            self._drafted_tokens.inc(step.drafted_tokens)
            self._accepted_tokens.inc(step.accepted_tokens)
            self._preemptions.inc(step.preemptions)
        self._failed_steps.inc(stats.failed_steps)
        for swap in stats.swaps:
            if swap.kind.startswith("evict_"):
                self._adapter_evictions.labels(swap.kind.removeprefix("evict_")).inc()
            else:
                self._adapter_swap_seconds.labels(swap.kind).observe(swap.seconds)
                self._adapter_swap_bytes.labels(swap.kind).inc(swap.bytes)
        self._waiting.set(stats.waiting)
        self._running.set(stats.running)
        self._waiting_for_adapter.set(stats.waiting_for_adapter)
        self._kv_blocks.set(stats.kv_blocks)
        self._kv_ratio.set(stats.kv_blocks_used / max(1, stats.kv_blocks))
        self._kv_used.set(stats.kv_blocks_used)
        self._kv_cached.set(stats.kv_blocks_cached)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        self._problems.set(stats.integrity_problems)
        self._weights_ok.set(stats.weights_ok)
        self._audits.set(stats.audits)
        self._adapter_used.labels("device").set(stats.adapter_device_bytes_used)
        self._adapter_used.labels("host").set(stats.adapter_host_bytes_used)
        self._adapters_resident.labels("device").set(len(stats.adapters_on_device))
        self._adapters_resident.labels("host").set(len(stats.adapters_on_host))
        self._adapter_hits.inc(stats.adapter_hits)
        self._adapter_misses.inc(stats.adapter_misses)
        self._gateway.observe(stats)

    def observe_restart(self) -> None:
        """A new engine serves."""
        self._engine_restarts.inc()

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_request(
        self,
        request: Request,
        *,
        outcome: str,
        completion_tokens: int,
        seconds: float,
        seconds_after_first_token: float,
        times: Times | None,
    ) -> None:
        """A generation has ended, whichever way.

        Args:
            times: the engine's, where it has sent them.
        """
        self._requests.labels(outcome).inc()
        self._e2e.observe(seconds)
        if completion_tokens > 1:
            self._tpot.observe(seconds_after_first_token / (completion_tokens - 1))
        if times is not None:
            self._queue_seconds.observe(times.queue_s)
            self._adapter_wait_seconds.observe(times.adapter_wait_s)
        if completion_tokens or times is not None:
            # Only now are the names known to be those of adapters, not of a caller's making.
            for label in self._labels_of(request):
                self._prompt_tokens.labels(label).inc(len(request.prompt_token_ids))
                self._completion_tokens.labels(label).inc(completion_tokens)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """A call of any service has ended with the gRPC status `code`."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def observe_error(self, error: ErrorInfo) -> None:
        """A caller is answered with it."""
        self._errors.labels(error.reason or error.code).inc()

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request has ended; 499 is one whose client had gone."""
        self._http_requests.labels(route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def _labels_of(self, request: Request) -> list[str]:
        if not request.adapters:
            return [_BASE_LABEL]
        return [self._adapter_label(use.name) for use in request.adapters]

    def _adapter_label(self, name: str) -> str:
        if name not in self._adapter_labels:
            if len(self._adapter_labels) >= _MAX_ADAPTER_LABELS:
                return _OVERFLOW_LABEL
            self._adapter_labels.add(name)
        return name

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(name, help_text, labels, registry=self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        """Prometheus sees it as `name` with `_total` at its end."""
        return Counter(name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help_text, labels, registry=self.registry, buckets=buckets)
