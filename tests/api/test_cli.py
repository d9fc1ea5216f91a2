"""The command line: flags to configuration, and what happens to bad ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.cli import main
from loraplex_server.config import EngineConfig, ModelConfig, ServerConfig
from loraplex_server.config.cli import resolve
from loraplex_server.config.layers import known_settings


def parse(*argv: str) -> ServerConfig:
    return resolve(argv, environ={}).to_config()


def test_defaults_are_those_of_the_configuration() -> None:
    assert parse("--model", "m") == ServerConfig(EngineConfig(ModelConfig("m")))


def test_every_flag_arrives(tmp_path: Path) -> None:
    one, two, root = (tmp_path / name for name in ("one", "two", "root"))
    for folder in (one, two, root):
        folder.mkdir()
    config = parse(
        *("--model", "org/model", "--quantization", "int4", "--double-quant", "--device", "cuda"),
        *("--dtype", "bfloat16", "--kernels", "triton", "--threads", "3"),
        *("--adapters", str(one), "--adapters", str(two), "--adapter-root", str(root)),
        *("--adapter-device-bytes", "512MiB", "--adapter-host-bytes", "2GB", "--max-adapters-on-device", "7"),
        *("--adapter-device-dtype", "int8", "--adapter-max-bytes", "64MiB"),
        *("--max-adapters-per-request", "2", "--max-batch-tokens", "1024", "--max-num-requests", "9"),
        *(
            "--max-queue",
            "11",
            "--max-model-len",
            "4096",
            "--kv-cache-bytes",
            "1.5g",
            "--kv-block-size",
            "32",
        ),
        *("--max-adapter-wait", "0.5", "--host", "::1", "--port", "0", "--metrics-port", "-1"),
        *("--max-message-bytes", "4MiB", "--drain-seconds", "2.5"),
        *("--adapter-source", "s3://bucket/a", "--adapter-source", "hf://owner"),
        *("--adapter-cache-dir", str(root / "new"), "--adapter-cache-bytes", "3GiB"),
        *("--adapter-download-max-bytes", "5MB", "--max-adapter-downloads", "6"),
        *("--require-adapter-commit", "--adapter-extra-file", "chat_template.jinja"),
        *("--watch-adapters", "1.5"),
        *("--kv-cache-dtype", "fp8", "--gpu-memory-utilization", "0.5"),
    )
    model, scheduler, adapters = config.engine.model, config.engine.scheduler, config.engine.adapters
    assert (model.model, model.quantization, model.double_quant) == ("org/model", "int4", True)
    assert (model.device, model.dtype, model.kernels, model.threads) == ("cuda", "bfloat16", "triton", 3)
    assert (adapters.folders, adapters.roots) == ((one, two), (root,))
    assert (adapters.device_bytes, adapters.host_bytes) == (512 << 20, 2 * 10**9)
    assert (adapters.max_on_device, adapters.max_per_request) == (7, 2)
    assert (adapters.device_dtype, adapters.max_bytes) == ("int8", 64 << 20)
    assert adapters.sources == ("s3://bucket/a", "hf://owner")
    assert (adapters.cache_dir, adapters.cache_bytes) == (root / "new", 3 << 30)
    assert (adapters.download_max_bytes, adapters.max_downloads) == (5_000_000, 6)
    assert (adapters.require_commit, adapters.extra_files) == (True, ("chat_template.jinja",))
    assert adapters.watch_s == 1.5
    assert (scheduler.max_batch_tokens, scheduler.max_num_requests, scheduler.max_queue) == (1024, 9, 11)
    assert (scheduler.max_model_len, scheduler.kv_cache_bytes) == (4096, 3 << 29)
    assert (scheduler.kv_cache_dtype, scheduler.gpu_memory_utilization) == ("fp8", 0.5)
    assert (scheduler.kv_block_size, scheduler.max_adapter_wait_s) == (32, 0.5)
    assert (config.api.host, config.api.port, config.api.metrics_port) == ("::1", 0, -1)
    assert (config.api.max_message_bytes, config.api.drain_s) == (4 << 20, 2.5)


def test_a_setting_without_a_range_may_be_infinite() -> None:
    config = parse("--model", "m", "--drain-seconds", "inf", "--max-adapter-wait", "inf")
    assert config.api.drain_s == config.engine.scheduler.max_adapter_wait_s == float("inf")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ((), "--model"),
        (("--model", "m", "--quantization", "int3"), "nf4"),
        (("--model", "m", "--adapter-device-bytes", "lots"), "512MiB"),
        (("--model", "m", "--adapter-device-dtype", "fp8"), "int8"),
        (("--model", "m", "--kv-cache-dtype", "int8"), "fp8"),
        (("--model", "m", "--gpu-memory-utilization", "1.5"), "gpu_memory_utilization: 1.5"),
        (("--model", "m", "--adapters", "no-such-folder"), "no-such-folder is not a folder"),
        (("--model", "m", "--max-batch-tokens", "0"), "max_batch_tokens"),
        (("--model", "m", "--port", "-2"), "port"),
        (("--model", "m", "--adapter-source", "http://host/a"), "use https"),
        (("--model", "m", "--adapter-extra-file", "../x.json"), "adapter_extra_file"),
        (("--model", "m", "--adapter-extra-file", "model.bin"), "adapter_extra_file"),
        (("--model", "m", "--watch-adapters", "-1"), "watch_adapters: -1.0"),
        (("--model", "m", "--keepalive", "0"), "keepalive: 0.0"),
        (("--model", "m", "--stall-seconds", "-1"), "stall_seconds"),
        (("--model", "m", "--max-tokens-per-message", "0"), "max_tokens_per_message"),
        (("--model", "m", "--mod", "x"), "--mod"),
    ],
)
def test_bad_flags_end_with_usage(
    argv: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for setting in known_settings().values():
        assert setting.setting.help, setting.flag
        assert setting.flag in out
    assert "(default: 256MiB)" in out


def test_the_api_process_does_without_torch(checkpoint: Path) -> None:
    program = (
        "import sys; from loraplex_server.cli import hide_torch; hide_torch();"
        "import loraplex_server.api.app, loraplex_server.engine.process;"
        "from loraplex_server.api.text.tokenizer import Tokenizer;"
        "text = Tokenizer.load(sys.argv[1]).decode([40, 41]);"
        "assert sys.modules['torch'] is None; print(repr(text))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(Tokenizer.load(str(checkpoint)).decode([40, 41]))
