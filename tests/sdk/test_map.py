"""`map`: many prompts, so many at a time, answers in order, errors where the caller wants them."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from loraplex import AsyncClient, Conversation, Timeouts
from loraplex.errors import DeadlineExceededError, InvalidRequestError, LoraplexError, NotFoundError
from loraplex.v1 import generation_pb2

SAFETY_S = 20.0


def answer(text: str) -> Any:
    return generation_pb2.GenerateResponse(
        text=text, token_ids=[1], finish=generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH)
    )


@pytest.fixture
def echo(server: Any) -> Any:
    """The server answers with the prompt in upper case."""

    def handle(request: Any, context: Any) -> Iterator[Any]:
        yield answer(request.text.upper())

    server.answers["Generate"] = handle
    return server


def take(drive: Any, mapped: Any, number: int) -> list[Any]:
    return [drive.next(mapped) for _ in range(number)]


def test_answers_are_in_the_order_of_the_prompts(drive: Any, server: Any, client: Any) -> None:
    """The first one is answered last."""
    others = threading.Barrier(4, timeout=SAFETY_S)

    def handle(request: Any, context: Any) -> Iterator[Any]:
        if request.text in "abcd":
            others.wait()
        yield answer(request.text.upper())

    server.answers["Generate"] = handle
    mapped = drive(lambda: client.map(["a", "b", "c", "d", "e"], concurrency=4).collect())
    assert [one.text for one in mapped] == ["A", "B", "C", "D", "E"]


def test_so_many_at_a_time(drive: Any, server: Any, client: Any) -> None:
    """Three meet in the server each time, and there is never a fourth."""
    meeting = threading.Barrier(3, timeout=SAFETY_S)
    lock = threading.Lock()
    running, most = 0, 0

    def handle(request: Any, context: Any) -> Iterator[Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meeting.wait()
        with lock:
            running -= 1
        yield answer(request.text)

    server.answers["Generate"] = handle
    texts = [str(number) for number in range(9)]
    mapped = drive(lambda: client.map(texts, concurrency=3).collect())
    assert [one.text for one in mapped] == texts
    assert most == 3


def test_prompts_of_every_kind_with_options_of_their_own(drive: Any, echo: Any, client: Any) -> None:
    said = Conversation([{"role": "user", "content": "Hi"}])
    prompts = [
        "text",
        [1, 2],
        said,
        ("own", {"adapter": "b", "max_tokens": 3}),
        ("base", {"adapter": None}),
        ((4, 5), {"adapters": {"c": 0.5}}),
    ]
    drive(lambda: client.map(prompts, adapters=[("a", 2.0)], max_tokens=7, seed=1).collect())
    sent = {
        (r.text or tuple(r.token_ids.ids) or r.chat.messages[0].content): r
        for r in (call.request for call in echo.requests)
    }
    found = {
        key: ([(use.adapter, use.weight) for use in r.adapters], r.stopping.max_tokens, r.sampling.seed)
        for key, r in sent.items()
    }
    assert found == {
        "text": ([("a", 2.0)], 7, 1),
        (1, 2): ([("a", 2.0)], 7, 1),
        "Hi": ([("a", 2.0)], 7, 1),
        "own": ([("b", 0.0)], 3, 1),
        "base": ([], 7, 1),
        (4, 5): ([("c", 0.5)], 7, 1),
    }


@pytest.fixture
def picky(server: Any, abort: Any) -> Any:
    """The server knows no adapter "bad"."""

    def handle(request: Any, context: Any) -> Iterator[Any]:
        if request.text == "bad":
            abort(context, grpc.StatusCode.NOT_FOUND, "no such adapter")
        yield answer(request.text.upper())

    server.answers["Generate"] = handle
    return server


def test_errors_in_place(drive: Any, picky: Any, client: Any) -> None:
    prompts: list[Any] = ["a", "bad", ("b", {"max_tokens": "many"}), "c"]
    mapped = drive(lambda: client.map(prompts, return_errors=True).collect())
    assert [one.text for one in (mapped[0], mapped[3])] == ["A", "C"]
    assert isinstance(mapped[1], NotFoundError)
    assert isinstance(mapped[2], InvalidRequestError)


def test_an_error_is_raised_in_its_turn(drive: Any, picky: Any, client: Any) -> None:
    mapped = drive(lambda: client.map(["a", "b", "bad", "c"], concurrency=1))
    assert [one.text for one in take(drive, mapped, 2)] == ["A", "B"]
    with pytest.raises(NotFoundError):
        drive.next(mapped)
    assert drive.next(mapped) is None


def test_prompts_are_read_as_answers_are_taken(drive: Any, echo: Any, client: Any) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield str(read)

    mapped = drive(lambda: client.map(endless(), concurrency=2))
    assert read == 0
    for taken in range(1, 6):
        assert drive.next(mapped).text == str(taken)
        assert read <= taken + 4
    drive(mapped.close)
    assert drive.next(mapped) is None


def test_an_error_of_the_prompts_own(drive: Any, echo: Any, client: Any) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise OSError("the disk is gone")

    mapped = drive(lambda: client.map(broken()))
    with pytest.raises(OSError, match="the disk is gone"):
        drive.next(mapped)
    assert drive.next(mapped) is None


@pytest.mark.parametrize("sized", [True, False])
def test_progress(drive: Any, echo: Any, client: Any, sized: bool) -> None:
    seen: list[tuple[int, int | None]] = []
    prompts = [str(number) for number in range(20)]
    act = lambda: client.map(  # noqa: E731
        prompts if sized else iter(prompts), concurrency=3, progress=lambda *told: seen.append(told)
    ).collect()
    assert len(drive(act)) == 20
    finished = [done for done, _ in seen]
    assert finished == sorted(set(finished))
    assert seen[-1] == (20, 20)
    if sized:
        assert {total for _, total in seen} == {20}


@pytest.mark.parametrize("how", ["close", "let go"])
def test_leaving_early_cancels(drive: Any, server: Any, client: Any, how: str) -> None:
    arrived = threading.Event()

    def handle(request: Any, context: Any) -> Iterator[Any]:
        if request.text == "first":
            yield answer("FIRST")
            return
        context.add_callback(server.cancelled.set)
        arrived.set()
        yield from server.hold(context)

    server.answers["Generate"] = handle
    mapped = drive(lambda: client.map(["first", "second", "third"], concurrency=2))
    assert drive.next(mapped).text == "FIRST"
    if isinstance(client, AsyncClient):

        async def until_arrived() -> None:
            import asyncio

            while not arrived.is_set():
                await asyncio.sleep(0.01)

        drive(until_arrived)
    assert arrived.wait(SAFETY_S)
    if how == "close":
        drive(mapped.close)
    else:
        del mapped
        gc.collect()
        drive(lambda: None)
    assert server.cancelled.wait(SAFETY_S)


def test_limits_of_phases_hold_for_each(drive: Any, server: Any, client: Any) -> None:
    def handle(request: Any, context: Any) -> Iterator[Any]:
        if request.text == "good":
            yield answer("GOOD")
        else:
            yield from server.hold(context)

    server.answers["Generate"] = handle
    limits = Timeouts(first_token=0.3, total=60)
    slow, *rest = drive(lambda: client.map(["slow", "slow"], timeout=limits, return_errors=True).collect())
    assert isinstance(slow, DeadlineExceededError)
    assert slow.phase == "first_token"
    assert isinstance(rest[0], LoraplexError)


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [("one text", {}, "prompts"), (7, {}, "prompts"), (["x"], {"concurrency": 0}, "concurrency")],
)
def test_wrong_arguments(drive: Any, client: Any, prompts: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        drive(lambda: client.map(prompts, **options))
