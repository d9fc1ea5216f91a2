from __future__ import annotations

from pathlib import Path

import pytest

from loraplex_server.adapters.files.folder import stamp
from loraplex_server.adapters.origins.sources import resolve_folder
from loraplex_server.core.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from loraplex_server.core.names import check_name


@pytest.mark.parametrize("name", ["sql", "a", "A-1_b.c", "x" * 128, "..x", "-"])
def test_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "x" * 129, "a/b", "a b", "é", "a\n", "a\0", "../etc", "a\u202e"]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_name(name)
    assert caught.value.info.violations[0].field == "name"
    assert str(caught.value).isascii()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "sql").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


def test_a_source_is_absolute_or_relative_to_a_root(root: Path) -> None:
    assert resolve_folder(root / "sql", [root]) == (root / "sql").resolve()
    assert resolve_folder("sql", [root.parent / "outside", root]) == (root / "sql").resolve()
    assert resolve_folder("../root/./sql", [root]) == (root / "sql").resolve()


def test_links_are_followed_before_the_roots_are_compared(root: Path) -> None:
    (root / "way-out").symlink_to(root.parent / "outside")
    (root.parent / "way-in").symlink_to(root / "sql")
    with pytest.raises(PermissionDeniedError):
        resolve_folder(root / "way-out", [root])
    assert resolve_folder(root.parent / "way-in", [root]) == (root / "sql").resolve()
    (root.parent / "linked-root").symlink_to(root)
    assert resolve_folder("sql", [root.parent / "linked-root"]) == (root / "sql").resolve()


@pytest.mark.parametrize("source", ["/etc", "../outside", "sql/../../outside", "../missing", "../root-2", ""])
def test_what_is_outside_is_denied_whether_it_exists_or_not(source: str, root: Path) -> None:
    with pytest.raises(PermissionDeniedError):
        resolve_folder(source, [root])


def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(PermissionDeniedError):
        resolve_folder(root / "sql", [])


def test_a_missing_folder_is_not_found(root: Path) -> None:
    (root / "file").touch()
    for source in ("missing", "file"):
        with pytest.raises(NotFoundError):
            resolve_folder(source, [root])


@pytest.mark.parametrize("source", ["sql\0", "x" * 5000, "loop"])
def test_what_cannot_be_a_path_is_refused(source: str, root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        resolve_folder(source, [root])


def test_the_stamp_tells_when_a_file_was_changed(root: Path) -> None:
    folder = root / "sql"
    seen = [stamp(folder)]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("1")
        seen.append(stamp(folder))
        (folder / name).write_text("22")
        seen.append(stamp(folder))
    assert len(set(seen)) == 5
    assert stamp(folder) == seen[-1]
