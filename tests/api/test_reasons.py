"""The table in docs/reference/errors.md is the code's: statuses, reasons, details that come with them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2

from loraplex_server.api import reference
from loraplex_server.api.rpc.status import to_status
from loraplex_server.core import errors
from loraplex_server.core.errors import ErrorInfo, Reason, ServerError

_STATUS = re.compile(r"^\| ([A-Z_]+) \|[0-9 ]*\|[a-z_ ]*\|([^|]*)\|[^|]*\|$", re.MULTILINE)
_REASON = re.compile(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|[^|]*\|[^|]*\|[^|]*\|$", re.MULTILINE)


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> dict[str, tuple[set[str], set[str]]]:
    """(reasons, details) by status."""
    page = (Path(pytestconfig.rootpath) / "docs/reference/errors.md").read_text()
    statuses, reasons = page.split("\n## Reasons\n")
    found: dict[str, tuple[set[str], set[str]]] = {
        code: (set(), set(re.findall(r"[A-Z][a-z]+[A-Z][A-Za-z]+", details)))
        for code, details in _STATUS.findall(statuses)
    }
    for reason, code in _REASON.findall(reasons):
        found[code][0].add(reason)
    return found


def test_the_page_is_what_the_code_says(pytestconfig: pytest.Config) -> None:
    page = (Path(pytestconfig.rootpath) / "docs/reference/errors.md").read_text()
    assert page == reference.page(), "run `make reference`"


def test_every_status_and_reason_has_its_row(table: dict[str, tuple[set[str], set[str]]]) -> None:
    codes = {kind.code for kind in ServerError.__subclasses__() if kind.__module__ == errors.__name__}
    assert table.keys() == codes
    listed = [reason for reasons, _ in table.values() for reason in reasons]
    assert sorted(listed) == sorted(Reason)
    assert not set(listed) & codes


def test_a_status_has_the_details_of_its_row(table: dict[str, tuple[set[str], set[str]]]) -> None:
    for code, (reasons, details) in table.items():
        for reason in {"", *reasons}:
            found = to_status(ErrorInfo(code, "a text", resource=("kind", "name"), reason=reason), "id")
            status = status_pb2.Status.FromString(dict(found.trailing_metadata)["grpc-status-details-bin"])
            kinds = {packed.type_url.rpartition(".")[2] for packed in status.details}
            assert kinds == {"ErrorInfo", "RequestInfo", *details}
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == (reason or code, "loraplex")


def test_reasons_are_raised_where_they_are_said_to_be(
    pytestconfig: pytest.Config, table: dict[str, tuple[set[str], set[str]]]
) -> None:
    """Each reason is given in the code, and by an error of its row's status."""
    code_of = {kind.__name__: kind.code for kind in ServerError.__subclasses__()}
    source = Path(pytestconfig.rootpath) / "server" / "loraplex_server"
    given: set[str] = set()
    for path in source.rglob("*.py"):
        if path.name == "reasons.py":
            # It says what all of them mean.
            continue
        text = path.read_text()
        given.update(re.findall(r"\bReason\.([A-Z_]+)", text))
        for call in ast.walk(ast.parse(text)):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in code_of:
                continue
            for keyword in call.keywords:
                reason = ast.unparse(keyword.value).removeprefix("Reason.")
                if keyword.arg == "reason" and reason in Reason.__members__:
                    assert reason in table[code_of[ast.unparse(call.func)]][0], (path, reason)
    assert given == set(Reason)
