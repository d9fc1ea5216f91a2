"""The counters and gauges that an engine tells its clients of."""

from __future__ import annotations

import time

import msgspec

from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.core.step import StepPlan
from loraplex_server.engine.audit import Audit
from loraplex_server.engine.commit import Committed
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.schedule import Schedule
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence
from loraplex_server.wire.stats import Stats, StepRecord


class StatsRecorder:
    """Keeps what happens from one `Stats` to the next.

    Attributes:
        steps: steps since then.
        failed_steps: those that failed since then.
    """

    def __init__(
        self, scheduler: Scheduler, blocks: KvBlockPool, adapters: AdapterStore, audit: Audit
    ) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._adapters = adapters
        self._audit = audit
        self.steps: list[StepRecord] = []
        self.failed_steps = 0
        # Counters of others, as they were then.
        self._hits = self._misses = 0
        self._prefix_queries = self._prefix_hits = 0
        self._last_step_s = 0.0

    def add(self, committed: Committed) -> None:
        """Records a step that has just been emitted."""
        now_s, step, output = time.monotonic(), committed.step, committed.output
        # A step that was launched while another ran counts from the end of that one.
        begun_s, self._last_step_s = max(step.started_s, self._last_step_s), now_s
        self.steps.append(
            msgspec.structs.replace(
                step.record,
                seconds=now_s - begun_s,
                device_seconds=output.device_s,
                idle_seconds=output.waited_s if step.in_stride else None,
                prepare_seconds=output.prepare_s,
                run_seconds=output.run_s,
                sample_seconds=output.sample_s,
                emit_seconds=now_s - committed.received_s,
                accepted_tokens=committed.num_accepted,
            )
        )

    def take(self, num_compiling: int) -> Stats:
        """Counts of what happened since the last call, and the state now.

        Args:
            num_compiling: requests that wait for a grammar, beside those in the scheduler's queue.
        """
        scheduler, blocks, adapters, audit = self._scheduler, self._blocks, self._adapters, self._audit
        stats = Stats(
            steps=tuple(self.steps),
            failed_steps=self.failed_steps,
            swaps=tuple(adapters.activity.drain_swaps()),
            waiting=len(scheduler.waiting) + num_compiling,
            running=len(scheduler.running),
            waiting_for_adapter=scheduler.num_waiting_for_adapter,
            kv_blocks_used=blocks.num_used,
            kv_blocks=blocks.num_blocks,
            adapter_device_bytes_used=adapters.device_bytes_used,
            adapter_host_bytes_used=adapters.host_bytes_used,
            adapters_on_device=adapters.on_device,
            adapters_on_host=adapters.on_host,
            adapter_hits=adapters.activity.hits - self._hits,
            adapter_misses=adapters.activity.misses - self._misses,
            integrity_problems=len(audit.problems),
            weights_ok=audit.weights_ok,
            audits=audit.passes,
            adapters_running=_adapter_names(scheduler.running),
            adapters_waiting=_adapter_names(scheduler.waiting),
            kv_blocks_cached=blocks.num_cached,
            prefix_queries=scheduler.prefix_queries - self._prefix_queries,
            prefix_hits=scheduler.prefix_hits - self._prefix_hits,
        )
        self.steps, self.failed_steps = [], 0
        self._hits, self._misses = adapters.activity.hits, adapters.activity.misses
        self._prefix_queries, self._prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        return stats


def begun_record(schedule: Schedule, plan: StepPlan, plan_seconds: float) -> StepRecord:
    """A step as far as it is known at its launch."""
    items = schedule.scheduled
    prefill_tokens = sum(item.num_tokens for item in items if item.sequence.num_pending > 1)
    return StepRecord(
        seconds=0.0,
        plan_seconds=plan_seconds,
        requests=plan.num_sequences,
        prefill_tokens=prefill_tokens,
        decode_tokens=plan.num_tokens - prefill_tokens,
        adapters=len(set(plan.pair_slot.tolist())),
        preemptions=schedule.preemptions,
        drafted_tokens=sum(len(item.drafts) for item in items),
    )


def _adapter_names(sequences: list[Sequence]) -> tuple[str, ...]:
    return tuple({handle.name for sequence in sequences for handle in sequence.handles})
