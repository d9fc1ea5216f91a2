"""Adapters whose files are being looked at, those that cannot be served, and how both are answered."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

from loraplex_server.adapters.files.folder import Stamp, stamp
from loraplex_server.adapters.residency.record import StatusCallback
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ServerError,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """An adapter whose files are being looked at, or fetched or made before.

    Attributes:
        read: its weights are wanted in host memory next; if not, it is registered even if it is broken.
        inplace: it is to replace the adapter that is registered under its name.
        unwanted: set when nobody waits for it any more; whoever makes its files may stop.
    """

    source: str
    done: StatusCallback
    read: bool = True
    inplace: bool = False
    unwanted: threading.Event = dataclasses.field(default_factory=threading.Event, compare=False)

    def give_up(self, error: ServerError) -> None:
        """Answers that it will not be."""
        self.unwanted.set()
        self.done(error)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A registered adapter that cannot be served, and what its files looked like then."""

    source: str
    error: ServerError
    stamp: Stamp

    def may_have_healed(self) -> bool:
        lasting = FailedPreconditionError | PermissionDeniedError | NotFoundError | InvalidArgumentError
        return not isinstance(self.error, lasting) or stamp(Path(self.source)) != self.stamp


def not_found(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no adapter {name!r}", resource=("adapter", name), reason=Reason.ADAPTER_NOT_FOUND
    )


def unloaded(name: str) -> CancelledError:
    return CancelledError(
        f"adapter {name!r} was unloaded", resource=("adapter", name), reason=Reason.ADAPTER_UNLOADED
    )


def superseded(name: str) -> CancelledError:
    return CancelledError(
        f"a later load of adapter {name!r} took this one's place", resource=("adapter", name)
    )


def taken(name: str, source: str, other: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"adapter {name!r} is registered from {source!r} and cannot come from {other!r} too",
        resource=("adapter", name),
        reason=Reason.ADAPTER_EXISTS,
    )


def log_outcome(outcome: AdapterStatus | ServerError) -> None:
    """The callback of what nobody asked for."""
    if isinstance(outcome, ServerError):
        _log.warning("%s", outcome)
    else:
        _log.info("adapter %r is registered from %s", outcome.name, outcome.source)
