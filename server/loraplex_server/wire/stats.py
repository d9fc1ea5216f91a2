"""Counters and gauges of the engine, sent to every client of it."""

from __future__ import annotations

import msgspec

from loraplex_server.core.adapter_status import SwapRecord
from loraplex_server.wire.message import Message


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step, for metrics. Counts are of tokens unless named otherwise.

    `device_seconds` is the step's time by the device's clock, `idle_seconds` how long the device waited for
    it although there was work; None without such a clock, or where there was none. `prepare_seconds`,
    `run_seconds` and `sample_seconds` are `StepOutput`'s, `emit_seconds` is for committing and emitting.
    `decode_tokens` includes `drafted_tokens`, of which `accepted_tokens` were accepted.
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
    """Counters and gauges since the last `Stats`, sent to every client about ten times a second.

    Attributes:
        integrity_problems: found by the last audit of the pools, which runs when the engine is idle.
        weights_ok: the base weights had their checksum in the last audit.
        audits: completed since the start.
        adapters_running: names of the adapters that running requests use, each once.
        adapters_waiting: those that waiting requests name.
        kv_blocks_cached: blocks that no request holds and a later one may find its prompt in.
        prefix_queries: prompt tokens that were looked up in the prefix cache.
        prefix_hits: how many of them were there.
        failed_steps: steps that failed, and all requests in them.
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
