"""Shared fixtures: tiny checkpoints of real architectures, PEFT adapters for them, and the oracle."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ADAPTERS: dict[str, dict[str, Any]] = {
    "r6": {"r": 6, "lora_alpha": 6, "target_modules": "all"},
    "r7": {"r": 7, "lora_alpha": 16, "target_modules": "attention", "use_rslora": True},
    "r8": {"r": 8, "lora_alpha": 8, "target_modules": "all", "rank_pattern": {r".*layers\.1\..*": 3}},
    "r12": {"r": 12, "lora_alpha": 32, "target_modules": "mlp"},
    "r14": {"r": 14, "lora_alpha": 14, "target_modules": "all", "use_rslora": True},
    "r16": {"r": 16, "lora_alpha": 16, "target_modules": "all", "layers_to_transform": [1]},
    "r32": {"r": 32, "lora_alpha": 64, "target_modules": "attention", "alpha_pattern": {"o_proj": 8}},
    "r4": {"r": 4, "lora_alpha": 2, "target_modules": "all"},
}
_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
_FUSED = {"attention": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]}


@pytest.fixture(scope="session")
def adapter_names() -> list[str]:
    """The adapters that `tiny` makes for each architecture: mixed ranks, alphas, targets and patterns."""
    return list(ADAPTERS)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A checkpoint and its adapters on disk."""

    base: Path
    adapters: Path


@dataclasses.dataclass(frozen=True)
class Certificate:
    """PEM files: a certificate, its key, and the authority that signed it."""

    certificate: Path
    key: Path
    ca: Path


@pytest.fixture(scope="session")
def issue(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Certificate]:
    """Makes a certificate for some host names, signed by an authority of its own."""
    import trustme

    def make(*names: str, common_name: str | None = None, authority: Any = None) -> Certificate:
        folder = tmp_path_factory.mktemp("certificates")
        authority = authority or trustme.CA()
        found = Certificate(folder / "certificate.pem", folder / "key.pem", folder / "ca.pem")
        leaf = authority.issue_cert(*names, common_name=common_name)
        leaf.private_key_pem.write_to_path(found.key)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(found.certificate, append=True)
        authority.cert_pem.write_to_path(found.ca)
        return found

    return make


def _config(architecture: str) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    extra: dict[str, dict[str, Any]] = {
        "Llama": {},
        "Mistral": {"sliding_window": 9},
        "Qwen2": {},
        "Qwen3": {"head_dim": 16},
        "Gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
        "Gemma3Text": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
        "Phi3": {},
    }
    return getattr(transformers, f"{architecture}Config")(**common, **extra[architecture])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Makes (once a session) a random checkpoint of an architecture, and adapters with non-zero A and B.

    Weights are far larger than transformers initialises them, so that the two best tokens are well apart
    and every layer matters.
    """
    made: dict[str, TinyModel] = {}

    def make(architecture: str) -> TinyModel:
        if architecture not in made:
            made[architecture] = _make(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return make


def _make(architecture: str, folder: Path) -> TinyModel:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(9)

    def randomise(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    model = AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            # Gemma uses its embeddings as its head: large ones would repeat the last token for ever.
            randomise(parameter, 0.02 if architecture.startswith("Gemma") else 1.0)
        elif name.endswith("bias"):
            randomise(parameter, 0.5)
        elif parameter.ndim > 1:
            gain = 3.0 if "o_proj" in name or "down_proj" in name else 1.5
            randomise(parameter, gain * parameter.shape[1] ** -0.5)
        else:
            randomise(parameter, 0.2, 0.0 if architecture.startswith("Gemma") else 1.0)
    model.save_pretrained(folder / "base")
    targets = _FUSED if architecture == "Phi3" else _TARGETS
    targets = {**targets, "all": targets["attention"] + targets["mlp"]}
    for name, options in ADAPTERS.items():
        chosen = {**options, "target_modules": targets[options["target_modules"]]}
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        peft = get_peft_model(base, LoraConfig(**chosen))
        scale = options["lora_alpha"] / options["r"] ** (0.5 if options.get("use_rslora") else 1.0)
        for key, parameter in peft.named_parameters():
            if "lora_A" in key:
                randomise(parameter, parameter.shape[1] ** -0.5)
            elif "lora_B" in key:
                randomise(parameter, 0.8 / (scale * parameter.shape[1] ** 0.5))
        peft.save_pretrained(folder / "adapters" / name)
    return TinyModel(folder / "base", folder / "adapters")


class Oracle:
    """transformers + PEFT in fp32 on the dequantised weights, one request at a time."""

    def __init__(
        self, tiny: TinyModel, quantization: str, dtype: str = "float32", added_tokens: int = 0
    ) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from loraplex_kernels.quant import int4, nf4

        base = AutoModelForCausalLM.from_pretrained(
            tiny.base, dtype=torch.float32, attn_implementation="eager"
        )
        for path, module in base.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in path:
                if quantization == "nf4":
                    module.weight.data = nf4.dequantize(nf4.quantize(module.weight.data))
                elif quantization == "int4":
                    module.weight.data = int4.dequantize(int4.quantize(module.weight.data))
        base.to(getattr(torch, dtype))
        if added_tokens:
            base.resize_token_embeddings(base.config.vocab_size + added_tokens, mean_resizing=False)
        names = sorted(path.name for path in tiny.adapters.iterdir())
        self._model = PeftModel.from_pretrained(base, tiny.adapters / names[0], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(tiny.adapters / name, adapter_name=name)
        self._model.to(getattr(torch, dtype)).eval()

    def generate(
        self, prompt: Sequence[int], adapters: Sequence[tuple[str, float]], max_tokens: int
    ) -> tuple[list[int], Any]:
        """Greedy tokens (end of sequence ignored) and the logits [max_tokens, vocabulary] behind them.

        One adapter at weight 1 runs as PEFT runs it; a composition is the base plus the weighted sum of
        PEFT's own delta weights.
        """
        import torch

        model = self._model
        with torch.inference_mode():
            if not adapters:
                with model.disable_adapter():
                    return self._generate(prompt, max_tokens)
            if len(adapters) == 1 and adapters[0][1] == 1.0:
                model.set_adapter(adapters[0][0])
                return self._generate(prompt, max_tokens)
            before = self._add_deltas(adapters)
            try:
                with model.disable_adapter():
                    return self._generate(prompt, max_tokens)
            finally:
                for layer, weight in before:
                    layer.weight.data = weight

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Any:
        """Logits [len(tokens), vocabulary], fp32, of one forward pass with an adapter or none."""
        import torch

        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            if adapter is None:
                with self._model.disable_adapter():
                    return self._model(input_ids=ids, use_cache=False).logits[0].float()
            self._model.set_adapter(adapter)
            return self._model(input_ids=ids, use_cache=False).logits[0].float()

    def _add_deltas(self, adapters: Sequence[tuple[str, float]]) -> list[tuple[Any, Any]]:
        from peft.tuners.lora import LoraLayer

        before = []
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                before.append((layer, layer.weight.data))
                weight = layer.weight.data.clone()
                for name, factor in adapters:
                    if name in module.lora_A:
                        weight += factor * module.get_delta_weight(name)
                layer.weight.data = weight
        return before

    def _generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], Any]:
        import torch

        ids = torch.tensor([list(prompt)])
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)


@pytest.fixture(scope="session")
def oracle(tiny: Callable[[str], TinyModel]) -> Callable[..., Oracle]:
    """`oracle(architecture, quantization, dtype="float32")`, made once a session."""
    made: dict[tuple[str, str, str], Oracle] = {}

    def make(architecture: str, quantization: str, dtype: str = "float32") -> Oracle:
        key = architecture, quantization, dtype
        if key not in made:
            made[key] = Oracle(tiny(architecture), quantization, dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def judge() -> Callable[..., Oracle]:
    """`judge(base, adapters, quantization, added_tokens=0, dtype="float32")`: an oracle for the adapters in
    one folder, all of one method, and all with so many tokens of their own.
    """

    def make(
        base: Path, adapters: Path, quantization: str, added_tokens: int = 0, dtype: str = "float32"
    ) -> Oracle:
        return Oracle(TinyModel(base, adapters), quantization, dtype, added_tokens)

    return make


@pytest.fixture
def under_the_interpreter(pytestconfig: pytest.Config) -> Callable[..., None]:
    """`under_the_interpreter(__file__, marker, only="")`: that file's tests once more, in a process of their
    own with Triton's interpreter, which has to be chosen before a kernel is imported."""

    def run(file: str, marker: str, only: str = "") -> None:
        pytest.importorskip("triton")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", "-m", marker]
        command += ["-k", only] if only else []
        result = subprocess.run(
            command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert re.search(r"^\d+ passed", result.stdout, re.MULTILINE), result.stdout[-2000:]

    return run


def save_bottleneck(base: Path, folder: Path, settings: Mapping[str, Any], seed: int) -> None:
    """A bottleneck adapter with random values, as the `adapters` library saves one of these settings."""
    import json

    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    hidden, model_type = config["hidden_size"], config["model_type"]
    defaults: dict[str, Any] = {
        "mh_adapter": False,
        "output_adapter": False,
        "reduction_factor": 16,
        "non_linearity": "relu",
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": False,
        "scaling": 1.0,
        "leave_out": [],
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "inv_adapter": None,
        "phm_layer": False,
        "phm_dim": 4,
        "use_gating": False,
        "init_weights": "bert",
        "dropout": 0.1,
    }
    settings = {**defaults, **settings}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    tensors = {}
    for layer in set(range(config["num_hidden_layers"])) - set(settings["leave_out"]):
        factor = settings["reduction_factor"]
        factor = factor.get(str(layer), factor.get("default")) if isinstance(factor, dict) else factor
        width = int(hidden // factor)
        for place, used in (("attention", "mh_adapter"), ("output", "output_adapter")):
            if settings[used]:
                prefix = f"model.layers.{layer}.{place}_adapters.adapters.mine"
                tensors |= {
                    f"{prefix}.adapter_down.0.weight": draw(width, hidden, std=hidden**-0.5),
                    f"{prefix}.adapter_down.0.bias": draw(width, std=0.5),
                    f"{prefix}.adapter_up.weight": draw(hidden, width, std=width**-0.5),
                    f"{prefix}.adapter_up.bias": draw(hidden, std=0.3),
                }
                if isinstance(settings["scaling"], str):
                    size = hidden if settings["scaling"] == "channel" else 1
                    tensors[f"{prefix}.scaling"] = draw(size, std=0.2, mean=0.8)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    written = {
        "config": settings,
        "hidden_size": hidden,
        "model_class": "AutoModelForCausalLM",
        "model_name": "",
        "model_type": model_type,
        "name": "mine",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    if model_type not in ("llama", "mistral"):
        before_mlp = "pre_feedforward_layernorm" if "gemma" in model_type else "post_attention_layernorm"
        interface = {
            "adapter_methods": ["bottleneck"],
            "model_embeddings": "embed_tokens",
            "model_layers": "layers",
            "layer_self_attn": "self_attn",
            "attn_o_proj": "o_proj",
            "layer_output_proj": "mlp.down_proj",
            "layer_pre_self_attn": "input_layernorm",
            "layer_pre_ffn": before_mlp,
            "layer_ln_1": None,
            "layer_ln_2": None,
        }
        written = {"interface": interface, "model_type": model_type, "version": "adapters.1.3.0"}
        (folder / "adapter_interface.json").write_text(json.dumps(written))


class BottleneckOracle(Oracle):
    """transformers with a bottleneck adapter hooked in, one request at a time; PEFT's adapter is off.

    Held to the `adapters` library: on each of its models the same arithmetic gave its logits bit for bit.
    """

    def __init__(self, tiny: TinyModel, quantization: str, adapter: Path, dtype: str = "float32") -> None:
        import json

        import torch
        from safetensors.torch import load_file

        super().__init__(tiny, quantization, dtype)
        tensors = load_file(adapter / "adapter.safetensors")
        self._tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
        self._settings = json.loads((adapter / "adapter_config.json").read_text())["config"]
        self._streams: dict[str, Any] = {}
        for layer, block in enumerate(self._model.get_base_model().model.layers):
            norm = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
            for place, before, end in (
                ("attention", block.input_layernorm, block.self_attn.o_proj),
                ("output", norm, block.mlp.down_proj),
            ):
                self._hook(f"model.layers.{layer}.{place}_adapters.adapters.mine", before, end)

    def _hook(self, prefix: str, before: Any, end: Any) -> None:
        if f"{prefix}.adapter_up.weight" not in self._tensors:
            return
        before.register_forward_pre_hook(
            lambda module, args: self._streams.__setitem__(prefix, args[0]),
        )
        end.register_forward_hook(lambda module, args, output: self._add(prefix, output))

    def _add(self, prefix: str, output: Any) -> Any:
        import torch.nn.functional as F
        from transformers.activations import ACT2FN

        settings = self._settings
        stream = self._streams[prefix]
        read = output
        if settings["is_parallel"]:
            read = stream
        elif settings["original_ln_before"]:
            read = output + stream
        part = {name: self._tensors[f"{prefix}.{name}"] for name in _BOTTLENECK_PARTS}
        name = settings["non_linearity"]
        bend = F.leaky_relu if name == "leakyrelu" else ACT2FN[name]
        narrow = bend(F.linear(read, part["adapter_down.0.weight"], part["adapter_down.0.bias"]))
        scale = settings["scaling"]
        scale = self._tensors[f"{prefix}.scaling"] if isinstance(scale, str) else scale
        return output + scale * F.linear(narrow, part["adapter_up.weight"], part["adapter_up.bias"])

    def generate(
        self, prompt: Sequence[int], adapters: Sequence[tuple[str, float]], max_tokens: int
    ) -> tuple[list[int], Any]:
        import torch

        with torch.inference_mode(), self._model.disable_adapter():
            return self._generate(prompt, max_tokens)

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Any:
        return super().logits(tokens, None)


_BOTTLENECK_PARTS = (
    "adapter_down.0.weight",
    "adapter_down.0.bias",
    "adapter_up.weight",
    "adapter_up.bias",
)


@pytest.fixture(scope="session")
def bottlenecks() -> tuple[Callable[..., None], Callable[..., BottleneckOracle]]:
    """`save(base, folder, settings, seed)`, and `judge(base, peft_folder, quantization, adapter, dtype)`."""

    def judge(
        base: Path, peft: Path, quantization: str, adapter: Path, dtype: str = "float32"
    ) -> BottleneckOracle:
        return BottleneckOracle(TinyModel(base, peft), quantization, adapter, dtype)

    return save_bottleneck, judge


@dataclasses.dataclass(frozen=True)
class S3Server:
    """An S3 server on loopback (moto), and what a client needs in its environment."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, files: Mapping[str, bytes]) -> None:
        """Makes objects, by bucket and key, and their buckets."""
        import fsspec

        filesystem = fsspec.filesystem(
            "s3",
            key="test",
            secret="test",
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "eu-west-1"},
            use_listings_cache=False,
        )
        for bucket in {path.partition("/")[0] for path in files}:
            if not filesystem.exists(bucket):
                filesystem.mkdir(bucket)
        for path, body in files.items():
            filesystem.pipe_file(path, body)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        endpoint = next(match[0] for match in found if match)
        # Drained all the while, so that the server never waits for a reader of its log.
        drain = threading.Thread(target=list, args=(process.stdout,), daemon=True)
        drain.start()
        yield S3Server(endpoint)
        process.terminate()
        drain.join(timeout=20)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """One thread: two beside a busy machine make single operations take milliseconds."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("loraplex_server").setLevel(logging.WARNING)
