"""All that operators read of the settings, word for word: help, what `loraplex config` prints, every error.

`LORAPLEX_WRITE_SNAPSHOTS=1` writes the file anew. A change of wording is then seen in the diff.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from loraplex.cli import main

SNAPSHOT = Path(__file__).parents[1] / "snapshots/settings.txt"

PRINTED: dict[str, tuple[str, ...]] = {
    "serve --help": ("serve", "--help"),
    "config --help": ("config", "--help"),
    "config show --help": ("config", "show", "--help"),
    "config show": ("config", "show", "--model", "m"),
    "config show, with flags of every kind": (
        *("config", "show", "--model", 'a "b"', "--adapters", ".", "--adapters", "..", "--double-quant"),
        *("--kv-cache-bytes", "1GiB", "--cuda-graph-sizes", "1,2,8", "--prefix-cache", "off"),
        *("--adapter-source", "s3://bucket/a", "--adapter-cache-dir", "cache", "--no-reflection"),
        *("--fair-aging", "2", "--gpu-memory-utilization", "0.5", "--model-name", "näme"),
    ),
    "config show --changed": ("config", "show", "--changed", "--model", "m", "--max-queue", "7"),
    "config check": ("config", "check", "--model", "m"),
}

# What is wrong with the flags of `loraplex serve --model m`.
FLAGS: list[tuple[str, ...]] = [
    ("--mod", "x"),
    ("--no-such-flag",),
    ("surplus",),
    ("--port",),
    ("--double-quant=1",),
    *((name, "wrong") for name in ("--quantization", "--device", "--dtype", "--kernels")),
    *((name, "wrong") for name in ("--generation-config", "--cuda-graphs", "--kv-cache-dtype")),
    *(
        (name, "wrong")
        for name in ("--prefix-cache", "--adapter-device-dtype", "--log-level", "--log-format")
    ),
    *((name, "many") for name in ("--threads", "--max-queue", "--port", "--gpu-memory-utilization")),
    *((name, "many") for name in ("--fair-aging", "--adapter-host-bytes", "--cuda-graph-sizes")),
    ("--cuda-graph-sizes", "1,0"),
    ("--threads", "-1"),
    *((name, "0") for name in ("--max-batch-tokens", "--max-num-requests", "--max-scored-tokens")),
    *((name, "0") for name in ("--max-queue", "--kv-block-size", "--fair-quantum", "--fair-aging")),
    *((name, "-1") for name in ("--max-model-len", "--max-adapters-on-device", "--max-pinned-adapters")),
    *((name, "0") for name in ("--gpu-memory-utilization", "--max-adapters-per-request")),
    ("--gpu-memory-utilization", "1.5"),
    ("--gpu-memory-utilization", "nan"),
    ("--kv-cache-bytes", "-1"),
    ("--speculative-tokens", "-1"),
    ("--speculative-tokens", "1000"),
    ("--speculation-max-load", "1.5"),
    *((name, "0") for name in ("--adapter-device-bytes", "--adapter-host-bytes", "--adapter-cache-bytes")),
    *((name, "0") for name in ("--adapter-download-max-bytes", "--max-adapter-downloads")),
    *((name, "0") for name in ("--upload-max-bytes", "--max-uploads", "--max-uploaded-adapters")),
    ("--watch-adapters", "-1"),
    ("--watch-adapters", "inf"),
    ("--adapters", "no-such-folder"),
    ("--adapter-root", "no-such-folder"),
    ("--adapter-source", "http://host/a"),
    ("--adapter-source", "bucket/a"),
    ("--adapter-source", "s3://"),
    ("--adapter-extra-file", "../x.json"),
    ("--adapter-extra-file", "adapter_config.json"),
    ("--port", "-1"),
    ("--http-port", "-2"),
    ("--metrics-port", "-2"),
    ("--max-engine-restarts", "-1"),
    ("--max-tokens-per-message", "0"),
    ("--max-unread-tokens", "0"),
    ("--stall-seconds", "-1"),
    ("--keepalive", "0"),
    ("--keepalive-timeout", "3e6"),
    ("--max-connection-age", "-1"),
    ("--otlp-endpoint", "collector:4317"),
    ("--host", "0.0.0.0"),
    ("--tls-certificate", "a"),
    ("--tls-key", "a"),
    ("--tls-client-ca", "a"),
    ("--config", "no-such-file"),
]

ENVIRONMENTS: list[tuple[str, str]] = [
    ("MAX_QUEU", "1"),
    ("NOTHING_LIKE_IT", "1"),
    ("MAX_QUEUE", "x"),
    ("MAX_QUEUE", "0"),
    ("DOUBLE_QUANT", "yes"),
    ("QUANTIZATION", "int3"),
    ("ADAPTERS", ".,no-such-folder"),
    ("KV_CACHE_BYTES", "lots"),
    ("CUDA_GRAPH_SIZES", "1,x"),
    ("CONFIG", "no-such-file"),
]

FILES: list[str] = [
    "max_batch_token = 1",
    "nothing_like_it = 1",
    "[scheduler]\nmax_queue = 1",
    'max_queue = "many"',
    "max_queue = 0",
    "max_queue = 1.5",
    "max_queue = [1]",
    "max_queue = true",
    'adapters = "."',
    'adapters = ["no-such-folder"]',
    "adapters = [[]]",
    'double_quant = "yes"',
    "double_quant = 1",
    'quantization = "int3"',
    'kv_cache_bytes = "lots"',
    "cuda_graph_sizes = [1]",
    'config = "x"',
    "port = 1\nport = 2",
    "\x00",
    "#" * ((1 << 20) + 1),
]


def run(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and all that was printed."""
    try:
        code = main(list(argv))
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def error(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """The text below the usage, without the parts that differ between versions of Python."""
    code, text = run(("config", "check", *argv), capsys)
    assert code == 2, (argv, code, text)
    assert text.startswith("usage: loraplex config {show,check} [--changed] [flags of loraplex serve]\n"), (
        text
    )
    text = text.partition("\n")[2]
    text = re.sub(r"choose from [^)]*", lambda match: match[0].replace("'", ""), text)
    return re.sub(r"(valid TOML: ).*", r"\1...", text)


def test_wording(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAPLEX_SERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    parts = []
    for title, argv in PRINTED.items():
        code, text = run(argv, capsys)
        assert code == 0, (argv, text)
        parts.append(f"=== {title}\n{text}")
    parts.append("=== no --model\n" + error((), capsys))
    for flags in FLAGS:
        parts.append(f"=== {' '.join(flags)}\n" + error(("--model", "m", *flags), capsys))
    for name, value in ENVIRONMENTS:
        with monkeypatch.context() as patch:
            patch.setenv(f"LORAPLEX_SERVE_{name}", value)
            parts.append(f"=== environment: {name}={value}\n" + error(("--model", "m"), capsys))
    for text in FILES:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        said = error(("--model", "m", "--config", str(path)), capsys).replace(str(path), "settings.toml")
        parts.append(f"=== file: {text[:60]!r}\n{said}")
    found = "\n".join(parts)
    if os.environ.get("LORAPLEX_WRITE_SNAPSHOTS"):
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text()
