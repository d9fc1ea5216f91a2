"""The documentation is what the code says: the README's size, pages made from the code, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from loraplex_server.adapters.spec import reference as adapter_kinds
from loraplex_server.api.telemetry import reference as metrics
from loraplex_server.config import reference as flags

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_grpc_page_is_what_the_protos_say() -> None:
    made = _tool("grpc_reference").page()
    assert (ROOT / "docs/reference/grpc.md").read_text() == made, "run `make reference`"


def test_the_page_of_flags_is_what_the_settings_say() -> None:
    assert (ROOT / "docs/reference/flags.md").read_text() == flags.page(), "run `make reference`"


def test_the_page_of_metrics_is_what_the_catalogue_says() -> None:
    assert (ROOT / "docs/reference/metrics.md").read_text() == metrics.page(), "run `make reference`"


def test_the_page_of_adapter_kinds_is_what_the_tables_say() -> None:
    assert (ROOT / "docs/reference/adapter-kinds.md").read_text() == adapter_kinds.page(), (
        "run `make reference`"
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"{page.relative_to(ROOT / 'docs')}\n" in navigation, page
