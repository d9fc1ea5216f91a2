"""The chat template in an adapter's folder: where it is found, and what is refused when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.adapters.files.chat_template import MAX_CHAT_TEMPLATE_BYTES, read_chat_template
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.core.errors import PermissionDeniedError


def config(folder: Path, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_none(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, [tmp_path]) == ""
    config(tmp_path, eos_token="</s>")
    assert read_chat_template(tmp_path, [tmp_path]) == ""


def test_the_file_goes_before_the_tokenizers_configuration(tmp_path: Path) -> None:
    config(tmp_path, chat_template="from the configuration")
    assert read_chat_template(tmp_path, [tmp_path]) == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("schön\n")
    assert read_chat_template(tmp_path, [tmp_path]) == "schön\n"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tools", "template": "t"}], ""),
        ([5, {}, {"name": ["default"]}], ""),
        (None, ""),
    ],
)
def test_of_several_the_default(tmp_path: Path, value: Any, found: str) -> None:
    config(tmp_path, chat_template=value)
    assert read_chat_template(tmp_path, [tmp_path]) == found


@pytest.mark.parametrize("value", [5, {"a": "b"}, "x" * (MAX_CHAT_TEMPLATE_BYTES + 1)])
def test_what_is_no_template(tmp_path: Path, value: Any) -> None:
    config(tmp_path, chat_template=value)
    with pytest.raises(MalformedFileError, match=r"tokenizer_config\.json"):
        read_chat_template(tmp_path, [tmp_path])


@pytest.mark.parametrize("body", [b"\xff", b"x" * (MAX_CHAT_TEMPLATE_BYTES + 1)])
def test_bad_files(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(body)
    with pytest.raises(MalformedFileError, match=r"chat_template\.jinja"):
        read_chat_template(tmp_path, [tmp_path])


def test_a_link_out_of_the_roots_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{{ 1 }}")
    inside = tmp_path / "root" / "adapter"
    inside.mkdir(parents=True)
    (inside / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(PermissionDeniedError, match=r"chat_template\.jinja"):
        read_chat_template(inside, [tmp_path / "root"])
