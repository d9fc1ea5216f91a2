"""Generated files are current: the stubs and the blocking client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SDK = ROOT / "clients/python/loraplex"


def test_stubs_are_what_the_protos_say(tmp_path: Path) -> None:
    """`make protos` changes nothing."""
    protos = sorted((ROOT / "protos/loraplex/v1").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *map(str, protos)], check=True, timeout=60)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    assert len(made) == 3 * len(protos)
    for relative, text in made.items():
        assert (ROOT / "clients/python" / relative).read_text() == text, f"{relative}: run `make protos`"


def test_the_blocking_client_is_what_the_asyncio_one_says(tmp_path: Path) -> None:
    """`make sync` changes nothing."""
    command = [sys.executable, ROOT / "tools/make_sync.py", tmp_path]
    subprocess.run(command, check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (SDK / "_sync").glob("*.py")}
    assert made == {name: text for name, text in kept.items() if text.startswith("# Made from ")}, (
        "run `make sync`"
    )
    assert {"client.py", "streams.py", "adapters.py"} <= made.keys()
