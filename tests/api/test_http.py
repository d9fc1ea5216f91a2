"""The OpenAI-compatible API over real connections, against an engine that speaks the real protocol."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from loraplex.v1 import generation_pb2
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import AdapterUse, FinishReason, Request
from loraplex_server.wire.commands import Answer, AnyCommand, GetAdapter, GetChatTemplate, ListAdapters
from loraplex_server.wire.messages import (
    Failed,
    Times,
    TokenDelta,
    TokenLogprobs,
    Tokens,
    TopLogprob,
)

pytest.importorskip("uvicorn", reason="needs the server extra: uvicorn")
openai = pytest.importorskip("openai", reason="needs the dev extra: openai")

TIMES = Times(
    queue_s=0.25,
    adapter_wait_s=0.125,
    first_token_s=0.5,
    total_s=1.0,
    preemptions=2,
    cached_prompt_tokens=3,
    drafted_tokens=7,
    accepted_tokens=4,
)


def adapter(name: str, **fields: Any) -> AdapterStatus:
    counts = {"references": 0, "draining": False, "hits": 0, "misses": 0, "evictions": 0}
    known = {"state": "device", "pinned": False, "peft_type": "LORA", "rank": 6, "bytes": 9, **counts}
    modules = ("q_proj",)
    return AdapterStatus(
        name=name,
        source=f"/a/{name}",
        target_modules=modules,
        content_hash=f"hash-of-{name}",
        **{**known, **fields},
    )


class Http:
    """Requests as the wire has them, from a thread."""

    def __init__(self, at: str, **headers: str) -> None:
        self._at = at
        self._headers = headers

    async def send(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body: JSON taken apart, else text."""

        def call() -> tuple[int, dict[str, str], Any]:
            connection = http.client.HTTPConnection(self._at, timeout=20)
            sent = {key.replace("_", "-"): value for key, value in {**self._headers, **headers}.items()}
            connection.request(method, path, body or None, sent)
            response = connection.getresponse()
            text = response.read().decode()
            connection.close()
            is_json = response.headers.get_content_type() == "application/json"
            found = {key.lower(): value for key, value in response.getheaders()}
            return response.status, found, json.loads(text) if is_json else text

        return await asyncio.to_thread(call)

    async def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
        return await self.send("GET", path, **headers)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        content = {"content_type": "application/json", **headers}
        return await self.send("POST", path, json.dumps(body).encode(), **content)

    async def complete(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        return await self.post("/v1/completions", {"model": "parrot", "prompt": "hello", **fields})

    async def chat(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        messages = [{"role": "user", "content": "hello"}]
        return await self.post("/v1/chat/completions", {"model": "parrot", "messages": messages, **fields})


@contextlib.asynccontextmanager
async def talking(at: str, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, which asks once."""
    async with openai.AsyncOpenAI(base_url=f"http://{at}/v1", api_key=key, max_retries=0, timeout=20) as made:
        yield made


def says(tokenizer: Any, text: str, finish: FinishReason = FinishReason.LENGTH) -> Any:
    """A script that generates a text, one token a step."""
    ids = tokenizer.encode(text)

    async def script(engine: Any, request: Request) -> None:
        for token_id in ids[:-1]:
            engine.tokens(request, token_id)
            await asyncio.sleep(0)
        engine.tokens(request, ids[-1], finish=finish, times=TIMES)

    return script


@pytest.fixture
def speaking(serving: Any, chat_checkpoint: Path) -> Any:
    """`serving` with the HTTP port, of a model that is named "parrot"."""

    def run(script: Any = None, **api: Any) -> Any:
        api = {"model": chat_checkpoint, "http_port": 0, **api}
        return serving(script, **api) if script is not None else serving(**api)

    return run


def test_a_completion(speaking: Any, byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.encode(" the café")
    prompt = byte_level_tokenizer.encode("hello")

    async def main() -> None:
        async with speaking(says(byte_level_tokenizer, " the café")) as server:
            http = Http(server.http_at, x_request_id="mine")
            fields = {
                "max_tokens": 9,
                "stop": "\n",
                "seed": -1,
                "cache_prefix": False,
                "speculative_tokens": 9,
                "top_k": 5,
                "top_p": 0.5,
                "temperature": 0.25,
            }
            status, headers, body = await http.complete(**fields)
            assert (status, headers["x-request-id"]) == (200, "mine")
            assert (body["id"], body["object"], body["model"]) == ("cmpl-mine", "text_completion", "parrot")
            [choice] = body["choices"]
            assert choice == {"text": " the café", "index": 0, "logprobs": None, "finish_reason": "length"}
            assert body["usage"] == {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {
                    "accepted_prediction_tokens": 4,
                    "rejected_prediction_tokens": 3,
                },
            }
            [request] = server.engine.submitted
            assert (request.prompt_token_ids, request.cache_prefix) == (tuple(prompt), False)
            assert request.speculative_tokens == 9
            sampling = request.sampling
            assert (sampling.max_tokens, sampling.seed, sampling.top_k) == (9, (1 << 64) - 1, 5)
            assert (sampling.top_p, sampling.temperature) == (0.5, 0.25)

            await http.complete(temperature=None, stream=False, logit_bias={}, presence_penalty=0, best_of=1)
            sampling = server.engine.submitted[-1].sampling
            assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)

    asyncio.run(main())


def test_a_stream_of_events(speaking: Any, byte_level_tokenizer: Any) -> None:
    text = " the café 龘 says hello"

    async def main() -> None:
        async with speaking(says(byte_level_tokenizer, text)) as server:
            status, headers, body = await Http(server.http_at).complete(
                stream=True, stream_options={"include_usage": True}, echo=True
            )
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            *events, done, rest = body.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == "hello" + text
            assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == len(byte_level_tokenizer.encode(text))
            reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
            assert reasons == [None] * (len(reasons) - 1) + ["length"]

    asyncio.run(main())


def test_batches_choices_and_token_ids(speaking: Any, byte_level_tokenizer: Any) -> None:
    words = {(5, 6): " one", (7,): " two"}

    async def script(engine: Any, request: Request) -> None:
        text = words[request.prompt_token_ids] + str(request.sampling.seed)
        await says(byte_level_tokenizer, text)(engine, request)

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            expected = [" one40", " one41", " two40", " two41"]
            asked = {"model": "parrot", "prompt": [[5, 6], [7]], "n": 2, "seed": 40}
            whole = await client.completions.create(**asked)
            assert [choice.text for choice in whole.choices] == expected
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            assert whole.usage.prompt_tokens == 3
            texts = [""] * 4
            async for chunk in await client.completions.create(**asked, stream=True):
                assert chunk.usage is None
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == expected
            echoed = await client.completions.create(model="parrot", prompt=[7], seed=1, echo=True)
            assert echoed.choices[0].text == byte_level_tokenizer.decode([7]) + " two1"

    asyncio.run(main())


def test_an_echo_with_logprobs(speaking: Any, byte_level_tokenizer: Any) -> None:
    """As evaluation harnesses ask for it: the prompt's own, and those of at least no token after it; the same
    whole and streamed, for every choice though one of them is scored."""
    text = "the café fox"
    prompt = tuple(byte_level_tokenizer.encode(text))
    words = byte_level_tokenizer.encode(" the dog")

    def entry(token_id: int) -> TokenLogprobs:
        return TokenLogprobs(
            token_id, -token_id / 8, (TopLogprob(token_id, -token_id / 8), TopLogprob(9, -99.0))
        )

    async def script(engine: Any, request: Request) -> None:
        generated = words[: request.sampling.max_tokens]
        if request.sampling.prompt_logprobs is not None:
            # The other choice need not wait for the one that is scored.
            group = request.group
            await engine.until(lambda: not group or sum(r.group == group for r in engine.submitted) == 2)
            for token_id in request.prompt_token_ids[1:]:
                delta = TokenDelta(request.request_id, (), prompt_logprobs=(entry(token_id),))
                engine.send(Tokens((delta,)))
                await asyncio.sleep(0)
        logprobs = tuple(entry(token_id) for token_id in generated)
        last = TokenDelta(
            request.request_id, tuple(generated), logprobs, finish=FinishReason.LENGTH, times=TIMES
        )
        engine.send(Tokens((last,)))

    def check(choice: Any, generated: list[int]) -> None:
        assert choice.text == text + byte_level_tokenizer.decode(generated)
        found, ids = choice.logprobs, [*prompt, *generated]
        assert found.tokens == [byte_level_tokenizer.decode([token_id]) for token_id in ids]
        assert found.token_logprobs == [None, *(-token_id / 8 for token_id in ids[1:])]
        assert found.top_logprobs[0] is None
        assert [max(top.values()) for top in found.top_logprobs[1:]] == found.token_logprobs[1:]
        assert found.text_offset[0] == 0
        # The two bytes of é are a token each: its first has no text of its own.
        ends = [*found.text_offset[1:], len(choice.text)]
        pieces = [choice.text[start:end] for start, end in zip(found.text_offset, ends, strict=True)]
        assert "".join(pieces) == choice.text
        assert pieces[len(prompt) :] == [byte_level_tokenizer.decode([token_id]) for token_id in generated]
        plain = [at for at, token in enumerate(found.tokens) if token.isascii()]
        assert [pieces[at] for at in plain] == [found.tokens[at] for at in plain]

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            for limit in (0, 1):
                asked: dict[str, Any] = {
                    "model": "parrot",
                    "prompt": [list(prompt)] * 2,
                    "n": 2,
                    "max_tokens": limit,
                    "echo": True,
                    "logprobs": 2,
                    "seed": 1,
                }
                whole = await client.completions.create(**asked)
                assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
                for choice in whole.choices:
                    check(choice, words[:limit])
                assert whole.usage.prompt_tokens == 2 * len(prompt)
                assert whole.usage.completion_tokens == 4 * limit
                events: dict[int, list[Any]] = {}
                async for chunk in await client.completions.create(**asked, stream=True):
                    for choice in chunk.choices:
                        events.setdefault(choice.index, []).append(choice)
                assert sorted(events) == [0, 1, 2, 3]
                for index, parts in events.items():
                    joined = whole.choices[index].model_copy(deep=True)
                    joined.text = "".join(part.text for part in parts)
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                        values = [value for part in parts for value in getattr(part.logprobs, name)]
                        setattr(joined.logprobs, name, values)
                    assert joined == whole.choices[index]
                    assert parts[-1].finish_reason == "length"
            bare = await client.completions.create(
                model="parrot", prompt=text, max_tokens=0, echo=True, logprobs=0
            )
            assert bare.choices[0].logprobs.top_logprobs is None
            assert bare.choices[0].logprobs.token_logprobs[0] is None
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                await client.completions.create(model="parrot", prompt=text, max_tokens=0)

    asyncio.run(main())


def test_conversations(speaking: Any, byte_level_tokenizer: Any, chat_checkpoint: Path) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hi ", "name": "ann"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "again"}, {"type": "text", "text": "!"}]},
    ]
    plain = [*messages[:-1], {"role": "user", "content": "again!"}]
    tokenizer = AutoTokenizer.from_pretrained(chat_checkpoint)
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)

    async def main() -> None:
        script = says(byte_level_tokenizer, " hello", FinishReason.STOP)
        async with speaking(script) as server, talking(server.http_at) as client:
            whole = await client.chat.completions.create(model="parrot", messages=messages)
            [choice] = whole.choices
            assert (choice.message.role, choice.message.content) == ("assistant", " hello")
            assert choice.finish_reason == "stop"
            assert whole.usage.prompt_tokens == len(expected)
            assert list(server.engine.submitted[0].prompt_token_ids) == list(expected)
            # As much as fits, unless it is limited by either name.
            assert server.engine.submitted[0].sampling.max_tokens == 256 - len(expected)
            stream = await client.chat.completions.create(
                model="parrot", messages=messages, stream=True, max_completion_tokens=7, n=2
            )
            roles, texts = ["", ""], ["", ""]
            async for chunk in stream:
                for part in chunk.choices:
                    roles[part.index] += part.delta.role or ""
                    texts[part.index] += part.delta.content or ""
            assert (roles, texts) == (["assistant"] * 2, [" hello"] * 2)
            assert server.engine.submitted[-1].sampling.max_tokens == 7
            bad = [{"role": "developer", "content": "x"}]
            with pytest.raises(openai.BadRequestError, match="who is developer") as caught:
                await client.chat.completions.create(model="parrot", messages=bad)
            assert caught.value.param == "messages"

    asyncio.run(main())


def test_an_adapter_brings_its_own_template(
    speaking: Any, byte_level_tokenizer: Any, checkpoint: Path
) -> None:
    templates = {"own": "{{ messages[0].content }}!", "other": "{{ messages[0].content }}?", "none": ""}

    def reply(command: AnyCommand) -> Answer | ErrorInfo:
        assert isinstance(command, GetChatTemplate)
        if command.name not in templates:
            return ErrorInfo("NOT_FOUND", "no such adapter", resource=("adapter", command.name))
        return templates[command.name]

    async def main() -> None:
        async with speaking(says(byte_level_tokenizer, " yes")) as server:
            server.engine.adapters = reply
            http = Http(server.http_at)

            async def prompt(**fields: Any) -> str:
                status, _, body = await http.chat(**fields)
                assert status == 200, body
                return str(byte_level_tokenizer.decode(server.engine.submitted[-1].prompt_token_ids))

            assert await prompt(model="own") == "hello!"
            assert await prompt(model="none") == "<s><user>hello</s>\n<assistant>"
            both = [{"name": "own", "weight": 0.5}, {"name": "none"}]
            assert await prompt(adapters=both) == "hello!"
            assert server.engine.submitted[-1].adapters == (AdapterUse("own", 0.5), AdapterUse("none", 1.0))
            status, _, body = await http.chat(adapters=[{"name": "own"}, {"name": "other"}])
            assert status == 400
            assert "own and other" in body["error"]["message"] or "other and own" in body["error"]["message"]
            status, _, body = await http.chat(model="nobody")
            assert (status, body["error"]["code"], body["error"]["param"]) == (
                404,
                "model_not_found",
                "model",
            )
            templates["own"] = (
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            )
            for _ in range(2):
                status, _, body = await http.chat(model="own")
                assert status == 400
                assert "more time or memory" in body["error"]["message"]
            assert await prompt(model="other") == "hello?"
        async with speaking(model=checkpoint, model_name="bare") as server:
            status, _, body = await Http(server.http_at).chat(model="bare")
            assert (status, body["error"]["code"]) == (400, "failed_precondition")
            assert "chat_template.jinja" in body["error"]["message"]

    asyncio.run(main())


def test_tokens_are_counted_as_they_would_be_used(speaking: Any, byte_level_tokenizer: Any) -> None:
    def reply(command: AnyCommand) -> Answer:
        return "{{ messages[0].content }}!" if command == GetChatTemplate("own") else ""

    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="hello")])
    prompts: list[tuple[dict[str, Any], str]] = [
        ({"text": "hello"}, "hello"),
        ({"text": "x" * 300}, "x" * 300),
        ({"chat": chat}, "<s><user>hello</s>\n<assistant>"),
        ({"chat": chat, "adapters": ["own"]}, "hello!"),
    ]

    async def main() -> None:
        async with speaking() as server:
            server.engine.adapters = reply
            stub = server.generation
            for fields, text in prompts:
                expected = byte_level_tokenizer.encode(text)
                found = await stub.Tokenize(generation_pb2.TokenizeRequest(**fields))
                assert list(found.token_ids) == expected, fields
                counted = await stub.CountTokens(generation_pb2.CountTokensRequest(**fields))
                assert (counted.count, counted.max_model_len) == (len(expected), 256)
            for bad in (
                {},
                {"text": ""},
                {"text": "a", "adapters": ["a b"]},
                {"chat": generation_pb2.Chat()},
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.CountTokens(generation_pb2.CountTokensRequest(**bad))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, bad
            assert not server.engine.submitted

    asyncio.run(main())


def test_logprobs_in_both_forms(speaking: Any, byte_level_tokenizer: Any) -> None:
    first, second = byte_level_tokenizer.encode(" t") + byte_level_tokenizer.encode("o")
    half = byte_level_tokenizer.encode("龘")[0]

    async def script(engine: Any, request: Request) -> None:
        top = (TopLogprob(first, -0.25), TopLogprob(half, float("-inf")))
        if not request.sampling.logprobs:
            top = ()
        for token_id in (first, second):
            entry = TokenLogprobs(token_id, -0.5, top)
            finish = FinishReason.STOP if token_id == second else None
            engine.send(Tokens((TokenDelta(request.request_id, (token_id,), (entry,), finish),)))

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            texts = [byte_level_tokenizer.decode([token_id]) for token_id in (first, second, half)]
            made = await client.completions.create(model="parrot", prompt="a", logprobs=2)
            found = made.choices[0].logprobs
            assert found.tokens == texts[:2]
            assert found.token_logprobs == [-0.5, -0.5]
            assert found.top_logprobs == [{texts[0]: -0.25, texts[2]: -9999.0}] * 2
            assert found.text_offset == [0, len(texts[0])]
            made = await client.completions.create(model="parrot", prompt="a", logprobs=0)
            assert made.choices[0].logprobs.top_logprobs is None

            messages = [{"role": "user", "content": "a"}]
            asked = {"model": "parrot", "messages": messages, "logprobs": True, "top_logprobs": 2}
            chat = await client.chat.completions.create(**asked)
            streamed = []
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    streamed += choice.logprobs.content if choice.logprobs else []
            for content in (chat.choices[0].logprobs.content, streamed):
                assert [entry.token for entry in content] == texts[:2]
                assert bytes(content[0].bytes).decode() == texts[0]
                assert [top.bytes is None for top in content[0].top_logprobs] == [False, True]

    asyncio.run(main())


WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    ("text", {"prompt": ""}, "prompt"),
    ("text", {"prompt": []}, "prompt"),
    ("text", {"prompt": ["a", [5]]}, "prompt"),
    ("text", {"prompt": [[5], ["a"]]}, "prompt[1][0]"),
    ("text", {"prompt": [5, 100000]}, "prompt[1]"),
    ("text", {"prompt": [5] * 300}, "prompt"),
    ("text", {"prompt": ["a"] * 129}, "prompt"),
    ("text", {"prompt": "x" * 100_000}, "prompt"),
    ("text", {"model": 5}, "model"),
    ("text", {"temperature": -1}, "temperature"),
    ("text", {"temperature": 1e300}, "temperature"),
    ("text", {"top_p": 0}, "top_p"),
    ("text", {"max_tokens": 0}, "max_tokens"),
    ("text", {"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ("text", {"n": 129}, "n"),
    ("text", {"logprobs": 21}, "logprobs"),
    ("text", {"stop": ["a", ""]}, "stop[1]"),
    ("text", {"stop": ["a"] * 17}, "stop"),
    ("text", {"stop_token_ids": [100000]}, "stop_token_ids[0]"),
    ("text", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("text", {"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    ("text", {"adapters": [{"name": "a b"}]}, "adapters[0].name"),
    ("text", {"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters[1].name"),
    ("text", {"adapters": [{"name": "a", "weight": 1e300}]}, "adapters[0].weight"),
    ("text", {"model": "a", "adapters": [{"name": "b"}]}, "adapters"),
    ("text", {"frequency_penalty": 2.5}, "frequency_penalty"),
    ("text", {"presence_penalty": False}, "presence_penalty"),
    ("text", {"logit_bias": {"5": 101}}, "logit_bias[...]"),
    ("text", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("text", {"min_p": 1.5}, "min_p"),
    ("text", {"bad_words": [""]}, "bad_words[0]"),
    ("text", {"best_of": 2}, "best_of"),
    ("text", {"suffix": "x"}, "suffix"),
    ("text", {"messages": []}, "messages"),
    ("text", {"colour": "red"}, "colour"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "z9" * 300}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "a"}] * 1025}, "messages"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("chat", {"logprobs": 2}, "logprobs"),
    ("chat", {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    ("chat", {"tools": [{"type": "function"}]}, "tools"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        "chat",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}},
        "response_format.json_schema.schema",
    ),
    ("text", {"response_format": {"type": "json_object"}, "structure": {"regex": "a"}}, "structure"),
    ("text", {"structure": {}}, "structure"),
    ("text", {"structure": {"regex": "a", "choice": ["a"]}}, "structure"),
    ("text", {"structure": {"json_object": False}}, "structure"),
    ("text", {"structure": {"regex": ""}}, "structure.regex"),
    ("text", {"structure": {"choice": [""]}}, "structure.choice"),
    ("text", {"structure": {"choice": ["a"] * 1025}}, "structure.choice"),
]


def test_every_bad_field_is_named(speaking: Any, byte_level_tokenizer: Any) -> None:
    async def main() -> None:
        async with speaking(says(byte_level_tokenizer, " x")) as server:
            http = Http(server.http_at)
            for kind, fields, param in WRONG:
                ask = http.complete if kind == "text" else http.chat
                status, headers, body = await ask(**fields)
                assert status == 400, (fields, body)
                error = body["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_argument"), fields
                assert error["param"] == param, (fields, error)
                assert error["message"].startswith(f"{param}: "), error
                assert headers["x-request-id"]
            assert not server.engine.submitted
            # What asks for nothing is taken.
            neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "u"}
            neutral |= {"response_format": {"type": "text"}, "store": False, "metadata": None}
            assert (await http.complete(**neutral, suffix=None))[0] == 200
            assert (await http.chat(**neutral, tools=[], tool_choice="auto", modalities=["text"]))[0] == 200

    asyncio.run(main())


def test_what_is_no_request(speaking: Any) -> None:
    async def main() -> None:
        async with speaking(max_message_bytes=2000) as server:
            http = Http(server.http_at)
            for raw in (b"", b"{", b"\xff", b"[]", b"5", b"NaN", b"[" * 1500, b'{"prompt": "\\ud800"}'):
                status, _, body = await http.send(
                    "POST", "/v1/completions", raw, content_type="application/json"
                )
                assert (status, body["error"]["code"]) == (400, "invalid_argument"), raw
            status, _, body = await http.send(
                "POST", "/v1/completions", b"{}", content_type="application/json"
            )
            assert (status, body["error"]["param"]) == (400, "model")
            status, _, body = await http.send("POST", "/v1/completions", b"{}", content_type="text/plain")
            assert (status, "application/json" in body["error"]["message"]) == (415, True)
            status, _, body = await http.complete(prompt="x" * 3000)
            assert (status, "--max-message-bytes" in body["error"]["message"]) == (413, True)
            for method, path, expected in (
                ("GET", "/v1/completions", 405),
                ("POST", "/v1/models", 405),
                ("GET", "/v1/nothing", 404),
                ("GET", "/", 404),
                ("GET", "/v1/models/", 404),
            ):
                status, headers, body = await http.send(method, path)
                assert (status, body["error"]["type"]) == (expected, "invalid_request_error"), path
                assert headers["x-request-id"]
            status, headers, _ = await http.send("GET", "/health", x_request_id="spaces in it")
            assert (status, " " in headers["x-request-id"]) == (200, False)

    asyncio.run(main())


def test_models_and_adapters_by_name(speaking: Any, byte_level_tokenizer: Any) -> None:
    known = [adapter("sql"), adapter("cold", state="unloaded"), adapter("old", draining=True)]

    def reply(command: AnyCommand) -> Answer | ErrorInfo:
        if isinstance(command, ListAdapters):
            return tuple(known)
        assert isinstance(command, GetAdapter)
        found = [each for each in known if each.name == command.name]
        return found[0] if found else ErrorInfo("NOT_FOUND", "no adapter", resource=("adapter", command.name))

    async def script(engine: Any, request: Request) -> None:
        if [use.name for use in request.adapters] == ["gone"]:
            error = ErrorInfo("NOT_FOUND", "no adapter 'gone'", resource=("adapter", "gone"))
            engine.send(Failed(request.request_id, error))
        else:
            await says(byte_level_tokenizer, " x")(engine, request)

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            server.engine.adapters = reply
            models = {model.id: model async for model in client.models.list()}
            assert list(models) == ["parrot", "sql", "cold"]
            assert models["sql"].parent == "parrot"
            assert models["cold"].state == "unloaded"
            assert (await client.models.retrieve("parrot")).parent is None
            assert (await client.models.retrieve("sql")).content_hash == "hash-of-sql"
            for name in ("nobody", "no/body", "../x"):
                with pytest.raises(openai.NotFoundError) as caught:
                    await client.models.retrieve(name)
                assert caught.value.code == "model_not_found", name
            made = await client.completions.create(model="sql", prompt="a")
            assert made.model == "sql"
            assert server.engine.submitted[-1].adapters == (AdapterUse("sql", 1.0),)
            for stream in (False, True):
                with pytest.raises(openai.NotFoundError) as caught:
                    await client.completions.create(model="gone", prompt="a", stream=stream)
                assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.NotFoundError) as caught:
                await client.completions.create(
                    model="parrot", prompt="a", extra_body={"adapters": [{"name": "gone"}]}
                )
            assert caught.value.param == "adapters"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="somebody/else", prompt="a")

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_requests(speaking: Any, stream: bool) -> None:
    async def script(engine: Any, request: Request) -> None:
        engine.tokens(request, 40)

    async def main() -> None:
        async with speaking(script, metrics_port=0) as server:
            body = json.dumps({"model": "parrot", "prompt": "a", "stream": stream, "n": 3}).encode()
            reader, writer = await asyncio.open_connection(*server.http_at.split(":"))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            await server.engine.until(lambda: len(server.engine.submitted) == 3)
            if stream:
                await reader.readuntil(b"data: ")
            writer.close()
            await server.engine.until(lambda: len(server.engine.cancelled) == 3)
            submitted = {request.request_id for request in server.engine.submitted}
            assert set(server.engine.cancelled) == submitted
            while True:
                metrics = await server.scrape()
                if "loraplex_http_requests_total{route=/v1/completions,status=499}" in metrics or stream:
                    break
            assert metrics["loraplex_requests_total{outcome=cancelled}"] == 3

    asyncio.run(main())


def test_a_client_that_does_not_read_is_given_up(speaking: Any) -> None:
    top = tuple(TopLogprob(token_id, -1.0) for token_id in range(40, 60))

    async def script(engine: Any, request: Request) -> None:
        for _ in range(200):
            entries = (TokenLogprobs(40, -1.0, top),) * 20
            engine.send(Tokens((TokenDelta(request.request_id, (40,) * 20, entries),)))
            await asyncio.sleep(0)

    async def main() -> None:
        async with speaking(script, stall_s=0.2) as server:
            body = json.dumps({"model": "parrot", "prompt": "a", "stream": True, "n": 4, "logprobs": 20})
            sock = socket.socket()
            # What the client's side takes in unread stays small.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            host, port = server.http_at.split(":")
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            request = head + "content-type: application/json\r\n\r\n" + body
            await asyncio.get_running_loop().sock_sendall(sock, request.encode())
            await server.engine.until(lambda: len(server.engine.cancelled) == 4)
            assert (await Http(server.http_at).get("/health"))[0] == 200
            sock.close()

    asyncio.run(main())


def test_errors_before_and_within_a_stream(speaking: Any, byte_level_tokenizer: Any) -> None:
    full = ErrorInfo("RESOURCE_EXHAUSTED", "the queue is full", resource=("queue", "1"), retry_after_s=0.25)
    lost = ErrorInfo("INTERNAL", "/secret/path exploded")

    async def script(engine: Any, request: Request) -> None:
        if request.sampling.seed == 1:
            engine.send(Failed(request.request_id, full))
        else:
            engine.tokens(request, *byte_level_tokenizer.encode(" so far"))
            await asyncio.sleep(0.05)
            engine.send(Failed(request.request_id, lost))

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
                    await client.completions.create(model="parrot", prompt="a", seed=1, stream=stream)
                assert caught.value.response.headers["retry-after"] == "1"
                assert caught.value.response.headers["retry-after-ms"] == "250"
            with pytest.raises(openai.InternalServerError) as failed:
                await client.completions.create(model="parrot", prompt="a", seed=2)
            assert "secret" not in str(failed.value)
            stream = await client.completions.create(model="parrot", prompt="a", seed=2, stream=True)
            assert (await anext(stream)).choices[0].text == " so far"
            with pytest.raises(openai.APIError, match="internal error") as cut:
                await anext(stream)
            assert cut.value.code == "internal"

    asyncio.run(main())


def test_starting_draining_and_health(new_engine: Any, start_server: Any, chat_checkpoint: Path) -> None:
    async def script(engine: Any, request: Request) -> None:
        engine.tokens(request, 40)
        await release.wait()
        engine.tokens(request, 41, finish=FinishReason.LENGTH, times=TIMES)

    async def main() -> None:
        nonlocal release
        release = asyncio.Event()
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
            port = probe.getsockname()[1]
        async with new_engine() as engine:
            engine.script = script
            engine.may_be_ready.clear()
            task, ready = start_server(engine, model=chat_checkpoint, http_port=port)
            http = Http(f"127.0.0.1:{port}")
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    status, _, body = await http.get("/health")
                    break
                await asyncio.sleep(0.01)
            assert (status, body) == (503, {"status": "not serving"})
            status, headers, body = await http.complete()
            assert (status, headers["retry-after"]) == (503, "2")
            assert body["error"]["message"] == "the server is starting"
            assert (await http.get("/openapi.json"))[0] == 200
            engine.may_be_ready.set()
            assert (await ready())[3] == http._at
            assert (await http.get("/health"))[0] == 200

            running = asyncio.create_task(http.complete(stream=True))
            await engine.until(lambda: len(engine.submitted) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await http.get("/health"))[0] == 200:
                await asyncio.sleep(0.01)
            assert (await http.complete())[0] == 503
            assert not task.done()
            release.set()
            status, _, text = await running
            assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)
            assert await asyncio.wait_for(task, 10) == 0
            assert not engine.cancelled

    release: asyncio.Event
    asyncio.run(main())


def test_requests_that_do_not_end_are_cut_off(speaking: Any) -> None:
    async def main() -> None:
        async with speaking(drain_s=0.1) as server:
            http = Http(server.http_at)
            call = asyncio.create_task(http.complete())
            await server.engine.until(lambda: len(server.engine.submitted) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            status, _, body = await asyncio.wait_for(call, 10)
            assert (status, body["error"]["code"]) == (503, "unavailable")
            assert await asyncio.wait_for(server.task, 10) == 0

    asyncio.run(main())


def test_the_engines_death_ends_streams_with_an_error(speaking: Any) -> None:
    async def script(engine: Any, request: Request) -> None:
        engine.tokens(request, 40)

    async def main() -> None:
        async with speaking(script) as server, talking(server.http_at) as client:
            stream = await client.completions.create(model="parrot", prompt="a", stream=True)
            await anext(stream)
            whole = asyncio.create_task(Http(server.http_at).complete())
            await server.engine.until(lambda: len(server.engine.submitted) == 2)
            server.engine.die()
            server.engine.ended.set()
            with pytest.raises(openai.APIError, match="the engine has stopped") as caught:
                await anext(stream)
            assert caught.value.code == "unavailable"
            status, _, body = await whole
            assert (status, body["error"]["code"]) == (503, "unavailable")
            assert await asyncio.wait_for(server.task, 10) == 1

    asyncio.run(main())


def test_a_taken_port_is_named(new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
            async with new_engine() as engine:
                task, _ = start_server(engine, http_port=taken.getsockname()[1])
                assert await asyncio.wait_for(task, 10) == 1
                assert not engine.launched

    asyncio.run(main())
    assert "--http-port" in caplog.text


def test_without_its_packages_only_http_is_refused(
    new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("loraplex_server.api.http")]:
        monkeypatch.delitem(sys.modules, name)

    async def main() -> None:
        async with new_engine() as engine:
            task, _ = start_server(engine, http_port=0)
            assert await asyncio.wait_for(task, 10) == 1
        async with new_engine() as engine:
            task, ready = start_server(engine)
            assert (await ready())[3] is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(task, 10) == 0

    asyncio.run(main())
    assert "pip install ." in caplog.text


def test_metrics_count_requests_by_route_and_status(speaking: Any, byte_level_tokenizer: Any) -> None:
    async def main() -> None:
        async with speaking(says(byte_level_tokenizer, " x")) as server:
            http = Http(server.http_at)
            await http.complete()
            await http.complete(temperature=-1)
            await http.get("/v1/models/a")
            await http.get("/anything")
            status, headers, text = await http.get("/metrics")
            assert status == 200
            assert headers["content-type"].startswith("text/plain")
            for line in (
                'loraplex_http_requests_total{route="/v1/completions",status="200"} 1.0',
                'loraplex_http_requests_total{route="/v1/completions",status="400"} 1.0',
                'loraplex_http_requests_total{route="/v1/models/{model:path}",status="500"} 1.0',
                'loraplex_http_requests_total{route="other",status="404"} 1.0',
                'loraplex_requests_total{outcome="length"} 1.0',
            ):
                assert line in text, line

    asyncio.run(main())
