"""Limits for the phases of a call: each passes by itself, and the error names it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from loraplex import Timeouts
from loraplex._sync.watchdog import Watchdog
from loraplex.errors import DeadlineExceededError, InvalidRequestError
from loraplex.v1 import generation_pb2, model_pb2

SAFETY_S = 20.0
LONG = Timeouts(connect=SAFETY_S, first_token=SAFETY_S, between_tokens=SAFETY_S, total=3 * SAFETY_S)


@pytest.fixture
def stalling(server: Any) -> Any:
    """The server sends one chunk, if the prompt asks for it, and then nothing."""

    def handle(request: Any, context: Any) -> Any:
        first = generation_pb2.GenerateResponse(text="first", token_ids=[1], request_id="r1")
        return server.hold(context, *([first] if request.text == "begin" else []))

    server.answers["Generate"] = handle
    return server


@pytest.mark.parametrize(
    ("prompt", "limits", "phase"),
    [
        ("silence", Timeouts(first_token=0.2), "first_token"),
        ("begin", Timeouts(between_tokens=0.2, first_token=SAFETY_S), "between_tokens"),
        ("begin", Timeouts(total=0.5), "total"),
        ("begin", Timeouts(total=0.5, first_token=SAFETY_S, between_tokens=SAFETY_S), "total"),
    ],
)
def test_the_error_names_the_phase(
    drive: Any, stalling: Any, client: Any, prompt: str, limits: Timeouts, phase: str
) -> None:
    for act in (
        lambda: client.generate(prompt, timeout=limits),
        lambda: client.stream(prompt, timeout=limits).collect(),
    ):
        with pytest.raises(DeadlineExceededError) as caught:
            drive(act)
        assert (caught.value.phase, caught.value.code) == (phase, "DEADLINE_EXCEEDED")
    if phase == "between_tokens":
        # It has begun: the server learns that nobody wants the rest.
        assert stalling.cancelled.wait(SAFETY_S)


def test_the_text_says_what_was_waited_for(drive: Any, stalling: Any, client: Any) -> None:
    with pytest.raises(DeadlineExceededError, match=r"nothing of the answer came within 0\.2 s"):
        drive(lambda: client.generate("x", timeout=Timeouts(first_token=0.2)))


def test_limits_that_do_not_pass_change_nothing(drive: Any, connect: Any) -> None:
    client = connect(timeout=LONG)
    assert drive(lambda: client.generate("x")) == drive(lambda: client.stream("x").collect())
    assert drive(lambda: client.map(["x"]).collect())[0].text == "Grüße"


def test_a_number_is_the_total_beside_the_client_s_other_limits(
    drive: Any, stalling: Any, connect: Any
) -> None:
    client = connect(timeout=Timeouts(first_token=0.2))
    with pytest.raises(DeadlineExceededError) as caught:
        drive(lambda: client.generate("x", timeout=3 * SAFETY_S))
    assert caught.value.phase == "first_token"


class TestConnect:
    def test_to_nobody(self, drive: Any, connect: Any, tmp_path: Any) -> None:
        client = connect(f"unix:{tmp_path}/never.sock", timeout=Timeouts(connect=0.3))
        for act in (
            lambda: client.model(),
            lambda: client.stream("x").collect(),
            lambda: client.map(["x"]).collect(),
        ):
            with pytest.raises(DeadlineExceededError, match=r"no connection to unix:.*never\.sock") as caught:
                drive(act)
            assert caught.value.phase == "connect"

    def test_within_the_total(self, drive: Any, connect: Any, tmp_path: Any) -> None:
        client = connect(f"unix:{tmp_path}/never.sock", timeout=Timeouts(connect=SAFETY_S, total=0.2))
        with pytest.raises(DeadlineExceededError) as caught:
            drive(lambda: client.model())
        assert caught.value.phase == "total"

    def test_to_a_server_that_is_late(self, drive: Any, connect: Any, new_server: Any, tmp_path: Any) -> None:
        late = new_server()
        late.answers["GetModel"] = lambda request, context: model_pb2.GetModelResponse()
        address = f"unix:{tmp_path}/late.sock"
        client = connect(address, timeout=Timeouts(connect=SAFETY_S))
        starter = threading.Timer(0.3, late.start, [address])
        starter.start()
        assert drive(lambda: client.generate("x")).text == "Grüße"
        starter.join()
        assert drive(lambda: client.stream("x").collect()).text == "Grüße"


@pytest.mark.parametrize("name", ["connect", "first_token", "between_tokens", "total"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        Timeouts(**{name: 0})
    assert getattr(Timeouts(**{name: float("inf")}), name) is None


def test_the_watchdog_acts_in_time_and_forgets() -> None:
    watchdog = Watchdog()
    acted: list[str] = []
    both = threading.Semaphore(0)

    def act(name: str) -> None:
        acted.append(name)
        both.release()

    watchdog.forget(watchdog.watch(SAFETY_S, lambda: act("forgotten")))
    assert not watchdog._waits
    watchdog.watch(0.2, lambda: act("later"))
    watchdog.watch(0.05, lambda: act("sooner"))  # while the thread waits for the other
    assert both.acquire(timeout=SAFETY_S)
    assert both.acquire(timeout=SAFETY_S)
    assert sorted(acted) == ["later", "sooner"]
