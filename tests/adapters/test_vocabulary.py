"""Files with tables, rows, norms and weights of their own: what is read as PEFT saves them, what refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.weights import lay_out, read_weights
from loraplex_server.adapters.spec.declared import LoraSpec, OwnWeightSpec, TokenRowsSpec
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.load.frozen import FrozenProjections

VOCABULARY, HIDDEN = 40, 32
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TABLE = f"base_model.model.{EMBEDDING}"
HEAD_TABLE = f"base_model.model.{HEAD}.weight"


@pytest.fixture
def make(
    tmp_path: Path, base_model: Callable[[], LlamaForCausalLM], whole_registry: Any, tied_registry: Any
) -> Callable[..., Any]:
    """`make(configuration, tied=False, rows=40, **saving)`: saves an adapter, returns how to read it."""

    def save(config: Any, *, tied: bool = False, rows: int = VOCABULARY, **saving: Any) -> Any:
        base = base_model()
        if tied:
            base.config.tie_word_embeddings = True
            base.lm_head.weight = base.model.embed_tokens.weight
        table, head = (end.weight.data.clone() for end in (base.model.embed_tokens, base.lm_head))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if rows != VOCABULARY:
                base.resize_token_embeddings(rows, mean_resizing=False)
            model = peft.get_peft_model(base, config)
            for name, parameter in model.named_parameters():
                if any(mark in name for mark in ("lora_", "modules_to_save", "tokens_delta", "ln_tuning")):
                    parameter.data.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(tmp_path / "a", **saving)
        frozen = FrozenProjections([], (EMBEDDING, table), (HEAD, head, None))
        registry: SiteRegistry = tied_registry if tied else whole_registry

        def read() -> AdapterManifest:
            return read_manifest("a", tmp_path / "a", registry, [tmp_path], 64, base=frozen)

        read.base = frozen  # type: ignore[attr-defined]
        read.model = model  # type: ignore[attr-defined]
        return read

    return save


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(r=3, **{"target_modules": ["q_proj"], **settings})


def rows_of(manifest: AdapterManifest) -> dict[str, list[int]]:
    """Tokens with rows of their own, by the path's last name."""
    return {
        site.entry.path.rpartition(".")[2]: list(effect.tokens)
        for site in manifest.sites
        for effect in site.effects
        if isinstance(effect, TokenRowsSpec)
    }


ALL, MORE = list(range(VOCABULARY)), list(range(VOCABULARY, VOCABULARY + 3))
BOTH = {"embed_tokens", "lm_head"}

# Configuration, tied, rows of the resized tables, how it is saved; the rows found in each end, added tokens.
SAVED: dict[str, tuple[Any, bool, int, dict[str, Any], dict[str, list[int]], int]] = {
    "tables of the base": (lora(target_modules=["embed_tokens", "lm_head"]), False, 40, {}, {}, 0),
    "tables of the tied base": (lora(target_modules=["embed_tokens", "lm_head"]), True, 40, {}, {}, 0),
    "untouched tables": (lora(), False, 40, {"save_embedding_layers": True}, {}, 0),
    "copies": (
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        False,
        40,
        {},
        {"embed_tokens": ALL, "lm_head": ALL},
        0,
    ),
    "a copy of one end of two tied": (
        lora(modules_to_save=["embed_tokens"]),
        True,
        40,
        {},
        {"embed_tokens": ALL},
        0,
    ),
    "a copy that stays tied": (
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
        40,
        {},
        {"embed_tokens": ALL, "lm_head": ALL},
        0,
    ),
    "trained tokens": (lora(trainable_token_indices=[7, 3]), False, 40, {}, {"embed_tokens": [3, 7]}, 0),
    "trained tokens of a tied model": (
        lora(trainable_token_indices=[7, 3]),
        True,
        40,
        {},
        {"embed_tokens": [3, 7], "lm_head": [3, 7]},
        0,
    ),
    "trained tokens by module": (
        lora(trainable_token_indices={"embed_tokens": [3], "lm_head": [4, 5]}),
        True,
        40,
        {},
        {"embed_tokens": [3], "lm_head": [4, 5]},
        0,
    ),
    "trained tokens alone": (
        peft.TrainableTokensConfig(token_indices=[9]),
        True,
        40,
        {},
        {"embed_tokens": [9], "lm_head": [9]},
        0,
    ),
    "resized": (
        lora(),
        False,
        43,
        {"save_embedding_layers": True},
        {"embed_tokens": MORE, "lm_head": MORE},
        3,
    ),
    "resized, tied": (
        lora(),
        True,
        43,
        {"save_embedding_layers": True},
        {"embed_tokens": MORE, "lm_head": MORE},
        3,
    ),
    "resized copies": (
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        False,
        43,
        {"save_embedding_layers": True},
        {"embed_tokens": ALL + MORE, "lm_head": ALL + MORE},
        3,
    ),
    "resized under LoRA": (
        lora(target_modules=["embed_tokens", "lm_head"]),
        False,
        43,
        {},
        {"embed_tokens": MORE, "lm_head": MORE},
        3,
    ),
    "resized under LoRA of one end of two tied": (
        lora(target_modules=["embed_tokens"]),
        True,
        43,
        {},
        {"embed_tokens": MORE, "lm_head": MORE},
        3,
    ),
    "resized under trained tokens": (
        lora(trainable_token_indices=[5, 40, 41, 42]),
        False,
        43,
        {"save_embedding_layers": True},
        {"embed_tokens": [5, *MORE], "lm_head": MORE},
        3,
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_rows_that_are_the_adapters_own(case: str, make: Callable[..., Any]) -> None:
    config, tied, rows, saving, expected, added = SAVED[case]
    read = make(copy.deepcopy(config), tied=tied, rows=rows, **saving)
    manifest = read()
    assert rows_of(manifest) == expected
    assert manifest.added_tokens == added
    assert manifest.linear == (not expected)
    blob = read_weights(
        manifest, lay_out(manifest, 96), torch.float32, [manifest.folder.parent], base=read.base
    )
    assert blob.data.isfinite().all()


def test_norms_and_weights_as_peft_saves_them(make: Callable[..., Any]) -> None:
    manifest = make(lora(modules_to_save=["norm", "down_proj"]))()
    own = {site.entry.path for site in manifest.sites if isinstance(site.effects[0], OwnWeightSpec)}
    assert {path.rpartition(".")[2] for path in own} == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "down_proj",
    }
    assert len(own) == 7
    assert not manifest.linear
    tuned = make(peft.LNTuningConfig(target_modules=["input_layernorm"]))()
    assert (tuned.peft_type, len(tuned.sites), tuned.rank) == ("LN_TUNING", 2, 0)


def test_a_tied_pair_is_served_at_both_ends(make: Callable[..., Any]) -> None:
    manifest = make(lora(target_modules=["embed_tokens"], ensure_weight_tying=True), tied=True)()
    assert [site.entry.path for site in manifest.sites] == [EMBEDDING, HEAD]
    assert all(isinstance(site.effects[0], LoraSpec) for site in manifest.sites)
    assert manifest.linear


def test_all_linear_is_neither_end(make: Callable[..., Any]) -> None:
    manifest = make(lora(target_modules="all-linear"))()
    assert not BOTH & set(manifest.target_modules)


def change(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def settings(tmp_path: Path, **values: Any) -> None:
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(read: Callable[[], AdapterManifest]) -> str:
    with pytest.raises(FailedPreconditionError) as caught:
        read()
    assert caught.value.info.resource == ("adapter", "a")
    assert str(caught.value).isascii()
    return str(caught.value)


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


REFUSED: list[tuple[Any, bool, int, dict[str, Any], Callable[[dict[str, Any]], None], str]] = [
    # Part of what was saved is gone, or of another shape.
    (lora(modules_to_save=["lm_head"]), False, 40, {}, _drop(HEAD_TABLE), "in part"),
    (lora(modules_to_save=["norm"]), False, 40, {}, _drop("base_model.model.model.norm.weight"), "in part"),
    (
        lora(trainable_token_indices=[1]),
        False,
        40,
        {},
        _drop(f"{TABLE}.token_adapter.trainable_tokens_delta"),
        "no rows for them",
    ),
    (
        lora(target_modules=["embed_tokens", "q_proj"]),
        False,
        40,
        {"save_embedding_layers": False},
        lambda tensors: [tensors.pop(f"{TABLE}.lora_embedding_{part}") for part in "AB"],
        "saved in part",
    ),
    (
        lora(modules_to_save=["lm_head"]),
        False,
        40,
        {},
        _put(HEAD_TABLE, 39, 32),
        "[39, 32]",
    ),
    (
        lora(trainable_token_indices=[1, 2]),
        False,
        40,
        {},
        _put(f"{TABLE}.token_adapter.trainable_tokens_delta", 1, 32),
        "has shape [1, 32]",
    ),
    # Added tokens that are not whole.
    (
        lora(),
        False,
        43,
        {"save_embedding_layers": True},
        _drop(HEAD_TABLE),
        "unevenly",
    ),
    (
        lora(target_modules=["embed_tokens"]),
        False,
        43,
        {},
        lambda tensors: None,
        "adds tokens unevenly (model.embed_tokens 3, lm_head 0)",
    ),
    (
        lora(trainable_token_indices=[42]),
        True,
        43,
        {"save_embedding_layers": False},
        lambda tensors: None,
        "not all from 40 on",
    ),
    # What PEFT does not put together, or changes the base itself.
    (lora(), False, 40, {}, _put("base_model.model.model.norm.weight", 32), "change of the base itself"),
    (
        lora(target_modules=["lm_head"]),
        False,
        40,
        {"save_embedding_layers": False},
        _put(HEAD_TABLE, 40, 32),
        "beside a whole copy",
    ),
    (
        lora(target_modules=["lm_head"], use_dora=True),
        False,
        40,
        {},
        _put(f"base_model.model.{HEAD}.base_layer.weight", 40, 32),
        "DoRA on them is not served",
    ),
    (
        lora(target_modules=["embed_tokens", "lm_head"]),
        False,
        43,
        {},
        lambda tensors: tensors.update({"base_model.model.lm_head.lora_B.bias": torch.ones(43)}),
        "beside rows of added tokens",
    ),
    (lora(), False, 40, {}, _put(f"{TABLE}.base_layer.weight", 40, 32), "nothing beside it"),
    (lora(), False, 40, {}, _put(f"{TABLE}.trainable_tokens_delta", 2, 32), "does not name"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_would_be_served_in_part_is_refused(case: int, make: Callable[..., Any], tmp_path: Path) -> None:
    config, tied, rows, saving, edit, named = REFUSED[case]
    read = make(copy.deepcopy(config), tied=tied, rows=rows, **saving)
    change(tmp_path, edit)
    assert named in refused(read)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modules_to_save": ["score"]}, "'score', which the base has no copy for"),
        ({"modules_to_save": [""]}, "an empty name"),
        ({"modules_to_save": "lm_head"}, "in part"),
        ({"trainable_token_indices": [1, 1]}, "an id twice"),
        ({"trainable_token_indices": [-1]}, "not a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": [True]}}, "not a list of token ids"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "'q_proj', which is not an embedding"),
        ({"trainable_token_indices": [10**9]}, "no vocabulary has"),
        ({"modules_to_save": ["norm"], "alora_invocation_tokens": [1]}, "before the invocation"),
    ],
)
def test_settings_that_would_not_be_applied_are_refused(
    values: dict[str, Any], named: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    read = make(lora())
    settings(tmp_path, **values)
    assert named in refused(read)


@pytest.mark.parametrize("row", [2, VOCABULARY + 1])
def test_a_table_that_was_changed_since_is_refused(
    row: int, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Its header is the same, so its rows are compared once more when they are read."""
    rows = VOCABULARY if row < VOCABULARY else VOCABULARY + 3
    read = make(lora(target_modules=["embed_tokens", "lm_head"]), rows=rows)
    manifest = read()
    path = tmp_path / "a" / "adapter_model.safetensors"
    (table,) = (t for t in manifest.header.tensors if t.name == f"{TABLE}.base_layer.weight")
    content = bytearray(path.read_bytes())
    begin = table.begin + row * HIDDEN * 4
    content[begin : begin + 4] = np.float32(7).tobytes()
    path.write_bytes(content)

    def load() -> Any:
        return read_weights(manifest, lay_out(manifest, 96), torch.float32, [tmp_path], base=read.base)

    if row < VOCABULARY:
        with pytest.raises(FailedPreconditionError, match="was changed since"):
            load()
    else:
        # A row that is the adapter's may be anything, until it was first read.
        load()


def test_a_row_that_is_not_finite_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    read = make(lora(modules_to_save=["lm_head"]))
    change(tmp_path, lambda t: t[HEAD_TABLE].view(-1)[5:6].fill_(float("inf")))
    manifest = read()
    with pytest.raises(FailedPreconditionError, match=r"lm_head\.weight' holds NaN or infinity"):
        read_weights(manifest, lay_out(manifest, 96), torch.float32, [tmp_path], base=read.base)


def test_what_a_table_decides_is_not_taken_from_an_adapter_of_the_same_form(
    make: Callable[..., Any], tmp_path: Path, whole_registry: SiteRegistry
) -> None:
    read = make(lora(target_modules=["embed_tokens", "lm_head"]))
    known: dict[bytes, Any] = {}
    found = []
    for row in (None, 2):
        if row is not None:
            change(tmp_path, lambda tensors: tensors[f"{TABLE}.base_layer.weight"][2].add_(1))
        folder = tmp_path / "a"
        manifest = read_manifest("a", folder, whole_registry, [tmp_path], 64, known, read.base)
        found.append((manifest.header.digest, rows_of(manifest)))
    (digest, none), (same, one) = found
    assert digest == same
    assert (none, one) == ({}, {"embed_tokens": [2]})
