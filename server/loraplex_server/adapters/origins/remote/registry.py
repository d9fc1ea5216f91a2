"""The backend of a scheme: one registered here, a built-in one, or another package's."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from loraplex_server.adapters.origins.remote.protocol import Backend
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.core.source_uri import AllowedSources

ENTRY_POINTS = "loraplex.adapter_backends"
"""Group of entry points, named by scheme, through which other packages add backends."""

BackendFactory = Callable[[AllowedSources], Backend]
"""Makes a backend; it must follow no redirect to where the given prefixes do not allow."""

_factories: dict[str, BackendFactory] = {}


def register_backend(scheme: str, factory: BackendFactory) -> None:
    """Has `scheme` served by `factory` in this process, also if it was served by another before.

    The engine runs in a process of its own: a package that is to be found there declares an entry point of
    the group `loraplex.adapter_backends`, named by the scheme.
    """
    _factories[scheme] = factory


def make_backend(scheme: str, allowed: AllowedSources) -> Backend:
    """The backend of a scheme.

    Raises:
        InvalidArgumentError: nothing serves it.
        FailedPreconditionError: its package is not installed; the text says which extra has it.
    """
    factory = _factories.get(scheme) or _built_in(scheme) or _entry_point(scheme)
    if factory is None:
        raise InvalidArgumentError.field("adapter_sources", f"nothing is installed for {scheme}://")
    try:
        return factory(allowed)
    except ImportError as error:
        raise FailedPreconditionError(
            f"{scheme}:// needs {error.name or error}, which is not installed; "
            "in a checkout: pip install '.[remote]'"
        ) from error


def _built_in(scheme: str) -> BackendFactory | None:
    # Each brings libraries that only its own users need.
    match scheme:
        case "hf":
            from loraplex_server.adapters.origins.remote.hub import HubBackend

            return HubBackend
        case "https" | "http":
            from loraplex_server.adapters.origins.remote.web import WebBackend

            return WebBackend
        case "s3" | "gs" | "az":
            from loraplex_server.adapters.origins.remote.cloud import CloudBackend

            return lambda _: CloudBackend(scheme)
    return None


def _entry_point(scheme: str) -> BackendFactory | None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=scheme):
        factory: BackendFactory = entry_point.load()
        return factory
    return None
