"""The laws of the house, as far as a machine can check them.

Who may import whom, circles, sizes of files and functions, one name for one thing, names that shadow others.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERS = {
    "loraplex": ROOT / "clients/python",
    "loraplex_kernels": ROOT / "kernels",
    "loraplex_server": ROOT / "server",
    "loraplex_bench": ROOT / "bench",
}
# Who may import whom; the bench measures the engine in process as well as through the SDK.
ALLOWED = {
    "loraplex": set(),
    "loraplex_kernels": set(),
    "loraplex_server": {"loraplex", "loraplex_kernels"},
    "loraplex_bench": {"loraplex", "loraplex_kernels", "loraplex_server"},
}
# The SDK's command hands over to the others by name, once it knows that they are installed.
HANDS_OVER = {"loraplex._extras"}
KERNELS, SERVER = "loraplex_kernels", "loraplex_server"

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80

# Rooms of the server, and which others each may import; `kernels` and the SDK's stubs are below all of them.
ROOMS = {
    "core": set(),
    "config": {"core"},
    "adapters": {"core", "config"},
    "model": {"core", "config"},
    "wire": {"core"},
    "engine": {"core", "config", "adapters", "model", "wire"},
    "api": {"core", "config", "wire"},
    "cli": {"core", "config", "api"},
    "__main__": {"cli"},
}
# The API starts the engine's process, and knows nothing else of it.
DOORS = {("api", "loraplex_server.engine.process")}
# Rooms inside the model, each seeing those before it.
MODEL_ROOMS = ("parts", "layers", "base_model", "load", "run", "plan")

# Device code is one function a kernel; it is read beside its reference.
DEVICE_CODE = "kernel.py"

FORBIDDEN = {
    r"\b[Gg]uess(?!work)": "draft, speculation",
    r"\b[Ff]our_?bit": "quant, nf4, int4",
    r"\bown_code\b": "unfused",
    r"\bheat\b": "popularity",
    r"\bface\b(?!-| of)": "API",
    r"\b(find|attach)_ends\b": "embedding and head",
}


def _generated(path: Path) -> bool:
    """Stubs, and the blocking client that `make sync` writes."""
    return path.parent.name == "v1" or path.read_text().startswith("# Made from ")


@functools.cache
def _modules() -> dict[str, Path]:
    """Every module of the distributions, by its name."""
    found = {}
    for package, container in CONTAINERS.items():
        for path in (container / package).rglob("*.py"):
            parts = path.relative_to(container).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Every module that a module imports anywhere: for types alone and inside functions, too."""
    modules = _modules()
    path = modules[module]
    found: set[str] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return frozenset(found - {module})


def _own_imports(module: str) -> frozenset[str]:
    """Those of them that are modules of the repository."""
    return _imports(module) & _modules().keys()


def _circles() -> Iterator[list[str]]:
    """Strongly connected components of more than one module (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in _own_imports(module):
            if other not in order:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                yield sorted(component)

    for module in _modules():
        if module not in order:
            yield from visit(module)


@pytest.mark.parametrize("package", CONTAINERS)
def test_distributions_import_one_way(package: str) -> None:
    for module in _modules():
        if module.split(".")[0] == package and module not in HANDS_OVER:
            foreign = {other.split(".")[0] for other in _imports(module)} & CONTAINERS.keys()
            assert foreign <= ALLOWED[package] | {package}, f"{module} imports {sorted(foreign)}"


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", KERNELS}
    for module in _modules():
        if module.split(".")[0] == KERNELS:
            foreign = {other.split(".")[0] for other in _imports(module)} - allowed
            assert not foreign, f"{module} imports {sorted(foreign)}"


def test_ops_of_the_kernels_import_no_other_op() -> None:
    """An op is a folder; the files at the top, and the pool of adapters, are there for all of them."""
    ops = {
        name.split(".")[1]
        for name, path in _modules().items()
        if name.startswith(f"{KERNELS}.") and path.name == "__init__.py"
    } - {"pool"}
    for module in _modules():
        if module.startswith(f"{KERNELS}."):
            named = {other.split(".")[1] for other in _imports(module) if other.startswith(f"{KERNELS}.")}
            foreign = (named & ops) - {module.split(".")[1]}
            assert not foreign, f"{module} imports {sorted(foreign)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert list(_circles()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_the_servers_rooms_point_down(room: str) -> None:
    for module in _modules():
        if not module.startswith(f"{SERVER}.") or module.split(".")[1] != room:
            continue
        for other in _own_imports(module):
            if other.startswith(f"{SERVER}.") and (room, other) not in DOORS:
                target = other.split(".")[1]
                assert target in ROOMS[room] | {room}, f"{module} imports {other}"


def test_every_file_of_the_server_is_in_a_room() -> None:
    outside = {module.split(".")[1] for module in _modules() if module.startswith(f"{SERVER}.")}
    assert outside <= ROOMS.keys()


def test_arrows_inside_the_model_point_down() -> None:
    prefix = f"{SERVER}.model."
    for module in _modules():
        if module.startswith(prefix):
            level = MODEL_ROOMS.index(module.removeprefix(prefix).split(".")[0])
            for other in _own_imports(module):
                if other.startswith(prefix):
                    below = MODEL_ROOMS.index(other.removeprefix(prefix).split(".")[0])
                    assert below <= level, f"{module} imports {other}"


def test_files_are_of_a_readable_size() -> None:
    for path in _modules().values():
        if path.name != DEVICE_CODE and not _generated(path):
            lines = len(path.read_text().splitlines())
            assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


def test_functions_are_of_a_readable_size() -> None:
    for path in _modules().values():
        if path.name == DEVICE_CODE or _generated(path):
            continue
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                place = f"{path.relative_to(ROOT)}: {node.name}"
                assert lines <= MAX_FUNCTION_LINES, f"{place} has {lines} lines"


def _texts() -> Iterator[Path]:
    yield from (path for path in _modules().values() if not _generated(path))
    yield from (ROOT / "protos").rglob("*.proto")
    yield from (ROOT / "docs").rglob("*.md")
    yield from (ROOT / "tests").rglob("*.py")
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", "Makefile"))


@pytest.mark.parametrize("word", FORBIDDEN)
def test_one_thing_has_one_name(word: str) -> None:
    """The glossary has the names."""
    for path in _texts():
        if path.name in ("test_layout.py", "glossary.md"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.search(word, line)
            place = f"{path.relative_to(ROOT)}:{number}"
            assert found is None, f"{place} says {found[0]!r}; say {FORBIDDEN[word]}"


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


def test_python_files_declare_their_annotations_lazily() -> None:
    for path in _modules().values():
        if path.parent.name != "v1":
            body = [node for node in _tree(path).body if not isinstance(node, ast.Expr)]
            lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body)
            assert lazy or not body, f"{path.relative_to(ROOT)} lacks `from __future__ import annotations`"
