"""The cache under a scheduler that does all it may, in random order, against what must hold at every step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError

NAMES = [f"adapter-{i:02d}" for i in range(12)]
RANKS = (4, 6, 7, 8, 12, 14, 16, 32)


@dataclasses.dataclass(eq=False)
class Running:
    """A request as the scheduler keeps it: `left` steps of work once its adapters are there."""

    handles: tuple[AdapterHandle, ...]
    left: int
    reserved: bool = False
    waited: int = 0


class World:
    """A store, requests on it, and the truth about every adapter's weights."""

    def __init__(self, store: AdapterStore, folder: Path, registry: SiteRegistry, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.requests: list[Running] = []
        self.completed = 0
        entry = registry.entry("model.layers.1.self_attn.v_proj")
        assert entry is not None
        self.entry = entry
        # By the folder's name, and by its path for those that the folder registers.
        self.truth = {
            source: load_file(folder / name / "adapter_model.safetensors")[
                f"base_model.model.{entry.path}.lora_B.weight"
            ]
            for name in (*NAMES, *(f"next/{name}" for name in NAMES))
            for source in (name, str(folder / name))
        }

    def submit(self) -> None:
        names = self.rng.choices(NAMES, k=self.rng.choice([1, 1, 1, 2, 3]))
        self.requests.append(Running(self.store.requests.resolve(names), self.rng.randint(1, 4)))

    def step(self) -> int:
        """One turn of the engine's loop; returns how many requests ran."""
        self.store.poll()
        ran = 0
        for request in list(self.requests):
            if request.reserved:
                readiness = self.store.requests.is_ready(request.handles)
            else:
                readiness = self.store.requests.reserve(request.handles)
                request.reserved = readiness in (Readiness.READY, Readiness.LOADING)
            assert readiness is not Readiness.FAILED
            if readiness is not Readiness.READY:
                request.waited += 1
                continue
            self.check(request)
            ran += 1
            request.left -= 1
            if request.left == 0:
                self.end(request)
                self.completed += 1
        return ran

    def drain(self) -> None:
        """Steps until every request has completed."""
        while self.requests:
            if not self.step():
                assert self.store.busy, "nothing runs and nothing is on its way"
                assert self.store.wait_event(20)

    def check(self, request: Running) -> None:
        for handle in request.handles:
            served = self.store.pool.b(
                self.store.requests.slot(handle), self.entry.index, self.entry.out_features
            )
            truth = self.truth[handle.record.source]
            assert torch.equal(served.T, 2 * truth), f"{handle.name} was served wrongly"

    def end(self, request: Running) -> None:
        self.requests.remove(request)
        self.store.requests.release(request.handles)


@pytest.fixture
def folder(tmp_path: Path, write_adapter: Callable[..., Path]) -> Path:
    for index, name in enumerate(NAMES):
        write_adapter(tmp_path / "adapters" / name, seed=index, rank=RANKS[index % len(RANKS)])
        write_adapter(tmp_path / "adapters" / "next" / name, seed=100 + index, rank=RANKS[index % 5])
    return tmp_path / "adapters"


def test_twelve_adapters_through_three_slots(
    folder: Path, make_store: Callable[..., AdapterStore], registry: SiteRegistry
) -> None:
    """200 requests, compositions among them, more waiting than fit: each one completes on its own weights."""
    store = make_store(folder, max_on_device=3)
    world = World(store, folder, registry, seed=5)
    submitted = 0
    while world.completed < 200:
        while submitted < 200 and len(world.requests) < 24:
            world.submit()
            submitted += 1
        if not world.step():
            assert store.busy, "nothing runs and nothing is on its way"
            assert store.wait_event(20)
    assert (store.requests.references(), len(world.requests)) == (0, 0)
    assert store.activity.hits + store.activity.misses > 200
    assert {status.references for status in store.registry.statuses()} == {0}
    assert store.check_integrity() == []


@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(
    seed: int,
    folder: Path,
    make_store: Callable[..., AdapterStore],
    registry: SiteRegistry,
    settle: Callable[[AdapterStore], None],
) -> None:
    """Cancellations, preemptions, pins, hints, unloads, reloads, new versions between steps, with room that
    is too small."""
    rng = random.Random(seed)
    store = make_store(
        folder,
        max_on_device=rng.choice([0, 4, 5]),
        device_bytes=rng.choice([120_000, 180_000]),
        host_bytes=rng.choice([60_000, 90_000, 300_000]),
    )
    world = World(store, folder, registry, seed)
    asked, answered, refused = 0, 0, 0

    def answer(*_: object) -> None:
        nonlocal answered
        answered += 1

    for _ in range(400):
        try:
            match rng.randrange(18):
                case 0 | 1 | 2 | 3 | 4 if len(world.requests) < 20:
                    world.submit()
                case 5 if world.requests:
                    world.end(rng.choice(world.requests))
                case 6 if world.requests:
                    request = rng.choice(world.requests)
                    store.requests.unreserve(request.handles)
                    request.reserved = False
                case 7:
                    store.pin(rng.choice(NAMES), rng.random() < 0.4, answer)
                    asked += 1
                case 8:
                    store.unload(rng.choice(NAMES), answer)
                    asked += 1
                case 9 | 10:
                    name = rng.choice(NAMES)
                    store.intake.load(name, name, answer)
                    asked += 1
                case 11 | 12 | 13:
                    name = rng.choice(NAMES)
                    store.intake.load(name, rng.choice(["", "next/"]) + name, answer, inplace=True)
                    asked += 1
                case 14:
                    store.prefetch(rng.choices(NAMES, k=3), to_device=rng.random() < 0.7)
                case _:
                    world.step()
        except (NotFoundError, AlreadyExistsError, FailedPreconditionError):
            refused += 1
        if rng.random() < 0.1:
            store.wait_event(0.05)
        assert store.check_integrity() == []
    for status in store.registry.statuses():
        if status.pinned:
            store.pin(status.name, False, answer)
            asked += 1
    world.drain()
    settle(store)
    # Whatever it went through, it serves every adapter: those that were unloaded come back.
    for name in {*NAMES} - {status.name for status in store.registry.statuses()}:
        store.intake.load(name, name, answer)
        asked += 1
    settle(store)
    completed = world.completed
    for _ in range(20):
        world.submit()
    world.drain()
    settle(store)
    assert answered == asked
    assert world.completed == completed + 20
    assert refused > 0
    assert store.requests.references() == 0
    for status in store.registry.statuses():
        store.unload(status.name, answer)
    assert (store.device_bytes_used, store.host_bytes_used) == (0, 0)
