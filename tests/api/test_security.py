"""Access: TLS, mutual TLS and bearer tokens over real connections, and files renewed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex import AsyncClient, TlsConfig
from loraplex.errors import UnauthenticatedError, UnavailableError
from loraplex_server.api.security.reloaded import Reloaded
from loraplex_server.config import ApiConfig, TlsFiles
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.core.request import FinishReason, Request

TOKEN, OTHER = "s3cret-of-alice", "s3cret-of-bob"


def line(name: str, token: str) -> str:
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


async def answer(engine: Any, request: Request) -> None:
    engine.tokens(request, 40, finish=FinishReason.LENGTH)


async def ask(target: str, **settings: Any) -> None:
    """One generation with the project's own client."""
    async with AsyncClient(target, retry=None, timeout=10, **settings) as client:
        await client.generate("hello", max_tokens=1)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("# who may call\n\n" + line("alice", TOKEN) + line("bob", OTHER))
    return path


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are noticed at once, not after a second."""
    monkeypatch.setattr(Reloaded.__init__, "__kwdefaults__", {"look_every_s": 0.0})


class TestTokens:
    def test_a_token_names_the_tenant(self, serving: Any, token_file: Path) -> None:
        async def main() -> None:
            async with serving(answer, token_file=token_file) as server:
                await ask(server.grpc_at, token=TOKEN)
                await ask(server.grpc_at, token=OTHER)
                assert [request.tenant for request in server.engine.submitted] == ["alice", "bob"]

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("metadata", "text"),
        [
            ((), "no token"),
            ((("authorization", f"Bearer {TOKEN}x"),), "not one of"),
            ((("authorization", f"Basic {TOKEN}"),), "no bearer token"),
            ((("authorization", "Bearer"),), "no bearer token"),
            ((("authorization", hashlib.sha256(TOKEN.encode()).hexdigest()),), "no bearer token"),
        ],
    )
    def test_others_are_refused(self, serving: Any, token_file: Path, metadata: Any, text: str) -> None:
        async def main() -> None:
            async with serving(answer, token_file=token_file) as server:
                from loraplex.v1 import generation_pb2 as pb

                calls = [
                    server.generation.GenerateUnary(
                        pb.GenerateUnaryRequest(request=pb.GenerateRequest(text="hello")), metadata=metadata
                    ),
                    server.generation.Generate(pb.GenerateRequest(text="hello"), metadata=metadata).read(),
                ]
                for call in calls:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                    assert text in caught.value.details()
                    assert TOKEN not in caught.value.details()
                assert not server.engine.submitted

        asyncio.run(main())

    def test_every_service_but_health_asks(self, serving: Any, token_file: Path) -> None:
        async def main() -> None:
            async with serving(answer, token_file=token_file) as server:
                check = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
                assert (await check).status == health_pb2.HealthCheckResponse.SERVING
                for service, method in (
                    ("AdapterService", "ListAdapters"),
                    ("AdapterService", "LoadAdapter"),
                    ("ModelService", "GetModel"),
                ):
                    call = server.channel.unary_unary(f"/loraplex.v1.{service}/{method}")
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call(b"")
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                listing = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo()
                await listing.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await listing.read()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

        asyncio.run(main())

    def test_the_file_is_read_again(
        self, serving: Any, token_file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            async with serving(answer, token_file=token_file) as server:
                token_file.write_text(line("carol", "new"))
                await ask(server.grpc_at, token="new")
                with pytest.raises(UnauthenticatedError):
                    await ask(server.grpc_at, token=TOKEN)
                # Half a renewal shuts no one out.
                token_file.write_text("carol new\n")
                await ask(server.grpc_at, token="new")
                assert "line 1 is not" in caplog.text
                assert "carol new" not in caplog.text
                token_file.unlink()
                await ask(server.grpc_at, token="new")
                assert [request.tenant for request in server.engine.submitted] == ["carol"] * 3

        with caplog.at_level(logging.WARNING):
            asyncio.run(main())

    @pytest.mark.parametrize("text", ["", "alice\n", f"alice {TOKEN}\n", "a/b sha256:" + "0" * 64])
    def test_a_bad_file_is_refused_at_start(
        self, start_server: Any, new_engine: Any, tmp_path: Path, caplog: Any, text: str
    ) -> None:
        path = tmp_path / "tokens"
        path.write_text(text)

        async def main() -> None:
            async with new_engine() as engine:
                task, _ = start_server(engine, token_file=path)
                assert await asyncio.wait_for(task, 10) == 1
                assert not engine.launched

        asyncio.run(main())
        assert "loraplex token" in caplog.text
        assert TOKEN not in caplog.text


class TestTls:
    def test_server_alone(self, serving: Any, issue: Any) -> None:
        own, stranger = issue("127.0.0.1"), issue("127.0.0.1")

        async def main() -> None:
            async with serving(answer, tls=TlsFiles(own.certificate, own.key)) as server:
                await ask(server.grpc_at, tls=TlsConfig(own.ca))
                assert [request.tenant for request in server.engine.submitted] == ["default"]
                for tls in (False, True, TlsConfig(stranger.ca)):
                    with pytest.raises(UnavailableError):
                        await ask(server.grpc_at, tls=tls)

        asyncio.run(main())

    def test_mutual(self, serving: Any, issue: Any, token_file: Path) -> None:
        own, alice = issue("127.0.0.1"), issue("a.test", common_name="alice@acme")
        stranger = issue("a.test", common_name="alice@acme")
        files = TlsFiles(own.certificate, own.key, client_ca=alice.ca)

        async def main() -> None:
            async with serving(answer, tls=files) as server:
                await ask(server.grpc_at, tls=TlsConfig(own.ca, alice.certificate, alice.key))
                for tls in (TlsConfig(own.ca), TlsConfig(own.ca, stranger.certificate, stranger.key)):
                    with pytest.raises(UnavailableError):
                        await ask(server.grpc_at, tls=tls)
                assert [request.tenant for request in server.engine.submitted] == ["alice@acme"]
            # With both, a certificate is needed and the token names the tenant.
            async with serving(answer, tls=files, token_file=token_file) as server:
                await ask(server.grpc_at, tls=TlsConfig(own.ca, alice.certificate, alice.key), token=OTHER)
                with pytest.raises(UnauthenticatedError):
                    await ask(server.grpc_at, tls=TlsConfig(own.ca, alice.certificate, alice.key))
                assert [request.tenant for request in server.engine.submitted] == ["bob"]

        asyncio.run(main())

    def test_a_certificate_that_names_no_one_is_refused(self, serving: Any, issue: Any) -> None:
        own, nameless = issue("127.0.0.1"), issue("a.test", common_name="two words")
        files = TlsFiles(own.certificate, own.key, client_ca=nameless.ca)

        async def main() -> None:
            async with serving(answer, tls=files) as server:
                tls = TlsConfig(own.ca, nameless.certificate, nameless.key)
                await ask(server.grpc_at, tls=tls)
                # The alternative name stands in.
                assert [request.tenant for request in server.engine.submitted] == ["a.test"]

        asyncio.run(main())

    def test_renewed_while_serving(self, serving: Any, issue: Any, tmp_path: Path) -> None:
        first, second = issue("127.0.0.1"), issue("127.0.0.1")
        files = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key")

        def install(certificate: Path, key: Path) -> None:
            shutil.copy(certificate, files.certificate)
            shutil.copy(key, files.key)

        async def main() -> None:
            async with serving(answer, tls=files) as server:
                async with AsyncClient(server.grpc_at, tls=TlsConfig(first.ca), retry=None) as client:
                    await client.generate("hello", max_tokens=1)
                    install(second.certificate, second.key)
                    await ask(server.grpc_at, tls=TlsConfig(second.ca))
                    with pytest.raises(UnavailableError):
                        await ask(server.grpc_at, tls=TlsConfig(first.ca))
                    # A connection that stands, stays.
                    await client.generate("hello", max_tokens=1)
                # A pair that does not match is not taken up.
                install(first.certificate, second.key)
                await ask(server.grpc_at, tls=TlsConfig(second.ca))

        install(first.certificate, first.key)
        asyncio.run(main())

    @pytest.mark.parametrize("what", ["missing", "no PEM", "swapped", "not a pair"])
    def test_bad_files_are_refused_at_start(
        self, start_server: Any, new_engine: Any, issue: Any, tmp_path: Path, caplog: Any, what: str
    ) -> None:
        own, other = issue("127.0.0.1"), issue("127.0.0.1")
        text = tmp_path / "text"
        text.write_text("hello")
        files = {
            "missing": TlsFiles(tmp_path / "none", own.key),
            "no PEM": TlsFiles(text, own.key),
            "swapped": TlsFiles(own.key, own.certificate),
            "not a pair": TlsFiles(own.certificate, other.key),
        }[what]

        async def main() -> None:
            async with new_engine() as engine:
                task, _ = start_server(engine, tls=files)
                assert await asyncio.wait_for(task, 10) == 1
                assert not engine.launched

        asyncio.run(main())
        assert "TLS cannot be set up" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "gpu-box"])
def test_other_addresses_need_tls_or_consent(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--tls-certificate"):
        ApiConfig(host=host)
    ApiConfig(host=host, allow_insecure=True)
    ApiConfig(host=host, tls=TlsFiles(Path("a"), Path("b")))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_neither(host: str) -> None:
    ApiConfig(host=host)


def test_reflection_can_be_off(serving: Any) -> None:
    async def main() -> None:
        async with serving(reflection=False) as server:
            listing = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo()
            # The answer may be there before the question has gone.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await listing.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert await listing.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())


class TestReloaded:
    def test_reads_only_what_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "value"
        path.write_text("one")
        reads = []

        def read() -> str:
            reads.append(path.read_text())
            if reads[-1] == "bad":
                raise ValueError("bad")
            return reads[-1]

        found = Reloaded([path], read)
        assert [found.get(), found.get()] == ["one", "one"]
        path.write_text("other")
        assert found.get() == "other"
        path.write_text("bad")
        assert found.get() == "other"
        assert found.get() == "other"
        os.replace(tmp_path / "value", tmp_path / "moved")
        (tmp_path / "value").write_text("new")
        assert found.get() == "new"
        assert reads == ["one", "other", "bad", "new"]

    def test_looks_no_more_often_than_told(self, tmp_path: Path) -> None:
        path = tmp_path / "value"
        path.write_text("one")
        found = Reloaded([path], path.read_text, look_every_s=3600.0)
        path.write_text("other")
        assert found.get() == "one"

    def test_what_cannot_be_read_at_first_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="none"):
            Reloaded([tmp_path / "none"], (tmp_path / "none").read_text)


def test_typed_refusal() -> None:
    from loraplex_server.api.security.authentication import Authenticator

    with pytest.raises(FailedPreconditionError, match="token file"):
        Authenticator(Path("none"))
