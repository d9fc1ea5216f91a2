"""Fused kernels between the projections replace code that is recognised by its results, and are exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loraplex_bench.models.random_weights import RandomWeights, config_of
from loraplex_kernels import dispatch
from loraplex_server.config import ModelConfig
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.layers import effects, fusion, recognise
from loraplex_server.model.layers.context import StepContext
from loraplex_server.model.layers.fusion import Fused, fuse
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load import architecture, loader
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.run import selfcheck

RUNS_HERE = dispatch.triton_installed() and (dispatch.interpreting() or torch.cuda.is_available())
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def empty(name: str, **options: Any) -> Any:
    """A model of transformers without values."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**COMMON, **options)
    return architecture.build_empty(config, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama", {}, Fused(5, 2, 2, 2)),
        ("Mistral", {}, Fused(5, 2, 2, 2)),
        ("Qwen2", {}, Fused(5, 2, 2, 2)),
        ("Qwen3", {"head_dim": 8}, Fused(9, 2, 2, 2)),
        ("Gemma2", {"head_dim": 8}, Fused(9, 2, 2, 2)),
        ("Gemma3Text", {"head_dim": 8}, Fused(13, 2, 2, 2)),
        ("Phi3", {"partial_rotary_factor": 0.5}, Fused(5, 2, 2, 2)),
        # Norms come after attention and MLP, and nothing is added before one.
        ("Olmo2", {}, Fused(9, 2, 2, 0)),
        # Its sums have a factor where its configuration says so.
        ("Granite", {}, Fused(5, 2, 2, 2)),
        ("Granite", {"residual_multiplier": 0.5}, Fused(5, 2, 2, 0)),
        # Pairs of neighbours are rotated, not halves.
        ("Glm", {"head_dim": 8}, Fused(5, 0, 2, 2)),
        # Layer norms, blocks in parallel, no gate.
        ("GPTNeoX", {}, Fused(0, 2, 0, 0)),
    ],
)
def test_what_is_recognised(name: str, options: dict[str, Any], expected: Fused) -> None:
    assert fuse(empty(name, **options)) == expected


def test_what_differs_in_one_rounding_or_one_term_is_not_recognised() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    class LateRounding(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.double()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * wide).to(x.dtype)

    class Swapped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Tuple(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            return (super().forward(hidden_states, **options),)

    class Deaf(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            options.pop("position_ids", None)
            return super().forward(hidden_states, **options)

    model = empty("Llama").model
    config, layer = model.config, model.layers[0]
    assert recognise.norm(LlamaRMSNorm(32)) is not None
    assert recognise.norm(LateRounding(32)) is None
    assert recognise.norm(nn.LayerNorm(32)) is None
    assert recognise.mlp(layer.mlp) is not None
    assert recognise.mlp(Swapped(config)) is None
    assert recognise.block(layer) is not None
    assert recognise.block(Tuple(config, 0)) is None
    assert recognise.block(Deaf(config, 0)) is None
    assert recognise.attention(layer.self_attn) is not None
    assert recognise.attention(layer.mlp) is None


def test_an_attention_that_changes_what_was_rotated_is_not_recognised() -> None:
    layer = empty("Llama").model.layers[0].self_attn
    source = "def forward(self, hidden_states, position_embeddings, **options):\n"
    source += "    q = self.q_proj(hidden_states).view(1, 2, 4, -1).transpose(1, 2)\n"
    source += "    k = self.k_proj(hidden_states).view(1, 2, 2, -1).transpose(1, 2)\n"
    source += "    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)\n"
    source += "    attend = ALL_ATTENTION_FUNCTIONS.get_interface('', None)\n"
    source += "    return self.o_proj(attend(self, {}, k, k, None)[0].reshape(1, 2, -1)), None\n"
    for query, found in (("q", True), ("2 * q", False)):
        names = dict(vars(__import__(type(layer).__module__, fromlist=["x"])))
        exec(source.format(query), names)
        changed = type("Changed", (type(layer),), {"forward": names["forward"]})
        module = changed(layer.config, 0)
        assert (recognise.attention(module) is not None) == found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Llama", "float32"),
        ("Llama", "bfloat16"),
        ("Qwen2", "bfloat16"),
        ("Qwen3", "bfloat16"),
        ("Gemma2", "float32"),
        ("Gemma2", "bfloat16"),
        ("Gemma3Text", "bfloat16"),
        ("Phi3", "bfloat16"),
    ],
)
def test_fused_bits_are_the_models_own(tiny: Callable[[str], Any], name: str, dtype: str) -> None:
    """With the references of the kernels, op for op and rounding for rounding."""
    config = ModelConfig(str(tiny(name).base), quantization="none", dtype=dtype, device="cpu", threads=1)
    prompts = [np.arange(3, 17), np.arange(40, 45)]
    with dispatch.using("torch"), torch.inference_mode():
        base = loader.load(config, progress=False)
        own = selfcheck._ragged(base, prompts, {})
        assert fuse(base.model).layers == 2
        dispatch.launches.clear()
        fused = selfcheck._ragged(base, prompts, {})
        assert dispatch.launches["norm.add_rms.torch"] == 4
        assert dispatch.launches["rotary.write.torch"] == dispatch.launches["gated.torch"] == 2
        heads = 4 if name in ("Qwen3", "Gemma3Text") else 0
        # The first norm of all, and those of single heads; every other one came with a sum.
        assert dispatch.launches["norm.rms.torch"] == 1 + heads
        assert torch.equal(own, fused)
        selfcheck.check_ragged(base)


@pytest.mark.parametrize(("dtype", "rotations"), [(torch.float32, 2), (torch.bfloat16, 0)])
def test_angles_of_another_dtype_are_left_to_the_model(dtype: torch.dtype, rotations: int) -> None:
    """OLMo-2 has them in float32."""
    from transformers import Olmo2Config

    config = Olmo2Config(**COMMON)
    cpu = torch.device("cpu")
    with dispatch.using("torch"), torch.inference_mode():
        empty = EmptyModel.of(config, WeightFormat("none", dtype, cpu))
        base = empty.fill(RandomWeights(config, dtype, cpu), progress=False)
        prompts = [np.arange(3, 12)]
        own = selfcheck._ragged(base, prompts, {})
        assert fuse(base.model) == Fused(9, 2, 2, 0)
        dispatch.launches.clear()
        assert torch.equal(selfcheck._ragged(base, prompts, {}), own)
        assert dispatch.launches["rotary.write.torch"] == rotations


@pytest.mark.parametrize(
    ("kernels", "wanted", "found"), [("triton", True, True), ("triton", False, False), ("torch", True, False)]
)
def test_models_are_fused_where_tritons_kernels_run(
    kernels: dispatch.Kernels, wanted: bool, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config, cpu = config_of("tiny"), torch.device("cpu")
    with dispatch.using(kernels):
        empty = EmptyModel.of(config, WeightFormat("none", torch.float32, cpu))
        base = empty.fill(RandomWeights(config, torch.float32, cpu), progress=False, fused=wanted)
    layer = base.model.get_submodule("model.layers.1")
    for module in (layer, layer.get_submodule("mlp"), layer.get_submodule("self_attn")):
        assert ("forward" in vars(module)) == found


def test_a_fused_kernel_that_does_something_else_is_found_at_start(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(
        str(tiny("Llama").base), quantization="none", dtype="float32", device="cpu", threads=1
    )
    monkeypatch.setattr(fusion, "gated", lambda gate, up, activation: 1.1 * gate * up.sigmoid())
    with dispatch.using("torch"):
        base = loader.load(config, progress=False)
        selfcheck.check_ragged(base)
        fuse(base.model)
        with pytest.raises(FailedPreconditionError, match="get other logits than alone"):
            selfcheck.check_ragged(base)


def test_what_acts_between_projections_keeps_the_models_own_code() -> None:
    pool: Any = object()
    pairs, own = effects.LowRankAdd(pool, pool), effects.OwnWeights(pool, pool)
    bottlenecks = effects.Bottlenecks(pool, pool, None)
    assert not effects.acts_between((), ())
    assert not effects.acts_between((own, pairs), ())
    assert effects.acts_between((pairs,), (own,))
    assert effects.acts_between((pairs, bottlenecks), ())


@pytest.mark.kernels_wide
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "slow or not slow", "TestKernels")


class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(
        ("name", "options", "dtype"),
        [
            ("Gemma2", {"head_dim": 16}, torch.float16),
            ("Qwen3", {"head_dim": 16}, torch.float32),
            ("Phi3", {"partial_rotary_factor": 0.5}, torch.float16),
        ],
    )
    def test_a_whole_model_is_what_its_own_code_makes_it(
        self, name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import transformers

        config = getattr(transformers, f"{name}Config")(**COMMON, **options, bos_token_id=1, eos_token_id=2)
        prompts = [np.arange(3), np.arange(20, 22)]
        device = torch.device("cpu" if dispatch.interpreting() else "cuda")
        with dispatch.using("triton"), torch.inference_mode():
            empty = EmptyModel.of(config, WeightFormat("none", dtype, device))
            base = empty.fill(RandomWeights(config, dtype, device), progress=False)
            dispatch.launches.clear()
            fused = selfcheck._ragged(base, prompts, {})
            counted = dict(dispatch.launches)
            monkeypatch.setattr(selfcheck, "StepContext", functools.partial(StepContext, unfused=True))
            own = selfcheck._ragged(base, prompts, {})
        norms = 5 if name == "Qwen3" else 1
        assert counted == {
            "norm.rms.triton": norms, "norm.add_rms.triton": 4, "rotary.write.triton": 2,
            "attention.triton": 2, "gated.triton": 2,
        }  # fmt: skip
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (fused - own).abs().max() <= tolerance * own.abs().max()
        assert own.std() > 1e-3
