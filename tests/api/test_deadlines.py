"""Deadlines that cannot be met are refused at once, and no others."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import msgspec
import pytest
from google.rpc import error_details_pb2, status_pb2

from loraplex.v1 import generation_pb2
from loraplex_server.api.requests.deadlines import FastestAnswer, certain_tokens
from loraplex_server.core.request import FinishReason, Request, SamplingParams, Structure
from loraplex_server.wire.messages import Times

# 40 tokens after the first in 20 s: half a second each.
TIMES = Times(queue_s=1.0, adapter_wait_s=0.5, first_token_s=2.0, total_s=22.0, preemptions=0)
TOKENS = 41


async def answers(engine: Any, request: Request) -> None:
    engine.tokens(request, *[100] * TOKENS, finish=FinishReason.LENGTH, times=TIMES)


def test_nothing_is_known_before_there_were_answers() -> None:
    fastest = FastestAnswer()
    for _ in range(7):
        fastest.learn(100, 1.0)
    for _ in range(100):
        # Of so few tokens nothing can be learnt.
        fastest.learn(2, 0.0001)
    assert fastest.least_s(1_000_000) == 0.0
    fastest.learn(100, 50.0)
    assert fastest.least_s(1000) == pytest.approx(5.0)
    fastest.learn(100, 0.1)
    assert fastest.least_s(1000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sampling", "stops", "certain"),
    [
        ({}, (), 1),
        ({"min_tokens": 30}, (), 30),
        ({"ignore_eos": True}, (), 100),
        ({"ignore_eos": True, "stop_token_ids": (7,), "min_tokens": 5}, (), 5),
        ({"ignore_eos": True, "min_tokens": 30}, ("stop",), 1),
        ({"max_tokens": 0}, (), 0),
    ],
)
def test_tokens_that_an_answer_is_bound_to_have(
    sampling: dict[str, Any], stops: tuple[str, ...], certain: int
) -> None:
    request = Request("r", (1,), SamplingParams(**{"max_tokens": 100, **sampling}))
    assert certain_tokens(request, stops) == certain
    structured = msgspec.structs.replace(request, structure=Structure("regex", "a*"))
    assert certain_tokens(structured, stops) == min(1, certain)


def test_what_cannot_be_done_in_time_is_refused_before_the_engine_hears_of_it(serving: Any) -> None:
    async def main() -> None:
        async with serving(answers) as server:
            generate = server.generation.GenerateUnary

            def ask(**stopping: Any) -> generation_pb2.GenerateUnaryRequest:
                chosen = generation_pb2.StoppingCriteria(**stopping)
                return generation_pb2.GenerateUnaryRequest(
                    request=generation_pb2.GenerateRequest(text="hello", stopping=chosen)
                )

            long = ask(max_tokens=200, ignore_eos=True)
            for _ in range(8):
                # Too little is known: whatever there is a deadline for may be tried.
                await generate(long, timeout=30)
            asked = len(server.engine.submitted)
            # 200 tokens take 100 s; half of that would not have been refused.
            with pytest.raises(grpc.aio.AioRpcError, match="200 tokens take 50 s at least") as caught:
                await generate(long, timeout=40)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            metadata = dict(caught.value.trailing_metadata())
            status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.reason == "DEADLINE_TOO_SHORT"
            assert len(server.engine.submitted) == asked
            # It may end sooner, has more time, or all the time in the world.
            await generate(ask(max_tokens=200), timeout=40)
            await generate(ask(max_tokens=200, ignore_eos=True, stop=["\n"]), timeout=40)
            await generate(long, timeout=300)
            await generate(long)
            # Accepted drafts would make it five times as fast.
            long.request.speculative_tokens = 4
            await generate(long, timeout=40)
            assert len(server.engine.submitted) == asked + 5

    asyncio.run(main())


def timing(trailers: Any) -> dict[str, float]:
    parts = (part.split(";dur=") for part in dict(trailers)["server-timing"].split(", "))
    return {name: float(value) for name, value in parts}


def test_every_call_tells_where_its_time_went(serving: Any) -> None:
    async def main() -> None:
        async with serving(answers) as server:
            message = generation_pb2.GenerateRequest(text="hello", n=2)
            call = server.generation.Generate(message)
            assert len([each async for each in call]) >= 2
            found = timing(await call.trailing_metadata())
            assert list(found) == ["total", "queue", "adapter", "ttft"]
            assert (found["queue"], found["adapter"]) == (1000.0, 500.0)
            assert 0 < found["ttft"] <= found["total"]

            other = server.generation.CountTokens(generation_pb2.CountTokensRequest(text="hello"))
            await other
            assert list(timing(await other.trailing_metadata())) == ["total"]

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.CountTokens(generation_pb2.CountTokensRequest())
            assert list(timing(caught.value.trailing_metadata())) == ["total"]
            assert dict(caught.value.trailing_metadata())["x-request-id"]

    asyncio.run(main())
