"""Recorded decode steps against steps launched kernel by kernel: on CUDA, else under Triton's interpreter.

There nothing is replayed: the recorded work is called again, with the metadata objects that it was recorded
with. Whatever it read of a step's values on the host would show as the recording's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_kernels import dispatch, vectors
from loraplex_server.adapters.residency.record import Readiness
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.core.step import StepPlan
from loraplex_server.engine import sequence as sequences
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.model.run.graphs import GraphLimits, ladder, row_by_row
from loraplex_server.model.run.runner import ModelRunner

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_HERE = dispatch.triton_installed() and (INTERPRETED or torch.cuda.is_available())
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BLOCK = 4
BLOCKS = 40
Row = tuple[int, tuple[tuple[str, float], ...]]
"""Tokens that a sequence has, the last of which is to be computed, and its adapters."""

R6, R7, BOTH = (("r6", 1.0),), (("r7", 1.0),), (("r6", 0.5), ("r7", -1.0))


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "not kernels_wide", "TestReplay")


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 100, 300])
def test_the_next_size_is_never_far(most: int) -> None:
    sizes = ladder(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = min(size for size in sizes if size >= count)
        assert size - count < max(8, size // 7)


def test_a_step_of_one_token_has_room_for_all_its_adapters() -> None:
    limits = GraphLimits(
        (1, 8), block_size=16, num_blocks=100, max_blocks_per_sequence=64, max_pairs_per_token=8
    )
    assert (limits.pairs(1), limits.pairs(8), limits.pairs(64)) == (8, 12, 96)
    assert (limits.blocks(1), limits.blocks(8)) == (64, 200)


def test_a_row_that_is_sampled_can_stand_alone() -> None:
    """Two drafts after the sixth token of one sequence, none after the third of another, blocks of four."""

    def sequence(length: int, table: list[int]) -> sequences.Sequence:
        made = sequences.Sequence(Request("r", tuple(range(length))), "test", ())
        made.block_table, made.num_computed = table, length - 1
        return made

    first, second = sequence(7, [8, 3, 5]), sequence(3, [9])
    plan = build_plan([Scheduled(first, 1, drafts=(50, 51)), Scheduled(second, 1)], BLOCK, lambda _: 0, ())
    assert plan.query_start.tolist() == [0, 3, 4]
    rows = row_by_row(plan)
    assert rows is not None
    assert rows.query_start.tolist() == [0, 1, 2, 3, 4]
    assert rows.context_len.tolist() == [7, 8, 9, 3]
    assert rows.block_start.tolist() == [0, 3, 6, 9, 10]
    assert rows.blocks.tolist() == [8, 3, 5] * 3 + [9]
    first.num_computed = 4
    assert row_by_row(build_plan([Scheduled(first, 3)], BLOCK, lambda _: 0, ())) is None


def test_graphs_that_cannot_be_are_refused(harness: Any, tiny: Any) -> None:
    """`on` is that or no start; `auto` starts without them, as on this CPU."""
    with pytest.raises(FailedPreconditionError, match=r"--cuda-graphs on: .*runs torch"):
        harness(tiny("Llama"), model={"cuda_graphs": "on", "device": "cpu", "kernels": "torch"})
    served = harness(tiny("Llama"), model={"device": "cpu"})
    assert served.engine._runner._graphs is None


@dataclasses.dataclass
class Steps:
    """Decode steps over an engine's model and adapters, computed either way from the same cache."""

    engine: Any
    held: list[Any] = dataclasses.field(default_factory=list)

    def plan(self, rows: Sequence[Row], seed: int, *, computed: bool, drafts: Sequence[int] = ()) -> StepPlan:
        """Decodes of `rows`, each in blocks of its own and with so many drafts, or the steps before them."""
        generator = np.random.default_rng(seed)
        order = generator.permutation(BLOCKS).tolist()
        scheduled = []
        for (length, adapters), count in zip_longest(rows, drafts, fillvalue=0):
            tokens = tuple(generator.integers(3, 200, length).tolist())
            uses = tuple(AdapterUse(name, weight) for name, weight in adapters)
            handles = self.handles(adapters)
            made = sequences.Sequence(Request("r", tokens, adapters=uses), "test", handles)
            made.block_table = [order.pop() for _ in range(-(-(length + count) // BLOCK))]
            made.num_computed = length - 1 if computed else 0
            drafts = tuple(generator.integers(3, 200, count).tolist()) if computed else ()
            scheduled.append(Scheduled(made, 1 if computed else length - 1, drafts=drafts))
        return build_plan(scheduled, BLOCK, self.engine.adapters.requests.slot, ())

    def handles(self, adapters: Sequence[tuple[str, float]]) -> Any:
        store = self.engine.adapters
        handles = store.requests.resolve([name for name, _ in adapters], [weight for _, weight in adapters])
        readiness = store.requests.reserve(handles)
        while readiness is Readiness.LOADING:
            store.wait_event(1.0)
            store.poll()
            readiness = store.requests.is_ready(handles)
        assert readiness is Readiness.READY
        self.held.append(handles)
        return handles

    def release(self) -> None:
        for handles in self.held:
            self.engine.adapters.requests.release(handles)

    def compare(
        self,
        rows: Sequence[Row],
        seed: int,
        tolerance: float,
        *,
        replays: bool = True,
        drafts: Sequence[int] = (),
    ) -> None:
        """Both ways from one cache: the same logits, the same keys and values, nothing written elsewhere."""
        runner = self.engine._runner
        caches = runner._kv_caches
        before = self.plan(rows, seed, computed=False, drafts=drafts)
        if before.num_tokens:
            runner.run(before)
        plan = self.plan(rows, seed, computed=True, drafts=drafts)
        kept = [cache.clone() for cache in caches]
        with torch.inference_mode():
            truth = runner._eager(plan)().clone()
            written = [cache.clone() for cache in caches]
            for cache, values in zip(caches, kept, strict=True):
                cache.copy_(values)
            replay = runner._graphs.prepare(plan)
            assert (replay is not None) == replays
            if replay is None:
                return
            found = replay()
        assert (found - truth).abs().max() <= tolerance * truth.abs().max()
        for cache, values, old in zip(caches, written, kept, strict=True):
            assert torch.allclose(cache.float(), values.float(), atol=tolerance * 10, rtol=tolerance * 10)
            assert torch.equal(cache != old, values != old)


def _steps(harness: Any, model: Any, quantization: str = "none", **options: Any) -> Steps:
    served = harness(
        model,
        quantization,
        scheduler={
            "max_num_requests": 4,
            "max_batch_tokens": 64,
            "kv_block_size": BLOCK,
            "kv_cache_bytes": BLOCKS * BLOCK * 2 * 2 * 2 * 16 * 4,
        },
        adapters={"max_per_request": 2, "max_on_device": 4},
        model={
            "device": DEVICE,
            "kernels": "triton",
            "cuda_graphs": "on",
            "cuda_graph_sizes": (2, 4),
            **options,
        },
    )
    return Steps(served.engine)


@pytest.fixture(scope="module")
def recorded(module_harness: Any, tiny: Any) -> Iterator[Steps]:
    made = _steps(module_harness, tiny("Llama"))
    yield made
    made.release()


@pytest.mark.skipif(not RUNS_HERE, reason="needs CUDA, or TRITON_INTERPRET=1 from the start")
class TestReplay:
    @pytest.fixture
    def steps(self, harness: Any, tiny: Any) -> Iterator[Callable[..., Steps]]:
        made: list[Steps] = []

        def make(architecture: str = "Llama", quantization: str = "none", **model: Any) -> Steps:
            made.append(_steps(harness, tiny(architecture), quantization, **model))
            return made[-1]

        yield make
        for one in made:
            one.release()

    @pytest.fixture
    def llama(self, recorded: Steps) -> Steps:
        """The result of `steps()`, recorded once for the tests that do not change it; its cache is empty."""
        for cache in recorded.engine._runner._kv_caches:
            cache.zero_()
        return recorded

    def test_any_mix_of_adapters(self, llama: Steps) -> None:
        """Recorded with one pair on one token; replayed with more, fewer and others, other pages and rows."""
        for seed, rows in enumerate(
            [
                [(5, R6), (6, R7), (1, ()), (3, R6)],
                [(7, BOTH), (3, ())],
                [(6, ())],
                [(2, R7), (5, R7), (9, R7)],
                [(4, BOTH), (5, ()), (2, BOTH)],
            ]
        ):
            llama.compare(rows, seed, 1e-5)

    def test_windows_and_caps(self, steps: Any) -> None:
        """Gemma 2: two layer shapes, a window shorter than the context, capped logits."""
        made = steps("Gemma2", cuda_graph_sizes=(4,))
        made.compare([(14, R6), (3, ()), (11, BOTH)], 0, 1e-5)

    def test_draft_tokens_are_rows_like_others(self, llama: Steps) -> None:
        llama.compare([(5, R6), (7, ())], 0, 1e-5, drafts=(0, 2))
        llama.compare([(6, R7), (3, ())], 2, 1e-5, drafts=(3, 1), replays=False)

    def test_packed_weights(self, steps: Any) -> None:
        made = steps(quantization="nf4", cuda_graph_sizes=(2,))
        made.compare([(5, R6), (9, ())], 0, 1e-5)

    def test_what_fits_no_recording_is_left_alone(
        self, llama: Steps, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner, graphs = llama.engine._runner, llama.engine._runner._graphs
        full = [(5, BOTH)] * 3
        plan = llama.plan(full, 0, computed=True)
        assert graphs._bucket(plan, row_by_row(plan)).size == 4
        llama.compare([(5, BOTH)] * 4, 0, 0, replays=False)
        prefill = llama.plan([(5, ()), (5, R6)], 0, computed=False)
        assert graphs.prepare(prefill) is None
        soft = llama.plan([(5, ()), (5, R6)], 0, computed=True)
        virtual = dataclasses.replace(soft, token_ids=np.array([7, -1]))
        assert graphs.prepare(virtual) is None
        monkeypatch.setattr(llama.engine.adapters.pool.host, "outside", np.ones(4, np.bool_))
        assert graphs.prepare(llama.plan([(5, R6), (3, ())], 0, computed=True)) is None
        monkeypatch.undo()
        monkeypatch.setattr(vectors, "any_vectors", lambda *_: True)
        llama.compare([(5, R6), (3, ())], 0, 0, replays=False)
        assert len(runner.run(llama.plan([(5, R6), (3, ())], 0, computed=True)).sampled) == 2

    def test_rows_that_are_not_sampled(self, llama: Steps) -> None:
        """A chunk of one token in the middle of a prompt is a decode in all but its sample."""
        plan = llama.plan([(5, R6), (9, R7), (3, ())], 0, computed=True)
        runner = llama.engine._runner
        whole = runner.logits(plan).clone()
        some = runner.logits(dataclasses.replace(plan, sample_row=np.array([2, 0])))
        assert torch.equal(some, whole[[2, 0]])
        nothing = dataclasses.replace(plan, sample_row=np.zeros(0, np.int64))
        assert runner.run(nothing).sampled == ()

    def test_the_engine_answers_the_same(
        self, harness: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Level (i) through the whole engine, one step ahead: requests come and go, and steps go from eager
        to replayed and back, each fed by the other.
        """
        uses = {"base": (), "r6": R6, "sum": BOTH, "late": R7}

        def answers(graphs: str, kernels: str) -> tuple[dict[str, list[int]], int]:
            served = harness(
                tiny("Llama"),
                scheduler={"max_num_requests": 3, "max_batch_tokens": 16, "kv_block_size": BLOCK},
                adapters={"max_per_request": 2},
                model={"device": DEVICE, "kernels": kernels, "cuda_graphs": graphs},
            )
            replays = 0
            monkeypatch.setattr(ModelRunner, "asynchronous", graphs == "on")
            if graphs == "on":
                prepare = served.engine._runner._graphs.prepare

                def counted(plan: StepPlan, tokens: torch.Tensor | None) -> Any:
                    nonlocal replays
                    found = prepare(plan, tokens)
                    replays += found is not None
                    return found

                served.engine._runner._graphs.prepare = counted
            for index, (name, adapters) in enumerate(uses.items()):
                prompt = range(5 + index, 11 + 2 * index)
                served.submit(name, prompt, adapters, max_tokens=2 + index % 3, ignore_eos=True)
            served.run()
            return {name: answer.tokens for name, answer in served.answers.items()}, replays

        truth, none = answers("off", "torch")
        found, replays = answers("on", "triton")
        assert found == truth
        assert none == 0 < replays

    @needs_gpu
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 4e-3)]
    )
    @pytest.mark.parametrize("quantization", ["none", "nf4", "int4"])
    def test_replayed_on_a_gpu(self, steps: Any, quantization: str, dtype: str, tolerance: float) -> None:
        """Sums may be split otherwise: (i) 1e-4 in fp32, (ii) a few roundings in half precision."""
        made = steps(quantization=quantization, dtype=dtype)
        made.compare([(5, R6), (9, R7), (14, BOTH)], 0, tolerance)
        made.compare([(30, ()), (2, ()), (9, ()), (1, ())], 1, tolerance)
        made.compare([(1, R7)], 2, tolerance)
