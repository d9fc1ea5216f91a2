"""A real server on the demo model, and a headless Chromium that looks at its page."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.cli.exposition import Metrics, scrape
from loraplex_bench.demo.tasks import data_dir

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
_READY = re.compile(r"loraplex ready grpc=(\S+) metrics=(\S+)\n")


class Server:
    """One `loraplex serve` process with room for three adapters."""

    def __init__(self, model: Path, metrics_port: int = 0) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "loraplex_server", "--threads", "1", "--port", "0"]
        command += ["--metrics-port", str(metrics_port), "--max-adapters-on-device", "3"]
        command += ["--model", str(model), "--adapters", str(data_dir() / "adapters")]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Drained all the while, so that the server never waits for a reader of its log.
        self._log: list[str] = []
        assert self._process.stderr is not None
        self._drain = threading.Thread(target=self._log.extend, args=(self._process.stderr,), daemon=True)
        self._drain.start()
        assert self._process.stdout is not None
        match = _READY.fullmatch(self._process.stdout.readline())
        if match is None:
            self._process.wait(timeout=60)
            pytest.fail("".join(self._log))
        self.address, self.metrics_address = match.groups()
        self.url = f"http://{self.metrics_address}/"

    @property
    def metrics_port(self) -> int:
        return int(self.metrics_address.rpartition(":")[2])

    def metrics(self) -> Metrics:
        return scrape(self.metrics_address)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)
        self._drain.join(timeout=10)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the tests."""
    started = []
    model = tmp_path_factory.mktemp("models") / "demo-llama"
    model.symlink_to(data_dir() / "base")

    def run(**options: Any) -> Server:
        started.append(Server(model, **options))
        return started[-1]

    yield run
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium: `LORAPLEX_BROWSER`, one on the path, or Playwright's own. Without one the tests fail."""
    from playwright.sync_api import Error, sync_playwright

    found = os.environ.get("LORAPLEX_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            # As root, which containers and build machines are, Chromium has no sandbox to offer.
            launched = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.geteuid() != 0)
        except Error as error:
            pytest.fail(f"no Chromium: run `make test-web`, or set LORAPLEX_BROWSER to one ({error.message})")
        yield launched
        launched.close()


class Tab:
    """A page, and all that the browser said and asked for meanwhile."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.said: list[str] = []
        self.requested: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"exception: {error}"))
        page.on("request", lambda request: self.requested.append(request.url))
        page.goto(url)

    def until(self, state: str) -> None:
        """Waits until the page says that the server is live, lost or starting."""
        self.page.wait_for_selector(f"body[data-state={state}]", timeout=60_000)

    def values(self) -> dict[str, float | None]:
        """Every number that is shown, by its place; None for a dash."""
        script = "nodes => nodes.map(node => [node.dataset.show, node.dataset.value ?? null])"
        pairs = self.page.eval_on_selector_all("[data-show]", script)
        return {name: float(value) if value else None for name, value in pairs if value is not None}

    def rows(self) -> dict[str, dict[str, str]]:
        """The table of adapters: name to level and tokens."""
        script = "nodes => nodes.map(node => ({...node.dataset}))"
        return {row["adapter"]: row for row in self.page.eval_on_selector_all("#adapters tr", script)}


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a page in a browser of its own."""
    contexts = []

    def show(url: str, prepare: Callable[[Any], None] | None = None, **options: Any) -> Tab:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        if prepare is not None:
            prepare(page)
        return Tab(page, url)

    yield show
    for context in contexts:
        context.close()
