from __future__ import annotations

import pytest

from loraplex_server.core.errors import InvalidArgumentError, PermissionDeniedError
from loraplex_server.core.source_uri import AllowedSources, parse_uri, redact

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "ab" * 32


def test_an_address_has_its_parts() -> None:
    uri = parse_uri(f"hf://owner/name@{COMMIT}/sub/folder/#sha256={DIGEST.upper()}&config_sha256={'0' * 64}")
    assert (uri.repo_id, uri.segments[1:], uri.revision) == ("owner/name", ("sub", "folder"), COMMIT)
    assert (uri.is_pinned, uri.sha256, uri.config_sha256) == (True, DIGEST, "0" * 64)
    assert str(uri) == f"hf://owner/name@{COMMIT}/sub/folder"
    assert parse_uri("hf://owner/name@refs%2Fpr%2F1").revision == "refs/pr/1"
    assert not parse_uri("hf://owner/name@main").is_pinned
    assert parse_uri("s3://bucket/a b/c%20d").key("f") == "bucket/a b/c%20d/f"
    web = parse_uri("HTTPS://me:pw@Example.COM:443/a%20b/?sig=1")
    assert web.url("f") == "https://example.com/a%20b/f?sig=1"
    assert (str(web), web.userinfo) == ("https://example.com/a b", "me:pw")
    assert parse_uri("http://[::1]:80/a").host == "[::1]"


@pytest.mark.parametrize(
    "source",
    [
        "s3:///key",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/a/./b",
        "s3://bucket/a\\b",
        "s3://bucket/a?versionId=1",
        "s3://key:secret@bucket/a",
        "s3://bucket/a\n",
        "s3://bucket/a#md5=1",
        f"s3://bucket/a#sha256={DIGEST}&sha256={DIGEST}",
        "s3://bucket/a#sha256=abc",
        "hf://owner",
        "hf://owner/name@",
        "hf://owner/name@../..",
        "hf://owner/name@a%2F..%2Fb",
        "hf://token@owner/name",
        "https:///a",
        "https://host/%2e%2e/a",
        "https://host/a%2fb",
        "https://host/a%5Cb",
        "https://host/a%00",
        "https://host\\@evil/a",
        "https://[::1/a",
        "https://ho st/a",
        "//host/a",
        "",
    ],
)
def test_what_may_lead_astray_is_refused(source: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_uri(source)
    assert caught.value.info.violations[0].field == "source"
    assert "secret" not in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("s3://bucket/team/", "s3://bucket/team/a", "s3://bucket/team-2/a"),
        ("s3://bucket", "s3://bucket/a", "s3://bucket2/a"),
        ("s3://bucket/a", "s3://bucket/a", "gs://bucket/a"),
        ("hf://owner", "hf://owner/name@main", "hf://owner2/name"),
        ("hf://", "hf://anybody/name", "s3://anybody/name"),
        ("hf://owner/name@v1", "hf://owner/name@v1/sub", "hf://owner/name@v2"),
        ("hf://owner/name", "hf://owner/name@v2", "hf://owner/name2"),
        ("https://host/a", "https://u:p@HOST:443/a/b?x=1", "https://host:8443/a/b"),
        ("https://host/a", "https://host/a/b", "http://host/a/b"),
        ("https://host/a", "https://host/%61/b", "https://host.evil/a/b"),
        ("http://127.0.0.1:80/a", "http://127.0.0.1/a/b", "http://127.0.0.2/a/b"),
    ],
)
def test_prefixes_cover_whole_parts(prefix: str, inside: str, outside: str) -> None:
    allowed = AllowedSources([prefix])
    allowed.check(parse_uri(inside))
    with pytest.raises(PermissionDeniedError, match="--adapter-source"):
        allowed.check(parse_uri(outside))


@pytest.mark.parametrize(
    "prefix",
    [
        "/folder",
        "s3://",
        "https://",
        "http://host/a",
        "http://10.0.0.1/a",
        "s3://b/a#x",
        "https://u:p@host/a",
    ],
)
def test_bad_prefixes_are_refused(prefix: str) -> None:
    with pytest.raises(InvalidArgumentError, match="adapter_sources"):
        AllowedSources([prefix])


def test_secrets_are_taken_out() -> None:
    assert redact("https://u:p@host/a?sig=1#sha256=00") == "https://host/a#sha256=00"
    assert redact("s3://key:se/cr@et@bucket/a") == "s3://key:se/cr@et@bucket/a"
    assert redact("/a?b@c") == "/a?b@c"
