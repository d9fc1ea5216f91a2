"""The store and adapters from elsewhere: loads, references, eviction, and readers that never wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.adapters.residency import intake
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)

WEIGHTS = "adapter_model.safetensors"
pytest.importorskip("aiohttp")  # of the extra `remote`
pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture
def local(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    write_adapter(tmp_path / "local" / "near", seed=9)
    return tmp_path / "local"


@pytest.fixture
def published(place: Any, tmp_path: Path, write_adapter: Callable[..., Path]) -> Any:
    for seed, name in enumerate("abc"):
        place.publish(write_adapter(tmp_path / "origin" / name, rank=16, seed=seed), f"/a/{name}")
    return place


@pytest.fixture
def make(registry: SiteRegistry, published: Any, local: Path, tmp_path: Path) -> Any:
    stores: list[AdapterStore] = []

    def start(**options: Any) -> AdapterStore:
        config = AdapterConfig(
            folders=(local,),
            sources=(f"{published.url}/a",),
            cache_dir=tmp_path / "cache",
            device_bytes=1 << 20,
            host_bytes=1 << 20,
            **options,
        )
        store = AdapterStore(registry, config, device="cpu", dtype=torch.float32)
        stores.append(store)
        store.intake.register_folder(local)
        return store

    yield start
    for store in stores:
        store.close()
        assert store.check_integrity() == []


def answers() -> tuple[list[AdapterStatus | ServerError], Callable[[AdapterStatus | ServerError], None]]:
    found: list[AdapterStatus | ServerError] = []
    return found, found.append


def entries(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "cache" / "entries").iterdir())


def test_loaded_served_unloaded(
    make: Any, published: Any, settle: Any, bring: Any, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    store: AdapterStore = make()
    source = published.url.replace("//", "//me:s3cret@") + "/a/a"
    found, done = answers()
    store.intake.load("sql", source, done)
    assert store.registry.status("sql").state == "loading"
    settle(store)
    assert isinstance(found[0], AdapterStatus)
    assert found[0].source == f"{published.url}/a/a", "no credentials in what clients see"
    same = write_adapter(tmp_path / "local" / "same", rank=16, seed=0)
    store.intake.register("same", same)
    remote, near = bring(store, "sql", "same")
    assert remote.content_hash == near.content_hash != ""
    store.requests.release([remote, near])
    with pytest.raises(AlreadyExistsError) as caught:
        store.intake.load("sql", source + "?sig=t0ken", done)
    assert not {"s3cret", "t0ken"} & set(str(caught.value).replace("=", " ").split())
    store.unload("sql", lambda: None)
    with pytest.raises(NotFoundError):
        store.requests.resolve(["sql"])


def test_new_content_at_an_old_address_is_swapped_in(
    make: Any, published: Any, settle: Any, bring: Any, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    store: AdapterStore = make()
    found, done = answers()
    source = f"{published.url}/a/a"
    store.intake.load("sql", source, done)
    settle(store)
    (old,) = bring(store, "sql")
    store.intake.load("sql", source, done, inplace=True)
    settle(store)
    assert store.requests.resolve(["sql"])[0].record is old.record, "nothing has changed there"
    published.publish(write_adapter(tmp_path / "origin" / "next", rank=8, seed=77), "/a/a")
    store.intake.load("sql", source, done, inplace=True)
    settle(store)
    (new,) = bring(store, "sql")
    assert [type(answer) for answer in found] == [AdapterStatus] * 3
    assert (old.record.manifest.rank, new.record.manifest.rank) == (16, 8)
    assert old.content_hash != new.content_hash
    assert len(entries(tmp_path)) == 2, "the old version's files stay while it is in use"
    published.files.pop("/a/a/adapter_model.safetensors")
    store.intake.load("sql", source, done, inplace=True)
    settle(store)
    assert isinstance(found[-1], NotFoundError)
    assert bring(store, "sql")[0].record is new.record


def test_what_is_registered_is_never_evicted(make: Any, published: Any, settle: Any, tmp_path: Path) -> None:
    total = sum(len(body) for path, body in published.files.items() if path.startswith("/a/a/"))
    store: AdapterStore = make(cache_bytes=2 * total + 2000)
    found, done = answers()
    for name in "abc":
        store.intake.load(name, f"{published.url}/a/{name}", done)
        settle(store)
    assert [type(answer) for answer in found] == [AdapterStatus, AdapterStatus, ResourceExhaustedError]
    kept = entries(tmp_path)
    drained: list[None] = []
    store.unload("a", lambda: drained.append(None))
    assert drained
    store.intake.load("c", f"{published.url}/a/c", done)
    settle(store)
    assert isinstance(found[-1], AdapterStatus)
    assert len(entries(tmp_path) & kept) == 1


def test_what_is_refused_holds_nothing(make: Any, published: Any, settle: Any, tmp_path: Path) -> None:
    total = sum(len(body) for path, body in published.files.items() if path.startswith("/a/a/"))
    published.files["/a/a/adapter_config.json"] = b'{"peft_type": "LORA", "use_dora": true}'
    store: AdapterStore = make(cache_bytes=total + 1000)
    found, done = answers()
    store.intake.load("a", f"{published.url}/a/a", done)
    settle(store)
    assert isinstance(found[0], FailedPreconditionError)
    refused = entries(tmp_path)
    store.intake.load("b", f"{published.url}/a/b", done)
    settle(store)
    assert isinstance(found[1], AdapterStatus)
    assert not refused & entries(tmp_path)


def test_a_slow_download_holds_up_nobody(make: Any, published: Any, bring: Any, settle: Any) -> None:
    store: AdapterStore = make()
    published.gate.clear()
    found, done = answers()
    store.intake.load("a", f"{published.url}/a/a", done)
    published.waiting.acquire()
    handles = store.requests.resolve(["near"])
    store.requests.reserve(handles)
    while store.registry.status("near").state != "device":
        assert store.wait_event(20)
        store.poll()
    assert found == []
    store.requests.release(handles)
    store.unload("a", lambda: None)
    assert isinstance(found[0], CancelledError)
    with pytest.raises(NotFoundError):
        store.registry.status("a")
    again, done_again = answers()
    store.intake.load("a", f"{published.url}/a/a", done_again)
    published.gate.set()
    settle(store)
    assert isinstance(again[0], AdapterStatus)
    assert len(published.bodies(f"/a/a/{WEIGHTS}")) == 1, "the second load took over the first's download"


def test_loads_under_way_are_limited_and_end_with_the_store(
    make: Any, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_MAX_FETCHES", 2)
    store: AdapterStore = make()
    published.gate.clear()
    found, done = answers()
    for name in "ab":
        store.intake.load(name, f"{published.url}/a/{name}", done)
    with pytest.raises(ResourceExhaustedError):
        store.intake.load("c", f"{published.url}/a/c", done)
    published.waiting.acquire()
    store.close()
    assert [type(answer) for answer in found] == [UnavailableError] * 2


def test_a_copy_that_is_gone_is_named_and_heals_by_a_new_load(
    make: Any, published: Any, settle: Any, bring: Any, tmp_path: Path
) -> None:
    store: AdapterStore = make()
    found, done = answers()
    store.intake.load("a", f"{published.url}/a/a", done)
    # Registered, but its weights are yet to be read.
    while not (store.registry.served.get("a") or found):
        assert store.wait_event(20)
        store.poll()
    settle(store)
    [entry] = entries(tmp_path)
    store.unload("a", lambda: None)
    (entry / WEIGHTS).unlink()
    store.intake.load("a", f"{published.url}/a/a", done)
    settle(store)
    assert all(isinstance(answer, AdapterStatus) for answer in found)
    store.requests.release(bring(store, "a"))
