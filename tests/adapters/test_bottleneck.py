"""Bottleneck adapters as the `adapters` library saves them: read whole, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_kernels.pool import BottleneckReads, LoraPool, VectorKind, extent_alignment
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.weights import lay_out, read_weights
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import FailedPreconditionError

SAVED = Path(__file__).parent / "saved"
"""Written by the library itself, release 1.3.0, on models of the fixture's shape."""

MODELS = {"llama": "bottleneck-llama", "qwen2": "bottleneck-qwen2"}


@pytest.fixture
def bases(registry: SiteRegistry) -> Callable[[str], SiteRegistry]:
    """The tiny model's registry, of a given model type."""

    def make(model_type: str) -> SiteRegistry:
        residual = {}
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            residual[f"{prefix}.self_attn.o_proj"] = f"{prefix}.input_layernorm"
            residual[f"{prefix}.mlp.down_proj"] = f"{prefix}.post_attention_layernorm"
        return SiteRegistry(
            [(entry.path, entry.in_features, entry.out_features) for entry in registry],
            hidden_size=registry.hidden_size,
            kv_shapes=registry.kv_shapes,
            model_type=model_type,
            residual=residual,
        )

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the adapter for a model type, to be spoiled."""

    def copy(model_type: str) -> Path:
        return Path(shutil.copytree(SAVED / MODELS[model_type], tmp_path / "a"))

    return copy


@pytest.fixture
def read(tmp_path: Path, bases: Any) -> Callable[..., AdapterManifest]:
    def run(model_type: str) -> AdapterManifest:
        return read_manifest("a", tmp_path / "a", bases(model_type), [tmp_path], 64)

    return run


@pytest.fixture
def refused(read: Any) -> Callable[[str], str]:
    def run(model_type: str) -> str:
        with pytest.raises(FailedPreconditionError) as caught:
            read(model_type)
        assert caught.value.info.resource == ("adapter", "a")
        return str(caught.value)

    return run


def edit(folder: Path, file: str = "adapter_config.json", inner: str = "config", **settings: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text())
    (found[inner] if inner else found).update(settings)
    path.write_text(json.dumps(found))


def test_a_houlsby_adapter_of_the_library(folder: Any, read: Any, bases: Any, tmp_path: Path) -> None:
    path = folder("llama")
    manifest = read("llama")
    registry = bases("llama")
    assert (manifest.peft_type, manifest.linear, manifest.rank) == ("BOTTLENECK", False, 0)
    assert manifest.target_modules == ("down_proj", "o_proj")
    assert manifest.bottleneck is not None
    assert (manifest.bottleneck.non_linearity, manifest.bottleneck.reads) == ("swish", BottleneckReads.OUTPUT)
    widths = {registry.entries[entry].path: width for entry, width in manifest.bottleneck.widths.items()}
    assert widths == {
        "model.layers.0.self_attn.o_proj": 4,
        "model.layers.0.mlp.down_proj": 4,
        "model.layers.1.self_attn.o_proj": 6,
        "model.layers.1.mlp.down_proj": 6,
    }
    # The learned factor is a part of the second half.
    tensors = load_file(path / "adapter.safetensors")
    tensors = {name: torch.randn(value.shape) for name, value in tensors.items()}
    save_file(tensors, path / "adapter.safetensors")
    manifest = read("llama")
    layout = lay_out(manifest, extent_alignment(registry.row_lengths))
    blob = read_weights(manifest, layout, torch.float32, [tmp_path])
    pool = LoraPool.allocate(
        num_elements=layout.num_elements,
        num_slots=1,
        num_entries=len(registry),
        dtype=torch.float32,
        device="cpu",
    )
    pool.arena.copy_(blob.data)
    pool.bind(0, 0, layout)
    for entry, width in manifest.bottleneck.widths.items():
        place = registry.entries[entry].path
        kind = "attention" if "self_attn" in place else "output"
        layer = registry.entries[entry].address.layer
        prefix = f"model.layers.{layer}.{kind}_adapters.adapters.tiny"
        scale = tensors[f"{prefix}.scaling"]
        for vector, rows, expected in (
            (VectorKind.DOWN, width, tensors[f"{prefix}.adapter_down.0.weight"]),
            (VectorKind.UP, width, tensors[f"{prefix}.adapter_up.weight"].T * scale),
            (VectorKind.UP_BIAS, 1, tensors[f"{prefix}.adapter_up.bias"][None] * scale),
        ):
            assert torch.equal(pool.block(0, vector, entry, 32, 0, rows), expected)
        down_bias = pool.vector(0, VectorKind.DOWN_BIAS, entry, width)
        assert torch.equal(down_bias, tensors[f"{prefix}.adapter_down.0.bias"])


def test_a_parallel_adapter_of_the_library_with_its_interface(folder: Any, read: Any) -> None:
    folder("qwen2")
    manifest = read("qwen2")
    assert manifest.bottleneck is not None
    assert manifest.bottleneck.reads is BottleneckReads.RESIDUAL
    assert [site.entry.path for site in manifest.sites] == ["model.layers.1.mlp.down_proj"]
    assert manifest.weights_file == "adapter.safetensors"


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"original_ln_before": True}, BottleneckReads.SUM),
        ({"residual_before_ln": False}, BottleneckReads.OUTPUT),
        ({"adapter_residual_before_ln": True}, BottleneckReads.OUTPUT),
        ({"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
         BottleneckReads.SUM),
        ({"is_parallel": True, "original_ln_before": True}, BottleneckReads.RESIDUAL),
    ],
)  # fmt: skip
def test_what_a_network_reads(
    settings: dict[str, Any], reads: BottleneckReads, folder: Any, read: Any
) -> None:
    edit(folder("llama"), **settings)
    manifest = read("llama")
    assert manifest.bottleneck is not None
    assert manifest.bottleneck.reads is reads


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ln_before": True}, "ln_before is not served: a layer norm of the adapter's own"),
        ({"ln_after": True}, "ln_after is not served"),
        ({"use_gating": True}, "looks at the whole sequence"),
        ({"phm_layer": True}, "phm_layer is not served"),
        ({"inv_adapter": "nice"}, "inv_adapter is not served"),
        ({"original_ln_after": False}, "add the residual 0 times"),
        ({"original_ln_before": True, "residual_before_ln": False}, "add the residual 2 times"),
        ({"residual_before_ln": "post_add"}, "needs a norm that the model has not"),
        ({"non_linearity": "prelu"}, "non_linearity 'prelu' is not served; these are: gelu"),
        ({"non_linearity": 3}, "which is not a name"),
        ({"architecture": "lora"}, "architecture 'lora' of the adapters library is not served"),
        ({"architecture": "union", "configs": []}, "architecture 'union'"),
        ({"reduction_factor": 2}, "reduction_factor need [16, 32]"),
        ({"reduction_factor": {"0": 8}}, "reduction_factor says nothing of layer 1"),
        ({"reduction_factor": {"x": 8}}, "which is not a layer"),
        ({"reduction_factor": 0}, "not a usable factor"),
        ({"reduction_factor": 1e-320}, "not a usable factor"),
        ({"reduction_factor": 10**400}, "not a usable factor"),
        ({"scaling": 2.0}, "scaling' is not asked for"),
        ({"scaling": "channel"}, "need [32]"),
        ({"scaling": "other"}, "not a usable factor"),
        ({"leave_out": [1]}, "a place that the configuration leaves out"),
        ({"leave_out": ["1"]}, "not a list of layers"),
        ({"mh_adapter": False}, "a place that the configuration leaves out"),
        ({"mh_adapter": False, "output_adapter": False}, "it does nothing"),
        ({"is_parallel": 1}, "neither true nor false"),
        ({"wonder": True}, "setting 'wonder' is not known"),
    ],
)
def test_settings_that_cannot_be_served_are_named(
    settings: dict[str, Any], named: str, folder: Any, refused: Any
) -> None:
    edit(folder("llama"), **settings)
    assert named in refused("llama")


def test_a_model_of_another_kind_is_refused(folder: Any, refused: Any) -> None:
    path = folder("llama")
    assert "made for model_type 'llama', the base is 'qwen2'" in refused("qwen2")
    edit(path, inner="", hidden_size=64)
    assert "hidden_size is 64, that of the base is 32" in refused("llama")
    edit(path, inner="", config="pfeiffer")
    assert "only one that is spelled out" in refused("llama")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_pre_ffn": None}, "is_parallel needs a residual stream"),
        ({"layer_pre_ffn": "mlp"}, "not known what its network reads"),
        ({"layer_output_proj": "mlp.out"}, "has no 'mlp.out'"),
        ({"layer_output_proj": "mlp.up_proj"}, "that ends in the hidden size"),
        ({"layer_output_proj": None}, "does not say where attention and MLP end"),
        ({"layer_output_proj": 3}, "which is not a path"),
    ],
)
def test_interfaces_that_cannot_be_served_are_named(
    settings: dict[str, Any], named: str, folder: Any, refused: Any
) -> None:
    edit(folder("qwen2"), "adapter_interface.json", "interface", **settings)
    assert named in refused("qwen2")


def test_a_norm_after_the_sub_block_is_in_the_way_of_one_setting_only(
    folder: Any, read: Any, refused: Any
) -> None:
    path = folder("qwen2")
    edit(path, "adapter_interface.json", "interface", layer_ln_2="post_feedforward_layernorm")
    read("qwen2")
    edit(path, is_parallel=False, scaling=1.0)
    read("qwen2")
    edit(path, original_ln_before=True)
    assert "a norm after attention or MLP" in refused("qwen2")
    edit(path, original_ln_before=False, original_ln_after=False)
    assert "the model adds the residual itself" in refused("qwen2")


def test_files_that_cannot_be_served_are_named(folder: Any, refused: Any) -> None:
    path = folder("qwen2")
    (path / "adapter_interface.json").unlink()
    assert "adapter_interface.json is missing" in refused("qwen2")
    shutil.rmtree(path)
    path = folder("llama")
    (path / "model_head.safetensors").write_bytes(b"")
    assert "save the adapter with with_head=False" in refused("llama")
    (path / "model_head.safetensors").unlink()
    tensors = load_file(path / "adapter.safetensors")
    name = "model.layers.1.output_adapters.adapters.tiny.adapter_up.bias"
    save_file({key: value for key, value in tensors.items() if key != name}, path / "adapter.safetensors")
    assert "no adapter_up.bias for 'model.layers.1.mlp.down_proj'" in refused("llama")
    save_file({**tensors, name.removeprefix("model."): tensors[name].clone()}, path / "adapter.safetensors")
    assert "comes twice" in refused("llama")
    save_file({**tensors, "invertible_adapters.tiny.F.weight": torch.ones(2)}, path / "adapter.safetensors")
    assert "not part of a bottleneck adapter" in refused("llama")
    elsewhere = {key.replace("model.", "other.", 1): value for key, value in tensors.items()}
    save_file(elsewhere, path / "adapter.safetensors")
    assert "not part of a bottleneck adapter" in refused("llama")
    (path / "adapter.safetensors").unlink()
    assert "adapter.safetensors is missing" in refused("llama")
    (path / "pytorch_adapter.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_adapter.bin is a pickle" in refused("llama")


def test_an_uploaded_file_is_named_as_pefts(folder: Any, read: Any) -> None:
    path = folder("llama")
    (path / "adapter.safetensors").rename(path / "adapter_model.safetensors")
    assert read("llama").weights_file == "adapter_model.safetensors"


def test_what_old_files_call_gelu(folder: Any, read: Any) -> None:
    path = folder("llama")
    edit(path, non_linearity="gelu")
    assert read("llama").bottleneck.non_linearity == "gelu"
    config = json.loads((path / "adapter_config.json").read_text())
    del config["version"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert read("llama").bottleneck.non_linearity == "gelu_new"


def test_the_interface_is_part_of_its_identity(folder: Any, read: Any, tmp_path: Path) -> None:
    path = folder("qwen2")
    manifest = read("qwen2")
    layout = lay_out(manifest, 96)
    before = read_weights(manifest, layout, torch.float32, [tmp_path]).content_hash
    edit(path, "adapter_interface.json", "interface", layer_ln_2="some_norm")
    after = read_weights(read("qwen2"), layout, torch.float32, [tmp_path]).content_hash
    assert before != after
