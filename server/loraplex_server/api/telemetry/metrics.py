"""The server's metrics in one object, with a registry of its own and the methods that feed them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from loraplex_server.api.telemetry.catalogue import make_collectors
from loraplex_server.api.telemetry.gateway_metrics import GatewayCollector
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import Request
from loraplex_server.wire.messages import EngineInfo, Times
from loraplex_server.wire.stats import Stats

_MAX_ADAPTER_LABELS = 1000
# No adapter's name has parentheses.
_BASE_LABEL = "(base)"
_OVERFLOW_LABEL = "other"


class Metrics:
    """Holds the collectors and the few methods that feed them. Each method is cheap and never raises."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapter_labels: set[str] = set()
        self._gateway = GatewayCollector()
        self.registry.register(self._gateway)
        self._collectors = make_collectors(self.registry)

    def set_info(self, info: EngineInfo, version: str) -> None:
        """Takes in what is served, once it is known."""
        self._collectors.build.info(
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
        self._collectors.kv_cache_blocks.set(info.kv_blocks)
        for part, num_bytes in info.memory:
            self._collectors.memory_planned_bytes.labels(part).set(num_bytes)
        self._collectors.adapter_capacity_bytes.labels("device").set(info.adapter_device_bytes)
        self._collectors.adapter_capacity_bytes.labels("host").set(info.adapter_host_bytes)

    def observe_stats(self, stats: Stats) -> None:
        """Takes in what the engine did since its last message."""
        collectors = self._collectors
        for step in stats.steps:
            collectors.step_seconds.observe(step.seconds)
            collectors.step_plan_seconds.observe(step.plan_seconds)
            for histogram, seconds in (
                (collectors.step_prepare_seconds, step.prepare_seconds),
                (collectors.step_run_seconds, step.run_seconds),
                (collectors.step_sample_seconds, step.sample_seconds),
                (collectors.step_emit_seconds, step.emit_seconds),
                (collectors.step_device_seconds, step.device_seconds),
                (collectors.step_device_idle_seconds, step.idle_seconds),
            ):
                if seconds is not None:
                    histogram.observe(seconds)
            collectors.step_requests.observe(step.requests)
            collectors.step_tokens.observe(step.prefill_tokens + step.decode_tokens)
            collectors.step_adapters.observe(step.adapters)
            collectors.prefill_tokens.inc(step.prefill_tokens)
            wrong = step.drafted_tokens - step.accepted_tokens
            collectors.decode_tokens.inc(step.decode_tokens - wrong)
            collectors.drafted_tokens.inc(step.drafted_tokens)
            collectors.accepted_tokens.inc(step.accepted_tokens)
            collectors.preemptions.inc(step.preemptions)
        collectors.failed_steps.inc(stats.failed_steps)
        for swap in stats.swaps:
            if swap.kind.startswith("evict_"):
                collectors.adapter_evictions.labels(swap.kind.removeprefix("evict_")).inc()
            else:
                collectors.adapter_swap_in_seconds.labels(swap.kind).observe(swap.seconds)
                collectors.adapter_swap_in_bytes.labels(swap.kind).inc(swap.bytes)
        collectors.requests_waiting.set(stats.waiting)
        collectors.requests_running.set(stats.running)
        collectors.requests_waiting_for_adapter.set(stats.waiting_for_adapter)
        collectors.kv_cache_blocks.set(stats.kv_blocks)
        collectors.kv_cache_usage_ratio.set(stats.kv_blocks_used / max(1, stats.kv_blocks))
        collectors.kv_cache_blocks_used.set(stats.kv_blocks_used)
        collectors.kv_cache_blocks_cached.set(stats.kv_blocks_cached)
        collectors.prefix_cache_queries_tokens.inc(stats.prefix_queries)
        collectors.prefix_cache_hits_tokens.inc(stats.prefix_hits)
        collectors.integrity_problems.set(stats.integrity_problems)
        collectors.weight_checksum_ok.set(stats.weights_ok)
        collectors.audits.set(stats.audits)
        collectors.adapter_used_bytes.labels("device").set(stats.adapter_device_bytes_used)
        collectors.adapter_used_bytes.labels("host").set(stats.adapter_host_bytes_used)
        collectors.adapters_resident.labels("device").set(len(stats.adapters_on_device))
        collectors.adapters_resident.labels("host").set(len(stats.adapters_on_host))
        collectors.adapter_hits.inc(stats.adapter_hits)
        collectors.adapter_misses.inc(stats.adapter_misses)
        self._gateway.observe(stats)

    def observe_restart(self) -> None:
        """A new engine serves."""
        self._collectors.engine_restarts.inc()

    def observe_first_token(self, seconds: float) -> None:
        self._collectors.request_time_to_first_token_seconds.observe(seconds)

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
        self._collectors.requests.labels(outcome).inc()
        self._collectors.request_seconds.observe(seconds)
        if completion_tokens > 1:
            self._collectors.request_time_per_output_token_seconds.observe(
                seconds_after_first_token / (completion_tokens - 1)
            )
        if times is not None:
            self._collectors.request_queue_seconds.observe(times.queue_s)
            self._collectors.request_adapter_wait_seconds.observe(times.adapter_wait_s)
        if completion_tokens or times is not None:
            # Only now are the names known to be those of adapters, not of a caller's making.
            for label in self._labels_of(request):
                self._collectors.prompt_tokens.labels(label).inc(len(request.prompt_token_ids))
                self._collectors.completion_tokens.labels(label).inc(completion_tokens)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """A call of any service has ended with the gRPC status `code`."""
        self._collectors.grpc_calls.labels(method, code).inc()
        self._collectors.grpc_call_seconds.labels(method).observe(seconds)

    def observe_error(self, error: ErrorInfo) -> None:
        """A caller is answered with it."""
        self._collectors.errors.labels(error.reason or error.code).inc()

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request has ended; 499 is one whose client had gone."""
        self._collectors.http_requests.labels(route, str(status)).inc()
        self._collectors.http_request_seconds.labels(route).observe(seconds)

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
