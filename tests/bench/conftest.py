"""A server that answers by the book, or breaks it on purpose: what the harness must notice."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from loraplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from loraplex_bench.demo.tasks import TASKS, expected

Answer = Callable[[str | None, str], str]


@dataclasses.dataclass
class Script:
    """The behaviour of the scripted server; tests change it before they send.

    Attributes:
        answer: (task, line) to the text of the answer.
        refuse: (task, line) to the status to fail with, or None.
        chunk: tokens (characters) in a message.
        gather: answers nobody before this many requests are there.
        seen: every (adapters, prompt) asked, in order of arrival.
        most_at_once: largest number of generations that were there together.
    """

    answer: Answer = expected
    refuse: Callable[[str | None, str], grpc.StatusCode | None] = lambda task, line: None
    chunk: int = 1
    gather: int = 1
    seen: list[tuple[list[tuple[str, float]], str]] = dataclasses.field(default_factory=list)
    most_at_once: int = 0
    address: str = ""


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script
        self._changed = threading.Condition()
        self._here = 0

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        script = self._script
        with self._changed:
            self._here += 1
            script.most_at_once = max(script.most_at_once, self._here)
            script.seen.append(([(a.adapter, a.weight) for a in request.adapters], request.text))
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(script.seen) >= script.gather, timeout=30)
        try:
            yield from self._stream(request, context)
        finally:
            with self._changed:
                self._here -= 1

    def _stream(self, request: Any, context: Any) -> Iterator[Any]:
        script = self._script
        task = request.adapters[0].adapter if request.adapters else None
        line = request.text.rstrip("\n")
        if (code := script.refuse(task, line)) is not None:
            context.abort(code, "refused by the script")
        text = script.answer(task, line)
        for start in range(0, len(text), script.chunk):
            piece = text[start : start + script.chunk]
            yield generation_pb2.GenerateResponse(
                text=piece, token_ids=[ord(c) for c in piece], request_id="r"
            )
        yield generation_pb2.GenerateResponse(
            finish=generation_pb2.Finish(
                reason=generation_pb2.FINISH_REASON_STOP,
                usage=generation_pb2.Usage(prompt_tokens=len(line) + 2, completion_tokens=len(text)),
                timing=generation_pb2.Timing(queue_seconds=0.25, adapter_wait_seconds=0.125),
            )
        )


class _Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
        state = adapters_pb2.ADAPTER_STATE_DEVICE
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapters_pb2.Adapter(name=name, state=state, rank=8, hits=3) for name in TASKS]
        )


class _Model(model_pb2_grpc.ModelServiceServicer):
    def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = model_pb2.Model(
            name="/somewhere/base", architecture="Scripted", vocab_size=99, max_model_len=64
        )
        return model_pb2.GetModelResponse(model=model)


@pytest.fixture
def script() -> Iterator[Script]:
    """A scripted server that runs; `address` is where."""
    script = Script()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=64))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(script), server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(_Adapters(), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(_Model(), server)
    script.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield script
    server.stop(grace=None).wait()
