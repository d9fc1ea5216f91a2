"""New versions and unloading while an engine is at work: every answer is wholly of one version."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import ServerError


def test_a_swap_in_the_middle_of_an_answer(tiny: Any, harness: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("Llama")
    published = tmp_path / "published"
    shutil.copytree(model.adapters / "r6", published / "x")
    one = harness(model, adapters={"folders": (model.adapters, published)})
    prompt = list(range(3, 40))
    expected = {name: one.submit(name, prompt, [(name, 1.0)], max_tokens=24) for name in ("r6", "r8")}
    one.run()
    assert expected["r6"].tokens != expected["r8"].tokens

    running = one.submit("running", prompt, [("x", 1.0)], max_tokens=24)
    while len(running.tokens) < 8:
        if not one.engine.step():
            one.engine.adapters.wait_event(0.05)
    keys = {key for s in one.engine.scheduler.running for key in s.block_keys}
    assert keys
    outcomes: list[AdapterStatus | ServerError] = []
    shutil.copytree(model.adapters / "r8", published / "x", dirs_exist_ok=True)
    one.engine.adapters.intake.load("x", str(published / "x"), outcomes.append, inplace=True)
    before = one.submit("before", prompt, [("x", 1.0)], max_tokens=24)
    while not outcomes:
        one.engine.step()
    after = one.submit("after", prompt, [("x", 1.0)], max_tokens=24)
    assert running.finish is None, "the swap came in the middle"
    while not after.tokens:
        if not one.engine.step():
            one.engine.adapters.wait_event(0.05)
    fresh = {
        key for s in one.engine.scheduler.running if s.request.request_id == "after" for key in s.block_keys
    }
    assert fresh
    assert not fresh & keys, "no KV block of the old version answers for the new one"
    one.run()
    assert running.tokens == before.tokens == expected["r6"].tokens
    assert after.tokens == expected["r8"].tokens
    assert [status.rank for status in one.engine.adapters.registry.statuses() if status.name == "x"] == [8]


def test_an_unload_ends_what_runs_on_after_its_grace(tiny: Any, harness: Callable[..., Any]) -> None:
    model = tiny("Llama")
    one = harness(model)
    adapters = one.engine.adapters
    freed: list[str] = []
    running = one.submit("running", [5, 6, 7], [("r6", 1.0)], max_tokens=100)
    other = one.submit("other", [5, 6, 7], [("r8", 1.0)], max_tokens=100)
    while not (running.tokens and other.tokens):
        if not one.engine.step():
            adapters.wait_event(0.05)
    mixed = one.submit("mixed", [5, 6, 7], [("r8", 1.0), ("r6", 0.5)], max_tokens=100)
    held = adapters.device_bytes_used
    one.engine.unload("r6", 3600.0, lambda: freed.append("late"))
    one.engine.step()
    assert (running.error, freed) == (None, [])
    one.engine.unload("r6", 0.0, lambda: freed.append("now"))
    one.engine.step()
    assert sorted(freed) == ["late", "now"]
    for answer in (running, mixed):
        assert answer.error.code == "CANCELLED"
        assert "'r6' was unloaded" in answer.error.message
    assert adapters.device_bytes_used < held
    assert "r6" not in {status.name for status in adapters.registry.statuses()}
    one.run()
    assert (other.finish, other.error) == ("length", None)
    assert one.engine._drains.pending == {}
