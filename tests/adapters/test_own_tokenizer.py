"""Adapters that bring a tokenizer, and the notices when that changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.adapters.files.own_tokenizer import find_tokenizer
from loraplex_server.core.errors import PermissionDeniedError


def test_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_tokenizer(tmp_path, [tmp_path]) is None


def test_its_files_are_told_apart_from_later_ones(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        (tmp_path / name).write_text("{}")
    first = find_tokenizer(tmp_path, [tmp_path])
    assert first is not None
    assert [file.name for file in first.files] == ["tokenizer.json", "tokenizer_config.json"]
    assert find_tokenizer(tmp_path, [tmp_path]) == first
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert find_tokenizer(tmp_path, [tmp_path]) != first


def test_added_tokens_alone_are_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text("{}")
    found = find_tokenizer(tmp_path, [tmp_path])
    assert found is not None
    assert found.files == ()


def test_a_link_out_of_the_roots_is_not_followed(tmp_path: Path) -> None:
    inside = tmp_path / "root" / "adapter"
    inside.mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (inside / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PermissionDeniedError, match=r"tokenizer\.json"):
        find_tokenizer(inside, [tmp_path / "root"])


def test_the_store_tells_what_comes_changes_and_goes(
    tmp_path: Path,
    make_store: Callable[..., Any],
    write_adapter: Callable[..., Path],
    settle: Callable[..., None],
    answer: Any,
) -> None:
    for name in ("plain", "own"):
        write_adapter(tmp_path / name)
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    store = make_store(tmp_path)
    first = find_tokenizer(tmp_path / "own", [tmp_path])
    assert store.registry.tokenizers.known == store.registry.tokenizers.drain() == {"own": first}
    assert store.registry.tokenizers.drain() == {}

    (tmp_path / "own" / "tokenizer.json").write_text("{ }")
    second = find_tokenizer(tmp_path / "own", [tmp_path])
    store.intake.load("own", str(tmp_path / "own"), answer(), inplace=True)
    settle(store)
    assert (
        store.registry.tokenizers.known
        == store.registry.tokenizers.drain()
        == {"own": second}
        != {"own": first}
    )

    store.unload("own", answer())
    settle(store)
    assert store.registry.tokenizers.drain() == {"own": None}
    assert store.registry.tokenizers.known == {}
