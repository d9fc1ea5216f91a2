"""The peers' files: of a wheel, what fits one CUDA; of a source archive, the package."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from loraplex_bench.fetch_peers import unpack_package, unpack_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "bitsandbytes-0.50.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cpu", "cuda128", "cuda130", "cuda132", "rocm64", "xpu2025"):
            archive.writestr(f"bitsandbytes/libbitsandbytes_{name}.so", name)
        archive.writestr("bitsandbytes/__init__.py", "")
        archive.writestr("bitsandbytes-0.50.2.dist-info/METADATA", "Version: 0.50.2")
    return path


def test_one_cuda_library_is_kept(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bnb"
    kept = unpack_wheel(wheel, folder, "13.0")
    assert kept == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]
    assert sorted(path.name for path in folder.rglob("*.so")) == kept
    assert (folder / "bitsandbytes" / "__init__.py").is_file()
    assert (folder / "bitsandbytes-0.50.2.dist-info" / "METADATA").is_file(), "its version is asked for"


def test_a_cuda_without_a_library_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no library for CUDA 12\.0; give another --cuda"):
        unpack_wheel(wheel, tmp_path / "bnb", "12.0")
    assert not (tmp_path / "bnb").exists()


def test_of_a_source_archive_the_package_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "gemlite-0.6.0.tar.gz"
    files = (
        "setup.py",
        "gemlite/core.py",
        "gemlite/configs/h100.json",
        "tests/gemlite/x.py",
        "../gemlite/y.py",
    )
    with tarfile.open(path, "w:gz") as archive:
        for name in files:
            info = tarfile.TarInfo(f"gemlite-0.6.0/{name}")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    assert unpack_package(path, "gemlite", tmp_path / "peers") == 2
    found = {path.relative_to(tmp_path / "peers").as_posix() for path in (tmp_path / "peers").rglob("*.*")}
    assert found == {"gemlite/core.py", "gemlite/configs/h100.json"}
