"""Places to fetch adapters from, on loopback and with real protocols, and resolvers that use them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.adapters.origins.remote import download
from loraplex_server.adapters.origins.resolver import AdapterSources
from loraplex_server.config import AdapterConfig

Files = dict[str, bytes]


@dataclasses.dataclass
class WebPlace:
    """A web server with byte ranges, and ways to make it misbehave.

    Attributes:
        files: content by path.
        requests: (path, Range header, Authorization header) of each request so far.
        break_after: for each body of more than one byte in turn, how many bytes are sent before the
            connection is cut.
        fail: statuses for the next requests in turn.
        redirects: targets by path.
        gate: bodies wait for it.
        waiting: released once for each body that waits.
    """

    host: str
    files: Files = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    break_after: list[int] = dataclasses.field(default_factory=list)
    fail: list[int] = dataclasses.field(default_factory=list)
    redirects: dict[str, str] = dataclasses.field(default_factory=dict)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    on_body: Callable[[str], None] = lambda path: None
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    waiting: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(0))

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def bodies(self, path: str) -> list[str]:
        """Range headers of the requests for a file's content, "" for all of it."""
        return [span for found, span, _ in self.requests if found == path and span != "bytes=0-0"]

    def publish(self, folder: Path, at: str) -> None:
        """Offers the files of a local folder under the path `at`."""
        self.files.update({f"{at}/{path.name}": path.read_bytes() for path in folder.iterdir()})


def _handler(place: WebPlace) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, **place.headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if len(body) > 1:
                place.waiting.release()
                place.gate.wait(20)
                place.on_body(self.path)
                if place.break_after:
                    sent = place.break_after.pop(0)
                    if sent < len(body):
                        self.wfile.write(body[:sent])
                        # The client drops what it has not yet read when the connection ends.
                        time.sleep(0.05)
                        self.close_connection = True
                        return
            self.wfile.write(body)

        def do_GET(self) -> None:
            span = self.headers.get("Range", "")
            place.requests.append((self.path, span, self.headers.get("Authorization", "")))
            if place.fail:
                return self.answer(place.fail.pop(0))
            if self.path in place.redirects:
                return self.answer(302, Location=place.redirects[self.path])
            body = place.files.get(self.path)
            if body is None:
                return self.answer(404)
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            headers = {"ETag": etag} if place.etags else {}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
            if match is None or not place.ranges or self.headers.get("If-Range", etag) != etag:
                return self.answer(200, body, **headers)
            begin, end = int(match[1]), int(match[2] or len(body) - 1) + 1
            if begin >= len(body):
                return self.answer(416, **headers, Content_Range=f"bytes */{len(body)}")
            shown = f"bytes {begin}-{min(end, len(body)) - 1}/{len(body)}"
            return self.answer(206, body[begin:end], **headers, Content_Range=shown)

    return Handler


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def make_place() -> Iterator[Callable[[], WebPlace]]:
    servers: list[tuple[ThreadingHTTPServer, threading.Thread, WebPlace]] = []

    def make() -> WebPlace:
        place = WebPlace("")
        server = _Server(("127.0.0.1", 0), _handler(place))
        place.host = f"127.0.0.1:{server.server_port}"
        place.gate.set()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread, place))
        return place

    yield make
    for server, thread, place in servers:
        place.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def place(make_place: Callable[[], WebPlace]) -> WebPlace:
    return make_place()


@pytest.fixture
def make_sources(tmp_path: Path) -> Iterator[Callable[..., AdapterSources]]:
    """`make_sources(*prefixes, **AdapterConfig)`; the cache is in tmp_path/cache."""
    made: list[AdapterSources] = []

    def make(*prefixes: str, **options: Any) -> AdapterSources:
        options.setdefault("cache_dir", tmp_path / "cache")
        sources = AdapterSources(AdapterConfig(sources=prefixes, **options))
        made.append(sources)
        return sources

    yield make
    for sources in made:
        sources.close()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without long pauses."""
    monkeypatch.setattr(download, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def adapter(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    """An adapter of about 57 KiB."""
    return write_adapter(tmp_path / "origin" / "sql", rank=64)


@pytest.fixture
def content() -> Callable[[Path], Files]:
    """The files of a folder that make an adapter."""

    def read(folder: Path) -> Files:
        return {path.name: path.read_bytes() for path in folder.glob("adapter_*")}

    return read


@pytest.fixture
def unused_address() -> Iterator[str]:
    """A loopback address with a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
