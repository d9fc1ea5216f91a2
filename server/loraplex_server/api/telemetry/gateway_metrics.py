"""Metrics under the names by which the Kubernetes Gateway API Inference Extension finds them.

Its endpoint picker routes by queue, KV cache and adapters, and takes the names of vLLM's metrics by default:
so these carry them, with the protocol's meanings. `vllm:lora_requests_info` says what requests are doing
(the adapters of running and of waiting requests); where adapters are is in `vllm:lora_adapter_loaded`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.wire.messages import EngineInfo
from loraplex_server.wire.stats import Stats

MAX_NAMES = 1000
"""Adapters named in one scrape, for each list: the label set must stay bounded."""


class GatewayMetric(NamedTuple):
    """A gauge of the protocol."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    def family(self, *samples: tuple[tuple[str, ...], float]) -> GaugeMetricFamily:
        """The gauge with its samples: labels' values and the number."""
        made = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for values, number in samples:
            made.add_metric(values, number)
        return made


WAITING = GatewayMetric("vllm:num_requests_waiting", "Requests in the queue.")
RUNNING = GatewayMetric("vllm:num_requests_running", "Requests being computed.")
KV_USAGE = GatewayMetric("vllm:kv_cache_usage_perc", "KV blocks in use, of all, 0 to 1.")
CACHE_CONFIG = GatewayMetric(
    "vllm:cache_config_info",
    "Size of a KV block in tokens, and how many there are.",
    ("block_size", "num_gpu_blocks"),
)
LORA_REQUESTS = GatewayMetric(
    "vllm:lora_requests_info",
    "Adapters of running and of waiting requests; the value is the time of the last update.",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)
ADAPTER_LOADED = GatewayMetric(
    "vllm:lora_adapter_loaded",
    "Where an adapter is: gpu (can run now) or cpu (in host memory).",
    ("adapter_name", "level"),
)
ON_DEVICE = GatewayMetric("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.")
ON_HOST = GatewayMetric("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.")
MAX_ON_DEVICE = GatewayMetric("vllm:max_gpu_lora_adapters", "Most adapters on the device at once.")
GATEWAY_METRICS = (
    *(WAITING, RUNNING, KV_USAGE, CACHE_CONFIG, LORA_REQUESTS, ADAPTER_LOADED),
    *(ON_DEVICE, ON_HOST, MAX_ON_DEVICE),
)


class GatewayCollector(Collector):
    """The last `Stats` as the protocol's gauges.

    A collector, and not labelled gauges: every other set of adapters would leave a series of its own behind.
    """

    def __init__(self) -> None:
        self._info: EngineInfo | None = None
        self._stats: Stats | None = None
        self._updated_s = 0.0

    def set_info(self, info: EngineInfo) -> None:
        """Takes in what is served, once it is known."""
        self._info = info

    def observe(self, stats: Stats) -> None:
        """Takes in the engine's state."""
        self._stats, self._updated_s = stats, time.time()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would collect to find out the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One fresh sample of everything; nothing before the engine is ready."""
        info, stats = self._info, self._stats
        if info is None or stats is None:
            return
        yield WAITING.family(((), stats.waiting))
        yield RUNNING.family(((), stats.running))
        yield KV_USAGE.family(((), stats.kv_blocks_used / max(1, stats.kv_blocks)))
        yield CACHE_CONFIG.family(((str(info.kv_block_size), str(stats.kv_blocks)), 1.0))
        running, waiting = _names(stats.adapters_running), _names(stats.adapters_waiting)
        yield LORA_REQUESTS.family(((str(info.adapter_slots), running, waiting), self._updated_s))
        on_device = frozenset(stats.adapters_on_device)
        host_only = [name for name in stats.adapters_on_host if name not in on_device]
        yield ADAPTER_LOADED.family(
            *(((name, "gpu"), 1.0) for name in stats.adapters_on_device[-MAX_NAMES:]),
            *(((name, "cpu"), 1.0) for name in host_only[-MAX_NAMES:]),
        )
        yield ON_DEVICE.family(((), len(stats.adapters_on_device)))
        yield ON_HOST.family(((), len(stats.adapters_on_host)))
        yield MAX_ON_DEVICE.family(((), info.adapter_slots))


def _names(names: Iterable[str]) -> str:
    return ",".join(sorted(names)[:MAX_NAMES])
