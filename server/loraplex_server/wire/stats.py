"""Counters and gauges that the engine sends to all its clients."""

from __future__ import annotations

import msgspec

from loraplex_server.core.adapter_status import SwapRecord
from loraplex_server.wire.message import Message


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step, for metrics.

    Attributes:
        seconds: the host's time for the step.
        plan_seconds: the part of it for planning.
        requests: number of requests in the step.
        adapters: number of distinct adapters in the step.
        device_seconds: the step's time by the device's clock; None if the device has none.
        idle_seconds: the device's idle time before the step although there was work; None if there is no
            clock, or there was no work.
        prepare_seconds, run_seconds, sample_seconds: as in `StepOutput`.
        emit_seconds: the time for committing the step and emitting its tokens.
        decode_tokens: tokens of decoding requests, draft tokens included.
        drafted_tokens: draft tokens that the step verified.
        accepted_tokens: draft tokens that it accepted.
    """

    seconds: float
    plan_seconds: float
    requests: int
    prefill_tokens: int
    decode_tokens: int
    adapters: int
    preemptions: int
    device_seconds: float | None = None
    idle_seconds: float | None = None
    prepare_seconds: float | None = None
    run_seconds: float | None = None
    sample_seconds: float | None = None
    emit_seconds: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Stats(Message, frozen=True):
    """Counters and gauges, sent to every client about ten times a second.

    Attributes:
        steps: the steps since the previous `Stats`.
        swaps: the movements of adapters since then.
        waiting: number of waiting requests.
        running: number of running requests.
        waiting_for_adapter: number of requests that wait for an adapter.
        integrity_problems: problems that the last audit of the pools found; it runs when the engine is idle.
        weights_ok: True if the base weights matched their checksum in the last audit.
        audits: number of audits since the start.
        adapters_running: names of the adapters that running requests use, each once.
        adapters_waiting: names of the adapters that waiting requests use, each once.
        kv_blocks_cached: blocks that no request holds, kept for prompts with the same prefix.
        prefix_queries: prompt tokens that were looked up in the prefix cache.
        prefix_hits: prompt tokens that were found there.
        failed_steps: number of failed steps; all requests of such a step fail.
    """

    steps: tuple[StepRecord, ...]
    swaps: tuple[SwapRecord, ...]
    waiting: int
    running: int
    waiting_for_adapter: int
    kv_blocks_used: int
    kv_blocks: int
    adapter_device_bytes_used: int
    adapter_host_bytes_used: int
    adapters_on_device: tuple[str, ...]
    adapters_on_host: tuple[str, ...]
    adapter_hits: int
    adapter_misses: int
    integrity_problems: int = 0
    weights_ok: bool = True
    audits: int = 0
    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()
    kv_blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed_steps: int = 0
