"""Spoiled adapters are loaded into a real server under load: typed refusals, and all other answers right."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

from loraplex import Client, errors
from loraplex.cli.exposition import scrape
from loraplex_bench.demo.tasks import TASKS, data_dir, expected, make_lines, prompt
from loraplex_bench.load.launcher import LaunchedServer, demo_flags

INPUTS = int(os.environ.get("LORAPLEX_FUZZ_INPUTS", "2000")) // 20
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = list(TASKS)[:6]
KINDS = ("header", "values", "cut", "longer", "length", "nan", "config", "text", "gone", "pickle")
TYPED = (errors.FailedPreconditionError, errors.NotFoundError, errors.PermissionDeniedError)


def spoil(folder: Path, rng: random.Random) -> str:
    """Does one bad thing to an adapter's folder; says which."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    content = bytearray(weights.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    what = rng.choice(KINDS)
    if what in ("header", "values"):
        for _ in range(rng.randint(1, 20)):
            at = rng.randrange(8, end) if what == "header" else rng.randrange(end, len(content))
            content[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[rng.randrange(len(content)) :]
    elif what == "longer":
        content += rng.randbytes(rng.randint(1, 100))
    elif what == "length":
        content[:8] = rng.choice([0, 1, end, 1 << 40, (1 << 64) - 1]).to_bytes(8, "little")
    elif what == "nan":
        content[end : end + 4] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(content)
    if what == "config":
        values = json.loads(config.read_text())
        values[rng.choice(list(values))] = rng.choice([None, -1, 1 << 40, "x", [], {}, True, 0.5])
        config.write_text(json.dumps(values))
    elif what == "text":
        config.write_bytes(config.read_bytes()[: rng.randrange(200)])
    elif what == "gone":
        rng.choice([weights, config]).unlink()
    elif what == "pickle":
        weights.rename(folder / "adapter_model.bin")
    return what


def test_the_engine_serves_on(tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    flags = [*demo_flags(), "--threads", "1", "--max-adapters-on-device", "4"]
    flags += ["--adapter-root", str(tmp_path)]
    with LaunchedServer(flags) as server, Client(server.grpc) as client:
        wrong: list[tuple[str, str, str]] = []
        right = Counter[str]()
        over = threading.Event()

        def ask(name: str) -> None:
            with Client(server.grpc) as caller:
                while not over.is_set():
                    for line in make_lines(3, 8):
                        text = caller.generate(prompt(line), adapter=name, max_tokens=40).text
                        if text == expected(name, line):
                            right[name] += 1
                        else:
                            wrong.append((name, line, text))

        callers = [threading.Thread(target=ask, args=(name,)) for name in NAMES]
        for caller in callers:
            caller.start()
        outcomes = Counter[tuple[str, str]]()
        try:
            for index in range(INPUTS):
                name = f"spoiled-{index}"
                shutil.copytree(data_dir() / "adapters" / rng.choice(NAMES), tmp_path / name)
                what = spoil(tmp_path / name, rng)
                try:
                    client.adapters.load(name, str(tmp_path / name))
                except TYPED as error:
                    outcomes[what, error.code] += 1
                else:
                    # Other values, or a setting without effect: an adapter like any other.
                    outcomes[what, "OK"] += 1
                    client.adapters.unload(name)
                shutil.rmtree(tmp_path / name)
        finally:
            over.set()
            for caller in callers:
                caller.join(60)
        for (what, code), count in sorted(outcomes.items()):
            print(f"{what:<8} {code:<20} {count}")
        assert not any(caller.is_alive() for caller in callers)
        assert {what for what, code in outcomes if code == "OK"} <= {"values", "config", "header"}
        assert set(right) == set(NAMES)
        # The adapters themselves are right in 99% of all lines; a spoiled neighbour would show in all.
        assert len(wrong) <= sum(right.values()) // 50, wrong[:5]
        assert server.metrics is not None
        found = scrape(server.metrics)
        assert found.value("loraplex_integrity_problems") == 0
        assert found.value("loraplex_weight_checksum_ok") == 1
        assert sorted(adapter.name for adapter in client.adapters.list()) == sorted(TASKS)
