"""The table of kernel variants: which batch takes which, and tables of particular cards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_kernels.lora import tiles
from loraplex_kernels.pool import DECODE_ROWS, PREFILL_ROWS, tile_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("pairs", "segments", "family"),
    [
        (1, 1, "decode"),
        (64, 64, "decode"),
        (64, 32, "decode"),
        (32, 1, "decode"),
        (33, 1, "shared"),
        (64, 1, "shared"),
        (512, 8, "shared"),
        (513, 8, "prefill"),
        (4096, 8, "prefill"),
        (512, 65, "decode"),
    ],
)
def test_families(pairs: int, segments: int, family: str) -> None:
    assert tiles.family(tile_rows(pairs, segments), pairs) == family


def test_every_family_and_element_has_a_variant() -> None:
    assert set(tiles.BUILT_IN) == {
        (family, element) for family in tiles.FAMILIES for element in tiles.ELEMENTS
    }
    for (family, _), config in tiles.BUILT_IN.items():
        rows = DECODE_ROWS if family == "decode" else PREFILL_ROWS
        assert config.rows == rows
        assert config.expand_columns % config.dot_columns == 0
        sizes = [value for value in dataclasses.astuple(config) if isinstance(value, int)]
        powers = [config.shrink_rank, config.shrink_k, config.expand_rank, config.expand_columns]
        assert all(value & (value - 1) == 0 for value in powers)
        assert min(sizes) >= 0


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("in_features", [40, 1000, 2048, 4096, 14336])
@pytest.mark.parametrize("programs", [1, 64, 192, 4096])
def test_planes_are_worth_a_program(programs: int, in_features: int, adapters: torch.dtype) -> None:
    for rows in (DECODE_ROWS, PREFILL_ROWS):
        config = tiles.choose(rows, 64, adapters, torch.bfloat16, CPU)
        planes = tiles.planes(config, programs, in_features)
        assert planes in tiles.PLANES
        assert planes == 1 or in_features >= planes * config.k_step
        enough = programs * planes >= config.shrink_programs
        fewer = programs * planes // 2 < config.shrink_programs
        assert planes == 1 or fewer, "more planes than are needed"
        longest = planes == tiles.PLANES[-1] or in_features < 2 * planes * max(config.k_step, 512)
        assert enough or longest, "too few planes"


def test_sixty_four_adapters_of_an_8b_llama_fill_an_h100() -> None:
    """Each site of the step that the target speaks of has several programs for each multiprocessor."""
    config = tiles.choose(DECODE_ROWS, 64, torch.bfloat16, torch.bfloat16, CPU)
    for in_features, slices in ((4096, 3), (4096, 1), (4096, 2), (14336, 1)):
        assert 64 * slices * tiles.planes(config, 64 * slices, in_features) >= 3 * 132


def test_stacked_rank_holds_all_slices() -> None:
    config = tiles.BUILT_IN["prefill", "half"]
    assert [config.stacked_rank(slices) for slices in (1, 2, 3, 4)] == [16, 32, 64, 64]


def test_a_table_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    path = tiles.card_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "nvidia-h100-80gb-hbm3.json"
    tiles._table_of_card.cache_clear()
    assert tiles._table_of_card("NVIDIA H100 80GB HBM3") is tiles.BUILT_IN
    key = ("decode", "half")
    changed = dataclasses.replace(tiles.BUILT_IN[key], shrink_stages=2, pdl=True)
    tiles.dump(path, {**tiles.BUILT_IN, key: changed}, {"card": "NVIDIA H100 80GB HBM3"})
    tiles._table_of_card.cache_clear()
    loaded = tiles._table_of_card("NVIDIA H100 80GB HBM3")
    tiles._table_of_card.cache_clear()
    assert loaded == {**tiles.BUILT_IN, key: changed}
    assert json.loads(path.read_text())["card"] == "NVIDIA H100 80GB HBM3"


def spoil(rows: list[dict[str, Any]], kind: str) -> None:
    if kind == "family":
        rows[0]["family"] = "verify"
    elif kind == "field":
        del rows[0]["shrink_k"]
    elif kind == "rows":
        rows[0]["rows"] = 32
    elif kind == "no family":
        del rows[0]["family"]


@pytest.mark.parametrize("kind", ["family", "field", "rows", "no family"])
def test_a_broken_table_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    tiles.dump(path, tiles.BUILT_IN, {})
    document = json.loads(path.read_text())
    spoil(document["tiles"], kind)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"card\.json"):
        tiles.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"card\.json"):
        tiles.load(path)


@pytest.mark.parametrize("path", sorted(tiles.TUNED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_load(path: Path) -> None:
    assert set(tiles.load(path)) == set(tiles.BUILT_IN)


def test_using_a_table_ends_with_its_block() -> None:
    key = ("decode", "single")
    table = {**tiles.BUILT_IN, key: dataclasses.replace(tiles.BUILT_IN[key], shrink_rank=8)}
    arguments = (DECODE_ROWS, 1, torch.float32, torch.float32, CPU)
    with tiles.using(table):
        assert tiles.choose(*arguments).shrink_rank == 8
    assert tiles.choose(*arguments) is tiles.BUILT_IN[key]
