"""Fetches what `make bench-gpu` compares the 4-bit products with, into `bench/.peers/`, which git ignores.

    python -m loraplex_bench.fetch_peers --cuda 13.0

gemlite is Python alone; of bitsandbytes only the library for one version of CUDA is kept, some MiB in all, so
that the folder can be carried to a machine without a network. Both come by pip, from wherever it is set to.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from loraplex_bench.peers.folder import FOLDER

GEMLITE, BITSANDBYTES = "gemlite>=0.5", "bitsandbytes>=0.50"
"""The first bitsandbytes with a fused product for several rows is 0.50."""

_NATIVE = re.compile(r"libbitsandbytes_(?P<kind>[a-z]+)(?P<version>\d*)\.so$")


def keeps(name: str, cuda: str) -> bool:
    """True for a file of bitsandbytes' wheel to keep for CUDA `cuda` ("13.0"): all but other native code."""
    match = _NATIVE.search(name)
    if match is None:
        return True
    return match["kind"] == "cpu" or (match["kind"], match["version"]) == ("cuda", cuda.replace(".", ""))


def unpack_wheel(wheel: Path, folder: Path, cuda: str) -> list[str]:
    """Unpacks bitsandbytes' wheel; answers with the native libraries that were kept.

    Raises:
        ValueError: it has no library for this version of CUDA.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if keeps(name, cuda)]
        native = [PurePosixPath(name).name for name in names if _NATIVE.search(name)]
        if not any("_cuda" in name for name in native):
            raise ValueError(f"{wheel.name} has no library for CUDA {cuda}; give another --cuda")
        archive.extractall(folder, names)
    return native


def unpack_package(archive: Path, package: str, folder: Path) -> int:
    """Unpacks the files of a Python package from a wheel or a source archive; answers with their number."""
    count = 0
    for name, content in _files(archive):
        parts = PurePosixPath(name).parts
        if package not in parts[:2] or ".." in parts:
            continue
        target = folder.joinpath(*parts[parts.index(package) :])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        count += 1
    return count


def _files(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as source:
        for member in source:
            stream = source.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read()


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    return next(folder.iterdir())


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where something could not be fetched."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", default="13.0", metavar="X.Y", help="torch's CUDA there (default: 13.0)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: bench/.peers")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            source, wheel = _download(GEMLITE, Path(first)), _download(BITSANDBYTES, Path(second))
            shutil.rmtree(arguments.folder / "gemlite", ignore_errors=True)
            shutil.rmtree(arguments.folder / "bnb", ignore_errors=True)
            count = unpack_package(source, "gemlite", arguments.folder)
            print(f"{source.name}: {count} files")
            native = unpack_wheel(wheel, arguments.folder / "bnb", arguments.cuda)
            print(f"{wheel.name}: with {', '.join(native)}")
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"the peers were not fetched: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
