from __future__ import annotations

import pytest

from loraplex_server.adapters.spec.sites import Part, SiteAddress, SiteRegistry

PATH = "model.layers.1.self_attn.q_proj"


def test_entries_are_numbered_in_order_and_know_their_address() -> None:
    registry = SiteRegistry([("model.embed_tokens", 8, 4), (PATH, 32, 16)])
    first, second = registry
    assert (first.index, first.address.layer) == (0, -1)
    assert (second.index, second.in_features, second.out_features) == (1, 32, 16)
    assert second.address == SiteAddress(1, PATH)
    assert registry.entry(PATH) is second
    assert registry.row_lengths == {8, 4, 32, 16}


def test_a_peft_name_finds_its_entry_and_factor() -> None:
    registry = SiteRegistry([(PATH, 32, 16)])
    entry = registry.entry(PATH)
    assert registry.locate(f"base_model.model.{PATH}.lora_A.weight") == (entry, Part.A)
    assert registry.locate(f"base_model.model.{PATH}.lora_B.weight") == (entry, Part.B)


@pytest.mark.parametrize(
    "name",
    [
        f"{PATH}.lora_A.weight",
        f"base_model.model.{PATH}.lora_A.default.weight",
        f"base_model.model.{PATH}.lora_A.bias",
        f"base_model.model.{PATH}.base_layer.weight",
        f"base_model.model.{PATH}.lora_embedding_A",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model..lora_A.weight",
        "",
    ],
)
def test_other_names_find_nothing(name: str) -> None:
    assert SiteRegistry([(PATH, 32, 16)]).locate(name) is None


@pytest.mark.parametrize("sites", [[(PATH, 32, 16), (PATH, 32, 16)], [(PATH, 0, 16)], [(PATH, 32, -1)]])
def test_impossible_sites_are_refused(sites: list[tuple[str, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"same path|empty shape"):
        SiteRegistry(sites)
