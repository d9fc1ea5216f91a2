"""No step waits for the device: what the host may do in one is watched, op by op, without a GPU.

The model lies on the meta device, which has shapes and no values, and stands for the GPU; launches of Triton
kernels are noted and not made. Whatever would read the device, send it something, or depend on values there,
is an op that the watch sees.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex_kernels import dispatch, quant
from loraplex_kernels.attention import LayerShape
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.quant import nf4
from loraplex_server.core.step import StepPlan
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.fusion import fuse
from loraplex_server.model.layers.norm import attach
from loraplex_server.model.layers.weights import Blocked, Dense, FrozenWeight, WeightFormat
from loraplex_server.model.load.empty_model import EmptyModel, attach_embedding_and_head
from loraplex_server.model.load.filler import install
from loraplex_server.model.plan import workspace
from loraplex_server.model.plan.live_bytes import LiveBytes
from loraplex_server.model.run import graphs, sampler, scoring
from loraplex_server.model.run.kv_cache import allocate_kv
from loraplex_server.model.run.runner import ModelRunner

META = torch.device("meta")
BLOCK = 4
FORBIDDEN = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal",
    "unique_dim", "_unique2", "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
COPIES = {"copy_", "to", "_to_copy", "_copy_from"}


class Watch(TorchDispatchMode):
    """Counts copies between host and device, and notes what a step must not do.

    A host tensor of no dimension is a number, and travels with the launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_host = 0
        self.faults: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "meta":
            self.to_host += 1
            return args[0]
        if name in FORBIDDEN:
            self.faults.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.faults.append(f"{name} by a mask")
        found = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in (*given, *made) if tensor.ndim}
        if len(devices) > 1:
            if name in COPIES:
                self.to_device += 1
            else:
                self.faults.append(f"{name} of host and device")
        return found


class Launches:
    """In the place of a Triton kernel."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self._name = name
        self._counts = counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and size > 0 for size in grid), (self._name, grid)

        def launch(*args: Any, **constants: Any) -> None:
            pointers = [argument for argument in args if isinstance(argument, torch.Tensor)]
            assert pointers
            assert {tensor.device for tensor in pointers} == {META}, self._name
            assert not any(isinstance(value, torch.Tensor) for value in constants.values())
            self._counts[self._name] += 1

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The meta device takes Triton's kernels; each launch is counted under the kernel's name."""
    pytest.importorskip("triton")
    from loraplex_kernels.attention import launch as attention_launch
    from loraplex_kernels.attention.rotary import launch as rotary_launch
    from loraplex_kernels.gated import launch as gated_launch
    from loraplex_kernels.lora import launch as lora_launch
    from loraplex_kernels.norm import launch as norm_launch
    from loraplex_kernels.quant import launch as quant_launch

    counts: Counter[str] = Counter()
    for module in (
        attention_launch, quant_launch, gated_launch, lora_launch, norm_launch, rotary_launch
    ):  # fmt: skip
        names = [name for name in vars(module) if name.endswith("_kernel")]
        assert names
        for name in names:
            monkeypatch.setattr(module, name, Launches(name, counts))
    usual = dispatch.backend
    monkeypatch.setattr(
        dispatch, "backend", lambda device: "triton" if device.type == "meta" else usual(device)
    )
    return counts


def on_meta(value: Any) -> Any:
    """A weight's tensors by their shapes alone."""
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_meta(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def build(config: Any, *, quantized: bool = True, fused: bool = True) -> ModelRunner:
    """A runner for the architecture of a transformers configuration, without values."""
    weight_format = WeightFormat("nf4" if quantized else "none", torch.bfloat16, META)
    empty = EmptyModel.of(config, weight_format)
    model = empty.model.to(META)
    shapes: dict[int, LayerShape] = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            window = getattr(module, "sliding_window", None)
            if not hasattr(module, "sliding_window"):
                window = getattr(config, "sliding_window", None)
            layer = module.layer_idx
            shapes[layer] = LayerShape(
                config.num_attention_heads, *empty.kv_shapes[layer], torch.bfloat16, window
            )
    groups, first = [], 0
    for group in empty.grouped:
        weight: FrozenWeight = Dense(
            torch.empty(
                sum(p.out_features for p in group), group[0].in_features, dtype=torch.bfloat16, device=META
            )
        )
        if quantized and group[0].in_features % 64 == 0:
            parts = [nf4.quantize(torch.randn(p.out_features, p.in_features)) for p in group]
            weight = Blocked(on_meta(quant.arrange_nf4(parts)))
        groups.append(install(model, group, first, [weight], None))
        first += len(group)
    norms = tuple(
        attach(model.get_submodule(norm.path), norm, first + index) for index, norm in enumerate(empty.norms)
    )
    base = BaseModel(
        model=model,
        config=config,
        format=weight_format,
        groups=tuple(groups),
        projections=tuple(projection for group in empty.grouped for projection in group),
        norms=norms,
        vocabulary=attach_embedding_and_head(model, empty.embedding_and_head, first + len(norms)),
        kv_shapes=empty.kv_shapes,
        eos_token_ids=(),
        parameters=empty.parameters,
    )
    if fused:
        assert fuse(model).layers == config.num_hidden_layers
    pool = LoraPool.allocate(
        num_elements=1 << 12,
        num_slots=8,
        num_entries=first + len(norms) + 2,
        dtype=torch.bfloat16,
        device=META,
        num_projections=first,
    )
    caches = allocate_kv(base.kv_shapes, 16, BLOCK, torch.bfloat16, META)
    return ModelRunner(
        base, caches, pool, block_size=BLOCK, max_batch_tokens=64, max_pairs_per_token=2,
        layers=[shapes[layer] for layer in sorted(shapes)],
    )  # fmt: skip


@pytest.fixture
def architecture(tiny: Any) -> Callable[[str], Any]:
    """The transformers configuration of a tiny model; "longrope" is a Phi-3 with such position embeddings."""
    from transformers import AutoConfig

    def make(name: str) -> Any:
        if name != "longrope":
            return AutoConfig.from_pretrained(tiny(name).base)
        options = AutoConfig.from_pretrained(tiny("Phi3").base).to_dict()
        options["original_max_position_embeddings"] = 64
        options["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        }  # fmt: skip
        from transformers import Phi3Config

        return Phi3Config(**{key: value for key, value in options.items() if key != "rope_scaling"})

    return make


def plan(lengths: Sequence[int], *, adapters: bool, sampling: dict[str, Any] | None = None) -> StepPlan:
    """`lengths` queries of one sequence each, all in blocks 0 to 3, with an adapter each or none."""
    rows = len(lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    owner = np.repeat(np.arange(rows), lengths)
    positions = np.arange(starts[-1]) - starts[owner] + 2
    runs = rows if adapters else 0
    columns: dict[str, Any] = {
        "token_ids": np.arange(starts[-1]),
        "positions": positions,
        "slot_mapping": positions % (4 * BLOCK),
        "query_start": starts,
        "context_len": np.array(lengths) + 2,
        "block_start": np.arange(rows + 1) * 4,
        "blocks": np.tile(np.arange(4), rows),
        "run_start": starts[:-1][:runs],
        "run_end": starts[1:][:runs],
        "run_pair_start": np.arange(runs + 1),
        "pair_slot": np.arange(runs),
        "pair_weight": np.ones(runs),
        "sample_row": starts[1:] - 1,
        "temperature": np.zeros(rows),
        "top_k": np.zeros(rows, np.int64),
        "top_p": np.ones(rows),
        "uniform": np.full(rows, 0.5),
        "num_logprobs": np.full(rows, -1),
        "banned_start": np.zeros(rows + 1, np.int64),
        "banned_ids": np.zeros(0, np.int64),
    }
    return StepPlan(**(columns | (sampling or {})))


ARCHITECTURES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "longrope"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_recording_reads_and_sends_nothing(
    name: str, architecture: Any, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only kernels and ops on the device run between begin and end of a recording."""
    watches = []

    def recorder(device: torch.device) -> Any:
        def record(work: Callable[[], None]) -> Callable[[], None]:
            # As on a GPU: once to compile, load and fill caches, then the recording itself.
            work()
            watches.append(Watch())
            with watches[-1]:
                work()
            return work

        return record

    monkeypatch.setattr(graphs, "recorder", recorder)
    runner = build(architecture(name))
    runner.record_graphs((2, 4), 32)
    assert len(watches) == 4
    for watch in watches:
        assert (watch.faults, watch.to_device, watch.to_host) == ([], 0, 0)
    used = ("rotate_write_kernel", "attend_kernel", "expand_kernel", "add_rms_norm_kernel", "gated_kernel")
    assert min(launches[kernel] for kernel in used) > 0
    assert launches["split_kernel"] > 0


@pytest.mark.parametrize("adapters", [False, True])
def test_a_replayed_step_is_a_few_copies(adapters: bool, architecture: Any, launches: Counter[str]) -> None:
    """Ids and positions, the attention's tables, the adapters': one each; and the tokens in one back."""
    runner = build(architecture("Llama"))
    runner.record_graphs((4,), 32)
    with Watch() as watch:
        pending = runner.launch(plan([1, 1, 1], adapters=adapters))
    assert watch.faults == []
    assert (watch.to_device, watch.to_host) == (2 + adapters, 1)
    assert pending is not None
    fed = {"fed_row": np.array([2, 0]), "fed_from": np.array([1, 1])}
    with Watch() as again:
        runner.launch(plan([1, 1, 1], adapters=adapters, sampling=fed))
    assert again.faults == []
    assert again.to_device == 2, "adapters that stay are not sent again"


@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 5, 1]])
def test_a_step_without_adapters_launches_none_of_their_kernels(
    queries: list[int], architecture: Any, launches: Counter[str]
) -> None:
    """Replayed (a decode step) and kernel by kernel (one with prefill); steps with adapters launch both."""
    runner = build(architecture("Llama"))
    runner.record_graphs((4,), 32)
    for adapters in (True, False):
        launches.clear()
        with Watch():
            runner.launch(plan(queries, adapters=adapters))
        assert launches["attend_kernel"] > 0
        found = {name for name in launches if "shrink" in name or "expand" in name}
        assert len(found) == (2 if adapters else 0), found


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_with_prefill_waits_for_nothing(
    adapters: bool, architecture: Any, launches: Counter[str]
) -> None:
    runner = build(architecture("Llama"))
    with Watch():
        runner.launch(plan([1, 5, 1], adapters=adapters))
    fed = {"fed_row": np.array([0]), "fed_from": np.array([2])}
    with Watch() as watch:
        runner.launch(plan([1, 7, 3], adapters=adapters, sampling=fed))
    assert watch.faults == []
    assert (watch.to_device, watch.to_host) == (2 + adapters, 1)


SAMPLINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (0, {}),
    "drawn": (1, {"temperature": np.full(3, 0.7), "top_p": np.full(3, 0.9)}),
    "mixed": (1, {"temperature": np.array([0.0, 1.0, 0.0]), "top_k": np.array([0, 5, 0])}),
    "masked": (1, {"masked_row": np.array([1]), "mask_words": np.full(4, -1)}),
    "logprobs": (0, {"num_logprobs": np.array([-1, 0, 5])}),
    "everything": (
        1,
        {
            "temperature": np.array([0.0, 1.0, 0.5]),
            "num_logprobs": np.array([2, -1, 5]),
            "banned_start": np.array([0, 2, 2, 3]),
            "banned_ids": np.array([7, 9, 7]),
            "masked_row": np.arange(3),
            "mask_words": np.full(12, 1 << 40),
        },
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampling_is_one_copy_each_way(name: str) -> None:
    sent, columns = SAMPLINGS[name]
    with Watch() as watch:
        sampler.launch(
            torch.empty(3, 50, dtype=torch.bfloat16, device=META),
            plan([1, 1, 1], adapters=False, sampling=columns),
        )
    assert watch.faults == []
    assert (watch.to_device, watch.to_host) == (sent, 1)


SCORES = {"score_row": np.array([1, 2]), "score_id": np.array([7, 9]), "score_top": np.array([0, 3])}


def test_scoring_is_one_copy_each_way() -> None:
    many = {name: np.tile(column, 20) for name, column in SCORES.items()}
    with Watch() as watch:
        scoring.launch(
            torch.empty(40, 50, dtype=torch.bfloat16, device=META),
            plan([1, 45], adapters=False, sampling=many),
        )
    assert watch.faults == []
    assert (watch.to_device, watch.to_host) == (1, 1)


@pytest.mark.parametrize("queries", [[1, 5, 1], [1, 1, 1]])
def test_a_step_with_scores_waits_for_nothing_and_is_not_replayed(
    queries: list[int], architecture: Any, launches: Counter[str]
) -> None:
    runner = build(architecture("Llama"))
    runner.record_graphs((4,), 32)
    launches.clear()
    with Watch() as watch:
        runner.launch(plan(queries, adapters=True, sampling=SCORES))
    assert watch.faults == []
    assert (watch.to_device, watch.to_host) == (4, 2)
    assert launches["attend_kernel"] > 0


class Work(TorchDispatchMode):
    """Counts the ops that a device would run a kernel for: not views, and not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        allocation = name.startswith(("empty", "new_empty"))
        if not (func.is_view or allocation or name in ("_unsafe_view", "detach")):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "own", "fused"),
    [("Llama", 32, 9), ("Qwen3", 44, 11), ("Gemma2", 52, 9), ("Phi3", 36, 9)],
)
def test_launches_of_a_layer_in_a_decode_step(
    name: str, own: int, fused: int, architecture: Any, launches: Counter[str]
) -> None:
    """Of the model's own code and fused: what a second layer adds to a step without adapters."""
    counted = {}
    for form in (False, True):
        totals = []
        for layers in (1, 2):
            config = architecture(name)
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = ["full_attention"] * layers
            runner = build(config, fused=form)
            # Once for what is made on first use and kept.
            runner.logits(plan([1, 1, 1], adapters=False))
            launches.clear()
            with Work() as work:
                runner.logits(plan([1, 1, 1], adapters=False))
            totals.append(work.ops.total() + launches.total())
        counted[form] = totals[1] - totals[0]
    assert (counted[False], counted[True]) == (own, fused)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_fused_steps_take_no_more_than_was_planned(
    name: str, architecture: Any, launches: Counter[str]
) -> None:
    config = architecture(name)
    planned = workspace.step_bytes(
        EmptyModel.of(config, WeightFormat("nf4", torch.bfloat16, META)), workspace.StepSize(42, 3, 42, 16)
    )
    taken = []
    for fused in (False, True):
        runner = build(config, fused=fused)
        with LiveBytes() as bytes_:
            runner.logits(plan([14, 14, 14], adapters=False))
        taken.append(bytes_.peak)
    assert taken[1] <= taken[0] <= planned


def test_the_watch_sees_what_it_is_to_see(launches: Counter[str]) -> None:
    device = torch.empty(4, 3, device=META)
    with Watch() as watch:
        device.add_(torch.zeros(3).to(META))
        assert watch.to_device == 1
        device * torch.tensor(2.0)
        assert watch.faults == []
        with pytest.raises(RuntimeError):
            device.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            device[device > 0]
        assert watch.faults == ["_local_scalar_dense", "index by a mask"]
    from loraplex_kernels.attention import launch

    with pytest.raises(AssertionError):
        launch.attend_kernel[(1,)](device, torch.zeros(3))
