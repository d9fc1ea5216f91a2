"""The wheels that users install: built here, and what they hold and ask for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECTS = {"loraplex": ROOT / "clients/python", "loraplex-server": ROOT}

USE = """
import importlib, pkgutil
import loraplex
for module in pkgutil.walk_packages(loraplex.__path__, "loraplex."):
    if module.name != "loraplex.cli.top":  # needs an extra
        importlib.import_module(module.name)
for name in loraplex.__all__:
    getattr(loraplex, name)
import sys
assert not {"torch", "numpy", "transformers", "pytest"} & set(sys.modules)
from loraplex.cli import main
assert main(["serve"]) == 2
with loraplex.Client("127.0.0.1:1", retry=None) as client:
    try:
        client.generate("x", timeout=30)
    except loraplex.errors.UnavailableError:
        print(loraplex.__version__)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution."""
    made = {}
    for name, project in PROJECTS.items():
        folder = tmp_path_factory.mktemp(name)
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(build, cwd=project, check=True, capture_output=True, timeout=120)
        (made[name],) = folder.glob("*.whl")
        print(f"{made[name].name}: {made[name].stat().st_size:,} bytes")
    return made


def unpacked(wheel: Path, folder: Path) -> metadata.Distribution:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (about,) = folder.glob(f"{wheel.name.split('-')[0]}-*.dist-info")
    return metadata.PathDistribution(about)


def declared(requirements: list[str] | None) -> set[str]:
    """The distributions that requirements ask for here, without extras, and those that they ask for."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements or ()):
        if requirement.name not in found and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            found |= {requirement.name, *declared(metadata.requires(requirement.name))}
    return found


def test_the_sdk_works_in_an_environment_of_its_own(wheels: dict[str, Path], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    (site,) = venv.glob("lib/python*/site-packages")
    about = unpacked(wheels["loraplex"], site)
    assert (site / "loraplex/py.typed").is_file()
    assert {path.name for path in site.iterdir() if path.is_dir()} == {
        "loraplex",
        f"loraplex-{about.version}.dist-info",
    }
    needed = declared(about.requires)
    assert "grpcio" in needed
    for name in needed:
        for file in metadata.files(name) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                place = site / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.locate())
    command = [venv / "bin" / "python", "-I", "-W", "error", "-c", USE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, about.version), done.stderr


def test_the_client_is_small(wheels: dict[str, Path]) -> None:
    """It has no server, no kernels and no weights: today 93 kB; with all of them it was 5.8 MB."""
    assert wheels["loraplex"].stat().st_size < 200_000


def test_the_server_asks_for_its_client(wheels: dict[str, Path], tmp_path: Path) -> None:
    server = unpacked(wheels["loraplex-server"], tmp_path)
    client = unpacked(wheels["loraplex"], tmp_path)
    assert (server.metadata["Name"], client.metadata["Name"]) == ("loraplex-server", "loraplex")
    assert server.version == client.version
    assert f"loraplex=={server.version}" in (server.requires or ())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("loraplex", "loraplex_server", "loraplex_kernels", "loraplex_bench"),
        *(f"loraplex-{client.version}.dist-info", f"loraplex_server-{server.version}.dist-info"),
    }
    scripts = [entry for entry in client.entry_points if entry.group == "console_scripts"]
    assert [(script.name, script.value) for script in scripts] == [("loraplex", "loraplex.cli:main")]
    assert not server.entry_points


def test_the_extras_of_the_client_are_those_of_the_server(wheels: dict[str, Path], tmp_path: Path) -> None:
    server = unpacked(wheels["loraplex-server"], tmp_path)
    client = unpacked(wheels["loraplex"], tmp_path)
    extras = {"top", "server", "remote", "tracing", "compositions", "bench", "dev"}
    assert set(client.metadata.get_all("Provides-Extra") or ()) == extras
    for requirement in map(Requirement, client.requires or ()):
        if requirement.marker is not None and requirement.name != "rich":
            assert requirement.name == "loraplex-server"
            assert requirement.extras <= set(server.metadata.get_all("Provides-Extra") or ())


FETCHED = {"gemlite"}
"""Imported where it is there: `make bench-peers` fetches it to be measured."""


@pytest.mark.parametrize(
    ("folder", "project", "extras"),
    [
        ("clients/python/loraplex", "clients/python", ("top",)),
        ("server/loraplex_server", ".", ("remote", "tracing", "compositions")),
        ("kernels/loraplex_kernels", ".", ()),
        ("bench/loraplex_bench", ".", ("bench", "dev", "compositions")),
    ],
)
def test_every_import_is_declared(folder: str, project: str, extras: tuple[str, ...]) -> None:
    about = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]
    lines = [
        *about["dependencies"],
        *(line for name in extras for line in about["optional-dependencies"][name]),
    ]
    asked = {canonicalize_name(Requirement(line).name) for line in lines}
    brought_by = metadata.packages_distributions()
    own = {"loraplex", "loraplex_server", "loraplex_kernels", "loraplex_bench"}
    for path in (ROOT / folder).rglob("*.py"):
        for module in imported(path) - sys.stdlib_module_names - own - FETCHED:
            names = {canonicalize_name(name) for name in brought_by.get(module, ())}
            assert names & asked, f"{path.relative_to(ROOT)} imports {module}: declare one of {sorted(names)}"


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
