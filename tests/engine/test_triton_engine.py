"""`--kernels triton` through the whole engine: natively on CUDA, under Triton's interpreter elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_SCRIPT = """
import json, sys
from pathlib import Path
from loraplex_kernels import dispatch
from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.build import build_engine

base, adapters, kernels, device = sys.argv[1:]
every_use = {"one": [("r6", 1.0)], "two": [("r16", 1.0)], "three": [("r32", 1.0)],
             "sum": [("r6", 0.5), ("r16", 0.5)], "ends": [("ends", 1.0)], "base": []}

def serve(quantization, uses, max_tokens):
    answers = {}
    def collect(client, message):
        for delta in message.deltas:
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)

    config = EngineConfig(
        ModelConfig(
            base, quantization=quantization, device=device, dtype="float32", kernels=kernels, threads=1
        ),
        SchedulerConfig(max_batch_tokens=32, kv_cache_bytes=1 << 20),
        AdapterConfig(folders=(Path(adapters),), device_bytes=1 << 20),
    )
    dispatch.launches.clear()
    engine = build_engine(config, collect, progress=False)
    for index, (name, chosen) in enumerate(uses.items()):
        engine.submit("test", Request(name, tuple(range(5 + index, 11 + index)),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            tuple(AdapterUse(*use) for use in chosen)))
    while engine.has_work:
        if not engine.step():
            engine.adapters.wait_event(0.05)
    problems = engine.check_integrity().problems
    engine.adapters.close()
    return {"answers": answers, "launches": dict(dispatch.launches), "problems": problems}

print(json.dumps({
    "nf4": serve("nf4", every_use, 4),
    "int4": serve("int4", {name: every_use[name] for name in ("three", "base")}, 3),
}))
"""


def _serve(tiny_model: Any, kernels: str, device: str) -> dict[str, Any]:
    """The engine in a process of its own: the interpreter is chosen before Triton is imported."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TRITON_DEFAULT_FP_FUSION="1")
    if kernels == "triton" and device == "cpu":
        env["TRITON_INTERPRET"] = "1"
    arguments = [str(tiny_model.base), str(tiny_model.adapters), kernels, device]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def one_layer(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The first layer of the tiny Llama alone, and the adapters cut to it."""
    import dataclasses

    from safetensors.torch import load_file, save_file

    whole = tiny("Llama")
    folder = tmp_path_factory.mktemp("one-layer")
    (folder / "base").mkdir()
    config = json.loads((whole.base / "config.json").read_text()) | {"num_hidden_layers": 1}
    config.pop("layer_types", None)
    (folder / "base" / "config.json").write_text(json.dumps(config))

    def cut(source: Path, target: Path) -> None:
        tensors = {name: t for name, t in load_file(source).items() if ".layers.1." not in name}
        save_file(tensors, target)

    cut(whole.base / "model.safetensors", folder / "base" / "model.safetensors")
    for name in ("r6", "r16", "r32"):
        target = folder / "adapters" / name
        target.mkdir(parents=True)
        options = json.loads((whole.adapters / name / "adapter_config.json").read_text())
        options["layers_to_transform"] = None
        (target / "adapter_config.json").write_text(json.dumps(options))
        # r16 acts on the second layer only: it lends its tensors to the first.
        tensors = load_file(whole.adapters / name / "adapter_model.safetensors")
        if name == "r16":
            tensors = {key.replace(".layers.1.", ".layers.0."): t for key, t in tensors.items()}
        tensors = {key: t.contiguous() for key, t in tensors.items() if ".layers.0." in key}
        save_file(tensors, target / "adapter_model.safetensors")
    _write_ends(folder / "adapters" / "ends")
    return dataclasses.replace(whole, base=folder / "base", adapters=folder / "adapters")


def _write_ends(folder: Path) -> None:
    """An adapter of the embedding and the head, whose rows are as long as an odd vocabulary."""
    from safetensors.torch import save_file

    generator, vocabulary, hidden = torch.Generator().manual_seed(4), 211, 64

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    prefix = "base_model.model"
    tensors = {
        f"{prefix}.model.embed_tokens.lora_embedding_A": draw(5, vocabulary, scale=1),
        f"{prefix}.model.embed_tokens.lora_embedding_B": draw(hidden, 5, scale=0.3),
        f"{prefix}.lm_head.lora_A.weight": draw(5, hidden, scale=0.1),
        f"{prefix}.lm_head.lora_B.weight": draw(vocabulary, 5, scale=0.5),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 5, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(options))


@pytest.fixture(scope="module")
def served(one_layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of the torch references and of the kernels, by quantisation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _serve(one_layer, "torch", device), _serve(one_layer, "triton", device)


@pytest.mark.slow
def test_triton_answers_as_torch_does(served: tuple[dict[str, Any], dict[str, Any]]) -> None:
    truth, found = served[0]["nf4"], served[1]["nf4"]
    assert found["answers"] == truth["answers"]
    assert len({tuple(tokens) for tokens in found["answers"].values()}) == 6, "adapters must be told apart"
    assert found["launches"]["lora.shrink.triton"] > 0
    assert found["launches"]["attention.triton"] == found["launches"]["rotary.write.triton"] > 0
    # One layer: the sums before its MLP and after it, the first norm alone, one gate.
    assert found["launches"]["norm.add_rms.triton"] == 2 * found["launches"]["norm.rms.triton"] > 0
    assert found["launches"]["gated.triton"] == found["launches"]["norm.rms.triton"]
    assert found["launches"]["lora.expand.triton"] == found["launches"]["lora.shrink.triton"]
    # q·k·v, o and gate·up are one launch each; down, 96 wide, is no multiple of NF4's block.
    assert found["launches"]["vocabulary.add_low_rank.torch"] > 0
    assert found["launches"]["nf4.matmul.triton"] > 0
    assert found["launches"]["nf4.matmul.triton"] % 3 == 0
    assert not any(name.endswith("triton") for name in truth["launches"])
    assert found["problems"] == truth["problems"] == []


@pytest.mark.slow
def test_triton_answers_as_torch_does_in_int4(served: tuple[dict[str, Any], dict[str, Any]]) -> None:
    truth, found = served[0]["int4"], served[1]["int4"]
    assert found["answers"] == truth["answers"]
    assert len({tuple(tokens) for tokens in found["answers"].values()}) == 2
    assert found["launches"]["int4.matmul.triton"] > 0
    assert found["launches"]["int4.matmul.triton"] % 4 == 0
    assert found["problems"] == truth["problems"] == []
