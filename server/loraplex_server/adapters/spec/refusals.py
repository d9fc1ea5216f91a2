"""Refusals: why the files of an adapter cannot be served, and how it is said."""

from __future__ import annotations

from loraplex_server.core.adapter_files import PICKLE_FILES
from loraplex_server.core.errors import FailedPreconditionError, Reason


class MalformedFileError(ValueError):
    """A file of the adapter cannot be read safely; the text says what is wrong where."""


class UnsupportedError(ValueError):
    """The files ask for something that is not served; the text names it and the remedy."""


def refusal(name: str, reason: str) -> FailedPreconditionError:
    """The error for an adapter that cannot be served, with the remedy in `reason`."""
    return FailedPreconditionError(
        f"adapter {name!r}: {reason}", resource=("adapter", name), reason=Reason.ADAPTER_NOT_SERVABLE
    )


def pickle_refusal(name: str) -> str:
    """The reason for which one of `PICKLE_FILES` is not read."""
    return (
        f"{name} is a pickle, which can run code when it is read; re-save the adapter as safetensors "
        f"({PICKLE_FILES[name]})"
    )


def head_refusal(name: str) -> str:
    """The reason for which an adapter with one of `HEAD_FILES` beside it is not served."""
    return (
        f"{name} is a head of its own, which is not served; save the adapter with with_head=False, or take "
        "the file away if it is the base's head"
    )
