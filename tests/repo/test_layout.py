"""House rules that a machine can check: who may import whom, names that shadow, stubs that are current."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "loraplex": ROOT / "clients/python/loraplex",
    "loraplex_kernels": ROOT / "kernels/loraplex_kernels",
    "loraplex_server": ROOT / "server/loraplex_server",
    "loraplex_bench": ROOT / "bench/loraplex_bench",
}
# Who may import whom; the bench measures the engine in process as well as through the SDK.
ALLOWED = {
    "loraplex": set(),
    "loraplex_kernels": set(),
    "loraplex_server": {"loraplex", "loraplex_kernels"},
    "loraplex_bench": {"loraplex", "loraplex_kernels", "loraplex_server"},
}
# The SDK's command hands over to the others by name, once it knows that they are installed.
HANDS_OVER = {Path("_extras.py")}


def _files(package: str) -> list[Path]:
    return [path for path in PACKAGES[package].rglob("*.py") if "__pycache__" not in path.parts]


def _imports(path: Path) -> set[str]:
    """First parts of every module that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    for path in _files(package):
        if package == "loraplex" and path.relative_to(PACKAGES[package]) in HANDS_OVER:
            continue
        foreign = (_imports(path) & PACKAGES.keys()) - ALLOWED[package] - {package}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "loraplex_kernels"}
    for path in _files("loraplex_kernels"):
        foreign = _imports(path) - allowed
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_ops_of_the_kernels_import_no_other_op() -> None:
    """An op is a folder; the files at the top, and the pool of adapters, are there for all of them."""
    root = PACKAGES["loraplex_kernels"]
    ops = {path.parent.name for path in root.glob("*/__init__.py")} - {"pool"}
    for path in _files("loraplex_kernels"):
        room = path.relative_to(root).parts[0]
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            named = {name.split(".")[1] for name in names if name.startswith("loraplex_kernels.")}
            foreign = (named & ops) - {room}
            assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_only_the_container_folders_have_their_names() -> None:
    """A folder or file of these names elsewhere hides Hugging Face's `kernels` or triton when run by path."""
    for path in [*ROOT.rglob("*.py"), *(path.parent for path in ROOT.rglob("*.py"))]:
        relative = path.relative_to(ROOT)
        if relative.parts and (relative.parts[0].startswith(".") or relative.parts[0] in ("build", "dist")):
            continue
        is_container = len(relative.parts) == 1
        assert is_container or path.stem not in ("kernels", "server", "clients", "triton"), relative
    for container in ("server", "kernels", "bench", "clients", "protos", "tests"):
        assert not (ROOT / container / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    ["loraplex_server.engine.scheduler", "loraplex_server.engine.planning", "loraplex_server.wire.client"],
)
def test_scheduling_and_the_api_side_need_no_torch(module: str) -> None:
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"import {module}\n"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
    kept = {path.name: path.read_text() for path in (PACKAGES["loraplex"] / "_sync").glob("*.py")}
    assert made == {name: text for name, text in kept.items() if text.startswith("# Made from ")}, (
        "run `make sync`"
    )
    assert {"client.py", "streams.py", "adapters.py"} <= made.keys()


def test_python_files_declare_their_annotations_lazily() -> None:
    for package in PACKAGES:
        for path in _files(package):
            if path.parent.name == "v1" or not path.read_text().strip():
                continue
            body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
            lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body)
            assert lazy or not body, f"{path.relative_to(ROOT)} lacks `from __future__ import annotations`"
