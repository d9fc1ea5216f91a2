"""The cache as its callers see it: states, room, eviction, pins, loading and unloading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)

READY, LOADING, BLOCKED, FAILED = Readiness.READY, Readiness.LOADING, Readiness.BLOCKED, Readiness.FAILED

ROOM = 7296
"""Bytes that one of the adapters below takes on the device; in host memory it is 7168."""

Settle = Callable[[AdapterStore], None]
Bring = Callable[..., tuple[AdapterHandle, ...]]
MakeStore = Callable[..., AdapterStore]


class Answer:
    """A callback that keeps what it is called with."""

    def __init__(self) -> None:
        self.value: AdapterStatus | ServerError | None = None
        self.calls = 0

    def __call__(self, value: AdapterStatus | ServerError | None = None) -> None:
        self.value = value
        self.calls += 1


@pytest.fixture
def folder(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    """Adapters a to f, all of one size."""
    for seed, name in enumerate("abcdef"):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    return tmp_path / "adapters"


# Registering


def test_a_folder_registers_each_of_its_adapters(make_store: MakeStore, folder: Path) -> None:
    (folder / "no-adapter").mkdir()
    store = make_store(folder)
    assert store.intake.register_folder(folder) == list("abcdef"), "again is no error"
    status = store.registry.status("b")
    assert status == AdapterStatus(
        name="b",
        source=str(folder / "b"),
        state="unloaded",
        pinned=False,
        peft_type="LORA",
        rank=4,
        target_modules=("q_proj", "v_proj"),
        bytes=7168,
        content_hash="",
        references=0,
        draining=False,
        hits=0,
        misses=0,
        evictions=0,
    )
    assert [status.name for status in store.registry.statuses()] == list("abcdef")
    assert (store.host_bytes_used, store.device_bytes_used) == (0, 0), "registering reads no weights"


def test_a_bad_adapter_is_kept_with_its_error_and_heals_when_its_files_do(
    make_store: MakeStore, folder: Path, write_adapter: Callable[..., Path], bring: Bring
) -> None:
    write_adapter(folder / "bad", config={"layer_replication": [[0, 1]]})
    write_adapter(folder / "bad name!")
    store = make_store(folder)
    assert set(store.registry.errors()) == {"bad", "bad name!"}
    for _ in range(2):
        with pytest.raises(FailedPreconditionError, match="layer_replication"):
            store.requests.resolve(["a", "bad"])
    with pytest.raises(FailedPreconditionError, match="layer_replication"):
        store.registry.status("bad")
    assert store.requests.references() == 0, "the good adapter of a refused request is not held"
    write_adapter(folder / "bad", rank=6)
    store.requests.release(bring(store, "bad"))
    assert store.registry.status("bad").rank == 6
    assert set(store.registry.errors()) == {"bad name!"}


def test_one_name_in_two_folders_is_an_error_that_names_both(
    make_store: MakeStore, folder: Path, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    write_adapter(tmp_path / "more" / "c")
    with pytest.raises(AlreadyExistsError) as caught:
        make_store(folder, tmp_path / "more")
    assert str(folder / "c") in str(caught.value)
    assert str(tmp_path / "more" / "c") in str(caught.value)


@pytest.mark.parametrize("spoiled", ["adapters", "more"])
def test_so_it_is_if_one_of_them_is_bad(
    spoiled: str, make_store: MakeStore, folder: Path, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    write_adapter(tmp_path / "more" / "c")
    (tmp_path / spoiled / "c" / "adapter_model.safetensors").unlink()
    with pytest.raises(AlreadyExistsError):
        make_store(folder, tmp_path / "more")


def test_sources_outside_the_roots_are_denied(
    make_store: MakeStore, folder: Path, tmp_path: Path, write_adapter: Callable[..., Path]
) -> None:
    store = make_store(folder)
    with pytest.raises(PermissionDeniedError):
        store.intake.register("x", write_adapter(tmp_path / "elsewhere"))
    with pytest.raises(InvalidArgumentError):
        store.intake.register("../x", folder / "a")
    with pytest.raises(NotFoundError):
        store.intake.register_folder(tmp_path / "missing")


def test_an_adapter_larger_than_a_budget_is_refused_and_the_option_named(
    make_store: MakeStore, folder: Path
) -> None:
    for option in ("host", "device"):
        store = make_store(folder, **{f"{option}_bytes": 7000})
        with pytest.raises(FailedPreconditionError, match=f"--adapter-{option}-bytes"):
            store.requests.resolve(["a"])
    with pytest.raises(InvalidArgumentError, match="adapter_device_bytes"):
        make_store(folder, device_bytes=1000)


# States


def test_the_states_of_an_adapter(make_store: MakeStore, folder: Path, served: Callable[..., bool]) -> None:
    store = make_store(folder)
    states = [store.registry.status("a").state]
    handles = store.requests.resolve(["a"])
    assert store.requests.reserve(handles) is LOADING
    states.append(store.registry.status("a").state)
    while store.busy:
        assert store.wait_event(20)
        states.append(store.registry.status("a").state)
        assert store.requests.is_ready(handles) is LOADING, "nothing changes but in a poll"
        store.poll()
    states.append(store.registry.status("a").state)
    assert states == ["unloaded", "loading", "loading", "copying", "device"]
    assert store.requests.is_ready(handles) is READY
    assert served(store, handles[0], folder / "a")
    assert store.on_device == store.on_host == ("a",)
    assert (store.device_bytes_used, store.host_bytes_used) == (ROOM, 7168)
    assert len(handles[0].content_hash) == 64
    assert [swap.kind for swap in store.activity.drain_swaps()] == ["load", "copy"]
    assert store.activity.drain_swaps() == []
    store.requests.release(handles)
    assert store.registry.status("a").state == "device", "it stays until the room is needed"


def test_a_load_goes_to_host_memory_only(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder)
    loaded = Answer()
    store.intake.load("x", "a", loaded)
    assert store.registry.status("x").state == "loading"
    with pytest.raises(AlreadyExistsError):
        store.intake.load("x", "b", Answer())
    with pytest.raises(NotFoundError):
        store.requests.resolve(["x"])
    settle(store)
    assert isinstance(loaded.value, AdapterStatus)
    assert (loaded.value.state, loaded.value.source, loaded.calls) == ("host", "a", 1)
    with pytest.raises(AlreadyExistsError, match="'a'"):
        store.intake.load("x", "b", Answer())


@pytest.mark.parametrize(
    ("source", "error"),
    [("missing", NotFoundError), ("../outside", PermissionDeniedError), ("bad", FailedPreconditionError)],
)
def test_a_load_that_fails_registers_nothing(
    source: str,
    error: type[ServerError],
    make_store: MakeStore,
    folder: Path,
    settle: Settle,
    write_adapter: Callable[..., Path],
) -> None:
    store = make_store(folder)
    write_adapter(folder / "bad", change=lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    failed = Answer()
    store.intake.load("x", source, failed)
    settle(store)
    assert isinstance(failed.value, error)
    assert failed.calls == 1
    with pytest.raises(NotFoundError):
        store.registry.status("x")
    assert store.host_bytes_used == 0


def test_a_load_mends_what_a_folder_held_broken(
    make_store: MakeStore, folder: Path, settle: Settle, write_adapter: Callable[..., Path]
) -> None:
    write_adapter(folder / "bad", config={"use_dora": True})
    store = make_store(folder)
    loaded = Answer()
    store.intake.load("bad", str(folder / "a"), loaded)
    settle(store)
    assert isinstance(loaded.value, AdapterStatus)
    assert store.registry.errors() == {}


def test_the_host_copy_may_go_while_the_device_copy_stays(
    make_store: MakeStore, folder: Path, bring: Bring, served: Callable[..., bool]
) -> None:
    store = make_store(folder, host_bytes=7168)
    a, b = bring(store, "a"), bring(store, "b")
    assert store.on_device == ("a", "b")
    assert store.on_host == ("b",)
    assert served(store, a[0], folder / "a")
    assert served(store, b[0], folder / "b")


def test_the_least_asked_for_leave_first(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder, device_bytes=3 * ROOM)
    for name in "abc":
        store.requests.release(bring(store, name))
    store.requests.release(bring(store, "a"))
    c = bring(store, "c")
    store.requests.release(bring(store, "d"))
    assert store.on_device == ("d", "a", "c"), "b was asked for once, and before d"
    store.requests.release(c)
    for name in "ef":
        store.requests.release(bring(store, name))
    assert store.on_device == ("f", "a", "c")
    assert [status.evictions for status in store.registry.statuses()] == [0, 1, 0, 1, 1, 0]
    evicted = [swap.adapter for swap in store.activity.drain_swaps() if swap.kind == "evict_device"]
    assert evicted == ["b", "d", "e"]


def test_what_a_request_waits_for_leaves_last(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    for name in "abbb":
        store.requests.release(bring(store, name))
    waiting = store.requests.resolve(["a"])
    store.requests.release(bring(store, "c"))
    assert set(store.on_device) == {"a", "c"}, "b is asked for more often, but nobody waits for it"
    store.requests.release(waiting)


def test_a_request_in_the_queue_has_its_adapter_read_ahead(
    make_store: MakeStore, folder: Path, settle: Settle
) -> None:
    store = make_store(folder)
    handles = store.requests.resolve(["b"])
    settle(store)
    assert (store.on_host, store.on_device) == (("b",), ())
    store.requests.release(handles)


def test_what_is_demanded_is_read_before_what_is_read_ahead(
    make_store: MakeStore, folder: Path, settle: Settle
) -> None:
    store = make_store(folder)
    queued = [store.requests.resolve([name]) for name in "abcdef"]
    store.requests.reserve(queued[5])
    settle(store)
    loads = [swap.adapter for swap in store.activity.drain_swaps() if swap.kind == "load"]
    assert sorted(loads) == list("abcdef")
    assert loads.index("f") == 2, "two were being read already"
    for handles in queued:
        store.requests.release(handles)


def test_the_number_of_adapters_has_a_cap_of_its_own(
    make_store: MakeStore, folder: Path, bring: Bring
) -> None:
    store = make_store(folder, max_on_device=2)
    assert store.num_slots == 2
    bring(store, "a", "b")
    assert store.requests.reserve(store.requests.resolve(["c"])) is BLOCKED


def test_an_adapter_in_use_is_never_evicted(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle, served: Callable[..., bool]
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    a = bring(store, "a")
    b = bring(store, "b")
    c = store.requests.resolve(["c"])
    for _ in range(3):
        assert store.requests.reserve(c) is BLOCKED
        store.poll()
    assert served(store, a[0], folder / "a")
    store.requests.unreserve(b)
    assert store.requests.reserve(c) is LOADING
    assert store.on_device == ("a",)
    settle(store)
    assert served(store, c[0], folder / "c")
    assert served(store, a[0], folder / "a")
    with pytest.raises(InternalError):
        store.requests.slot(b[0])


def test_room_set_aside_is_not_given_away(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder, device_bytes=ROOM)
    a, b = store.requests.resolve(["a"]), store.requests.resolve(["b"])
    assert store.requests.reserve(a) is LOADING
    assert store.requests.reserve(b) is BLOCKED
    settle(store)
    assert store.requests.reserve(b) is BLOCKED
    assert store.requests.is_ready(a) is READY


def test_giving_up_while_loading_frees_the_room(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder, device_bytes=ROOM)
    a, b = store.requests.resolve(["a"]), store.requests.resolve(["b"])
    store.requests.reserve(a)
    store.requests.release(a)
    assert store.device_bytes_used == 0
    assert store.requests.reserve(b) is LOADING
    store.wait_event(20)
    store.poll()
    assert store.check_integrity() == []
    settle(store)
    assert store.requests.is_ready(b) is READY
    assert store.registry.status("a").state == "host", "what was read stays"


def test_giving_up_while_copying_keeps_the_copy(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder, device_bytes=ROOM)
    a, b = store.requests.resolve(["a"]), store.requests.resolve(["b"])
    store.requests.reserve(a)
    store.wait_event(20)
    store.poll()
    assert store.registry.status("a").state == "copying"
    store.requests.release(a)
    assert store.requests.reserve(b) is BLOCKED, "what a worker writes cannot be taken away"
    assert store.check_integrity() == []
    settle(store)
    assert store.registry.status("a").state == "device"
    assert store.requests.reserve(b) is LOADING


def test_loads_of_one_adapter_are_one(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder)
    requests = [store.requests.resolve(["a", "b"]) for _ in range(5)]
    assert [store.requests.reserve(handles) for handles in requests] == [LOADING] * 5
    settle(store)
    assert [store.requests.is_ready(handles) for handles in requests] == [READY] * 5
    assert sorted(swap.kind for swap in store.activity.drain_swaps()) == ["copy", "copy", "load", "load"]
    assert len({store.requests.slot(handles[0]) for handles in requests}) == 1


def test_an_adapter_named_twice_is_one(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder, device_bytes=ROOM)
    first, second = bring(store, "a", "a")
    assert store.requests.slot(first) == store.requests.slot(second)
    assert store.registry.status("a").references == 2
    store.requests.release([first])
    assert store.on_device == ("a",)
    store.requests.release([second])


def test_hits_and_misses_count_once_a_request(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder, device_bytes=ROOM)
    a = bring(store, "a")
    blocked = store.requests.resolve(["b"])
    for _ in range(4):
        store.requests.reserve(blocked)
    for _ in range(3):  # preempted and taken up again
        store.requests.unreserve(a)
        assert store.requests.reserve(a) is READY
    bring(store, "a")
    assert (store.activity.hits, store.activity.misses) == (1, 2)
    assert [(store.registry.status(name).hits, store.registry.status(name).misses) for name in "ab"] == [
        (1, 1),
        (0, 1),
    ]


# Several adapters in one request


def test_two_compositions_that_contend_take_turns(
    make_store: MakeStore, folder: Path, settle: Settle, served: Callable[..., bool]
) -> None:
    """Room for three: {a, b} and {c, d} can each hold half and wait for ever, unless it is all or nothing."""
    store = make_store(folder, device_bytes=3 * ROOM)
    first, second = store.requests.resolve(["a", "b"]), store.requests.resolve(["c", "d"])
    assert store.requests.reserve(first) is LOADING
    assert store.requests.reserve(second) is BLOCKED
    assert store.device_bytes_used == 2 * ROOM, "the one that is blocked holds nothing"
    settle(store)
    assert store.requests.is_ready(first) is READY
    assert store.requests.reserve(second) is BLOCKED
    store.requests.release(first)
    assert store.requests.reserve(second) is LOADING
    settle(store)
    assert all(served(store, handle, folder / handle.name) for handle in second)


def test_a_blocked_request_has_its_adapters_read_meanwhile(
    make_store: MakeStore, folder: Path, settle: Settle, bring: Bring
) -> None:
    store = make_store(folder, device_bytes=ROOM)
    a = bring(store, "a")
    b = store.requests.resolve(["b"])
    assert store.requests.reserve(b) is BLOCKED
    settle(store)
    assert store.registry.status("b").state == "host"
    store.requests.release(a)
    assert store.requests.reserve(b) is LOADING
    assert store.registry.status("b").state == "copying"


def test_prefetches_do_not_drive_out_what_requests_wait_for(
    make_store: MakeStore, folder: Path, settle: Settle, bring: Bring
) -> None:
    store = make_store(folder, device_bytes=ROOM, host_bytes=2 * 7168)
    a = bring(store, "a")
    waiting = [store.requests.resolve([name]) for name in "bcd"]
    for _ in range(3):
        for handles in waiting:
            assert store.requests.reserve(handles) is BLOCKED
        settle(store)
    assert sum(swap.kind == "load" for swap in store.activity.drain_swaps()) == 2, (
        "a and b; there is no room for more"
    )
    store.requests.release([*waiting[0], *waiting[1]])
    store.poll()
    settle(store)
    assert store.registry.status("d").state == "host", "a and b are held by nobody who waits"
    store.requests.release(a)


def test_what_nobody_waits_for_any_more_is_not_read(
    make_store: MakeStore, folder: Path, settle: Settle, bring: Bring
) -> None:
    store = make_store(folder, device_bytes=ROOM, host_bytes=7168)
    a, b = bring(store, "a"), store.requests.resolve(["b"])
    assert store.requests.reserve(b) is BLOCKED
    assert store.registry.status("b").state == "unloaded", "there is no room to read it into"
    store.requests.release(b)
    store.requests.release(a)
    store.poll()
    settle(store)
    assert store.on_host == ("a",)


def test_a_demand_is_served_before_prefetches_and_may_take_their_room(
    make_store: MakeStore, folder: Path, settle: Settle
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM, host_bytes=2 * 7168)
    first = store.requests.resolve(["a", "b"])
    store.requests.reserve(first)
    waiting = [store.requests.resolve([name]) for name in "cd"]
    for handles in waiting:
        assert store.requests.reserve(handles) is BLOCKED
    settle(store)
    store.requests.release(first)
    last = store.requests.resolve(["e", "f"])
    assert store.requests.reserve(last) is LOADING
    settle(store)
    assert store.requests.is_ready(last) is READY


def test_what_can_never_fit_together_is_refused_at_once(make_store: MakeStore, folder: Path) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    with pytest.raises(FailedPreconditionError, match="3 slots"):
        store.requests.resolve(["a", "b", "c"])
    assert store.requests.references() == 0
    store.requests.resolve(["a", "b", "a"])
    with pytest.raises(NotFoundError) as caught:
        store.requests.resolve(["a", "zz"])
    assert caught.value.info.resource == ("adapter", "zz")


def test_room_in_pieces_is_moved_together(
    make_store: MakeStore,
    folder: Path,
    tmp_path: Path,
    write_adapter: Callable[..., Path],
    bring: Bring,
    served: Callable[..., bool],
) -> None:
    """a and c are in use, the gaps beside them are too small for the large one, and together they are not."""
    write_adapter(folder / "large", rank=16, seed=9)
    store = make_store(folder, device_bytes=4 * ROOM)
    held = {name: bring(store, name) for name in "abcd"}
    slots = {name: store.requests.slot(handles[0]) for name, handles in held.items()}
    store.requests.release([*held.pop("b"), *held.pop("d")])
    held["large"] = bring(store, "large")
    assert store.on_device == ("a", "c", "large")
    for name, handles in held.items():
        assert served(store, handles[0], folder / name), f"the bytes of {name} were not kept"
    assert store.requests.slot(held["c"][0]) == slots["c"]
    assert store.check_integrity() == []


def test_what_is_being_copied_is_not_moved(
    make_store: MakeStore,
    folder: Path,
    write_adapter: Callable[..., Path],
    bring: Bring,
    settle: Settle,
    served: Callable[..., bool],
) -> None:
    write_adapter(folder / "large", rank=16, seed=9)
    store = make_store(folder, device_bytes=4 * ROOM)
    held = {name: bring(store, name) for name in "adbe"}
    c, large = store.requests.resolve(["c"]), store.requests.resolve(["large"])
    store.requests.release(held["d"])
    assert store.requests.reserve(c) is LOADING
    while store.registry.status("c").state != "copying":
        assert store.wait_event(20)
        store.poll()
    # c lies where d was, so the room that a and e leave is in two pieces until c can be moved.
    store.requests.release([*held["a"], *held["e"]])
    assert store.requests.reserve(large) is BLOCKED
    assert store.check_integrity() == []
    settle(store)
    assert store.requests.reserve(large) is LOADING
    settle(store)
    for handles in (held["b"], c, large):
        assert served(store, handles[0], folder / handles[0].name)


# Failures


def test_a_file_that_goes_bad_fails_every_waiter_and_heals_later(
    make_store: MakeStore,
    folder: Path,
    settle: Settle,
    bring: Bring,
    write_adapter: Callable[..., Path],
    served: Callable[..., bool],
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    held = bring(store, "b")
    (folder / "a" / "adapter_model.safetensors").write_bytes(b"spoiled")
    alone, together, blocked = (
        store.requests.resolve(["a"]),
        store.requests.resolve(["a", "b"]),
        store.requests.resolve(["a", "c"]),
    )
    assert store.requests.reserve(alone) is LOADING
    assert store.requests.reserve(together) is LOADING
    assert store.requests.reserve(blocked) is BLOCKED
    settle(store)
    for handles in (alone, together):
        assert store.requests.is_ready(handles) is FAILED
        error = store.requests.failure(handles)
        assert isinstance(error, FailedPreconditionError)
        assert "'a'" in str(error)
    assert store.requests.reserve(blocked) is FAILED
    assert store.requests.failure(blocked) is error
    assert store.requests.failure(held) is None
    with pytest.raises(FailedPreconditionError) as caught:
        store.requests.resolve(["a"])
    assert caught.value is error
    assert store.check_integrity() == []
    for handles in (alone, together, blocked):
        store.requests.release(handles)
    assert store.device_bytes_used == ROOM, "the room of what failed is free"
    write_adapter(folder / "a", seed=11)
    healed = bring(store, "a")
    assert served(store, healed[0], folder / "a")


def test_weights_that_changed_under_a_name_are_not_mixed_with_the_old(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle, write_adapter: Callable[..., Path]
) -> None:
    """Same header, other values: only the hash can tell, when the weights are read a second time."""
    store = make_store(folder, device_bytes=ROOM, host_bytes=7168)
    first = bring(store, "a")
    before = first[0].content_hash
    store.requests.release(first)
    store.requests.release(bring(store, "b"))
    assert store.registry.status("a").state == "unloaded"
    write_adapter(folder / "a", seed=77)
    second = store.requests.resolve(["a"])
    assert store.requests.reserve(second) is LOADING
    settle(store)
    assert store.requests.is_ready(second) is FAILED
    assert "changed on disk" in str(store.requests.failure(second))
    store.requests.release(second)
    done = Answer()
    store.unload("a", done)
    store.intake.register("a", folder / "a")
    third = bring(store, "a")
    assert third[0].content_hash not in ("", before)


def test_a_handle_is_used_as_it_should_be(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder)
    handles = store.requests.resolve(["a"])
    for wrong in (lambda: store.requests.is_ready(handles), lambda: store.requests.slot(handles[0])):
        with pytest.raises(InternalError):
            wrong()
    store.requests.reserve(handles)
    with pytest.raises(InternalError, match="reserved already"):
        store.requests.reserve(handles)
    store.requests.release(handles)
    with pytest.raises(InternalError, match="released twice"):
        store.requests.release(handles)


def test_integrity_tells_what_is_broken(make_store: MakeStore, folder: Path, bring: Bring) -> None:
    store = make_store(folder)
    (handle,) = bring(store, "a")
    assert store.check_integrity() == []
    store.pool.host.a_offset[store.requests.slot(handle), 0] += 96
    assert any("does not point at its extent" in line for line in store.check_integrity())
    store.pool.host.a_offset[store.requests.slot(handle), 0] -= 96
    handle.record.references += 1
    assert any("are held" in line for line in store.check_integrity())
    handle.record.references -= 1
    store.pool.host.rank[7, 0] = 4
    assert any("serves no adapter" in line for line in store.check_integrity())
    store.pool.host.rank[7, 0] = 0


# Pins


def test_a_pinned_adapter_comes_to_the_device_and_stays(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    pinned = Answer()
    store.pin("a", True, pinned)
    assert pinned.calls == 0
    settle(store)
    assert isinstance(pinned.value, AdapterStatus)
    assert (pinned.value.state, pinned.value.pinned, pinned.calls) == ("device", True, 1)
    for name in "bcdb":
        store.requests.release(bring(store, name))
    assert store.on_device == ("a", "b")
    again = Answer()
    store.pin("a", True, again)
    assert again.calls == 1
    unpinned = Answer()
    store.pin("a", False, unpinned)
    assert isinstance(unpinned.value, AdapterStatus)
    assert not unpinned.value.pinned
    bring(store, "c", "d")
    assert store.on_device == ("c", "d")


def test_pins_leave_room_for_the_others(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle
) -> None:
    store = make_store(folder, device_bytes=3 * ROOM)
    composed = store.requests.resolve(["b", "c"])
    store.pin("a", True, Answer())
    with pytest.raises(FailedPreconditionError, match="'d' pinned and b, c beside it"):
        store.pin("d", True, Answer())
    with pytest.raises(FailedPreconditionError, match="pinned ones included"):
        store.requests.resolve(["b", "c", "d"])
    assert not store.registry.status("d").pinned
    store.requests.release(composed)
    store.pin("d", True, Answer())
    with pytest.raises(FailedPreconditionError):
        store.pin("e", True, Answer())
    settle(store)
    assert set(store.on_device) == {"a", "d"}
    with pytest.raises(NotFoundError):
        store.pin("zz", True, Answer())


def test_a_pin_waits_for_room_and_goes_first(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    running = [*bring(store, "a"), *bring(store, "b")]
    pinned = Answer()
    store.pin("c", True, pinned)
    later = store.requests.resolve(["d"])
    assert store.requests.reserve(later) is BLOCKED
    store.requests.unreserve(running)
    assert store.requests.reserve(later) is BLOCKED, "the pin was first"
    assert store.requests.reserve(running) is READY, "what is there may run"
    store.requests.unreserve(running)
    store.poll()
    settle(store)
    assert pinned.calls == 1
    assert store.requests.reserve(later) is LOADING
    settle(store)


def test_a_pin_that_fails_or_is_taken_back_is_answered(
    make_store: MakeStore, folder: Path, bring: Bring, settle: Settle
) -> None:
    store = make_store(folder, device_bytes=2 * ROOM)
    running = [*bring(store, "a"), *bring(store, "b")]
    taken_back, unloaded, failed = Answer(), Answer(), Answer()
    store.pin("c", True, taken_back)
    store.pin("c", False, Answer())
    assert isinstance(taken_back.value, CancelledError)
    store.pin("c", True, unloaded)
    store.unload("c", Answer())
    assert isinstance(unloaded.value, CancelledError)
    store.requests.release(running)
    (folder / "d" / "adapter_model.safetensors").write_bytes(b"spoiled")
    store.pin("d", True, failed)
    settle(store)
    assert isinstance(failed.value, FailedPreconditionError)
    assert store.device_bytes_used == ROOM, "the room of d is free again"


# Unloading


def test_an_unload_drains_and_then_frees_everything(
    make_store: MakeStore, folder: Path, bring: Bring, served: Callable[..., bool]
) -> None:
    store = make_store(folder)
    running, waiting = bring(store, "a"), store.requests.resolve(["a"])
    done = Answer()
    store.unload("a", done)
    with pytest.raises(NotFoundError):
        store.requests.resolve(["a"])
    assert (store.registry.status("a").draining, store.registry.status("a").references, done.calls) == (
        True,
        2,
        0,
    )
    assert served(store, running[0], folder / "a")
    store.requests.release(running)
    assert store.requests.reserve(waiting) is READY, "whoever held it runs to the end"
    assert done.calls == 0
    store.requests.release(waiting)
    assert done.calls == 1
    assert (store.device_bytes_used, store.host_bytes_used, store.requests.references()) == (0, 0, 0)
    with pytest.raises(NotFoundError):
        store.registry.status("a")
    with pytest.raises(NotFoundError):
        store.unload("a", Answer())


def test_a_name_is_free_again_while_the_old_version_drains(
    make_store: MakeStore,
    folder: Path,
    bring: Bring,
    settle: Settle,
    served: Callable[..., bool],
    write_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    old_files = shutil.copytree(folder / "a", tmp_path / "old")
    store = make_store(folder)
    old = bring(store, "a")
    drained, loaded = Answer(), Answer()
    store.unload("a", drained)
    write_adapter(folder / "a", seed=42, rank=6)
    store.intake.load("a", str(folder / "a"), loaded)
    settle(store)
    assert isinstance(loaded.value, AdapterStatus)
    new = bring(store, "a")
    assert old[0].content_hash != new[0].content_hash
    assert store.requests.slot(old[0]) != store.requests.slot(new[0])
    assert served(store, old[0], old_files)
    assert served(store, new[0], folder / "a")
    assert [(status.draining, status.rank) for status in store.registry.statuses() if status.name == "a"] == [
        (False, 6),
        (True, 4),
    ]
    store.requests.release(old)
    assert drained.calls == 1
    assert not store.registry.status("a").draining
    assert served(store, new[0], folder / "a")


def test_a_draining_adapter_still_loads_for_who_waits(
    make_store: MakeStore, folder: Path, settle: Settle, bring: Bring, served: Callable[..., bool]
) -> None:
    store = make_store(folder, device_bytes=ROOM)
    b = bring(store, "b")
    waiting = store.requests.resolve(["a"])
    assert store.requests.reserve(waiting) is BLOCKED
    done = Answer()
    store.unload("a", done)
    store.requests.release(b)
    assert store.requests.reserve(waiting) is LOADING
    settle(store)
    assert served(store, waiting[0], folder / "a")
    store.requests.release(waiting)
    assert done.calls == 1


@pytest.mark.parametrize("polls", [0, 1, 2])
def test_an_unload_waits_for_what_the_workers_are_at(
    polls: int, make_store: MakeStore, folder: Path, settle: Settle
) -> None:
    store = make_store(folder)
    handles = store.requests.resolve(["a"])
    store.requests.reserve(handles)
    for _ in range(polls):
        assert store.wait_event(20)
        store.poll()
    done = Answer()
    store.unload("a", done)
    store.requests.release(handles)
    assert store.check_integrity() == []
    assert done.calls == (polls == 2), "nothing is being read or copied any more only after two polls"
    settle(store)
    assert done.calls == 1
    assert (store.device_bytes_used, store.host_bytes_used) == (0, 0)


def test_an_unload_cancels_a_load(make_store: MakeStore, folder: Path, settle: Settle) -> None:
    store = make_store(folder)
    for polls in (0, 1):
        loaded, unloaded = Answer(), Answer()
        store.intake.load("x", "a", loaded)
        for _ in range(polls):
            store.wait_event(20)
            store.poll()
        store.unload("x", unloaded)
        assert isinstance(loaded.value, CancelledError)
        settle(store)
        store.poll()
        settle(store)
        assert (loaded.calls, unloaded.calls) == (1, 1)
        assert store.host_bytes_used == 0
        with pytest.raises(NotFoundError):
            store.registry.status("x")


def test_a_broken_adapter_can_be_unloaded(
    make_store: MakeStore, folder: Path, write_adapter: Callable[..., Path]
) -> None:
    write_adapter(folder / "bad", config={"use_dora": True})
    store = make_store(folder)
    done = Answer()
    store.unload("bad", done)
    assert done.calls == 1
    with pytest.raises(NotFoundError):
        store.requests.resolve(["bad"])


# Workers


def test_the_engine_is_woken_when_there_is_something_to_poll(
    registry: SiteRegistry, make_store: MakeStore, folder: Path, settle: Settle
) -> None:
    woken: list[int] = []
    store = make_store(folder, wake=lambda: woken.append(1))
    assert not store.wait_event(0)
    assert not store.poll()
    store.requests.reserve(store.requests.resolve(["a"]))
    assert store.wait_event(20)
    assert woken
    assert store.poll()
    settle(store)
    assert len(woken) == 2


def test_closing_stops_the_threads_and_answers_who_waits(make_store: MakeStore, folder: Path) -> None:
    store = make_store(folder)
    pending = Answer()
    store.intake.load("x", "a", pending)
    store.requests.reserve(store.requests.resolve(["b"]))
    store.close()
    store.close()
    assert isinstance(pending.value, UnavailableError)
    assert pending.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_copied_whole(
    dtype: torch.dtype, make_store: MakeStore, folder: Path, bring: Bring, registry: SiteRegistry
) -> None:
    store = make_store(folder, dtype=dtype)
    (handle,) = bring(store, "a")
    tensors: dict[str, Any] = load_file(folder / "a" / "adapter_model.safetensors")
    entry = registry.entry("model.layers.1.self_attn.v_proj")
    assert entry is not None
    expected = tensors[f"base_model.model.{entry.path}.lora_A.weight"].to(dtype)
    assert torch.equal(store.pool.a(store.requests.slot(handle), entry.index, entry.in_features), expected)


def test_in_8_bits_adapters_take_about_a_quarter_of_float32(
    make_store: MakeStore, folder: Path, bring: Bring, registry: SiteRegistry
) -> None:
    plain, small = make_store(folder), make_store(folder, device_dtype="int8")
    bring(plain, "a", "b")
    handles = bring(small, "a", "b")
    # A scale a rank row is much in so small a model: 4 bytes beside 32 to 80.
    assert small.device_bytes_used < 0.36 * plain.device_bytes_used
    assert small.host_bytes_used < 0.36 * plain.host_bytes_used
    for slot in map(small.requests.slot, handles):
        entry = next(entry for entry in registry if small.pool.host.rank[slot, entry.index])
        a = small.pool.a(slot, entry.index, entry.in_features)
        assert a.dtype == torch.int8
        assert bool((a.int().abs().amax(1) == 127).all())
        assert bool((small.pool.scale(slot, entry.index, entry.out_features) > 0).all())
