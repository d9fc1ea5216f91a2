"""The Hugging Face hub, as huggingface_hub talks to it: a HEAD and a GET of .../resolve/revision/file."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from loraplex_server.adapters.origins.resolver import AdapterSources
from loraplex_server.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

WEIGHTS = "adapter_model.safetensors"
COMMIT, OLDER = "1" * 40, "2" * 40
MakeSources = Callable[..., AdapterSources]
Content = Callable[[Path], dict[str, bytes]]
pytestmark = pytest.mark.usefixtures("hurry")


class Hub:
    """Repositories by (name, revision); etags as the hub's: SHA-256 of weights, git's object id of others."""

    def __init__(self) -> None:
        self.commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self.break_after: list[int] = []
        self.spoil = False
        self.deny = False
        self.down = False

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        span = handler.headers.get("Range", "")
        if "/resolve/" not in handler.path:
            # The library asks for other things of its own.
            handler.send_error(404)
            return
        self.requests.append((handler.command, handler.path, span, handler.headers.get("Authorization", "")))
        match = re.fullmatch(r"/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", handler.path)
        assert match is not None, handler.path
        repository, commit, name = match[1], self.commits.get(match[2]), match[3]
        known = any(repository == other for other, _, _ in self.files)
        body = self.files.get((repository, commit or "", name))
        code = ""
        if self.down:
            code = "Down"
        elif self.deny:
            code = "GatedRepo"
        elif not known:
            code = "RepoNotFound"
        elif commit is None:
            code = "RevisionNotFound"
        elif body is None:
            code = "EntryNotFound"
        if code or body is None:
            handler.send_response({"Down": 503, "GatedRepo": 403}.get(code, 404))
            handler.send_header("X-Error-Code", code)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        begin = int(span.removeprefix("bytes=").removesuffix("-") or 0)
        git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        etag = hashlib.sha256(body).hexdigest() if name.endswith(".safetensors") else git
        handler.send_response(206 if begin else 200)
        handler.send_header("X-Repo-Commit", commit or "")
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("Content-Length", str(len(body) - begin))
        handler.end_headers()
        if handler.command == "GET":
            sent = self.break_after.pop(0) if self.break_after else len(body)
            handler.wfile.write((bytes(len(body)) if self.spoil else body)[begin : begin + sent])
            handler.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, adapter: Path, content: Content) -> Iterator[Hub]:
    hub = Hub()
    for commit in (COMMIT, OLDER):
        for name, body in content(adapter).items():
            hub.files["team/sql", commit, f"v/{name}"] = hub.files["team/sql", commit, name] = body

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    # The library reads its environment when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    from huggingface_hub.utils import close_session

    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_files_are_of_one_commit_and_verified(
    hub: Hub, make_sources: MakeSources, adapter: Path, content: Content
) -> None:
    sources = make_sources("hf://team")
    folder = sources.resolve("hf://team/sql")
    assert content(folder) == content(adapter)
    paths = [path for _, path, _, _ in hub.requests]
    assert paths[0] == "/team/sql/resolve/main/adapter_config.json"
    assert all(path.startswith(f"/team/sql/resolve/{COMMIT}/") for path in paths[1:])
    assert {token for _, _, _, token in hub.requests} == {"Bearer hf_secret"}
    assert content(sources.resolve("hf://team/sql@v1/v")) == content(adapter)
    assert hub.requests[-1][1] == f"/team/sql/resolve/{OLDER}/v/{WEIGHTS}"


def test_a_commit_is_asked_for_once(hub: Hub, make_sources: MakeSources) -> None:
    sources = make_sources("hf://team", require_commit=True)
    folder = sources.resolve(f"hf://team/sql@{COMMIT}")
    asked = len(hub.requests)
    assert sources.resolve(f"hf://team/sql@{COMMIT}") == folder
    assert len(hub.requests) == asked, "what never changes needs no second look"
    for source in ("hf://team/sql", "hf://team/sql@main"):
        with pytest.raises(InvalidArgumentError, match="40 hex digits"):
            sources.resolve(source)


def test_a_broken_download_goes_on(
    hub: Hub, make_sources: MakeSources, adapter: Path, content: Content
) -> None:
    hub.break_after = [1 << 20, 20_000]
    folder = make_sources("hf://team").resolve("hf://team/sql")
    assert content(folder) == content(adapter)
    method, _, span, _ = hub.requests[-1]
    assert method == "GET"
    assert 0 < int(span.removeprefix("bytes=").removesuffix("-")) <= 20_000


def test_spoilt_bytes_are_refused(hub: Hub, make_sources: MakeSources) -> None:
    hub.spoil = True
    with pytest.raises(FailedPreconditionError, match="git object id"):
        make_sources("hf://team").resolve("hf://team/sql")


def test_errors_are_typed(hub: Hub, make_sources: MakeSources) -> None:
    sources = make_sources("hf://")
    for source, reason in (
        ("hf://team/nothing", "no such repository"),
        ("hf://team/sql@v9", "no such revision"),
        ("hf://team/sql/none", "adapter_config.json"),
    ):
        with pytest.raises(NotFoundError, match=reason) as caught:
            sources.resolve(source)
        assert source in str(caught.value)
    hub.deny = True
    with pytest.raises(PermissionDeniedError, match="HF_TOKEN"):
        sources.resolve("hf://team/sql")
    hub.down = True
    with pytest.raises(UnavailableError, match="503"):
        sources.resolve("hf://team/sql")


def test_offline_the_hubs_own_cache_serves(
    hub: Hub,
    make_sources: MakeSources,
    adapter: Path,
    content: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = tmp_path / "hub" / "models--team--sql"
    for name, body in content(adapter).items():
        blob = repository / "blobs" / hashlib.sha256(body).hexdigest()
        link = repository / "snapshots" / COMMIT / name
        for path in (blob, link, repository / "refs" / "main"):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(body)
        link.symlink_to(blob)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    sources = make_sources("hf://team")
    assert content(sources.resolve("hf://team/sql")) == content(adapter)
    with pytest.raises(FailedPreconditionError, match="offline mode"):
        sources.resolve("hf://team/other")
    assert hub.requests == []
