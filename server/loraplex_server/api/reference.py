"""The page of all errors, from the code: `python -m loraplex_server.api.reference` prints it."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage

from loraplex_server.api.http.errors import STATUSES
from loraplex_server.api.rpc.status import to_message
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.reasons import MEANINGS, REMEDIES

_HEAD = """# Errors

<!-- Made from the code by `make reference`: edit core/reasons.py and api/reference.py. -->

Every failed call has a gRPC status with `google.rpc` details: ErrorInfo (domain `loraplex`, a reason that
never changes), RequestInfo with the id under which the log has it, and those of the table. Where a status has
no reason of its own, its name is the reason. The SDK has the same errors as `loraplex.errors`, with `reason`.
HTTP has them in OpenAI's form; there `code` is the status in lower case, or `model_not_found`.

## Statuses

| gRPC status | HTTP status | OpenAI type | details | what to do |
|---|---|---|---|---|
"""

_REASONS = """
INVALID_ARGUMENT has one violation for each bad field, under the field's path. HTTP adds 405, 408, 413 and 415
for requests whose method, arrival, length or content type is wrong. What gRPC itself refuses (a message over
`--max-message-bytes`, more calls than may run and wait) has its status alone.

## Reasons

| reason | gRPC status | HTTP status | when | what to do |
|---|---|---|---|---|
"""

_SDK = """
## In the SDK

All are `loraplex.errors.LoraplexError`, with `code`, `reason`, `field_violations`, `resource`,
`retry_after_s` and `request_id`:

| error | when |
|---|---|
| `InvalidRequestError` | an argument is wrong; found before sending where possible |
| `UnauthenticatedError`, `PermissionDeniedError` | no token the server knows; not allowed |
| `NotFoundError`, `AlreadyExistsError` | no such adapter; its name is taken |
| `FailedPreconditionError` | the adapter does not fit, alone or with the others |
| `AbortedError` | lost against a concurrent change |
| `ResourceExhaustedError` | full: `retry_after_s` says when to try again |
| `UnavailableError` | not there, starting or draining: the same |
| `DeadlineExceededError` | too late; `phase` says which limit |
| `RequestCancelledError` | cancelled here, or with its client |
| `UnimplementedError`, `InternalError` | the server is older than the SDK; it failed |
"""

# Every error has these.
_COMMON_DETAILS = ("ErrorInfo", "RequestInfo")


def page() -> str:
    """The whole page, in Markdown."""
    statuses = [
        f"| {code} | {_http(code)} | {_details(code)} | {remedy} |\n" for code, remedy in REMEDIES.items()
    ]
    reasons = [
        f"| {reason} | {status} | {_http_status(status)} | {when} | {remedy} |\n"
        for reason, (status, when, remedy) in MEANINGS.items()
    ]
    return "".join([_HEAD, *statuses, _REASONS, *reasons, _SDK])


def _http_status(code: str) -> str:
    return str(STATUSES[code].status) if code in STATUSES else ""


def _http(code: str) -> str:
    """The status and the type of HTTP; both empty for a status that only gRPC has."""
    return f"{_http_status(code)} | {STATUSES[code].type if code in STATUSES else ''}"


def _details(code: str) -> str:
    """Kinds of `google.rpc` details that come with a status, the common ones aside."""
    details: list[AnyMessage] = list(to_message(ErrorInfo(code, ""), "").details)
    kinds = [detail.type_url.rpartition(".")[2] for detail in details]
    return ", ".join(kind for kind in kinds if kind not in _COMMON_DETAILS)


if __name__ == "__main__":
    print(page(), end="")
