"""Access over HTTP: tokens, TLS and mutual TLS over real connections, and files renewed meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.api.security.reloaded import Reloaded
from loraplex_server.config import TlsFiles
from loraplex_server.core.request import FinishReason, Request

pytest.importorskip("uvicorn", reason="needs the server extra: uvicorn")

TOKEN, OTHER = "s3cret-of-alice", "s3cret-of-bob"
BODY = json.dumps({"model": "parrot", "prompt": "hello"})


async def answer(engine: Any, request: Request) -> None:
    engine.tokens(request, 40, finish=FinishReason.LENGTH)


async def ask(
    at: str,
    method: str = "POST",
    path: str = "/v1/completions",
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, str], Any]:
    """One request on a connection of its own."""

    def call() -> tuple[int, dict[str, str], Any]:
        connection = (
            http.client.HTTPConnection(at, timeout=20)
            if tls is None
            else http.client.HTTPSConnection(at, timeout=20, context=tls)
        )
        headers = {"content-type": "application/json"}
        if token is not None:
            headers["authorization"] = token
        try:
            connection.request(method, path, BODY if method == "POST" else None, headers)
            response = connection.getresponse()
            found = {key.lower(): value for key, value in response.getheaders()}
            return response.status, found, response.read()
        finally:
            connection.close()

    return await asyncio.to_thread(call)


def trusting(authority: Path, *own: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority))
    if own:
        context.load_cert_chain(*own)
    return context


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are noticed at once, not after a second."""
    monkeypatch.setattr(Reloaded.__init__, "__kwdefaults__", {"look_every_s": 0.0})


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    lines = [
        f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"
        for name, token in (("alice", TOKEN), ("bob", OTHER))
    ]
    path.write_text("".join(lines))
    return path


def test_tokens_name_the_tenant_and_all_but_health_ask(serving: Any, token_file: Path) -> None:
    async def main() -> None:
        async with serving(answer, http_port=0, model_name="parrot", token_file=token_file) as server:
            for token in (TOKEN, OTHER):
                assert (await ask(server.http_at, token=f"Bearer {token}"))[0] == 200
            assert [request.tenant for request in server.engine.submitted] == ["alice", "bob"]
            for bad in (None, f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", TOKEN):
                status, headers, body = await ask(server.http_at, token=bad)
                error = json.loads(body)["error"]
                assert (status, error["type"], error["code"]) == (
                    401,
                    "authentication_error",
                    "unauthenticated",
                )
                assert headers["www-authenticate"] == "Bearer"
                assert TOKEN.encode() not in body
            for path in ("/v1/models", "/v1/models/a", "/metrics", "/openapi.json", "/nothing"):
                assert (await ask(server.http_at, "GET", path))[0] == 401, path
            assert (await ask(server.http_at, "GET", "/health"))[0] == 200
            assert len(server.engine.submitted) == 2

    asyncio.run(main())


def test_tls_and_its_renewal(serving: Any, issue: Any, tmp_path: Path) -> None:
    first, second, stranger = issue("127.0.0.1"), issue("127.0.0.1"), issue("127.0.0.1")
    files = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key")

    def install(certificate: Path, key: Path) -> None:
        shutil.copy(certificate, files.certificate)
        shutil.copy(key, files.key)

    async def main() -> None:
        async with serving(answer, http_port=0, model_name="parrot", tls=files) as server:
            assert (await ask(server.http_at, tls=trusting(first.ca)))[0] == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(server.http_at, tls=trusting(stranger.ca))
            with pytest.raises((http.client.HTTPException, OSError)):
                await ask(server.http_at)
            install(second.certificate, second.key)
            assert (await ask(server.http_at, tls=trusting(second.ca)))[0] == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(server.http_at, tls=trusting(first.ca))
            # A pair that does not match is not taken up.
            install(first.certificate, second.key)
            assert (await ask(server.http_at, tls=trusting(second.ca)))[0] == 200

    install(first.certificate, first.key)
    asyncio.run(main())


def test_mutual_tls_names_the_tenant_and_its_authority_can_change(
    serving: Any, issue: Any, tmp_path: Path
) -> None:
    own, alice = issue("127.0.0.1"), issue("a.test", common_name="alice@acme")
    carol = issue("c.test", common_name="two words")
    authority = tmp_path / "clients.pem"
    shutil.copy(alice.ca, authority)
    files = TlsFiles(own.certificate, own.key, client_ca=authority)
    as_alice = trusting(own.ca, alice.certificate, alice.key)
    as_carol = trusting(own.ca, carol.certificate, carol.key)

    async def main() -> None:
        async with serving(answer, http_port=0, model_name="parrot", tls=files) as server:
            assert (await ask(server.http_at, tls=as_alice))[0] == 200
            for refused in (trusting(own.ca), as_carol):
                with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
                    await ask(server.http_at, tls=refused)
            shutil.copy(carol.ca, authority)
            assert (await ask(server.http_at, tls=as_carol))[0] == 200
            with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
                await ask(server.http_at, tls=as_alice)
            # A common name that is none gives way to the alternative one.
            assert [request.tenant for request in server.engine.submitted] == ["alice@acme", "c.test"]

    asyncio.run(main())
