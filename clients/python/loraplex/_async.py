"""The client for asyncio: the same as the one that blocks, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc
import grpc.aio

from loraplex import _convert as convert
from loraplex._base import BaseClient, Stubs, Wait, stubs_on
from loraplex._batch import BatchReader, BatchResult, batch_request, in_order
from loraplex._calls import PROBE, Call
from loraplex._config import Timeout
from loraplex._convert import AdapterMix, ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._map import AsyncGenerationMap, MapItem, MapProgress, MapSource
from loraplex._types import AdapterChanges, AdapterInfo, Generation, GenerationChunk, ModelInfo
from loraplex._upload import Progress, upload_parts
from loraplex.errors import DeadlineExceededError, LoraplexError, UnavailableError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2


class AsyncClient(BaseClient):
    r"""A loraplex server, called from coroutines of one event loop.

    >>> async def ask():
    ...     async with AsyncClient("127.0.0.1:50051") as client:
    ...         answer = await client.generate("hello world 42\n", adapter="upper", max_tokens=64)
    ...         print(answer.text, answer.finish_reason)
    ...         async for chunk in client.stream("hello world 42\n", adapter="redact"):
    ...             print(chunk.text, end="", flush=True)
    ...         print()
    ...         async for answer in client.map(["hello world 42\n", "good morning 7\n"], adapter="title"):
    ...             print(answer.text)
    >>> asyncio.run(ask())
    HELLO WORLD 42 stop
    hello world ##
    Hello World 42
    Good Morning 7
    """

    def _open(self) -> None:
        # grpc.aio binds a channel to the loop that runs when it is made: there may be none yet.
        self._channel: grpc.aio.Channel | None = None
        self._loop_stubs: Stubs | None = None
        self.adapters = AsyncAdapters(self)

    @property
    def _stubs(self) -> Stubs:
        self._check_open()
        if self._loop_stubs is None:
            asyncio.get_running_loop()
            settings = self._settings
            interceptors = list(self._interceptors)
            self._channel = (
                grpc.aio.insecure_channel(settings.target, settings.options, interceptors=interceptors)
                if settings.credentials is None
                else grpc.aio.secure_channel(
                    settings.target, settings.credentials, settings.options, interceptors=interceptors
                )
            )
            self._loop_stubs = stubs_on(self._channel)
        return self._loop_stubs

    async def generate(
        self, prompt: Prompt, *, timeout: Timeout | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates an answer and returns it whole.

        Args:
            prompt: text, or token ids to be taken as they are.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            options: adapter, adapters, max_tokens, min_tokens, temperature, top_p, top_k, min_p,
                repetition_penalty, presence_penalty, frequency_penalty, logit_bias, bad_words, seed, stop,
                include_stop, stop_token_ids, ignore_eos, logprobs, prompt_logprobs, echo, n, priority,
                cache_prefix, structure, request_id; see GenerateOptions.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        return await self._generate(convert.generate_request(prompt, **options), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: Timeout | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Sends the request and returns its answer as an iterator of chunks. Arguments as `generate` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(prompt, **options), timeout)

    async def chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continues a conversation, through the chat template of the adapter or the model.

        Args:
            messages: mappings with "role" and "content", and "name" where the template knows them.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            options: as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; FailedPreconditionError where there is no template.
        """
        return await self._generate(convert.generate_request(Conversation(messages), **options), timeout)

    def stream_chat(
        self,
        messages: Iterable[ChatMessage],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """The same as an iterator of chunks. Arguments as `chat` takes.

        Raises:
            LoraplexError: see loraplex.errors; the server's errors come while iterating.
        """
        return self._stream(convert.generate_request(Conversation(messages), **options), timeout)

    @overload
    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: Literal[False] = False,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationMap[Generation]: ...

    @overload
    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: bool,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationMap[Generation | LoraplexError]: ...

    def map(
        self,
        prompts: Iterable[MapItem],
        *,
        concurrency: int = 32,
        return_errors: bool = False,
        progress: MapProgress | None = None,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationMap[Any]:
        """Generates an answer to each prompt, so many at a time, and yields them in the order of the prompts.

        Args:
            prompts: any iterable of prompts, or of pairs of a prompt and options of its own. It is read as
                answers are taken, at most twice `concurrency` ahead of them.
            concurrency: most requests under way at once.
            return_errors: yield a LoraplexError in the place of its answer and go on. Otherwise it is raised
                there, and what still runs is cancelled.
            progress: called with the answers that are finished, and all there are, or None while that is not
                known; where the answers are taken.
            timeout: of each answer, as of `generate`.
            options: of all prompts, as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; those of the answers come while iterating.
        """
        self._check_open()
        source = MapSource(prompts, options, concurrency, progress)
        return AsyncGenerationMap(source, lambda request: self._generate(request, timeout), return_errors)

    def stream_batch(
        self,
        prompts: Iterable[MapItem],
        *,
        timeout: Timeout | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationBatch:
        """Sends many prompts in one call; an iterator of what they come to, each when it has finished.

        Args:
            prompts: at most 1024 prompts, or pairs of a prompt and options of its own.
            timeout: seconds for all of them; of a Timeouts, `connect` and `total`.
            options: of all prompts, as those of `generate`.

        Raises:
            LoraplexError: see loraplex.errors; that of the whole call comes while iterating.
        """
        limits = dataclasses.replace(self._limits_of(timeout), first_token=None, between_tokens=None)
        batch = batch_request(prompts, options)
        call = self._begin("GenerationService/GenerateBatch", limits)
        return AsyncGenerationBatch(_Parts(self, call, batch), BatchReader(batch))

    async def tokenize(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: Timeout | None = None,
    ) -> list[int]:
        """The token ids of a text or a conversation, as `generate` and `chat` would use them.

        Args:
            adapters: names of those whose chat template counts.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        request = convert.tokenize_request(generation_pb2.TokenizeRequest, prompt, adapters)
        response = await self._call("GenerationService/Tokenize", request, timeout)
        return list(response.token_ids)

    async def count_tokens(
        self,
        prompt: str | Iterable[ChatMessage],
        *,
        adapters: str | Sequence[str] = (),
        timeout: Timeout | None = None,
    ) -> int:
        """How many tokens `tokenize` would return."""
        request = convert.tokenize_request(generation_pb2.CountTokensRequest, prompt, adapters)
        response = await self._call("GenerationService/CountTokens", request, timeout)
        return int(response.count)

    async def model(self, *, timeout: Timeout | None = None) -> ModelInfo:
        """The base model and the server's limits."""
        response = await self._call("ModelService/GetModel", model_pb2.GetModelRequest(), timeout)
        return convert.model_info(response.model)

    async def wait_until_ready(self, timeout: float = 60.0) -> ModelInfo:
        """Waits for a server that is still starting, and returns its model.

        Raises:
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        wait = Wait(self.server, timeout)
        while True:
            try:
                response = await self._call(
                    "ModelService/GetModel",
                    model_pb2.GetModelRequest(),
                    wait.remaining(),
                    wait_for_ready=True,
                )
                return convert.model_info(response.model)
            except UnavailableError:
                await asyncio.sleep(min(wait.POLL_S, wait.remaining()))
            except DeadlineExceededError as error:
                raise wait.expired() from error

    async def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _generate(self, request: generation_pb2.GenerateRequest, timeout: Timeout | None) -> Generation:
        if self._limits_of(timeout).of_parts:
            return await self._stream(request, timeout).collect()
        envelope = generation_pb2.GenerateUnaryRequest(request=request)
        response = await self._call(
            "GenerationService/GenerateUnary", envelope, timeout, request_id=request.request_id
        )
        return convert.generation(request, response)

    def _stream(
        self, request: generation_pb2.GenerateRequest, timeout: Timeout | None
    ) -> AsyncGenerationStream:
        call = self._begin("GenerationService/Generate", timeout, request.request_id)
        return AsyncGenerationStream(_Parts(self, call, request), convert.AnswerReader(request))

    async def _call(
        self, method: str, request: Any, timeout: Timeout | None, *, request_id: str = "", **how: Any
    ) -> Any:
        call = self._begin(method, timeout, request_id)
        with call:
            await self._connect(call)
            response = await self._stubs.method(method)(request, **call.options(), **how)
        call.finish()
        return response

    async def _connect(self, call: Call) -> None:
        """Waits for a server to be there, if the call has a limit for that."""
        if call.must_connect:
            _ = self._stubs  # which opens the channel
            assert self._channel is not None
            code = grpc.StatusCode.OK
            try:
                probe: Any = self._channel.unary_unary(PROBE)
                await probe(b"", **call.probe_options())
            except grpc.aio.AioRpcError as error:
                code = error.code()
            call.probed(code, self.server)


class _Parts:
    """The messages of one streamed answer, each waited for as long as the call's limits allow.

    The call is made at once, or, where it may have to wait for a connection, with the first read.
    """

    def __init__(self, client: AsyncClient, call: Call, request: Any) -> None:
        self.call = call
        self._client = client
        self._request = request
        self._grpc: Any = None
        self._closed = False
        self._first = True
        self._loop = asyncio.get_running_loop()
        if not call.must_connect:
            with call:
                self._open()

    def _open(self) -> None:
        method = self._client._stubs.method(self.call.method)
        self._grpc = method(self._request, **self.call.options())
        if self._closed:
            self._grpc.cancel()

    async def read(self) -> Any:
        """The next message; None at the end."""
        with self.call:
            if self._grpc is None:
                await self._client._connect(self.call)
                self._open()
            phase, seconds = self.call.wait_phase(self._first)
            self._first = False
            try:
                async with asyncio.timeout(seconds):
                    response = await self._grpc.read()
            except TimeoutError:
                self._grpc.cancel()
                raise self.call.late(phase) from None
        return None if response is grpc.aio.EOF else response

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._closed = True
        if self._grpc is not None:
            self._grpc.cancel()
        self.call.leave()

    def let_go(self) -> None:
        """`close` for the collector, which may run on another thread, or after the loop."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.close)


class AsyncGenerationStream:
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `async with`, by `close()`, or by
    letting go of the last reference.
    """

    def __init__(self, parts: _Parts, reader: convert.AnswerReader) -> None:
        self._parts = parts
        self._reader = reader

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._reader.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        response = await self._parts.read()
        if response is None:
            with self._parts.call:
                self._reader.check_complete()
            self._parts.call.finish()
            raise StopAsyncIteration
        chunk = self._reader.chunk(response)
        self._parts.call.info.request_id = self._reader.request_id
        return chunk

    async def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return convert.joined([chunk async for chunk in self])

    async def close(self) -> None:
        """Cancels the generation, unless it has finished."""
        self._parts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (parts := getattr(self, "_parts", None)) is not None:
            parts.let_go()


class AsyncGenerationBatch:
    """What the prompts of a batch come to, each as it finishes: iterate over it.

    Leaving it early cancels those that are not finished: by `async with`, by `close()`, or by letting go
    of the last reference.
    """

    def __init__(self, parts: _Parts, reader: BatchReader) -> None:
        self._parts = parts
        self._reader = reader

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchResult:
        response = await self._parts.read()
        if response is None:
            with self._parts.call:
                self._reader.check_complete()
            self._parts.call.finish()
            raise StopAsyncIteration
        return self._reader.result(response)

    async def collect(self) -> list[Generation | LoraplexError]:
        """Reads what is left, and returns that in the order of the prompts."""
        return in_order([result async for result in self])

    async def close(self) -> None:
        """Cancels what is not finished."""
        self._parts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (parts := getattr(self, "_parts", None)) is not None:
            parts.let_go()


class AsyncAdapterWatch:
    """What changes with the adapters: iterate over it. It ends by `async with`, or by `close()`."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AdapterChanges:
        response = await self._parts.read()
        if response is None:
            self._parts.call.finish()
            raise StopAsyncIteration
        return convert.adapter_changes(response)

    async def close(self) -> None:
        """Ends it."""
        self._parts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncAdapters:
    """The adapters that the server knows: `client.adapters`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._call = client._call

    async def load(
        self,
        name: str,
        source: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers the adapter that PEFT saved in the folder `source`, a path on the server's machine.

        With `load_inplace` it replaces an adapter of that name, whose running requests finish on the old one.
        """
        request = convert.load_request(name, source, load_inplace)
        response = await self._call("AdapterService/LoadAdapter", request, timeout)
        return convert.adapter_info(response.adapter)

    async def register_composition(
        self,
        name: str,
        combination_type: str,
        members: AdapterMix,
        *,
        density: float | None = None,
        majority_sign: str | None = None,
        svd_rank: int | None = None,
        seed: int | None = None,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers what PEFT's `add_weighted_adapter` makes of several adapters as an adapter of its own.

        Args:
            combination_type: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune" or "magnitude_prune_svd".
            members: `[("sql", 1.0), ("polite", 0.5)]`, or a mapping of names to weights.
            density: part of the values to keep, for ties, dare and magnitude_prune.
            majority_sign: "total" or "frequency", for ties.
            svd_rank: rank of the result, for svd; None is the largest of the members'.
            seed: of what dare drops.
        """
        request = convert.composition_request(
            name, combination_type, members, density, majority_sign, svd_rank, seed, load_inplace
        )
        response = await self._call("AdapterService/RegisterComposition", request, timeout)
        return convert.adapter_info(response.adapter)

    async def upload(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        progress: Progress | None = None,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Sends the adapter that PEFT saved in `folder`, on this machine, and registers it.

        Args:
            progress: called with the bytes sent so far, and all there are; perhaps on another thread.
        """
        parts = upload_parts(name, folder, load_inplace, progress)
        response = await self._call("AdapterService/UploadAdapter", _threaded(parts), timeout)
        return convert.adapter_info(response.adapter)

    async def unload(
        self, name: str, *, grace_seconds: float | None = None, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Waits for the adapter's running requests, frees it, and returns what is registered then.

        Requests that still run after `grace_seconds` are cancelled; None lets them run to their end.
        """
        request = convert.unload_request(name, grace_seconds)
        response = await self._call("AdapterService/UnloadAdapter", request, timeout)
        return [convert.adapter_info(adapter) for adapter in response.remaining]

    async def prefetch(
        self, names: Sequence[str], *, host_only: bool = False, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Hints that adapters will be wanted; they are brought in as far as there is room that nobody needs.

        Returns at once, with where they are now.
        """
        response = await self._call(
            "AdapterService/Prefetch", convert.prefetch_request(names, host_only), timeout
        )
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    def watch(self, names: Sequence[str] = (), *, timeout: Timeout | None = None) -> AsyncAdapterWatch:
        """All adapters, or those of these names, and then what changes with them, as an iterator."""
        request = convert.watch_request(names)
        call = self._client._begin("AdapterService/Watch", timeout)
        return AsyncAdapterWatch(_Parts(self._client, call, request))

    async def list(self, *, timeout: Timeout | None = None) -> list[AdapterInfo]:
        """All registered adapters."""
        response = await self._call(
            "AdapterService/ListAdapters", adapters_pb2.ListAdaptersRequest(), timeout
        )
        return [convert.adapter_info(adapter) for adapter in response.adapters]

    async def get(self, name: str, *, timeout: Timeout | None = None) -> AdapterInfo:
        """One adapter."""
        request = convert.named(adapters_pb2.GetAdapterRequest, name)
        response = await self._call("AdapterService/GetAdapter", request, timeout)
        return convert.adapter_info(response.adapter)

    async def pin(self, name: str, pinned: bool = True, *, timeout: Timeout | None = None) -> AdapterInfo:
        """Brings the adapter to the device and keeps it there; `pinned=False` lets it be evicted again."""
        response = await self._call("AdapterService/PinAdapter", convert.pin_request(name, pinned), timeout)
        return convert.adapter_info(response.adapter)


async def _threaded(parts: Iterator[Any]) -> AsyncIterator[Any]:
    """What reads files and hashes them, on threads."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
