"""Named compositions: exactly what PEFT makes of the same adapters, or a refusal with the reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.origins import composition_job
from loraplex_server.adapters.origins.composition import check_member
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import COMBINATION_TYPES, Composition, prunes
from loraplex_server.core.errors import (
    CancelledError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex_server.core.request import AdapterUse

MODULES = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def members(save_peft: Callable[..., Any], tmp_path: Path) -> Path:
    """Adapters a and b of one rank, c of another, r of that rank as rsLoRA."""
    for seed, (name, settings) in enumerate(
        {
            "a": {"r": 6, "lora_alpha": 6},
            "b": {"r": 6, "lora_alpha": 18, "target_modules": ["q_proj", "gate_proj"]},
            "c": {"r": 4, "lora_alpha": 4},
            "r": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        }.items()
    ):
        save_peft(name, seed=seed, **{"target_modules": MODULES, **settings})
    return tmp_path


@pytest.fixture
def combine(registry: SiteRegistry, members: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Runs the job in this process; gives its tensors and its configuration."""

    def run(*names: str, weights: list[float] | None = None, **settings: Any) -> Any:
        output = members / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        files = ("adapter_config.json", "adapter_model.safetensors")
        spec = {
            "sites": [(entry.path, entry.in_features, entry.out_features, False) for entry in registry],
            "members": [
                {
                    "folder": str(members / name),
                    "base_tables": [],
                    **{f: hashlib.sha256((members / name / f).read_bytes()).hexdigest() for f in files},
                }
                for name in names
            ],
            "weights": weights or [0.7, -0.4][: len(names)],
            "combination_type": "linear",
            "density": None,
            "majority_sign": "total",
            "svd_rank": None,
            "seed": 0,
            "output": str(output),
            **settings,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            composition_job.combine(spec)
        return load_file(output / files[1]), json.loads((output / files[0]).read_text())

    return run


@pytest.fixture
def peft_combines(base_model: Callable[[], Any], members: Path) -> Callable[..., Any]:
    """PEFT's own result on the whole base model."""
    from peft import PeftModel

    def run(*names: str, weights: list[float], seed: int, **settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base_model(), members / names[0], adapter_name=names[0])
            for name in names[1:]:
                model.load_adapter(members / name, adapter_name=name)
            torch.manual_seed(seed)
            model.add_weighted_adapter(list(names), weights, "both", **settings)
            model.save_pretrained(members / "theirs", selected_adapters=["both"])
        folder = members / "theirs" / "both"
        return load_file(folder / "adapter_model.safetensors"), json.loads(
            (folder / "adapter_config.json").read_text()
        )

    return run


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_every_type_is_pefts(kind: str, combine: Any, peft_combines: Any) -> None:
    settings: dict[str, Any] = {"combination_type": kind, "seed": 5}
    if prunes(kind):
        settings["density"] = 0.4
    if kind.endswith("svd"):
        settings["svd_rank"] = 5
    names = ("r", "a") if kind in ("cat", "svd") else ("a", "b")
    ours, our_config = combine(*names, **settings)
    theirs, their_config = peft_combines(*names, weights=[0.7, -0.4], **settings)
    assert ours.keys() == theirs.keys()
    for key in ours:
        if kind.endswith("svd") and "lora_A" in key:
            # Singular vectors are unique up to their sign.
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[b] @ ours[key], theirs[b] @ theirs[key], atol=1e-5, rtol=1e-5)
        elif not kind.endswith("svd"):
            assert torch.equal(ours[key], theirs[key]), key
    for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert our_config[field] == their_config[field]
    assert sorted(our_config["target_modules"]) == sorted(their_config["target_modules"])
    assert any(bool(tensor.any()) for key, tensor in ours.items() if "lora_B" in key)


def test_the_majority_and_the_seed_count(combine: Any, peft_combines: Any) -> None:
    ties = {"combination_type": "ties", "density": 0.5}
    dare = {"combination_type": "dare_linear", "density": 0.5}
    for name, first, second in (
        ("majority", {**ties, "majority_sign": "total"}, {**ties, "majority_sign": "frequency"}),
        ("seed", {**dare, "seed": 1}, {**dare, "seed": 2}),
    ):
        results = [combine("a", "b", weights=[1.0, 0.3], **chosen)[0] for chosen in (first, second, second)]
        same = [all(torch.equal(results[i][key], results[2][key]) for key in results[2]) for i in (0, 1)]
        assert same == [False, True], name
    theirs, _ = peft_combines("a", "b", weights=[1.0, 0.3], seed=0, majority_sign_method="frequency", **ties)
    ours, _ = combine("a", "b", weights=[1.0, 0.3], **ties, majority_sign="frequency")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_peft_refuses_is_refused(combine: Any, save_peft: Callable[..., Any], members: Path) -> None:
    with pytest.raises(ValueError, match="same r value"):
        combine("a", "c", combination_type="linear")
    save_peft("late", r=6, target_modules=MODULES, layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"leave out model\.layers\.0"):
        combine("late", "a", combination_type="linear")
    combine("a", "late", combination_type="linear")
    (members / "a" / "adapter_model.safetensors").write_bytes(b"other")
    spec_of_before = {
        "adapter_model.safetensors": "00",
        "adapter_config.json": "00",
        "folder": str(members / "a"),
        "base_tables": [],
    }
    with pytest.raises(ValueError, match="was changed while it was read"):
        composition_job.combine({"sites": [], "members": [spec_of_before]})


def test_only_plain_lora_is_combined(
    members: Path, save_peft: Callable[..., Any], registry: SiteRegistry
) -> None:
    save_peft("dora", r=4, target_modules=MODULES, use_dora=True)
    save_peft("activated", r=4, target_modules=MODULES, alora_invocation_tokens=[3, 4])
    for name, refused in {"a": False, "r": False, "dora": True, "activated": True}.items():
        manifest = read_manifest(name, members / name, registry, [members], 512)
        if refused:
            with pytest.raises(FailedPreconditionError, match=f"'{name}'.*plain LoRA"):
                check_member(manifest)
        else:
            check_member(manifest)


# In the store


@pytest.fixture
def make(registry: SiteRegistry, members: Path, tmp_path: Path) -> Any:
    """Stores that keep what they compute in one cache."""
    stores: list[AdapterStore] = []

    def build(**settings: Any) -> AdapterStore:
        config = AdapterConfig(
            roots=(members,),
            device_bytes=1 << 20,
            host_bytes=1 << 20,
            cache_dir=tmp_path / "cache",
            **settings,
        )
        store = AdapterStore(registry, config, device="cpu", dtype=torch.float32)
        stores.append(store)
        for name in "abc":
            store.intake.register(name, members / name)
        return store

    yield build
    for store in stores:
        store.close()
        assert store.check_integrity() == []


def of(kind: str, *members: tuple[str, float], **settings: Any) -> Composition:
    return Composition(kind, tuple(AdapterUse(*member) for member in members), **settings)


def run(store: AdapterStore, answer: Any) -> Any:
    while not answer.calls:
        # The job imports PEFT at a low priority: beside other tests it may wait long for its turn.
        assert store.wait_event(300)
        store.poll()
    return answer.value


def test_a_composition_is_an_adapter_like_any_other(
    make: Any,
    members: Path,
    combine: Any,
    answer: Any,
    bring: Any,
    settle: Any,
    registry: SiteRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed in a process, evicted and brought back, taken from the cache by the next server, and made anew
    from changed members."""
    expected, _ = combine("a", "b", combination_type="dare_ties", density=0.5, seed=3)
    both = of("dare_ties", ("a", 0.7), ("b", -0.4), density=0.5, seed=3)
    store = make()
    done = answer()
    store.intake.compose("both", both, done)
    assert store.registry.status("both").state == "loading"
    status = run(store, done)
    assert (status.state, status.source, status.rank) == ("host", "dare_ties(a*0.7, b*-0.4)", 6)
    settle(store)
    (handle,) = bring(store, "both")
    slot = store.requests.slot(handle)
    for entry in registry:
        key = f"base_model.model.{entry.path}.lora_A.weight"
        if key in expected:
            assert torch.equal(store.pool.a(slot, entry.index, entry.in_features), expected[key])
    assert len(list((members / "cache" / "entries").iterdir())) == 1
    assert list((members / "cache" / "staging").iterdir()) == []

    refused, missing = answer(), answer()
    store.intake.compose("bad", of("linear", ("a", 1.0), ("c", 1.0)), refused)
    assert isinstance(run(store, refused), FailedPreconditionError)
    assert "same r value" in str(refused.value)
    with pytest.raises(NotFoundError):
        store.intake.compose("bad", of("linear", ("a", 1.0), ("zz", 1.0)), missing)
    assert {status.name for status in store.registry.statuses()} == {"a", "b", "c", "both"}
    store.requests.release([handle])
    store._versions.host.drop(handle.record)
    store._device.vacate(handle.record)
    store.requests.release(bring(store, "both"))
    store.close()

    again = make()
    monkeypatch.setattr(again.intake._composer, "_run", lambda spec, unwanted: composition_job.combine(spec))
    store_hash = status.content_hash
    found = answer()
    again.intake.compose("both", both, found)
    assert run(again, found).content_hash == store_hash
    assert len(list((members / "cache" / "entries").iterdir())) == 1, "found, not computed"

    shutil.copytree(members / "b", members / "a", dirs_exist_ok=True)
    taken_up, composed = answer(), answer()
    again.intake.load("a", str(members / "a"), taken_up, inplace=True)
    run(again, taken_up)
    assert again.registry.status("both").content_hash == store_hash, "it does not follow its members"
    again.intake.compose("both", both, composed, inplace=True)
    assert run(again, composed).content_hash != store_hash


def test_only_so_many_wait(make: Any, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    let_go = threading.Event()

    def slow(spec: dict[str, Any], unwanted: threading.Event) -> None:
        assert let_go.wait(60)
        composition_job.combine(spec)

    monkeypatch.setattr(store.intake._composer, "_run", slow)
    answers = [answer() for _ in range(9)]
    for number, done in enumerate(answers):
        store.intake.compose(f"both{number}", of("cat", ("a", 1.0), ("b", 1.0 + number)), done)
    while not any(done.calls for done in answers):
        assert store.wait_event(60)
        store.poll()
    [refused] = [done.value for done in answers if done.calls]
    assert isinstance(refused, ResourceExhaustedError)
    let_go.set()
    outcomes = [run(store, done) for done in answers]
    assert sum(isinstance(outcome, AdapterStatus) for outcome in outcomes) == 8


def test_an_unload_ends_the_computation(make: Any, members: Path, answer: Any) -> None:
    """The process is killed, so that it holds up no other composition."""
    store = make()
    done, freed = answer(), answer()
    store.intake.compose("both", of("svd", ("a", 1.0), ("b", 1.0)), done)
    store.unload("both", freed)
    assert freed.calls == 1
    assert isinstance(done.value, CancelledError)
    assert store.intake._composer._turn.acquire(timeout=60)
    store.intake._composer._turn.release()
    assert not list(members.glob("cache/entries/*"))
    with pytest.raises(NotFoundError):
        store.registry.status("both")


def test_a_composition_ends_with_the_store(make: Any, answer: Any) -> None:
    store = make()
    done = answer()
    store.intake.compose("both", of("svd", ("a", 1.0), ("b", 1.0)), done)
    store.close()
    assert isinstance(done.value, UnavailableError)


def test_a_composition_without_peft_says_what_to_install(
    make: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    version = importlib.metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    store = make()
    done = answer()
    store.intake.compose("both", of("cat", ("a", 1.0), ("b", 1.0)), done)
    assert isinstance(run(store, done), FailedPreconditionError)
    assert ".[compositions]" in str(done.value)


# What clients send


def staged(cache: Path, source: Path, name: str = "one") -> tuple[Path, dict[str, str]]:
    folder = cache / "staging" / name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("README.md"))
    return folder, {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_what_was_sent_is_kept_and_served(make: Any, members: Path, answer: Any, bring: Any) -> None:
    store = make(allow_uploads=True, max_uploaded=2)
    cache = members / "cache"
    plain = bring(store, "a")
    for number, name in enumerate(("x", "y")):
        folder, sha256 = staged(cache, members / "a")
        done = answer()
        store.intake.adopt(name, folder, sha256, done)
        status = run(store, done)
        assert status.content_hash == plain[0].content_hash
        assert status.source == f"upload#sha256={sha256['adapter_model.safetensors']}"
        assert len(list((cache / "entries").iterdir())) == 1, number
        shutil.rmtree(folder, ignore_errors=True)
    folder, sha256 = staged(cache, members / "b")
    with pytest.raises(Exception, match="--max-uploaded-adapters"):
        store.intake.adopt("z", folder, sha256, answer())
    replaced = answer()
    store.intake.adopt("x", folder, sha256, replaced, inplace=True)
    assert run(store, replaced).content_hash != plain[0].content_hash
    freed = answer()
    store.unload("y", freed)
    assert freed.calls == 1
    store.requests.release(plain)


def test_what_was_sent_is_checked_like_any_other(make: Any, members: Path, answer: Any) -> None:
    store = make(allow_uploads=True)
    shutil.copytree(members / "a", members / "spoiled")
    (members / "spoiled" / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    folder, sha256 = staged(members / "cache", members / "spoiled")
    done = answer()
    store.intake.adopt("x", folder, sha256, done)
    assert isinstance(run(store, done), FailedPreconditionError)
    with pytest.raises(NotFoundError):
        store.registry.status("x")
    small = dataclasses.replace(store._sources._config, cache_dir=members / "small", cache_bytes=1000)
    tight = AdapterStore(store.intake._sites, small, device="cpu", dtype=torch.float32)
    folder, sha256 = staged(members / "small", members / "a")
    full = answer()
    tight.intake.adopt("x", folder, sha256, full)
    assert "--adapter-cache-bytes" in str(run(tight, full))
    tight.close()
