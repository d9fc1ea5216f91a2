"""Watched folders: what a scan reports, and what the store makes of it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.adapters.origins.watch import Change, ChangeKind, FolderScan
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.errors import FailedPreconditionError, NotFoundError

ADDED, REMOVED, CHANGED = ChangeKind.ADDED, ChangeKind.REMOVED, ChangeKind.CHANGED


@pytest.fixture
def folder(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    return tmp_path / "adapters"


def test_a_change_counts_once_it_rests(folder: Path, write_adapter: Callable[..., Path]) -> None:
    scan = FolderScan([folder])
    assert scan.poll() == scan.poll() == [], "what is there at first is known"
    write_adapter(folder / "c", rank=2)
    assert scan.poll() == []
    write_adapter(folder / "c", rank=8)
    assert scan.poll() == [], "it was still being written"
    assert scan.poll() == [Change(ADDED, folder / "c")]
    write_adapter(folder / "a", rank=8)
    shutil.rmtree(folder / "b")
    assert scan.poll() == []
    assert scan.poll() == [Change(CHANGED, folder / "a"), Change(REMOVED, folder / "b")]
    assert scan.poll() == []
    shutil.rmtree(folder / "c")
    scan.poll()
    write_adapter(folder / "c", rank=8)
    scan.poll()
    assert scan.poll() == [Change(CHANGED, folder / "c")], "replaced, not removed"


def test_a_folder_that_is_away_takes_nothing_with_it(folder: Path) -> None:
    scan = FolderScan([folder])
    folder.rename(folder.parent / "away")
    for _ in range(3):
        assert scan.poll() == []
    (folder.parent / "away").rename(folder)
    for _ in range(3):
        assert scan.poll() == []


@pytest.fixture
def watching(registry: SiteRegistry, folder: Path) -> Any:
    config = AdapterConfig(folders=(folder,), device_bytes=1 << 20, host_bytes=1 << 20, watch_s=0.02)
    store = AdapterStore(registry, config, device="cpu", dtype=torch.float32)
    store.intake.register_folder(folder)
    yield store
    store.close()
    assert store.check_integrity() == []


def until(store: AdapterStore, condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        store.wait_event(0.05)
        store.poll()


def names(store: AdapterStore) -> set[str]:
    return {status.name for status in store.registry.statuses() if not status.draining and status.rank}


def test_adapters_come_and_go_with_their_folders(
    watching: AdapterStore,
    folder: Path,
    write_adapter: Callable[..., Path],
    bring: Callable[..., Any],
) -> None:
    store = watching
    write_adapter(folder / "c", rank=2)
    until(store, lambda: names(store) == {"a", "b", "c"})
    assert store.registry.status("c").state == "unloaded", "its weights are read when somebody wants them"

    held = bring(store, "b")
    shutil.rmtree(folder / "b")
    until(store, lambda: names(store) == {"a", "c"})
    with pytest.raises(NotFoundError):
        store.requests.resolve(["b"])
    assert [status.draining for status in store.registry.statuses() if status.name == "b"] == [True]
    slot = store.requests.slot(held[0])
    assert int(store.pool.rank[slot].max()) == 4, "who holds it keeps it"
    store.requests.release(held)
    assert "b" not in {status.name for status in store.registry.statuses()}


def test_a_change_replaces_what_is_served(
    watching: AdapterStore,
    folder: Path,
    write_adapter: Callable[..., Path],
    bring: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = watching
    [old] = bring(store, "a")
    before = old.content_hash
    with caplog.at_level(logging.WARNING, "loraplex_server"):
        write_adapter(
            folder / "a", rank=6, change=lambda tensors: next(iter(tensors.values())).fill_(torch.nan)
        )
        until(store, lambda: "NaN" in caplog.text)
    assert store.registry.status("a").content_hash == before, "what cannot be served replaces nothing"
    write_adapter(folder / "a", rank=6, seed=99)
    until(store, lambda: store.registry.status("a").content_hash not in ("", before))
    [new] = bring(store, "a")
    assert (old.content_hash, store.pool.rank[store.requests.slot(old)].max()) == (before, 4)
    assert store.pool.rank[store.requests.slot(new)].max() == 6
    store.requests.release([old, new])

    write_adapter(folder / "b", rank=8, seed=98)
    until(store, lambda: store.registry.status("b").rank == 8)
    assert store.registry.status("b").state == "unloaded", "nobody has asked for it yet"


def test_a_bad_one_is_known_with_its_error_and_heals(
    watching: AdapterStore, folder: Path, write_adapter: Callable[..., Path]
) -> None:
    store = watching
    write_adapter(folder / "bad", config={"layer_replication": [[0, 1]]})
    until(store, lambda: "bad" in store.registry.errors())
    with pytest.raises(FailedPreconditionError, match="layer_replication"):
        store.requests.resolve(["bad"])
    write_adapter(folder / "bad", seed=5)
    until(store, lambda: "bad" in names(store))
    assert store.registry.errors() == {}
    write_adapter(folder / "bad too", seed=5)
    write_adapter(folder / "late", seed=5)
    until(store, lambda: "late" in names(store))
    assert "bad too" not in store.registry.errors()


def test_what_a_client_unloaded_stays_unloaded(
    watching: AdapterStore, folder: Path, write_adapter: Callable[..., Path]
) -> None:
    store = watching
    store.unload("a", lambda: None)
    write_adapter(folder / "c")
    until(store, lambda: "c" in names(store))
    assert names(store) == {"b", "c"}
    store.intake.load("c2", str(folder / "b"), lambda _: None)
    until(store, lambda: "c2" in names(store))
