"""A real gRPC server whose answers the test writes, and one way to drive both clients."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from loraplex import AsyncClient, Client
from loraplex.v1 import (
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
)

SAFETY_S = 20.0  # how long a test waits for what should come at once

Answer = Callable[[Any, grpc.ServicerContext], Any]


class ScriptedServer(
    generation_pb2_grpc.GenerationServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
):
    """Answers as the test says, and keeps what it was asked.

    `answers[method]` is a function of (request, context); for `Generate` it yields the responses, and
    GenerateUnary joins what it yields.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {"Generate": two_chunks}
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(16))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._grpc)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._grpc)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._grpc)

    def start(self, target: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> str:
        """Listens, and returns the address."""
        if credentials is None:
            port = self._grpc.add_insecure_port(target)
        else:
            port = self._grpc.add_secure_port(target, credentials)
        self._grpc.start()
        self.address = target if target.startswith("unix:") else f"127.0.0.1:{port}"
        return self.address

    def stop(self) -> None:
        self._grpc.stop(grace=None).wait()

    def hold(self, context: grpc.ServicerContext, *before: Any) -> Iterator[Any]:
        """Sends `before` and then keeps the call open until its client has gone: see `cancelled`."""
        # Asked for before anything is sent: gRPC does not come back to the handler of a dead call.
        gone = threading.Event()
        context.add_callback(lambda: (gone.set(), self.cancelled.set()))
        yield from before
        gone.wait(2 * SAFETY_S)

    def _record(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls[method] += 1
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))

    def UploadAdapter(self, requests: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._record("UploadAdapter", list(requests), context)
        return self.answers["UploadAdapter"](self.requests[-1], context)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self._record("Watch", request, context)
        yield from self.answers["Watch"](request, context)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self._record("Generate", request, context)
        yield from self.answers["Generate"](request, context)

    def GenerateBatch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self._record("GenerateBatch", request, context)
        yield from self.answers["GenerateBatch"](request, context)

    def GenerateUnary(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._record("GenerateUnary", request, context)
        whole = generation_pb2.GenerateUnaryResponse()
        others: dict[int, Any] = {}
        for part in self.answers["Generate"](request.request, context):
            whole.prompt_logprobs.extend(part.prompt_logprobs)
            if part.index:
                other = others.setdefault(part.index, generation_pb2.Answer(index=part.index))
                other.text += part.text
                other.token_ids.extend(part.token_ids)
                other.logprobs.extend(part.logprobs)
                other.finish.MergeFrom(part.finish)
                continue
            whole.prompt_token_ids.extend(part.prompt_token_ids)
            whole.text += part.text
            whole.token_ids.extend(part.token_ids)
            whole.logprobs.extend(part.logprobs)
            whole.request_id = whole.request_id or part.request_id
            if part.HasField("finish"):
                whole.finish.CopyFrom(part.finish)
        whole.others.extend(answer for _, answer in sorted(others.items()))
        return whole


def _scripted(method: str) -> Answer:
    def handle(self: ScriptedServer, request: Any, context: grpc.ServicerContext) -> Any:
        self._record(method, request, context)
        return self.answers[method](request, context)

    return handle


for _method in (
    *("LoadAdapter", "UnloadAdapter", "ListAdapters", "GetAdapter", "PinAdapter", "Prefetch"),
    *("RegisterComposition", "GetModel", "Tokenize", "CountTokens"),
):
    setattr(ScriptedServer, _method, _scripted(_method))


def two_chunks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """The standard answer: two pieces of text with log-probabilities, ended by a stop string."""

    def logprobs(token: int) -> Any:
        top = [generation_pb2.TopLogprob(token_id=token, logprob=-0.25, text="x")]
        return generation_pb2.TokenLogprobs(token_id=token, logprob=-0.25, top=top)

    asked = request.HasField("logprobs")
    yield generation_pb2.GenerateResponse(
        text="Grü",
        token_ids=[5, 6],
        logprobs=[logprobs(5), logprobs(6)] if asked else [],
        request_id=request.request_id or "made-by-server",
    )
    yield generation_pb2.GenerateResponse(
        text="ße",
        token_ids=[7],
        logprobs=[logprobs(7)] if asked else [],
        finish=generation_pb2.Finish(
            reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.Usage(
                prompt_tokens=4,
                completion_tokens=3,
                cached_prompt_tokens=2,
                drafted_tokens=5,
                accepted_tokens=1,
            ),
            timing=generation_pb2.Timing(queue_seconds=0.5, total_seconds=2.0, preemptions=1),
            stop_match="\n",
        ),
    )


def fail(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: Message) -> None:
    """Ends the call with a status and its google.rpc details."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    context.abort_with_status(rpc_status.to_status(status))


class Blocking:
    """Drives Client."""

    client_class = Client

    def __call__(self, act: Callable[[], Any]) -> Any:
        return act()

    def next(self, stream: Any) -> Any:
        return next(stream, None)

    def close(self) -> None:
        pass


class Looping:
    """Drives AsyncClient: every act runs on one event loop, to its end."""

    client_class = AsyncClient

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def __call__(self, act: Callable[[], Any]) -> Any:
        async def on_loop() -> Any:
            result = act()
            return await result if inspect.isawaitable(result) else result

        return self._runner.run(on_loop())

    def next(self, stream: Any) -> Any:
        async def step() -> Any:
            return await anext(stream, None)

        return self(step)

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    running = ScriptedServer()
    running.start()
    yield running
    running.stop()


@pytest.fixture
def abort() -> Callable[..., None]:
    return fail


@pytest.fixture
def new_server() -> Iterator[Callable[[], ScriptedServer]]:
    """Makes servers that the test starts itself."""
    made: list[ScriptedServer] = []

    def make() -> ScriptedServer:
        made.append(ScriptedServer())
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(params=[Blocking, Looping], ids=["sync", "async"])
def drive(request: pytest.FixtureRequest) -> Iterator[Any]:
    driver = request.param()
    yield driver
    driver.close()


@pytest.fixture
def connect(drive: Any, server: ScriptedServer) -> Iterator[Callable[..., Any]]:
    """Makes clients of `drive`'s kind, of the test's server unless told otherwise, and closes them."""
    made: list[Any] = []

    def make(address: str | None = None, **settings: Any) -> Any:
        made.append(drive.client_class(address or server.address, **settings))
        return made[-1]

    yield make
    for client in made:
        drive(client.close)


@pytest.fixture
def client(connect: Callable[..., Any]) -> Any:
    return connect()


@pytest.fixture
def new_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a process where the `blocked` top-level modules are not installed."""

    def run(
        code: str, *, blocked: tuple[str, ...] = (), stdout: int = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        program = f"""
import sys
sys.path[:0] = {sys.path!r}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
{code}
"""
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )

    return run
