"""The bytes that reach the device: PEFT's deltas, scaled and cast, or an error that names the tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex_kernels.pool import ALIGNMENT, LoraPool, extent_alignment
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.weights import HostBlob, lay_out, read_weights
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import FailedPreconditionError

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def read(tmp_path: Path, registry: SiteRegistry) -> Callable[..., tuple[AdapterManifest, HostBlob]]:
    def run(dtype: torch.dtype = torch.float32) -> tuple[AdapterManifest, HostBlob]:
        manifest = read_manifest("a", tmp_path / "a", registry, [tmp_path], 128)
        layout = lay_out(manifest, extent_alignment(registry.row_lengths))
        return manifest, read_weights(manifest, layout, dtype, [tmp_path])

    return run


@pytest.fixture
def factors(
    registry: SiteRegistry, read: Callable[..., Any]
) -> Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A and B transposed of each module, as the pool would serve them."""

    def run(dtype: torch.dtype = torch.float32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        manifest, blob = read(dtype)
        layout = lay_out(manifest, extent_alignment(registry.row_lengths))
        pool = LoraPool.allocate(
            num_elements=layout.num_elements,
            num_slots=1,
            num_entries=len(registry),
            dtype=dtype,
            device="cpu",
        )
        pool.arena.copy_(blob.data)
        pool.bind(0, 0, layout)
        return {
            entry.path: (
                pool.a(0, entry.index, entry.in_features),
                pool.b(0, entry.index, entry.out_features),
            )
            for entry, _ in manifest.pairs
        }

    return run


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 6, 7, 8, 12, 14, 32])
def test_deltas_are_those_of_peft(
    rank: int, use_rslora: bool, save_peft: Callable[..., Any], factors: Callable[..., Any]
) -> None:
    model = save_peft(
        "a",
        r=rank,
        lora_alpha=11,
        use_rslora=use_rslora,
        target_modules="all-linear",
        alpha_pattern={"v_proj": 3, r"layers\.1\.mlp\.down_proj": 40},
        rank_pattern={"k_proj": 5},
    )
    found = factors()
    assert len(found) == 14
    for path, (a, b) in found.items():
        expected = model.base_model.model.get_submodule(path).get_delta_weight("default").detach()
        assert expected.abs().max() > 0
        torch.testing.assert_close(b.T @ a, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_are_those_of_torch_bit_for_bit(
    stored: torch.dtype,
    dtype: torch.dtype,
    tmp_path: Path,
    write_adapter: Callable[..., Path],
    factors: Callable[..., Any],
) -> None:
    folder = write_adapter(tmp_path / "a", rank=6, dtype=stored, config={"lora_alpha": 7})
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, (a, b) in factors(dtype).items():
        stored_a = tensors[f"base_model.model.{path}.lora_A.weight"]
        stored_b = tensors[f"base_model.model.{path}.lora_B.weight"]
        assert torch.equal(a, stored_a.float().to(dtype))
        assert torch.equal(b, (stored_b.float().T * torch.tensor(7 / 6, dtype=torch.float32)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_and_keeps_small_numbers(
    dtype: torch.dtype, tmp_path: Path, write_adapter: Callable[..., Path], factors: Callable[..., Any]
) -> None:
    magnitudes = 10.0 ** torch.arange(-8, 8).repeat(7)
    values = torch.cat(
        [
            torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-38, 6e-8, 2.9e-8, -3.1e-8, 1 + 2**-9, 1 + 3 * 2**-9]),
            torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65503.0, -65519.0]),
            torch.randn(112, generator=torch.Generator().manual_seed(3)) * magnitudes,
        ]
    ).clamp(-65519, 65519)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_A.weight"] = values.view(4, 32)

    write_adapter(tmp_path / "a", change=change)
    a, _ = factors(dtype)[Q_PROJ.removeprefix("base_model.model.")]
    assert torch.equal(a.view(torch.int16), values.view(4, 32).to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_the_rank_are_zero(
    dtype: torch.dtype, tmp_path: Path, write_adapter: Callable[..., Path], read: Callable[..., Any]
) -> None:
    write_adapter(tmp_path / "a", rank=5)
    manifest, blob = read(dtype)
    filled = sum(5 * (entry.in_features + entry.out_features) for entry, _ in manifest.pairs)
    assert int((blob.data != 0).sum()) == filled
    assert blob.data.numel() > filled


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_never_admitted(
    poison: float,
    stored: torch.dtype,
    tmp_path: Path,
    write_adapter: Callable[..., Path],
    read: Callable[..., Any],
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_B.weight"][3, 1] = poison

    write_adapter(tmp_path / "a", dtype=stored, change=change)
    with pytest.raises(
        FailedPreconditionError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight' holds NaN"
    ):
        read()


@pytest.mark.parametrize(
    ("dtype", "part", "value", "alpha"),
    [
        (torch.float16, "A", 65520.0, 8),
        (torch.float16, "B", 20000.0, 16),
        (torch.bfloat16, "A", 3.4e38, 8),
        (torch.float32, "B", 3e38, 8),
    ],
)
def test_what_overflows_in_the_servers_dtype_is_refused(
    dtype: torch.dtype,
    part: str,
    value: float,
    alpha: int,
    tmp_path: Path,
    write_adapter: Callable[..., Path],
    read: Callable[..., Any],
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_{part}.weight"][3, 1] = value

    write_adapter(tmp_path / "a", change=change, config={"lora_alpha": alpha})
    with pytest.raises(FailedPreconditionError, match=rf"q_proj\.lora_{part}\.weight' has values too large"):
        read(dtype)
    if dtype == torch.float16:
        read(torch.float32)


def test_the_hash_is_of_the_file_and_the_configuration(
    tmp_path: Path, write_adapter: Callable[..., Path], read: Callable[..., Any]
) -> None:
    folder = write_adapter(tmp_path / "a")
    _, blob = read()
    config = json.dumps(
        json.loads((folder / "adapter_config.json").read_text()), sort_keys=True, separators=(",", ":")
    )
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert blob.content_hash == hashlib.sha256(config.encode() + b"\0" + weights).hexdigest()
    assert read(torch.bfloat16)[1].content_hash == blob.content_hash, "the server's dtype is no part of it"
    (folder / "adapter_config.json").write_text(json.dumps(json.loads(config), indent=4))
    assert read()[1].content_hash == blob.content_hash, "neither is white space"
    write_adapter(folder, config={"lora_alpha": 3})
    assert read()[1].content_hash != blob.content_hash
    write_adapter(folder, seed=1)
    assert read()[1].content_hash != blob.content_hash


def test_a_file_that_changed_since_it_was_looked_at_is_refused(
    tmp_path: Path, write_adapter: Callable[..., Path], registry: SiteRegistry
) -> None:
    folder = write_adapter(tmp_path / "a")
    manifest = read_manifest("a", folder, registry, [tmp_path], 128)
    layout = lay_out(manifest, 96)
    write_adapter(folder, rank=5)
    with pytest.raises(FailedPreconditionError, match="was changed since it was registered"):
        read_weights(manifest, layout, torch.float32, [tmp_path])


def test_an_alignment_that_was_given_up_is_given_up_for_each_adapter(
    tmp_path: Path, write_adapter: Callable[..., Path], registry: SiteRegistry
) -> None:
    manifest = read_manifest("a", write_adapter(tmp_path / "a"), registry, [tmp_path], 128)
    aligned, given_up = lay_out(manifest, 96), lay_out(manifest, 16)
    assert (aligned.alignment, given_up.alignment) == (96, 16)
    for layout in (aligned, given_up):
        shapes = zip(layout.entries, layout.a_offset, strict=True)
        assert all(offset % (shape.in_features if layout is aligned else 16) == 0 for shape, offset in shapes)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_8_bits_are_within_half_a_step(
    rank: int,
    file_dtype: torch.dtype,
    write_adapter: Callable[..., Path],
    registry: SiteRegistry,
    tmp_path: Path,
) -> None:
    folder = write_adapter(tmp_path / "a", rank=rank, dtype=file_dtype)
    manifest = read_manifest("a", folder, registry, [tmp_path], 128)
    exact_layout = lay_out(manifest, extent_alignment(registry.row_lengths))
    exact = read_weights(manifest, exact_layout, torch.float32, [tmp_path])
    layout = lay_out(manifest, ALIGNMENT, scaled=True)
    blob = read_weights(manifest, layout, torch.int8, [tmp_path])
    assert blob.data.dtype == torch.int8
    assert blob.content_hash == exact.content_hash
    pools = []
    for placed, data, scaled in ((exact_layout, exact.data, False), (layout, blob.data, True)):
        pool = LoraPool.allocate(
            num_elements=placed.num_elements,
            num_slots=1,
            num_entries=len(registry),
            dtype=torch.float32,
            device="cpu",
            scaled=scaled,
        )
        pool.arena[: data.numel()].copy_(data)
        pool.bind(0, 0, placed)
        pools.append(pool)
    truth, ours = pools
    for entry, _ in manifest.pairs:
        a, b = (
            truth.a(0, entry.index, entry.in_features).double(),
            truth.b(0, entry.index, entry.out_features).double(),
        )
        a_step, b_step = (rows.abs().amax(1) / 127 for rows in (a, b))
        scale = ours.scale(0, entry.index, entry.out_features).double()
        assert torch.allclose(scale, a_step * b_step, rtol=1e-5)
        quantized_a = ours.a(0, entry.index, entry.in_features).double()
        quantized_b = ours.b(0, entry.index, entry.out_features).double()
        assert int(quantized_a.abs().max()) == int(quantized_b.abs().max()) == 127
        assert float(((quantized_a * a_step[:, None] - a).abs() / a_step[:, None]).max()) <= 0.5001
        assert float(((quantized_b * b_step[:, None] - b).abs() / b_step[:, None]).max()) <= 0.5001
    held = sum(shape.rank_padded for shape in layout.entries)
    assert layout.num_elements < exact_layout.num_elements + 4 * held + ALIGNMENT * 3 * len(layout.entries)


def test_8_bits_of_a_row_of_zeros(
    write_adapter: Callable[..., Path], registry: SiteRegistry, tmp_path: Path
) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    folder = write_adapter(tmp_path / "a", rank=3, change=zero)
    manifest = read_manifest("a", folder, registry, [tmp_path], 128)
    layout = lay_out(manifest, ALIGNMENT, scaled=True)
    blob = read_weights(manifest, layout, torch.int8, [tmp_path])
    for shape, offset in zip(layout.entries, layout.scale_offset, strict=True):
        scales = blob.data[offset : offset + 4 * shape.rank_padded].view(torch.float32)
        assert scales[: shape.rank].tolist() == [1.0] * shape.rank
        blob.data[offset : offset + 4 * shape.rank_padded] = 0
    assert not blob.data.any()


def test_8_bits_need_a_layout_with_scales(
    write_adapter: Callable[..., Path], registry: SiteRegistry, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", rank=3)
    manifest = read_manifest("a", folder, registry, [tmp_path], 128)
    with pytest.raises(ValueError, match="blocks of scales"):
        read_weights(manifest, lay_out(manifest, ALIGNMENT), torch.int8, [tmp_path])
