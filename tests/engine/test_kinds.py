"""Level (i) for every kind of adapter: token for token as transformers + PEFT, in every way of being served.

Each cell of kind x column is a case of its own, and the end of the run prints them as a matrix. A kind is
an entry in `KINDS`, a column one in `COLUMNS`. PEFT keeps one method a model, so each kind has an oracle of
its own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.model.layers import fusion

MAX_TOKENS = 10
EXACT_IN_8_BITS = (
    None,
    "ia3",
    "ia3_outputs",
    "prompt",
    "p_tuning",
    "prefix",
    "projected",
    "cartridge",
    "houlsby",
    "pfeiffer",
    "parallel",
)
BLOCK = 4
INVOCATION = (7, 9)
LENGTHS = (4, 29)
ARCHITECTURES = [
    "Llama",
    # Qwen2 has biases, which DoRA must not scale and IA3 must; Phi-3 has fused projections.
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Phi3", "Gemma2")),
]

Configure = Callable[[Any, list[str], list[str]], Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the matrix.

    Attributes:
        label: what the matrix calls it.
        adapters: PEFT's configuration of each adapter that a request of this kind names, made from the module
            `peft` and the names of the attention's and the MLP's projections.
        weights: of the adapters, in their order.
        added_tokens: that each adapter adds to the vocabulary.
        bottleneck: the one adapter's settings as AdapterHub has them, where it is none of PEFT's.
    """

    label: str
    adapters: dict[str, Configure]
    weights: tuple[float, ...] = (1.0,)
    added_tokens: int = 0
    bottleneck: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def uses(self) -> list[tuple[str, float]]:
        return list(zip(self.adapters, self.weights, strict=True))


def _lora(**options: Any) -> Configure:
    return lambda peft, attention, mlp: peft.LoraConfig(target_modules=attention + mlp, **options)


def _bottleneck(label: str, name: str, **settings: Any) -> Kind:
    return Kind(label, {name: lambda peft, attention, mlp: None}, bottleneck=settings)


KINDS = {
    "plain": Kind("LoRA", {"plain": _lora(r=8, lora_alpha=24)}),
    "bias": Kind(
        "LoRA with bias",
        {
            "bias": lambda peft, attention, mlp: peft.LoraConfig(
                r=5, lora_alpha=10, lora_bias=True, target_modules=[attention[0], mlp[0]]
            )
        },
    ),
    "dora": Kind("DoRA", {"dora": _lora(r=6, lora_alpha=12, use_dora=True)}),
    "dora_rs": Kind(
        "DoRA, rsLoRA",
        {
            "dora_rs": lambda peft, attention, mlp: peft.LoraConfig(
                r=9, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=[attention[0], mlp[-1]]
            )
        },
    ),
    "ia3": Kind(
        "IA3",
        {
            "ia3": lambda peft, attention, mlp: peft.IA3Config(
                target_modules=[*(attention[1:3] if len(attention) > 2 else attention[:1]), "down_proj"],
                feedforward_modules=["down_proj"],
            )
        },
    ),
    "ia3_outputs": Kind(
        "IA3, outputs only",
        {
            "ia3_outputs": lambda peft, attention, mlp: peft.IA3Config(
                target_modules=attention + mlp, feedforward_modules=[]
            )
        },
    ),
    "prompt": Kind(
        "prompt tuning",
        {
            "prompt": lambda peft, attention, mlp: peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=11
            )
        },
    ),
    "p_tuning": Kind(
        "P-tuning",
        {
            "p_tuning": lambda peft, attention, mlp: peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=48
            )
        },
    ),
    "prefix": Kind(
        "prefix tuning",
        {
            "prefix": lambda peft, attention, mlp: peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=9
            )
        },
    ),
    "projected": Kind(
        "prefix tuning, projected",
        {
            "projected": lambda peft, attention, mlp: peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=24
            )
        },
    ),
    "cartridge": Kind(
        "cartridge",
        {
            "cartridge": lambda peft, attention, mlp: peft.CartridgeConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2
            )
        },
    ),
    "houlsby": _bottleneck(
        "bottleneck, Houlsby",
        "houlsby",
        mh_adapter=True,
        output_adapter=True,
        non_linearity="swish",
        reduction_factor={"0": 4, "default": 7},
        scaling="learned",
    ),
    "pfeiffer": _bottleneck(
        "bottleneck, Pfeiffer",
        "pfeiffer",
        output_adapter=True,
        original_ln_before=True,
        reduction_factor=8,
        leave_out=[0],
    ),
    "parallel": _bottleneck(
        "bottleneck, parallel",
        "parallel",
        mh_adapter=True,
        output_adapter=True,
        non_linearity="gelu",
        is_parallel=True,
        reduction_factor=2,
        scaling="channel",
    ),
    "activated": Kind(
        "aLoRA",
        {
            "activated": _lora(
                task_type="CAUSAL_LM", r=8, lora_alpha=32, alora_invocation_tokens=list(INVOCATION)
            )
        },
    ),
    "ends": Kind(
        "LoRA, embedding and head",
        {
            "ends": lambda peft, attention, mlp: peft.LoraConfig(
                r=5, lora_alpha=9, target_modules=["embed_tokens", "lm_head", attention[0]]
            )
        },
    ),
    "copies": Kind(
        "modules_to_save",
        {
            "copies": lambda peft, attention, mlp: peft.LoraConfig(
                r=4, target_modules=attention, modules_to_save=["embed_tokens", "lm_head", "norm", mlp[-1]]
            )
        },
    ),
    "rows": Kind(
        "trainable tokens",
        {"rows": _lora(r=4, lora_alpha=8, trainable_token_indices=[*INVOCATION, 60, 100, 150])},
    ),
    "added": Kind(
        "added tokens",
        {
            "added": lambda peft, attention, mlp: peft.LoraConfig(
                r=4, target_modules=mlp, modules_to_save=["embed_tokens", "lm_head"]
            )
        },
        added_tokens=3,
    ),
    "sum": Kind(
        "composition of two",
        {"sum_one": _lora(r=7, lora_alpha=14), "sum_two": _lora(r=4, lora_alpha=12, use_rslora=True)},
        weights=(0.8, -0.6),
    ),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A way of being served.

    Attributes:
        together: requests of all kinds and of the base are one batch; else each has the engine to itself.
        repeated: all are asked twice, after the base alone, and find their prompts cached the second time.
        preempted: the KV cache is too small for those that run.
        fused: what lies between the projections is fused, by the references of the kernels.
        drafted: tokens are drafted, many of them right.
    """

    quantization: str = "none"
    together: bool = True
    repeated: bool = False
    preempted: bool = False
    fused: bool = False
    drafted: bool = False
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: dict[str, Any] = dataclasses.field(default_factory=dict)


# Prompts in pieces, six requests at most, and adapters that come and go.
_TIGHT: dict[str, Any] = {
    "scheduler": {"max_batch_tokens": 16, "max_num_requests": 6},
    "adapters": {"max_on_device": 4},
}
COLUMNS = {
    "alone": Column(together=False),
    "fused": Column(together=False, fused=True),
    "mixed batch": Column(),
    "nf4": Column("nf4", **_TIGHT),
    "int4": Column("int4", **_TIGHT),
    "chunked prefill": Column(**_TIGHT),
    "preemption": Column(preempted=True, scheduler={"max_num_requests": 6, "kv_cache_bytes": 24 * 2048}),
    "speculation": Column(
        drafted=True,
        scheduler={"max_batch_tokens": 24, "max_num_requests": 6, "speculation_max_load": 1.0},
        adapters=_TIGHT["adapters"],
    ),
    "prefix cache": Column(
        repeated=True,
        # Room for the prompts of all kinds.
        scheduler={**_TIGHT["scheduler"], "kv_cache_bytes": 1024 * 2048},
        adapters=_TIGHT["adapters"],
    ),
}

Prompts = dict[int, tuple[int, ...]]
Truth = dict[tuple[str | None, int], tuple[list[int], torch.Tensor]]


def _randomise(name: str, parameter: torch.Tensor, noise: torch.Tensor) -> None:
    """Values under which every part of an adapter matters: PEFT begins with some that do nothing."""
    if "lora_A" in name:
        parameter.data.copy_(noise * parameter.shape[1] ** -0.5)
    elif "lora_B" in name:
        parameter.data.copy_(noise * 0.1)
    elif "lora_embedding" in name:
        parameter.data.copy_(noise * (1.0 if "_A" in name else 0.1))
    elif "trainable_tokens" in name or "modules_to_save" in name:
        parameter.data.add_(noise * (0.3 if parameter.ndim == 1 else 0.5 * parameter.data.std()))
    elif "lora_magnitude_vector" in name:
        parameter.data.mul_(1 + 0.3 * noise)
    elif "ia3_l" in name:
        parameter.data.copy_(1 + 0.5 * noise)
    elif "prompt_encoder" in name:
        parameter.data.copy_(noise * (3.0 if "embedding" in name else 0.5))


def _save(architecture: str, base: Path, kind: Kind, folder: Path, generator: torch.Generator) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    fused = architecture == "Phi3"
    attention = ["qkv_proj", "o_proj"] if fused else ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
    for name, configure in kind.adapters.items():
        frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if kind.added_tokens:
            frozen.resize_token_embeddings(frozen.config.vocab_size + kind.added_tokens, mean_resizing=False)
        model = peft.get_peft_model(frozen, configure(peft, attention, mlp))
        for path, parameter in model.named_parameters():
            _randomise(path, parameter, torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def saved(
    tiny: Any, bottlenecks: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """Adapters of each kind, made by PEFT with random values; the folder that holds each kind's folders."""
    made: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture not in made:
            made[architecture] = {}
            for index, (name, kind) in enumerate(KINDS.items()):
                folder = tmp_path_factory.mktemp(f"{architecture}-{name}")
                base = tiny(architecture).base
                if kind.bottleneck:
                    bottlenecks[0](base, folder / name, kind.bottleneck, seed=index)
                else:
                    generator = torch.Generator().manual_seed(5 + index)
                    _save(architecture, base, kind, folder, generator)
                made[architecture][name] = folder
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """A short and a long prompt, by length."""
    random_ = random.Random(8)
    found: Prompts = {}
    for length in LENGTHS:
        drawn = [random_.randrange(10, 211) for _ in range(length)]
        # Two invocations in the long prompt, the last of which counts; one at the end of the short.
        for at in (length - 2, 3) if length > 4 else (length - 2,):
            drawn[at : at + 2] = INVOCATION
        found[length] = tuple(drawn)
    return found


@pytest.fixture(scope="module")
def truth(
    tiny: Any, saved: Any, judge: Any, bottlenecks: Any, prompts: Prompts
) -> Callable[[str, str], Truth]:
    """The answers of transformers + PEFT, checked to differ between kinds."""
    made: dict[tuple[str, str], Truth] = {}

    def make(architecture: str, quantization: str) -> Truth:
        answers: Truth = made.setdefault((architecture, quantization), {})
        if answers:
            return answers
        for name in (*KINDS, None):
            base, folders = tiny(architecture).base, saved(architecture)
            if name and KINDS[name].bottleneck:
                oracle = bottlenecks[1](base, folders["plain"], quantization, folders[name] / name)
            else:
                added = KINDS[name].added_tokens if name else 0
                oracle = judge(base, folders[name or "plain"], quantization, added)
            for length, prompt in prompts.items():
                answers[name, length] = oracle.generate(prompt, KINDS[name].uses if name else [], MAX_TOKENS)
        for length in LENGTHS:
            for one, other in combinations((*KINDS, None), 2):
                found, same = answers[one, length][0], answers[other, length][0]
                assert found != same, f"{one} and {other} answer alike"
        return answers

    return make


@pytest.fixture(scope="module")
def column(
    tiny: Any, saved: Any, truth: Any, prompts: Prompts, module_harness: Any, draft_from: Any
) -> Callable[[str, str], list[dict[tuple[str | None, int], Any]]]:
    """The answers of a column's engine, asked once for all kinds; twice where the column says so."""

    def serve(architecture: str, column: Column) -> Any:
        served = _serve(tiny(architecture), saved(architecture), column, module_harness)
        if column.drafted:
            expected = truth(architecture, column.quantization)
            by_name = {_name(0, *which): tokens for which, (tokens, _) in expected.items()}
            draft_from(served, by_name.__getitem__)
        return served

    made: dict[tuple[str, str], list[dict[tuple[str | None, int], Any]]] = {}

    def ask(architecture: str, name: str) -> list[dict[tuple[str | None, int], Any]]:
        key = architecture, name
        if key not in made:
            made[key] = _ask(serve(architecture, COLUMNS[name]), COLUMNS[name], prompts)
        return made[key]

    return ask


def _name(turn: int, kind: str | None, length: int) -> str:
    return f"{turn}-{kind}-{length}"


def _serve(model: Any, folders: dict[str, Path], column: Column, harness: Any) -> Any:
    served = harness(
        model,
        column.quantization,
        scheduler={
            "kv_block_size": BLOCK,
            "prefix_cache": column.repeated,
            # Room for what every kind leaves in the cache.
            "kv_cache_bytes": 4 << 20,
            **column.scheduler,
        },
        adapters={"folders": tuple(folders.values()), **column.adapters},
    )
    if column.fused:
        assert fusion.fuse(served.engine._runner._base.model).layers == 2
    return served


def _ask(served: Any, column: Column, prompts: Prompts) -> list[dict[tuple[str | None, int], Any]]:
    wanted = [(kind, length) for length in LENGTHS for kind in (*KINDS, None)]
    random.Random(8).shuffle(wanted)
    options = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 0}
    if column.drafted:
        options["speculative_tokens"] = 4
    if column.repeated:
        for length, prompt in prompts.items():
            served.submit(f"first-{length}", prompt, **options)
        served.run()
    passes = []
    for turn in range(1 + column.repeated):
        answers = {}
        for kind, length in wanted:
            uses = KINDS[kind].uses if kind else []
            answers[kind, length] = served.submit(_name(turn, kind, length), prompts[length], uses, **options)
            if not column.together:
                served.run()
        served.run()
        passes.append(answers)
    steps = served.engine.stats().steps
    assert bool(sum(step.preemptions for step in steps)) == column.preempted
    accepted = sum(step.accepted_tokens for step in steps)
    assert bool(accepted) == column.drafted
    assert sum(step.drafted_tokens for step in steps) >= accepted
    return passes


def _logit_error(answer: Any, logits: torch.Tensor) -> float:
    """Largest |Δ log-probability| of the chosen tokens, as a share of the largest logit."""
    exact = logits.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
    found = torch.tensor([step.logprob for step in answer.logprobs])
    return float((exact - found).abs().max() / logits.abs().max())


# Where a layer has two norms, and where it has four.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["Llama", pytest.param("Gemma2", marks=pytest.mark.slow)])
def test_every_kind_equals_peft_where_steps_are_fused(
    architecture: str, kind: str, truth: Any, column: Any, parity_cell: Any
) -> None:
    test_every_kind_equals_peft(architecture, kind, "fused", truth, column, parity_cell)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "fused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_equals_peft(
    architecture: str, kind: str, name: str, truth: Any, column: Any, parity_cell: Any
) -> None:
    cell = parity_cell(architecture, KINDS[kind].label, name)
    expected = truth(architecture, COLUMNS[name].quantization)
    passes = column(architecture, name)
    for answers in passes:
        for length in LENGTHS:
            answer, (tokens, logits) = answers[kind, length], expected[kind, length]
            assert answer.error is None, answer.error
            assert answer.tokens == tokens
            cell.error(_logit_error(answer, logits))
    assert cell.worst <= 1e-4
    if COLUMNS[name].repeated:
        first, again = (answers[kind, LENGTHS[-1]].times.cached_prompt_tokens for answers in passes)
        whole = (LENGTHS[-1] - 1) // BLOCK * BLOCK
        # The base was asked before, and an activated LoRA is the base until it is invoked.
        assert first == (whole - BLOCK if kind == "activated" else 0)
        assert again >= whole - BLOCK


@pytest.fixture(scope="module")
def in_bf16(
    tiny: Any, saved: Any, module_harness: Any
) -> tuple[list[tuple[int, ...]], dict[tuple[str, int], torch.Tensor]]:
    """Prompts, and the log-probabilities [vocabulary] after each, by kind: one mixed batch in bf16 on nf4."""
    folders = saved("Llama")
    random_ = random.Random(12)
    drawn = [tuple(random_.randrange(10, 211) for _ in range(12)) + INVOCATION for _ in range(16)]
    served = module_harness(
        tiny("Llama"),
        "nf4",
        model={"dtype": "bfloat16"},
        scheduler={"kv_block_size": BLOCK, "kv_cache_bytes": 8 << 20, "max_batch_tokens": 256},
        adapters={"folders": tuple(folders.values())},
    )
    answers = {
        (name, index): served.submit(f"{name}-{index}", prompt, kind.uses, max_tokens=1, logprobs=1 << 20)
        for name, kind in KINDS.items()
        for index, prompt in enumerate(drawn)
    }
    served.run()
    found = {}
    for key, answer in answers.items():
        assert answer.error is None, answer.error
        ((step,),) = (answer.logprobs,)
        found[key] = torch.tensor([top.logprob for top in sorted(step.top, key=lambda top: top.token_id)])
    return drawn, found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_near_in_bf16_as_peft(
    kind: str, tiny: Any, saved: Any, judge: Any, bottlenecks: Any, in_bf16: Any
) -> None:
    """Level (ii): the error against fp32 is at most 1.5 times that of transformers + PEFT in bf16."""
    drawn, found = in_bf16
    base, folders = tiny("Llama").base, saved("Llama")

    def peer_in(dtype: str) -> Any:
        if KINDS[kind].bottleneck:
            return bottlenecks[1](base, folders["plain"], "nf4", folders[kind] / kind, dtype)
        return judge(base, folders[kind], "nf4", KINDS[kind].added_tokens, dtype)

    exact, peer = peer_in("float32"), peer_in("bfloat16")
    ours, theirs = [], []
    for index, prompt in enumerate(drawn):
        truth, other = (
            oracle.generate(prompt, KINDS[kind].uses, 1)[1][0].float().log_softmax(-1)
            for oracle in (exact, peer)
        )
        # Beyond the vocabulary are the tokens that adapters of this kind, or of others, added.
        ours.append(found[kind, index][: len(truth)] - truth)
        theirs.append(other - truth)
    error, peers = (float(torch.cat(parts).double().square().mean().sqrt()) for parts in (ours, theirs))
    print(f"\nlevel (ii) {KINDS[kind].label}: {error / peers:.2f} of the error of PEFT in bf16, {peers:.1e}")
    assert error <= 1.5 * peers


@pytest.mark.parametrize("name", COLUMNS)
def test_the_base_among_them_equals_transformers(
    name: str, truth: Any, column: Any, parity_cell: Any
) -> None:
    cell = parity_cell("Llama", "(base)", name)
    expected = truth("Llama", COLUMNS[name].quantization)
    for answers in column("Llama", name):
        for length in LENGTHS:
            answer, (tokens, logits) = answers[None, length], expected[None, length]
            assert answer.tokens == tokens
            cell.error(_logit_error(answer, logits))
    assert cell.worst <= 1e-4


def test_an_adapter_that_is_not_invoked_does_nothing(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(tiny("Llama"), "none", adapters={"folders": (saved("Llama")["activated"],)})
    prompts = {"without": (50, 60, 9, 7, 70), "with": (50, 60, 7, 9, 70)}
    answers = {
        (name, bool(uses)): served.submit(f"{name}{uses}", prompt, uses, max_tokens=8, ignore_eos=True)
        for name, prompt in prompts.items()
        for uses in ((), (("activated", 1.0),))
    }
    served.run()
    assert answers["without", True].tokens == answers["without", False].tokens
    assert answers["with", True].tokens != answers["with", False].tokens


def test_a_soft_prompt_counts_towards_the_longest_sequence(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(
        tiny("Llama"),
        "none",
        scheduler={"max_model_len": 20},
        adapters={"folders": (saved("Llama")["prompt"],)},
    )
    fits = served.submit("fits", (5,) * 8, [("prompt", 1.0)], max_tokens=8, ignore_eos=True)
    long = served.submit("long", (5,) * 9, [("prompt", 1.0)], max_tokens=8, ignore_eos=True)
    negative = served.submit("negative", (5, -1), [("prompt", 1.0)], max_tokens=8)
    served.run()
    assert (len(fits.tokens), fits.finish) == (1, "length")
    assert "20 tokens with the adapter's soft prompt" in long.error.message
    assert "outside the vocabulary" in negative.error.message
    assert served.engine.adapters.requests.references() == 0


def test_a_pairs_bias_is_weighted_in_a_composition(tiny: Any, harness: Any, saved: Any, judge: Any) -> None:
    folders, model = saved("Llama"), tiny("Llama")
    adapters, prompt = [("bias", 0.5), ("plain", -0.75)], (5, 17, 100, 42)
    oracle = judge(model.base, folders["bias"], "none")
    plain = judge(model.base, folders["plain"], "none")
    layers = dict(oracle._model.named_modules())
    with torch.inference_mode():
        for layer in list(layers.values()):
            if hasattr(layer, "lora_A"):
                bias = layer.lora_B["bias"].bias * layer.scaling["bias"]
                layer.base_layer.weight.data = layer.base_layer.weight + 0.5 * layer.get_delta_weight("bias")
                layer.base_layer.bias = torch.nn.Parameter(0.5 * bias)
        for path, layer in plain._model.named_modules():
            if hasattr(layer, "lora_A"):
                target = layers[path]
                target = getattr(target, "base_layer", target)
                target.weight.data = target.weight - 0.75 * layer.get_delta_weight("plain")
        with oracle._model.disable_adapter():
            expected, _ = oracle._generate(prompt, MAX_TOKENS)
    served = harness(model, "none", adapters={"folders": tuple(folders.values())})
    answer = served.submit("a", prompt, adapters, max_tokens=MAX_TOKENS, ignore_eos=True)
    alone = served.submit("b", prompt, [("plain", -0.75)], max_tokens=MAX_TOKENS, ignore_eos=True)
    served.run()
    assert answer.tokens == expected
    assert alone.tokens != expected


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt", "prefix", "houlsby"])
@pytest.mark.parametrize("uses", [[(None, 0.5)], [(None, 1.0), ("plain", 1.0)]])
def test_what_scales_the_base_stands_alone_at_weight_1(
    kind: str, uses: list[tuple[str | None, float]], tiny: Any, harness: Any, saved: Any
) -> None:
    folders = saved("Llama")
    served = harness(tiny("Llama"), "none", adapters={"folders": tuple(folders.values())})
    named = [(name or kind, weight) for name, weight in uses]
    answer = served.submit("a", (5, 6), named, max_tokens=2)
    assert answer.error.code == "FAILED_PRECONDITION"
    assert "alone, at weight 1" in answer.error.message
    assert served.engine.adapters.requests.references() == 0


def test_in_8_bits_vectors_stay_exact_and_low_rank_pairs_near(
    tiny: Any, harness: Any, saved: Any, prompts: Prompts
) -> None:
    """IA3 and soft prompts hold no low-rank pair; DoRA's and a bias's vectors lie beside one in 8 bits."""
    folders = tuple(saved("Llama").values())
    asked = [(kind, length) for kind in (*KINDS, None) for length in LENGTHS]
    answers = {}
    for device_dtype in ("auto", "int8"):
        served = harness(
            tiny("Llama"),
            "none",
            scheduler={"prefix_cache": False},
            adapters={"folders": folders, "max_on_device": 4, "device_dtype": device_dtype},
        )
        for kind, length in asked:
            uses = KINDS[kind].uses if kind else []
            served.submit(
                f"{kind}-{length}", prompts[length], uses, max_tokens=1, ignore_eos=True, logprobs=3
            )
            # One after the other: in a batch, who stands beside whom moves the last bits.
            served.run()
        answers[device_dtype] = served.answers
    for kind, length in asked:
        plain, small = (answers[dtype][f"{kind}-{length}"] for dtype in ("auto", "int8"))
        logprob, near = plain.logprobs[0].logprob, small.logprobs[0].logprob
        if kind in EXACT_IN_8_BITS:
            assert plain.tokens == small.tokens
            assert near == pytest.approx(logprob, abs=1e-6)
        else:
            assert near == pytest.approx(logprob, abs=0.15)


def test_the_base_finds_what_an_activated_adapter_left(tiny: Any, harness: Any, saved: Any) -> None:
    """Up to its invocation an activated LoRA is the base, whoever of the two came first."""
    folders = (saved("Llama")["activated"], saved("Llama")["plain"])
    served = harness(tiny("Llama"), "none", scheduler={"kv_block_size": BLOCK}, adapters={"folders": folders})
    shared = tuple(range(30, 47))
    options = {"max_tokens": 4, "ignore_eos": True}
    found = {}
    for name, prompt, uses in (
        ("activated", (*shared, *INVOCATION, 50), [("activated", 1.0)]),
        ("base", (*shared, 60, 61), []),
        ("other", (*shared, 60, 61), [("plain", 1.0)]),
        ("weighed", (*shared, 70, *INVOCATION), [("activated", 0.5)]),
    ):
        answer = served.submit(name, prompt, uses, **options)
        served.run()
        found[name] = answer.times.cached_prompt_tokens
    assert found == {"activated": 0, "base": 16, "other": 0, "weighed": 16}


def test_prompts_are_scored_with_adapters_of_every_kind(
    tiny: Any, harness: Any, saved: Any, truth: Any, prompts: Prompts
) -> None:
    """PEFT's answer as part of the prompt gets the log-probabilities with which it was chosen."""
    served = harness(
        tiny("Llama"),
        scheduler={"kv_block_size": BLOCK, "max_batch_tokens": 16, "max_scored_tokens": 6},
        adapters={"folders": tuple(saved("Llama").values())},
    )
    exact, length = truth("Llama", "none"), max(LENGTHS)
    for kind in (*KINDS, None):
        uses = KINDS[kind].uses if kind else []
        told = (*prompts[length], *exact[kind, length][0])
        served.submit(str(kind), told, uses, max_tokens=0, prompt_logprobs=0)
    served.run()
    for kind in (*KINDS, None):
        tokens, logits = exact[kind, length]
        answer = served.answers[str(kind)]
        assert (answer.error, answer.tokens, answer.finish) == (None, [], "length")
        assert [score.token_id for score in answer.prompt_logprobs] == [*prompts[length][1:], *tokens]
        found = torch.tensor([score.logprob for score in answer.prompt_logprobs[-len(tokens) :]])
        theirs = logits.log_softmax(-1)[range(len(tokens)), tokens]
        assert (found - theirs).abs().max() <= 1e-4 * logits.abs().max(), kind
