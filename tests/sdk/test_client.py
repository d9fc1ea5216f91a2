"""Both clients against a real gRPC server on loopback: what is sent, and what becomes of the answer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from loraplex import AdapterInfo, ModelInfo, Timing, TokenLogprobs, TopLogprob, Usage
from loraplex.errors import InternalError, InvalidRequestError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2


def logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.25, [TopLogprob(token, -0.25, "x")])


def test_generate_returns_the_whole_answer(drive: Any, client: Any) -> None:
    answer = drive(lambda: client.generate("Hallo", logprobs=1))
    assert answer.text == "Grüße"
    assert answer.token_ids == [5, 6, 7]
    assert answer.finish_reason == "stop"
    assert answer.stop_match == "\n"
    assert answer.usage == Usage(4, 3, 2, drafted_tokens=5, accepted_tokens=1)
    assert answer.usage.total_tokens == 7
    assert answer.logprobs == [logprob(5), logprob(6), logprob(7)]
    assert answer.timing == Timing(0.5, 0.0, 0.0, 2.0, 1)
    assert answer.request_id == "made-by-server"


def test_stream_yields_chunks_and_ends_with_the_finish(drive: Any, client: Any) -> None:
    stream = drive(lambda: client.stream("Hallo", request_id="mine"))
    assert stream.request_id == "mine"
    first, last, end = drive.next(stream), drive.next(stream), drive.next(stream)
    assert (first.text, first.token_ids, first.finish_reason) == ("Grü", [5, 6], None)
    assert first.usage is first.timing is first.logprobs is first.stop_match is None
    assert (last.text, last.token_ids, last.finish_reason) == ("ße", [7], "stop")
    assert last.usage == Usage(4, 3, 2, drafted_tokens=5, accepted_tokens=1)
    assert last.request_id == "mine"
    assert end is None


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_collected_stream_is_the_unary_answer(drive: Any, client: Any, logprobs: int | None) -> None:
    stream = drive(lambda: client.stream("Hallo", logprobs=logprobs))
    assert drive(stream.collect) == drive(lambda: client.generate("Hallo", logprobs=logprobs))
    with pytest.raises(RuntimeError, match="read to its end"):
        drive(stream.collect)


def three_answers(request: Any, context: Any) -> Any:
    """Answers that come mixed, to a prompt that is scored and echoed."""

    def score(token: int) -> Any:
        top = [generation_pb2.TopLogprob(token_id=token, logprob=-0.25, text="x")]
        return generation_pb2.TokenLogprobs(token_id=token, logprob=-0.25, top=top)

    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=1)
    end = generation_pb2.Finish(reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)
    prompt = {"text": "abc", "prompt_token_ids": [1, 2, 3]}
    made = generation_pb2.GenerateResponse
    yield made(request_id="r", prompt_logprobs=[score(2)], **prompt)
    yield made(index=2, **prompt)
    yield made(prompt_logprobs=[score(3)], text="-0", token_ids=[4], finish=end)
    yield made(index=1, finish=end, **{**prompt, "text": "abc-1"}, token_ids=[5])
    yield made(index=2, text="-2", token_ids=[6], finish=end)


def test_several_answers_to_a_prompt_that_is_scored_and_echoed(drive: Any, server: Any, client: Any) -> None:
    server.answers["Generate"] = three_answers
    options: dict[str, Any] = {"n": 3, "prompt_logprobs": 1, "echo": True}
    whole = drive(lambda: client.generate("abc", **options))
    assert drive(drive(lambda: client.stream("abc", **options)).collect) == whole
    assert (whole.index, whole.text, whole.token_ids) == (0, "abc-0", [4])
    assert whole.prompt_logprobs == [logprob(2), logprob(3)]
    assert [(other.index, other.text, other.token_ids) for other in whole.others] == [
        (1, "abc-1", [5]),
        (2, "abc-2", [6]),
    ]
    for answer in (whole, *whole.others):
        assert (answer.prompt_token_ids, answer.request_id) == ([1, 2, 3], "r")
        assert (answer.finish_reason, answer.usage.total_tokens) == ("length", 4)
    assert [other.prompt_logprobs for other in whole.others] == [None, None]
    stream = drive(lambda: client.stream("abc", **options))
    chunks = [drive.next(stream) for _ in range(5)]
    assert [chunk.index for chunk in chunks] == [0, 2, 0, 1, 2]
    assert [chunk.prompt_token_ids for chunk in chunks] == [[1, 2, 3], [1, 2, 3], None, [1, 2, 3], None]
    assert drive.next(stream) is None
    server.answers["Generate"] = lambda request, context: list(three_answers(request, context))[:-1]
    with pytest.raises(InternalError, match="without saying how"):
        drive(drive(lambda: client.stream("abc", **options)).collect)


def test_a_stream_cut_short_is_no_answer(drive: Any, server: Any, client: Any) -> None:
    server.answers["Generate"] = lambda request, context: iter(
        [generation_pb2.GenerateResponse(text="half", request_id="r7")]
    )
    stream = drive(lambda: client.stream("Hallo"))
    with pytest.raises(InternalError, match="without saying how") as caught:
        drive(stream.collect)
    assert caught.value.request_id == "r7"


def test_what_is_left_out_is_not_sent(drive: Any, server: Any, client: Any) -> None:
    drive(lambda: client.generate("Hallo"))
    assert server.requests[-1].request == generation_pb2.GenerateRequest(text="Hallo")


def test_every_option_is_sent(drive: Any, server: Any, client: Any) -> None:
    options: dict[str, Any] = {
        "adapters": [("sql", 0.5), "polite"],
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "seed": 2**63,
        "stop": ["\n", "END"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 2,
        "echo": True,
        "n": 1,
        "priority": -1,
        "cache_prefix": False,
        "speculative_tokens": 0,
        "request_id": "mine",
    }
    expected = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
        adapters=[
            generation_pb2.AdapterWeight(adapter="sql", weight=0.5),
            generation_pb2.AdapterWeight(adapter="polite"),
        ],
        sampling=generation_pb2.SamplingParams(temperature=0.5, top_p=0.25, top_k=40, seed=2**63),
        stopping=generation_pb2.StoppingCriteria(
            max_tokens=9, min_tokens=2, stop=["\n", "END"], stop_token_ids=[3], ignore_eos=True
        ),
        logprobs=0,
        prompt_logprobs=2,
        echo=True,
        n=1,
        priority=-1,
        cache_prefix=False,
        speculative_tokens=0,
        request_id="mine",
    )
    drive(lambda: client.generate([1, 2, 3], **options))
    drive(drive(lambda: client.stream([1, 2, 3], **options)).collect)
    assert server.requests[0].request == server.requests[1] == expected


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"adapter": "sql"}, [("sql", None)]),
        ({"adapters": ["sql", "polite"]}, [("sql", None), ("polite", None)]),
        ({"adapters": [("sql", 1), ["polite", 0.5]]}, [("sql", 1.0), ("polite", 0.5)]),
        ({"adapters": {"sql": -1.5, "polite": 0.0}}, [("sql", -1.5), ("polite", 0.0)]),
        ({"adapters": []}, []),
        ({"adapter": "sql", "adapters": None}, [("sql", None)]),
    ],
)
def test_ways_to_name_adapters(
    drive: Any, server: Any, client: Any, options: dict[str, Any], weights: list[tuple[str, float | None]]
) -> None:
    drive(lambda: client.generate("Hallo", **options))
    sent = server.requests[-1].request.adapters
    assert [(a.adapter, a.weight if a.HasField("weight") else None) for a in sent] == weights


def test_one_stop_string_is_not_its_characters(drive: Any, server: Any, client: Any) -> None:
    drive(lambda: client.generate("Hallo", stop="END"))
    assert list(server.requests[-1].request.stopping.stop) == ["END"]


def test_an_empty_token_prompt_is_sent_as_such(drive: Any, server: Any, client: Any) -> None:
    drive(lambda: client.generate([]))
    assert server.requests[-1].request.WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        (b"bytes", {}, "prompt"),
        (7, {}, "prompt"),
        (["text", "text"], {}, "prompt"),
        ([-1], {}, "prompt"),
        ("\udcff", {}, "prompt"),
        ("x", {"adapter": "a", "adapters": ["b"]}, "adapters"),
        ("x", {"adapters": "sql"}, "adapters"),
        ("x", {"adapters": [("sql", 1.0, 2.0)]}, "adapters"),
        ("x", {"adapters": [("sql", "heavy")]}, "adapters"),
        ("x", {"adapter": 3}, "adapters"),
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"max_tokens": 1.5}, "max_tokens"),
        ("x", {"temperature": "hot"}, "temperature"),
        ("x", {"stop": [1]}, "stop"),
        ("x", {"stop": 5}, "stop"),
        ("x", {"seed": 2**64}, "seed"),
        ("x", {"timeout": 0}, "timeout"),
        ("x", {"timeout": float("nan")}, "timeout"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    drive: Any, server: Any, client: Any, prompt: Any, options: dict[str, Any], field: str
) -> None:
    for method in (client.generate, client.stream):
        with pytest.raises(InvalidRequestError, match=field) as caught:
            drive(lambda method=method: method(prompt, **options))
        assert [violation.field for violation in caught.value.field_violations] == [field]
        assert caught.value.code == "INVALID_ARGUMENT"
    assert not server.calls


HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott", "name": "ann"}]


def test_conversations(drive: Any, server: Any, client: Any) -> None:
    answer = drive(lambda: client.chat(HELLO, adapter="polite", max_tokens=9))
    streamed = drive(lambda: client.stream_chat(iter(HELLO), adapter="polite", max_tokens=9))
    assert drive(streamed.collect).text == answer.text == "Grüße"
    whole, stream = (getattr(request, "request", request) for request in server.requests)
    assert whole == stream
    assert (whole.WhichOneof("prompt"), whole.stopping.max_tokens) == ("chat", 9)
    said = [(message.role, message.content, message.name) for message in whole.chat.messages]
    assert said == [("system", "Be brief.", ""), ("user", "Grüß Gott", "ann")]


@pytest.mark.parametrize(
    "messages",
    ["hi", {"role": "user", "content": "hi"}, 5, [5], ["hi"], [{"role": "user"}], [{"content": "hi"}]],
)
def test_what_is_no_conversation(drive: Any, server: Any, client: Any, messages: Any) -> None:
    for act in (lambda: client.chat(messages), lambda: client.stream_chat(messages)):
        with pytest.raises(InvalidRequestError) as caught:
            drive(act)
        assert caught.value.field_violations[0].field == "messages"
    for wrong in ({"role": 5, "content": "a"}, {"role": "user", "content": "a", "colour": "red"}):
        with pytest.raises(InvalidRequestError, match="messages"):
            drive(lambda wrong=wrong: client.chat([wrong]))
    assert not server.requests


def test_tokens(drive: Any, server: Any, client: Any) -> None:
    server.answers["Tokenize"] = lambda request, context: generation_pb2.TokenizeResponse(token_ids=[1, 5])
    server.answers["CountTokens"] = lambda request, context: generation_pb2.CountTokensResponse(count=7)
    assert drive(lambda: client.tokenize("Hallo")) == [1, 5]
    assert drive(lambda: client.count_tokens(HELLO, adapters="polite")) == 7
    text, chat = server.requests
    assert (text.text, list(text.adapters)) == ("Hallo", [])
    assert (chat.chat.messages[1].name, list(chat.adapters)) == ("ann", ["polite"])
    with pytest.raises(InvalidRequestError, match="messages"):
        drive(lambda: client.count_tokens(5))


def test_a_mistyped_option_is_a_type_error(drive: Any, client: Any) -> None:
    with pytest.raises(TypeError, match="max_token"):
        drive(lambda: client.generate("x", max_token=3))


def filled(message: Any) -> Any:
    """The message with a different value in each field."""
    for number, field in enumerate(message.DESCRIPTOR.fields, start=2):
        if field.is_repeated:
            getattr(message, field.name).extend([f"{field.name}-1", f"{field.name}-2"])
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, field.name)
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, True)
        elif field.type == field.TYPE_ENUM:
            setattr(message, field.name, adapters_pb2.ADAPTER_STATE_COPYING)
        else:
            setattr(message, field.name, number)
    return message


def same(value: Any, message: Any) -> bool:
    """True if the fields of the message and the attributes of the value correspond one to one."""
    names = [field.name for field in message.DESCRIPTOR.fields]
    assert sorted(type(value).__slots__) == sorted(names)
    return all(
        getattr(value, name) == ("copying" if name == "state" else getattr(message, name)) for name in names
    )


def test_adapters(drive: Any, server: Any, client: Any) -> None:
    adapter = filled(adapters_pb2.Adapter())
    server.answers.update(
        LoadAdapter=lambda request, context: adapters_pb2.LoadAdapterResponse(adapter=adapter),
        UnloadAdapter=lambda request, context: adapters_pb2.UnloadAdapterResponse(remaining=[adapter]),
        ListAdapters=lambda request, context: adapters_pb2.ListAdaptersResponse(adapters=[adapter] * 2),
        GetAdapter=lambda request, context: adapters_pb2.GetAdapterResponse(adapter=adapter),
        PinAdapter=lambda request, context: adapters_pb2.PinAdapterResponse(adapter=adapter),
        Prefetch=lambda request, context: adapters_pb2.PrefetchResponse(adapters=[adapter] * 2),
    )
    loaded = drive(lambda: client.adapters.load("sql", "/srv/sql"))
    assert isinstance(loaded, AdapterInfo)
    assert same(loaded, adapter)
    assert drive(lambda: client.adapters.load("sql", Path("/srv/sql"))) == loaded
    assert drive(lambda: client.adapters.unload("sql")) == [loaded]
    assert drive(lambda: client.adapters.list()) == [loaded, loaded]
    assert drive(lambda: client.adapters.get("sql")) == loaded
    assert drive(lambda: client.adapters.pin("sql")) == loaded
    assert drive(lambda: client.adapters.pin("sql", pinned=False)) == loaded
    assert drive(lambda: client.adapters.load("sql", "/srv/2", load_inplace=True)) == loaded
    assert drive(lambda: client.adapters.unload("sql", grace_seconds=0)) == [loaded]
    assert drive(lambda: client.adapters.prefetch(["a", "b"])) == [loaded, loaded]
    assert drive(lambda: client.adapters.prefetch(("a",), host_only=True)) == [loaded, loaded]
    assert server.requests == [
        adapters_pb2.LoadAdapterRequest(name="sql", source="/srv/sql"),
        adapters_pb2.LoadAdapterRequest(name="sql", source="/srv/sql"),
        adapters_pb2.UnloadAdapterRequest(name="sql"),
        adapters_pb2.ListAdaptersRequest(),
        adapters_pb2.GetAdapterRequest(name="sql"),
        adapters_pb2.PinAdapterRequest(name="sql", pinned=True),
        adapters_pb2.PinAdapterRequest(name="sql", pinned=False),
        adapters_pb2.LoadAdapterRequest(name="sql", source="/srv/2", load_inplace=True),
        adapters_pb2.UnloadAdapterRequest(name="sql", grace_seconds=0),
        adapters_pb2.PrefetchRequest(names=["a", "b"]),
        adapters_pb2.PrefetchRequest(names=["a"], host_only=True),
    ]
    for wrong in ("a", [3]):
        with pytest.raises(InvalidRequestError, match="names"):
            drive(lambda wrong=wrong: client.adapters.prefetch(wrong))
    with pytest.raises(InvalidRequestError, match="name"):
        drive(lambda: client.adapters.get(3))


def test_compositions(drive: Any, server: Any, client: Any) -> None:
    adapter = filled(adapters_pb2.Adapter())
    server.answers["RegisterComposition"] = lambda request, context: adapters_pb2.RegisterCompositionResponse(
        adapter=adapter
    )
    compose = client.adapters.register_composition
    plain = drive(lambda: compose("both", "cat", ["sql", ("polite", 0.3)]))
    assert same(plain, adapter)
    settings = {"density": 0.25, "majority_sign": "frequency", "svd_rank": 4, "seed": 7, "load_inplace": True}
    drive(lambda: compose("both", "dare_ties_svd", {"sql": 2}, **settings))
    member = adapters_pb2.CompositionMember
    assert server.requests == [
        adapters_pb2.RegisterCompositionRequest(
            name="both",
            combination_type=adapters_pb2.COMBINATION_TYPE_CAT,
            members=[member(adapter="sql"), member(adapter="polite", weight=0.3)],
        ),
        adapters_pb2.RegisterCompositionRequest(
            name="both",
            combination_type=adapters_pb2.COMBINATION_TYPE_DARE_TIES_SVD,
            members=[member(adapter="sql", weight=2)],
            density=0.25,
            majority_sign=adapters_pb2.MAJORITY_SIGN_FREQUENCY,
            svd_rank=4,
            seed=7,
            load_inplace=True,
        ),
    ]
    for wrong, field in (
        (lambda: compose("both", "sum", ["a"]), "combination_type: must be one of linear, cat"),
        (lambda: compose("both", "ties", ["a"], majority_sign="most"), "majority_sign"),
        (lambda: compose("both", "ties", "a"), "members"),
        (lambda: compose("both", "ties", [("a", 1, 2)]), "members"),
        (lambda: compose("both", "ties", ["a"], seed=-1), "seed"),
    ):
        with pytest.raises(InvalidRequestError, match=field):
            drive(wrong)


def test_watching(drive: Any, server: Any, client: Any) -> None:
    adapter = filled(adapters_pb2.Adapter())
    first = adapters_pb2.WatchResponse(adapters=[adapter, adapter])
    then = adapters_pb2.WatchResponse(adapters=[adapter], removed=["old"])
    server.answers["Watch"] = lambda request, context: server.hold(context, first, then)
    watch = drive(lambda: client.adapters.watch(["a", "b"]))
    changes = drive.next(watch)
    assert same(changes.adapters[0], adapter)
    assert (len(changes.adapters), changes.removed) == (2, [])
    assert drive.next(watch).removed == ["old"]
    drive(watch.close)
    assert server.cancelled.wait(20)
    assert server.requests == [adapters_pb2.WatchRequest(names=["a", "b"])]
    server.answers["Watch"] = lambda request, context: iter([first])
    ended = drive(lambda: client.adapters.watch())
    drive.next(ended)
    assert drive.next(ended) is None
    with pytest.raises(InvalidRequestError, match="names"):
        drive(lambda: client.adapters.watch("a"))


def test_uploads(drive: Any, server: Any, client: Any, tmp_path: Path) -> None:
    adapter = filled(adapters_pb2.Adapter())
    server.answers["UploadAdapter"] = lambda requests, context: adapters_pb2.UploadAdapterResponse(
        adapter=adapter
    )
    body = bytes(range(256)) * 10000
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "ü": 1}', encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(body)
    seen: list[tuple[int, int]] = []
    sent = drive(
        lambda: client.adapters.upload(
            "sql", tmp_path, load_inplace=True, progress=lambda *progress: seen.append(progress)
        )
    )
    assert same(sent, adapter)
    [[first, *rest]] = server.requests
    assert first.header == adapters_pb2.UploadHeader(
        name="sql",
        config='{"peft_type": "LORA", "ü": 1}',
        sha256=hashlib.sha256(body).hexdigest(),
        size=len(body),
        load_inplace=True,
    )
    assert b"".join(part.chunk for part in rest) == body
    assert max(len(part.chunk) for part in rest) == 1 << 20
    assert seen == [(1 << 20, len(body)), (2 << 20, len(body)), (len(body), len(body))]

    texts = {"tokenizer.json": b"t" * (3 << 19), "chat_template.jinja": b"{{ x }}"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "special_tokens_map.json").write_bytes(b"")
    drive(lambda: client.adapters.upload("sql", tmp_path, progress=lambda *progress: seen.append(progress)))
    first, *rest = server.requests[-1]
    assert [(file.name, file.size, file.sha256) for file in first.header.files] == [
        (name, len(text), hashlib.sha256(text).hexdigest()) for name, text in texts.items()
    ]
    assert b"".join(part.chunk for part in rest) == body + b"".join(texts.values())
    assert [len(part.chunk) for part in rest][-3:] == [1 << 20, 1 << 19, 7]
    assert seen[-1] == (len(body) + (3 << 19) + 7,) * 2
    with pytest.raises(InvalidRequestError, match="folder"):
        drive(lambda: client.adapters.upload("sql", tmp_path / "nothing"))


def test_model(drive: Any, server: Any, client: Any) -> None:
    model = filled(model_pb2.Model())
    server.answers["GetModel"] = lambda request, context: model_pb2.GetModelResponse(model=model)
    answer = drive(lambda: client.model())
    assert isinstance(answer, ModelInfo)
    assert same(answer, model)


@pytest.mark.parametrize(
    ("enum", "prefix", "field"),
    [
        (generation_pb2.FinishReason, "FINISH_REASON_", "finish_reason"),
        (adapters_pb2.AdapterState, "ADAPTER_STATE_", "adapter_state"),
    ],
)
def test_every_enum_value_has_its_name(enum: Any, prefix: str, field: str) -> None:
    from loraplex import _readers

    for name, number in enum.items():
        assert getattr(_readers, field)(number) == name.removeprefix(prefix).lower()
    assert getattr(_readers, field)(1000) == "unspecified", "a newer server may say more"


def test_answers_beyond_grpc_s_default_size(drive: Any, server: Any, client: Any) -> None:
    text = "x" * (5 << 20)
    server.answers["GetModel"] = lambda request, context: model_pb2.GetModelResponse(
        model=model_pb2.Model(name=text)
    )
    assert drive(lambda: client.model()).name == text
