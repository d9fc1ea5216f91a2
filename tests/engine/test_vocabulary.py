"""Level (i) for adapters of the embedding, the head, the norms and whole weights, added tokens included: each
alone and all in one batch, token for token as PEFT answers with the file that it saved.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_kernels import dispatch

VOCABULARY, ADDED, MAX_TOKENS = 211, 3, 8
TRAINED = (5, 17, 100, 150)

# Kinds by name: PEFT's configuration, given the projections' names, and how it is saved.
KINDS: dict[str, tuple[Callable[[list[str], list[str]], Any], dict[str, Any]]] = {}
ADDING = ("added_copies", "added_lora", "added_rows", "added_plain")


def _kind(**saving: Any) -> Callable[[Callable[[list[str], list[str]], Any]], None]:
    def add(make: Callable[[list[str], list[str]], Any]) -> None:
        KINDS[make.__name__] = (make, saving)

    return add


@_kind()
def ends(attention: list[str], mlp: list[str]) -> Any:
    """Saved with copies of the base's tables, as PEFT does unasked."""
    from peft import LoraConfig

    return LoraConfig(
        r=5,
        lora_alpha=12,
        use_rslora=True,
        rank_pattern={"lm_head": 3},
        alpha_pattern={"embed_tokens": 7},
        target_modules=["embed_tokens", "lm_head", attention[0]],
    )


@_kind(save_embedding_layers=False)
def head(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=6, lora_alpha=6, target_modules=["lm_head"])


@_kind(save_embedding_layers=False)
def embedding(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", mlp[-1]])


@_kind()
def dora_ends(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["embed_tokens", "lm_head", attention[0]]
    )


@_kind()
def copies(attention: list[str], mlp: list[str]) -> Any:
    """`norm` names every norm, the first of the attention's projections has a bias in Qwen2."""
    from peft import LoraConfig

    saved = ["embed_tokens", "lm_head", "norm", attention[-2], mlp[-1]]
    return LoraConfig(r=4, lora_alpha=4, target_modules=[attention[-1]], modules_to_save=saved)


@_kind()
def embedding_copy(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, modules_to_save=["embed_tokens"])


@_kind()
def tied_copy(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=mlp,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )


@_kind()
def rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=list(TRAINED))


@_kind()
def uneven_rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    trained = {"embed_tokens": [9, *TRAINED], "lm_head": [3, 7, 120]}
    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=trained)


@_kind()
def rows_alone(attention: list[str], mlp: list[str]) -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(token_indices=[*TRAINED, 60, 7])


@_kind()
def norms(attention: list[str], mlp: list[str]) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=["norm", "input_layernorm"])


@_kind()
def scaled_copies(attention: list[str], mlp: list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(
        target_modules=[attention[0], mlp[-1]], feedforward_modules=[mlp[-1]], modules_to_save=["lm_head"]
    )


@_kind()
def added_copies(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, modules_to_save=["embed_tokens", "lm_head"])


@_kind()
def added_lora(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "lm_head", *mlp])


@_kind()
def added_rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    trained = [7, *range(VOCABULARY, VOCABULARY + ADDED)]
    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=trained)


@_kind()
def added_plain(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp)


@_kind()
def plain(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=24, target_modules=attention + mlp)


@_kind()
def prompt(attention: list[str], mlp: list[str]) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def _randomise(model: Any, spread: float, generator: torch.Generator) -> None:
    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        values = parameter.data
        if "lora_A" in name or "lora_embedding_A" in name:
            values.copy_(noise(values) * (1.0 if "embedding" in name else values.shape[1] ** -0.5))
        elif "lora_B" in name or "lora_embedding_B" in name:
            at_an_end = "embedding" in name or "lm_head" in name
            values.copy_(noise(values) * (0.3 * spread if at_an_end else 0.1))
        elif "magnitude" in name or "ia3_l" in name:
            values.mul_(1 + 0.3 * noise(values))
        elif "trainable_tokens_delta" in name or "prompt_encoder" in name:
            values.copy_(noise(values) * spread)
        elif "modules_to_save" in name or "ln_tuning_layers" in name:
            values.add_(noise(values) * (0.5 * values.std() if values.ndim > 1 else 0.3))


@pytest.fixture(scope="module")
def saved(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """One adapter of each kind, made by PEFT with random values; the folder that holds each one's folder."""
    made: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture in made:
            return made[architecture]
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        fused = architecture == "Phi3"
        attention = ["qkv_proj", "o_proj"] if fused else ["q_proj", "k_proj", "v_proj", "o_proj"]
        mlp = ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
        generator = torch.Generator().manual_seed(6)
        folders = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind, (configure, saving) in KINDS.items():
                base = AutoModelForCausalLM.from_pretrained(tiny(architecture).base, dtype=torch.float32)
                table = base.get_input_embeddings().weight.data
                spread = float(table.std())
                if kind in ADDING:
                    base.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
                    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
                        new = end.weight.data[VOCABULARY:]
                        new.copy_(torch.randn(new.shape, generator=generator) * 1.5 * spread)
                model = get_peft_model(base, configure(attention, mlp))
                _randomise(model, spread, generator)
                folders[kind] = tmp_path_factory.mktemp(f"{architecture}-{kind}")
                model.save_pretrained(folders[kind] / kind, **saving)
        made[architecture] = folders
        return folders

    return make


def _prompts(kind: str) -> dict[str, tuple[int, ...]]:
    random_ = random.Random(3)
    found = {}
    for length in (5, 23):
        drawn = [random_.randrange(10, VOCABULARY) for _ in range(length)]
        drawn[1], drawn[-2] = TRAINED[0], TRAINED[-1]
        if kind in ADDING:
            drawn[2:4] = [VOCABULARY + 1, VOCABULARY + ADDED - 1]
        found[f"{kind}-{length}"] = tuple(drawn)
    return found


Truth = dict[str, tuple[tuple[int, ...], str | None, list[int], torch.Tensor]]


def _truth(judge: Any, base: Path, folders: dict[str, Path], quantization: str) -> Truth:
    """Per request: prompt, adapter, and what transformers + PEFT answer; each kind unlike the base."""
    found: Truth = {}
    for kind in (*KINDS, None):
        added = ADDED if kind in ADDING else 0
        oracle = judge(base, folders[kind or "plain"], quantization, added)
        for name, tokens in _prompts(kind or "base").items():
            answer, logits = oracle.generate(tokens, [(kind, 1.0)] if kind else [], MAX_TOKENS)
            found[name] = tokens, kind, answer, logits
    for kind in KINDS:
        assert any(found[f"{kind}-{length}"][2] != found[f"base-{length}"][2] for length in (5, 23)), kind
    return found


CASES = [
    ("Llama", "none"),
    ("Llama", "nf4"),
    # Tied, scaled and soft-capped.
    ("Gemma2", "none"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("Llama", "int4"), ("Gemma2", "nf4"), ("Qwen2", "int4"), ("Phi3", "nf4"))
    ),
]


@pytest.mark.parametrize(("architecture", "quantization"), CASES)
def test_every_kind_in_one_batch_equals_peft(
    architecture: str, quantization: str, tiny: Any, harness: Any, saved: Any, judge: Any
) -> None:
    folders = saved(architecture)
    truth = _truth(judge, tiny(architecture).base, folders, quantization)
    served = harness(
        tiny(architecture),
        quantization,
        # Chunked prefill, and adapters that come and go.
        scheduler={"max_batch_tokens": 16, "max_num_requests": 6, "kv_block_size": 4},
        adapters={"folders": tuple(folders.values()), "max_on_device": 4},
    )
    assert served.engine.adapters.registry.errors() == {}
    names = list(truth)
    random.Random(1).shuffle(names)
    for name in names:
        tokens, kind, _, _ = truth[name]
        uses = [] if kind is None else [(kind, 1.0)]
        served.submit(name, tokens, uses, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    served.run()
    assert {name: (served.answers[name].error, served.answers[name].tokens) for name in truth} == {
        name: (None, answer) for name, (_, _, answer, _) in truth.items()
    }
    worst = 0.0
    for name, (_, _, answer, logits) in truth.items():
        exact = logits.log_softmax(-1)[range(len(answer)), answer]
        got = torch.tensor([step.logprob for step in served.answers[name].logprobs])
        worst = max(worst, float((exact - got).abs().max() / logits.abs().max()))
    print(f"\nlevel (i) {architecture} {quantization}: {', '.join(KINDS)}: max |Δlogprob| {worst:.1e}")
    assert worst <= 1e-4
    answered = [token for _, kind, answer, _ in truth.values() if kind in ADDING for token in answer]
    assert max(answered) >= VOCABULARY, "no added token was ever answered, so the head's are not proved"


def _deltas(judge: Any, model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's delta of each weight for an adapter of low-rank pairs, by module path."""
    oracle = judge(model.base, folder, "none")
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(folder_name)
        for folder_name in [next(folder.iterdir()).name]
        for path, layer in oracle._model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_a_sum_of_pairs_at_both_ends_is_exact(
    architecture: str, tiny: Any, harness: Any, saved: Any, judge: Any
) -> None:
    """A head that is tied to the embedding stays what it is when a pair is added to the embedding."""
    folders, model = saved(architecture), tiny(architecture)
    adapters = [("ends", 0.5), ("head", -1.25), ("embedding", 0.75), ("plain", 0.5)]
    oracle = judge(model.base, folders["plain"], "none")
    base = oracle._model.get_base_model()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    modules = dict(base.named_modules())
    with torch.inference_mode():
        for name, weight in adapters:
            for path, delta in _deltas(judge, model, folders[name]).items():
                layer = getattr(modules[path], "base_layer", modules[path])
                layer.weight.data = layer.weight.data + weight * delta
        prompt = (5, 17, 100, 42, 5, 9)
        with oracle._model.disable_adapter():
            expected, logits = oracle._generate(prompt, MAX_TOKENS)
    served = harness(model, "none", adapters={"folders": tuple(folders.values())})
    answer = served.submit("a", prompt, adapters, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    alone = served.submit("b", prompt, [("ends", 1.0)], max_tokens=MAX_TOKENS, ignore_eos=True)
    served.run()
    assert answer.tokens == expected != alone.tokens
    exact = logits.log_softmax(-1)[range(MAX_TOKENS), expected]
    got = torch.tensor([step.logprob for step in answer.logprobs])
    assert (exact - got).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("uses", [[(None, 0.5)], [(None, 1.0), ("plain", 1.0)]])
def test_what_replaces_stands_alone_at_weight_1(
    uses: list[tuple[str | None, float]], tiny: Any, harness: Any, saved: Any
) -> None:
    served = harness(tiny("Llama"), "none", adapters={"folders": tuple(saved("Llama").values())})
    additive = {"ends", "head", "embedding", "plain"}
    for kind in KINDS.keys() - additive:
        named = [(name or kind, weight) for name, weight in uses]
        answer = served.submit(kind, (5, 6), named, max_tokens=2)
        assert answer.error.code == "FAILED_PRECONDITION"
        assert "alone, at weight 1" in answer.error.message
    assert served.engine.adapters.requests.references() == 0


def test_added_tokens_are_valid_with_their_adapter_alone(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(tiny("Llama"), "none", adapters={"folders": tuple(saved("Llama").values())})
    last = VOCABULARY + ADDED - 1
    ask = served.submit
    refused = {
        "of the base": ask("base", (5, last), [], max_tokens=2),
        "of another": ask("another", (5, last), [("copies", 1.0)], max_tokens=2),
        "beyond": ask("beyond", (5, last + 1), [("added_rows", 1.0)], max_tokens=2),
        "stop": ask("stop", (5, 6), [("plain", 1.0)], max_tokens=2, stop_token_ids=(last,)),
    }
    for answer in refused.values():
        assert answer.error.code == "INVALID_ARGUMENT"
        assert "outside the vocabulary" in answer.error.message
    assert f"of {last + 1}, the adapter's added tokens included" in refused["beyond"].error.message
    assert served.engine.adapters.requests.references() == 0
    # Greedy, drawn, and with end tokens masked; beside requests whose vocabulary is smaller.
    drawn = {"temperature": 1.5, "seed": 3, "min_tokens": 5, "logprobs": 5}
    for name in ("added_copies", "plain"):
        ask(f"{name} drawn", (5, 6, 7), [(name, 1.0)], max_tokens=30, ignore_eos=True, **drawn)
        ask(f"{name} greedy", (5, 6, 7), [(name, 1.0)], max_tokens=30, stop_token_ids=(2,), min_tokens=9)
    served.run()
    found = {name: set(served.answers[f"{name} drawn"].tokens) for name in ("added_copies", "plain")}
    assert max(found["plain"]) < VOCABULARY <= max(found["added_copies"]) <= last
    for name in ("added_copies", "plain"):
        top = [token for step in served.answers[f"{name} drawn"].logprobs for token in step.top]
        assert all(-1e4 < token.logprob <= 0 for token in top)


def test_a_step_without_them_launches_nothing_for_them(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(tiny("Llama"), "none", adapters={"folders": tuple(saved("Llama").values())})
    with_them = served.submit("a", (5, 6), [("copies", 1.0)], max_tokens=3)
    served.run()
    assert with_them.error is None
    kinds = ("vocabulary", "replacement", "vectors")
    before = {op: count for op, count in dispatch.launches.items() if op.startswith(kinds)}
    assert before
    for name, uses in (("base", []), ("lora", [("plain", 1.0)])):
        served.submit(name, (5, 6, 7), uses, max_tokens=4)
    served.run()
    assert {op: dispatch.launches[op] for op in before} == before


def test_in_8_bits_what_replaces_stays_exact(tiny: Any, harness: Any, saved: Any) -> None:
    folders = saved("Llama")
    exact = ("norms", "rows_alone", "scaled_copies")
    near = ("ends", "dora_ends", "copies", "added_lora", "added_rows")
    answers = {}
    for device_dtype in ("auto", "int8"):
        served = harness(
            tiny("Llama"),
            "none",
            adapters={
                "folders": tuple(folders[name] for name in exact + near),
                "max_on_device": 3,
                "device_dtype": device_dtype,
            },
        )
        for name in exact + near:
            (_, prompt), *_ = _prompts(name).items()
            served.submit(name, prompt, [(name, 1.0)], max_tokens=1, ignore_eos=True, logprobs=0)
            served.run()
        answers[device_dtype] = served.answers
    for name in exact + near:
        (plain,), (small,) = (answers[dtype][name].logprobs for dtype in ("auto", "int8"))
        if name in exact:
            assert answers["auto"][name].tokens == answers["int8"][name].tokens
        assert small.logprob == pytest.approx(plain.logprob, abs=1e-6 if name in exact else 0.2)


def test_an_adapter_over_the_limit_is_refused_with_its_bytes(tiny: Any, harness: Any, saved: Any) -> None:
    folders = saved("Llama")
    served = harness(
        tiny("Llama"),
        "none",
        adapters={"folders": (folders["copies"], folders["plain"]), "max_bytes": 100_000},
    )
    (name, error), *others = served.engine.adapters.registry.errors().items()
    assert (name, error.code, others) == ("copies", "FAILED_PRECONDITION", [])
    # Two tables of 211 rows alone.
    needed = int(str(error).partition("takes ")[2].split()[0])
    assert needed > 2 * VOCABULARY * 64 * 4
    assert "one adapter may take 100000 (--adapter-max-bytes)" in str(error)
    assert served.submit("a", (5,), [("copies", 1.0)], max_tokens=1).error.code == "FAILED_PRECONDITION"


def test_in_bf16_answers_are_near(tiny: Any, harness: Any, saved: Any, judge: Any) -> None:
    """Level (ii) in short: the first token's logprob beside that of transformers + PEFT in fp32."""
    folders = saved("Gemma2")
    served = harness(
        tiny("Gemma2"), "none", adapters={"folders": tuple(folders.values())}, model={"dtype": "bfloat16"}
    )
    for kind in ("ends", "dora_ends", "copies", "rows", "norms", "added_lora"):
        oracle = judge(tiny("Gemma2").base, folders[kind], "none", ADDED if kind in ADDING else 0)
        (_, prompt), *_ = _prompts(kind).items()
        _, logits = oracle.generate(prompt, [(kind, 1.0)], 1)
        answer = served.submit(kind, prompt, [(kind, 1.0)], max_tokens=1, ignore_eos=True, logprobs=0)
        served.run()
        exact = logits.log_softmax(-1)[0, answer.tokens[0]]
        assert answer.logprobs[0].logprob == pytest.approx(float(exact), abs=0.1)


def test_tokens_that_only_the_device_knows(tiny: Any, harness: Any, saved: Any) -> None:
    """A step launched before the last one's tokens are known finds their rows all the same."""
    adapters = {"folders": tuple(saved("Llama").values())}

    class Ahead:
        asynchronous = True

        def __init__(self, runner: Any) -> None:
            self.runner = runner
            self.fed = 0

        def launch(self, plan: Any) -> Any:
            self.fed += len(plan.fed_row)
            return self.runner.launch(plan)

        def weight_checksum(self) -> Any:
            return self.runner.weight_checksum()

    kinds = ("added_copies", "added_lora", "rows_alone", "ends", "dora_ends")
    answers = []
    for ahead in (False, True):
        served = harness(tiny("Llama"), "none", adapters=adapters)
        runner = served.engine._runner = Ahead(served.engine._runner) if ahead else served.engine._runner
        for kind in kinds:
            served.submit(kind, (5, 17, 9), [(kind, 1.0)], max_tokens=12, ignore_eos=True)
        served.run()
        answers.append({kind: served.answers[kind].tokens for kind in kinds})
    assert answers[0] == answers[1]
    assert max(token for kind in ADDING[:2] for token in answers[0][kind]) >= VOCABULARY
    assert runner.fed > 5 * len(kinds)
