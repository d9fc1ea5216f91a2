"""Each command and each Python example of README and docs/ is run, page by page, as a reader would.

The model and the adapters that the pages speak of are the demo's, under the pages' names. Servers get free
ports in the place of the pages'. What a page only shows, and nobody could run here, is indented, not fenced.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from loraplex_bench.demo.tasks import data_dir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = "Llama-3.1-8B-Instruct"
DEFAULT_SERVE = f"loraplex serve --model ./{MODEL} --adapters ./adapters --http-port 8000 --allow-uploads"
PORTS = {"50051": "grpc", "9400": "metrics", "8000": "http"}
"""The pages' ports, and what a server that is ready calls each."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# Of equal rank, as PEFT's recipes want them.
ADAPTERS = {"sql": "caesar3", "polite": "rot13"}

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*(?:\\\n.*)*)$", re.MULTILINE)
# Run by continuous integration, or installing what the tests run in already (`test_package` has the wheels).
_ELSEWHERE = re.compile(r"(make|pip|git) ")

_NEEDS_NO_SERVER = re.compile(r"loraplex (config|token|bench) ")


class Example(NamedTuple):
    """One thing to run: its `language` is "console" or "python"."""

    language: str
    text: str


def examples(page: Path) -> list[Example]:
    """All that a page tells its reader to run, in order."""
    found = []
    for language, body in _BLOCK.findall(page.read_text()):
        if language == "python":
            found.append(Example(language, body))
        else:
            found += [Example(language, command) for command in _COMMAND.findall(body)]
    return [example for example in found if not _ELSEWHERE.match(example.text)]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if examples(page)]


class Reader:
    """Somebody at a terminal in `folder`, with one server at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict.fromkeys(PORTS, "0")
        self._server: subprocess.Popen[str] | None = None
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LORAPLEX_SERVE_PORT": "0",
            "LORAPLEX_SERVE_METRICS_PORT": "0",
            "LORAPLEX_SERVE_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, example: Example) -> None:
        """Runs it to its end; a server until it is ready.

        Raises:
            AssertionError: it failed.
        """
        if example.language == "python":
            self._finish([sys.executable, "-c", self._with_ports(example.text)])
        elif "loraplex serve" in example.text:
            self._serve(example.text)
        else:
            if self._server is None and not _NEEDS_NO_SERVER.match(example.text):
                self.serve_as_usual()
            self._finish(["bash", "-ec", self._with_ports(example.text)])

    def serve_as_usual(self) -> None:
        """Starts the server that pages without one of their own ask."""
        self._serve(DEFAULT_SERVE)

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            self._server.communicate(timeout=60)
            self._server = None
            self._ports = dict.fromkeys(PORTS, "0")

    def _with_ports(self, text: str) -> str:
        """With the running server's ports; 0, which is any that is free, where there is none."""
        return re.sub("|".join(PORTS), lambda port: self._ports[port[0]], text)

    def _serve(self, command: str) -> None:
        self.close()
        with (self._folder / "server.log").open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {self._with_ports(command)}"],
                cwd=self._folder,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._server.stdout is not None
        ready = self._server.stdout.readline()
        if not ready.startswith("loraplex ready "):
            self.close()
        assert self._server, (self._folder / "server.log").read_text()
        found = dict(re.findall(r"(\w+)=\S+:(\d+)", ready))
        self._ports = {port: found.get(name, "0") for port, name in PORTS.items()}
        self._environment["LORAPLEX_SERVER"] = f"127.0.0.1:{found['grpc']}"

    def _finish(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def settle(folder: Path) -> Reader:
    """Somebody who has all that the pages presuppose in `folder`."""
    shutil.copytree(data_dir() / "base", folder / MODEL)
    (folder / MODEL / "chat_template.jinja").write_text(TEMPLATE)
    for name, task in ADAPTERS.items():
        shutil.copytree(data_dir() / "adapters" / task, folder / "adapters" / name)
    certificate = trustme.CA().issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    return Reader(folder)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """For a page that starts servers of its own."""
    someone = settle(tmp_path)
    yield someone
    someone.close()


@pytest.fixture(scope="module")
def asking_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """For the pages that presuppose a server; they share one."""
    someone = settle(tmp_path_factory.mktemp("reader"))
    someone.serve_as_usual()
    yield someone
    someone.close()


def _serves(page: Path) -> bool:
    return any("loraplex serve" in example.text for example in examples(page))


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if _serves(page)], ids=_name)
def test_a_page_that_serves_can_be_followed(page: Path, reader: Reader) -> None:
    for example in examples(page):
        reader.run(example)


@pytest.mark.parametrize("page", [page for page in PAGES if not _serves(page)], ids=_name)
def test_a_page_that_asks_can_be_followed(page: Path, asking_reader: Reader) -> None:
    for example in examples(page):
        asking_reader.run(example)
