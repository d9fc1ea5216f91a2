"""Reading an adapter, and refusing those that could only be served in part."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.spec.manifest import AdapterManifest, Kind
from loraplex_server.adapters.spec.peft_config import parse_config
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import FailedPreconditionError, PermissionDeniedError

ReadManifest = Callable[..., AdapterManifest]


@pytest.fixture
def manifest_of(tmp_path: Path, registry: SiteRegistry) -> ReadManifest:
    def read(name: str = "a", max_rank: int = 128) -> AdapterManifest:
        return read_manifest(name, tmp_path / name, registry, [tmp_path], max_rank)

    return read


@pytest.fixture
def refused(manifest_of: ReadManifest) -> Callable[..., str]:
    """Reads an adapter that must be refused, and returns why."""

    def read(name: str = "a", **options: Any) -> str:
        with pytest.raises(FailedPreconditionError) as caught:
            manifest_of(name, **options)
        assert caught.value.info.resource == ("adapter", name)
        return str(caught.value)

    return read


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 7, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "regex": {"r": 4, "target_modules": r".*\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "whole paths": {"r": 4, "target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"]},
    "one layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layers of a pattern": {
        "r": 4,
        "target_modules": ["o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "excluding": {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"],
    },
    "excluding by regex": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*\.0\..*k_proj",
    },
    "patterns": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "rank_pattern": {
            "k_proj": 2,
            "layers.0.self_attn.v_proj": 12,
            r"layers\.1\..*[ov]_proj": 6,
            "proj": 3,
        },
        "alpha_pattern": {"q_proj": 32, r"layers\.\d+\.self_attn\.o_proj": 5, "v_proj": 7},
    },
    "first pattern wins": {
        "r": 8,
        "target_modules": ["q_proj"],
        # In the order in which PEFT saves them: by name.
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "model.layers.0.self_attn.q_proj": 6, "q_proj": 7},
        "use_rslora": True,
    },
    "dots match anything": {"r": 8, "target_modules": ["q_proj"], "rank_pattern": {"0.self.attn.q.proj": 5}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_ranks_and_scales_are_those_of_peft(
    case: str, save_peft: Callable[..., Any], manifest_of: ReadManifest
) -> None:
    model = save_peft("a", **SETTINGS[case])
    manifest = manifest_of()
    found = {entry.path: (pair.rank, pair.scale) for entry, pair in manifest.pairs}
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == expected
    assert manifest.rank == max(rank for rank, _ in expected.values())
    assert manifest.target_modules == tuple(sorted({path.rpartition(".")[2] for path in expected}))


@pytest.mark.parametrize("case", SETTINGS)
def test_targets_are_those_of_peft(case: str, registry: SiteRegistry) -> None:
    """On the configuration alone, before PEFT resolves it into a list."""
    from peft import LoraConfig

    config = LoraConfig(**SETTINGS[case])
    if config.target_modules == "all-linear":
        config.target_modules = {entry.path for entry in registry}
    settings = parse_config(json.dumps({"peft_type": "LORA", **SETTINGS[case]}).encode())
    for entry in registry:
        expected = check_target_module_exists(config, entry.path)
        assert settings.targets.includes(entry.path) == (
            bool(expected) and type(expected).__name__ != "_ExcludedModule"
        )


def test_ia3_as_peft_saves_it(
    base_model: Callable[[], Any], tmp_path: Path, registry: SiteRegistry, refused: Callable[..., str]
) -> None:
    from peft import IA3Config, get_peft_model

    modules = ["k_proj", "down_proj"]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=["down_proj"])
    get_peft_model(base_model(), config).save_pretrained(tmp_path / "a")
    manifest = read_manifest("a", tmp_path / "a", registry, [tmp_path], 64)
    assert (manifest.peft_type, manifest.rank, manifest.linear) == ("IA3", 0, False)
    assert manifest.shapes == ()
    kinds = {registry.entries[vector.entry].path: vector.kind.name for vector in manifest.vectors}
    assert {path.rpartition(".")[2]: kind for path, kind in kinds.items()} == {
        "k_proj": "OUTPUT_SCALE",
        "down_proj": "INPUT_SCALE",
    }
    edit(tmp_path / "a", feedforward_modules=[])
    assert "the base model needs [32, 1]" in refused()


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_soft_prompts_as_peft_saves_them(
    config: str,
    base_model: Callable[[], Any],
    tmp_path: Path,
    registry: SiteRegistry,
    refused: Callable[..., str],
) -> None:
    import peft

    made = getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(base_model(), made).save_pretrained(tmp_path / "a")
    manifest = read_manifest("a", tmp_path / "a", registry, [tmp_path], 64)
    assert (manifest.num_virtual_tokens, manifest.linear, manifest.sites) == (5, False, ())
    assert [(vector.length, vector.rows) for vector in manifest.vectors] == [(registry.hidden_size, 5)]
    edit(tmp_path / "a", num_virtual_tokens=6)
    assert "the base model needs [6, 32]" in refused()


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_as_peft_saves_them(
    projected: bool,
    base_model: Callable[[], Any],
    tmp_path: Path,
    registry: SiteRegistry,
    refused: Callable[..., str],
) -> None:
    import peft

    made = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=7
    )
    peft.get_peft_model(base_model(), made).save_pretrained(tmp_path / "a")
    manifest = read_manifest("a", tmp_path / "a", registry, [tmp_path], 64)
    assert (manifest.num_virtual_tokens, manifest.num_prefix_tokens) == (5, 5)
    assert (manifest.linear, manifest.sites) == (False, ())
    # Keys and values of 2 layers, each of 2 KV heads of 8.
    assert [(vector.length, vector.rows) for vector in manifest.vectors] == [(16, 5 * 2 * 2)]
    for settings, named in (
        ({"num_virtual_tokens": 6}, "the base model needs [6, 64]"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, the base model's keys and values need 2"),
        ({"token_dim": 32}, "token_dim is 32"),
        ({"num_layers": 1}, "num_layers is 1"),
        ({"num_transformer_submodules": 2}, "only decoders are served"),
    ):
        before = (tmp_path / "a" / "adapter_config.json").read_text()
        edit(tmp_path / "a", **settings)
        assert named in refused()
        (tmp_path / "a" / "adapter_config.json").write_text(before)


def test_a_prefix_is_refused_where_layers_differ(
    base_model: Callable[[], Any], tmp_path: Path, registry: SiteRegistry
) -> None:
    import peft

    made = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    peft.get_peft_model(base_model(), made).save_pretrained(tmp_path / "a")
    sites = [(entry.path, entry.in_features, entry.out_features) for entry in registry]
    uneven = SiteRegistry(sites, hidden_size=32, kv_shapes=[(2, 8), (1, 16)])
    with pytest.raises(FailedPreconditionError, match="caches of different shapes"):
        read_manifest("a", tmp_path / "a", uneven, [tmp_path], 64)


def test_a_scale_of_a_shared_input_is_refused(
    base_model: Callable[[], Any], tmp_path: Path, registry: SiteRegistry
) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["up_proj"], feedforward_modules=["up_proj"])
    get_peft_model(base_model(), config).save_pretrained(tmp_path / "a")
    sites = [(entry.path, entry.in_features, entry.out_features) for entry in registry]
    shared = SiteRegistry(sites, sharing={path for path, _, _ in sites if "up_proj" in path})
    with pytest.raises(FailedPreconditionError, match="an input that other projections share"):
        read_manifest("a", tmp_path / "a", shared, [tmp_path], 64)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector beside it"),
        ({"lora_bias": True}, "has no lora_B.bias beside it"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias with use_dora"),
    ],
)
def test_parts_that_the_configuration_asks_for_must_be_there(
    settings: dict[str, Any], named: str, write_adapter: Callable[..., Path], tmp_path: Path, refused: Any
) -> None:
    write_adapter(tmp_path / "a", config=settings)
    assert named in refused()


# Kinds of adapter that PEFT saves and this server does not apply, and what the refusal names.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "base biases": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "qalora": ({"use_qalora": True, "qalora_group_size": 16}, "QALoRA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_lora_are_refused_by_name(
    kind: str, save_peft: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    settings, named = KINDS[kind]
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": True, **settings}
    qalora = settings.pop("use_qalora", False)
    save_peft("a", **settings)
    if qalora:  # PEFT makes it on GPTQ layers only
        edit(tmp_path / "a", use_qalora=True)
    assert named in refused()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("LoHaConfig", "'LOHA'"),
        ("VeraConfig", "'VERA'"),
        ("OFTConfig", "'OFT'"),
    ],
)
def test_other_methods_are_refused_by_name(
    config: str,
    named: str,
    base_model: Callable[[], Any],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    import peft

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    if config == "OFTConfig":
        settings |= {"oft_block_size": 8, "r": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base_model(), getattr(peft, config)(**settings)).save_pretrained(tmp_path / "a")
    assert named in refused()


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"megatron_config": {"tp": 2}}, "megatron_config"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"velora_config": {"scale": 1.0}}, "VeLoRA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "something new"}, "'something new' is not known"),
        ({"init_lora_weights": 3}, "init_lora_weights 3"),
        ({"rotate_by": 0.5}, "'rotate_by' is not known"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"peft_type": "EXE\u202eC"}, "peft_type"),
        ({"r": 0}, "r has 0"),
        ({"r": "8"}, "r has '8'"),
        ({"r": True}, "r has True"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has 0"),
        ({"rank_pattern": {"q_(proj": 4}}, "not a regular expression"),
        ({"rank_pattern": {"q" * 5000: 4}}, "characters"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "to be a list"),
        ({"layers_pattern": "layers"}, "layers_pattern needs"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        # The tensors are there, but the configuration says something else about them.
        (
            {"target_modules": ["v_proj"]},
            "q_proj.lora_A.weight' is for a module that target_modules",
        ),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "self_attn.k_proj', but the file has no tensor"),
        ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj.lora_A.weight'"),
        ({"r": 8}, "but the configuration gives it rank 8"),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 5}}, "layers.1.self_attn.v_proj.lora_A.weight'"),
    ],
)
def test_settings_that_would_not_be_applied_are_refused(
    settings: dict[str, Any],
    named: str,
    write_adapter: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    edit(write_adapter(tmp_path / "a"), **settings)
    why = refused()
    assert named in why
    assert why.isascii()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_initialisations_that_leave_the_base_alone_are_served(
    init: object, write_adapter: Callable[..., Path], tmp_path: Path, manifest_of: ReadManifest
) -> None:
    edit(write_adapter(tmp_path / "a"), init_lora_weights=init)
    assert len(manifest_of().pairs) == 4


def test_settings_without_effect_are_served(
    write_adapter: Callable[..., Path], tmp_path: Path, manifest_of: ReadManifest
) -> None:
    edit(
        write_adapter(tmp_path / "a"),
        lora_dropout=0.1,
        use_dora=False,
        modules_to_save=[],
        eva_config={"rho": 2.0},
        some_new_setting_that_is_off=False,
        target_modules=None,
    )
    assert len(manifest_of().pairs) == 4


LAYER_1 = "base_model.model.model.layers.1.self_attn"


def _replace(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> None:
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        (f"{LAYER_1}.q_proj.lora_A.weight", None, "q_proj.lora_B.weight' has no lora_A"),
        (f"{LAYER_1}.q_proj.lora_B.weight", None, "q_proj.lora_A.weight' has no lora_B"),
        (f"{LAYER_1}.q_proj.lora_A.weight", torch.ones(4, 31), "q_proj.lora_A.weight' has shape [4, 31]"),
        (f"{LAYER_1}.q_proj.lora_A.weight", torch.ones(5, 32), "q_proj.lora_A.weight' has shape [5, 32]"),
        (f"{LAYER_1}.q_proj.lora_A.weight", torch.ones(4 * 32), "q_proj.lora_A.weight' has shape [128]"),
        (f"{LAYER_1}.v_proj.lora_B.weight", torch.ones(4, 16), "v_proj.lora_B.weight' has shape [4, 16]"),
        (f"{LAYER_1}.q_proj.lora_A.weight", torch.ones(4, 32).int(), "has dtype 'I32'"),
        (f"{LAYER_1}.q_proj.lora_A.weight", torch.ones(4, 32).double(), "has dtype 'F64'"),
        (f"{LAYER_1}.q_proj.lora_B.bias", torch.ones(32), "see use_dora, lora_bias"),
        (f"{LAYER_1}.q_proj.lora_magnitude_vector", torch.ones(32), "see use_dora, lora_bias"),
        (f"{LAYER_1}.q_proj.ia3_l", torch.ones(32, 1), "see use_dora, lora_bias"),
        (f"{LAYER_1}.z_proj.lora_A.weight", torch.ones(4, 32), "z_proj.lora_A.weight' would not be applied"),
        ("base_model.model.lm_head.weight", torch.ones(40, 32), "lm_head.weight' would not be applied"),
        ("base_model.model.model.embed_tokens.weight", torch.ones(40, 32), "embed_tokens.weight' would not"),
        ("prompt_embeddings", torch.ones(3, 32), "soft prompts"),
        ("model.layers.9.self_attn.q_proj.lora_A.weight", torch.ones(4, 32), "layers.9"),
    ],
)
def test_every_tensor_is_applied_or_the_refusal_names_it(
    name: str,
    value: torch.Tensor | None,
    named: str,
    write_adapter: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    write_adapter(tmp_path / "a", change=lambda tensors: _replace(tensors, name, value))
    assert named in refused()


def test_an_adapter_without_tensors_is_refused(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_adapter(tmp_path / "a", change=dict.clear)
    assert "holds no tensor" in refused()


def test_ranks_above_the_servers_are_refused(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str], manifest_of: ReadManifest
) -> None:
    write_adapter(tmp_path / "a", rank=16)
    assert manifest_of(max_rank=16).rank == 16
    assert "has rank 16; at most 15" in refused(max_rank=15)


def test_pickles_are_never_read(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "re-save the adapter as safetensors" in refused()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(
    missing: str, write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    (write_adapter(tmp_path / "a") / missing).unlink()
    assert f"{missing} is missing" in refused()


def test_a_huge_configuration_is_not_read(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    edit(write_adapter(tmp_path / "a"), revision="x" * (1 << 20))
    assert "adapter_config.json has" in refused()


def test_files_that_are_no_files_are_refused(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    weights = write_adapter(tmp_path / "a") / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file" in refused()


def test_links_out_of_the_roots_are_refused_and_links_within_are_followed(
    write_adapter: Callable[..., Path], tmp_path: Path, registry: SiteRegistry
) -> None:
    root = tmp_path / "root"
    outside = write_adapter(tmp_path / "outside") / "adapter_model.safetensors"
    inside = write_adapter(root / "blobs") / "adapter_model.safetensors"
    weights = write_adapter(root / "a") / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(PermissionDeniedError, match=r"adapter_model\.safetensors links"):
        read_manifest("a", root / "a", registry, [root], 64)
    weights.unlink()
    weights.symlink_to(inside)
    assert read_manifest("a", root / "a", registry, [root], 64).rank == 4


def test_patterns_that_never_end_are_cut_short(
    write_adapter: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Without a limit, this one runs for longer than anyone waits."""
    pattern = r"(.*\.)?((a|b|\w|\.|..|...)+[#j](?!j)x?[^j])"
    edit(write_adapter(tmp_path / "a"), rank_pattern={pattern: 4})
    assert "takes too long" in refused()


def test_a_pattern_for_every_module_is_quick_to_match(
    write_adapter: Callable[..., Path], tmp_path: Path, manifest_of: ReadManifest, registry: SiteRegistry
) -> None:
    every = {f"model.layers.{i}.mlp.up_proj": 4 for i in range(2000)} | {entry.path: 4 for entry in registry}
    edit(write_adapter(tmp_path / "a"), rank_pattern=every, alpha_pattern=every)
    assert {pair.scale for _, pair in manifest_of().pairs} == {1.0}


def test_adapters_of_one_recipe_share_all_but_name_folder_and_weights(
    tmp_path: Path,
    registry: SiteRegistry,
    write_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: weakref.WeakValueDictionary[bytes, Kind] = weakref.WeakValueDictionary()

    def read(name: str, **settings: Any) -> AdapterManifest:
        folder = write_adapter(tmp_path / name, **settings)
        return read_manifest(name, folder, registry, [tmp_path], 64, known)

    a = read("a", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("loraplex_server.adapters.files.manifest_file.parse_config", pytest.fail)
        patch.setattr("loraplex_server.adapters.files.manifest_file.parse_header", pytest.fail)
        b = read("b", seed=2)
    assert (b.name, b.folder) == ("b", tmp_path / "b")
    assert b.sites is a.sites
    assert b.header is a.header
    assert b.kind is a.kind
    assert (b.rank, b.linear, b.target_modules) == (a.rank, a.linear, a.target_modules)
    assert b == dataclasses.replace(
        read_manifest("a", a.folder, registry, [tmp_path], 64), name="b", folder=b.folder
    )
    # A config of other bytes, another shape, a file of another length: each is read and judged by itself.
    for other in (
        read("c", config={"lora_alpha": 3}),
        read("d", rank=6),
        read("e", dtype=torch.float16),
    ):
        assert other.kind is not a.kind
        assert other.sites != a.sites
    weights = b.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(FailedPreconditionError, match="ends at byte"):
        read_manifest("b", b.folder, registry, [tmp_path], 64, known)
    del a, b, other
    gc.collect()
    assert len(known) == 0, "a kind lives as long as its adapters"
