"""Loading: the memory it takes, what is refused and why, and position embeddings that look at the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_server.config import ModelConfig
from loraplex_server.core.errors import FailedPreconditionError, NotFoundError, ServerError
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.load import architecture, loader
from loraplex_server.model.load.weight_format import resolve_device
from loraplex_server.model.run.selfcheck import check_ragged


def load(folder: Path, **options: Any) -> BaseModel:
    config = ModelConfig(str(folder), **{"dtype": "float32", **options})
    return loader.load(config, progress=False)


def save(config: Any, folder: Path) -> Path:
    """A random checkpoint of a transformers configuration."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def small(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **options,
    }


_MEASURE = """
import json, sys, threading, time
import torch
from loraplex_server.config import ModelConfig
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load import loader
import transformers.models.llama.modeling_llama  # its import must not be counted

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

torch.set_num_threads(1)
WeightFormat("nf4", torch.float32, torch.device("cpu")).freeze([torch.randn(256, 256)])
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
base = loader.load(ModelConfig(sys.argv[1], quantization=sys.argv[2]), progress=False)
done = True
thread.join()
print(json.dumps({"peak": peak - before, "resident": base.weight_bytes, "parameters": base.parameters}))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama of 50 million parameters in several files."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
@pytest.mark.parametrize("quantization", ["nf4", "int4"])
def test_memory_peaks_at_the_4_bit_model_and_a_few_tensors(sharded: Path, quantization: str) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(sharded), quantization]
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    bf16, largest = 2 * found["parameters"], 4 * 2048 * 2 * 768
    print(
        f"\n{quantization}: {found['parameters'] / 1e6:.0f} M parameters, bf16 {bf16 >> 20} MiB, resident "
        f"{found['resident'] >> 20} MiB, peak of anonymous memory while loading {found['peak'] >> 20} MiB"
    )
    # A few tensors: a gate and up pair in fp32 and the quantiser's chunks.
    assert found["peak"] < found["resident"] + 4 * largest
    assert found["peak"] < bf16


def test_the_whole_checkpoint_must_be_used(tiny: Any, tmp_path: Path) -> None:
    source = tiny("Llama").base
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"

    def attempt(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(FailedPreconditionError) as caught:
            load(tmp_path)
        return str(caught.value)

    assert name in attempt({key: tensor for key, tensor in tensors.items() if key != name})
    assert "model.extra" in attempt({**tensors, "model.extra": torch.zeros(2)})
    assert name in attempt({**tensors, name: torch.zeros(3, 3)})
    assert name.replace("up", "gate") in attempt({**tensors, name: tensors[name] * float("nan")})
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{rubbish")
    with pytest.raises(FailedPreconditionError, match="cannot be read as safetensors"):
        load(tmp_path)


def test_pickled_weights_are_never_read(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny("Llama").base / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FailedPreconditionError, match="save the model as safetensors"):
        load(tmp_path)


def test_a_model_that_is_nowhere_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no-such/model", "/no/such/folder"):
        with pytest.raises(NotFoundError, match="--model"):
            load(Path(name))


def _refused_configs() -> dict[str, Any]:
    import transformers

    return {
        "mixtral": transformers.MixtralConfig(**small(num_local_experts=2)),
        "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2),
        "bloom": transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2),
        "falcon": transformers.FalconConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
    }


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "bloom", "falcon"])
def test_an_architecture_that_cannot_be_served_is_refused_saying_why(kind: str, tmp_path: Path) -> None:
    folder = save(_refused_configs()[kind], tmp_path)
    with pytest.raises(FailedPreconditionError, match=f"'{kind}' cannot be served: ."):
        check_ragged(load(folder))


def test_quantised_and_multimodal_checkpoints_are_refused() -> None:
    from transformers import LlamaConfig

    quantised = LlamaConfig(**small())
    quantised.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(FailedPreconditionError, match="quantised already"):
        architecture.check(quantised)
    seeing = LlamaConfig(**small())
    seeing.vision_config = {"hidden_size": 8}
    with pytest.raises(FailedPreconditionError, match="multimodal"):
        architecture.check(seeing)


def test_position_embeddings_that_look_at_the_batch_are_served_where_they_do_not() -> None:
    """longrope and dynamic rope: frequencies follow the longest position of the row, beyond a length."""
    from transformers import LlamaConfig, Phi3Config

    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
    }
    phi = Phi3Config(
        **small(rope_parameters={**longrope, "rope_theta": 10000.0}, original_max_position_embeddings=16)
    )
    dynamic = LlamaConfig(
        **small(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    )
    plain = LlamaConfig(**small())
    assert architecture.longest_context(phi, 0) == 16
    assert architecture.longest_context(phi, 12) == 12
    assert architecture.longest_context(dynamic, 0) == 64
    assert architecture.longest_context(plain, 0) == 64
    for config, asked in ((phi, 17), (dynamic, 65), (plain, 65)):
        with pytest.raises(FailedPreconditionError, match="--max-model-len"):
            architecture.longest_context(config, asked)


def test_a_long_request_beside_a_short_one_changes_nothing_under_longrope(
    tmp_path: Path, harness: Any
) -> None:
    from transformers import Phi3Config

    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
    config = Phi3Config(**small(rope_parameters=longrope, original_max_position_embeddings=32))
    base = save(config, tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    model = type("Tiny", (), {"base": base, "adapters": tmp_path / "adapters"})
    alone = harness(model)
    short = alone.submit("short", [5, 6, 7], max_tokens=8, ignore_eos=True, logprobs=0)
    alone.run()
    assert alone.engine.info.max_model_len == 32
    mixed = harness(model)
    mixed.submit("long", list(range(1, 24)), max_tokens=8, ignore_eos=True)
    beside = mixed.submit("short", [5, 6, 7], max_tokens=8, ignore_eos=True, logprobs=0)
    mixed.run()
    assert beside.tokens == short.tokens
    assert [p.logprob for p in beside.logprobs] == pytest.approx(
        [p.logprob for p in short.logprobs], abs=1e-5
    )


@pytest.mark.parametrize("quantization", ["none", "nf4", "int4"])
def test_the_same_checkpoint_gives_the_same_checksum(quantization: str, tiny: Any) -> None:
    from loraplex_server.engine.audit import finish

    first, second = (load(tiny("Llama").base, quantization=quantization) for _ in range(2))
    assert finish(first.checksum_steps()) == finish(second.checksum_steps())
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ServerError, match="--device cpu"):
        resolve_device("cuda")
