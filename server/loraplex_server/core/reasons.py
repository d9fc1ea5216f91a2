"""The meaning of each status and reason, for people: when an error has it, and what to do then."""

from __future__ import annotations

from typing import NamedTuple

from loraplex_server.core.errors import Reason

REMEDIES = {
    "INVALID_ARGUMENT": "correct the named fields",
    "NOT_FOUND": "name something that exists",
    "ALREADY_EXISTS": "choose another name, or load with `load_inplace`",
    "UNAUTHENTICATED": "send a token that the server knows",
    "PERMISSION_DENIED": "use a source that the operator allows",
    "FAILED_PRECONDITION": "change the adapter, the request or the server",
    "RESOURCE_EXHAUSTED": "try again after the delay",
    "UNAVAILABLE": "try again after the delay",
    "DEADLINE_EXCEEDED": "allow more time",
    "CANCELLED": "nothing, or name another adapter",
    "UNIMPLEMENTED": "use a method that this server has",
    "INTERNAL": "report it; only the server's log has the details",
}
"""The remedy for each status."""


class Meaning(NamedTuple):
    """A reason's meaning.

    Attributes:
        status: the status of errors with this reason.
        when: the situation in which an error has this reason.
        remedy: what to do about it.
    """

    status: str
    when: str
    remedy: str


MEANINGS = {
    Reason.ADAPTER_NOT_FOUND: Meaning(
        "NOT_FOUND", "no adapter is registered under the name", "load it, or name another"
    ),
    Reason.SOURCE_NOT_FOUND: Meaning(
        "NOT_FOUND", "the source to load from does not exist", "check the path or address"
    ),
    Reason.ADAPTER_EXISTS: Meaning(
        "ALREADY_EXISTS",
        "the name is registered already",
        "choose another name, or replace the adapter with `load_inplace`",
    ),
    Reason.SOURCE_NOT_ALLOWED: Meaning(
        "PERMISSION_DENIED",
        "the source is not under an allowed root or prefix, or a link in it leads outside",
        "use an allowed source; the operator sets `--adapter-root` and `--adapter-source`",
    ),
    Reason.UPLOADS_NOT_ALLOWED: Meaning(
        "PERMISSION_DENIED",
        "the server does not accept uploads",
        "load the adapter from a source; the operator allows uploads with `--allow-uploads`",
    ),
    Reason.ADAPTER_NOT_SERVABLE: Meaning(
        "FAILED_PRECONDITION",
        "the adapter does not fit the base model, or has a part that the server cannot apply",
        "change the adapter as the text says",
    ),
    Reason.ADAPTERS_NOT_ADDABLE: Meaning(
        "FAILED_PRECONDITION",
        "the adapters of one request cannot be summed, or bring different tokenizers",
        "name them in separate requests",
    ),
    Reason.NO_ROOM_TO_PIN: Meaning(
        "FAILED_PRECONDITION",
        "no more adapters fit on the device beside those that are pinned",
        "unpin one, or give the server more adapter memory or slots",
    ),
    Reason.NO_CHAT_TEMPLATE: Meaning(
        "FAILED_PRECONDITION",
        "there is no chat template, it fails on these messages, or adapters bring different ones",
        "send the prompt as text, or add a `chat_template.jinja` to the folder",
    ),
    Reason.QUEUE_FULL: Meaning(
        "RESOURCE_EXHAUSTED", "the queue of requests is full (`--max-queue`)", "try again after the delay"
    ),
    Reason.TOO_MANY_JOBS: Meaning(
        "RESOURCE_EXHAUSTED",
        "the server is busy with as many uploads, downloads or compositions as it allows",
        "try again after the delay",
    ),
    Reason.TOO_MANY_ADAPTERS: Meaning(
        "RESOURCE_EXHAUSTED",
        "no more uploaded adapters may be registered (`--max-uploaded-adapters`)",
        "unload one",
    ),
    Reason.CACHE_FULL: Meaning(
        "RESOURCE_EXHAUSTED",
        "registered adapters and downloads fill the cache (`--adapter-cache-bytes`)",
        "unload adapters, or try again after the delay",
    ),
    Reason.DISK_FULL: Meaning(
        "RESOURCE_EXHAUSTED", "the disk of the adapters' cache is full", "tell the operator to make room"
    ),
    Reason.READER_TOO_SLOW: Meaning(
        "RESOURCE_EXHAUSTED",
        "the client does not read its stream (`--stall-seconds`, `--max-unread-tokens`)",
        "read faster, or ask for fewer tokens",
    ),
    Reason.DEADLINE_TOO_SHORT: Meaning(
        "DEADLINE_EXCEEDED",
        "the answer cannot be complete before the call's deadline; nothing was computed",
        "allow more time, or ask for fewer tokens",
    ),
    Reason.ADAPTER_UNLOADED: Meaning(
        "CANCELLED", "the request's adapter was unloaded while it ran", "name another adapter"
    ),
    Reason.SERVER_STARTING: Meaning("UNAVAILABLE", "the model is being loaded", "try again after the delay"),
    Reason.SERVER_DRAINING: Meaning(
        "UNAVAILABLE", "the server is shutting down", "try another server, or this one later"
    ),
    Reason.ENGINE_RESTARTING: Meaning(
        "UNAVAILABLE", "the engine died and is being started again", "try again after the delay"
    ),
    Reason.ENGINE_LOST: Meaning(
        "UNAVAILABLE",
        "the engine died while it had the request",
        "try again after the delay; discard the tokens received so far",
    ),
}
"""The meaning of each reason."""
