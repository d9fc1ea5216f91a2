"""Generation over a real channel, against an engine that speaks the real protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraplex.v1 import generation_pb2
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import AdapterUse, FinishReason, Request
from loraplex_server.wire.messages import Failed, Times, TokenDelta, TokenLogprobs, Tokens, TopLogprob

TIMES = Times(
    queue_s=0.25,
    adapter_wait_s=0.125,
    first_token_s=0.5,
    total_s=1.0,
    preemptions=2,
    cached_prompt_tokens=1,
    drafted_tokens=7,
    accepted_tokens=4,
)


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The detail of one kind that a status carries."""
    status = rpc_status.from_call(_SyncView(error))
    for packed in status.details:
        assert isinstance(packed, any_pb2.Any)
        detail = kind()
        if packed.Unpack(detail):
            return detail
    raise AssertionError(f"no {kind.__name__} in {status}")


class _SyncView:
    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details = error.code, error.details
        self.trailing_metadata = lambda: tuple(error.trailing_metadata())


def says(token_ids: list[int], finish: FinishReason = FinishReason.LENGTH, **last: Any) -> Any:
    """A script that generates these tokens, one a step."""

    async def script(engine: Any, request: Request) -> None:
        for token_id in token_ids[:-1]:
            engine.tokens(request, token_id)
            await asyncio.sleep(0)
        engine.tokens(request, token_ids[-1], finish=finish, times=TIMES, **last)

    return script


def request(text: str = "hello", **fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text=text, **fields)


def test_a_stream_carries_text_tokens_and_a_finish(serving: Any, byte_level_tokenizer: Any) -> None:
    text = " the café 龘 says hello"
    ids = byte_level_tokenizer.encode(text)

    async def main() -> None:
        async with serving(says(ids)) as server:
            messages = [message async for message in server.generation.Generate(request())]
            assert "".join(message.text for message in messages) == text
            assert [token_id for message in messages for token_id in message.token_ids] == ids
            assert all(message.request_id for message in messages[:1])
            assert not any(message.request_id for message in messages[1:])
            assert not any(message.HasField("finish") for message in messages[:-1])
            finish = messages[-1].finish
            assert finish.reason == generation_pb2.FINISH_REASON_LENGTH
            assert finish.usage.completion_tokens == len(ids)
            assert finish.usage.prompt_tokens == len(byte_level_tokenizer.encode("hello"))
            assert finish.usage.cached_prompt_tokens == 1
            assert (finish.usage.drafted_tokens, finish.usage.accepted_tokens) == (7, 4)
            timing = finish.timing
            assert (timing.queue_seconds, timing.adapter_wait_seconds, timing.preemptions) == (0.25, 0.125, 2)
            assert 0 < timing.time_to_first_token_seconds <= timing.total_seconds
            assert not server.engine.cancelled

    asyncio.run(main())


def test_unary_is_the_stream_in_one_message(serving: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the 龘 end")

    async def main() -> None:
        async with serving(says(ids)) as server:
            message = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(request=request(request_id="mine"))
            )
            assert message.text == " the 龘 end"
            assert list(message.token_ids) == ids
            assert message.request_id == "mine"
            assert message.finish.usage.completion_tokens == len(ids)

    asyncio.run(main())


def test_the_engine_gets_what_the_caller_asked_for(serving: Any, byte_level_tokenizer: Any) -> None:
    message = request(
        "the dog",
        adapters=[
            generation_pb2.AdapterWeight(adapter="sql"),
            generation_pb2.AdapterWeight(adapter="polite", weight=0.5),
        ],
        sampling=generation_pb2.SamplingParams(temperature=0.5, top_k=7, top_p=0.25, seed=2**64 - 1),
        stopping=generation_pb2.StoppingCriteria(
            max_tokens=9, min_tokens=2, stop=["x"], stop_token_ids=[5], ignore_eos=True
        ),
        logprobs=3,
        request_id="job-1",
        priority=-4,
        cache_prefix=False,
        speculative_tokens=16,
    )

    async def main() -> None:
        async with serving(says([4])) as server:
            before = time.time()
            call = server.generation.Generate(message, timeout=50)
            async for _ in call:
                pass
            await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(
                    request=generation_pb2.GenerateRequest(
                        token_ids=generation_pb2.TokenIds(ids=[7, 8]), request_id="job-1"
                    )
                )
            )
            full, plain = server.engine.submitted
            assert full.prompt_token_ids == tuple(byte_level_tokenizer.encode("the dog"))
            assert full.adapters == (AdapterUse("sql", 1.0), AdapterUse("polite", 0.5))
            sampling = full.sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.25)
            assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 9, 2)
            assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == ((5,), True, 3)
            assert full.priority == -4
            assert (full.cache_prefix, plain.cache_prefix) == (False, True)
            assert (full.speculative_tokens, plain.speculative_tokens) == (16, None)
            assert before + 40 < full.deadline_s < time.time() + 60
            assert full.request_id.startswith("job-1")

            assert plain.prompt_token_ids == (7, 8)
            assert plain.adapters == ()
            assert plain.deadline_s is None
            assert plain.request_id != full.request_id
            sampling = plain.sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 1.0)
            assert (sampling.max_tokens, sampling.logprobs) == (254, None)

    asyncio.run(main())


def test_a_stop_string_ends_the_answer_and_the_request(serving: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the quick brown STOP and so on")

    async def script(engine: Any, core: Request) -> None:
        for token_id in ids:
            engine.tokens(core, token_id)
            await asyncio.sleep(0.002)

    async def main() -> None:
        async with serving(script) as server:
            stopping = generation_pb2.StoppingCriteria(stop=["never", "n STOP a"])
            messages = [m async for m in server.generation.Generate(request(stopping=stopping))]
            assert "".join(message.text for message in messages) == " the quick brow"
            returned = [token_id for message in messages for token_id in message.token_ids]
            assert returned == ids[: len(returned)]
            assert byte_level_tokenizer.decode(returned).startswith(" the quick brow")
            assert not byte_level_tokenizer.decode(returned[:-1]).startswith(" the quick brow")
            finish = messages[-1].finish
            assert finish.reason == generation_pb2.FINISH_REASON_STOP
            assert finish.stop_match == "n STOP a"
            assert finish.usage.completion_tokens == len(returned)
            await server.engine.until(lambda: len(server.engine.cancelled) == 1)
            assert server.engine.cancelled == [server.engine.submitted[0].request_id]

    asyncio.run(main())


def test_a_stop_token_is_counted_but_has_no_text(serving: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the dog")

    async def main() -> None:
        async with serving(says(ids, FinishReason.STOP, stop_token=True)) as server:
            message = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(request=request())
            )
            assert message.text == byte_level_tokenizer.decode(ids[:-1])
            assert list(message.token_ids) == ids
            assert message.finish.reason == generation_pb2.FINISH_REASON_STOP
            assert message.finish.stop_match == ""

    asyncio.run(main())


def test_logprobs_come_with_their_tokens(serving: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the dog")

    async def script(engine: Any, core: Request) -> None:
        for token_id in ids:
            entry = TokenLogprobs(token_id, -0.5, (TopLogprob(token_id, -0.5), TopLogprob(1, -3.0)))
            finish = FinishReason.LENGTH if token_id == ids[-1] else None
            engine.tokens(core, token_id, logprobs=(entry,), finish=finish, times=TIMES if finish else None)

    async def main() -> None:
        async with serving(script) as server:
            message = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(request=request(logprobs=2))
            )
            assert [entry.token_id for entry in message.logprobs] == ids
            assert [entry.logprob for entry in message.logprobs] == [-0.5] * len(ids)
            first = message.logprobs[0]
            assert [(top.token_id, top.text) for top in first.top] == [
                (ids[0], byte_level_tokenizer.decode([ids[0]])),
                (1, "</s>"),
            ]

    asyncio.run(main())


def entry(token_id: int, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(token_id, logprob, (TopLogprob(token_id, logprob),))


def test_prompts_are_scored_and_echoed(serving: Any, byte_level_tokenizer: Any) -> None:
    """In pieces, as the engine has them; and alone, with nothing generated."""
    prompt = byte_level_tokenizer.encode("the café fox")
    ids = byte_level_tokenizer.encode(" the dog")

    async def script(engine: Any, core: Request) -> None:
        assert core.sampling.prompt_logprobs == 1
        scores = tuple(entry(token_id) for token_id in core.prompt_token_ids[1:])
        generated = ids[: core.sampling.max_tokens]
        for score in scores[:-1]:
            engine.send(Tokens((TokenDelta(core.request_id, (), prompt_logprobs=(score,)),)))
            await asyncio.sleep(0)
        last = TokenDelta(
            core.request_id,
            tuple(generated),
            prompt_logprobs=scores[-1:],
            finish=FinishReason.LENGTH,
            times=TIMES,
        )
        engine.send(Tokens((last,)))

    async def main() -> None:
        async with serving(script) as server:
            for limit, text in ((9, " the dog"), (0, "")):
                criteria = generation_pb2.StoppingCriteria(max_tokens=limit)
                asked = request("the café fox", stopping=criteria, prompt_logprobs=1, echo=True)
                messages = [message async for message in server.generation.Generate(asked)]
                whole = await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=asked)
                )
                assert "".join(message.text for message in messages) == whole.text == "the café fox" + text
                scored = [score for message in messages for score in message.prompt_logprobs]
                assert scored == list(whole.prompt_logprobs)
                assert [score.token_id for score in scored] == prompt[1:]
                assert [top.text for top in scored[0].top] == [byte_level_tokenizer.decode(prompt[1:2])]
                assert list(messages[0].prompt_token_ids) == list(whole.prompt_token_ids) == prompt
                assert not any(message.prompt_token_ids for message in messages[1:])
                assert list(whole.token_ids) == ids[:limit]
                assert whole.finish.usage.prompt_tokens == len(prompt)
                assert whole.finish.usage.completion_tokens == len(ids[:limit])
            of_ids = generation_pb2.GenerateRequest(
                token_ids=generation_pb2.TokenIds(ids=prompt), prompt_logprobs=1, echo=True
            )
            whole = await server.generation.GenerateUnary(generation_pb2.GenerateUnaryRequest(request=of_ids))
            assert whole.text == "the café fox the dog"

    asyncio.run(main())


def test_several_answers_have_an_index_and_a_finish_each(serving: Any, byte_level_tokenizer: Any) -> None:
    async def script(engine: Any, core: Request) -> None:
        assert (core.sampling.prompt_logprobs is None) == (core.sampling.seed != 2**64 - 2)
        await says(byte_level_tokenizer.encode(f" {core.sampling.seed % 10}"))(engine, core)

    async def main() -> None:
        async with serving(script) as server:
            asked = request(
                sampling=generation_pb2.SamplingParams(seed=2**64 - 2), n=4, prompt_logprobs=0, echo=True
            )
            texts, finished = [""] * 4, []
            async for message in server.generation.Generate(asked):
                texts[message.index] += message.text
                assert message.index not in finished
                if message.HasField("finish"):
                    finished.append(message.index)
            assert texts == ["hello 4", "hello 5", "hello 0", "hello 1"]
            assert sorted(finished) == [0, 1, 2, 3]
            submitted = server.engine.submitted
            assert {core.group for core in submitted} == {submitted[0].request_id}
            assert len({core.request_id for core in submitted}) == 4
            whole = await server.generation.GenerateUnary(generation_pb2.GenerateUnaryRequest(request=asked))
            assert [whole.text, *(answer.text for answer in whole.others)] == texts
            assert [answer.index for answer in whole.others] == [1, 2, 3]
            assert all(answer.finish.usage.completion_tokens for answer in whole.others)
            single = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(
                    request=request(sampling=generation_pb2.SamplingParams(seed=2**64 - 2), prompt_logprobs=0)
                )
            )
            assert (single.text, list(single.others)) == (" 4", [])
            assert server.engine.submitted[-1].group == ""

    asyncio.run(main())


def test_a_batch_answers_as_each_request_finishes(serving: Any, byte_level_tokenizer: Any) -> None:
    """The first waits for the others; a refused one and a failed one do not end them."""
    others_are_answered = asyncio.Event()

    async def script(engine: Any, core: Request) -> None:
        text = byte_level_tokenizer.decode(core.prompt_token_ids)
        if text == "first":
            await others_are_answered.wait()
        if text == "lost":
            engine.send(Failed(core.request_id, ErrorInfo("RESOURCE_EXHAUSTED", "full", retry_after_s=3.0)))
            return
        await says(byte_level_tokenizer.encode(f" {text}"))(engine, core)

    async def main() -> None:
        async with serving(script, metrics_port=0) as server:
            texts = ["first", "second", "lost", "third"]
            batch = generation_pb2.GenerateBatchRequest(
                requests=[*map(request, texts), request("bad", logprobs=99), request("two", n=2)]
            )
            found: dict[int, generation_pb2.GenerateBatchResponse] = {}
            async for message in server.generation.GenerateBatch(batch):
                assert message.position not in found
                found[message.position] = message
                if len(found) == 5:
                    assert 0 not in found
                    others_are_answered.set()
            assert sorted(found) == list(range(6))
            assert [found[at].answer.text for at in (0, 1, 3)] == [" first", " second", " third"]
            assert [answer.text for answer in found[5].answer.others] == [" two"]
            assert found[0].answer.finish.usage.completion_tokens > 0
            assert [found[at].answer.request_id[-2:] for at in (0, 1, 3, 5)] == ["-0", "-1", "-3", "-5"]
            assert len({core.request_id for core in server.engine.submitted}) == 6
            for position, code, kind in (
                (2, grpc.StatusCode.RESOURCE_EXHAUSTED, error_details_pb2.RetryInfo),
                (4, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest),
            ):
                error = found[position].error
                assert error.code == code.value[0]
                detail = kind()
                assert any(packed.Unpack(detail) for packed in error.details)
            assert detail.field_violations[0].field == "logprobs"
            samples = await server.scrape()
            for code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"):
                assert samples[f"loraplex_errors_total{{reason={code}}}"] == 1
            for wrong in (0, 1025):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await server.generation.GenerateBatch(
                        generation_pb2.GenerateBatchRequest(requests=[request()] * wrong)
                    ).read()
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert (
                    details(caught.value, error_details_pb2.BadRequest).field_violations[0].field
                    == "requests"
                )

    asyncio.run(main())


def test_a_batch_runs_as_many_at_a_time_as_the_engine_does(serving: Any, byte_level_tokenizer: Any) -> None:
    """And cancelling it cancels those that run."""

    async def main() -> None:
        async with serving() as server:
            batch = generation_pb2.GenerateBatchRequest(requests=[request()] * 100)
            call = server.generation.GenerateBatch(batch)
            await server.engine.until(lambda: len(server.engine.submitted) == 64)
            call.cancel()
            await server.engine.until(lambda: len(server.engine.cancelled) == 64)
            assert len(server.engine.submitted) == 64

    asyncio.run(main())


def test_a_backlog_is_sent_in_one_message(serving: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the quick brown fox jumps over the lazy dog")

    async def script(engine: Any, core: Request) -> None:
        deltas = [TokenDelta(core.request_id, (token_id,)) for token_id in ids]
        engine.send(Tokens(tuple(deltas)))
        engine.tokens(core, ids[0], finish=FinishReason.LENGTH, times=TIMES)

    async def main() -> None:
        async with serving(script) as server:
            messages = [message async for message in server.generation.Generate(request())]
            assert len(messages) <= 3
            assert [t for message in messages for t in message.token_ids] == [*ids, ids[0]]

    asyncio.run(main())


def test_cancelling_the_call_cancels_the_request(serving: Any) -> None:
    async def script(engine: Any, core: Request) -> None:
        engine.tokens(core, 40)

    async def main() -> None:
        async with serving(script, metrics_port=0) as server:
            waiting = server.generation.Generate(request())
            streaming = server.generation.Generate(request())
            await streaming.read()
            unary = server.generation.GenerateUnary(generation_pb2.GenerateUnaryRequest(request=request()))
            await server.engine.until(lambda: len(server.engine.submitted) == 3)
            for call in (waiting, streaming, unary):
                call.cancel()
            await server.engine.until(lambda: len(server.engine.cancelled) == 3)
            assert sorted(server.engine.cancelled) == sorted(r.request_id for r in server.engine.submitted)
            samples = await server.scrape()
            assert samples["loraplex_requests_total{outcome=cancelled}"] == 3

    asyncio.run(main())


def test_a_client_that_vanishes_cancels_its_requests(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            async with grpc.aio.insecure_channel(server.grpc_at) as channel:
                generate = channel.unary_stream(
                    "/loraplex.v1.GenerationService/Generate",
                    request_serializer=generation_pb2.GenerateRequest.SerializeToString,
                    response_deserializer=generation_pb2.GenerateResponse.FromString,
                )
                calls = [generate(request()) for _ in range(5)]
                await server.engine.until(lambda: len(server.engine.submitted) == 5)
                del calls
            await server.engine.until(lambda: len(server.engine.cancelled) == 5)

    asyncio.run(main())


def test_a_passed_deadline_ends_the_request(serving: Any) -> None:
    async def main() -> None:
        async with serving(metrics_port=0) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in server.generation.Generate(request(), timeout=1.0):
                    pass
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await server.engine.until(lambda: len(server.engine.cancelled) == 1)
            samples = await server.scrape()
            assert samples["loraplex_requests_total{outcome=deadline_exceeded}"] == 1
            code = "code=DEADLINE_EXCEEDED,method=/loraplex.v1.GenerationService/Generate"
            assert samples[f"loraplex_grpc_calls_total{{{code}}}"] == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "check"),
    [
        (
            ErrorInfo("NOT_FOUND", "no adapter sql", resource=("adapter", "sql")),
            lambda e: details(e, error_details_pb2.ResourceInfo).resource_name == "sql",
        ),
        (
            ErrorInfo("RESOURCE_EXHAUSTED", "the queue is full", retry_after_s=1.5),
            lambda e: details(e, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() == 1_500_000_000,
        ),
        (
            ErrorInfo("FAILED_PRECONDITION", "too large together", resource=("adapters", "a+b")),
            lambda e: details(e, error_details_pb2.PreconditionFailure).violations[0].subject == "a+b",
        ),
        (
            ErrorInfo("UNAVAILABLE", "stopping"),
            lambda e: details(e, error_details_pb2.RetryInfo).retry_delay.seconds == 1,
        ),
        (ErrorInfo("DEADLINE_EXCEEDED", "expired in the queue"), lambda e: True),
        (ErrorInfo("PERMISSION_DENIED", "outside"), lambda e: details(e, error_details_pb2.ResourceInfo)),
    ],
    ids=lambda value: value.code if isinstance(value, ErrorInfo) else "",
)
def test_the_engines_errors_become_rich_statuses(
    serving: Any, error: ErrorInfo, check: Callable[..., Any]
) -> None:
    async def script(engine: Any, core: Request) -> None:
        engine.tokens(core, 40)
        engine.send(Failed(core.request_id, error))

    async def main() -> None:
        async with serving(script) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in server.generation.Generate(request(request_id="mine")):
                    pass
            assert caught.value.code().name == error.code
            assert caught.value.details() == error.message
            assert check(caught.value)
            assert details(caught.value, error_details_pb2.RequestInfo).request_id == "mine"
            assert details(caught.value, error_details_pb2.ErrorInfo).reason == error.code
            assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine"

    asyncio.run(main())


def test_an_internal_error_tells_the_log_but_not_the_caller(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(engine: Any, core: Request) -> None:
        engine.send(Failed(core.request_id, ErrorInfo("INTERNAL", "boom in /srv/secret/model.py")))

    async def main() -> None:
        async with serving(script) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=request(request_id="mine"))
                )
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in str(caught.value.details())
            assert not any(
                b"secret" in value for _, value in caught.value.trailing_metadata() if type(value) is bytes
            )
            assert "mine" in str(caught.value.details())
            assert "/srv/secret/model.py" in caplog.text

    asyncio.run(main())


def test_bad_fields_are_named_over_the_wire(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            bad = request(
                sampling=generation_pb2.SamplingParams(top_p=1.5, temperature=-1),
                stopping=generation_pb2.StoppingCriteria(max_tokens=0),
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in server.generation.Generate(bad):
                    pass
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            violations = details(caught.value, error_details_pb2.BadRequest).field_violations
            fields = [violation.field for violation in violations]
            assert fields == ["sampling.temperature", "sampling.top_p", "stopping.max_tokens"]

            # However much is wrong, the status fits into what a client accepts as trailers.
            flood = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[10**6] * 200))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in server.generation.Generate(flood):
                    pass
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            violations = details(caught.value, error_details_pb2.BadRequest).field_violations
            assert violations[0].field == "token_ids.ids[0]"
            assert not server.engine.submitted

    asyncio.run(main())


def test_a_message_beyond_the_limit_is_refused(serving: Any) -> None:
    async def main() -> None:
        async with serving(max_message_bytes=1000) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=request("x" * 2000))
                )
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(main())


def test_many_streams_at_once_keep_their_answers_apart(serving: Any, byte_level_tokenizer: Any) -> None:
    async def script(engine: Any, core: Request) -> None:
        for token_id in core.prompt_token_ids:
            engine.tokens(core, token_id)
            await asyncio.sleep(0)
        engine.tokens(core, 1, finish=FinishReason.STOP, stop_token=True, times=TIMES)

    async def main() -> None:
        async with serving(script, metrics_port=0) as server:

            async def one(index: int) -> None:
                text = f"the dog number {index} says {index * 7919}"
                reply = await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=request(text))
                )
                assert reply.text == text

            await asyncio.gather(*map(one, range(100)))
            samples = await server.scrape()
            assert samples["loraplex_requests_total{outcome=stop}"] == 100

    asyncio.run(main())
