"""The log: lines with the request they belong to, for people and for collectors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from loraplex_server.config import LogConfig
from loraplex_server.core.errors import InvalidArgumentError

SCRIPT = """
import logging, sys
from loraplex_server.core import log
log.configure(*sys.argv[1:])
here = logging.getLogger("loraplex_server.test")
here.debug("too fine")
log.request_id.set("r-1")
here.info("loaded %d of «%s»", 3, "sql")
log.request_id.set("-")
logging.getLogger("other").info("chatter")
logging.getLogger("other").warning("worth knowing")
try:
    1 / 0
except ZeroDivisionError:
    here.exception("failed")
"""


def written(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, check=True)
    assert not done.stdout
    return done.stderr.decode().splitlines()


def test_text() -> None:
    lines = written("info", "text")
    assert lines[0].endswith("I loraplex_server.test [r-1] loaded 3 of «sql»")
    assert lines[1].endswith("W other [-] worth knowing")
    assert lines[2].endswith("E loraplex_server.test [-] failed")
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_json_is_one_object_a_line() -> None:
    entries: list[dict[str, Any]] = [json.loads(line) for line in written("info", "json")]
    assert [entry["message"] for entry in entries] == ["loaded 3 of «sql»", "worth knowing", "failed"]
    assert [entry["level"] for entry in entries] == ["info", "warning", "error"]
    assert [entry.get("request_id") for entry in entries] == ["r-1", None, None]
    assert entries[2]["exception"].endswith("ZeroDivisionError: division by zero")
    assert entries[0]["time"].endswith("+00:00")


@pytest.mark.parametrize(("level", "form"), [("loud", "text"), ("info", "xml")])
def test_others_are_refused(level: str, form: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is none of"):
        LogConfig(level, form)
