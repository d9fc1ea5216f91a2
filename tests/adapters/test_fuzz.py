"""Spoiled adapter files of every kind: each gets a typed error or is whole; none crashes, none half applies.

`make test` takes 2,000 fresh inputs and every seed that once failed; `make fuzz` takes 100,000. The seed of
an input is its whole description: a failure prints it, and it belongs into `FAILED_ONCE` with the mending.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from loraplex_kernels.pool import MAX_RANK
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.weights import lay_out, read_weights
from loraplex_server.adapters.spec.sites import SiteKind, SiteRegistry
from loraplex_server.core.errors import ServerError
from loraplex_server.core.frozen_base import Array

FAILED_ONCE: tuple[int, ...] = (1795278554547034, 1795278821072657)
INPUTS = int(os.environ.get("LORAPLEX_FUZZ_INPUTS", "2000"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BOTTLENECK, INTERFACE = "adapter.safetensors", "adapter_interface.json"
TYPED = {"FAILED_PRECONDITION", "PERMISSION_DENIED", "NOT_FOUND"}

DECIDING = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "token_indices",
    "num_virtual_tokens",
    "peft_type",
)
DECIDING += ("mh_adapter", "output_adapter", "hidden_size", "scaling", "ln_before")
"""Settings of which another value would make another adapter of the same tensors."""

Files = dict[str, bytes]


class _Base:
    """A base whose weights are all ones, for DoRA."""

    def __init__(self, registry: SiteRegistry) -> None:
        self._entries = {entry.path: entry for entry in registry}

    def projection(self, path: str) -> Any:
        entry = self._entries[path]

        class Ones:
            def squared_norms(self) -> Any:
                return torch.full((entry.out_features,), float(entry.in_features)).double().numpy()

            def project(self, rows: Array) -> Any:
                return rows.sum(1, keepdims=True).repeat(entry.out_features, axis=1)

            def bias(self) -> None:
                return None

        return Ones()

    def changed_rows(self, path: str, first: int, rows: Array) -> Any:
        """The tables are all ones, too."""
        vocabulary = max(self._entries[path].in_features, self._entries[path].out_features)
        return (rows != 1).any(1) | (np.arange(first, first + len(rows)) >= vocabulary)


@pytest.fixture(scope="module")
def registry(whole_registry: SiteRegistry) -> SiteRegistry:
    """All that a model has for adapters to act on."""
    return whole_registry


@pytest.fixture(scope="module")
def originals(registry: SiteRegistry) -> list[Files]:
    """One whole adapter of each kind."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.5

    def lora(modules: tuple[str, ...], *parts: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for entry in registry:
            if entry.path.rpartition(".")[2] in modules:
                prefix = f"base_model.model.{entry.path}"
                tensors[f"{prefix}.lora_A.weight"] = draw(3, entry.in_features)
                tensors[f"{prefix}.lora_B.weight"] = draw(entry.out_features, 3)
                tensors |= {f"{prefix}.{part}": draw(entry.out_features) for part in parts}
        return tensors

    scales = {
        f"base_model.model.{entry.path}.ia3_l": draw(1, entry.in_features)
        if "down_proj" in entry.path
        else draw(entry.out_features, 1)
        for entry in registry
        if entry.path.rpartition(".")[2] in ("k_proj", "down_proj")
    }
    two = ("q_proj", "v_proj")
    base: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(two)}
    ia3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    kinds: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
        (base, lora(two)),
        ({**base, "use_dora": True}, lora(two, "lora_magnitude_vector")),
        ({**base, "lora_bias": True}, lora(two, "lora_B.bias")),
        ({**base, "alora_invocation_tokens": [3, 4]}, lora(two)),
        ({"peft_type": "IA3", **ia3}, scales),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 1},
            {"prompt_embeddings": draw(4, registry.hidden_size)},
        ),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_layers": 2, "token_dim": 16},
            {"prompt_embeddings": draw(3, 2 * 2 * 16)},
        ),
    ]
    prefix, hidden, vocabulary = "base_model.model", registry.hidden_size, registry.vocabulary
    embedding, head = f"{prefix}.model.embed_tokens", f"{prefix}.lm_head"
    ends = {
        f"{embedding}.lora_embedding_A": draw(3, vocabulary),
        f"{embedding}.lora_embedding_B": draw(hidden, 3),
        f"{head}.lora_A.weight": draw(3, hidden),
        f"{head}.lora_B.weight": draw(vocabulary, 3),
    }
    at_the_ends = {**base, "target_modules": [*two, "embed_tokens", "lm_head"]}
    tables = {f"{end}.base_layer.weight": torch.ones(vocabulary, hidden) for end in (embedding, head)}
    added = {name: torch.cat([table, draw(2, hidden)]) for name, table in tables.items()}
    copied = {
        f"{prefix}.{entry.path}.weight": draw(entry.out_features)
        if entry.kind is SiteKind.NORM
        else draw(entry.out_features, entry.in_features)
        for entry in registry
        if entry.path.endswith(("norm", "down_proj"))
    }
    kinds += [
        (at_the_ends, {**lora(two), **ends, **tables}),
        (
            at_the_ends,
            {
                **lora(two),
                **ends,
                **added,
                f"{embedding}.lora_embedding_A": draw(3, vocabulary + 2),
                f"{head}.lora_B.weight": draw(vocabulary + 2, 3),
            },
        ),
        (
            {**base, "modules_to_save": ["norm", "down_proj", "lm_head"]},
            {**lora(two), **copied, f"{head}.weight": draw(vocabulary, hidden)},
        ),
        (
            {**base, "trainable_token_indices": [3, 1]},
            {**lora(two), f"{embedding}.token_adapter.trainable_tokens_delta": draw(2, hidden)},
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": [5, 6]},
            {f"{embedding}.trainable_tokens_delta": draw(2, hidden)},
        ),
        (
            {"peft_type": "LN_TUNING", "target_modules": ["norm"]},
            {f"{prefix}.model.norm.ln_tuning_layers.weight": draw(hidden)},
        ),
    ]
    found = [{CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors)} for config, tensors in kinds]
    return [*found, _bottleneck(draw, registry)]


def _bottleneck(draw: Callable[..., torch.Tensor], registry: SiteRegistry) -> Files:
    """As the `adapters` library saves one for a model that it knows through an interface."""
    hidden, tensors = registry.hidden_size, {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.output_adapters.adapters.a"
        tensors[f"{prefix}.adapter_down.0.weight"] = draw(4, hidden)
        tensors[f"{prefix}.adapter_down.0.bias"] = draw(4)
        tensors[f"{prefix}.adapter_up.weight"] = draw(hidden, 4)
        tensors[f"{prefix}.adapter_up.bias"] = draw(hidden)
        tensors[f"{prefix}.scaling"] = draw(1)
    settings = {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "scaling": "learned"}
    settings |= {"reduction_factor": 8, "non_linearity": "relu", "leave_out": [], "ln_before": False}
    config = {"config": settings, "hidden_size": hidden, "model_type": "tiny", "name": "a", "version": "1"}
    parts = {"model_layers": "layers", "layer_self_attn": "self_attn", "attn_o_proj": "o_proj"}
    parts |= {"layer_output_proj": "mlp.down_proj", "layer_pre_ffn": "post_attention_layernorm"}
    return {
        CONFIG: json.dumps(config).encode(),
        BOTTLENECK: save(tensors),
        INTERFACE: json.dumps({"interface": parts}).encode(),
    }


def _spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    spoiled = bytearray(content)
    header_end = min(len(spoiled), 8 + int.from_bytes(spoiled[:8], "little"))
    limit = len(spoiled) if rng.random() < 0.3 else max(header_end, 1)
    at = rng.randrange(limit)
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 4)):
                spoiled[rng.randrange(limit)] = rng.randrange(256)
        case 1:
            spoiled[at] ^= 1 << rng.randrange(8)
        case 2:
            del spoiled[at:]
        case 3:
            del spoiled[at : at + rng.randint(1, 40)]
        case 4:
            spoiled[at:at] = rng.randbytes(rng.randint(1, 40))
        case 5:
            spoiled[:8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)]))
        case _:
            spoiled = bytearray(rng.randbytes(rng.randrange(400)))
    return bytes(spoiled)


def _odd(rng: random.Random) -> Any:
    """A value that a setting or a size may not be ready for."""
    choices: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e400, -0.0, 1e-320, "", "all-linear"]
    choices += ["../../etc/passwd", "(a+)+$", "\x00", "\ud800", [], {}, [[]], [None], {"": 1}, ["q_proj", 7]]
    return rng.choice(choices)


def _spoil_config(content: bytes, rng: random.Random) -> bytes:
    config = whole = json.loads(content)
    inner = next((key for key in ("config", "interface") if key in config), None)
    if inner is not None and rng.random() < 0.8:
        config = config[inner]
    for _ in range(rng.randint(1, 3)):
        known = [*config, "target_modules", "rank_pattern", "exclude_modules", "modules_to_save", "bias", "x"]
        known += ["trainable_token_indices", "token_indices", "ensure_weight_tying"]
        key = rng.choice(known)
        if rng.random() < 0.25:
            config.pop(key, None)
        else:
            config[key] = _odd(rng)
    return json.dumps(whole).encode("utf-8", "surrogatepass")


def _spoil_header(content: bytes, rng: random.Random) -> bytes:
    """A well-formed file whose header says something else."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    match rng.randrange(6):
        case 0:
            header[name]["shape"] = rng.choice(
                [header[name]["shape"][::-1], [_odd(rng)], _odd(rng), [1] * 99]
            )
        case 1:
            header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "f32", _odd(rng)])
        case 2:
            header[name]["data_offsets"] = rng.choice([[0, 0], [_odd(rng), _odd(rng)], _odd(rng)])
        case 3:
            odd = rng.choice(
                ["", "../x", name + ".x", name.replace("layers.0", "layers.7"), name[:-1], "\x00"]
            )
            header[odd] = header.pop(name)
        case 4:
            other = rng.choice(names)
            header[name], header[other] = header[other], header[name]
        case _:
            header.pop(name)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[end:]


def _spoil_tensors(content: bytes, rng: random.Random) -> bytes:
    """A valid file with other tensors in it."""
    tensors = load(content)
    name = rng.choice(list(tensors))
    value = tensors[name]
    match rng.randrange(5):
        case 0:
            value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), 3e38])
        case 1:
            tensors[name] = value.flatten()[None] if value.dim() == 1 else value.T.contiguous()
        case 2:
            tensors[name] = torch.ones(*value.shape[:-1], rng.choice([1, 7, 4096]))
        case 3:
            del tensors[name]
        case _:
            tensors[name + rng.choice([".x", "2", ".default"])] = value.clone()
    return save(tensors)


def _weights(files: Files) -> str:
    return next(name for name in files if name.endswith(".safetensors"))


def _make(seed: int, originals: list[Files], folder: Path) -> Files:
    """The input of a seed, written to `folder`; returns the original that it was made from."""
    rng = random.Random(seed)
    original = rng.choice(originals)
    files = dict(original)
    weights = _weights(files)
    config = rng.choice([name for name in files if name != weights])
    match rng.randrange(6):
        case 0 | 1:
            files[weights] = _spoil_bytes(files[weights], rng)
        case 2:
            files[config] = _spoil_bytes(files[config], rng)
        case 3:
            files[config] = _spoil_config(files[config], rng)
        case 4:
            files[weights] = _spoil_header(files[weights], rng)
        case _:
            files[weights] = _spoil_tensors(files[weights], rng)
    for name in {WEIGHTS, BOTTLENECK, INTERFACE} - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return original


def _check(seed: int, originals: list[Files], folder: Path, registry: SiteRegistry) -> str:
    """Loads the input of a seed; what became of it."""
    original = _make(seed, originals, folder)
    refusal: ServerError | None = None
    try:
        base = _Base(registry)
        manifest = read_manifest("fuzzed", folder, registry, [folder], MAX_RANK, base=base)
        blob = read_weights(manifest, lay_out(manifest, 96), torch.float32, [folder], base)
    except ServerError as error:
        refusal = error
    if refusal is not None:
        text = str(refusal)
        assert refusal.code in TYPED, text
        assert "'fuzzed'" in text
        assert text.isascii()
        assert len(text) < 1000
        assert str(folder) not in text
        return "refused"
    assert torch.isfinite(blob.data).all()
    weights = _weights(original)
    served = load((folder / weights).read_bytes())
    whole = load(original[weights])
    # A table of the base may be left out: nothing is applied for it.
    for name in [name for name, value in whole.items() if "base_layer" in name and (value == 1).all()]:
        whole.pop(name)
        served.pop(name, None)
    assert {name: value.shape for name, value in served.items()} == {
        name: value.shape for name, value in whole.items()
    }, "admitted with other tensors than a whole adapter has"
    before, after = json.loads(original[CONFIG]), json.loads((folder / CONFIG).read_bytes())
    if "config" in before:
        # Beside it anything may stand, and says nothing.
        before = {**before["config"], "hidden_size": before["hidden_size"]}
        after = {**after["config"], "hidden_size": after["hidden_size"]}
    for config in (before, after):
        # Names of modules are endings of paths: what counts is what they name.
        names = tuple(config.get("modules_to_save") or ())
        config["modules_to_save"] = [entry.path for entry in registry if entry.path.endswith(names)]
        # Which tokens the rows are for, the file alone says, as it says a scale: their number can be wrong.
        for key in ("trainable_token_indices", "token_indices"):
            if isinstance(config.get(key), list):
                config[key] = len(config[key])
    for key in DECIDING:
        assert (before.get(key) or None) == (after.get(key) or None), f"admitted with another {key}"
    return "admitted"


def test_spoiled_adapters_are_refused_or_whole(
    originals: list[Files], tmp_path: Path, registry: SiteRegistry
) -> None:
    first = time.time_ns() // 1000
    counts = {"refused": 0, "admitted": 0}
    for seed in (*FAILED_ONCE, *range(first, first + INPUTS)):
        try:
            counts[_check(seed, originals, tmp_path, registry)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    print(f"\n{INPUTS} inputs: {counts}")
    assert counts["refused"] > INPUTS / 2
    assert counts["admitted"] > INPUTS / 100, "the fuzz never left an adapter whole, so it proves little"


def _symlink_out(folder: Path, outside: Path) -> None:
    (outside / "secret").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / "secret")


def _loop(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)


def _fifo(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _directory(folder: Path, outside: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def _pickle(folder: Path, outside: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def _disguised_pickle(folder: Path, outside: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / WEIGHTS)


def _zip_bomb(folder: Path, outside: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data", b"\0" * (1 << 24))


def _sparse(folder: Path, outside: Path) -> None:
    """A header of 2 GiB that takes no room on the disk."""
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**32)


def _nested(folder: Path, outside: Path) -> None:
    (folder / CONFIG).write_bytes(b'{"peft_type":' + b"[" * 200_000)


@pytest.mark.parametrize(
    "trick",
    [_symlink_out, _loop, _fifo, _directory, _pickle, _disguised_pickle, _zip_bomb, _sparse, _nested],
)
def test_tricks_with_files_are_refused_at_once(
    trick: Callable[[Path, Path], None],
    originals: list[Files],
    tmp_path: Path,
    registry: SiteRegistry,
) -> None:
    folder, outside = tmp_path / "root" / "fuzzed", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    for name, content in originals[0].items():
        (folder / name).write_bytes(content)
    trick(folder, outside)
    with pytest.raises(ServerError) as caught:
        read_manifest("fuzzed", folder, registry, [tmp_path / "root"], MAX_RANK)
    assert caught.value.code in TYPED | {"UNAVAILABLE"}
