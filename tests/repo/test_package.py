"""The wheel that users install: built here, and put into an environment with what it declares and no more."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

USE = """
import importlib, pkgutil
import loraplex
for module in pkgutil.walk_packages(loraplex.__path__, "loraplex."):
    importlib.import_module(module.name)
for name in loraplex.__all__:
    getattr(loraplex, name)
import sys
assert not {"torch", "numpy", "transformers", "pytest"} & set(sys.modules)
with loraplex.Client("127.0.0.1:1", retry=None) as client:
    try:
        client.generate("x", timeout=30)
    except loraplex.errors.UnavailableError:
        print(loraplex.__version__)
"""


def declared(requirements: list[str] | None) -> set[str]:
    """The distributions that requirements ask for here, without extras, and those that they ask for."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements or ()):
        if requirement.name not in found and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            found |= {requirement.name, *declared(metadata.requires(requirement.name))}
    return found


def test_the_sdk_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("loraplex-*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    (site,) = venv.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "loraplex/py.typed").is_file()
    assert {path.name for path in site.iterdir() if path.is_dir()} == {
        *(
            "loraplex",
            "loraplex_server",
            "loraplex_kernels",
            "loraplex_bench",
            f"{wheel.name.split('-py')[0]}.dist-info",
        )
    }
    (about,) = site.glob("loraplex-*.dist-info")
    asked = metadata.PathDistribution(about).requires
    needed = declared(asked)
    assert "grpcio" in needed
    for name in needed:
        for file in metadata.files(name) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                place = site / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.locate())
    command = [venv / "bin" / "python", "-I", "-W", "error", "-c", USE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, metadata.PathDistribution(about).version), (
        done.stderr
    )
