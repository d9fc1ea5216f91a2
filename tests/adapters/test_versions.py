"""New versions under one name: swapped in whole, between steps, beside those that finish on the old one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)

ROOM = 7296
"""Bytes that one of the adapters below takes on the device; in host memory it is 7168."""
HOST = 7168

Settle = Callable[[AdapterStore], None]
Bring = Callable[..., tuple[AdapterHandle, ...]]
MakeStore = Callable[..., AdapterStore]
Served = Callable[[AdapterStore, AdapterHandle, Path], bool]


@pytest.fixture
def folder(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    """Adapters a to f, and their next versions in `next`, all of one size."""
    for seed, name in enumerate("abcdef"):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    return tmp_path / "adapters"


@pytest.fixture
def newer(folder: Path, write_adapter: Callable[..., Path]) -> Path:
    """Another version of a, under the same root."""
    return write_adapter(folder / "newer" / "a", seed=50)


def test_running_requests_finish_on_the_old_version(
    make_store: MakeStore,
    folder: Path,
    newer: Path,
    bring: Bring,
    settle: Settle,
    served: Served,
    answer: Any,
) -> None:
    store = make_store(folder)
    (running,) = bring(store, "a")
    (waiting,) = store.requests.resolve(["a"])
    done = answer()
    store.intake.load("a", str(newer), done, inplace=True)
    assert store.requests.resolve(["a"])[0].record is running.record, "nothing changes before it is read"
    settle(store)
    assert (done.calls, done.value.state, done.value.source) == (1, "host", str(newer))
    assert done.value.content_hash not in ("", running.content_hash)
    assert (running.draining, waiting.draining) == (True, True)
    (new,) = bring(store, "a")
    assert not new.draining
    assert store.requests.reserve([waiting]) is Readiness.READY
    for handle, files in ((running, folder / "a"), (waiting, folder / "a"), (new, newer)):
        assert served(store, handle, files)
    assert [(s.draining, s.references) for s in store.registry.statuses() if s.name == "a"] == [
        (False, 1),
        (True, 3),
    ]
    assert not store.registry.status("a").draining
    used = store.device_bytes_used
    store.requests.release([handle for handle in store.requests._handles if handle is not new])
    assert store.device_bytes_used == used - ROOM, "the old one is gone as its last request is"
    assert [s.draining for s in store.registry.statuses() if s.name == "a"] == [False]


def test_files_changed_under_a_name_are_taken_up(
    make_store: MakeStore,
    folder: Path,
    tmp_path: Path,
    bring: Bring,
    settle: Settle,
    served: Served,
    answer: Any,
    write_adapter: Callable[..., Path],
) -> None:
    old_files = shutil.copytree(folder / "a", tmp_path / "old")
    store = make_store(folder)
    (old,) = bring(store, "a")
    write_adapter(folder / "a", seed=77)
    done = answer()
    store.intake.load("a", str(folder / "a"), done, inplace=True)
    settle(store)
    (new,) = bring(store, "a")
    assert served(store, old, old_files)
    assert served(store, new, folder / "a")


@pytest.mark.parametrize("spoil", ["missing", "malformed", "nan", "too large"])
def test_a_load_that_fails_leaves_the_old_version_serving(
    spoil: str,
    make_store: MakeStore,
    folder: Path,
    newer: Path,
    bring: Bring,
    settle: Settle,
    served: Served,
    answer: Any,
    write_adapter: Callable[..., Path],
) -> None:
    store = make_store(folder, host_bytes=4 * HOST)
    (old,) = bring(store, "a")
    match spoil:
        case "missing":
            shutil.rmtree(newer)
        case "malformed":
            (newer / "adapter_model.safetensors").write_bytes(b"spoiled")
        case "nan":
            write_adapter(newer, change=lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
        case "too large":
            write_adapter(newer, rank=64)
    failed = answer()
    store.intake.load("a", str(newer), failed, inplace=True)
    settle(store)
    assert isinstance(failed.value, NotFoundError if spoil == "missing" else FailedPreconditionError)
    assert failed.calls == 1
    assert not old.draining
    assert bring(store, "a")[0].record is old.record
    assert served(store, old, folder / "a")
    assert [s.name for s in store.registry.statuses()] == list("abcdef")
    assert store.host_bytes_used == HOST
    assert store.registry.errors() == {}


def test_the_same_content_is_the_same_version(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    (old,) = bring(store, "a")
    done = answer()
    store.intake.load("a", str(folder / "a"), done, inplace=True)
    settle(store)
    assert isinstance(done.value, AdapterStatus)
    assert bring(store, "a")[0].record is old.record
    assert store.host_bytes_used == HOST


def test_without_inplace_a_taken_name_is_refused_and_a_free_one_is_loaded(
    make_store: MakeStore, folder: Path, newer: Path, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    with pytest.raises(AlreadyExistsError):
        store.intake.load("a", str(newer), answer())
    done = answer()
    store.intake.load("x", str(newer), done, inplace=True)
    with pytest.raises(AlreadyExistsError):
        store.intake.load("x", str(newer), answer(), inplace=True)
    settle(store)
    assert done.value.state == "host"


def test_of_two_loads_the_later_one_counts(
    make_store: MakeStore, folder: Path, newer: Path, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    for polls in (0, 1):
        first, second = answer(), answer()
        store.intake.load("a", str(newer), first, inplace=True)
        for _ in range(polls):
            assert store.wait_event(20)
            store.poll()
        source = str(folder / "bc"[polls])
        store.intake.load("a", source, second, inplace=True)
        assert isinstance(first.value, CancelledError)
        settle(store)
        assert (first.calls, second.calls, second.value.source) == (1, 1, source)
        assert [s.name for s in store.registry.statuses()] == list("abcdef")


def test_an_unload_gives_up_what_was_to_replace(
    make_store: MakeStore, folder: Path, newer: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    for polls in (0, 1):
        held = bring(store, "a")
        replacing, unloaded = answer(), answer()
        store.intake.load("a", str(newer), replacing, inplace=True)
        for _ in range(polls):
            assert store.wait_event(20)
            store.poll()
        store.unload("a", unloaded)
        assert isinstance(replacing.value, CancelledError)
        settle(store)
        assert unloaded.calls == 0
        store.requests.release(held)
        settle(store)
        assert (replacing.calls, unloaded.calls) == (1, 1)
        assert (store.host_bytes_used, store.device_bytes_used) == (0, 0)
        store.intake.register("a", folder / "a")


def test_an_unload_waits_for_every_version(
    make_store: MakeStore, folder: Path, newer: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    old = bring(store, "a")
    store.intake.load("a", str(newer), answer(), inplace=True)
    settle(store)
    new = bring(store, "a")
    first, again = answer(), answer()
    store.unload("a", first)
    store.unload("a", again)
    store.requests.release(new)
    assert (first.calls, again.calls) == (0, 0)
    assert next((s.name, s.draining) for s in store.registry.statuses()) == ("a", True)
    store.requests.release(old)
    assert (first.calls, again.calls) == (1, 1)
    assert (store.device_bytes_used, store.host_bytes_used) == (0, 0)
    with pytest.raises(NotFoundError):
        store.unload("a", answer())


def test_what_cannot_be_read_again_leaves_memory_last(
    make_store: MakeStore,
    folder: Path,
    bring: Bring,
    settle: Settle,
    served: Served,
    answer: Any,
    tmp_path: Path,
    write_adapter: Callable[..., Path],
) -> None:
    """The old version's files are overwritten, and a request still waits for it, in the face of others."""
    old_files = shutil.copytree(folder / "a", tmp_path / "old")
    store = make_store(folder, device_bytes=2 * ROOM, host_bytes=2 * HOST)
    store.requests.release(bring(store, "a"))
    (waiting,) = store.requests.resolve(["a"])
    write_adapter(folder / "a", seed=77)
    store.intake.load("a", str(folder / "a"), answer(), inplace=True)
    settle(store)
    for name in "bcdef":
        store.requests.release(bring(store, name))
    assert store.requests.reserve([waiting]) in (Readiness.READY, Readiness.LOADING)
    settle(store)
    assert served(store, waiting, old_files)
    assert store.check_integrity() == []


def test_a_request_whose_version_is_gone_is_told_to_try_again(
    make_store: MakeStore,
    folder: Path,
    bring: Bring,
    settle: Settle,
    answer: Any,
    write_adapter: Callable[..., Path],
) -> None:
    """Room for one adapter, which another request needs: better an error than the wrong weights."""
    store = make_store(folder, device_bytes=ROOM, host_bytes=HOST)
    store.requests.release(bring(store, "a"))
    (waiting,) = store.requests.resolve(["a"])
    write_adapter(folder / "a", seed=77)
    store.intake.load("a", str(folder / "a"), answer(), inplace=True)
    settle(store)
    store.requests.release(bring(store, "b"))
    assert store.requests.reserve([waiting]) is Readiness.LOADING
    settle(store)
    assert store.requests.is_ready([waiting]) is Readiness.FAILED
    error = store.requests.failure([waiting])
    assert isinstance(error, UnavailableError)
    assert "send the request again" in str(error)
    store.requests.release([waiting])
    (again,) = bring(store, "a")
    assert again.content_hash == store.registry.status("a").content_hash


def test_a_pin_goes_over_to_the_new_version(
    make_store: MakeStore, folder: Path, newer: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    store.pin("a", True, answer())
    settle(store)
    old = bring(store, "a")
    store.intake.load("a", str(newer), answer(), inplace=True)
    settle(store)
    status = store.registry.status("a")
    assert (status.source, status.pinned, status.state) == (str(newer), True, "device")
    other = store.requests.resolve(["b"])
    assert store.requests.reserve(other) is Readiness.BLOCKED
    store.requests.release(old)
    assert store.requests.reserve(other) is Readiness.LOADING
    settle(store)
    assert set(store.on_device) == {"a", "b"}


def test_a_pin_waits_where_it_would_shut_a_request_out(
    make_store: MakeStore, folder: Path, newer: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    """Two slots, and a request for the old version together with b, which must come to its end."""
    store = make_store(folder, device_bytes=2 * ROOM)
    store.pin("a", True, answer())
    settle(store)
    both = store.requests.resolve(["a", "b"])
    store.intake.load("a", str(newer), answer(), inplace=True)
    settle(store)
    assert not store.registry.status("a").pinned
    store.intake.load("a", str(folder / "c"), answer(), inplace=True)
    settle(store)
    assert not store.registry.status("a").pinned, "nor does a yet newer one shut it out"
    assert store.requests.reserve(both) is Readiness.LOADING
    settle(store)
    assert store.requests.is_ready(both) is Readiness.READY
    store.requests.release(both)
    store.poll()
    settle(store)
    assert (store.registry.status("a").pinned, store.registry.status("a").state) == (True, "device")


def test_pins_are_fewer_than_the_slots(
    registry: SiteRegistry, make_store: MakeStore, folder: Path, settle: Settle, answer: Any
) -> None:
    store = make_store(folder, max_on_device=3)
    for name in "ab":
        store.pin(name, True, answer())
    with pytest.raises(FailedPreconditionError, match="at most 2 may be: fewer than the slots, 3"):
        store.pin("c", True, answer())
    store.pin("a", True, answer())
    store.pin("a", False, answer())
    store.pin("c", True, answer())
    settle(store)
    assert set(store.on_device) >= {"b", "c"}

    config = AdapterConfig(folders=(folder,), device_bytes=1 << 20, host_bytes=1 << 20, max_pinned=1)
    capped = AdapterStore(registry, config, device="cpu", dtype=torch.float32)
    capped.intake.register_folder(folder)
    capped.pin("a", True, answer())
    with pytest.raises(FailedPreconditionError, match="--max-pinned-adapters"):
        capped.pin("b", True, answer())
    capped.close()
    assert capped.check_integrity() == []


# Hints


def test_a_hint_brings_adapters_to_the_device(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder)
    statuses = store.prefetch(["b", "a", "b"])
    assert [status.name for status in statuses] == ["b", "a"]
    settle(store)
    assert set(store.on_device) == {"a", "b"}
    assert [swap.kind for swap in store.activity.drain_swaps()].count("load") == 2
    handles = store.requests.resolve(["a"])
    assert store.requests.reserve(handles) is Readiness.READY
    assert (store.activity.hits, store.activity.misses) == (1, 0)
    assert [status.state for status in store.prefetch(["a", "b"])] == ["device", "device"]
    assert not store.busy


def test_a_hint_may_stop_in_host_memory(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder)
    store.prefetch(["a"], to_device=False)
    settle(store)
    assert (store.on_host, store.on_device) == (("a",), ())
    store.prefetch(["a"], to_device=False)
    assert not store.busy
    store.prefetch(["a"])
    settle(store)
    assert store.on_device == ("a",)


def test_a_hint_takes_no_room_from_who_is_wanted(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle, answer: Any
) -> None:
    """Three slots: one pinned, one in use, one held by a request that waits its turn."""
    store = make_store(folder, device_bytes=3 * ROOM, host_bytes=3 * HOST)
    store.pin("a", True, answer())
    settle(store)
    running = bring(store, "b")
    waiting = bring(store, "c")
    store.requests.unreserve(waiting)
    store.prefetch(["d", "e"])
    settle(store)
    assert set(store.on_device) == {"a", "b", "c"}
    assert set(store.on_host) >= {"b", "c"}, "nor in host memory, where a may go: it is on the device"
    store.requests.release([*running, *waiting])
    store.prefetch(["d", "e"])
    settle(store)
    assert set(store.on_device) == {"a", "d", "e"}
    assert store.check_integrity() == []


def test_hints_do_not_drive_each_other_out(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder, device_bytes=2 * ROOM, host_bytes=2 * HOST)
    store.prefetch("abcdef")
    settle(store)
    assert set(store.on_device) == {"a", "b"}
    assert sum(swap.kind == "load" for swap in store.activity.drain_swaps()) == 2
    store.prefetch("cd")
    settle(store)
    assert set(store.on_device) == {"c", "d"}, "a later hint counts more than an earlier one"


def test_requests_go_before_hints(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder, device_bytes=2 * ROOM, host_bytes=2 * HOST)
    store.prefetch("abcd")
    handles = store.requests.resolve(["e", "f"])
    readiness = store.requests.reserve(handles)
    assert readiness in (Readiness.LOADING, Readiness.BLOCKED)
    while readiness is not Readiness.READY:
        settle(store)
        readiness = (
            store.requests.reserve(handles)
            if readiness is Readiness.BLOCKED
            else store.requests.is_ready(handles)
        )
    assert set(store.on_device) == {"e", "f"}
    with pytest.raises(NotFoundError):
        store.prefetch(["a", "zz"])


def test_what_is_unloaded_is_not_brought_in(
    make_store: MakeStore, folder: Path, settle: Settle, answer: Any
) -> None:
    store = make_store(folder)
    store.prefetch("abcdef")
    for name in "abcdef":
        store.unload(name, answer())
    settle(store)
    assert (store.device_bytes_used, store.host_bytes_used) == (0, 0)
