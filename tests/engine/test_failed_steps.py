"""A step that fails ends the requests that were in it with INTERNAL; all others get their answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from loraplex_server.core.step import StepOutput, StepPlan
from loraplex_server.wire.messages import Failed, Submit

POISON = 7
"""A token id that no step survives."""


@dataclasses.dataclass
class Faulty:
    """A runner that fails wherever a poisoned token is computed: when launched, or when its result is due."""

    runner: Any
    late: bool
    asynchronous: bool
    lasting: bool = False
    faults: int = 0

    def launch(self, plan: StepPlan) -> Any:
        poisoned = POISON in plan.token_ids
        if poisoned and not self.late:
            # Half of the work is done when it fails.
            self.runner.launch(plan).result()
            self._fail()
        pending = self.runner.launch(plan)

        class Launched:
            def result(launched) -> StepOutput:  # noqa: N805
                if poisoned:
                    self._fail()
                return pending.result()

        return Launched()

    def _fail(self) -> None:
        self.faults += 1
        raise RuntimeError("a fault, at /some/path")

    def usable(self) -> bool:
        return not (self.lasting and self.faults)

    def weight_checksum(self) -> Any:
        return self.runner.weight_checksum()


SCHEDULER = {
    "max_num_requests": 4,
    "max_batch_tokens": 16,
    "kv_block_size": 4,
    "kv_cache_bytes": 14 * 2048,
    "max_model_len": 40,
}


def _requests(rng: random.Random) -> list[dict[str, Any]]:
    """Some share a beginning, so that a poisoned one has blocks that others want."""
    beginning = [rng.randrange(8, 200) for _ in range(9)]
    return [
        {
            "prompt": [*beginning[: rng.choice([0, 9])], *(rng.randrange(8, 200) for _ in range(1, 5))]
            + ([POISON, 9] if index % 8 == 1 else []),
            "adapters": rng.choice([[], [("r6", 1.0)], [("r7", 0.5), ("r14", 1.0)]]),
            "max_tokens": rng.randrange(1, 12),
            "ignore_eos": True,
            # Nobody generates the poison by accident, so who is to fail is known.
            "logit_bias": ((POISON, -100.0),),
        }
        for index in range(24)
    ]


@pytest.fixture(scope="module")
def served(module_harness: Any, tiny: Any) -> Any:
    return module_harness(tiny("Llama"), scheduler=SCHEDULER)


def _answers(one: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    for index, request in enumerate(requests):
        fields = dict(request)
        one.submit(str(index), fields.pop("prompt"), fields.pop("adapters"), **fields)
        if index % 2:
            one.engine.step()
    one.run()
    return dict(one.answers)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in_step", "ahead"])
@pytest.mark.parametrize("late", [False, True], ids=["launch", "result"])
def test_the_others_get_their_answers(
    served: Any, monkeypatch: pytest.MonkeyPatch, late: bool, asynchronous: bool
) -> None:
    requests = _requests(random.Random(5))
    right = _answers(served, requests)
    device = Faulty(served.engine._runner, late, asynchronous)
    monkeypatch.setattr(served.engine, "_runner", device)
    found = _answers(served, requests)
    failed = {name for name, answer in found.items() if answer.error is not None}
    poisoned = {str(index) for index, request in enumerate(requests) if POISON in request["prompt"]}
    assert device.faults > 0
    assert poisoned <= failed
    assert {found[name].error.code for name in failed} == {"INTERNAL"}
    assert len(failed) <= device.faults * SCHEDULER["max_num_requests"]
    others = found.keys() - failed
    assert len(others) >= len(requests) // 2
    assert [found[name].tokens for name in sorted(others)] == [right[name].tokens for name in sorted(others)]
    assert served.engine.stats().failed_steps == device.faults
    served.assert_clean()


def test_a_plan_that_cannot_be_made_is_a_failed_step(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("loraplex_server.engine.engine.build_plan", lambda *_: 1 // 0)
        lost = served.submit("lost", range(8, 12), [("r6", 1.0)], max_tokens=4)
        served.run()
    assert lost.error.code == "INTERNAL"
    following = served.submit("next", range(8, 12), [("r6", 1.0)], max_tokens=4)
    served.run()
    assert (following.error, following.finish) == (None, "length")


@pytest.mark.parametrize("late", [False, True], ids=["launch", "result"])
def test_a_device_that_is_lost_ends_the_engine(
    served: Any, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    device = Faulty(served.engine._runner, late, asynchronous=True, lasting=True)
    monkeypatch.setattr(served.engine, "_runner", device)
    served.submit("r", [8, POISON, 9], max_tokens=4)
    with pytest.raises(RuntimeError, match="a fault"):
        served.run()
    served.engine.cancel_client("test")
    device.lasting = False
    served.run()


def test_the_runner_says_that_it_can_go_on(served: Any) -> None:
    assert served.engine._runner.usable()


@pytest.fixture
def host_of(tmp_path_factory: Any) -> Callable[[Any], tuple[Any, list[Any]]]:
    """A host that handles messages in the test's thread, and what it answered."""
    import tempfile

    from loraplex_server.engine.host import EngineHost

    folder = tempfile.TemporaryDirectory(prefix="loraplex-")
    made: list[Any] = []

    def make(engine: Any) -> tuple[Any, list[Any]]:
        host, sent = EngineHost(f"{folder.name}/engine.sock", "secret"), []
        made.append(host)
        host.emit = lambda client, message: sent.append(message)
        return host, sent

    yield make
    for host in made:
        host._listener.close()
    folder.cleanup()


def test_a_message_that_fails_is_answered(served: Any, host_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex_server.core.request import AdapterUse, Request, SamplingParams
    from loraplex_server.engine.connections import Received
    from loraplex_server.wire.commands import Call, ListAdapters, Reply

    host, sent = host_of(served.engine)
    with monkeypatch.context() as broken:
        broken.setattr("loraplex_server.engine.admission.Sequence", lambda *_, **__: 1 // 0)
        request = Request("r", (8, 9), SamplingParams(max_tokens=2), (AdapterUse("r6", 1.0),))
        host._handle(served.engine, Received("api", Submit(request)))
        broken.setattr(served.engine.adapters.registry, "statuses", lambda: 1 // 0)
        host._handle(served.engine, Received("api", Call(5, ListAdapters())))
    refused, reply = sent
    assert isinstance(refused, Failed)
    assert (refused.request_id, refused.error.code) == ("r", "INTERNAL")
    assert isinstance(reply, Reply)
    assert reply.error is not None
    assert (reply.call_id, reply.error.code) == (5, "INTERNAL")
    served.assert_clean()
