"""Addresses of remote adapters: their parsing, and the operator's list of allowed prefixes.

    s3://bucket/path   gs://bucket/path   az://container/path   https://host/path
    hf://owner/name@revision/subfolder

`#sha256=HEX` pins the weights and `&config_sha256=HEX` the configuration. Addresses are decoded and then
compared part by part, so that no spelling of a path can leave an allowed prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from loraplex_server.core.errors import InvalidArgumentError, PermissionDeniedError, Reason
from loraplex_server.core.text import quoted

HUB = "hf"
WEB = ("http", "https")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WEB_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9][a-z0-9._-]*)(:\d{1,5})?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PIN_NAMES = ("sha256", "config_sha256")


def scheme_of(source: str) -> str:
    """The scheme in lower case; "" for a plain path."""
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""


def redact(source: str) -> str:
    """`source` without the parts that may be secret: user information and the query of a URL."""
    if not scheme_of(source):
        return source
    body, mark, fragment = source.partition("#")
    body, _, _ = body.partition("?")
    scheme, _, rest = body.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{mark}{fragment}"


@dataclass(frozen=True)
class SourceUri:
    """The address of a remote folder with one adapter. Its `str` has no credentials and no pins.

    Attributes:
        scheme: in lower case.
        host: bucket, container, owner on the hub, or host and port.
        segments: the parts of the path, decoded; on the hub the repository's name, then the subfolder.
        revision: branch, tag or commit on the hub; "" is the default branch.
        sha256: the digest that the weights must have, in lower case hex; "" allows any.
        config_sha256: the same for the configuration.
        userinfo: "user:password" of a web address.
        query: of a web address, sent with the request for each file: a signature, for example.
    """

    scheme: str
    host: str
    segments: tuple[str, ...]
    revision: str = ""
    sha256: str = ""
    config_sha256: str = ""
    userinfo: str = field(default="", repr=False)
    query: str = field(default="", repr=False)

    def __str__(self) -> str:
        if self.scheme != HUB:
            return "/".join([f"{self.scheme}://{self.host}", *self.segments])
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        name = [self.segments[0] + at] if self.segments else []
        return "/".join([f"{HUB}://{self.host}", *name, *self.segments[1:]])

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit on the hub, whose files never change."""
        return self.scheme == HUB and _COMMIT.fullmatch(self.revision) is not None

    @property
    def repo_id(self) -> str:
        """The repository's name on the hub: `owner/name`."""
        return f"{self.host}/{self.segments[0]}"

    def key(self, filename: str) -> str:
        """Path of one of the folder's files in an object store, beginning with the bucket."""
        return "/".join([self.host, *self.segments, filename])

    def url(self, filename: str) -> str:
        """Address of one of the folder's files on a web server, query included."""
        path = "/".join(quote(part, safe="") for part in [*self.segments, filename])
        return f"{self.scheme}://{self.host}/{path}" + (f"?{self.query}" if self.query else "")


def parse_uri(source: str, *, field_name: str = "source", is_prefix: bool = False) -> SourceUri:
    """Parses and checks the address of a remote adapter, or with `is_prefix` of a folder of them.

    Raises:
        InvalidArgumentError: it is malformed, has a path that may lead astray, or credentials where they
            do not belong.
    """

    def bad(why: str) -> InvalidArgumentError:
        return InvalidArgumentError.field(field_name, f"{quoted(redact(source))} {why}")

    scheme = scheme_of(source)
    if not scheme or not source.isprintable() or "\\" in source:
        raise bad("is not the address of a remote adapter")
    try:
        parts = urlsplit(source, allow_fragments=True)
    except ValueError as error:
        raise bad("is malformed") from error
    userinfo, at, host = parts.netloc.rpartition("@")
    if scheme in WEB:
        host = host.lower().removesuffix(_DEFAULT_PORTS[scheme])
        if _WEB_HOST.fullmatch(host) is None:
            raise bad("needs a host")
    elif at or parts.query:
        raise bad("may have no credentials and no query; give credentials to the server's environment")
    elif _BUCKET.fullmatch(host) is None and not (is_prefix and scheme == HUB and not host):
        raise bad("needs the hub's owner/name" if scheme == HUB else "needs a bucket")
    if is_prefix and (at or parts.query or parts.fragment):
        raise bad("is a prefix, and may have no credentials, query or fragment")
    segments = parts.path.removeprefix("/").removesuffix("/").split("/") if parts.path.strip("/") else []
    revision = ""
    if scheme == HUB and segments:
        segments[0], at, revision = segments[0].partition("@")
        revision = unquote(revision)
        if at and not _is_revision(revision):
            raise bad("has no valid revision after the '@'")
        if _BUCKET.fullmatch(segments[0]) is None:
            raise bad("needs the hub's owner/name")
    if scheme == HUB and not segments and not is_prefix:
        raise bad("needs the hub's owner/name")
    if scheme in WEB:
        segments = [unquote(segment) for segment in segments]
    for segment in segments:
        if segment in ("", ".", "..") or not segment.isprintable() or set(segment) & set("/\\?#"):
            raise bad(f"has {quoted(segment)} in its path, which is not allowed there")
    pins = _pins(parts.fragment)
    if pins is None:
        raise bad("has a fragment that is not #sha256=<64 hex digits>[&config_sha256=<64 hex digits>]")
    return SourceUri(scheme, host, tuple(segments), revision, *pins, userinfo, parts.query)


def _is_revision(revision: str) -> bool:
    parts = revision.split("/")
    return all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part) and ".." not in part for part in parts)


def _pins(fragment: str) -> tuple[str, str] | None:
    """Digests of the weights and of the configuration; None if the fragment is not a valid pin."""
    pins = dict.fromkeys(_PIN_NAMES, "")
    for pin in fragment.split("&") if fragment else ():
        name, _, digest = pin.partition("=")
        digest = digest.lower()
        if pins.get(name) != "" or _SHA256.fullmatch(digest) is None:
            return None
        pins[name] = digest
    return pins["sha256"], pins["config_sha256"]


class AllowedSources:
    """The prefixes under which the operator allows downloads (--adapter-source).

    Raises:
        InvalidArgumentError: a prefix is malformed, or is plain http to another machine.
    """

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = tuple(
            parse_uri(prefix, field_name="adapter_sources", is_prefix=True) for prefix in prefixes
        )
        for prefix in self._prefixes:
            if prefix.scheme == "http" and re.sub(r":\d+$", "", prefix.host) not in _LOOPBACK:
                raise InvalidArgumentError.field(
                    "adapter_sources", f"{str(prefix)!r} is neither encrypted nor on this machine; use https"
                )

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    @property
    def schemes(self) -> frozenset[str]:
        """Schemes of the allowed prefixes."""
        return frozenset(prefix.scheme for prefix in self._prefixes)

    def permits(self, uri: SourceUri) -> bool:
        """True if `uri` lies under a prefix; whole path parts are compared."""
        return any(_covers(prefix, uri) for prefix in self._prefixes)

    def check(self, uri: SourceUri) -> None:
        """Raises PermissionDeniedError unless `uri` is allowed."""
        if not self.permits(uri):
            raise PermissionDeniedError(
                f"source {quoted(str(uri))} is not under an allowed prefix (--adapter-source)",
                resource=("source", str(uri)),
                reason=Reason.SOURCE_NOT_ALLOWED,
            )


def _covers(prefix: SourceUri, uri: SourceUri) -> bool:
    return (
        prefix.scheme == uri.scheme
        and prefix.host in ("", uri.host)
        and prefix.segments == uri.segments[: len(prefix.segments)]
        and prefix.revision in ("", uri.revision)
    )
