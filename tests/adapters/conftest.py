"""Adapters as PEFT saves them, on tiny random models, and stores that serve them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base_model() -> Callable[[], LlamaForCausalLM]:
    """Makes the tiny base model; PEFT changes it and its configuration, so each is new."""

    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(copy.deepcopy(LLAMA))

    return make


@pytest.fixture(scope="session")
def registry() -> SiteRegistry:
    """Every linear of the tiny model's layers."""
    model = LlamaForCausalLM(LLAMA)
    linears = [
        (path, module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    ]
    kv_shapes = [(2, 8)] * LLAMA.num_hidden_layers
    residual = {
        path: f"{path.removesuffix('mlp.down_proj')}post_attention_layernorm"
        for path, _, _ in linears
        if path.endswith("mlp.down_proj")
    }
    return SiteRegistry(
        linears, hidden_size=LLAMA.hidden_size, kv_shapes=kv_shapes, model_type="tiny", residual=residual
    )


@pytest.fixture(scope="session")
def whole_registry() -> SiteRegistry:
    """Every place of the tiny model, its norms and the two ends of its vocabulary included."""
    return _whole_registry(tied=False)


@pytest.fixture(scope="session")
def tied_registry() -> SiteRegistry:
    """The same, for a model whose head is its embedding."""
    return _whole_registry(tied=True)


def _whole_registry(*, tied: bool) -> SiteRegistry:
    model = LlamaForCausalLM(LLAMA)
    modules = dict(model.named_modules())
    return SiteRegistry(
        [
            (path, module.in_features, module.out_features)
            for path, module in modules.items()
            if isinstance(module, torch.nn.Linear) and path != "lm_head"
        ],
        hidden_size=LLAMA.hidden_size,
        norms=[(path, LLAMA.hidden_size) for path in modules if path.endswith("norm")],
        embedding="model.embed_tokens",
        head="lm_head",
        vocabulary=LLAMA.vocab_size,
        tied=tied,
    )


@pytest.fixture
def save_peft(tmp_path: Path, base_model: Callable[[], LlamaForCausalLM]) -> Callable[..., Any]:
    """`save_peft(name, **settings)`: a random LoRA adapter, saved by PEFT; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    def save(name: str, seed: int = 1, **settings: Any) -> Any:
        settings.setdefault("init_lora_weights", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = base_model()
            torch.manual_seed(seed)
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
            model.save_pretrained(tmp_path / name)
        return model

    return save


@pytest.fixture
def write_adapter(registry: SiteRegistry) -> Callable[..., Path]:
    """Writes an adapter's two files quickly, as PEFT lays them out; `config` and `change` spoil them."""

    def write(
        folder: Path,
        *,
        rank: int = 4,
        modules: tuple[str, ...] = ("q_proj", "v_proj"),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        config: dict[str, Any] | None = None,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for entry in registry:
            if entry.path.rpartition(".")[2] in modules:
                prefix = f"base_model.model.{entry.path}"
                a = torch.randn(rank, entry.in_features, generator=generator)
                b = torch.randn(entry.out_features, rank, generator=generator)
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = (
                    a.to(dtype),
                    b.to(dtype),
                )
        if change is not None:
            change(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(modules),
            **(config or {}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    return write


@pytest.fixture
def make_store(registry: SiteRegistry) -> Iterator[Callable[..., AdapterStore]]:
    """Makes stores on the CPU, and in the end closes them and checks that they are whole."""
    stores: list[AdapterStore] = []

    def make(
        *folders: Path,
        device_bytes: int = 1 << 20,
        host_bytes: int = 1 << 20,
        max_on_device: int = 0,
        max_per_request: int = 8,
        dtype: torch.dtype = torch.float32,
        device_dtype: str = "auto",
        **options: Any,
    ) -> AdapterStore:
        config = AdapterConfig(
            folders=folders,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            max_on_device=max_on_device,
            max_per_request=max_per_request,
            device_dtype=device_dtype,
        )
        store = AdapterStore(registry, config, device="cpu", dtype=dtype, **options)
        stores.append(store)
        for folder in folders:
            store.intake.register_folder(folder)
        return store

    yield make
    for store in stores:
        store.close()
        assert store.check_integrity() == []


@pytest.fixture
def settle() -> Callable[[AdapterStore], None]:
    """Polls until the workers have nothing to do."""

    def run(store: AdapterStore) -> None:
        while store.busy:
            assert store.wait_event(20)
            store.poll()

    return run


@pytest.fixture
def bring(settle: Callable[[AdapterStore], None]) -> Callable[..., tuple[AdapterHandle, ...]]:
    """`bring(store, *names)`: resolves and reserves until READY."""

    def run(store: AdapterStore, *names: str) -> tuple[AdapterHandle, ...]:
        handles = store.requests.resolve(names)
        readiness = store.requests.reserve(handles)
        assert readiness in (Readiness.READY, Readiness.LOADING)
        settle(store)
        assert store.requests.is_ready(handles) is Readiness.READY
        return handles

    return run


@pytest.fixture
def served(registry: SiteRegistry) -> Callable[[AdapterStore, AdapterHandle, Path], bool]:
    """True if a handle's slot serves the weights in the folder, bit for bit."""

    def check(store: AdapterStore, handle: AdapterHandle, folder: Path) -> bool:
        slot = store.requests.slot(handle)
        tensors = load_file(folder / "adapter_model.safetensors")
        for entry in registry:
            prefix = f"base_model.model.{entry.path}"
            if f"{prefix}.lora_A.weight" not in tensors:
                assert int(store.pool.rank[slot, entry.index]) == 0
                continue
            a = store.pool.a(slot, entry.index, entry.in_features)
            b = store.pool.b(slot, entry.index, entry.out_features)
            if not torch.equal(a, tensors[f"{prefix}.lora_A.weight"]):
                return False
            if not torch.equal(b.T, 2 * tensors[f"{prefix}.lora_B.weight"]):
                return False
        return True

    return check


class Answer:
    """A callback that keeps what it is called with."""

    def __init__(self) -> None:
        self.value: Any = None
        self.calls = 0

    def __call__(self, value: Any = None) -> None:
        self.value = value
        self.calls += 1


@pytest.fixture
def answer() -> type[Answer]:
    """Makes callbacks that keep what they are called with."""
    return Answer
