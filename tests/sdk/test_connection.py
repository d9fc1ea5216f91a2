"""Addresses, tokens, metadata and TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import Keepalive, TlsConfig
from loraplex._channel import is_local
from loraplex.errors import InvalidRequestError, UnavailableError

LOCAL = [
    "127.0.0.1:50051",
    "127.9.9.9:1",
    "localhost:50051",
    "[::1]:50051",
    "ipv4:127.0.0.1:50051",
    "ipv6:[::1]:50051",
    "dns:///localhost:50051",
    "dns:localhost:50051",
    "unix:/run/loraplex.sock",
]
ELSEWHERE = [
    "10.0.0.5:50051",
    "0.0.0.0:50051",
    "localhost.example.com:50051",
    "127.0.0.1.example.com:50051",
    "dns:///example.com:50051",
    "ipv4:127.0.0.1:50051,8.8.8.8:50051",
    "[2001:db8::1]:50051",
    "xds:///127.0.0.1:1",
]


@pytest.mark.parametrize("target", LOCAL)
def test_local_addresses(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_other_addresses(target: str) -> None:
    assert not is_local(target)


@pytest.mark.parametrize("address", ["127.0.0.1", "http://127.0.0.1:50051", "::1", "", "host:port"])
def test_addresses_that_could_never_work(drive: Any, address: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"server: .*HOST:PORT"):
        drive.client_class(address)


def test_token_and_metadata_go_with_every_call(drive: Any, server: Any, connect: Any) -> None:
    client = connect(token="s3cret", metadata={"X-Tenant": "blue"})
    drive(lambda: client.generate("x"))
    drive(lambda: client.stream("x").collect())
    for metadata in server.metadata:
        assert metadata["authorization"] == "Bearer s3cret"
        assert metadata["x-tenant"] == "blue"
        assert metadata["user-agent"].startswith("loraplex-python/")
    assert len(server.metadata) == 2
    assert "s3cret" not in repr(client)


def test_without_a_token_there_is_no_authorization(drive: Any, server: Any, client: Any) -> None:
    drive(lambda: client.generate("x"))
    assert "authorization" not in server.metadata[0]


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_token_does_not_cross_a_network_in_the_clear(connect: Any, target: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"token: would go to .* unencrypted") as caught:
        connect(target, token="s3cret")
    assert "s3cret" not in str(caught.value)
    connect(target, token="s3cret", allow_insecure_token=True)
    connect(target, token="s3cret", tls=True)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ümlaut"])
def test_tokens_that_no_header_can_hold(connect: Any, token: str) -> None:
    with pytest.raises(InvalidRequestError, match="token: must be printable"):
        connect(token=token)


def test_a_proxy_from_the_environment_is_not_used_for_this_machine(
    drive: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = connect(retry=None)
    assert drive(lambda: client.generate("x")).text == "Grüße"


def test_channel_options_win(drive: Any, server: Any, connect: Any) -> None:
    client = connect(channel_options={"grpc.primary_user_agent": "mine/1"}, keepalive=Keepalive(30, 5))
    drive(lambda: client.generate("x"))
    assert server.metadata[0]["user-agent"].startswith("mine/1")


@pytest.mark.parametrize("wrong", [{"interval_s": 0}, {"timeout_s": -1}])
def test_keepalive_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        Keepalive(**wrong)


@pytest.fixture(scope="session")
def certificates(issue: Any) -> dict[str, Any]:
    """The server's for loraplex.test, one client's, a stranger's; each of an authority of its own."""
    return {
        "server": issue("loraplex.test"),
        "client": issue("client.test", common_name="client"),
        "stranger": issue("stranger.test", common_name="stranger"),
    }


@pytest.fixture(params=[False, True], ids=["tls", "mutual-tls"])
def tls_server(request: pytest.FixtureRequest, new_server: Any, certificates: dict[str, Any]) -> Any:
    mutual = request.param
    own = certificates["server"]
    server = new_server()
    server.mutual = mutual
    server.start(
        credentials=grpc.ssl_server_credentials(
            [(own.key.read_bytes(), own.certificate.read_bytes())],
            root_certificates=certificates["client"].ca.read_bytes() if mutual else None,
            require_client_auth=mutual,
        )
    )
    return server


class TestTls:
    def test_from_files(
        self, drive: Any, connect: Any, tls_server: Any, certificates: dict[str, Any]
    ) -> None:
        own = certificates["client"]
        tls = TlsConfig(
            certificates["server"].ca,
            certificate=str(own.certificate) if tls_server.mutual else None,
            key=own.key if tls_server.mutual else None,
            server_name="loraplex.test",
        )
        client = connect(tls_server.address, tls=tls, token="s3cret")
        assert drive(lambda: client.generate("x")).text == "Grüße"
        assert tls_server.metadata[0]["authorization"] == "Bearer s3cret"

    def test_from_bytes(
        self, drive: Any, connect: Any, tls_server: Any, certificates: dict[str, Any]
    ) -> None:
        own = certificates["client"]
        tls = TlsConfig(
            ca=certificates["server"].ca.read_bytes(),
            certificate=own.certificate.read_bytes(),
            key=own.key.read_bytes(),
            server_name="loraplex.test",
        )
        client = connect(tls_server.address, tls=tls)
        assert drive(lambda: client.generate("x")).text == "Grüße"

    @pytest.mark.parametrize("wrong", ["ca", "name", "usual authorities", "plain text"])
    def test_refuses(
        self, drive: Any, connect: Any, tls_server: Any, certificates: dict[str, Any], wrong: str
    ) -> None:
        own = certificates["client"]
        pair = {"certificate": own.certificate, "key": own.key}
        tls = {
            "ca": TlsConfig(certificates["stranger"].ca, **pair, server_name="loraplex.test"),
            "name": TlsConfig(certificates["server"].ca, **pair, server_name="other.test"),
            "usual authorities": True,
            "plain text": False,
        }[wrong]
        client = connect(tls_server.address, tls=tls, retry=None)
        with pytest.raises(UnavailableError):
            drive(lambda: client.generate("x"))
        assert not tls_server.calls

    def test_server_refuses_strangers(
        self, drive: Any, connect: Any, tls_server: Any, certificates: dict[str, Any]
    ) -> None:
        stranger = certificates["stranger"]
        tls = TlsConfig(
            certificates["server"].ca,
            stranger.certificate,
            stranger.key,
            server_name="loraplex.test",
        )
        client = connect(tls_server.address, tls=tls, retry=None)
        if tls_server.mutual:
            with pytest.raises(UnavailableError):
                drive(lambda: client.generate("x"))
        else:
            assert drive(lambda: client.generate("x")).text == "Grüße"

    def test_files_are_checked(self, connect: Any, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match=r"tls\.ca: cannot read .*No such file"):
            connect(tls=TlsConfig(tmp_path / "none.pem"))
        empty = tmp_path / "empty.pem"
        empty.touch()
        with pytest.raises(InvalidRequestError, match=r"tls\.ca: holds no PEM"):
            connect(tls=TlsConfig(empty))
        with pytest.raises(InvalidRequestError, match="both certificate and key"):
            TlsConfig(certificate=b"-----BEGIN CERTIFICATE-----")
